"""Chunks that other RAM snapshots in the store have are not fetched again; what comes out is the blob, whatever anybody says."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import artifacts, faulty, ram
from support.counting import Counter
from support.faulty import Server
from support.registry import Registry
from support.stores import damage

from ovms.errors import RegistryError
from ovms.oci import download, patience, ranges, reuse, transfer
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import ramsnap
from ovms.spec.digest import hex_of, of_bytes
from ovms.spec.manifest import Compression

CHUNK = 16 * ramsnap.PAGE
CHUNKS = 64
SLACK = 40_000


@functools.cache
def pages(seed: object) -> bytes:
    """A chunk's pages, of which the half can be compressed."""
    return random.Random(str(seed)).randbytes(CHUNK // 2) + bytes(CHUNK // 2)


def snapshot(content: dict[int, bytes], **more: Any) -> bytes:
    """A RAM snapshot of chunks, by their number."""
    return ram.blob(
        {16 * number: data for number, data in content.items()},
        ram.header(memory=CHUNKS * CHUNK, **more.pop("header", {})),
        chunk_pages=16,
        **more,
    )


BASE = {number: pages(number) for number in range(CHUNKS)}
OLD = snapshot(BASE)
OTHER = {number: pages(f"other {number}") for number in range(CHUNKS)}
#: A quarter of it is another, in places all over it.
CHANGED = {number: pages(f"new {number}") for number in (0, 1, 2, 3, 20, 21, 22, 30, 31, 40, 41, 42, 60, 61, 62, 63)}
NEW = snapshot({**BASE, **CHANGED}, header={"created": "2026-11-25T10:00:00Z"})
CONTROL = ramsnap.parse_prefix(NEW).data_offset
STORED = len(NEW) // CHUNKS


@pytest.fixture
def source(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "source")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[RegistryClient]:
    with RegistryClient(server.host, backoff=0.002, read_timeout=5) as client:
        yield client


def serve(server: Server, source: Layout, blob: bytes, name: str = "1") -> Reference:
    artifact = artifacts.with_ram(source, f"test:{name}", blob)
    server.manifests[name] = artifact.image.raw
    for part in artifact.image.blobs:
        server.blobs[part.digest] = source.path(part.digest).read_bytes()
    return Reference(server.host, "x", name)


def pull(layout: Layout, client: RegistryClient, ref: Reference) -> download.Tally:
    tally = download.Tally()
    transfer.pull(layout, client, ref, tally=tally)
    return tally


def is_there(layout: Layout, blob: bytes) -> bool:
    return layout.path(of_bytes(blob)).read_bytes() == blob and list(layout.partial_dir.iterdir()) == []


@pytest.mark.spec("RAM-56")
def test_only_what_is_missing_is_fetched(layout: Layout, source: Layout, registry: Registry) -> None:
    with Counter(registry.port) as counter, RegistryClient(counter.host) as client:
        for name, blob in (("1", OLD), ("2", NEW)):
            ref = Reference(counter.host, "reuse/x", name)
            transfer.push(source, client, ref, artifacts.with_ram(source, str(ref), blob).digest)
        pull(layout, client, Reference(counter.host, "reuse/x", "1"))
        counter.since()
        tally = pull(layout, client, Reference(counter.host, "reuse/x", "2"))
        fetched = counter.since()
    assert is_there(layout, NEW)
    assert len(CHANGED) * STORED < fetched < len(CHANGED) * STORED + CONTROL + 3 * reuse.GAP
    assert tally.reused > 0.65 * len(NEW)
    assert tally.fetched <= fetched
    assert tally.fetched + tally.reused > len(NEW)


@pytest.mark.parametrize(("gap", "runs"), [(0, 5), (10 * STORED, 3)])
def test_ranges_that_lie_near_are_one(
    gap: int, runs: int, layout: Layout, source: Layout, server: Server, client: RegistryClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(reuse, "GAP", gap)
    layout.add_bytes(OLD)
    tally = pull(layout, client, serve(server, source, NEW))
    assert is_there(layout, NEW)
    asked = server.asked("GET", hex_of(of_bytes(NEW)))
    assert len(asked) == 1 + runs, "the control part, and what is new"
    assert None not in asked
    assert tally.reused


@pytest.mark.parametrize("shared", [0, 12])
def test_what_saves_too_little_is_fetched_plainly(
    shared: int, layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    layout.add_bytes(snapshot({**OTHER, **{number: pages(number) for number in range(4, 4 + shared)}}))
    tally = pull(layout, client, serve(server, source, NEW))
    assert is_there(layout, NEW)
    asked = server.asked("GET", hex_of(of_bytes(NEW)))
    assert asked == [f"bytes=0-{CONTROL - 1}", f"bytes={CONTROL}-{len(NEW) - 1}"], "nothing twice"
    assert tally.reused == 0


def test_nothing_is_asked_for_where_there_is_no_other(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    layout.add_bytes(b"no RAM snapshot" * 100_000)
    pull(layout, client, serve(server, source, NEW))
    assert server.asked("GET", hex_of(of_bytes(NEW))) == [None]


def test_another_codec_is_another_chunk(layout: Layout, source: Layout, server: Server, client: RegistryClient) -> None:
    layout.add_bytes(snapshot(BASE, compression=Compression.ZSTD))
    assert pull(layout, client, serve(server, source, NEW)).reused == 0
    assert is_there(layout, NEW)


# --- who lies --------------------------------------------------------------------------------------------------------


def lying(index_of: dict[int, bytes], data_of: dict[int, bytes]) -> bytes:
    """A blob whose index tells of other pages than its data has; its size is right."""
    said, there = snapshot(index_of), snapshot(data_of)
    at = ramsnap.parse_prefix(said).data_offset
    return (said[:at] + there[at:]).ljust(len(said), b"\1")[: len(said)]


@pytest.mark.spec("RAM-56", "OCI-21", "OCI-22")
def test_an_index_that_lies_gives_the_blob_all_the_same(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    layout.add_bytes(OLD)
    blob = lying(BASE, OTHER)
    tally = pull(layout, client, serve(server, source, blob))
    assert is_there(layout, blob)
    assert tally.reused == 0, "none of it was of use"
    assert server.asked("GET", hex_of(of_bytes(blob)))[-1] is None


@pytest.mark.spec("RAM-56", "OCI-21")
@pytest.mark.parametrize("how", ["its index lies", "it is damaged", "it was cut off"])
def test_a_snapshot_here_that_is_not_what_it_says(
    how: str, layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    if how == "its index lies":
        layout.add_bytes(lying(BASE, OTHER))
    else:
        path = layout.path(layout.add_bytes(OLD))
        if how == "it is damaged":
            data = bytearray(OLD)
            data[-STORED * 10] ^= 1
            path.chmod(0o644)
            path.write_bytes(data)
        else:
            damage(layout, of_bytes(OLD))
            path.chmod(0o644)
            path.write_bytes(OLD[: CONTROL + 5 * STORED])
    pull(layout, client, serve(server, source, NEW))
    assert is_there(layout, NEW)


def test_one_that_shrinks_while_it_is_copied(
    layout: Layout, source: Layout, server: Server, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layout.path(layout.add_bytes(OLD))
    plan = reuse.plan

    def planned(control: bytes, candidates: list[Path]) -> reuse.Plan | None:
        found = plan(control, candidates)
        path.unlink()
        return found

    monkeypatch.setattr(reuse, "plan", planned)
    pull(layout, client, serve(server, source, NEW))
    assert is_there(layout, NEW)


def test_a_registry_that_lies_in_its_ranges(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    layout.add_bytes(OLD)
    ref = serve(server, source, NEW)
    pattern = hex_of(of_bytes(NEW))

    def wrong(handler: faulty.Handler, body: bytes) -> bool:
        data = bytearray(NEW)
        data[-1] ^= 1
        handler.send_range(bytes(data))
        return True

    server.faults = [("GET", pattern, passing), *[("GET", pattern, wrong)] * 5]
    pull(layout, client, ref)
    assert is_there(layout, NEW)


def passing(handler: faulty.Handler, body: bytes) -> bool:
    return False


def test_a_registry_that_sends_another_control_part(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    """Without an annotation nothing vouches for it; what was begun with it is thrown away."""
    layout.add_bytes(OLD)
    artifact = artifacts.with_ram(source, "test:1", NEW, annotated=False)
    serve(server, source, NEW)
    server.manifests["1"] = artifact.image.raw
    server.blobs[artifact.image.config.digest] = source.path(artifact.image.config.digest).read_bytes()
    other = snapshot({**BASE, **CHANGED}, header={"created": "2026-11-26T10:00:00Z"})
    assert len(other) == len(NEW)

    def wrong(handler: faulty.Handler, body: bytes) -> bool:
        handler.send_range(other)
        return True

    server.faults = [("GET", hex_of(of_bytes(NEW)), wrong)] * 2
    pull(layout, client, Reference(server.host, "x", "1"))
    assert is_there(layout, NEW)


def test_a_registry_without_ranges(layout: Layout, source: Layout, server: Server, client: RegistryClient) -> None:
    layout.add_bytes(OLD)
    server.ranges = False
    pull(layout, client, serve(server, source, NEW))
    assert is_there(layout, NEW)


def test_a_control_part_that_can_not_be_read(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    layout.add_bytes(OLD)
    ref = serve(server, source, NEW)
    server.faults = [("GET", hex_of(of_bytes(NEW)), faulty.status(400))]
    assert pull(layout, client, ref).reused == 0
    assert is_there(layout, NEW)


# --- broken off ------------------------------------------------------------------------------------------------------


def test_what_was_put_together_is_gone_on_with(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    layout.add_bytes(OLD)
    ref = serve(server, source, NEW)
    pattern = hex_of(of_bytes(NEW))
    # the control part and the first range come; then the registry is gone
    first = f"bytes={CONTROL}-"

    def only_the_first(handler: faulty.Handler, body: bytes) -> bool:
        return not handler.headers.get("Range", "").startswith(first) and gone(handler, body)

    gone = faulty.status(500)
    server.faults = [("GET", pattern, passing), *[("GET", pattern, only_the_first)] * 1000]
    with pytest.raises(RegistryError):
        pull(layout, client, ref)
    kept = (layout.partial_dir / hex_of(of_bytes(NEW))).read_bytes()
    assert kept == NEW[: len(kept)]
    assert len(kept) > CONTROL + 10 * STORED, "as far as it is in order"
    lanes, rounds = 4, 2  # the first round brought something
    assert len(server.asked("GET", pattern)) <= 2 + lanes * rounds * patience.ATTEMPTS_MAX
    server.faults, server.seen, server.sent = [], [], 0
    tally = pull(layout, client, ref)
    assert is_there(layout, NEW)
    assert tally.reused
    assert server.sent < len(NEW) // 2


@pytest.mark.spec("OCI-22")
def test_what_a_killed_pull_put_together_wrongly_is_found(
    layout: Layout, source: Layout, server: Server, client: RegistryClient
) -> None:
    blob = lying(BASE, OTHER)
    ref = serve(server, source, blob)
    # a pull with another snapshot here was killed half way; that one is gone now, or is still there
    for there in (False, True):
        (layout.partial_dir / hex_of(of_bytes(blob))).write_bytes(OLD[: len(OLD) // 2])
        if there:
            layout.path(of_bytes(blob)).unlink()
            layout.add_bytes(OLD)
        pull(layout, client, ref)
        assert is_there(layout, blob)


# --- the plan alone --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.sets(st.integers(0, CHUNKS - 1)), st.integers(0, len(NEW)), st.integers(1, 4 * STORED))
@pytest.mark.long
def test_the_pieces_are_the_blob(changed: set[int], start: int, segment: int) -> None:
    blob = snapshot({**BASE, **{number: pages(f"x{number % 3}") for number in changed}})
    chosen = _plan(blob)
    if chosen is None:
        assert len(changed) > 0.4 * CHUNKS
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "SEGMENT", segment)
        got = bytearray(blob[: max(start, len(chosen.control))])
        for piece in chosen.rest(len(got)):
            assert piece.offset == len(got)
            assert piece.source is not None or piece.size <= segment
            got += (
                blob[piece.offset : piece.offset + piece.size]
                if piece.source is None
                else OLD[piece.at :][: piece.size]
            )
    assert got == blob


def _plan(blob: bytes) -> reuse.Plan | None:
    control = blob[: ramsnap.parse_prefix(blob).data_offset]
    return reuse.plan(control, [_OLD_FILE])


_OLD_FILE: Path


@pytest.fixture(scope="module", autouse=True)
def _old_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _OLD_FILE  # hypothesis takes no fixtures of a function
    _OLD_FILE = tmp_path_factory.mktemp("old") / hex_of(of_bytes(OLD))
    _OLD_FILE.write_bytes(OLD)


def test_a_snapshot_that_was_cut_off_has_no_chunks(tmp_path: Path) -> None:
    path = tmp_path / hex_of(of_bytes(OLD))
    path.write_bytes(OLD[:-1])
    assert reuse.plan(NEW[:CONTROL], [path]) is None


def test_which_blobs_are_searched(layout: Layout) -> None:
    layout.add_bytes(OLD)
    layout.add_bytes(b"\x89OVMR\r\n\x1a")
    layout.add_bytes(bytes(2 << 20))
    (layout.blob_dir / "a link").symlink_to(layout.path(of_bytes(OLD)))
    assert reuse.others(layout, of_bytes(b"x")) == [layout.path(of_bytes(OLD))]
    assert reuse.others(layout, of_bytes(OLD)) == []
