"""Connections to servers, kept open and used again: HTTP/1.1, as registries speak it.

Requests are written here. Answers are read by :mod:`ovms.oci.plain` where they are plain, and else by the standard library
(:mod:`ovms.oci.response`), which is imported for the first of those.

A connection belongs to one request at a time; who is given an answer says at its end whether the connection can be used
again. Several threads may ask at once. Errors leave as Python has them; :mod:`ovms.oci.http` tells what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Final, Protocol
from urllib.parse import quote, urlsplit

from ovms.lazy import regex
from ovms.oci import plain

if TYPE_CHECKING:
    import ssl

#: Bytes of a request's body in one piece, after which it is asked whether to go on.
_BODY: Final = 1 << 20
#: Connections without work that are kept for each server.
_IDLE_MAX: Final = 16
_PORTS: Final = {"http": 80, "https": 443}
#: What may stand in a request's target as it is. All else is encoded: nothing that a server sends us to breaks a line.
_AS_IT_IS: Final = "!#$%&'()*+,/:;=?@[]~"
#: A server that has said no before it read the whole body: its answer is what counts.
_CUT_OFF: Final = frozenset({errno.EPIPE, errno.ECONNRESET})
#: How a kept connection shows that it had been closed, before a byte of an answer.
_GONE: Final = (ConnectionResetError, BrokenPipeError)

#: Seconds in which a new connection is not looked at: TLS has things to say to itself then, and nothing was asked that could be answered.
_FRESH: Final = 0.5

#: Gives a connection back: it can be used again, or not.
Release = Callable[[bool], None]
_Key = tuple[str, str, int, "ssl.SSLContext | None"]

#: No name, as far as its characters tell; the resolver would end at a zero.
_HOST: Final = regex(r"[!-~]+")
#: A line of a request.
_LINE: Final = regex(r"[\t -~\x80-\xff]+")


class AddressInvalid(ValueError):
    """A URL that leads nowhere."""


class RequestInvalid(ValueError):
    """A request with something in its head that would be more than one line, or no text."""


class Response(Protocol):
    """An answer, up to its body."""

    status: int

    @property
    def sock(self) -> socket.socket | None:
        """What the body comes from, None where it has ended."""

    @property
    def chunked(self) -> bool:
        """Whether it comes in chunks, so that Content-Length says nothing."""

    @property
    def will_close(self) -> bool:
        """Whether the connection is of no use after it."""

    def get_all(self, name: str) -> list[str]:
        """The values of a header."""

    def read_some(self, buffer: memoryview) -> int:
        """Reads once, as much as there is and there is room for. 0: no more comes."""

    def isclosed(self) -> bool:
        """Whether all of it was read."""

    def close(self) -> None:
        """Nobody wants the rest."""


class NoneIdle(Exception):
    """No connection is there that could be used at once. ``open`` makes one, which is used next; it waits, and raises as that went.

    What else has to be waited for before a request can be sent (a token) is got in the same way.
    """

    def __init__(self, open_one: Callable[[], object]) -> None:
        super().__init__()
        self.open = open_one


class Sent:
    """A request whose answer is still to come."""

    def __init__(self, sock: socket.socket, keep: Callable[[], None], read_timeout: float) -> None:
        """*keep* lets the connection be used again. *read_timeout*: for :meth:`read`; nothing else waits."""
        sock.settimeout(0)
        self._sock = sock
        self._keep = keep
        self._read_timeout = read_timeout
        self._plain = plain.Answer(sock)
        #: The descriptor that can be read when something comes.
        self.fileno: int = sock.fileno()

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

    def read(self) -> tuple[Response, Release]:
        """The answer up to its body, waited for; to be called once. Whoever is given it lets the connection go."""
        with _closed_on_error(self._sock):
            self._sock.settimeout(self._read_timeout)
            response = _read(self._plain.come, self._sock, "GET")
        return response, _release(response, self._sock, self._keep)

    def close(self) -> None:
        """Closes the connection: nobody wants the answer any more."""
        self._sock.close()


class Connections:
    """Connections of one program to any number of servers."""

    def __init__(self, connect_timeout: float, read_timeout: float) -> None:
        """Both in seconds: until a connection is there, and between two pieces of an answer."""
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        #: … and when those were opened that nobody has used.
        self._idle: dict[_Key, list[tuple[socket.socket, float | None]]] = {}
        #: How often they were closed: what is opened meanwhile is not wanted any more.
        self._closed = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes those that nobody uses."""
        with self._lock:
            self._closed += 1
            idle, self._idle = self._idle, {}
        for kept in idle.values():
            for sock, _ in kept:
                sock.close()

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
    ) -> tuple[Response, Release]:
        """Sends a request, and reads the answer up to its body. *context* is for ``https``.

        Raises:
            AddressInvalid: *url* is none.
            RequestInvalid: *headers* are none.
            OSError, ValueError, http.client.HTTPException: as it went.
        """
        key, target = _parse(url, context)
        head = _head(method, target, key, _with_length(headers, body))
        response = None
        if (sock := self._idle_one(key)) is not None:
            try:
                response = self._ask(sock, method, head, body)
            except _GONE:
                # The server closed it just as it was taken. What asks for something and changes nothing may ask twice.
                if method not in ("GET", "HEAD"):
                    raise
        if sock is None or response is None:
            sock = self._open(key)
            response = self._ask(sock, method, head, body)
        return response, _release(response, sock, functools.partial(self._keep, key, sock))

    def send(self, url: str, headers: Mapping[str, str], context: ssl.SSLContext | None) -> Sent:
        """Sends a GET, and waits for nothing. Tries nothing twice.

        Raises:
            NoneIdle: there is no connection to the server yet, or none without work.
            AddressInvalid, RequestInvalid, OSError: as :meth:`request`.
        """
        key, target = _parse(url, context)
        head = _head("GET", target, key, headers)
        sock = self._idle_one(key, fresh=_FRESH)
        if sock is None:
            closed = self._closed
            raise NoneIdle(lambda: self._make(key, closed))
        with _closed_on_error(sock):
            # one that was used before may have a shorter time: who sends is told when something comes
            if not 0 < (sock.gettimeout() or 0) <= self._read_timeout:
                sock.settimeout(self._read_timeout)
            sock.sendall(head)
            return Sent(sock, functools.partial(self._keep, key, sock), self._read_timeout)

    def _ask(self, sock: socket.socket, method: str, head: bytes, body: bytes | IO[bytes] | None) -> Response:
        with _closed_on_error(sock):
            sock.settimeout(self._read_timeout)
            sock.sendall(head)
            _send_body(sock, body)
            return _read(plain.receive(sock), sock, method)

    def _open(self, key: _Key) -> socket.socket:
        _, host, port, context = key
        sock = _connect((host, port), self._connect_timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                sock = context.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
        return sock

    def _idle_one(self, key: _Key, *, fresh: float = 0.0) -> socket.socket | None:
        # one that was opened *fresh* seconds ago, and not used, is not looked at
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                sock, opened = idle.pop()
            if (opened is not None and time.monotonic() - opened < fresh) or _quiet(sock):
                return sock
            sock.close()

    def _make(self, key: _Key, closed: int) -> None:
        sock = self._open(key)
        if closed != self._closed:
            sock.close()
        else:
            self._keep(key, sock, time.monotonic())

    def _keep(self, key: _Key, sock: socket.socket, opened: float | None = None) -> None:
        with self._lock:
            idle = self._idle.setdefault(key, [])
            if len(idle) < _IDLE_MAX:
                idle.append((sock, opened))
                return
        sock.close()


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _connect(address: tuple[str, int], timeout: float) -> socket.socket:
    # A name as bytes is taken as it is; for a string Python imports what knows every script there is.
    return socket.create_connection((address[0].encode("ascii"), address[1]), timeout)  # type: ignore[arg-type]


def _release(response: Response, sock: socket.socket, keep: Callable[[], None]) -> Release:
    def release(again: bool) -> None:
        if again and response.isclosed() and not response.will_close:
            keep()
        else:
            response.close()
            sock.close()

    return release


def _read(data: bytes, sock: socket.socket, method: str) -> Response:
    # *data* is what has come of it
    if (response := plain.response(data, sock, method)) is not None:
        return response
    from ovms.oci import response as unusual

    return unusual.read(data, sock, method)


def _parse(url: str, context: ssl.SSLContext | None) -> tuple[_Key, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host and not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as exc:
        raise AddressInvalid(str(exc)) from exc
    if not host or not _HOST.fullmatch(host) or parts.scheme not in _PORTS:
        raise AddressInvalid("no host")
    port = port or _PORTS[parts.scheme]
    target = quote(parts.path or "/", _AS_IT_IS) + (f"?{quote(parts.query, _AS_IT_IS)}" if parts.query else "")
    return (parts.scheme, host, port, context if parts.scheme == "https" else None), target


def _quiet(sock: socket.socket) -> bool:
    # What can be read of a connection without a request is its end, or what nobody asked for, and the next would take for its answer.
    pending = getattr(sock, "pending", None)
    if pending is not None and pending():
        return False  # which TLS has decrypted already
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLPRI)
    return not poll.poll(0)


def _with_length(headers: Mapping[str, str], body: bytes | IO[bytes] | None) -> Mapping[str, str]:
    if not isinstance(body, bytes) or any(name.lower() == "content-length" for name in headers):
        return headers
    return {**headers, "Content-Length": str(len(body))}


def _send_body(sock: socket.socket, body: bytes | IO[bytes] | None) -> None:
    if not body:
        return
    try:
        if isinstance(body, bytes):
            sock.sendall(body)
            return
        send_to = getattr(body, "send_to", None)
        if send_to is not None and type(sock) is socket.socket:
            send_to(sock)
            return
        while data := body.read(_BODY):
            sock.sendall(data)
    except OSError as exc:
        if exc.errno not in _CUT_OFF:
            raise


def _head(method: str, target: str, key: _Key, headers: Mapping[str, str]) -> bytes:
    scheme, host, port, _ = key
    called = f"[{host}]" if ":" in host else host
    if port != _PORTS[scheme]:
        called += f":{port}"
    lines = [f"{method} {target} HTTP/1.1", f"Host: {called}", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any(not _LINE.fullmatch(line) for line in lines):
        raise RequestInvalid("a header has a line break in it, or what is no text")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
