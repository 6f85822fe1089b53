"""The RAM snapshot codec: round trips, and blobs that lie."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from typing import Any

import lz4.block
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import JsonInvalid, SnapshotInvalid
from ovms.spec import limits, ramsnap
from ovms.spec.ramsnap import PAGE, Chunk

MEMORY = limits.RAM_MIN
PAGES = MEMORY // PAGE
CHUNK_PAGES = 4
#: Where the numbers of the prefix stand (see the docstring of the module), with their sizes.
PREFIX = {
    "magic": (0, "<Q"),
    "version": (8, "<I"),
    "prefix size": (12, "<I"),
    "memory size": (16, "<Q"),
    "page size": (24, "<I"),
    "chunk pages": (28, "<I"),
    "meta offset": (32, "<Q"),
    "meta size": (40, "<Q"),
    "state offset": (48, "<Q"),
    "state size": (56, "<Q"),
    "index offset": (64, "<Q"),
    "chunks": (72, "<Q"),
    "data offset": (80, "<Q"),
    "data size": (88, "<Q"),
}
ENTRY = {
    "page": (0, "<Q"),
    "pages": (8, "<I"),
    "stored size": (12, "<I"),
    "offset": (16, "<Q"),
    "codec": (24, "<B"),
    "reserved": (31, "<B"),
}


@dataclass(frozen=True)
class Blob:
    meta: dict[str, Any]
    state: bytes
    pages: dict[int, bytes]
    chunks: tuple[Chunk, ...]
    control: bytes
    data: bytes


def build(pages: dict[int, bytes], meta: dict[str, Any] | None = None, state: bytes = b"state" * 100) -> Blob:
    """A blob of single-page chunks, put together with the codec."""
    chunks: list[Chunk] = []
    data = b""
    for page, content in sorted(pages.items()):
        codec, stored, digest = ramsnap.compress(content)
        chunks.append(Chunk(page, len(content) // PAGE, len(data), len(stored), codec, digest))
        data += bytes(stored)
    meta = {"vcpus": 1} if meta is None else meta
    control = ramsnap.build_control(meta, state, chunks, memory_size=MEMORY, chunk_pages=CHUNK_PAGES)
    return Blob(meta, state, pages, tuple(chunks), control, data)


NOISE = bytes(hashlib.shake_128(b"noise").digest(2 * PAGE))
BLOB = build({0: b"a" * PAGE, 3: NOISE, PAGES - 1: b"z" * PAGE})
INDEX = ramsnap.parse_prefix(BLOB.control).index_offset


def poke(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value & (1 << 8 * struct.calcsize(form)) - 1)
    return bytes(changed)


def sealed(control: bytes) -> bytes:
    """*control* with the right digest over meta, state and index, as an attacker would have it."""
    end = min(ramsnap.parse_prefix(BLOB.control).index_end, len(control))
    return control[:96] + hashlib.sha256(control[128:end]).digest() + control[128:]


META = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.integers() | st.none(), max_size=4)
CONTENT = st.binary(min_size=1, max_size=20).map(lambda b: (b * PAGE)[:PAGE]) | st.just(NOISE[:PAGE])


@given(META, st.binary(max_size=300), st.dictionaries(st.integers(0, PAGES - 1), CONTENT, max_size=6))
def test_what_is_built_is_read(meta: dict[str, Any], state: bytes, pages: dict[int, bytes]) -> None:
    blob = build(pages, meta, state)
    control = ramsnap.parse_control(blob.control)
    assert (control.meta, control.state, control.chunks) == (meta, state, blob.chunks)
    assert control.prefix == ramsnap.parse_prefix(blob.control[:128])
    assert control.prefix.memory_size == MEMORY
    assert control.prefix.data_offset == len(blob.control)
    assert control.prefix.data_offset % PAGE == 0
    assert control.prefix.blob_size == len(blob.control) + len(blob.data)
    found = {}
    for chunk in control.chunks:
        stored = blob.data[chunk.offset : chunk.offset + chunk.stored_size]
        found[chunk.page] = ramsnap.unpack_chunk(chunk, stored, control.prefix.data_offset)
    assert found == pages


def test_the_layout_is_the_documented_one() -> None:
    """Offsets and sizes by hand, without the codec's own structures."""
    assert BLOB.control[:8] == bytes.fromhex("894f564d520d0a1a")
    numbers = {name: struct.unpack_from(form, BLOB.control, at)[0] for name, (at, form) in PREFIX.items()}
    meta_end = 128 + numbers["meta size"]
    assert BLOB.control[128:meta_end] == b'{\n  "vcpus": 1\n}\n'
    assert numbers["state offset"] == meta_end
    assert numbers["index offset"] == meta_end + numbers["state size"]
    assert (numbers["version"], numbers["prefix size"], numbers["page size"]) == (1, 128, 4096)
    assert (numbers["chunks"], numbers["data size"]) == (3, len(BLOB.data))
    index_end = numbers["index offset"] + 3 * 64
    assert BLOB.control[96:128] == hashlib.sha256(BLOB.control[128:index_end]).digest()
    assert numbers["data offset"] == len(BLOB.control) == 4096
    assert BLOB.control[index_end:] == bytes(4096 - index_end)
    second = BLOB.control[numbers["index offset"] + 64 :][:64]
    assert struct.unpack_from("<QIIQB", second) == (3, 2, len(NOISE), BLOB.chunks[1].offset, 0)
    assert second[32:] == hashlib.sha256(NOISE).digest()


def test_more_than_the_control_part_may_be_given() -> None:
    assert ramsnap.parse_control(BLOB.control + BLOB.data) == ramsnap.parse_control(BLOB.control)
    assert ramsnap.parse_control(BLOB.control[: INDEX + 3 * 64]).chunks == BLOB.chunks


def test_noise_is_stored_and_the_rest_compressed() -> None:
    assert [c.codec for c in BLOB.chunks] == [ramsnap.CODEC_LZ4, ramsnap.CODEC_STORED, ramsnap.CODEC_LZ4]
    assert BLOB.chunks[1].size == BLOB.chunks[1].stored_size == 2 * PAGE


@pytest.mark.parametrize("size", [0, 1, 8, 127, 128, 200, INDEX - 1, INDEX + 64, INDEX + 3 * 64 - 1])
def test_cut_short(size: int) -> None:
    with pytest.raises(SnapshotInvalid, match=r"at offset \d+$") as info:
        ramsnap.parse_control(BLOB.control[:size])
    assert info.value.context["offset"] <= size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", 0),
        ("version", 0),
        ("version", 2),
        ("prefix size", 64),
        ("memory size", 0),
        ("memory size", MEMORY + 1),
        ("memory size", MEMORY - PAGE),
        ("memory size", limits.RAM_MAX + PAGE),
        ("memory size", 2**64 - PAGE),
        ("page size", 8192),
        ("chunk pages", 0),
        ("chunk pages", 1),
        ("chunk pages", limits.RAM_CHUNK_PAGES_MAX + 1),
        ("meta offset", 0),
        ("meta size", 1),
        ("meta size", limits.RAM_HEADER_MAX + 1),
        ("meta size", 2**64 - 1),
        ("state offset", 0),
        ("state size", 0),
        ("state size", limits.RAM_STATE_MAX + 1),
        ("index offset", 128),
        ("chunks", 2),
        ("chunks", 4),
        ("chunks", PAGES + 1),
        ("chunks", 2**64 - 1),
        ("data offset", 0),
        ("data offset", 4095),
        ("data offset", 8192),
        ("data size", 0),
        ("data size", len(BLOB.data) + 1),
        ("data size", 2**64 - 1),
    ],
)
def test_a_prefix_that_lies(field: str, value: int) -> None:
    at, form = PREFIX[field]
    with pytest.raises(SnapshotInvalid):
        ramsnap.parse_control(sealed(poke(BLOB.control, at, form, value)))


def test_a_prefix_cannot_make_the_reader_take_gigabytes() -> None:
    """A reader takes all up to the data region into memory: 128 bytes must not be able to ask for 16 GiB."""
    fields = list(struct.unpack("<8sIIQIIQQQQQQQQ32s", BLOB.control[:128]))
    chunks = limits.RAM_MAX // PAGE
    index_end = fields[10] + chunks * 64
    fields[3], fields[11], fields[12], fields[13] = limits.RAM_MAX, chunks, -(-index_end // PAGE) * PAGE, 1 << 30
    with pytest.raises(SnapshotInvalid, match="chunks"):
        ramsnap.parse_prefix(struct.pack("<8sIIQIIQQQQQQQQ32s", *fields))
    most = limits.RAM_CHUNKS_MAX * ramsnap.ENTRY_SIZE + limits.RAM_HEADER_MAX + limits.RAM_STATE_MAX
    assert most <= 512 * limits.MIB


@pytest.mark.parametrize(
    ("entry", "field", "value"),
    [
        (0, "pages", 0),
        (0, "pages", CHUNK_PAGES + 1),
        (0, "page", PAGES),
        (0, "page", 2**64 - 1),
        (0, "page", 3),  # the second begins there too
        (1, "pages", 1),  # stored as it is, but twice as long
        (2, "page", 4),  # overlaps the second
        (2, "pages", 2),  # beyond the memory
        (0, "stored size", 0),
        (0, "stored size", PAGE + 1),
        (0, "offset", 1),
        (1, "offset", 0),
        (2, "offset", 2**63),
        (0, "codec", 3),
        (0, "codec", 255),
        (0, "reserved", 1),
    ],
)
def test_an_index_that_lies(entry: int, field: str, value: int) -> None:
    at, form = ENTRY[field]
    with pytest.raises(SnapshotInvalid, match="chunk"):
        ramsnap.parse_control(sealed(poke(BLOB.control, INDEX + entry * 64 + at, form, value)))


@pytest.mark.parametrize("at", [96, 128, 140, INDEX - 1, INDEX, INDEX + 191])
def test_a_changed_byte_of_the_control_part_is_noticed(at: int) -> None:
    changed = poke(BLOB.control, at, "<B", BLOB.control[at] ^ 1)
    with pytest.raises(SnapshotInvalid, match="do not have the digest"):
        ramsnap.parse_control(changed)


@pytest.mark.parametrize("meta", [b"[]", b"12", b'"x"', b"nul", b"{", b'{"a":1,"a":2}', b"\xff\xff", b"[" * 40])
def test_a_meta_that_is_no_object(meta: bytes) -> None:
    old = ramsnap.parse_prefix(BLOB.control).meta_size
    assert len(meta) <= 40
    body = meta.ljust(max(old, len(meta)))
    blob = build({}, {"pad": "x" * (len(body) - 16)}) if len(body) > old else build({})
    prefix = ramsnap.parse_prefix(blob.control)
    control = (
        blob.control[:128] + body[: prefix.meta_size].ljust(prefix.meta_size) + blob.control[prefix.state_offset :]
    )
    digest = hashlib.sha256(control[128 : prefix.index_end]).digest()
    with pytest.raises((SnapshotInvalid, JsonInvalid)):
        ramsnap.parse_control(control[:96] + digest + control[128:])


@given(st.data())
def test_a_mutated_control_part_raises_nothing_else(data: st.DataObject) -> None:
    control = bytearray(BLOB.control)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, INDEX + 3 * 64 - 1))
        control[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(control)) | st.integers(0, len(control)))
    blob = bytes(control[:cut])
    if data.draw(st.booleans()) and len(blob) >= 128:
        blob = sealed(blob)
    try:
        found = ramsnap.parse_control(blob)
    except (SnapshotInvalid, JsonInvalid):
        return
    assert len(found.state) <= limits.RAM_STATE_MAX
    for chunk in found.chunks:
        assert chunk.page * PAGE + chunk.size <= found.prefix.memory_size
        assert chunk.offset + chunk.stored_size <= found.prefix.data_size


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    for blob in (data, BLOB.control[:32] + data, BLOB.control[:128] + data):
        with pytest.raises((SnapshotInvalid, JsonInvalid)):
            ramsnap.parse_control(blob)


# --- chunks --------------------------------------------------------------------------------------------------------


def test_a_damaged_chunk() -> None:
    chunk = BLOB.chunks[0]
    stored = BLOB.data[chunk.offset : chunk.offset + chunk.stored_size]
    assert ramsnap.unpack_chunk(chunk, memoryview(stored), 4096) == b"a" * PAGE
    for bad in (b"", stored[:-1], stored + b"\0", b"\xff" * len(stored)):
        with pytest.raises(SnapshotInvalid, match=r"the chunk of page 0 .*at offset 4096"):
            ramsnap.unpack_chunk(chunk, bad, 4096)
    with pytest.raises(SnapshotInvalid, match="does not have its digest"):
        ramsnap.unpack_chunk(replace(chunk, digest=bytes(32)), stored, 4096)
    other = lz4.block.compress(b"b" * PAGE, store_size=False)
    with pytest.raises(SnapshotInvalid, match="does not have its digest"):
        ramsnap.unpack_chunk(chunk, other, 4096)


@pytest.mark.parametrize("size", [PAGE - 1, PAGE + 1, 0])
def test_a_chunk_of_another_size(size: int) -> None:
    chunk = BLOB.chunks[0]
    with pytest.raises(SnapshotInvalid):
        ramsnap.unpack_chunk(chunk, lz4.block.compress(b"a" * size, store_size=False), 4096)
    with pytest.raises(SnapshotInvalid, match="unpacks to"):
        ramsnap.unpack_chunk(replace(chunk, codec=ramsnap.CODEC_STORED), b"a" * size, 4096)


def test_a_chunk_that_unpacks_to_gigabytes_stops_at_its_pages() -> None:
    bomb = lz4.block.compress(bytes(64 << 20), store_size=False)
    with pytest.raises(SnapshotInvalid, match="cannot be unpacked"):
        ramsnap.unpack_chunk(BLOB.chunks[0], bomb, 4096)


def test_zstd_is_reserved() -> None:
    with pytest.raises(SnapshotInvalid, match="zstd"):
        ramsnap.unpack_chunk(replace(BLOB.chunks[0], codec=ramsnap.CODEC_ZSTD), b"x", 4096)


@given(st.binary(max_size=64), st.sampled_from(BLOB.chunks), st.sampled_from([0, 1, 2]))
def test_any_stored_bytes(data: bytes, chunk: Chunk, codec: int) -> None:
    with pytest.raises(SnapshotInvalid):
        ramsnap.unpack_chunk(replace(chunk, codec=codec), data, 4096)


@given(st.binary(max_size=5).map(lambda b: (b * (4 * PAGE))[: 4 * PAGE] or bytes(PAGE)))
def test_chunks_of_several_pages(pages: bytes) -> None:
    pages = pages[: len(pages) // PAGE * PAGE] or bytes(PAGE)
    codec, stored, digest = ramsnap.compress(memoryview(pages))
    assert len(stored) <= len(pages)
    chunk = Chunk(0, len(pages) // PAGE, 0, len(stored), codec, digest)
    assert ramsnap.unpack_chunk(chunk, stored, 0) == pages


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (b"", "cut short"),
        (b"abc", "cut short"),
        ((limits.RAM_STATE_MAX + 1).to_bytes(4, "little") + b"\0", "claims 67108865 bytes"),
        (b"\xff\xff\xff\xff\0", "claims 4294967295 bytes"),
        (b"\x05\0\0\0" + b"\xff" * 8, "cannot be unpacked"),
        # says more, or less, than it holds
        (b"\x65\0\0\0" + lz4.block.compress(b"s" * 100, store_size=False), "unpacks to 100 bytes, not 101"),
        (b"\x63\0\0\0" + lz4.block.compress(b"s" * 100, store_size=False), "cannot be unpacked"),
    ],
)
def test_a_state_that_lies(stored: bytes, words: str) -> None:
    with pytest.raises(SnapshotInvalid, match=words):
        ramsnap.decompress(stored, ramsnap.CODEC_LZ4, None, "device state", 0)


@given(st.binary(max_size=200))
def test_any_state(stored: bytes) -> None:
    try:
        ramsnap.decompress(stored, ramsnap.CODEC_LZ4, None, "device state", 0)
    except SnapshotInvalid:
        pass


# --- what we write is what we would read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "state", "memory"),
    [
        ({"x": "y" * limits.RAM_HEADER_MAX}, b"", MEMORY),
        ({}, bytes(limits.RAM_STATE_MAX + 1), MEMORY),
        ({}, b"", MEMORY + 1),
        ({}, b"", PAGE),
    ],
)
def test_what_no_reader_takes_is_not_written(meta: dict[str, Any], state: bytes, memory: int) -> None:
    with pytest.raises(SnapshotInvalid):
        ramsnap.build_control(meta, state, [], memory_size=memory, chunk_pages=CHUNK_PAGES)
