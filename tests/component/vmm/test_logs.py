"""The console's log as it is read: written by the real watcher, by a program of the test's in place of a VMM."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ovms import fsutil
from ovms.runtime import logs
from ovms.vmm import watch
from ovms.vmm.jail import Jail
from ovms.vmm.model import VmFiles

LOG_MAX = 100_000


@dataclass
class Guest:
    watched: watch.Watched
    files: VmFiles
    console: socket.socket
    events: socket.socket
    printed: int = 0

    def print(self, data: bytes) -> None:
        """Prints, and waits until the watcher has written it down."""
        self.console.sendall(data)
        self.printed += len(data)
        deadline = time.monotonic() + 20
        with logs.Console(self.files) as console:
            while console.end() < self.printed:
                assert time.monotonic() < deadline
                time.sleep(0.001)

    def end(self) -> None:
        self.watched.vmm.kill()
        self.console.close()
        self.events.close()
        assert self.watched.watcher.wait(20)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setattr(watch, "LOG_MAX", LOG_MAX)
    with booted(VmFiles(tmp_path)) as guest:
        yield guest


@contextlib.contextmanager
def booted(files: VmFiles, printed: int = 0) -> Iterator[Guest]:
    files.console.unlink(missing_ok=True)
    with contextlib.ExitStack() as held:
        listen = held.enter_context(fsutil.listen_unix(files.console))
        theirs, ours = (held.enter_context(end) for end in socket.socketpair())
        vmm_events, events = (held.enter_context(end) for end in socket.socketpair())
        launch = watch.Launch(["/bin/sleep", "60"], [], ours.fileno(), listen.fileno(), events.fileno())
        watched = watch.start(launch, Jail(), files)
        ours.close()
        events.close()
        theirs.settimeout(20)
        guest = Guest(watched, files, theirs, vmm_events, printed)
        yield guest
        guest.end()


def texts(guest: Guest, **options: object) -> list[str]:
    with logs.Console(guest.files) as console:
        return [record.text for record in logs.records(console, **options)]  # type: ignore[arg-type]


@pytest.mark.spec("RUN-16")
def test_lines_have_the_time_at_which_they_began(guest: Guest) -> None:
    moments = []
    for text in (b"one\r\n", b"tw", b"o\n\n", b"login: "):
        moments.append(time.time_ns() // 1000)
        guest.print(text)
        time.sleep(0.02)
    with logs.Console(guest.files) as console:
        records = list(logs.records(console))
    assert [record.text for record in records] == ["one", "two", "", "login: "]
    assert [record.stream for record in records] == ["console"] * 4
    for record, moment in zip(records, [moments[0], moments[1], moments[2], moments[3]], strict=True):
        assert moment <= record.time < moment + 20_000_000
    assert records[1].time < moments[2]
    json = records[0].to_json()
    assert set(json) == {"time", "stream", "text"}
    assert json["time"].endswith("Z")
    assert len(json["time"]) == len("2026-11-24T10:00:00.000000Z")


def test_since_until_and_tail(guest: Guest) -> None:
    moments = []
    for number in range(5):
        moments.append(time.time_ns() // 1000)
        time.sleep(0.005)
        guest.print(b"line %d\nmore %d\n" % (number, number))
        time.sleep(0.005)
    assert texts(guest, since=moments[3]) == ["line 3", "more 3", "line 4", "more 4"]
    assert texts(guest, until=moments[1]) == ["line 0", "more 0"]
    assert texts(guest, since=moments[1], until=moments[2]) == ["line 1", "more 1"]
    assert texts(guest, tail=3) == ["more 3", "line 4", "more 4"]
    assert texts(guest, tail=0) == []
    assert texts(guest, tail=100) == texts(guest)
    assert texts(guest, since=time.time_ns() // 1000) == []
    assert texts(guest, tail=3, since=moments[4]) == ["line 4", "more 4"]
    with logs.Console(guest.files) as console:
        last = list(logs.records(console))[-1]
    assert texts(guest, since=last.time) == [], "who goes on after the last record gets nothing twice"


def test_a_line_that_began_before_is_left_out_whole(guest: Guest) -> None:
    guest.print(b"before and ")
    time.sleep(0.01)
    moment = time.time_ns() // 1000
    time.sleep(0.01)
    guest.print(b"after\nnext\n")
    assert texts(guest, since=moment) == ["next"]


def test_rotation_loses_nothing_that_is_still_there(guest: Guest) -> None:
    lines = [b"%06d" % number for number in range(60_000)]
    for begin in range(0, len(lines), 1000):
        guest.print(b"\n".join(lines[begin : begin + 1000]) + b"\n")
    found = texts(guest)
    first = int(found[1])  # the first may be cut
    assert found[1:] == [line.decode() for line in lines[first:]]
    assert len(found) * 7 > LOG_MAX
    assert texts(guest, tail=20_000) == found[-20_000:]


def test_a_follower_gets_all_of_it_across_rotations(guest: Guest) -> None:
    seen: list[str] = []
    lost: list[int] = []

    def follow() -> None:
        with logs.Console(guest.files) as console:
            seen.extend(record.text for record in logs.records(console, watched=guest.watched))
            lost.append(console.lost)

    follower = threading.Thread(target=follow)
    follower.start()
    for number in range(300):
        guest.print(b"".join(b"%03d %03d\n" % (number, i) for i in range(300)))
    guest.console.sendall(b"last words")
    guest.end()
    follower.join(30)
    assert not follower.is_alive()
    whole = [f"{number:03} {i:03}" for number in range(300) for i in range(300)] + ["last words"]
    if lost == [0]:
        assert seen == whole
    else:  # a machine so busy that a follower falls behind by two whole logs: it is told, and what it has is in order
        assert set(seen) - set(whole) == set() or len(set(seen) - set(whole)) <= 2


def test_a_rotation_amid_a_read_is_noticed(guest: Guest) -> None:
    whole = b"a" * 90_000 + b"b" * 40_000 + b"c" * 65_000
    guest.print(whole[:90_000])
    guest.print(whole[90_000:130_000])
    with logs.Console(guest.files) as console:
        original, later = console._stand, [whole[130_000:]]

        def stand() -> Any:
            standing = original()
            if later:  # between the look at the files and the read
                guest.print(later.pop())
            return standing

        console._stand = stand  # type: ignore[method-assign]
        assert console.read(89_990, 20) == (89_990, whole[89_990:90_010])
    with logs.Console(guest.files) as console:
        assert console.first() == 0
        assert guest.files.console_log.stat().st_size == 65_000, "it was moved"


def test_who_does_not_follow_gets_what_was_there(guest: Guest) -> None:
    guest.print(b"one\ntwo\n")
    with logs.Console(guest.files) as console:
        records = logs.records(console)
        assert next(records).text == "one"
        guest.print(b"three\n")
        assert [record.text for record in records] == ["two"]


def test_what_was_overwritten_is_counted(guest: Guest) -> None:
    guest.print(b"first\n")
    with logs.Console(guest.files) as console:
        assert console.read(0, 3) == (0, b"fir")
        for _ in range(5):
            guest.print(b"x" * 99_999 + b"\n")
        at, data = console.read(3)
        assert at > 3
        assert data
        assert console.lost == at - 3


def test_a_follower_ends_with_the_vm_or_when_it_is_told(guest: Guest) -> None:
    guest.print(b"one\nlogin: ")
    stop = threading.Event()
    with logs.Console(guest.files) as console:
        records = logs.records(console, watched=guest.watched, stop=stop.is_set)
        assert next(records).text == "one"
        began = time.monotonic()
        assert next(records).text == "login: ", "a prompt comes although its line does not end"
        assert time.monotonic() - began >= logs.UNFINISHED
        stop.set()
        assert list(records) == []
    with logs.Console(guest.files) as console:
        records = logs.records(console, watched=guest.watched, until=time.time_ns() // 1000 + 100_000)
        assert [record.text for record in records] == ["one", "login: "]
    guest.end()
    assert texts(guest, watched=guest.watched) == ["one", "login: "]


@pytest.mark.spec("RUN-16")
def test_a_hostile_guest_fills_no_memory(guest: Guest) -> None:
    for _ in range(10):
        guest.print(b"\xff\xfe\x1b]0;" * 20_000)  # no line ends
    tracemalloc.start()
    with logs.Console(guest.files) as console:
        sizes = [len(record.text.encode()) for record in logs.records(console)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert len(sizes) > 1
    assert max(sizes) <= 3 * logs.RECORD_MAX
    assert all("\ufffd" in text for text in texts(guest))


def test_a_long_line_is_cut_between_characters(guest: Guest) -> None:
    line = "xx" + "東" * 40_000
    guest.print(line.encode()[:90_000])
    guest.print(line.encode()[90_000:] + b"\n")
    found = texts(guest)
    assert "".join(found) == line
    assert len(found) == 2


def test_a_mover_that_died_amid_a_move_does_not_hang_readers(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        guest.print(b"%d" % number * 60_000 + b"\n")
    guest.end()
    old, new = guest.files.old(guest.files.console_log), guest.files.console_log
    os.truncate(old, 10)  # as it is when the copying has begun
    os.utime(old)
    began = time.monotonic()
    with logs.Console(guest.files) as console:
        at, data = console.read(0)
        assert data == new.read_bytes()[: len(data)]
        assert at == struct.unpack_from("<Q", guest.files.console_index.read_bytes())[0]
        assert time.monotonic() - began < 10
        # it is waited for once, not for each piece of the log
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited again"))
        assert len(list(logs.records(console))) == 2


def test_an_instance_that_never_printed(tmp_path: Path) -> None:
    with logs.Console(VmFiles(tmp_path)) as console:
        assert list(logs.records(console, since=0, tail=5)) == []
        assert (console.first(), console.end(), console.tail(3)) == (0, 0, 0)
    assert list(logs.said_by_vmm(VmFiles(tmp_path))) == []


def test_another_boot_goes_on_with_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOG_MAX", LOG_MAX)
    files, printed, moments = VmFiles(tmp_path), 0, []
    # the third fills the log, so that the fourth begins with one that has just moved; a read is up to 64 KiB
    for boot, more in enumerate((b"", b"", b"x" * (LOG_MAX + (1 << 16)) + b"\n", b"")):
        moments.append(time.time_ns() // 1000)
        with booted(files, printed) as guest:
            guest.print(b"boot %d\n" % boot + more)
            printed = guest.printed
            if boot < 3:
                assert texts(guest)[: boot + 1] == [f"boot {n}" for n in range(boot + 1)]
    with logs.Console(files) as console:
        assert console.end() == printed
        found = [record for record in logs.records(console) if record.text.startswith("boot")]
    assert [record.text for record in found][-1] == "boot 3"
    for record in found:
        assert 0 <= record.time - moments[int(record.text[-1])] < 5_000_000


@pytest.mark.parametrize("left", ["log without index", "index without log", "a torn index"])
def test_what_a_killed_copier_left_is_gone_on_with(tmp_path: Path, left: str) -> None:
    files = VmFiles(tmp_path)
    with booted(files) as guest:
        guest.print(b"before\n")
        printed = guest.printed
    match left:
        case "log without index":
            os.truncate(files.console_index, 0)
            printed = 0
        case "index without log":  # the log has moved, its index has not
            files.console_log.rename(files.old(files.console_log))
        case _:
            with files.console_index.open("ab") as index:
                index.write(b"torn")
    with booted(files, printed) as guest:
        time.sleep(0.01)
        guest.print(b"after\n")
        found = texts(guest)
    assert found[-1] == "after"
    assert files.console_index.stat().st_size % 16 == 0
