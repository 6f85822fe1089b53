"""The guest's agent, played by the test: as it is, and as a hostile guest would play it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.played import Answer, Played, Refusal

from ovms import fsutil
from ovms.errors import AgentUnavailable, GuestError, GuestTimeout, InputError, Locked, NotFound, Unsupported
from ovms.runtime import agent as agents
from ovms.runtime import guest
from ovms.runtime.agent import Agent, AgentRefused
from ovms.vmm.model import VmFiles


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "_LEAST", 0.2)
    monkeypatch.setattr(agents, "_AGAIN", 0.1)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Played]]:
    with contextlib.ExitStack() as held:

        def start(answer: Answer = lambda name, arguments: {}, **options: Any) -> Played:
            played = Played(tmp_path, answer, **options)
            held.callback(played.close)
            return played

        yield start


def ask(played: Played, *, wait: float = 1.0, **options: Any) -> Any:
    with Agent(played.files, wait=wait) as agent:
        return agent.execute("guest-ping", **options)


# --- sessions --------------------------------------------------------------------------------------------------------


def test_what_was_left_unread_is_thrown_away(play: Callable[..., Played]) -> None:
    left = b'{"return": {"pid": 666}}\n{"error": {"class": "GenericError", "desc": "Invalid JSON"}}\n'
    played = play(lambda name, arguments: "mine", sync=lambda n: left + b'\xff{"return": %d}\n' % n)
    assert ask(played) == "mine"


def test_the_answer_to_another_s_sync_is_not_ours(play: Callable[..., Played]) -> None:
    old = b'\xff{"return": 12}\n\xff{"return": "x"}\n\xffnot json\n\xff{"error": {"desc": "no"}}\n'
    assert ask(play(lambda name, arguments: 5, sync=lambda n: old + b'\xff{"return": %d}\n' % n)) == 5


@pytest.mark.parametrize(
    "sync",
    [lambda n: b"", lambda n: b"\xff", lambda n: b'\xff{"return": ', lambda n: b'\xff{"return": %d}\n' % (n + 1),
     lambda n: b'{"return": %d}\n' % n],
    ids=["silence", "a delimiter alone", "half a message", "another number", "no delimiter"],
)  # fmt: skip
def test_an_agent_that_does_not_sync_is_given_up(play: Callable[..., Played], sync: Any) -> None:
    began = time.monotonic()
    with pytest.raises(AgentUnavailable, match="does not answer in time"):
        ask(play(sync=sync), wait=0.2)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("late", [False, True], ids=["it heard nothing of the first", "it answers all of them, late"])
def test_an_agent_that_was_not_there_yet_is_asked_again(play: Callable[..., Played], late: bool) -> None:
    unanswered: list[int] = []

    def sync(number: int) -> bytes:
        unanswered.append(number)
        if len(unanswered) < 3:
            return b""
        answered = unanswered if late else unanswered[-1:]
        return b"".join(b'\xff{"return": %d}\n' % number for number in answered)

    assert ask(play(lambda name, arguments: "mine", sync=sync), wait=30) == "mine"
    assert len(set(unanswered)) == 3


@pytest.mark.spec("SEC-6")
@pytest.mark.parametrize("piece", [b"x", b"\n", b'{"return": 1}\n'])
def test_endless_talk_is_cut_off(play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(agents, "SKIP_MAX", 1 << 20)
    with pytest.raises(GuestError, match="without end") as caught:
        ask(play(sync=lambda number: piece * (8 << 20)), wait=30)
    assert caught.value.code == "guest-failed"


@pytest.mark.spec("SEC-6")
@pytest.mark.parametrize("piece", [b"\xff", b'\xff{"return": 1}\n', b'\xff"' + b"a" * 50])
@pytest.mark.long
def test_endless_delimiters_end_in_time(play: Callable[..., Played], piece: bytes) -> None:
    with pytest.raises((GuestError, AgentUnavailable)):
        ask(play(sync=lambda number: piece * (1 << 18)), wait=0.3)


@pytest.mark.spec("SEC-6")
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"x" * (2 << 20), "a line of more than"),
        (b'{"return": "' + b"x" * (2 << 20) + b'"}\n', "a line of more than|nonsense"),
        (b"\xff\xfe\n", "nonsense"),
        (b"{}\n", "neither a result nor an error"),
        (b"[1]\n", "no message"),
        (b'{"error": "x"}\n', "neither"),
        (b'{"return": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", "nonsense"),
        (b'{"return": 1, "return": 2}\n', "nonsense"),
        (b'{"return": 1e999}\n', "nonsense"),
        (b'{"return": ' + b"9" * 10_000 + b"}\n", "nonsense"),
    ],
)
def test_nonsense_is_told_and_ends_the_session(play: Callable[..., Played], answer: bytes, says: str) -> None:
    answers = iter([answer, b'{"return": "well"}\n'])
    played = play(lambda name, arguments: next(answers))
    with Agent(played.files, wait=1.0) as agent:
        with pytest.raises(GuestError, match=says):
            agent.execute("guest-ping")
        assert agent.execute("guest-ping") == "well"
    assert played.sessions == 2


def test_a_late_answer_is_not_taken_for_the_next_one(play: Callable[..., Played]) -> None:
    answers = iter([b"", b'{"return": "mine"}\n'])
    played = play(lambda name, arguments: next(answers), sync=lambda n: b'{"return": "late"}\n\xff{"return": %d}\n' % n)
    with Agent(played.files, wait=1.0) as agent:
        with pytest.raises(AgentUnavailable):
            agent.execute("guest-ping", timeout=0.1)
        assert agent.execute("guest-ping") == "mine"


def test_an_error_of_the_agent_is_no_escape_sequence(play: Callable[..., Played]) -> None:
    def refuse(name: str, arguments: dict[str, Any]) -> Any:
        raise Refusal("\x1b]0;evil\x07" + "x" * 100_000)

    with pytest.raises(AgentRefused) as caught:
        ask(play(refuse))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1200
    assert caught.value.code == "guest-failed"


def test_without_a_socket_there_is_no_agent(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="no channel"), Agent(VmFiles(tmp_path)) as agent:
        agent.execute("guest-ping")


def test_a_port_that_the_guest_has_not_opened_is_told_at_once(play: Callable[..., Played]) -> None:
    played = play(sync=lambda n: b"")
    began = time.monotonic()
    with (
        pytest.raises(AgentUnavailable, match="no agent runs") as caught,
        Agent(played.files, listens=lambda: False) as a,
    ):
        a.execute("guest-ping")
    assert time.monotonic() - began < agents.WAIT / 2
    assert caught.value.code == "agent-unavailable"
    assert "qemu-guest-agent" in str(caught.value.hint)


def test_with_a_wait_the_port_may_be_opened_later(play: Callable[..., Played]) -> None:
    def slow(number: int) -> bytes:
        time.sleep(0.6)
        return b'\xff{"return": %d}\n' % number

    played = play(lambda name, arguments: 1, sync=slow)
    with Agent(played.files, listens=lambda: False, wait=10) as agent:
        assert agent.execute("guest-ping") == 1


def test_two_take_turns(play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "HOLD", 0.05)
    played = play(lambda name, arguments: arguments)
    answers: list[Any] = []
    order: list[int] = []

    def talk(number: int) -> None:
        with Agent(played.files, wait=20) as agent:
            for i in range(20):
                time.sleep(0.01)
                answers.append((number, i) == tuple(agent.execute("echo", {"v": [number, i]})["v"]))
                order.append(number)

    talkers = [threading.Thread(target=talk, args=(number,)) for number in range(3)]
    for talker in talkers:
        talker.start()
    for talker in talkers:
        talker.join(60)
    assert answers == [True] * 60
    assert sum(a != b for a, b in itertools.pairwise(order)) > 5
    with Agent(played.files) as agent:
        agent.execute("echo", {})
        with pytest.raises(Locked), Agent(played.files, wait=0.1) as other:
            other.execute("echo", {})


# --- programs --------------------------------------------------------------------------------------------------------


def exec_agent(*statuses: Any) -> Answer:
    left = list(statuses)

    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == "guest-exec":
            return {"pid": 42}
        return left.pop(0) if len(left) > 1 else left[0]

    return answer


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_program_s_exit_code_and_words(play: Callable[..., Played]) -> None:
    end = {"exited": True, "exitcode": 3, "out-data": b64(b"out"), "err-data": b64(b"err\x00")}
    played = play(exec_agent({"exited": False}, {"exited": False}, end))
    with Agent(played.files) as agent:
        done = guest.run(agent, ["ls", "-l"], stdin=b"in", env={"A": "1"}, directory="/tmp")
    assert done == guest.Finished(3, b"out", b"err\x00")
    name, arguments = played.commands[0]
    assert name == "guest-exec"
    assert [arguments["path"], *arguments["arg"]][3:] == ["/tmp", "env", "A=1", "ls", "-l"]
    assert base64.b64decode(arguments["input-data"]) == b"in"


def test_a_signal_is_128_and_its_number(play: Callable[..., Played]) -> None:
    with Agent(play(exec_agent({"exited": True, "signal": 9, "out-truncated": True})).files) as agent:
        assert guest.run(agent, ["x"]) == guest.Finished(137, b"", b"", truncated=True)


@pytest.mark.spec("SEC-6")
@pytest.mark.parametrize(
    "status",
    [{}, [], None, {"exited": "yes"}, {"exited": True}, {"exited": True, "exitcode": "0"}, {"exited": True, "exitcode": True},
     {"exited": True, "exitcode": 4000}, {"exited": True, "exitcode": -1}, {"exited": True, "signal": -500},
     {"exited": True, "exitcode": 0, "out-data": "!!"}, {"exited": True, "exitcode": 0, "out-data": 7}],
)  # fmt: skip
def test_a_status_that_makes_no_sense(play: Callable[..., Played], status: Any) -> None:
    with Agent(play(exec_agent(status)).files, wait=0.3) as agent, pytest.raises(GuestError):
        guest.run(agent, ["x"])


def test_more_output_than_can_be(play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "STREAM_MAX", 1000)
    end = {"exited": True, "exitcode": 0, "out-data": b64(bytes(1001))}
    with Agent(play(exec_agent(end)).files) as agent, pytest.raises(GuestError, match="1000 at most"):
        guest.run(agent, ["x"])


def test_a_program_that_takes_too_long_is_ended(play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "TIDY", 0.1)
    played = play(exec_agent({"exited": False}))
    with Agent(played.files) as agent, pytest.raises(GuestTimeout):
        guest.run(agent, ["sleep"], timeout=0.1)
    kill = [arguments for name, arguments in played.commands if name == "guest-exec"][1]
    assert kill["arg"][1:] == ['kill -s TERM "$0"', "42"]


def test_an_interrupt_ends_the_program_too(play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == "guest-exec":
            return {"pid": 42}
        return {"exited": False}

    monkeypatch.setattr(guest, "TIDY", 0.1)
    played = play(answer)

    original, waits = guest._wait, iter([True])

    def interrupted(*arguments: Any) -> Any:
        if next(waits, False):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(guest, "_wait", interrupted)
    with Agent(played.files) as agent, pytest.raises(KeyboardInterrupt):
        guest.run(agent, ["sleep"])
    assert played.names().count("guest-exec") == 2


def test_a_number_that_may_be_another_s_by_now_is_not_ended(play: Callable[..., Played]) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == "guest-exec":
            return {"pid": 42}
        raise Refusal("Invalid parameter 'pid'")

    played = play(answer)
    with Agent(played.files) as agent:
        with pytest.raises(GuestError, match="started anew"):
            guest.run(agent, ["sleep"])
        guest._end(agent, 42)
    assert played.names().count("guest-exec") == 1


def test_others_get_their_turn_while_a_program_runs(
    play: Callable[..., Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "HOLD", 0.05)
    monkeypatch.setattr(agents, "HOLD", 600)
    ended = threading.Event()

    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == "guest-exec":
            return {"pid": 1}
        return {"exited": ended.is_set(), "exitcode": 0} if name == "guest-exec-status" else "turn"

    played = play(answer)

    def long() -> None:
        with Agent(played.files) as agent:
            guest.run(agent, ["sleep"])

    runner = threading.Thread(target=long)
    runner.start()
    time.sleep(0.2)
    assert ask(played, wait=20) == "turn"
    ended.set()
    runner.join(20)
    assert not runner.is_alive()


@pytest.mark.parametrize(
    ("said", "code"),
    [("Guest command 'x' failed: Failed to execute child process “x” (No such file or directory)", 127),
     ("Guest agent command failed, error was 'Failed to execute child process “x” (Permission denied)'", 126),
     ("Command guest-exec has been disabled", None)],
)  # fmt: skip
def test_what_cannot_be_run_has_a_shell_s_code(said: str, code: int | None) -> None:
    assert guest.refusal_code(AgentRefused("guest-exec", said)) == code


@pytest.mark.parametrize("words", [["a\0b"], ["a" * 200_000], ["\udcff"]])
def test_arguments_that_no_agent_takes(play: Callable[..., Played], words: list[str]) -> None:
    played = play()
    with Agent(played.files) as agent, pytest.raises(InputError):
        guest.run(agent, words)
    assert played.commands == []


# --- files -----------------------------------------------------------------------------------------------------------


class Guest:
    """An agent over a directory that stands for the guest's root, with programs of the host's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, Any] = {}
        self.changes: dict[str, Any] = {}

    def path(self, text: str) -> Path:
        return self.root / text.lstrip("/")

    def __call__(self, name: str, arguments: dict[str, Any]) -> Any:
        if name in self.changes:
            change = self.changes[name]
            return change(arguments) if callable(change) else change
        return getattr(self, name.replace("-", "_"))(arguments)

    def guest_exec(self, arguments: dict[str, Any]) -> Any:
        words = [arguments["path"], *arguments["arg"]]
        if words[0] == "rm":
            self.path(words[-1]).unlink(missing_ok=True)
            self.code, self.said = 0, b""
        elif "chmod" in words[2]:
            self.path(words[4]).chmod(int(words[3], 8))
            self.path(words[4]).rename(self.path(words[5]))
            self.code, self.said = 0, b""
        else:
            path = self.path(words[3])
            kind = (
                "directory" if path.is_dir() else "file" if path.is_file() else "other" if path.exists() else "nothing"
            )
            self.code, self.said = 0, kind.encode() + b"\n"
            if kind == "file" and os.access(path, os.X_OK) and path.stat().st_mode & 0o111:
                self.said = b"program\n"
        return {"pid": 1}

    def guest_exec_status(self, _arguments: dict[str, Any]) -> Any:
        return {"exited": True, "exitcode": self.code, "out-data": b64(self.said)}

    def guest_file_open(self, arguments: dict[str, Any]) -> Any:
        self.files[7] = self.path(arguments["path"]).open(arguments["mode"] + "b")
        return 7

    def guest_file_close(self, arguments: dict[str, Any]) -> Any:
        self.files.pop(arguments["handle"]).close()
        return {}

    def guest_file_read(self, arguments: dict[str, Any]) -> Any:
        data = self.files[arguments["handle"]].read(arguments["count"])
        return {"count": len(data), "buf-b64": b64(data), "eof": len(data) < arguments["count"]}

    def guest_file_write(self, arguments: dict[str, Any]) -> Any:
        data = base64.b64decode(arguments["buf-b64"])
        self.files[arguments["handle"]].write(data[:700_000])  # a short write now and then
        return {"count": min(len(data), 700_000), "eof": False}


@pytest.fixture
def machine(play: Callable[..., Played], tmp_path: Path) -> tuple[Guest, Played]:
    (tmp_path / "guest" / "etc").mkdir(parents=True)
    machine = Guest(tmp_path / "guest")
    return machine, play(machine)


CONTENT = bytes(range(256)) * 8192 + b"end"


@pytest.mark.parametrize("target", ["/etc", "/etc/", "/etc/file"])
def test_a_file_goes_in_whole_with_its_permissions(machine: tuple[Guest, Played], tmp_path: Path, target: str) -> None:
    inside, played = machine
    source = tmp_path / "file"
    source.write_bytes(CONTENT)
    (inside.root / "etc" / "file").write_bytes(b"old")
    with source.open("rb") as file, Agent(played.files) as agent:
        assert guest.put(agent, file.fileno(), target, name="file", mode=0o100751) == "/etc/file"
    assert (inside.root / "etc" / "file").read_bytes() == CONTENT
    assert (inside.root / "etc" / "file").stat().st_mode & 0o777 == 0o751
    assert [path.name for path in (inside.root / "etc").iterdir()] == ["file"]
    assert inside.files == {}


@pytest.mark.parametrize(
    ("target", "kind"), [("/nowhere/file", NotFound), ("/nowhere/", NotFound), ("/etc/file/", Exception)]
)
def test_where_nothing_goes(machine: tuple[Guest, Played], tmp_path: Path, target: str, kind: type[Exception]) -> None:
    _, played = machine
    with (tmp_path / "file").open("w+b") as file, Agent(played.files) as agent, pytest.raises(kind):
        guest.put(agent, file.fileno(), target, name="file", mode=0o644)
    assert "guest-file-open" not in played.names()


@pytest.mark.spec("GEN-3")
@pytest.mark.parametrize("count", [0, -1, 1 << 40, "x", None, True])
def test_a_write_that_goes_wrong_leaves_nothing_in_the_guest(
    machine: tuple[Guest, Played], tmp_path: Path, count: Any
) -> None:
    inside, played = machine
    (inside.root / "etc" / "file").write_bytes(b"old")
    inside.changes["guest-file-write"] = {"count": count}
    (tmp_path / "file").write_bytes(CONTENT)
    with (tmp_path / "file").open("rb") as file, Agent(played.files) as agent, pytest.raises(GuestError):
        guest.put(agent, file.fileno(), "/etc/file", name="file", mode=0o644)
    assert (inside.root / "etc" / "file").read_bytes() == b"old"
    assert [path.name for path in (inside.root / "etc").iterdir()] == ["file"]
    assert inside.files == {}


def test_a_file_comes_out_whole(machine: tuple[Guest, Played], tmp_path: Path) -> None:
    inside, played = machine
    (inside.root / "etc" / "file").write_bytes(CONTENT)
    (inside.root / "etc" / "tool").write_bytes(b"#!/bin/sh\n")
    (inside.root / "etc" / "tool").chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_bytes(b"old")
    with Agent(played.files) as agent:
        guest.get(agent, "/etc/file", out / "file")
        guest.get(agent, "/etc/tool", out / "tool")
    assert (out / "file").read_bytes() == CONTENT
    assert not (out / "file").stat().st_mode & 0o111
    assert (out / "tool").stat().st_mode & 0o100
    assert sorted(path.name for path in out.iterdir()) == ["file", "tool"]
    assert inside.files == {}


@pytest.mark.spec("GEN-3", "SEC-6")
@pytest.mark.parametrize(
    "answer",
    [{"count": 0, "buf-b64": "", "eof": False}, {"buf-b64": b64(bytes(guest.BLOCK + 1)), "eof": False}, {"eof": False},
     {"buf-b64": "=", "eof": True}, {"buf-b64": b64(b"x")}, {"buf-b64": b64(b"x"), "eof": "no"}, "x", None],
)  # fmt: skip
def test_a_read_that_makes_no_sense_leaves_the_old_file(
    machine: tuple[Guest, Played], tmp_path: Path, answer: Any
) -> None:
    inside, played = machine
    (inside.root / "etc" / "file").write_bytes(b"x")
    inside.changes["guest-file-read"] = answer
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_bytes(b"old")
    with Agent(played.files) as agent, pytest.raises(GuestError):
        guest.get(agent, "/etc/file", out / "file")
    assert (out / "file").read_bytes() == b"old"
    assert [path.name for path in out.iterdir()] == ["file"]
    assert inside.files == {}


def test_a_guest_that_gives_without_end_does_not_fill_the_disk(
    machine: tuple[Guest, Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, played = machine
    (inside.root / "etc" / "file").write_bytes(b"x")
    inside.changes["guest-file-read"] = {"buf-b64": b64(bytes(1 << 16)), "eof": False}
    looks: list[int] = []

    def space(path: Path, size: int, what: str) -> None:
        looks.append(size)
        if len(looks) == 3:
            raise GuestError("full")

    monkeypatch.setattr(guest, "BLOCK", 1 << 16)
    monkeypatch.setattr(fsutil, "require_space", space)
    with Agent(played.files) as agent, pytest.raises(GuestError, match="full"):
        guest.get(agent, "/etc/file", tmp_path / "out")
    assert played.names().count("guest-file-read") == 32
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", [b"", b"file; rm -rf /", b"\xff", b"x" * 100])
def test_a_guest_that_does_not_tell_what_is_there(machine: tuple[Guest, Played], tmp_path: Path, said: bytes) -> None:
    inside, played = machine
    inside.changes["guest-exec-status"] = {"exited": True, "exitcode": 0, "out-data": b64(said)}
    with Agent(played.files) as agent, pytest.raises(GuestError, match="does not tell"):
        guest.get(agent, "/etc/file", tmp_path / "out")


def test_what_is_no_file_does_not_come_out(machine: tuple[Guest, Played], tmp_path: Path) -> None:
    inside, played = machine
    os.mkfifo(inside.root / "etc" / "fifo")
    with Agent(played.files) as agent:
        for path, kind in (("/etc", Unsupported), ("/etc/fifo", Unsupported), ("/etc/none", NotFound)):
            with pytest.raises(kind):
                guest.get(agent, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "place"),
    [("web:/etc/x", ("web", "/etc/x")), ("file", (None, "file")), ("./a:b", (None, "./a:b")), ("/a:/b", (None, "/a:/b")),
     ("web:/a:b", ("web", "/a:b"))],
)  # fmt: skip
def test_places(text: str, place: tuple[str | None, str]) -> None:
    assert guest.place(text) == place


def test_a_place_in_a_guest_is_absolute() -> None:
    with pytest.raises(InputError, match="begins with a slash"):
        guest.place("web:etc")


def test_shutting_down_has_no_answer(play: Callable[..., Played]) -> None:
    played = play(lambda name, arguments: b"")
    with Agent(played.files) as agent:
        guest.shut_down(agent)
    assert played.commands == [("guest-shutdown", {"mode": "powerdown"})]

    def refuse(name: str, arguments: dict[str, Any]) -> Any:
        raise Refusal("disabled")

    played.close()
    with Agent(play(refuse).files) as agent, pytest.raises(AgentRefused):
        guest.shut_down(agent)
