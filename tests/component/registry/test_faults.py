"""A registry that does everything wrong: only errors of ours come out, in bounded time, and nothing is left behind."""

from __future__ import annotations

import gzip
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import faulty

from ovms.errors import DigestMismatch, OvmsError, RegistryDenied, RegistryError, RegistryProtocol, RegistryUnreachable
from ovms.oci import http, patience, transfer
from ovms.oci.credentials import Credential
from ovms.oci.descriptor import Descriptor
from ovms.oci.http import Answer
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes
from ovms.spec.digest import of_bytes

MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "artifactType": mediatypes.MANIFEST,
        "config": {"mediaType": mediatypes.MANIFEST, "digest": of_bytes(b"config"), "size": 6},
        "layers": [],
    }
).encode()
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def raw_server() -> Iterator[Callable[[bytes], str]]:
    """Sends the same bytes to whoever connects, and closes."""
    stop = threading.Event()
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(data: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(0.05)
        listeners.append(listener)

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    continue
                with connection:
                    try:
                        connection.settimeout(2)
                        connection.recv(65536)
                        connection.sendall(data)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        threads.append(thread)
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()


def pull(host: str, layout: Layout, credential: Credential | None = None) -> None:
    class Source:
        def get(self, host: str, repository: str) -> Credential | None:
            return credential

    with RegistryClient(host, credentials=Source(), read_timeout=0.5, backoff=0.001) as client:
        transfer.pull(layout, client, Reference.parse(f"{host}/x:1"))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "store")


def with_body(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(line + b"\r\n" for line in headers)
    return (
        OK
        + b"Content-Length: %d\r\nContent-Type: %s\r\n" % (len(body), mediatypes.OCI_MANIFEST.encode())
        + lines
        + b"\r\n"
        + body
    )


@pytest.mark.spec("OCI-21", "OCI-22", "GEN-3")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 999 \r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        OK + b"X: y\r\n" * 500 + b"\r\n",
        OK + b"Content-Length: 1000\r\n\r\nshort",
        OK + b"Content-Length: -5\r\n\r\n",
        OK + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\nx",
        OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        with_body(b""),
        with_body(b"{}"),
        with_body(b"[" * 1000),
        with_body(b"\xff\xfe"),
        with_body(b" " * (5 << 20)),
        with_body(MANIFEST, b"Docker-Content-Digest: " + of_bytes(b"other").encode()),
        with_body(MANIFEST.replace(b'"size": 6', b'"size": -6')),
        with_body(MANIFEST.replace(b'"size": 6', b'"size": 1e400')),
        with_body(MANIFEST.replace(b'"size": 6', b'"size": 9223372036854775807')),
        b"HTTP/1.1 302 Found\r\nLocation: http://\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /v2/x/manifests/1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="http://evil.example/"\r\nContent-Length: 0\r\n\r\n',
        b"HTTP/1.1 403 No\r\nContent-Length: 3\r\n\r\n\x1b[3",
        b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 418 No\r\nContent-Length: 40\r\n\r\n" + b'{"errors": [{"message": "\\u001b[31mred"}]}',
        b"HTTP/1.1 429 Slow\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_only_errors_of_ours_come_out(raw_server: Callable[[bytes], str], layout: Layout, data: bytes) -> None:
    with pytest.raises(OvmsError) as caught:
        pull(raw_server(data), layout)
    assert type(caught.value).__module__.startswith("ovms.")
    assert "\x1b" not in caught.value.message
    assert layout.entries() == []
    assert list(layout.staging_root.iterdir()) == []


@pytest.mark.long
def test_silence_is_bounded(layout: Layout) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RegistryUnreachable, match="in time"):
        pull(f"127.0.0.1:{silent.getsockname()[1]}", layout)


def drip(handler: faulty.Handler, body: bytes, status: int = 200) -> bool:
    """A body that does not end, and never pauses for long."""
    handler.send_response(status)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass
    handler.close_connection = True
    return True


@pytest.mark.parametrize(("what", "why"), [("/manifests/", "takes more than"), ("/blobs/", "bytes a second")])
def test_a_drip_is_no_answer(monkeypatch: pytest.MonkeyPatch, what: str, why: str) -> None:
    monkeypatch.setattr(http, "RATE_WINDOW", 0.3 if what == "/blobs/" else 30.0)
    monkeypatch.setattr(patience, "ATTEMPTS_MAX", 2)
    monkeypatch.setattr(Answer.read, "__defaults__", (0.3,))
    with faulty.Server() as server, RegistryClient(server.host, backoff=0.001) as client:
        server.serve_artifact({"kernel": ("a/b", bytes(100_000))}, (mediatypes.MANIFEST, b"config"))
        server.faults = [("GET", what, drip)] * 3
        blob = Descriptor("a/b", of_bytes(bytes(100_000)), 100_000)
        began = time.monotonic()
        with pytest.raises(RegistryUnreachable, match=why) as caught:
            if what == "/manifests/":
                client.get_manifest(Reference.parse(f"{server.host}/x:1"))
            else:
                client.retrying(lambda: list(client.read_blob("x", blob)))
        assert time.monotonic() - began < 5
    assert "cannot be reached" not in caught.value.message


def test_what_nobody_reads_of_an_answer_keeps_nobody() -> None:
    with faulty.Server() as server, RegistryClient(server.host, backoff=0.001) as client:
        server.faults = [("GET", "/referrers/", partial(drip, status=404))]
        began = time.monotonic()
        assert client.referrers_page("x", of_bytes(b"")) is None
        assert time.monotonic() - began < 3


@pytest.mark.spec("OCI-1")
def test_a_page_is_no_manifest(server: Server, layout: Layout) -> None:
    """What a network that wants a login first answers for everybody."""
    server.answers["/v2/x/manifests/1"] = [(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>")]
    with pytest.raises(
        RegistryProtocol, match=f"HTML page to a request for the manifest of {server.host}/x:1"
    ) as caught:
        pull(server.host, layout)
    assert "network" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (OK + b"X: y\r\n" * 500 + b"\r\n", "answers with what is not HTTP"),
        (OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n", "answers with what is not HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "answers with what is not HTTP"),
        (OK + b"Content-Length: 1000\r\n\r\nshort", "does not get to the end"),
        (with_body(gzip.compress(MANIFEST), b"Content-Encoding: gzip"), "answers with compressed bytes"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "has no Location"),
        (b"HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n", "answers with 413"),
        (OK + b"Content-Length: 5000000\r\n\r\n" + bytes(5_000_000), "4194304 bytes to a request for the manifest of"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(
    raw_server: Callable[[bytes], str], layout: Layout, data: bytes, why: str
) -> None:
    with pytest.raises(RegistryError, match=why) as caught:
        pull(raw_server(data), layout)
    assert "cannot be reached" not in caught.value.message
    assert caught.value.hint is not None


class Handler(BaseHTTPRequestHandler):
    """Answers from a table of path → list of answers, the last of which repeats; notes what it is sent."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        answers = self.server.answers.get(self.path.partition("?")[0], [(404, {}, b"")])
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if "Content-Length" in headers:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


Reply = tuple[int, dict[str, str], bytes]


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Reply]] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.answers["/v2/x/manifests/1"] = [(200, {"Content-Type": mediatypes.OCI_MANIFEST}, MANIFEST)]
    yield server
    server.stop()


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


BLOB = f"/v2/x/blobs/{of_bytes(b'config')}"


def test_it_goes_well_after_two_failures(server: Server, layout: Layout) -> None:
    server.answers[BLOB] = [
        (503, {"Retry-After": "0"}, b""),
        (200, {"Content-Length": "6"}, b"con"),
        (200, {}, b"config"),
    ]
    pull(server.host, layout)
    assert layout.path(of_bytes(b"config")).read_bytes() == b"config"


def test_a_registry_that_stays_busy_is_given_up(server: Server, layout: Layout) -> None:
    server.answers[BLOB] = [(503, {}, b"")]
    with pytest.raises(RegistryError, match="503"):
        pull(server.host, layout)
    assert len([p for p, _ in server.seen if p == BLOB]) == patience.ATTEMPTS_MAX


@pytest.mark.spec("OCI-21", "OCI-22")
@pytest.mark.parametrize("body", [b"confiG", b"configuration", b"conf"])
def test_a_wrong_blob_is_refused_and_not_asked_for_again(server: Server, layout: Layout, body: bytes) -> None:
    server.answers[BLOB] = [(200, {}, body)]
    with pytest.raises(DigestMismatch):
        pull(server.host, layout)
    assert len([p for p, _ in server.seen if p == BLOB]) == 1
    assert layout.size(of_bytes(b"config")) is None


@pytest.mark.spec("SEC-4")
def test_credentials_do_not_follow_a_redirect(server: Server, elsewhere: Server, layout: Layout) -> None:
    server.answers["/v2/x/manifests/1"].insert(0, (401, {"WWW-Authenticate": 'Basic realm="x"'}, b""))
    server.answers[BLOB] = [(307, {"Location": f"http://{elsewhere.host}/data"}, b"")]
    elsewhere.answers["/data"] = [(200, {}, b"config")]
    pull(server.host, layout, Credential("me", "secret"))
    assert [header is not None for _, header in server.seen] == [False, True, True]
    assert elsewhere.seen == [("/data", None)]


@pytest.mark.parametrize("status", [401, 403, 500])
def test_who_refuses_is_named(server: Server, elsewhere: Server, layout: Layout, status: int) -> None:
    """A host that the registry sends us to, whose challenge is nobody's business, and where no login helps."""
    server.answers[BLOB] = [(307, {"Location": f"http://{elsewhere.host}/data"}, b"")]
    elsewhere.answers["/data"] = [(status, {"WWW-Authenticate": 'Basic realm="x"'}, b"")]
    with pytest.raises(RegistryError, match=f"^{elsewhere.host}, where the registry {server.host} sends us") as caught:
        pull(server.host, layout, Credential("me", "secret"))
    assert isinstance(caught.value, RegistryDenied) == (status < 500)
    assert "ovm login" not in str(caught.value.hint)
    assert {header for _, header in server.seen + elsewhere.seen} == {None}


def test_an_upload_that_another_host_refuses() -> None:
    with (
        faulty.Server() as server,
        faulty.Server() as other,
        RegistryClient(server.host, backoff=0.001) as client,
    ):
        away = f"http://{other.host}/v2/x/blobs/uploads/u"
        server.faults = [("POST", "/uploads/", faulty.status(202, Location=away))]
        other.faults = [("PUT", "/uploads/", faulty.status(403))]
        with pytest.raises(RegistryDenied, match=f"^{other.host}, where the registry {server.host} sends us"):
            client.push_blob("x", Descriptor("a/b", of_bytes(b"x"), 1), lambda _offset, _size: io.BytesIO(b"x"))


@pytest.mark.parametrize(("after", "seconds"), [("99999999", 99999999), ("7", 7)])
def test_how_long_the_registry_asks_to_wait_is_said(
    server: Server, monkeypatch: pytest.MonkeyPatch, layout: Layout, after: str, seconds: int
) -> None:
    monkeypatch.setattr(patience, "WAIT_MAX", 0.001)
    server.answers[BLOB] = [(429, {"Retry-After": after}, b"")]
    with pytest.raises(RegistryError, match=f"asks to wait {seconds} s") as caught:
        pull(server.host, layout)
    assert caught.value.to_json()["retry_after_s"] == seconds
    login = f"; a login may raise the limit: ovm login {server.host}"
    assert caught.value.hint == f"try again in {seconds} s{login}"
    server.answers["/v2/x/manifests/1"].insert(0, (401, {"WWW-Authenticate": 'Basic realm="x"'}, b""))
    with pytest.raises(RegistryError) as caught:
        pull(server.host, layout, Credential("me", "secret"))
    assert caught.value.hint == f"try again in {seconds} s"


def test_credentials_follow_a_redirect_at_home(server: Server, layout: Layout) -> None:
    server.answers["/v2/x/manifests/1"].insert(0, (401, {"WWW-Authenticate": 'Basic realm="x"'}, b""))
    server.answers[BLOB] = [(307, {"Location": "/data"}, b"")]
    server.answers["/data"] = [(200, {}, b"config")]
    pull(server.host, layout, Credential("me", "secret"))
    assert server.seen[-1][0] == "/data"
    assert server.seen[-1][1] is not None


def test_a_bearer_token_is_fetched_and_used(server: Server, layout: Layout) -> None:
    challenge = f'Bearer realm="http://{server.host}/token",service="s"'
    server.answers["/v2/x/manifests/1"].insert(0, (401, {"WWW-Authenticate": challenge}, b""))
    server.answers["/token"] = [(200, {}, b'{"token": "abc"}')]
    server.answers[BLOB] = [(200, {}, b"config")]
    pull(server.host, layout)
    used = [header for path, header in server.seen if not path.startswith("/token")]
    assert used == [None, "Bearer abc", "Bearer abc"]


def test_wrong_credentials_are_not_tried_again(server: Server, layout: Layout) -> None:
    server.answers["/v2/x/manifests/1"] = [(401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")]
    with pytest.raises(RegistryDenied, match="with the credentials"):
        pull(server.host, layout, Credential("me", "wrong"))
    assert len(server.seen) == 2


def test_an_upload_is_not_sent_where_no_address_is(server: Server, layout: Layout) -> None:
    digest = layout.add_bytes(b"blob")
    with RegistryClient(server.host, backoff=0.001) as client, pytest.raises(RegistryProtocol):
        client.push_blob("x", Descriptor("a/b", digest, 4), lambda _offset, _size: layout.path(digest).open("rb"))
