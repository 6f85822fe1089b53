"""Answers that are not plain (see :mod:`ovms.oci.plain`): in chunks, without a length, in pieces. The standard library reads them.

It takes half as long to import as a pull takes to begin, so it is imported for the first of these.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ovms.lazy import regex
from ovms.oci import plain

if TYPE_CHECKING:
    import socket

#: Seconds from the first byte of an answer's head to its last, and for what stands around the chunks of a body.
LINES_TIME: Final = 30.0
#: Lines after a chunked body.
_TRAILERS_MAX: Final = 100


def read(data: bytes, sock: socket.socket, method: str) -> Response:
    """An answer up to its body, waited for; *data* is what has come of it.

    Raises:
        OSError, ValueError, http.client.HTTPException: as it went.
    """
    response = Response(plain.Ahead(data, sock), method=method)  # type: ignore[arg-type]
    response.begin()
    return response


class Response(http.client.HTTPResponse):
    """As :class:`ovms.oci.connections.Response`, and an answer whose lines have an end.

    The standard library bounds each, and not all of them: any number of 100s before an answer, of trailers after it, and of bytes
    that drip.
    """

    fp: Any

    def begin(self) -> None:
        """Reads the head. Raises :class:`TimeoutError` where it does not come to an end."""
        ahead = self.fp.peek(1)
        if b"\r\n\r\n" in ahead and _FINAL.match(ahead):
            super().begin()  # all of it is here, as it nearly always is
            return
        with self._in_time():
            super().begin()

    @property
    def sock(self) -> socket.socket | None:
        """What the body comes from, None where it has ended."""
        sock: socket.socket | None = getattr(getattr(self.fp, "raw", None), "_sock", None)
        return sock

    def get_all(self, name: str) -> list[str]:
        """The values of a header."""
        return [str(value) for value in self.headers.get_all(name) or []]

    def read_some(self, buffer: memoryview) -> int:
        """Reads once, as much as there is and there is room for. 0: no more comes."""
        if self.length is None or self.chunked or not hasattr(self.fp, "readinto1"):
            data = self.read1(len(buffer))
            buffer[: len(data)] = data
            count = len(data)
        else:
            count = self.fp.readinto1(buffer[: self.length])
            self.length -= count
        # which closes the answer where it was read to its end
        return count or self.readinto(buffer)

    def _close_conn(self) -> None:
        fp = self.fp
        super()._close_conn()  # type: ignore[misc]
        # what nobody asked for: the next request would take what follows it for its answer
        self.will_close = self.will_close or getattr(fp, "surplus", False)

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        fp = self.fp
        self.fp = lines = _Lines(fp)
        try:
            yield
        finally:
            if self.fp is lines:  # else it was closed
                self.fp = fp

    def _read_next_chunk_size(self) -> int:
        if b"\n" in self.fp.peek(1):  # which is nearly always so
            return int(super()._read_next_chunk_size())  # type: ignore[misc]
        with self._in_time():
            return int(super()._read_next_chunk_size())  # type: ignore[misc]

    def _read_and_discard_trailer(self) -> None:
        lines = _Lines(self.fp)
        for _ in range(_TRAILERS_MAX):
            if lines.readline(_LINE_MAX) in (b"\r\n", b"\n", b""):
                return
        raise http.client.HTTPException("more trailers than anybody needs")


#: The beginning of a head that no other follows, as one does after a 100.
_FINAL: Final = regex(rb"HTTP/1\.[01] [2-5][0-9][0-9] ")
#: Of one line that nobody wants.
_LINE_MAX: Final = 64 * 1024


class _Lines:
    """The lines of an open file, as long as they come in :data:`LINES_TIME` from the first byte on."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._end: float | None = None

    def readline(self, limit: int) -> bytes:
        """A line, or *limit* bytes of one. Raises :class:`TimeoutError`."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n"):
            ahead = self._file.peek(1)  # waits for one piece at the most
            now = time.monotonic()
            self._end = self._end or now + LINES_TIME
            if now > self._end:
                raise TimeoutError("an answer's head does not come to an end")
            if not ahead:
                break
            line += self._file.read(min(ahead.find(b"\n") + 1 or len(ahead), limit - len(line)))
        return line

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
