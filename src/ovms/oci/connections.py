"""Connections to servers, kept open and used again: the standard library's HTTP, without what sits on top of it elsewhere.

A connection belongs to one request at a time; who is given an answer says at its end whether the connection can be used
again. Several threads may ask at once. Errors leave as Python has them; :mod:`ovms.oci.http` tells what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from ovms.lazy import regex
from ovms.oci import plain
from ovms.oci.appending import BUFFER

if TYPE_CHECKING:
    import ssl

#: Connections without work that are kept for each server.
_IDLE_MAX: Final = 16
#: What may stand in a request's target as it is. All else is encoded: nothing that a server sends us to breaks a line.
_AS_IT_IS: Final = "!#$%&'()*+,/:;=?@[]~"
#: A server that has said no before it read the whole body: its answer is what counts.
_CUT_OFF: Final = frozenset({errno.EPIPE, errno.ECONNRESET})
#: How a kept connection shows that it had been closed, before a byte of an answer.
_GONE: Final = (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected)

#: Seconds in which hardly any server closes a connection that it has kept. One that does makes the answer fail, and no worse.
_FRESH: Final = 0.5

#: Gives a connection back: it can be used again, or not.
Release = Callable[[bool], None]
_Key = tuple[str, str, int, "ssl.SSLContext | None"]


#: Seconds from the first byte of an answer's head to its last, and for what stands around the chunks of a body.
LINES_TIME: Final = 30.0
#: Lines after a chunked body.
_TRAILERS_MAX: Final = 100


class AddressInvalid(ValueError):
    """A URL that leads nowhere."""


class NoneIdle(Exception):
    """No connection is there that could be used at once. ``open`` makes one, which is used next; it waits, and raises as that went.

    What else has to be waited for before a request can be sent (a token) is got in the same way.
    """

    def __init__(self, open_one: Callable[[], object]) -> None:
        super().__init__()
        self.open = open_one


class Sent:
    """A request whose answer is still to come."""

    def __init__(self, connection: http.client.HTTPConnection, keep: Callable[[], None], read_timeout: float) -> None:
        """*keep* lets the connection be used again. *read_timeout*: for :meth:`read`; nothing else waits."""
        connection.sock.settimeout(0)
        self._connection = connection
        self._keep = keep
        self._read_timeout = read_timeout
        self._plain = plain.Answer(connection.sock)
        #: The descriptor that can be read when something comes.
        self.fileno: int = connection.sock.fileno()

    def take(self, size: int) -> bytes | None:
        """What came; see :meth:`ovms.oci.plain.Answer.take`. With the last of it, or an error, the connection is let go."""
        try:
            body = self._plain.take(size)
        except plain.Unlike:
            raise
        except BaseException:
            self.close()
            raise
        if body is not None:
            if self._plain.clean:
                self._keep()
            else:
                self.close()
        return body

    def read(self) -> tuple[http.client.HTTPResponse, Release]:
        """The answer up to its body, waited for; to be called once. Whoever is given it lets the connection go."""
        with _closed_on_error(self._connection):
            self._connection.sock.settimeout(self._read_timeout)
            response = Response(self._plain.ahead(), method="GET")
            response.begin()

        def release(again: bool) -> None:
            if again and response.isclosed() and not response.will_close:
                self._keep()
            else:
                response.close()
                self.close()

        return response, release

    def close(self) -> None:
        """Closes the connection: nobody wants the answer any more."""
        self._connection.close()


class Connections:
    """Connections of one program to any number of servers."""

    def __init__(self, connect_timeout: float, read_timeout: float) -> None:
        """Both in seconds: until a connection is there, and between two pieces of an answer."""
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        #: … and since when nobody uses them.
        self._idle: dict[_Key, list[tuple[http.client.HTTPConnection, float]]] = {}
        #: How often they were closed: what is opened meanwhile is not wanted any more.
        self._closed = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes those that nobody uses."""
        with self._lock:
            self._closed += 1
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection, _ in connections:
                connection.close()

    def __del__(self) -> None:
        # a client that nobody has closed leaves no socket open
        if hasattr(self, "_lock"):
            self.close()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | IO[bytes] | None,
        context: ssl.SSLContext | None,
    ) -> tuple[http.client.HTTPResponse, Release]:
        """Sends a request, and reads the answer up to its body. *context* is for ``https``.

        Raises:
            AddressInvalid: *url* is none.
            OSError, http.client.HTTPException: as it went.
        """
        key, target = _parse(url, context)
        connection = self._idle_one(key)
        if connection is None:
            connection = self._open(key)
            response = self._ask(connection, method, target, headers, body)
        else:
            try:
                response = self._ask(connection, method, target, headers, body)
            except _GONE:
                # The server closed it just as it was taken. What asks for something and changes nothing may ask twice.
                if method not in ("GET", "HEAD"):
                    raise
                connection = self._open(key)
                response = self._ask(connection, method, target, headers, body)
        return response, self._release(key, connection, response)

    def send(self, url: str, headers: Mapping[str, str], context: ssl.SSLContext | None) -> Sent:
        """Sends a GET, and waits for nothing. Tries nothing twice.

        Raises:
            NoneIdle: there is no connection to the server yet, or none without work.
            AddressInvalid, OSError: as :meth:`request`.
        """
        key, target = _parse(url, context)
        connection = self._idle_one(key, fresh=_FRESH)
        if connection is None:
            closed = self._closed
            raise NoneIdle(lambda: self._make(key, closed))
        with _closed_on_error(connection):
            # one that was used before may have a shorter time: who sends is told when something comes
            if not 0 < (connection.sock.gettimeout() or 0) <= self._read_timeout:
                connection.sock.settimeout(self._read_timeout)
            connection.sock.sendall(_get(connection, target, headers))
            return Sent(connection, lambda: self._keep(key, connection), self._read_timeout)

    def _release(
        self, key: _Key, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> Release:
        def release(again: bool) -> None:
            # a server that does not keep it open has it closed by now
            if again and response.isclosed() and connection.sock is not None:
                self._keep(key, connection)
            else:
                response.close()
                connection.close()

        return release

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | IO[bytes] | None,
    ) -> http.client.HTTPResponse:
        with _closed_on_error(connection):
            connection.sock.settimeout(self._read_timeout)
            _send(connection, method, target, headers, body)
            return connection.getresponse()

    def _open(self, key: _Key) -> http.client.HTTPConnection:
        scheme, host, port, context = key
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=self._connect_timeout, blocksize=BUFFER, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._connect_timeout, blocksize=BUFFER)
        connection._create_connection = _connect  # type: ignore[attr-defined]  # noqa: SLF001
        connection.response_class = Response
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    def _idle_one(self, key: _Key, *, fresh: float = 0.0) -> http.client.HTTPConnection | None:
        # one that was in use *fresh* seconds ago is not looked at
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                connection, since = idle.pop()
            if time.monotonic() - since < fresh or _alive(connection.sock):
                return connection
            connection.close()

    def _make(self, key: _Key, closed: int) -> None:
        connection = self._open(key)
        if closed != self._closed:
            connection.close()
        else:
            self._keep(key, connection)

    def _keep(self, key: _Key, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(key, [])
            if len(idle) < _IDLE_MAX:
                idle.append((connection, time.monotonic()))
                return
        connection.close()


@contextlib.contextmanager
def _closed_on_error(connection: http.client.HTTPConnection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _connect(address: tuple[str, int], *rest: Any) -> socket.socket:
    # A name as bytes is taken as it is; for a string Python imports what knows every script there is.
    return socket.create_connection((address[0].encode("ascii"), address[1]), *rest)  # type: ignore[arg-type]


def _parse(url: str, context: ssl.SSLContext | None) -> tuple[_Key, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host and not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as exc:
        raise AddressInvalid(str(exc)) from exc
    if not host or parts.scheme not in ("http", "https"):
        raise AddressInvalid("no host")
    port = port or (443 if parts.scheme == "https" else 80)
    target = quote(parts.path or "/", _AS_IT_IS) + (f"?{quote(parts.query, _AS_IT_IS)}" if parts.query else "")
    return (parts.scheme, host, port, context if parts.scheme == "https" else None), target


def _alive(sock: socket.socket) -> bool:
    # What can be read of a connection without a request is its end, or what nobody asked for.
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLPRI)
    return not poll.poll(0)


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes | IO[bytes] | None,
) -> None:
    connection.putrequest(method, target)
    for name, value in headers.items():
        connection.putheader(name, value)
    if isinstance(body, bytes) and not any(name.lower() == "content-length" for name in headers):
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    if not body:
        return
    try:
        if isinstance(body, bytes):
            connection.send(body)
            return
        send_to = getattr(body, "send_to", None)
        if send_to is not None and type(connection.sock) is socket.socket:
            send_to(connection.sock)
            return
        while data := body.read(BUFFER):
            connection.send(data)
    except OSError as exc:
        if exc.errno not in _CUT_OFF:
            raise


def _get(connection: http.client.HTTPConnection, target: str, headers: Mapping[str, str]) -> bytes:
    # as the standard library writes it, which takes longer to do so than a registry to find a small blob
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    port = "" if connection.port == connection.default_port else f":{connection.port}"
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}{port}", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any(not _LINE.fullmatch(line) for line in lines):
        raise ValueError("a header of a request has a line break, or what is no text")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Response(http.client.HTTPResponse):
    """An answer whose lines have an end.

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
#: A line of a request.
_LINE: Final = regex(r"[\t -~\x80-\xff]+")
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
