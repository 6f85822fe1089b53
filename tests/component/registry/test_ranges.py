"""One blob over several connections: where one is slow, and nowhere else."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator

import pytest
from support import faulty
from support.faulty import Server

from ovms.errors import RegistryUnreachable
from ovms.oci import ranges, transfer
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes
from ovms.spec.digest import hex_of, of_bytes

DATA = hashlib.shake_128(b"slow").digest(1_700_001)
DISK = mediatypes.DISK_LAYER
BLOB = f"/blobs/{of_bytes(DATA)}$"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.serve_artifact({"disk": (DISK, DATA)}, (mediatypes.MANIFEST, b"{}"))
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[RegistryClient]:
    with RegistryClient(server.host, backoff=0.002, read_timeout=2) as client:
        yield client


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SEGMENT", 65536)
    monkeypatch.setattr(ranges, "JUDGE_AFTER", 0.02)
    monkeypatch.setattr("ovms.oci.http.BUFFER", 16384)


def slow(_amount: int) -> None:
    time.sleep(0.005)


def pull(layout: Layout, client: RegistryClient, server: Server) -> None:
    transfer.pull(layout, client, Reference(server.host, "x", "1"))


@pytest.mark.usefixtures("impatient")
def test_a_slow_connection_gets_company(layout: Layout, server: Server, client: RegistryClient) -> None:
    server.pace = slow
    pull(layout, client, server)
    assert layout.path(of_bytes(DATA)).read_bytes() == DATA
    assert server.most_at_once > 1
    asked = server.asked("GET", BLOB)
    assert asked[0] is None
    assert sum(found is not None for found in asked) > 3


def test_a_fast_connection_stays_alone(layout: Layout, server: Server, client: RegistryClient) -> None:
    pull(layout, client, server)
    assert server.asked("GET", BLOB) == [None]


@pytest.mark.usefixtures("impatient")
def test_a_registry_without_ranges_is_asked_for_the_rest_by_one(
    layout: Layout, server: Server, client: RegistryClient
) -> None:
    server.pace = slow
    server.ranges = False
    pull(layout, client, server)
    assert layout.path(of_bytes(DATA)).read_bytes() == DATA
    assert f"-{len(DATA) - 1}" in "".join(map(str, server.asked("GET", BLOB))), "all of the rest"


@pytest.mark.usefixtures("impatient")
def test_segments_that_fail_are_fetched_again(layout: Layout, server: Server, client: RegistryClient) -> None:
    server.pace = slow

    def fail_some(handler: faulty.Handler, body: bytes) -> bool:
        # the first request is for the whole, and goes well
        if handler.headers.get("Range") is None:
            handler.send_range(DATA)
        else:
            handler.send_range(DATA, cut=1000)
        return True

    server.faults = [("GET", BLOB, fail_some)] * 4
    pull(layout, client, server)
    assert layout.path(of_bytes(DATA)).read_bytes() == DATA
    assert list(layout.partial_dir.iterdir()) == []


@pytest.mark.usefixtures("impatient")
def test_what_came_in_order_is_kept_when_the_registry_dies(
    layout: Layout, server: Server, client: RegistryClient
) -> None:
    server.pace = slow
    server.faults = [("GET", BLOB, faulty.no_ranges), *[("GET", BLOB, faulty.status(500))] * 200]
    with pytest.raises(Exception, match="500"):
        pull(layout, client, server)
    kept = (layout.partial_dir / hex_of(of_bytes(DATA))).read_bytes()
    assert kept
    assert kept == DATA[: len(kept)]
    server.faults = []
    server.pace = None
    pull(layout, client, server)
    assert layout.path(of_bytes(DATA)).read_bytes() == DATA


# --- the segments alone ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SEGMENT", 10)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("start", [0, 7, 94, 99, 100])
@pytest.mark.parametrize("lanes", [1, 3])
def test_segments_come_in_order_and_cover_the_rest(start: int, lanes: int) -> None:
    data = bytes(range(100))

    def fetch(offset: int, size: int) -> bytes:
        time.sleep(0.001 if offset % 20 else 0.003)
        return data[offset : offset + size]

    assert b"".join(ranges.fetch(start, 100, lanes, fetch, rate=1.0)) == data[start:]


@pytest.mark.usefixtures("small")
def test_no_more_than_the_window_is_ahead() -> None:
    asked: list[int] = []

    def fetch(offset: int, size: int) -> bytes:
        asked.append(offset)
        return bytes(size)

    stream = ranges.fetch(0, 10_000, 2, fetch, rate=1.0)
    next(stream)
    time.sleep(0.05)
    assert max(asked) <= 10 * ranges.WINDOW * 2
    stream.close()  # type: ignore[attr-defined]
    assert_ended()


@pytest.mark.usefixtures("small")
def test_the_first_error_comes_out_after_what_stands_before_it() -> None:
    def fetch(offset: int, size: int) -> bytes:
        if offset >= 50:
            raise RegistryUnreachable("gone")
        return bytes(size)

    got = 0
    with pytest.raises(RegistryUnreachable, match="gone"):
        for data in ranges.fetch(0, 100, 1, fetch, rate=1.0):
            got += len(data)
    assert got == 50
    assert_ended()


@pytest.mark.usefixtures("small")
def test_several_that_are_no_faster_than_one_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1_000_000))
    monkeypatch.setattr("ovms.oci.ranges.time.monotonic", lambda: float(next(now)))  # 10 bytes take a second or more
    got = bytearray()
    with pytest.raises(ranges.NoGain):
        for data in ranges.fetch(0, 10_000, 2, lambda _offset, size: bytes(size), rate=10.0):
            got += data
    assert 40 <= len(got) <= 100, "what was asked for is handed on, and no more is asked for"


@pytest.mark.usefixtures("small")
def test_several_that_are_faster_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1_000_000))
    monkeypatch.setattr("ovms.oci.ranges.time.monotonic", lambda: float(next(now)))
    assert sum(map(len, ranges.fetch(0, 10_000, 2, lambda _offset, size: bytes(size), rate=1.0))) == 10_000


def assert_ended() -> None:
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("range-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_judge_waits_and_wants_company(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("ovms.oci.ranges.time.monotonic", lambda: clock[0])
    spare = [0]
    judge = ranges.Judge(spare=lambda: spare[0])
    judge.received(1000, 1 << 40)
    clock[0] = 2.0
    judge.received(1000, 1 << 40)  # nobody to spare
    spare[0] = 2
    clock[0] = 2.5
    judge.received(1000, 1 << 40)  # too early
    clock[0] = 4.0
    judge.received(1000, 3 * ranges.SEGMENT)  # not worth it any more
    clock[0] = 6.0
    judge.received(int(3 * ranges.FAST), 1 << 40)  # fast
    clock[0] = 8.0
    with pytest.raises(ranges.Slow):
        judge.received(1000, 1 << 40)
    assert judge.rate == 500


def test_memory_is_bounded() -> None:
    assert ranges.SEGMENT * ranges.WINDOW * 4 <= 64 << 20
