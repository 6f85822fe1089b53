"""``ovm console`` and ``ovm logs`` on a terminal, with the bare guest; ``ovm exec`` where there is no agent."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support import guests
from support.cli import OVM, Ovm
from support.guests import Console

from ovms import fsutil


@pytest.fixture
def web(ovm: Ovm, project: Path) -> Console:
    """A VM "web"."""
    ovm.ok("build", project, "-t", "echo:1")
    instance_id = ovm.ok("run", "-d", "--name", "web", "--accel", "tcg", "--memory", "32m", "echo:1").out.strip()
    console = Console(ovm.root / "instances" / instance_id)
    console.wait_for("READY")
    return console


class Terminal:
    """A terminal with a command of ours on it, in a session of its own."""

    def __init__(self, ovm: Ovm, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [OVM, *arguments], env=ovm.env(), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        self.theirs = theirs
        self.shown = b""

    def wait_for(self, text: bytes, *, count: int = 1, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while self.shown.count(text) < count:
            assert time.monotonic() < deadline, self.shown
            self.read(0.05)

    def read(self, seconds: float) -> None:
        ready, _, _ = select.select([self.ours], [], [], seconds)
        if ready:
            self.shown += os.read(self.ours, 65536)

    def type(self, keys: bytes) -> None:
        for key in keys:
            os.write(self.ours, bytes([key]))
            time.sleep(0.03)  # the guest's UART holds one byte

    def end(self, timeout: float = 20) -> int:
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            self.read(0.05)
        self.read(0.05)
        return self.process.returncode

    def raw(self) -> bool:
        return not termios.tcgetattr(self.theirs)[3] & (termios.ICANON | termios.ISIG | termios.ECHO)


@contextlib.contextmanager
def terminal(ovm: Ovm, *arguments: str) -> Iterator[Terminal]:
    there = Terminal(ovm, *arguments)
    try:
        yield there
    finally:
        there.process.kill()
        there.process.wait()
        os.close(there.ours)
        os.close(there.theirs)


def restored(there: Terminal) -> bool:
    return termios.tcgetattr(there.theirs) == there.before


def test_a_visit_to_the_console(ovm: Ovm, web: Console) -> None:
    with terminal(ovm, "console", "web") as there:
        there.wait_for(b"Ctrl-P Ctrl-Q leaves it")
        there.type(b"\n")
        there.wait_for(b"PONG 00000001")
        assert there.raw()
        there.type(b"\x03\x10\n")  # Ctrl-C is the guest's; Ctrl-P alone, too
        there.wait_for(b"PONG 00000002")
        there.type(b"\x10\x11")
        assert there.end() == 0
        assert b"left the console; web goes on" in there.shown
        assert restored(there)
        assert b"READY" not in there.shown, "nothing of the past"
    assert web.ping() == 3


def test_several_look_and_all_may_type(ovm: Ovm, web: Console) -> None:
    with (
        terminal(ovm, "console", "web") as one,
        terminal(ovm, "console", "--detach-keys", "~,.", "web") as two,
        terminal(ovm, "console", "--no-stdin", "web") as three,
    ):
        one.wait_for(b"leaves it")
        two.wait_for(b"~ . leaves it")
        three.read(1.0)
        one.type(b"\n")
        for there in (one, two, three):
            there.wait_for(b"PONG 00000001")
        two.type(b"\n")
        one.wait_for(b"PONG 00000002")
        three.type(b"\n")
        two.type(b"~.")
        assert two.end() == 0
        three.process.send_signal(signal.SIGINT)
        assert three.end() == 130
        one.type(b"q")
        assert one.end() == 0
        assert b"web has ended" in one.shown
        assert b"too many" not in one.shown
        assert b"PONG 00000003" not in one.shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_terminal_is_put_right_whatever_happens(ovm: Ovm, web: Console, number: signal.Signals, code: int) -> None:
    with terminal(ovm, "console", "web") as there:
        there.wait_for(b"leaves it")
        deadline = time.monotonic() + 10
        while not there.raw():
            assert time.monotonic() < deadline
        there.process.send_signal(number)
        assert there.end() == code
        assert restored(there)
        assert b"\x1b[?25h" in there.shown
    assert web.ping() == 1


def test_while_it_is_stopped_the_terminal_is_the_shell_s(ovm: Ovm, web: Console) -> None:
    with terminal(ovm, "console", "web") as there:
        there.wait_for(b"leaves it")
        while not there.raw():
            time.sleep(0.01)
        there.process.send_signal(signal.SIGTSTP)
        deadline = time.monotonic() + 10
        while not restored(there):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        there.process.send_signal(signal.SIGCONT)
        while not there.raw():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        there.type(b"\n")
        there.wait_for(b"PONG 00000001")
        there.process.kill()


def test_a_guest_that_takes_no_keys_keeps_nobody(ovm: Ovm, web: Console) -> None:
    web.send("h")
    with terminal(ovm, "console", "web") as there:
        there.wait_for(b"leaves it")
        for _ in range(100):
            os.write(there.ours, b"k" * 1000)
            there.read(0.005)
        there.type(b"\x10\x11")
        assert there.end() == 0


@pytest.mark.long
def test_who_comes_too_late_may_look_and_is_told(ovm: Ovm, web: Console) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(fsutil.connect_unix(web.files.console, timeout=5))
        there = held.enter_context(terminal(ovm, "console", "web"))
        there.wait_for(b"nothing that is typed reaches the guest: too many others")
        held.enter_context(fsutil.connect_unix(web.files.console, timeout=5))
        there.type(b"\n\x10\x11")
        assert there.end() == 0
    assert web.ping() == 1


def test_keys_come_through_a_pipe(ovm: Ovm, web: Console) -> None:
    with ovm.popen("console", "web", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as there:
        assert there.stdin is not None
        assert there.stdout is not None
        there.stdin.write(b"\n")
        there.stdin.flush()
        assert there.stdout.readline().strip() == b"PONG 00000001"
        there.stdin.write(b"q")
        there.stdin.close()
        there.stdout.read()
        assert there.wait(20) == 0


def test_what_is_no_console(ovm: Ovm, web: Console) -> None:
    assert ovm("console", "--json", "web").code == 2
    assert ovm("console", "--detach-keys", "ctrl-1", "web").code == 2
    ovm.ok("stop", "-t", "0", "web")
    done = ovm("console", "web")
    assert (done.code, "ovm logs web" in done.err) == (5, True)


@pytest.mark.spec("SEC-3")
def test_logs_never_drive_a_terminal_unless_they_may(ovm: Ovm, web: Console) -> None:
    evil = b"\x1b]0;evil\x07\x1b[2Jtext\r\n"
    with web.files.console_log.open("ab") as log:
        log.write(evil)
    assert ovm.ok("logs", "web").out.encode().endswith(evil.replace(b"\r\n", b"\r\n")), "a pipe gets the bytes"
    with terminal(ovm, "logs", "web") as there:
        assert there.end() == 0
        assert there.shown == b"READY\r\ntext\r\n"
    with terminal(ovm, "logs", "--raw", "web") as there:
        assert there.end() == 0
        assert evil.strip() in there.shown
    (_, record) = map(json.loads, ovm.ok("logs", "--json", "web").out.splitlines())
    assert record["text"] == "\x1b]0;evil\x07\x1b[2Jtext"


def test_logs_by_time(ovm: Ovm, web: Console) -> None:
    time.sleep(0.05)
    between = datetime.now(UTC)
    time.sleep(0.05)
    web.ping()
    web.ping()
    stamp = between.isoformat()
    assert ovm.ok("logs", "--since", stamp, "web").out == "PONG 00000001\nPONG 00000002\n"
    assert ovm.ok("logs", "--until", stamp, "web").out == "READY\n"
    assert ovm.ok("logs", "--since", str(between.timestamp()), "-n", "1", "web").out == "PONG 00000002\n"
    assert ovm.ok("logs", "--since", "1h30m", "-n", "all", "web").out.count("\n") == 3
    assert ovm.ok("logs", "--since", (between + timedelta(hours=1)).isoformat(), "web").out == ""
    lines = ovm.ok("logs", "-t", "web").out.splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (READY|PONG \d{8})", line) for line in lines)
    assert datetime.fromisoformat(lines[0].split()[0]) < between < datetime.fromisoformat(lines[1].split()[0])
    for text in ("yesterday", "", "1x", "-5", "99999999999999999999"):
        assert ovm("logs", "--since", text, "web").code == 2
    assert [json.loads(line)["stream"] for line in ovm.ok("logs", "--json", "--vmm", "web").out.splitlines()] == []


def test_followed_records_come_as_they_are_printed(ovm: Ovm, web: Console) -> None:
    with ovm.popen("logs", "-f", "--json", "-n", "0", "web", stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        time.sleep(0.5)
        web.send("\n")
        assert json.loads(follower.stdout.readline())["text"] == "PONG 00000001"
        web.send("q")
        assert follower.stdout.read() == b""
        assert follower.wait(20) == 0


def test_exec_and_cp_without_an_agent(ovm: Ovm, web: Console, tmp_path: Path) -> None:
    began = time.monotonic()
    for words in (("exec", "--json", "web", "--", "true"), ("cp", "--json", "web:/etc/passwd", str(tmp_path))):
        done = ovm(*words)
        assert (done.code, done.error["code"]) == (13, "agent-unavailable")
        assert "qemu-guest-agent" in done.error["hint"]
    assert time.monotonic() - began < 15
    assert ovm("exec", "web").code == 2
    assert ovm("exec", "-e", "=", "web", "--", "true").code == 2
    assert ovm("exec", "--json", "nobody", "--", "true").error["code"] == "instance-not-found"
    assert ovm.ok("stop", "--agent", "--json", "web").json[0]["ending"] == "powered-off"
    assert ovm("exec", "--json", "web", "--", "true").error["code"] == "state-conflict"


def test_nothing_is_left_of_an_exec_that_was_killed(ovm: Ovm, web: Console) -> None:
    with ovm.popen("exec", "--wait", "60", "web", "--", "true") as running:
        time.sleep(0.5)
        running.kill()
    began = time.monotonic()
    assert ovm("exec", "web", "--", "true").code == 13, "the lock and the channel are free"
    assert time.monotonic() - began < 8
    assert guests.qemu_children(ovm.root, timeout=0.0), "the VM goes on"
