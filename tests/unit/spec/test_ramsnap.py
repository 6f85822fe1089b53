"""The RAM snapshot codec: round trips, and blobs that lie."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support import ram
from support.ram import HEADER

from ovms.errors import JsonInvalid, SnapshotInvalid
from ovms.spec import limits, ramheader, ramsnap
from ovms.spec.manifest import Compression
from ovms.spec.ramheader import Header
from ovms.spec.ramsnap import PAGE, Chunk

MEMORY = limits.RAM_MIN
PAGES = MEMORY // PAGE
CHUNK_PAGES = 4
#: Where the numbers of the prefix stand (spec/rfc/ramsnap-v1.md), with their sizes.
PREFIX = {
    "magic": (0, "<Q"),
    "version": (8, "<I"),
    "prefix size": (12, "<I"),
    "memory size": (16, "<Q"),
    "page size": (24, "<I"),
    "chunk pages": (28, "<I"),
    "header offset": (32, "<Q"),
    "header size": (40, "<Q"),
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
    header: Header
    state: bytes
    pages: dict[int, bytes]
    chunks: tuple[Chunk, ...]
    control: bytes
    data: bytes


def build(pages: dict[int, bytes], header: Header = HEADER, state: bytes = b"state" * 100,
          compression: Compression = Compression.LZ4) -> Blob:  # fmt: skip
    whole = ram.blob(pages, header, state=state, chunk_pages=CHUNK_PAGES, compression=compression)
    control = ramsnap.parse_control(whole)
    at = control.prefix.data_offset
    return Blob(header, state, pages, control.chunks, whole[:at], whole[at:])


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


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8)
DIGESTS = st.binary(min_size=32, max_size=32).map(lambda b: "sha256:" + b.hex())
DEVICES = st.lists(
    st.builds(ramheader.Device, st.sampled_from(["serial", "vmgenid", "virtio-rng", "pci-serial"]))
    | st.builds(ramheader.Device, st.just("virtio-blk"), size=st.integers(1, limits.DISK_VIRTUAL_MAX))
    | st.builds(ramheader.Device, st.just("virtio-serial"), TEXT)
    | st.builds(ramheader.Device, st.just("ivshmem"), TEXT, st.integers(limits.IVSHMEM_MIN, limits.IVSHMEM_MAX)),
    max_size=4,
).map(tuple)
HEADERS = st.builds(
    Header,
    created=st.just("2026-11-24T10:00:00Z"),
    source=DIGESTS,
    vmm=TEXT,
    vmm_version=TEXT,
    state_format=TEXT,
    machine_type=TEXT,
    accel=TEXT,
    cpu_model=TEXT,
    cpu_flags=st.lists(TEXT, max_size=3).map(tuple),
    vcpus=st.integers(1, 255),
    memory=st.just(MEMORY),
    devices=DEVICES,
    kernel=st.none() | DIGESTS,
    initrd=st.none() | DIGESTS,
    kernel_args=st.just("") | TEXT,
    disks=st.lists(DIGESTS, max_size=3).map(tuple),
    parent=st.none() | DIGESTS,
    clock_rtc=st.sampled_from(["utc", "local"]),
    clock_source=st.sampled_from(["host", "guest"]),
)
CODECS = st.sampled_from(list(Compression))
CONTENT = st.binary(min_size=1, max_size=20).map(lambda b: (b * PAGE)[:PAGE]) | st.just(NOISE[:PAGE])


@pytest.mark.spec("RAM-1", "RAM-6", "RAM-11", "RAM-12", "RAM-16", "RAM-20")
@given(HEADERS, st.binary(max_size=300), st.dictionaries(st.integers(0, PAGES - 1), CONTENT, max_size=6), CODECS)
def test_what_is_built_is_read(header: Header, state: bytes, pages: dict[int, bytes], compression: Compression) -> None:
    if header.parent is not None:
        pages = {**pages, 200: b""}
    blob = build(pages, header, state, compression)
    control = ramsnap.parse_control(blob.control)
    assert (control.header, control.state, control.chunks) == (header, state, blob.chunks)
    assert ramsnap.build_control(header, state, control.chunks, chunk_pages=CHUNK_PAGES) == blob.control
    ramsnap.check_codecs(control, compression)
    assert control.prefix == ramsnap.parse_prefix(blob.control[:128])
    assert control.prefix.memory_size == MEMORY
    assert control.prefix.data_offset == len(blob.control)
    assert control.prefix.data_offset % PAGE == 0
    assert control.prefix.blob_size == len(blob.control) + len(blob.data)
    found = {}
    for chunk in control.chunks:
        stored = blob.data[chunk.offset : chunk.offset + chunk.stored_size]
        zero = chunk.codec == ramsnap.CODEC_ZERO
        found[chunk.page] = b"" if zero else ramsnap.unpack_chunk(chunk, stored, control.prefix.data_offset)
    assert found == pages


def test_the_layout_is_the_documented_one() -> None:
    """Offsets and sizes by hand, without the codec's own structures."""
    assert BLOB.control[:8] == bytes.fromhex("894f564d520d0a1a")
    numbers = {name: struct.unpack_from(form, BLOB.control, at)[0] for name, (at, form) in PREFIX.items()}
    header_end = 128 + numbers["header size"]
    assert json.loads(BLOB.control[128:header_end]) == HEADER.to_json()
    assert numbers["state offset"] == header_end
    assert numbers["index offset"] == header_end + numbers["state size"]
    assert (numbers["version"], numbers["prefix size"], numbers["page size"]) == (1, 128, limits.RAM_PAGE)
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


def test_noise_is_stored_and_the_rest_compressed() -> None:
    assert [c.codec for c in BLOB.chunks] == [ramsnap.CODEC_LZ4, ramsnap.CODEC_STORED, ramsnap.CODEC_LZ4]
    assert BLOB.chunks[1].size == BLOB.chunks[1].stored_size == 2 * PAGE


@pytest.mark.spec("RAM-2")
@pytest.mark.parametrize("size", [0, 1, 8, 127, 128, 200, INDEX - 1, INDEX + 64, INDEX + 3 * 64 - 1, 4095])
def test_cut_short(size: int) -> None:
    with pytest.raises(SnapshotInvalid, match=r"at offset \d+$") as info:
        ramsnap.parse_control(BLOB.control[:size])
    assert info.value.context["offset"] <= size


@pytest.mark.spec("RAM-6")
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
        ("header offset", 0),
        ("header size", 1),
        ("header size", limits.RAM_HEADER_MAX + 1),
        ("header size", 2**64 - 1),
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


@pytest.mark.spec("RAM-3", "SEC-1")
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


@pytest.mark.spec("RAM-11", "RAM-12", "RAM-13", "RAM-15")
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


@pytest.mark.parametrize("body", [b"[]", b"12", b'"x"', b"nul", b"{", b'{"a":1,"a":2}', b"\xff\xff", b"[" * 40])
def test_a_header_that_is_no_object(body: bytes) -> None:
    prefix = ramsnap.parse_prefix(BLOB.control)
    control = BLOB.control[:128] + body.ljust(prefix.header_size) + BLOB.control[prefix.state_offset :]
    with pytest.raises((SnapshotInvalid, JsonInvalid)):
        ramsnap.parse_control(sealed(control))


def test_the_gap_before_the_data_is_zero() -> None:
    with pytest.raises(SnapshotInvalid, match="no zeroes between") as info:
        ramsnap.parse_control(poke(BLOB.control, 4095, "<B", 1))
    assert info.value.context["rule"] == "RAM-1"


def test_the_header_and_the_prefix_agree_on_the_memory() -> None:
    old = f'"memory": {{\n    "size": {MEMORY}\n'.encode()
    assert BLOB.control.count(old) == 1
    with pytest.raises(SnapshotInvalid, match="the prefix") as info:
        ramsnap.parse_control(sealed(BLOB.control.replace(old, old.replace(b"1048576", b"2097152"))))
    assert info.value.context["rule"] == "RAM-22"


@pytest.mark.spec("RAM-14")
def test_zero_chunks_are_for_diffs() -> None:
    diff = build({0: b"a" * PAGE, 3: b"", 9: b""}, ram.header(parent=ram.DIGEST))
    assert [c.codec for c in diff.chunks] == [ramsnap.CODEC_LZ4, ramsnap.CODEC_ZERO, ramsnap.CODEC_ZERO]
    with pytest.raises(SnapshotInvalid, match="without a parent"):
        build({0: b"a" * PAGE, 3: b""})
    index = ramsnap.parse_prefix(diff.control).index_offset
    for at, form, value in ((8, "<I", 0), (12, "<I", 1), (40, "<B", 1)):
        changed = poke(diff.control, index + 64 + at, form, value)
        end = ramsnap.parse_prefix(diff.control).index_end
        changed = changed[:96] + hashlib.sha256(changed[128:end]).digest() + changed[128:]
        with pytest.raises(SnapshotInvalid, match="chunk 1 is zero"):
            ramsnap.parse_control(changed)


@pytest.mark.spec("RAM-17")
def test_codecs_are_those_of_the_media_type() -> None:
    for compression, other in ((Compression.LZ4, Compression.ZSTD), (Compression.ZSTD, Compression.LZ4)):
        control = ramsnap.parse_control(build({0: b"a" * PAGE}, compression=compression).control)
        ramsnap.check_codecs(control, compression)
        with pytest.raises(SnapshotInvalid, match=f"not of {other}"):
            ramsnap.check_codecs(control, other)


@pytest.mark.spec("RAM-2", "SEC-1")
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
    resealed = len(blob) < 128 or blob[96:128] != bytes(BLOB.control[96:128])
    try:
        found = ramsnap.parse_control(blob)
    except (SnapshotInvalid, JsonInvalid):
        return
    if not resealed:
        assert found == ramsnap.parse_control(BLOB.control), "taken, and not what was sealed"
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
        ramsnap.unpack_chunk(chunk._replace(digest=bytes(32)), stored, 4096)
    other = lz4.block.compress(b"b" * PAGE, store_size=False)
    with pytest.raises(SnapshotInvalid, match="does not have its digest"):
        ramsnap.unpack_chunk(chunk._replace(stored_size=len(other)), other, 4096)


@pytest.mark.parametrize("size", [PAGE - 1, PAGE + 1, 0])
def test_a_chunk_of_another_size(size: int) -> None:
    chunk = BLOB.chunks[0]
    packed = lz4.block.compress(b"a" * size, store_size=False)
    with pytest.raises(SnapshotInvalid, match="unpack"):
        ramsnap.unpack_chunk(chunk._replace(stored_size=len(packed)), packed, 4096)
    with pytest.raises(SnapshotInvalid, match="unpacks to"):
        ramsnap.unpack_chunk(chunk._replace(codec=ramsnap.CODEC_STORED, stored_size=size), b"a" * size, 4096)


@pytest.mark.spec("RAM-16", "RAM-3")
def test_a_chunk_that_unpacks_to_gigabytes_stops_at_its_pages() -> None:
    bomb = lz4.block.compress(bytes(64 << 20), store_size=False)
    with pytest.raises(SnapshotInvalid, match="cannot be unpacked"):
        ramsnap.unpack_chunk(BLOB.chunks[0]._replace(stored_size=len(bomb)), bomb, 4096)


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


@pytest.mark.spec("RAM-16")
def test_zstd_chunks() -> None:
    blob = build({0: b"a" * PAGE}, compression=Compression.ZSTD)
    chunk = blob.chunks[0]
    assert chunk.codec == ramsnap.CODEC_ZSTD
    good = blob.data
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        good + good,
        zstd(b"a" * PAGE, write_content_size=False),
        zstd(b"a" * (PAGE - 1)),
        zstd(bytes(64 << 20)),
        zstd(b"b" * PAGE),
    ):
        with pytest.raises(SnapshotInvalid, match="the chunk of page 0") as info:
            ramsnap.unpack_chunk(chunk._replace(stored_size=len(bad)), bad, 4096)
        assert info.value.context["rule"] == "RAM-16"


@given(st.binary(max_size=64), st.sampled_from(BLOB.chunks), st.sampled_from([0, 1, 2]))
def test_any_stored_bytes(data: bytes, chunk: Chunk, codec: int) -> None:
    with pytest.raises(SnapshotInvalid):
        ramsnap.unpack_chunk(chunk._replace(codec=codec, stored_size=len(data)), data, 4096)


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
        (b"", "out of range"),
        (b"abcd", "out of range"),
        ((limits.RAM_STATE_MAX + 1).to_bytes(4, "little") + b"\0", "claims 67108865 bytes"),
        (b"\xff\xff\xff\xff\0", "claims 4294967295 bytes"),
        (b"\x05\0\0\0" + b"\xff" * 8, "cannot be unpacked"),
        # says more, or less, than it holds
        (b"\x65\0\0\0" + lz4.block.compress(b"s" * 100, store_size=False), "unpacks to 100 bytes, not 101"),
        (b"\x63\0\0\0" + lz4.block.compress(b"s" * 100, store_size=False), "cannot be unpacked"),
    ],
)
def test_a_state_that_lies(stored: bytes, words: str) -> None:
    with pytest.raises(SnapshotInvalid, match=words) as info:
        ramsnap.parse_control(with_state(stored))
    assert info.value.context["rule"] in ("RAM-6", "RAM-9")


def with_state(stored: bytes) -> bytes:
    """BLOB's control part with other stored bytes of the device state, and without chunks."""
    prefix = list(struct.unpack("<8sIIQIIQQQQQQQQ32s", BLOB.control[:128]))
    header = BLOB.control[128 : prefix[8]]
    prefix[9], prefix[10], prefix[11] = len(stored), prefix[8] + len(stored), 0
    prefix[12], prefix[13] = -(-prefix[10] // PAGE) * PAGE, 0
    prefix[14] = hashlib.sha256(header + stored).digest()
    return (struct.pack("<8sIIQIIQQQQQQQQ32s", *prefix) + header + stored).ljust(prefix[12], b"\0")


@given(st.binary(max_size=200))
def test_any_state(stored: bytes) -> None:
    try:
        assert len(ramsnap.parse_control(with_state(stored)).state) <= limits.RAM_STATE_MAX
    except SnapshotInvalid:
        pass


# --- what we write is what we would read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "state"),
    [
        (ram.header(cpu_flags=("x" * 4096,) * 300), b""),
        (HEADER, bytes(limits.RAM_STATE_MAX + 1)),
        (ram.header(memory=MEMORY + 1), b""),
        (ram.header(memory=PAGE), b""),
        (ram.header(source="latest"), b""),
    ],
)
def test_what_no_reader_takes_is_not_written(header: Header, state: bytes) -> None:
    with pytest.raises(SnapshotInvalid):
        ramsnap.build_control(header, state, [], chunk_pages=CHUNK_PAGES)


# --- whole blobs -----------------------------------------------------------------------------------------------------


def meaning(whole: bytes, parent: bool = False) -> tuple[bytes, bytes, Header]:
    """What a reader makes of a blob: the guest's memory (of a diff: over 0x5a), the device state, the header."""
    control = ramsnap.parse_control(whole)
    if control.prefix.blob_size != len(whole):
        raise SnapshotInvalid("another size", rule="RAM-1")
    memory = bytearray(b"\x5a" if parent else b"\0") * control.prefix.memory_size
    for chunk in control.chunks:
        at = control.prefix.data_offset + chunk.offset
        data = bytes(chunk.size)
        if chunk.codec != ramsnap.CODEC_ZERO:
            data = ramsnap.unpack_chunk(chunk, whole[at : at + chunk.stored_size], control.prefix.data_offset)
        memory[chunk.page * PAGE : chunk.page * PAGE + chunk.size] = data
    return bytes(memory), control.state, control.header


BASE_PAGES = {0: b"a" * PAGE, 3: NOISE, 7: b"q" * (3 * PAGE), PAGES - 1: b"z" * PAGE}
WHOLE = {
    name: (ram.blob(pages, header, state=b"state" * 100, chunk_pages=CHUNK_PAGES, compression=compression), diff)
    for name, pages, header, compression, diff in (
        ("lz4", BASE_PAGES, HEADER, Compression.LZ4, False),
        ("zstd", BASE_PAGES, HEADER, Compression.ZSTD, False),
        ("diff", {**BASE_PAGES, 20: b""}, ram.header(parent=ram.DIGEST), Compression.LZ4, True),
    )
}
MEANING = {name: meaning(whole, diff) for name, (whole, diff) in WHOLE.items()}


@st.composite
def whole_mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """*whole* with bytes changed, cut out, put in, moved or doubled, anywhere."""
    data = bytearray(whole)
    ends = [0, 96, 128, len(data)]
    bulk = ramsnap.parse_prefix(whole).data_offset
    places = (
        st.integers(0, bulk)
        | st.integers(bulk, len(data))
        | st.sampled_from(ends).flatmap(lambda at: st.integers(max(at - 8, 0), at))
    )
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        at, length = draw(places), draw(st.integers(1, 80))
        match draw(st.sampled_from(["flip", "set", "cut", "insert", "copy", "swap"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at : at + length] = draw(st.binary(min_size=1, max_size=8)) * 4
            case "cut":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "copy":
                other = draw(places)
                data[at : at + length] = data[other : other + length]
            case _:
                other = draw(places)
                data[at:at], data[other:other] = bytes(data[other : other + length]), b""
    return bytes(data)


@pytest.mark.spec("RAM-2", "RAM-7", "RAM-16", "SEC-1")
@pytest.mark.parametrize("name", list(WHOLE))
@given(data=st.data())
def test_a_mutated_blob_is_refused_or_means_the_same(name: str, data: st.DataObject) -> None:
    """An error, or the very same memory, device state and header: never another VM."""
    whole, diff = WHOLE[name]
    changed = data.draw(whole_mutations(whole))
    try:
        found = meaning(changed, diff)
    except (SnapshotInvalid, JsonInvalid):
        return
    assert found == MEANING[name]


@pytest.mark.spec("RAM-16", "SEC-1")
@pytest.mark.parametrize("name", list(WHOLE))
@given(data=st.data())
def test_a_mutated_blob_that_is_sealed_again(name: str, data: st.DataObject) -> None:
    """An attacker seals the control part anew. Then it may mean something else, but whatever it says is true of it."""
    whole, diff = WHOLE[name]
    end = ramsnap.parse_prefix(whole).index_end
    changed = bytearray(data.draw(whole_mutations(whole)))
    if len(changed) < end:
        return
    changed[96:128] = hashlib.sha256(changed[128:end]).digest()
    try:
        memory, state, header = meaning(bytes(changed), diff)
    except (SnapshotInvalid, JsonInvalid):
        return
    assert len(memory) == header.memory
    assert len(state) <= limits.RAM_STATE_MAX
    control = ramsnap.parse_control(bytes(changed))
    for chunk in control.chunks:
        if chunk.codec != ramsnap.CODEC_ZERO:
            pages = memory[chunk.page * PAGE : chunk.page * PAGE + chunk.size]
            assert hashlib.sha256(pages).digest() == chunk.digest
