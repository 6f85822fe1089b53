"""Many small blobs: asked for several at a time, and fetched in the usual way where a registry does not simply send them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from support import faulty
from support.tls import Authority, server_context

from ovms.cli import main
from ovms.cli.exitcodes import Exit
from ovms.errors import DigestMismatch, RegistryError
from ovms.oci import connections, plain, small, transfer, workers
from ovms.oci.credentials import Credential
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import Busy, RegistryClient
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, of_bytes

COUNT = 20
BLOBS = [b"blob %d" % i + bytes(1000 * i) for i in range(COUNT)]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "store")


@pytest.fixture
def server() -> Iterator[faulty.Server]:
    with faulty.Server() as server:
        files = {f"disk{i}": ("a/b", data) for i, data in enumerate(BLOBS)}
        server.serve_artifact(files, (mediatypes.MANIFEST, b"config"))
        yield server


def pull(server: faulty.Server, layout: Layout, *, backoff: float = 0.001) -> None:
    with RegistryClient(server.host, read_timeout=5, backoff=backoff) as client:
        transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"))
    for data in BLOBS:
        assert layout.path(of_bytes(data)).read_bytes() == data
    assert list(layout.partial_dir.iterdir()) == []


def fetch(client: RegistryClient, blobs: list[Descriptor]) -> list[tuple[Descriptor, bytes]]:
    """What comes of blobs by requests that are not waited for one by one."""
    pool, came, ended = small.Pool(1, 4), [], queue.SimpleQueue[BaseException | None]()
    pool.begin(small.Fetch(client, "x", blobs, lambda blob, data: came.append((blob, data)), ended.put))
    assert ended.get(timeout=30) is None
    return came


def times(server: faulty.Server) -> dict[Digest, int]:
    """How often each blob was asked for."""
    return {of_bytes(data): len(server.asked("GET", of_bytes(data))) for data in BLOBS}


def test_each_is_asked_for_once_and_a_few_at_a_time(server: faulty.Server, layout: Layout) -> None:
    # a moment, so that those that were asked for meet here
    server.pace = lambda _size: faulty.wait_until(lambda: server.at_once >= small.CONNECTIONS, timeout=0.05)
    pull(server, layout)
    assert set(times(server).values()) == {1}
    assert workers.PARALLEL < server.most_at_once <= small.CONNECTIONS


def test_they_take_no_thread_each(server: faulty.Server, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    by_threads: list[Descriptor] = []
    read = RegistryClient.read_blob

    def noted(self: RegistryClient, repository: str, blob: Descriptor, offset: int = 0) -> Generator[memoryview]:
        by_threads.append(blob)
        return read(self, repository, blob, offset)

    monkeypatch.setattr(RegistryClient, "read_blob", noted)
    pull(server, layout)
    assert by_threads == []


@pytest.mark.parametrize(
    "fault",
    [
        faulty.hang_up,
        faulty.cut(3),
        faulty.status(404),
        faulty.status(500),
        faulty.status(307, Location="/v2/x/blobs/nowhere"),
        faulty.status(401, WWW_Authenticate='Bearer realm="http://127.0.0.1:1/"'),
        faulty.status(204),
    ],
)
@pytest.mark.parametrize("which", [0, 10, COUNT - 1])
def test_what_does_not_simply_come_is_fetched_as_ever(
    server: faulty.Server, layout: Layout, fault: faulty.Fault, which: int
) -> None:
    # largest first
    server.faults = [("GET", of_bytes(BLOBS[COUNT - 1 - which]), fault)]
    pull(server, layout)
    assert sum(times(server).values()) <= COUNT + small.CONNECTIONS
    assert server.faults == []


def sent_elsewhere(server: faulty.Server, location: str) -> None:
    """Each blob lies where *location* (with its digest at the end) says."""
    server.faults = [
        ("GET", of_bytes(data), faulty.status(307, Location=location + of_bytes(data)))
        for data in BLOBS
        for _ in range(2)
    ]


def test_a_registry_that_sends_elsewhere_is_followed_at_once(server: faulty.Server, layout: Layout) -> None:
    """As those do that keep their blobs in an object store: each takes two answers, one after the other."""
    with faulty.Server() as store:
        store.blobs = server.blobs
        sent_elsewhere(server, f"http://{store.host}/blobs/")
        store.pace = lambda _size: faulty.wait_until(lambda: store.at_once >= small.CONNECTIONS, timeout=0.05)
        pull(server, layout)
        assert set(times(server).values()) == {1}
        assert [len(store.asked("GET", of_bytes(data))) for data in BLOBS] == [1] * COUNT
        assert workers.PARALLEL < store.most_at_once <= small.CONNECTIONS


class Secret:
    def get(self, _host: str, _repository: str) -> Credential:
        return Credential("user", "secret")


def test_no_secret_follows_elsewhere(server: faulty.Server, layout: Layout) -> None:
    with faulty.Server() as store:
        store.blobs = server.blobs
        seen: dict[bool, list[str | None]] = {True: [], False: []}

        def noted(handler: faulty.Handler, _body: bytes) -> bool:
            seen[handler.server is store].append(handler.headers["Authorization"])
            return False

        sent_elsewhere(server, f"http://{store.host}/blobs/")
        server.faults = [
            ("GET", "/manifests/", faulty.status(401, WWW_Authenticate='Basic realm="x"')),
            *[
                (
                    method,
                    digest,
                    lambda handler, body, redirect=redirect: noted(handler, body) or redirect(handler, body),
                )
                for method, digest, redirect in server.faults
            ],
        ]
        store.faults = [("GET", "/blobs/", noted) for _ in range(2 * COUNT)]
        with RegistryClient(server.host, credentials=Secret(), backoff=0.001) as client:
            transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"))
        assert seen == {False: ["Basic dXNlcjpzZWNyZXQ="] * COUNT, True: [None] * COUNT}


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:1/", "https://", "ftp://x/", "http://far.example/", "/v2/x/blobs/"]
)
def test_one_that_sends_nowhere_is_told_of_as_ever(server: faulty.Server, layout: Layout, location: str) -> None:
    digests = [of_bytes(data) for data in BLOBS]
    server.faults = [
        ("GET", digest, faulty.status(307, Location=location + ("" if "//" in location else digest)))
        for digest in digests
        for _ in range(50)
    ]
    with RegistryClient(server.host, backoff=0.001) as client, pytest.raises(RegistryError) as caught:
        transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"))
    assert caught.value.hint
    assert list(layout.partial_dir.iterdir()) == []


def test_a_connection_that_takes_its_time_holds_nobody_up(
    server: faulty.Server, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All comes over the one that is there, while others are made."""
    going, opening, usual = threading.Event(), connections.Connections._open, threading.get_ident()

    def slow(self: connections.Connections, key: object) -> object:
        if threading.get_ident() != usual:
            going.wait(20)
        return opening(self, key)  # type: ignore[arg-type]

    monkeypatch.setattr(connections.Connections, "_open", slow)
    try:
        pull(server, layout)
        assert set(times(server).values()) == {1}
        assert server.most_at_once == 1
    finally:
        going.set()


def test_a_registry_that_takes_no_more_connections_is_asked_over_those_that_it_took(
    server: faulty.Server, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def refused(self: connections.Connections, key: object) -> object:
        if threading.get_ident() != usual:
            tries.append("x")
            raise ConnectionRefusedError
        return opening(self, key)  # type: ignore[arg-type]

    opening, usual = connections.Connections._open, threading.get_ident()
    monkeypatch.setattr(connections.Connections, "_open", refused)
    pull(server, layout)
    assert set(times(server).values()) == {1}
    assert 0 < len(tries) < small.CONNECTIONS


def test_wrong_bytes_are_refused_and_nothing_is_left(server: faulty.Server, layout: Layout) -> None:
    server.faults = [("GET", of_bytes(BLOBS[7]), faulty.wrong_bytes)]
    with (
        RegistryClient(server.host, backoff=0.001) as client,
        pytest.raises(DigestMismatch),
    ):
        transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"))
    assert list(layout.partial_dir.iterdir()) == []
    assert [layout.size(of_bytes(data)) for data in BLOBS] == [None] * COUNT
    assert layout.entries() == []
    pull(server, layout)


def test_a_busy_registry_is_left_alone_as_long_as_it_asks(server: faulty.Server, layout: Layout) -> None:
    server.faults = [("GET", of_bytes(BLOBS[5]), faulty.status(429, Retry_After="1"))]
    at: list[float] = []
    server.pace = lambda _size: at.append(time.monotonic())
    pull(server, layout)
    pauses = [after - before for before, after in itertools.pairwise(at)]
    assert max(pauses) > 0.8


def test_one_that_wants_to_be_left_alone_for_too_long_is_given_up(server: faulty.Server) -> None:
    server.faults = [("GET", "/blobs/", faulty.status(503, Retry_After="0"))] * 200
    with RegistryClient(server.host, backoff=0.001) as client:
        client.get_manifest(Reference.parse(f"{server.host}/x:1"))
        blobs = [Descriptor("a/b", of_bytes(data), len(data)) for data in BLOBS]
        # it waits once, and leaves the rest to who knows when it is enough
        assert fetch(client, blobs) == []
        assert len(server.asked("GET", "/blobs/")) == 4
        with pytest.raises(Busy):
            client.retrying(lambda: b"".join(bytes(piece) for piece in client.read_blob("x", blobs[0])))


def test_nobody_is_asked_before_it_is_known_how(server: faulty.Server) -> None:
    blobs = [Descriptor("a/b", of_bytes(data), len(data)) for data in BLOBS]
    with RegistryClient(server.host) as client:
        assert fetch(client, blobs) == []
    assert server.seen == []


def test_one_that_says_nothing_more_is_not_waited_for_in_vain(
    server: faulty.Server, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "READ_TIMEOUT", 0.3)

    def silent(handler: faulty.Handler, body: bytes) -> bool:
        time.sleep(3)
        handler.close_connection = True
        return True

    server.faults = [("GET", "/blobs/", silent) for _ in range(small.CONNECTIONS)]
    server.faults.insert(0, ("GET", of_bytes(b"config"), lambda _handler, _body: False))
    began = time.monotonic()
    pull(server, layout)
    assert time.monotonic() - began < 3


def test_an_answer_that_nobody_takes_is_closed(server: faulty.Server) -> None:
    with RegistryClient(server.host) as client:
        client.get_manifest(Reference.parse(f"{server.host}/x:1"))
        blobs = [Descriptor("a/b", of_bytes(data), len(data)) for data in BLOBS]
        pool, ended = small.Pool(1, 4), queue.SimpleQueue[BaseException | None]()
        came: list[bytes] = []

        def keep(_blob: Descriptor, data: bytes) -> None:
            came.append(data)
            raise ValueError("enough")

        pool.begin(small.Fetch(client, "x", blobs, keep, ended.put))
        assert str(ended.get(timeout=30)) == "enough"
        assert len(came) == 1
        assert came[0] in BLOBS
        # what was under way is read by nobody else
        for data, blob in zip(BLOBS, blobs, strict=True):
            assert b"".join(bytes(piece) for piece in client.read_blob("x", blob)) == data


# --- several artifacts together ----------------------------------------------------------------------------------------


class Taken:
    """One of several fetches: what came, and when it was at its end."""

    def __init__(self, pool: small.Pool, client: RegistryClient, blobs: list[Descriptor]) -> None:
        self.came: list[Descriptor] = []
        self.threads: set[int] = set()
        self._ended = queue.SimpleQueue[BaseException | None]()
        self.fetch = small.Fetch(client, "x", blobs, self._keep, self._ended.put)
        pool.begin(self.fetch)

    def _keep(self, blob: Descriptor, _data: bytes) -> None:
        self.came.append(blob)
        self.threads.add(threading.get_ident())

    def end(self) -> BaseException | None:
        return self._ended.get(timeout=30)


@pytest.fixture
def client(server: faulty.Server) -> Iterator[RegistryClient]:
    with RegistryClient(server.host, read_timeout=5, backoff=0.001) as client:
        client.get_manifest(Reference.parse(f"{server.host}/x:1"))
        yield client


@pytest.fixture
def blobs() -> list[Descriptor]:
    return [Descriptor("a/b", of_bytes(data), len(data)) for data in BLOBS]


def test_several_share_a_thread_and_the_connections(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor]
) -> None:
    server.pace = lambda _size: faulty.wait_until(lambda: server.at_once >= 3, timeout=0.05)
    pool = small.Pool(connections=3, each=1)
    taken = [Taken(pool, client, blobs[at : at + 5]) for at in (0, 5, 10, 15)]
    assert [one.end() for one in taken] == [None] * 4
    assert [sorted(blob.size for blob in one.came) for one in taken] == [
        sorted(blob.size for blob in blobs[at : at + 5]) for at in (0, 5, 10, 15)
    ]
    assert len(set().union(*(one.threads for one in taken))) == 1
    assert server.most_at_once == 3


def test_the_first_is_at_its_end_while_others_come(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor]
) -> None:
    ended = threading.Event()
    last = blobs[-1]
    server.faults = [("GET", last.digest, lambda _handler, _body: ended.wait(20) and False)]
    pool = small.Pool(1, 2)
    first, second = Taken(pool, client, blobs[:5]), Taken(pool, client, [last, *blobs[5:10]])
    assert first.end() is None
    assert len(first.came) == 5
    ended.set()
    assert second.end() is None
    assert len(second.came) == 6


def test_one_that_cannot_go_on_leaves_the_others_alone(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor]
) -> None:
    server.faults = [("GET", blobs[2].digest, faulty.status(404))]
    pool = small.Pool(1, 2)
    first, second = Taken(pool, client, blobs[:10]), Taken(pool, client, blobs[10:])
    assert [first.end(), second.end()] == [None, None]
    assert len(first.came) < 10
    assert blobs[2] not in first.came
    assert len(second.came) == 10


def test_what_nobody_wants_any_more_is_not_kept(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor]
) -> None:
    going = threading.Event()
    server.faults = [("GET", blob.digest, lambda _handler, _body: going.wait(20) and False) for blob in blobs[:2]]
    pool = small.Pool(1, 2)
    first = Taken(pool, client, blobs[:10])
    faulty.wait_until(lambda: len(server.asked("GET", "/blobs/")) == 2, timeout=10)
    second = Taken(pool, client, blobs[10:])
    pool.cancel(first.fetch)
    # its connections are given up at once, and the others do not wait for what it had asked for
    assert second.end() is None
    assert len(second.came) == 10
    assert first.end() is None
    assert first.came == []
    going.set()


def test_a_pool_without_work_has_no_thread_and_begins_anew(client: RegistryClient, blobs: list[Descriptor]) -> None:
    pool = small.Pool(1, 4)
    for _ in range(5):
        one = Taken(pool, client, blobs)
        assert one.end() is None
        assert len(one.came) == COUNT
        faulty.wait_until(lambda: "small blobs" not in [thread.name for thread in threading.enumerate()], timeout=10)


def test_a_fault_of_ours_ends_all_and_nobody_waits_for_ever(
    client: RegistryClient, blobs: list[Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: plain.Answer, _size: int) -> bytes:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(plain.Answer, "take", broken)
    pool = small.Pool(1, 4)
    taken = [Taken(pool, client, blobs[:10]), Taken(pool, client, blobs[10:])]
    assert [str(one.end()) for one in taken] == ["a fault of ours"] * 2
    monkeypatch.undo()
    assert Taken(pool, client, blobs).end() is None


def test_large_blobs_have_connections_of_their_own() -> None:
    pool = small.Pool(2, connections=8)
    assert (pool.each, pool.for_small) == (2, 8)
    with pool.large(), pool.large():
        assert pool.for_small == 4
    assert pool.for_small == 8
    with pool.large(), pool.large(), pool.large(), pool.large():
        assert pool.for_small == 2, "whoever begins may begin"


def test_small_ones_come_while_the_manifest_is_looked_at(server: faulty.Server, layout: Layout) -> None:
    def check(*_: object) -> None:
        assert layout.size(of_bytes(b"config")) is not None
        faulty.wait_until(lambda: len(server.asked("GET", "/blobs/")) > 2, timeout=10)
        assert layout.size(of_bytes(BLOBS[-1])) is None

    with RegistryClient(server.host) as client:
        transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"), check=check)
    assert layout.size(of_bytes(BLOBS[-1])) == len(BLOBS[-1])


def test_and_nothing_of_them_is_left_where_it_does_not_pass(server: faulty.Server, layout: Layout) -> None:
    def check(*_: object) -> None:
        faulty.wait_until(lambda: len(server.asked("GET", "/blobs/")) > 2, timeout=10)
        raise ValueError("no")

    with RegistryClient(server.host) as client, pytest.raises(ValueError, match="no"):
        transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"), check=check)
    assert [layout.size(of_bytes(data)) for data in BLOBS] == [None] * COUNT
    assert list(layout.partial_dir.iterdir()) == []
    assert layout.entries() == []


# --- hostile and broken ones -------------------------------------------------------------------------------------------


def raw(answer: bytes, *, then: Callable[[], object] = lambda: None) -> faulty.Fault:
    """An answer as it is written here."""

    def fault(handler: faulty.Handler, _body: bytes) -> bool:
        handler.wfile.write(answer)
        handler.wfile.flush()
        then()
        handler.close_connection = True
        return True

    return fault


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
        b"HTTP/1.1 404 N\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 429 B\r\nContent-Length: 0\r\nRetry-After: Mon, 01 Jan 2024 00:00:00 +99999999999999999999\r\n\r\n",
        b"HTTP/1.1 307 T\r\nContent-Length: 0\r\nConnection: close\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 307 T\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/9\r\n\r\n",
        b"\r\n\r\n",
        b"no HTTP\r\n\r\n",
    ],
)
def test_what_one_says_ends_no_other(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor], head: bytes, tmp_path: Path
) -> None:
    server.faults = [("GET", blobs[3].digest, raw(head))]
    pool = small.Pool(connections=2)
    first, second = Taken(pool, client, blobs[:10]), Taken(pool, client, blobs[10:])
    assert [first.end(), second.end()] == [None, None]
    assert blobs[3] not in first.came
    assert len(second.came) == 10
    # and by itself it is nothing that a user would be shown as a fault of ours
    server.faults = [("GET", blobs[3].digest, raw(head))]
    pull(server, Layout(tmp_path / "other"))


def test_chunks_without_end_are_not_taken(server: faulty.Server, layout: Layout) -> None:
    size = len(BLOBS[5])
    sent: list[int] = []

    def endless(handler: faulty.Handler, _body: bytes) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % size)
        with contextlib.suppress(OSError):
            while len(sent) < 1000:
                handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent.append(0x10000)
        handler.close_connection = True
        return True

    server.faults = [("GET", of_bytes(BLOBS[5]), endless)]
    pull(server, layout)
    assert len(sent) < 1000


def test_nobody_waits_for_what_tls_says_to_itself(tmp_path: Path) -> None:
    """Tickets come before the first answer does."""
    authority = Authority(tmp_path)
    ours, theirs = socket.socketpair()
    going = threading.Event()

    def serve() -> None:
        with server_context(authority.issue("server")).wrap_socket(theirs, server_side=True) as sock:
            sock.recv(100)
            going.wait(20)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            sock.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(ours) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        sock.settimeout(0)
        answer = plain.Answer(sock)
        came = select.poll()
        came.register(sock, select.POLLIN)
        assert came.poll(10_000), "the tickets"
        assert answer.take(2) is None
        going.set()
        body = None
        while body is None:
            assert came.poll(10_000)
            body = answer.take(2)
        assert body == b"ok"
    thread.join(10)


class Slow:
    """A client whose connections take their time, and are refused then."""

    def __init__(self) -> None:
        self.going = threading.Event()

    def send_blob(self, _repository: str, _blob: Descriptor) -> None:
        raise connections.NoneIdle(self._open)

    def _open(self) -> None:
        self.going.wait(30)
        raise ConnectionRefusedError


def test_a_registry_that_cannot_be_reached_holds_up_no_other(client: RegistryClient, blobs: list[Descriptor]) -> None:
    pool, slow = small.Pool(connections=4), Slow()
    began = time.monotonic()
    first = Taken(pool, slow, blobs[:5])  # type: ignore[arg-type]
    second = Taken(pool, client, blobs)
    assert second.end() is None
    assert len(second.came) == COUNT
    assert time.monotonic() - began < 30, "the other's connections had not come"
    slow.going.set()
    assert first.end() is None
    assert first.came == []


def test_only_so_many_answers_wait_to_be_kept(
    client: RegistryClient, blobs: list[Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "_READY_MAX", 2)
    pool, ended = small.Pool(), queue.SimpleQueue[BaseException | None]()
    waiting: list[int] = []

    def keep(_blob: Descriptor, _data: bytes) -> None:
        assert pool._loop is not None
        waiting.append(len(pool._loop._ready))
        time.sleep(0.005)

    pool.begin(small.Fetch(client, "x", blobs * 4, keep, ended.put))
    assert ended.get(timeout=30) is None
    assert len(waiting) == 4 * COUNT
    # those of one look are all taken
    assert max(waiting) <= 2 + small.CONNECTIONS


def test_what_is_wrong_is_told_while_others_say_nothing(server: faulty.Server, layout: Layout) -> None:
    going = threading.Event()
    server.faults = [
        ("GET", of_bytes(BLOBS[COUNT - 1]), faulty.wrong_bytes),
        *[("GET", of_bytes(data), lambda _handler, _body: going.wait(60) and False) for data in BLOBS[:-1]],
    ]
    began = time.monotonic()
    with RegistryClient(server.host, backoff=0.001) as client, pytest.raises(DigestMismatch):
        transfer.pull(layout, client, Reference.parse(f"{server.host}/x:1"))
    assert time.monotonic() - began < 50
    going.set()


def test_without_a_thread_for_it_they_come_as_ever(
    server: faulty.Server, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(_pool: small.Pool) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(small._Loop, "started", started)
    pull(server, layout)
    assert set(times(server).values()) == {1}


def test_one_that_hangs_in_a_head_holds_up_no_other(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor]
) -> None:
    going = threading.Event()
    server.faults = [("GET", blob.digest, raw(b"HTTP/1.1 404 Not", then=lambda: going.wait(60))) for blob in blobs[:3]]
    pool = small.Pool(connections=4)
    first, second = Taken(pool, client, blobs[:3]), Taken(pool, client, blobs[3:])
    began = time.monotonic()
    assert second.end() is None
    assert time.monotonic() - began < 20, "they had not been given up"
    assert len(second.came) == COUNT - 3
    going.set()
    assert first.end() is None


def test_a_command_leaves_no_connection_open(server: faulty.Server, tmp_path: Path) -> None:
    def sockets() -> int:
        count = 0
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                count += os.readlink(entry.path).startswith("socket:")  # noqa: PTH115
        return count

    gc.collect()
    gc.disable()  # which would close them some day
    try:
        before = sockets()
        # what comes is no manifest: nor does one that fails
        arguments = ["--root", str(tmp_path / "root"), "--progress", "none", "pull", f"{server.host}/x:1"]
        assert main.main(arguments) == Exit.INPUT
        assert len(server.asked("GET", "/blobs/")) > 1
        # the server's end of them is in this process, too, and one that was being made may come and go
        began = time.monotonic()
        faulty.wait_until(lambda: sockets() <= before, timeout=20)
        assert time.monotonic() - began < 20
    finally:
        gc.enable()


def test_what_was_asked_for_is_never_waited_for(
    server: faulty.Server, client: RegistryClient, blobs: list[Descriptor]
) -> None:
    going = threading.Event()
    server.faults = [("GET", blobs[3].digest, lambda _handler, _body: going.wait(60) and False)]
    asked = client.send_blob("x", blobs[3])
    assert asked is not None
    try:
        assert asked.take(blobs[3].size) is None
        assert not going.is_set()
    finally:
        going.set()
    body = None
    came = select.poll()
    came.register(asked.fileno, select.POLLIN)
    while body is None:
        assert came.poll(20_000)
        body = asked.take(blobs[3].size)
    assert body == BLOBS[3]
