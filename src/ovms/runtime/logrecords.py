"""What a VM printed, as the records of the runtime contract (RUN-16): ``{time, stream, text}``.

A hostile guest prints what it likes, so nothing is held but a piece of a line: 32 MiB of line ends are as many records.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ovms.spec import limits
from ovms.vmm.model import VmFiles

#: Bytes that are read at once.
_BLOCK: Final = 64 * 1024
#: Entries of a time index that are looked at: one for each ms in which something was printed.
_INDEX_MAX: Final = 1 << 20
_PAIR: Final = struct.Struct("<QQ")

Record = dict[str, Any]


class LogReader:
    """Reads on from where it was. For one thread at a time."""

    def __init__(self, files: VmFiles, *, since_ns: int = 0) -> None:
        self._since = since_ns
        self._console = _Stream("console", files.console_log, files.old(files.console_log), files)
        self._vmm = _Stream("vmm", files.vmm_log, None, None)

    def read(self) -> Iterator[Record]:
        """What was printed since the last time, whole lines only."""
        for stream in (self._console, self._vmm):
            for time_ns, text in stream.read():
                if time_ns > self._since:
                    yield {"time": _time(time_ns), "stream": stream.name, "text": text}

    def rest(self) -> Iterator[Record]:
        """What has no line end yet: a prompt, or the last words."""
        for stream in (self._console, self._vmm):
            if (found := stream.rest()) is not None and found[0] > self._since:
                yield {"time": _time(found[0]), "stream": stream.name, "text": found[1]}


def read_all(files: VmFiles, *, tail: int | None = None, since_ns: int = 0) -> Iterator[Record]:
    """All that was printed so far, or the last *tail* records of it."""

    def every() -> Iterator[Record]:
        reader = LogReader(files, since_ns=since_ns)
        yield from reader.read()
        yield from reader.rest()

    skip = 0 if tail is None else max(0, sum(1 for _ in every()) - tail)
    for number, record in enumerate(every()):
        if number >= skip:
            yield record


class _Stream:
    def __init__(self, name: str, path: Path, old: Path | None, indexed: VmFiles | None) -> None:
        self.name = name
        self._path = path
        self._files = indexed
        self._old = old
        self._at_old = old is not None
        self._offset = 0
        self._pending = b""
        self._pending_time = 0
        self._index: tuple[list[int], list[int]] = ([], [])
        self._index_of: tuple[Path, int, int] | None = None

    def read(self) -> Iterator[tuple[int, str]]:
        if self._at_old and self._old is not None:
            self._at_old = False
            yield from self._read(self._old)
            self._offset = 0
        with contextlib.suppress(OSError):
            if self._old is not None and self._path.stat().st_size < self._offset:
                # begun anew: what we have not seen of it is in the old one
                yield from self._read(self._old)
                self._offset = 0
        yield from self._read(self._path)

    def rest(self) -> tuple[int, str] | None:
        if not self._pending:
            return None
        found = (self._pending_time, _text(self._pending))
        self._pending = b""
        return found

    def _read(self, path: Path) -> Iterator[tuple[int, str]]:
        with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
            while data := os.pread(file.fileno(), _BLOCK, self._offset):
                at = 0
                while (end := data.find(b"\n", at)) >= 0:
                    time_ns = self._begin(path, self._offset + at)
                    yield time_ns, _text(self._pending + data[at:end])
                    self._pending = b""
                    at = end + 1
                if at < len(data):
                    self._begin(path, self._offset + at)
                    self._pending += data[at:]
                self._offset += len(data)
                if len(self._pending) >= limits.LOG_TEXT_MAX:
                    found = self.rest()
                    assert found is not None
                    time_ns, text = found
                    for i in range(0, len(text), limits.LOG_TEXT_MAX):
                        yield time_ns, text[i : i + limits.LOG_TEXT_MAX]

    def _begin(self, path: Path, offset: int) -> int:
        # The time of the line that begins, or has begun, with what was printed at *offset*.
        if not self._pending:
            self._pending_time = self._time(path, offset)
        return self._pending_time

    def _time(self, path: Path, offset: int) -> int:
        if self._files is None:
            return path.stat().st_mtime_ns
        files = self._files
        index = files.console_index if path == files.console_log else files.old(files.console_index)
        try:
            info = index.stat()
        except FileNotFoundError:
            return path.stat().st_mtime_ns
        if self._index_of != (index, info.st_size, info.st_mtime_ns):
            self._index_of = (index, info.st_size, info.st_mtime_ns)
            with contextlib.suppress(OSError), index.open("rb") as file:
                data = file.read(_INDEX_MAX * _PAIR.size)
                pairs = list(_PAIR.iter_unpack(data[: len(data) // _PAIR.size * _PAIR.size]))
                # bytes keep their numbers when the log begins anew: of this file the first has that of the first entry
                first = pairs[0][0] if pairs else 0
                self._index = ([number - first for number, _ in pairs], [time_ns for _, time_ns in pairs])
        numbers, times = self._index
        found = bisect.bisect_right(numbers, offset) - 1
        return times[found] if 0 <= found < len(times) else path.stat().st_mtime_ns


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
