"""Plain answers: one final status, and a body of as many bytes as Content-Length says. So registries answer nearly every request.

What the standard library does to read one takes longer than all the rest, its import too. So these are read here, where they are as plain as
they can be; at the least doubt :class:`Unlike` leaves them, with what has come already, to :mod:`ovms.oci.response`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ovms.lazy import regex

if TYPE_CHECKING:
    import socket

#: Bytes asked of the kernel at once.
_RECEIVE: Final = 64 * 1024
#: Bytes of a head that may belong to a plain answer.
_HEAD_MAX: Final = 16 * 1024
_HTTP: Final = b"HTTP/"
#: Lines as they should be, without any of the liberties that were once allowed.
_HEAD: Final = regex(
    rb"HTTP/1\.1 ([2-5][0-9][0-9]) [^\r\n\0]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)+)\r\n"
)
#: What makes a body anything but so many bytes, after which the next answer comes.
_NOT_PLAIN: Final = frozenset({b"transfer-encoding", b"content-encoding", b"trailer", b"upgrade"})
#: A length as it should be, of what could be held anywhere.
_LENGTH: Final = regex(rb"0|[1-9][0-9]{0,17}")
#: Statuses that have no body, whatever the head says.
_BODILESS: Final = frozenset({204, 304})


class Unlike(Exception):
    """It is another answer."""


class Disconnected(ConnectionResetError):
    """The connection was closed before the answer, or all of it, had come."""


class Head(NamedTuple):
    """The head of a plain answer.

    Attributes:
        fields: names in lower case, and values.
        length: bytes of the body.
        end: bytes of the head itself.
    """

    status: int
    fields: list[tuple[bytes, bytes]]
    length: int
    end: int


def head(data: bytes | bytearray) -> Head | None:
    """The head that *data* begins with; None where it is not all there.

    Raises:
        Unlike: it is none of a plain answer, or too long.
    """
    if not data.startswith(_HTTP[: len(data)]):
        raise Unlike
    end = data.find(b"\r\n\r\n", 0, _HEAD_MAX) + 4
    if end < 4:
        if len(data) >= _HEAD_MAX:
            raise Unlike
        return None
    found = _HEAD.fullmatch(bytes(data[:end]))
    if found is None:
        raise Unlike
    fields = []
    length = None
    for line in found[2].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        fields.append((name, value))
        if name == b"content-length":
            if length is not None or not _LENGTH.fullmatch(value):
                raise Unlike
            length = int(value)
        elif name in _NOT_PLAIN or (name == b"connection" and value.lower() != b"keep-alive"):
            raise Unlike
    status = int(found[1])
    if length is None or status in _BODILESS:
        raise Unlike
    return Head(status, fields, length, end)


class Answer:
    """What comes on a socket after a GET of a blob: 200, and all of it at once, or nothing that belongs here."""

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
            OSError: the connection broke.
        """
        self._receive()
        if self._body is None:
            found = head(self._data)
            if found is None:
                return None
            if (found.status, found.length) != (200, size):
                raise Unlike
            self._body = found.end
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
            raise Disconnected("the connection was closed before the whole answer had come")
        self._data += data
        pending = getattr(self._sock, "pending", None)
        # what TLS has decrypted already makes no socket readable
        while pending is not None and (more := pending()):
            self._data += self._sock.recv(more)

    @property
    def come(self) -> bytes:
        """All that has come."""
        return bytes(self._data)


class Response:
    """A plain answer up to its body, which is read from the socket."""

    #: The body is no more than so many bytes.
    chunked: Final = False

    def __init__(self, found: Head, rest: bytes, sock: socket.socket, method: str) -> None:
        """*rest* is what has come after the head."""
        self.status = found.status
        self.sock = sock
        self._fields = found.fields
        self._left = 0 if method == "HEAD" else found.length
        # what came with it and is no part of it; what comes later, the connection shows
        self.will_close = len(rest) > self._left
        self._rest = memoryview(rest)

    def get_all(self, name: str) -> list[str]:
        """The values of a header."""
        wanted = name.lower().encode("ascii")
        return [value.decode("latin-1") for field, value in self._fields if field == wanted]

    def read_some(self, buffer: memoryview) -> int:
        """Reads once, as much as there is and there is room for. 0: no more comes."""
        wanted = min(len(buffer), self._left)
        if not wanted:
            return 0
        if self._rest:
            count = min(wanted, len(self._rest))
            buffer[:count] = self._rest[:count]
            self._rest = self._rest[count:]
        else:
            count = self.sock.recv_into(buffer[:wanted])
        self._left -= count
        return count

    def isclosed(self) -> bool:
        """Whether all of it was read."""
        return not self._left

    def close(self) -> None:
        """Nothing is held here: whoever has the connection closes it."""


def receive(sock: socket.socket) -> bytes:
    """The first bytes of an answer, waited for.

    Raises:
        Disconnected: there is none.
        OSError: the connection broke.
    """
    data = sock.recv(_RECEIVE)
    if not data:
        raise Disconnected("the connection was closed without an answer")
    return data


def response(data: bytes, sock: socket.socket, method: str) -> Response | None:
    """The answer that *data* is the beginning of. None: it is not plain, or not all of its head is there."""
    try:
        found = head(data)
    except Unlike:
        return None
    return None if found is None else Response(found, data[found.end :], sock, method)


class Ahead:
    """A socket for :class:`http.client.HTTPResponse`: what has come already comes first."""

    def __init__(self, data: bytes, sock: socket.socket) -> None:
        self._data = data
        self._sock = sock

    def makefile(self, _mode: str) -> Reader:
        """What can be read."""
        return Reader(_Raw(self._data, self._sock))


class Reader(io.BufferedReader):
    """What can be read, and, where it was closed, whether anything was left of what had come."""

    #: Told by :meth:`close`.
    surplus = False

    def close(self) -> None:
        """Closes it; the socket stays as it is."""
        raw = self.raw
        if not self.closed and isinstance(raw, _Raw):
            raw.ended = True  # nothing more is waited for
            self.surplus = bool(self.peek(1))
        super().close()


class _Raw(io.RawIOBase):
    def __init__(self, data: bytes, sock: socket.socket) -> None:
        self._data = data
        #: As the standard library calls it, too: whose patience is changed on the way.
        self._sock = sock
        #: Whether the socket is read no more.
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._data:
            if self.ended:
                return 0
            return self._sock.recv_into(buffer)
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count
