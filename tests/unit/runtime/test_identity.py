"""How a clone becomes itself, with an agent that is played: what is asked of it, and what becomes of an answer that is none."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.played import Played, Refusal

from ovms.errors import AgentUnavailable
from ovms.runtime import agent, identity
from ovms.runtime.identity import Identity, Wanted

WANTED = Wanted("clone", "0123456789abcdef" * 2)


class Control:
    """What of a VMM's control channel is used here."""

    def __init__(self, *looks: bool) -> None:
        self.looks = list(looks)
        self.links: list[tuple[float, bool]] = []

    def agent_listens(self) -> bool:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def set_link(self, up: bool) -> None:
        self.links.append((time.monotonic(), up))


def become(played: Played, wanted: Wanted = WANTED, control: Control | None = None) -> Identity:
    return identity.become(control or Control(True), played.files, wanted, port=True)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_LEAST", 0.2)
    monkeypatch.setattr(identity, "FIRST", 1.5)
    monkeypatch.setattr(identity, "TOTAL", 2.0)
    monkeypatch.setattr(identity, "ASKED", 2.5)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Played]]:
    made = []

    def start(answer: Callable[[str, dict[str, Any]], Any], **options: Any) -> Played:
        made.append(Played(tmp_path, answer, **options))
        return made[-1]

    yield start
    for played in made:
        played.close()


def says(out: bytes, err: bytes = b"") -> Callable[[str, dict[str, Any]], Any]:
    end = {
        "exited": True,
        "exitcode": 0,
        "out-data": base64.b64encode(out).decode(),
        "err-data": base64.b64encode(err).decode(),
    }
    return lambda name, _: {"guest-exec": {"pid": 7}, "guest-exec-status": end}.get(name, {})


def test_all_of_it_in_one_program(play: Callable[..., Played]) -> None:
    played = play(says(b"clock\nrandom\nhostname\nmachine-id\n"))
    before = time.time()
    assert become(played) == Identity(clock=True, random=True, hostname="clone", machine_id=True)
    assert played.names() == ["guest-ping", "guest-exec", "guest-exec-status"]
    words = played.commands[1][1]["arg"]
    assert words[3:5] == ["clone", WANTED.machine_id]
    assert before - 0.1 <= float(words[5]) <= time.time() + 0.001  # it is rounded
    assert len(base64.b64decode(played.commands[1][1]["input-data"])) == 64


@pytest.mark.parametrize("taken", [True, False])
def test_a_network_card_gets_an_address_of_its_own(play: Callable[..., Played], taken: bool) -> None:
    mac = "52:54:00:01:02:03"
    played = play(says(b"clock\nrandom\nhostname\n" + (b"mac\n" if taken else b"")))
    done = become(played, Wanted("clone", WANTED.machine_id, renew_link=True, mac=mac), Control(True))
    assert played.commands[1][1]["arg"][6] == mac
    assert done.mac == (mac if taken else None)
    assert ("has the address of the snapshot's" in str(done.note)) != taken
    assert Identity.from_json(done.to_json()) == done
    # what an older ovms wrote
    assert Identity.from_json({k: v for k, v in done.to_json().items() if k != "mac"}).mac is None


def test_what_the_guest_refuses_is_said_and_no_failure(play: Callable[..., Played]) -> None:
    played = play(says(b"clock\n", b"sh: can't create /proc/sys/kernel/hostname: \x1b[2JRead-only file system"))
    done = become(played)
    assert (done.clock, done.hostname, done.machine_id) == (True, None, False)
    assert "Read-only file system" in str(done.note)
    assert "\x1b" not in str(done.note)
    assert "random numbers may be those of another clone" in str(done.note)


def test_an_agent_that_may_run_nothing_sets_the_clock(play: Callable[..., Played]) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == "guest-exec":
            raise Refusal("Command guest-exec has been disabled")
        return {}

    played = play(answer)
    done = become(played)
    assert (done.clock, done.hostname, done.machine_id) == (True, None, False)
    assert "has been disabled" in str(done.note)
    assert abs(played.commands[-1][1]["time"] / 1e9 - time.time()) < 5


def test_a_guest_without_an_agent_costs_some_milliseconds(play: Callable[..., Played]) -> None:
    played = play(says(b""))
    began = time.monotonic()
    assert become(played, control=Control(False)) == Identity(note="no agent runs in the guest")
    assert time.monotonic() - began < 10.0
    assert played.sessions == 0
    assert identity.become(Control(True), played.files, WANTED, port=False).note == "its VM has no port for an agent"  # type: ignore[arg-type]
    assert played.sessions == 0


def test_a_port_that_is_seen_a_moment_later(play: Callable[..., Played]) -> None:
    assert become(play(says(b"clock\nhostname\n")), control=Control(False, True)).hostname == "clone"


@pytest.mark.long
def test_an_agent_that_does_not_answer_holds_up_nobody(play: Callable[..., Played]) -> None:
    began = time.monotonic()
    done = become(play(says(b""), sync=lambda _: b""))
    assert time.monotonic() - began < 10.0
    assert "does not answer" in str(done.note)
    assert not done.clock


@pytest.mark.long
def test_a_program_that_does_not_end_holds_up_nobody(play: Callable[..., Played]) -> None:
    played = play(lambda name, _: {"guest-exec": {"pid": 7}, "guest-exec-status": {"exited": False}}.get(name, {}))
    began = time.monotonic()
    assert "goes on" in str(become(played).note)
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(
    "answer",
    [{}, {"pid": "x"}, [], {"pid": 7, "exited": True, "out-data": "?"}, {"pid": 7, "exited": "yes"}],
    ids=["no-pid", "pid-text", "list", "no-base64", "exited-text"],
)
def test_an_answer_without_sense_is_said(play: Callable[..., Played], answer: Any) -> None:
    done = become(play(lambda name, _: {} if name == "guest-ping" else answer))
    assert done.note is not None
    assert done.hostname is None


def test_a_host_name_that_was_asked_for_is_taken_or_nothing(play: Callable[..., Played]) -> None:
    asked = Wanted("clone", WANTED.machine_id, asked=True)
    played = play(says(b"clock\n"))
    with pytest.raises(AgentUnavailable, match="did not take the host name clone"):
        become(played, asked)
    with pytest.raises(AgentUnavailable, match="no agent runs"):
        become(played, asked, Control(False))


def test_the_link_is_down_long_enough_to_be_seen_and_comes_back(play: Callable[..., Played]) -> None:
    control = Control(True)
    renewing = Wanted("clone", WANTED.machine_id, renew_link=True)
    assert become(play(says(b"clock\nhostname\n")), renewing, control).link
    assert [up for _, up in control.links] == [False, True]
    assert control.links[1][0] - control.links[0][0] >= 0.2


def test_the_link_comes_back_whatever_happens(play: Callable[..., Played]) -> None:
    class Broken(Control):
        def agent_listens(self) -> bool:
            raise KeyboardInterrupt

    control = Broken()
    with pytest.raises(KeyboardInterrupt):
        become(play(says(b"")), Wanted("clone", WANTED.machine_id, renew_link=True), control)
    assert [up for _, up in control.links] == [False, True]


@pytest.mark.parametrize("done", [Identity(), Identity(True, True, "clone", True, "52:54:00:01:02:03", True, "why")])
def test_it_is_written_down(done: Identity) -> None:
    assert Identity.from_json(done.to_json()) == done
