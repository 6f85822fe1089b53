"""What a VM printed, as records with times: read, from a time or the last lines on, followed while it grows.

The watcher writes (``ovms.vmm.watch``), and any number of readers look, without a lock between them::

    console.log.1   bytes O … B of what was printed     console.idx.1   (O, time) (…, time) …
    console.log     bytes B … E                         console.idx     (B, time) (…, time) …

When ``console.log`` is full its content moves to ``console.log.1``, then that of its index to the index beside it. A
reader therefore looks how the files stand before and after it reads, and again where that changed meanwhile. Bytes keep
their numbers for good, so a reader goes on where it was; what was overwritten before it came there is counted in
:attr:`Console.lost`. Whatever the guest prints, a reader holds two blocks and one record of it.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from ovms.lazy import dataclass
from ovms.spec import limits
from ovms.vmm import watch
from ovms.vmm.model import VmFiles
from ovms.vmm.watch import Watched

#: Bytes of a line that make one record; a longer line becomes several.
RECORD_MAX: Final = 64 * limits.KIB
_BLOCK: Final = 64 * limits.KIB
#: Seconds between looks at a log that is followed.
POLL: Final = 0.2
#: Seconds after which the beginning of a line that is followed becomes a record: a prompt, say.
UNFINISHED: Final = 1.0
#: Seconds that a move between the files takes at the most; after that its mover has died.
_MOVE: Final = 1.0
_LAST_WORDS: Final = 2.0
_ENTRY: Final = struct.Struct("<QQ")
_ENTRIES: Final = 4096

#: Asked a few times a second while a reader waits; once it says True, the reader ends.
Stop = Callable[[], bool]


@dataclass(frozen=True)
class LogRecord:
    """A line. ``time`` is when its first byte came, in microseconds since the epoch; ``stream`` is console or vmm."""

    time: int
    stream: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """As the runtime contract has it (RUN-16)."""
        return {"time": timestamp(self.time), "stream": self.stream, "text": self.text}


def timestamp(microseconds: int) -> str:
    """RFC 3339, in UTC, always of the same length."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class _Part:
    """What one log and its index say: the number of the first byte, how many there are, when each file changed."""

    first: int | None
    size: int
    changed: tuple[int, int]


@dataclass(frozen=True)
class _Standing:
    """How the files stand. The bytes from ``old`` on are in console.log.1, those from ``new`` on in console.log."""

    old: int
    old_size: int
    new: int
    new_size: int

    @property
    def first(self) -> int:
        return self.old if self.old_size else self.new

    @property
    def end(self) -> int:
        return self.new + self.new_size


class _Files:
    """A log and its index, open."""

    def __init__(self, log: Path, index: Path, held: contextlib.ExitStack) -> None:
        self.log, self.index = _opened(log, held), _opened(index, held)

    def part(self) -> _Part:
        log, index = os.fstat(self.log), os.fstat(self.index)
        entry = self.entry(0)
        return _Part(None if entry is None else entry[0], log.st_size, (log.st_mtime_ns, index.st_mtime_ns))

    def entry(self, number: int) -> tuple[int, int] | None:
        data = os.pread(self.index, _ENTRY.size, number * _ENTRY.size)
        return _ENTRY.unpack(data) if len(data) == _ENTRY.size else None

    def entries(self, number: int) -> list[tuple[int, int]]:
        data = os.pread(self.index, _ENTRY.size * _ENTRIES, number * _ENTRY.size)
        return list(_ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size]))

    def search(self, value: int, field: int) -> int:
        """How many entries there are whose field (0: number, 1: time) is at most *value*."""
        low, high = 0, os.fstat(self.index).st_size // _ENTRY.size
        while low < high:
            middle = (low + high) // 2
            entry = self.entry(middle)
            if entry is not None and entry[field] <= value:
                low = middle + 1
            else:
                high = middle
        return low


def _opened(path: Path, held: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # the VM has not come so far
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    held.callback(os.close, fd)
    return fd


class Console:
    """What the serial console printed, by the number of each byte. A context manager."""

    def __init__(self, files: VmFiles) -> None:
        self.files = files
        self._held = contextlib.ExitStack()
        with self._held:
            self._old = _Files(files.old(files.console_log), files.old(files.console_index), self._held)
            self._new = _Files(files.console_log, files.console_index, self._held)
            self._held = self._held.pop_all()
        self._times: list[tuple[int, int]] = []
        #: Bytes that were overwritten before they could be read.
        self.lost = 0
        # When the old log and its index last changed, where their mover has died.
        self._abandoned: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _standing(self) -> _Standing | None:
        # None while the one log becomes the other. The old index is the last but one that changes then, and the new log
        # is empty until its index has begun anew.
        old, new = self._old.part(), self._new.part()
        if new.first is None:
            if new.size or old.size:
                return None
            return _Standing(0, 0, 0, 0)
        if old.size == 0:
            return _Standing(0, 0, new.first, new.size) if old.first is None else None
        if old.first is None or old.changed[0] > old.changed[1] or old.first + old.size > new.first:
            return None
        return _Standing(old.first, old.size, new.first, new.size)

    def _stand(self) -> _Standing:
        deadline = time.monotonic() + _MOVE
        while (standing := self._standing()) is None:
            old, new = self._old.part(), self._new.part()
            # the mover died amid the move: only the newer log can be made sense of. It is waited for once, not at each look.
            if old.changed == self._abandoned or time.monotonic() > deadline:
                self._abandoned = old.changed
                return _Standing(0, 0, new.first or 0, new.size)
            time.sleep(0.001)
        return standing

    def end(self) -> int:
        """The number of the byte that comes next."""
        return self._stand().end

    def first(self) -> int:
        """The number of the first byte that is still there."""
        return self._stand().first

    def read(self, at: int, size: int = _BLOCK) -> tuple[int, bytes]:
        """At most *size* bytes from number *at* on, or from the first later one that is still there: where, and what.

        Nothing when there is no more (yet).
        """
        while True:
            standing = self._stand()
            begin = max(at, standing.first)
            if standing.old_size and begin < standing.old + standing.old_size:
                fd, offset, most = self._old.log, begin - standing.old, standing.old + standing.old_size - begin
            else:
                begin = max(begin, standing.new)
                fd, offset, most = self._new.log, begin - standing.new, standing.end - begin
            data = os.pread(fd, min(size, most), offset) if most > 0 else b""
            after = self._stand()
            if (after.old, after.new) == (standing.old, standing.new):
                if data:
                    self.lost += begin - at
                return (begin, data) if data else (at, b"")

    # --- times -------------------------------------------------------------------------------------------------

    def time_of(self, number: int) -> int:
        """When the byte of that number came, in microseconds since the epoch."""
        known = self._times
        if not known or not known[0][0] <= number < known[-1][0]:
            known = self._around(number) or known
            self._times = known
        at = bisect.bisect_right(known, number, key=lambda entry: entry[0])
        return known[max(0, at - 1)][1] // 1000 if known else 0

    def _around(self, number: int) -> list[tuple[int, int]]:
        for files in (self._new, self._old):
            first = files.entry(0)
            if first is not None and first[0] <= number:
                return files.entries(max(0, files.search(number, 0) - 1))
        return self._old.entries(0) or self._new.entries(0)

    def after(self, moment: int) -> int:
        """The number of the first byte that surely came later than *moment* (microseconds): none before a line's."""
        nanoseconds = moment * 1000 + 999
        for files in (self._old, self._new):
            entry = files.entry(files.search(nanoseconds, 1))
            if entry is not None:
                return self._line_begin(entry[0])
        return self.end()

    def _line_begin(self, number: int) -> int:
        # The beginning of the line that the byte of that number is in.
        first = self.first()
        for at, data in self._backwards(number):
            if (newline := data.rfind(b"\n")) >= 0:
                return at + newline + 1
            if number - at >= RECORD_MAX:
                return at
        return min(first, number)

    def tail(self, lines: int) -> int:
        """The number of the byte with which the last *lines* lines begin."""
        end = self.end()
        if lines == 0:
            return end
        found = 0
        for at, data in self._backwards(end):
            stop = len(data)
            if at + stop == end and data.endswith(b"\n"):
                stop -= 1  # the newline that ends the last line begins none
            while (stop := data.rfind(b"\n", 0, stop)) >= 0:
                found += 1
                if found == lines:
                    return at + stop + 1
        return self.first()

    def _backwards(self, end: int) -> Iterator[tuple[int, bytes]]:
        while end > (first := self.first()):
            begin = max(first, end - _BLOCK)
            at, data = self.read(begin, end - begin)
            if at != begin or not data:  # it was overwritten meanwhile
                return
            if at + len(data) < end:  # two files meet here
                rest_at, rest = self.read(at + len(data), end - at - len(data))
                if rest_at != at + len(data):
                    return
                data += rest
            yield begin, data
            end = begin


def pieces(
    console: Console, at: int, watched: Watched | None = None, *, stop: Stop = lambda: False, idle: bool = False
) -> Iterator[tuple[int, bytes]]:
    """What was printed from number *at* on, in pieces with the number of their first byte: all that is there now.

    With *watched* it goes on until that VM has ended, or *stop* says so; with *idle* an empty piece comes each time that
    it waited.
    """
    end = console.end() if watched is None else None  # or a guest that prints without end would never let us go
    while True:
        alive = watched is not None and watched.vmm.alive()
        if watched is not None and not alive:  # its last words are in the files before its end is
            watch.wait_exit(console.files, watched.watcher, _LAST_WORDS)
        while True:
            at, data = console.read(at)
            if end is not None:
                data = data[: max(0, end - at)]
            if not data:
                break
            yield at, data
            at += len(data)
            if stop():
                return
        if not alive or stop():
            return
        assert watched is not None
        if idle:
            yield at, b""
        watched.vmm.wait(POLL)


def records(
    console: Console,
    *,
    since: int | None = None,
    until: int | None = None,
    tail: int | None = None,
    watched: Watched | None = None,
    stop: Stop = lambda: False,
) -> Iterator[LogRecord]:
    """The console's lines, oldest first.

    Args:
        console: where they are read from.
        since: only those that came after this time (microseconds since the epoch).
        until: only those that came up to this time.
        tail: only the last so many of those that are there already.
        watched: go on until this VM has ended. The beginning of a line becomes a record after :data:`UNFINISHED` seconds.
        stop: see :data:`Stop`; also asked while there is nothing to tell.
    """
    at = console.first()
    if since is not None:
        at = max(at, console.after(since))
    if tail is not None:
        at = max(at, console.tail(tail))
    for record in _lines(console, at, watched, lambda: stop() or _past(until)):
        if until is not None and record.time > until:
            return
        if since is None or record.time > since:
            yield record


def _past(moment: int | None) -> bool:
    return moment is not None and time.time_ns() // 1000 > moment


def _lines(console: Console, at: int, watched: Watched | None, stop: Stop) -> Iterator[LogRecord]:
    line, begun, heard = bytearray(), at, time.monotonic()
    for where, data in pieces(console, at, watched, stop=stop, idle=True):
        if line and (where != begun + len(line) or (not data and time.monotonic() - heard >= UNFINISHED)):
            yield _record(console, begun, bytes(line))
            line.clear()
        if not data:
            continue
        heard = time.monotonic()
        if not line:
            begun = where
        line += data
        consumed = 0
        while (end := line.find(b"\n", consumed)) >= 0 or len(line) - consumed > RECORD_MAX:
            size = (end if end >= 0 else len(line)) - consumed
            if size > RECORD_MAX:
                size = _whole(line, consumed)
                end = consumed + size - 1
            yield _record(console, begun + consumed, bytes(line[consumed : consumed + size]))
            consumed = end + 1
        del line[:consumed]
        begun += consumed
    if line:
        yield _record(console, begun, bytes(line))


def _whole(line: bytearray, start: int) -> int:
    # As much of a long line as makes a record, without cutting a character of UTF-8.
    size = RECORD_MAX
    while size > RECORD_MAX - 3 and line[start + size] & 0xC0 == 0x80:
        size -= 1
    return size


def _record(console: Console, number: int, line: bytes) -> LogRecord:
    return LogRecord(console.time_of(number), "console", line.decode("utf-8", "replace").rstrip("\r"))


def said_by_vmm(
    files: VmFiles, *, tail: int | None = None, watched: Watched | None = None, stop: Stop = lambda: False
) -> Iterator[LogRecord]:
    """What the VMM itself said; the arguments are those of :func:`records`.

    Nobody notes when it came. A record's time is that of the last word that was there when it was read.
    """
    with contextlib.ExitStack() as held:
        file = held.enter_context(os.fdopen(os.dup(_opened(files.vmm_log, held)), "rb"))
        skip = 0 if tail is None else max(0, sum(1 for _ in _said(file)) - tail)
        file.seek(0)
        while True:
            alive = watched is not None and watched.vmm.alive()
            if watched is not None and not alive:
                watch.wait_exit(files, watched.watcher, _LAST_WORDS)
            moment = os.fstat(file.fileno()).st_mtime_ns // 1000
            for line in _said(file):
                if alive and not line.endswith(b"\n") and len(line) < RECORD_MAX:
                    file.seek(-len(line), os.SEEK_CUR)  # it goes on
                    break
                if skip:
                    skip -= 1
                    continue
                yield LogRecord(moment, "vmm", line.decode("utf-8", "replace").rstrip("\r\n"))
            if not alive or stop():
                return
            assert watched is not None
            watched.vmm.wait(POLL)


def _said(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(RECORD_MAX):
        yield line
