"""Events that are numbered and forgotten, and logs that are begun anew."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from support.records import RECORD

from ovms.errors import Locked, ResourceError
from ovms.process import ProcessId
from ovms.runtime import watching
from ovms.runtime.instances import Instances
from ovms.runtime.logrecords import LogReader, read_all
from ovms.runtime.record import Record
from ovms.runtime.root import Root
from ovms.runtime.runtime import Runtime
from ovms.runtime.server.http import HttpError
from ovms.runtime.server.serve import again
from ovms.runtime.watching import EventLog, Watcher
from ovms.spec import limits
from ovms.vmm.model import VmFiles


@pytest.mark.spec("RUN-17")
def test_events_are_numbered_one_by_one() -> None:
    log = EventLog(first=100)
    assert log.after(None) == []
    for state in ("starting", "running"):
        log.add("state", instance_id="x", state=state, error=None)
    assert [event["seq"] for event in log.after(None)] == [100, 101]
    assert [event["seq"] for event in log.after(100)] == [101]
    assert log.after(101) == []
    assert "error" not in log.after(100)[0]


@pytest.mark.spec("RUN-17")
def test_what_is_forgotten_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVENTS_MAX", 3)
    log = EventLog(first=100)
    for _ in range(5):
        log.add("state")
    assert next((event["seq"], event["type"]) for event in log.after(99)) == (101, "lost")
    assert [event["seq"] for event in log.after(99)] == [101, 102, 103, 104]
    assert [event["seq"] for event in log.after(101)] == [102, 103, 104]
    # a number of another server, or of one before
    assert [event["type"] for event in log.after(10_000)] == ["lost", "state", "state", "state"]


@pytest.mark.spec("RUN-17")
def test_what_is_remembered_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog()
    tracemalloc.start()
    try:
        for number in range(watching.EVENTS_MAX):
            log.add("state", instance_id=f"00000000-0000-4000-8000-{number:012x}", state="running")
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
        assert len(log.after(None)) == watching.EVENTS_MAX
    finally:
        tracemalloc.stop()
    # an error may say more
    for _ in range(300):
        log.add("state", state="error", error={"detail": "x" * 10_000})
    last = log.last
    kept = log.after(None)
    assert (watching.EVENTS_BYTES_MAX - 20_000) // 10_100 < len(kept) < watching.EVENTS_BYTES_MAX // 10_000
    assert [event["seq"] for event in kept] == list(range(last + 1 - len(kept), last + 1))
    assert log.after(last - len(kept) - 1)[0]["type"] == "lost"
    # not even one that would be all
    monkeypatch.setattr(watching, "EVENTS_BYTES_MAX", 1000)
    log.add("state", error={"detail": "x" * 1000})
    assert log.after(None) == []
    assert [(event["seq"], event["type"]) for event in log.after(last)] == [(last + 1, "lost")]
    assert log.after(last + 1) == []


@pytest.mark.spec("RUN-17")
def test_every_place_to_begin_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks of remembered events end."""
    monkeypatch.setattr(watching, "_BLOCK", 300)
    monkeypatch.setattr(watching, "EVENTS_MAX", 30)
    log = EventLog(first=1)
    for number in range(50):
        log.add("state", state="x" * (number * 7 % 40))
        for since in range(-1, log.last + 2):
            first = max(1, log.last - 29)
            expected = list(range(max(since + 1, first), log.last + 1))
            if since < first - 1 or since > log.last:
                expected = [first - 1, *range(first, log.last + 1)]
            assert [event["seq"] for event in log.after(since)] == expected
        assert log._size == sum(map(len, log._blocks)) == len(log.text_after(None)[0]) == sum(log._lengths)


@pytest.mark.spec("RUN-17")
def test_numbers_never_fall() -> None:
    first = EventLog()
    first.add("state")
    assert EventLog().last >= first.last - 1


def test_a_listener_that_ends_while_an_event_is_noted_holds_nobody_up() -> None:
    """As the garbage collector may end it: in a thread that holds the log's lock."""
    log = EventLog()
    listening = log.listening(lambda: None)
    listening.__enter__()

    def end() -> None:
        with log._lock:
            listening.__exit__(None, None, None)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    log.add("state")


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Instances, Watcher, EventLog]]:
    """A watcher that takes its time, unless it is told to look."""
    monkeypatch.setattr(watching, "_LOOK", 60.0)
    instances = Runtime(Root(tmp_path / "root")).instances
    log = EventLog()
    watcher = Watcher(instances, log)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    yield instances, watcher, log
    watcher.stop()
    thread.join(10)
    assert not thread.is_alive()


def until(log: EventLog, state: str) -> None:
    deadline = time.monotonic() + 20
    while not any(event.get("state") == state for event in log.after(None)):
        assert time.monotonic() < deadline, log.after(None)
        time.sleep(0.002)


def added(instances: Instances) -> tuple[Record, ExitStack]:
    record, lock = instances.add(lambda number, name: replace(RECORD, id=number, name=name, process=None), "echo", None)
    assert lock is not None
    return record, lock


def test_who_changed_an_instance_says_so_and_is_heard(watched: tuple[Instances, Watcher, EventLog]) -> None:
    instances, watcher, log = watched
    record, lock = added(instances)
    until(log, "starting")
    lock.close()  # it was not started after all: no file says so
    watcher.look(record.id)
    until(log, "error")


def test_what_changes_while_an_instance_is_first_looked_at_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LOOK", 60.0)
    instances = Runtime(Root(tmp_path / "root")).instances
    log = EventLog()
    by_id, failed = instances.by_id, replace(RECORD, problem={"code": "x"}, process=None)

    def changed_meanwhile(text: str) -> Record | None:
        record = by_id(text)
        if record is not None and record.problem is None:
            instances.save(replace(failed, id=record.id, name=record.name))
        return record

    monkeypatch.setattr(instances, "by_id", changed_meanwhile)
    watcher = Watcher(instances, log)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    try:
        _, lock = added(instances)
        until(log, "error")
        lock.close()
    finally:
        watcher.stop()
        thread.join(10)


def test_who_left_a_guest_paused_or_frozen_is_missed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_LOOK", 60.0)
    instances = Runtime(Root(tmp_path / "root")).instances
    left: list[str] = []
    watcher = Watcher(instances, EventLog(), left.append)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    try:
        record, lock = added(instances)
        # a VM that lives, as far as it matters
        record = instances.save(replace(record, process=ProcessId.of(os.getpid()), fs_frozen=True))
        time.sleep(0.7)
        assert left == []
        lock.close()  # as who is killed: no file says so
        deadline = time.monotonic() + 10
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.7)
        assert left == [record.id]  # once, until it is looked at everything
        with instances.locked(record) as newest:
            instances.save(replace(newest, fs_frozen=False))
        time.sleep(0.7)
        assert left == [record.id]
    finally:
        watcher.stop()
        thread.join(10)
    assert not thread.is_alive()


def test_nothing_ends_what_is_to_be_done_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    tries: list[BaseException] = [
        HttpError(ResourceError("the server has too much to do"), 503),
        Locked("x"),
        OSError(5, "x"),
        ValueError("a fault of ours"),
    ]

    async def work() -> None:
        if tries:
            raise tries.pop()
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(again(work, pause=0.0))
    assert tries == []
    assert "internal error while tidying up: ValueError: a fault of ours" in capsys.readouterr().err


def test_and_is_heard_while_other_news_are_gathered(
    watched: tuple[Instances, Watcher, EventLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    instances, watcher, log = watched
    monkeypatch.setattr(watching, "_SETTLE", 60.0)
    record, lock = added(instances)
    time.sleep(0.1)  # its record is news, and waits for more of it
    lock.close()
    assert log.after(None) == []
    watcher.look(record.id)
    until(log, "error")


def test_and_ends_at_once_when_it_is_told_to_together_with_other_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_SETTLE", 60.0)
    instances = Runtime(Root(tmp_path / "root")).instances
    watcher = Watcher(instances, EventLog())
    _, lock = added(instances)
    watcher.stop()
    stepping = threading.Thread(target=watcher.step, args=(60.0,), daemon=True)
    stepping.start()
    stepping.join(10)
    assert not stepping.is_alive()
    watcher.close()
    lock.close()


def test_how_long_an_instance_has_is_not_moved_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = Runtime(Root(tmp_path / "root")).instances
    record, lock = added(instances)
    with lock:
        assert instances.stop_left(record) is None
        instances.ask_to_stop(record, 30)
        monkeypatch.setattr(time, "time", lambda: 0.0)
        left = instances.stop_left(record)
        assert left is not None
        assert 0 < left <= 30


def test_a_look_after_the_end_goes_nowhere(tmp_path: Path) -> None:
    watcher = Watcher(Runtime(Root(tmp_path / "root")).instances, EventLog())
    watcher.close()
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    more = [os.dup(write) for _ in range(16)]  # among them the numbers that the watcher had
    watcher.look("x")
    watcher.wake()
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    for fd in (read, write, *more):
        os.close(fd)


def files(directory: Path) -> VmFiles:
    found = VmFiles(directory)
    found.console_log.write_bytes(b"")
    return found


def index(path: Path, *pairs: tuple[int, int]) -> None:
    path.write_bytes(b"".join(struct.pack("<QQ", number, time_ns) for number, time_ns in pairs))


@pytest.mark.spec("RUN-16")
def test_lines_have_the_time_of_their_first_byte(tmp_path: Path) -> None:
    log = files(tmp_path)
    log.console_log.write_bytes(b"one\r\ntwo\xff\nthree")
    index(log.console_index, (0, 10**18), (5, 2 * 10**18), (8, 3 * 10**18), (10, 1_600_000_000_123_000_000))
    records = list(read_all(log))
    assert [(record["stream"], record["text"]) for record in records] == [
        ("console", "one"), ("console", "two\ufffd"), ("console", "three"),
    ]  # fmt: skip
    assert [record["time"] for record in records] == [
        "2001-09-09T01:46:40.000Z", "2033-05-18T03:33:20.000Z", "2020-09-13T12:26:40.123Z",
    ]  # fmt: skip
    assert [record["text"] for record in read_all(log, tail=2)] == ["two\ufffd", "three"]
    assert list(read_all(log, tail=0)) == []
    assert [record["text"] for record in read_all(log, since_ns=10**18)] == ["two\ufffd", "three"]


@pytest.mark.spec("RUN-16")
def test_a_log_that_is_begun_anew_is_read_on(tmp_path: Path) -> None:
    log = files(tmp_path)
    reader = LogReader(log)
    log.console_log.write_bytes(b"one\ntwo\n")
    assert [record["text"] for record in reader.read()] == ["one", "two"]
    log.old(log.console_log).write_bytes(b"one\ntwo\nthree\n")
    log.console_log.write_bytes(b"four\n")
    assert [record["text"] for record in reader.read()] == ["three", "four"]
    assert [record["text"] for record in read_all(log)] == ["one", "two", "three", "four"]
    assert list(reader.read()) == []


@pytest.mark.spec("RUN-16")
def test_times_are_right_when_the_log_has_begun_anew(tmp_path: Path) -> None:
    log = VmFiles(tmp_path)
    log.old(log.console_log).write_bytes(b"one\ntwo\n")
    log.old(log.console_index).write_bytes(struct.pack("<QQQQ", 1000, 5 * 10**9, 1004, 6 * 10**9))
    log.console_log.write_bytes(b"three\nfour\n")
    log.console_index.write_bytes(struct.pack("<QQQQ", 1008, 7 * 10**9, 1014, 8 * 10**9))
    assert [record["time"][17:] for record in read_all(log)] == ["05.000Z", "06.000Z", "07.000Z", "08.000Z"]
    assert [record["text"] for record in read_all(log, since_ns=6 * 10**9)] == ["three", "four"]


def test_a_line_without_end_becomes_records(tmp_path: Path) -> None:
    log = files(tmp_path)
    log.console_log.write_bytes(b"x" * (3 * limits.LOG_TEXT_MAX + 10))
    texts = [record["text"] for record in read_all(log)]
    assert "".join(texts) == "x" * (3 * limits.LOG_TEXT_MAX + 10)
    assert max(map(len, texts)) <= limits.LOG_TEXT_MAX


def test_what_the_vmm_said_is_among_it(tmp_path: Path) -> None:
    log = files(tmp_path)
    log.vmm_log.write_bytes(b"warning: x\n")
    os.utime(log.vmm_log, (10**9, 10**9))
    assert list(read_all(log)) == [{"time": "2001-09-09T01:46:40.000Z", "stream": "vmm", "text": "warning: x"}]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list(read_all(VmFiles(tmp_path))) == []
