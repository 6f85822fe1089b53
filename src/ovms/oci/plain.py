"""The answer that a registry gives to nearly every request for a blob, taken as it comes: 200, and as many bytes as were promised.

Nobody waits for it, so one thread can take many; and what the standard library does for each takes longer than all the rest. Any
other answer is left to that: :meth:`Answer.ahead` gives it what has come already.
"""

from __future__ import annotations

import http.client
import io
from typing import TYPE_CHECKING, Any, Final

from ovms.lazy import regex

if TYPE_CHECKING:
    import socket

#: Bytes asked of the kernel at once.
_RECEIVE: Final = 64 * 1024
#: Bytes of a head that belongs to a blob.
_HEAD_MAX: Final = 16 * 1024
_HTTP: Final = b"HTTP/"
#: Lines as they should be, without any of the liberties that were once allowed.
_HEAD: Final = regex(rb"HTTP/1\.1 200 [^\r\n\0]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)+)\r\n")
#: What makes a body anything but so many bytes, after which the next answer comes.
_NOT_PLAIN: Final = frozenset({b"transfer-encoding", b"content-encoding", b"trailer", b"upgrade"})


class Unlike(Exception):
    """It is another answer."""


class Answer:
    """What comes on a socket after a GET."""

    def __init__(self, sock: socket.socket) -> None:
        """*sock* waits for nothing (``settimeout(0)``)."""
        self._sock = sock
        self._data = bytearray()
        self._body: int | None = None
        #: Whether nothing came after it, so that the connection can be used again.
        self.clean = False

    def take(self, size: int) -> bytes | None:
        """Takes what has come, if anything, of a body of *size* bytes. Returns it when it is whole, else None.

        Raises:
            Unlike: it is no such answer, of which all of the head is here.
            OSError, http.client.HTTPException: the connection broke.
        """
        self._receive()
        if self._body is None:
            self._body = self._head(size)
            if self._body is None:
                return None
        if len(self._data) < self._body + size:
            return None
        self.clean = len(self._data) == self._body + size
        return bytes(self._data[self._body : self._body + size])

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE)
        except OSError as exc:
            # TLS has things to say to itself, too; with ssl, which is imported where it is spoken
            if isinstance(exc, BlockingIOError) or type(exc).__name__ in ("SSLWantReadError", "SSLWantWriteError"):
                return
            raise
        if not data:
            raise http.client.RemoteDisconnected("the connection was closed before the whole answer had come")
        self._data += data
        pending = getattr(self._sock, "pending", None)
        # what TLS has decrypted already makes no socket readable
        while pending is not None and (more := pending()):
            self._data += self._sock.recv(more)

    def _head(self, size: int) -> int | None:
        # where the body begins; None: not all of the head is here
        data = self._data
        if not data.startswith(_HTTP[: len(data)]):
            raise Unlike
        end = data.find(b"\r\n\r\n", 0, _HEAD_MAX)
        if end < 0:
            if len(data) >= _HEAD_MAX:
                raise Unlike
            return None
        head = _HEAD.fullmatch(bytes(data[: end + 4]))
        if head is None:
            raise Unlike
        lengths = []
        for line in head[1].split(b"\r\n"):
            name, _, value = line.partition(b":")
            name = name.lower()
            if name == b"content-length":
                lengths.append(value.strip(b" \t"))
            elif name in _NOT_PLAIN or (name == b"connection" and value.strip(b" \t").lower() != b"keep-alive"):
                raise Unlike
        if lengths != [b"%d" % size]:
            raise Unlike
        return head.end()

    def ahead(self) -> socket.socket:
        """The socket, for :class:`http.client.HTTPResponse`: what was taken comes first."""
        return _Ahead(bytes(self._data), self._sock)  # type: ignore[return-value]


class _Ahead:
    def __init__(self, data: bytes, sock: socket.socket) -> None:
        self._data = data
        self._sock = sock

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Raw(self._data, self._sock))


class _Raw(io.RawIOBase):
    def __init__(self, data: bytes, sock: socket.socket) -> None:
        self._data = data
        #: As the standard library calls it, too: whose patience is changed on the way.
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._data:
            return self._sock.recv_into(buffer)
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count
