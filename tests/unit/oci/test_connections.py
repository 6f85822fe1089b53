"""Connections, against a server of sockets alone."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path

import pytest
from support.proxy import Proxy
from support.tls import Authority, server_context

from ovms.errors import RegistryProtocol
from ovms.oci import connections as _connections
from ovms.oci import plain
from ovms.oci import response as unusual
from ovms.oci.connections import AddressInvalid, Connections, NoneIdle, RequestInvalid, Response, _quiet
from ovms.oci.http import Broken, Refused, Transport
from ovms.oci.proxies import Proxies

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Answers each request on each connection with what *answer* says, or hangs up where that is nothing; counts connections."""

    def __init__(self, answer: Callable[[bytes], bytes] = lambda _request: OK, *, keep: bool = True) -> None:
        self.answer = answer
        self.keep = keep
        self.connections = 0
        self.requests: list[bytes] = []
        self.sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v2/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self.sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as file:
            while head := self._head(file):
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.splitlines()
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                self.requests.append(head + file.read(length))
                answer = self.answer(self.requests[-1])
                sock.sendall(answer)
                if not answer or not self.keep:
                    return

    @staticmethod
    def _head(file: io.BufferedReader) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            try:
                line = file.readline()
            except OSError:
                return b""
            if not line:
                return b""
            head += line
        return head

    def close(self) -> None:
        self._listener.close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server()
    yield it
    it.close()


@pytest.fixture
def connections() -> Iterator[Connections]:
    it = Connections(5, 5)
    yield it
    it.close()


def drip(data: bytes, piece: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that sends *data*, then *piece* for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with contextlib.suppress(OSError), sock:
                        sock.recv(65536)
                        sock.sendall(data)
                        while True:
                            sock.sendall(piece)
                            time.sleep(pause)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v2/"


def read_all(response: Response) -> bytes:
    buffer, data = memoryview(bytearray(1000)), b""
    while count := response.read_some(buffer):
        data += buffer[:count]
    return data


def get(connections: Connections, url: str, *, again: bool = True, body: bytes | None = None) -> bytes:
    response, release = connections.request("GET", url, {}, body, None)
    data = read_all(response) if again else b""
    release(again)
    return data


def test_a_connection_is_used_again(server: Server, connections: Connections) -> None:
    assert [get(connections, server.url) for _ in range(3)] == [b"ok"] * 3
    assert server.connections == 1


def test_one_whose_answer_was_not_read_is_not(server: Server, connections: Connections) -> None:
    get(connections, server.url, again=False)
    get(connections, server.url)
    assert server.connections == 2


def test_one_that_the_server_has_closed_is_not(connections: Connections) -> None:
    server = Server(keep=False)
    try:
        for _ in range(2):
            assert get(connections, server.url) == b"ok"
            # until its end has come here
            while any(_quiet(kept) for idle in connections._idle.values() for kept, _ in idle):
                os.sched_yield()
        assert server.connections == 2
    finally:
        server.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_one_that_the_server_closes_just_then_is_replaced(connections: Connections, method: str) -> None:
    server = Server()
    head = OK.removesuffix(b"ok")
    server.answer = lambda _: b"" if len(server.requests) == 2 else OK if method == "GET" else head
    try:
        for _ in range(3):
            response, release = connections.request(method, server.url, {}, None, None)
            read_all(response)
            release(True)
        assert (server.connections, len(server.requests)) == (2, 4)
    finally:
        server.close()


def test_what_changes_something_is_not_sent_twice(connections: Connections) -> None:
    server = Server()
    server.answer = lambda _: OK if len(server.requests) == 1 else b""
    try:
        get(connections, server.url)
        with pytest.raises(plain.Disconnected):
            connections.request("POST", server.url, {}, b"x", None)
        assert len(server.requests) == 2
    finally:
        server.close()


def test_a_new_connection_that_is_closed_is_an_error(connections: Connections) -> None:
    server = Server(lambda _: b"")
    try:
        with pytest.raises(plain.Disconnected):
            get(connections, server.url)
        assert len(server.requests) == 1
    finally:
        server.close()


SMUGGLED = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nSMUGGLED"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "answer", "used_again"),
    [
        ("GET", OK, True),
        ("GET", CHUNKED, True),
        ("HEAD", OK.removesuffix(b"ok"), True),
        ("GET", OK + SMUGGLED, False),
        ("GET", CHUNKED + SMUGGLED, False),
        ("GET", OK + b"\0", False),
        ("HEAD", OK, False),
        ("GET", OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), False),
        ("GET", OK.replace(b"/1.1", b"/1.0"), False),
    ],
)
def test_a_connection_is_used_again_where_nothing_but_its_answer_came(
    connections: Connections, method: str, answer: bytes, used_again: bool
) -> None:
    server = Server(lambda _request: answer)
    try:
        for _ in range(2):
            response, release = connections.request(method, server.url, {}, None, None)
            assert read_all(response) == (b"ok" if method == "GET" else b"")
            release(True)
        assert server.connections == (1 if used_again else 2)
    finally:
        server.close()


def test_one_whose_answer_was_cut_short_is_not_used_again(connections: Connections) -> None:
    server = Server(lambda _request: OK[:-1])
    try:
        response, release = connections.request("GET", server.url, {}, None, None)
        assert response.read_some(memoryview(bytearray(10))) == 1
        assert not response.isclosed()
        release(True)
        connections.request("GET", server.url, {}, None, None)[1](False)
        assert server.connections == 2
    finally:
        server.close()


class Late(Server):
    """A server whose every answer brings another one with it, after its head: in one piece, with TLS in one record."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.head_is_there = threading.Event()
        self._context = context
        super().__init__()
        if context is not None:
            self.url = self.url.replace("http:", "https:")

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while sock.recv(65536):
                    sock.sendall(OK.removesuffix(b"ok"))
                    self.head_is_there.wait(10)
                    sock.sendall(b"ok" + SMUGGLED)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_what_comes_after_an_answer_is_no_other_requests(connections: Connections, tmp_path: Path, tls: bool) -> None:
    authority = Authority(tmp_path) if tls else None
    server = Late(None if authority is None else server_context(authority.issue("server")))
    trusted = None if authority is None else ssl.create_default_context(cafile=authority.ca.cert)
    try:
        for number in range(3):
            response, release = connections.request("GET", server.url, {}, None, trusted)
            server.head_is_there.set()
            assert read_all(response) == b"ok"
            release(True)
            server.head_is_there.clear()
            with pytest.raises(NoneIdle):
                connections.send(server.url, {}, trusted)
            assert server.connections == number + 1
    finally:
        server.close()


def test_nor_after_one_that_was_not_waited_for(connections: Connections) -> None:
    server = Server(lambda _request: OK)
    try:
        get(connections, server.url)
        server.answer = lambda _request: OK + SMUGGLED
        sent = connections.send(server.url, {}, None)
        while (body := sent.take(2)) is None:
            os.sched_yield()
        assert body == b"ok"
        server.answer = lambda _request: OK
        assert [get(connections, server.url) for _ in range(2)] == [b"ok"] * 2
        assert server.connections == 2
    finally:
        server.close()


def test_a_new_connection_may_say_something_at_first(server: Server, connections: Connections) -> None:
    """As TLS does."""
    with pytest.raises(NoneIdle) as caught:
        connections.send(server.url, {}, None)
    caught.value.open()
    sent = connections.send(server.url, {}, None)
    while sent.take(2) is None:
        os.sched_yield()
    assert server.connections == 1


@pytest.mark.parametrize("value", ["a\r\nX: b", "a\nb", "a\rb", "a\0b", "\u20ac", "\x7f", ""])
def test_no_header_is_more_than_a_line_of_text(server: Server, connections: Connections, value: str) -> None:
    headers = {"Authorization": value} if value else {"": "x\r\n"}
    with pytest.raises(RequestInvalid):
        connections.request("GET", server.url, headers, None, None)
    with pytest.raises(RequestInvalid):
        connections.send(server.url, headers, None)
    transport = Transport()
    with pytest.raises(RegistryProtocol, match="nothing can be asked of 127"):
        transport.request("GET", server.url, headers)
    transport.close()
    assert server.connections == 0


@pytest.mark.parametrize(
    ("scheme", "host", "port", "called"),
    [
        ("http", "registry.example", 80, b"registry.example"),
        ("https", "registry.example", 443, b"registry.example"),
        ("http", "registry.example", 443, b"registry.example:443"),
        ("https", "registry.example", 5000, b"registry.example:5000"),
        ("https", "::1", 443, b"[::1]"),
        ("http", "::1", 5000, b"[::1]:5000"),
    ],
)
def test_what_a_request_says(scheme: str, host: str, port: int, called: bytes) -> None:
    head = _connections._head("GET", "/v2/", (scheme, host, port, None), {"Range": "bytes=0-"})
    assert head == b"GET /v2/ HTTP/1.1\r\nHost: %s\r\nAccept-Encoding: identity\r\nRange: bytes=0-\r\n\r\n" % called


def test_a_length_is_said_once(server: Server, connections: Connections) -> None:
    response, release = connections.request("PUT", server.url, {"content-length": "2"}, b"ab", None)
    release(response.isclosed())
    assert server.requests[0].lower().count(b"content-length") == 1
    assert server.requests[0].endswith(b"\r\n\r\nab")


def test_a_server_that_is_gone_when_a_kept_connection_is_replaced(connections: Connections) -> None:
    server = Server()

    def once(_request: bytes) -> bytes:
        if len(server.requests) == 1:
            return OK
        server._listener.shutdown(socket.SHUT_RDWR)
        return b""

    server.answer = once
    transport = Transport()
    try:
        with transport.request("GET", server.url, {}) as answer:
            assert answer.read(10) == b"ok"
        with pytest.raises(Refused):
            transport.request("GET", server.url, {})
        assert len(server.requests) == 2
    finally:
        transport.close()
        server.close()


def test_no_more_than_some_are_kept(server: Server, connections: Connections) -> None:
    held = [connections.request("GET", server.url, {}, None, None) for _ in range(20)]
    for response, release in held:
        read_all(response)
        release(True)
    held = [connections.request("GET", server.url, {}, None, None) for _ in range(20)]
    for response, release in held:
        read_all(response)
        release(True)
    assert server.connections == 20 + 4  # sixteen were kept


class Body:
    """A body that can go from its file into a socket."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.sent_to: socket.socket | None = None

    def read(self, size: int) -> bytes:
        return self.file.read(size)

    def send_to(self, sock: socket.socket) -> None:
        self.sent_to = sock
        sock.sendfile(self.file)

    def close(self) -> None:
        self.file.close()


def test_a_file_goes_into_the_socket(server: Server, connections: Connections, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "blob").write_bytes(content)
    body = Body(tmp_path / "blob")
    response, release = connections.request(
        "PUT",
        server.url,
        {"Content-Length": str(len(content))},
        body,  # type: ignore[arg-type]
        None,
    )
    read_all(response)
    release(True)
    body.close()
    assert body.sent_to is not None
    assert server.requests[0].endswith(content)


class CutOff(Body):
    """A body in the middle of which the server has closed its side: what is sent then breaks."""

    def send_to(self, sock: socket.socket) -> None:
        super().send_to(sock)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_an_answer_that_comes_before_all_of_the_body_counts(connections: Connections, tmp_path: Path) -> None:
    server = Server(lambda _request: b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    (tmp_path / "blob").write_bytes(b"x")
    body = CutOff(tmp_path / "blob")
    try:
        response, release = connections.request(
            "PUT",
            server.url,
            {"Content-Length": "1"},
            body,  # type: ignore[arg-type]
            None,
        )
        assert response.status == 413
        release(False)
    finally:
        body.close()
        server.close()


class Unreadable(Body):
    """A body whose disk fails."""

    def send_to(self, sock: socket.socket) -> None:
        raise OSError(errno.EIO, "Input/output error")


def test_a_body_that_cannot_be_read_is_an_error(server: Server, connections: Connections, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    body = Unreadable(tmp_path / "blob")
    try:
        with pytest.raises(OSError, match="Input/output"):
            connections.request("PUT", server.url, {"Content-Length": "1"}, body, None)  # type: ignore[arg-type]
    finally:
        body.close()


def test_connections_that_nobody_closes_are_closed_with_their_owner(server: Server) -> None:
    connections = Connections(5, 5)
    get(connections, server.url)
    # a socket that is left open warns, and a warning fails a test
    del connections
    gc.collect()
    (sock,) = server.sockets
    deadline = time.monotonic() + 5
    while sock.fileno() != -1:
        assert time.monotonic() < deadline, "the client's end is still open"
        time.sleep(0.01)


def test_an_empty_body_has_a_length(server: Server, connections: Connections) -> None:
    get(connections, server.url, body=b"")
    assert b"content-length: 0" in server.requests[0].lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://127.0.0.1\0.example/",
        "http://a b/",
        "http://a\x7f/",
        "http://host:port/",
        "http://host:99999/",
        "ftp://host/",
        "/v2/",
        "http://[::1/",
        "http://\u00ff..x/",
    ],
)
def test_what_is_no_address(connections: Connections, url: str) -> None:
    with pytest.raises(AddressInvalid):
        connections.request("GET", url, {}, None, None)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("a b", b"/v2/a%20b"),
        ("x?y=\u00e9", b"/v2/x?y=%C3%A9"),
        ("x%2fy", b"/v2/x%2fy"),
        ("x\x7f", b"/v2/x%7F"),
    ],
)
def test_nothing_in_a_url_breaks_the_request(
    server: Server, connections: Connections, path: str, target: bytes
) -> None:
    get(connections, server.url + path)
    assert server.requests[0].splitlines()[0] == b"GET " + target + b" HTTP/1.1"


@pytest.mark.parametrize(
    ("data", "piece", "pause"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0.0),
        (b"HTTP/1.1 200 OK\r\nA: ", b"a", 0.02),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n", b"A: b\r\n" * 50, 0.0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nA: ", b"a", 0.02),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;", b"a", 0.02),
    ],
    ids=["100s", "a header that drips", "trailers", "a trailer that drips", "a chunk's size that drips"],
)
def test_lines_without_end(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, data: bytes, piece: bytes, pause: float
) -> None:
    monkeypatch.setattr(unusual, "LINES_TIME", 0.3)
    began = time.monotonic()
    for url in drip(data, piece, pause):
        with pytest.raises((TimeoutError, HTTPException)), contextlib.ExitStack() as ended:
            response, release = connections.request("GET", url, {}, None, None)
            ended.callback(release, False)
            read_all(response)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("piece", [b"HTTP/1.1 100 Continue\r\n\r\n" * 50, b"A: b\r\n"], ids=["100s", "headers"])
def test_lines_without_end_through_a_proxy(monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(unusual, "LINES_TIME", 0.3)
    for url in drip(b"" if piece.startswith(b"HTTP") else OK.partition(b"\r\n")[0] + b"\r\n", piece, 0.02):
        with Proxy() as proxy:
            transport = Transport(proxies=Proxies({"http_proxy": proxy.url}), plain=lambda _host: True)
            began = time.monotonic()
            with pytest.raises(Broken):
                transport.request("GET", url.replace("127.0.0.1", "registry.example"), {})
            assert time.monotonic() - began < 5
            assert proxy.heads
            transport.close()


def test_what_comes_in_small_pieces_is_read(connections: Connections) -> None:
    answer = (
        b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3;x=y\r\nay!\r\n0\r\nA: b\r\n\r\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(2):
                    sock.recv(65536)
                    for at in range(len(answer)):
                        sock.sendall(answer[at : at + 1])

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/"
        assert get(connections, url) == b"okay!"
        assert get(connections, url) == b"okay!", "the connection is used again"
