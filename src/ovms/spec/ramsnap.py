r"""The RAM snapshot blob: codec for its control part (everything before the chunks) and for single chunks.

All integers are little-endian. Pages have 4096 bytes. Version 1::

    offset  size  field
    0       8     magic  89 4F 56 4D 52 0D 0A 1A
    8       4     version (1)
    12      4     prefix size (128)
    16      8     memory size of the guest in bytes, a multiple of the page size
    24      4     page size (4096)
    28      4     chunk pages: the most pages that one chunk holds
    32      8+8   meta: offset (128), stored size        UTF-8 JSON, the compatibility gate
    48      8+8   state: offset, stored size             device state, one lz4 block
    64      8+8   index: offset, number of entries       64 bytes each
    80      8+8   data: offset (a multiple of 4096), stored size
    96      32    SHA-256 of the meta, state and index regions, in this order

    index entry
    0       8     first page
    8       4     pages (1 … chunk pages)
    12      4     stored size in bytes
    16      8     offset from the start of the data region
    24      1     codec: 0 stored, 1 lz4 block, 2 zstd frame
    25      7     zero
    32      32    SHA-256 of the uncompressed pages

The regions follow each other in this order, with zeroes between index and data. Entries are sorted by page, do not
overlap, and their chunks lie in the same order without gaps, so the blob can be read in one pass; pages that no entry
holds are zero (or the parent's, in a diff). The control part can be fetched by itself, and checked before the bulk.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ovms.errors import SnapshotInvalid
from ovms.spec import limits, strictjson

MAGIC: Final = b"\x89OVMR\r\n\x1a"
VERSION: Final = 1
PREFIX_SIZE: Final = 128
ENTRY_SIZE: Final = 64
PAGE: Final = limits.RAM_PAGE

CODEC_STORED: Final = 0
CODEC_LZ4: Final = 1
CODEC_ZSTD: Final = 2

_PREFIX: Final = struct.Struct("<8sIIQIIQQQQQQQQ32s")
_ENTRY: Final = struct.Struct("<QIIQB7s32s")
_ZERO7: Final = bytes(7)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One index entry: which pages, where their bytes lie in the data region, how they are stored, their digest."""

    page: int
    pages: int
    offset: int
    stored_size: int
    codec: int
    digest: bytes

    @property
    def size(self) -> int:
        """Uncompressed bytes."""
        return self.pages * PAGE


@dataclass(frozen=True)
class Prefix:
    """The first 128 bytes: where everything is."""

    memory_size: int
    chunk_pages: int
    meta_size: int
    state_size: int
    chunks: int
    data_offset: int
    data_size: int
    control_digest: bytes

    @property
    def state_offset(self) -> int:
        """Where the stored device state begins."""
        return PREFIX_SIZE + self.meta_size

    @property
    def index_offset(self) -> int:
        """Where the index begins."""
        return self.state_offset + self.state_size

    @property
    def index_end(self) -> int:
        """Where the index ends."""
        return self.index_offset + self.chunks * ENTRY_SIZE

    @property
    def blob_size(self) -> int:
        """The size of the whole blob in bytes."""
        return self.data_offset + self.data_size


def _bad(text: str, offset: int) -> SnapshotInvalid:
    return SnapshotInvalid(f"RAM snapshot: {text}, at offset {offset}", offset=offset)


def parse_prefix(data: bytes) -> Prefix:
    """Reads the first 128 bytes, and checks every number in them against the limits.

    Raises:
        SnapshotInvalid: not a RAM snapshot, another version, or numbers that cannot be.
    """
    if len(data) < PREFIX_SIZE:
        raise _bad(f"only {len(data)} of the {PREFIX_SIZE} bytes of the prefix are there", len(data))
    if data[:8] != MAGIC:
        raise _bad("the magic number is not that of a RAM snapshot", 0)
    fields = _PREFIX.unpack_from(data)
    version, prefix_size, memory, page, chunk_pages = fields[1:6]
    meta_at, meta, state_at, state, index_at, chunks, data_at, data_size, digest = fields[6:15]
    if version != VERSION:
        raise _bad(f"version {version} is not supported; this is {VERSION}", 8)
    if prefix_size != PREFIX_SIZE:
        raise _bad(f"the prefix has {prefix_size} bytes, not {PREFIX_SIZE}", 12)
    if page != PAGE:
        raise _bad(f"pages of {page} bytes are not supported", 24)
    if not limits.RAM_MIN <= memory <= limits.RAM_MAX or memory % PAGE:
        raise _bad(f"a memory size of {memory} bytes is out of range", 16)
    if not 1 <= chunk_pages <= limits.RAM_CHUNK_PAGES_MAX:
        raise _bad(f"{chunk_pages} pages a chunk are out of range", 28)
    if not 2 <= meta <= limits.RAM_HEADER_MAX:
        raise _bad(f"meta of {meta} bytes is out of range", 40)
    if not 1 <= state <= limits.RAM_STATE_MAX:
        raise _bad(f"device state of {state} bytes is out of range", 56)
    if chunks > memory // PAGE:
        raise _bad(f"{chunks} chunks are more than there are pages", 72)
    if chunks > limits.RAM_CHUNKS_MAX:
        raise _bad(f"{chunks} chunks are out of range; at most {limits.RAM_CHUNKS_MAX} are allowed", 72)
    if data_size > memory + chunks * 64:
        raise _bad(f"{data_size} bytes of chunks are more than the memory holds", 88)
    answer = Prefix(memory, chunk_pages, meta, state, chunks, data_at, data_size, digest)
    if (meta_at, state_at, index_at) != (PREFIX_SIZE, answer.state_offset, answer.index_offset):
        raise _bad("the regions do not follow each other", 32)
    if data_at != _align(answer.index_end):
        raise _bad("the data region is not where it must be", 80)
    return answer


def _align(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


@dataclass(frozen=True)
class Control:
    """The control part, checked: prefix, meta, stored device state and index."""

    prefix: Prefix
    meta: Mapping[str, Any]
    state: bytes
    chunks: tuple[Chunk, ...]


def parse_control(data: bytes) -> Control:
    """Reads everything before the chunks; *data* begins at offset 0 and reaches to the end of the index at least.

    Raises:
        SnapshotInvalid: malformed, or its digest is wrong.
        JsonInvalid: the meta is not strict JSON.
    """
    prefix = parse_prefix(data)
    if len(data) < prefix.index_end:
        raise _bad("the index is cut short", len(data))
    if hashlib.sha256(data[PREFIX_SIZE : prefix.index_end]).digest() != prefix.control_digest:
        raise _bad("meta, state and index do not have the digest that the prefix says", 96)
    meta = strictjson.parse(
        data[PREFIX_SIZE : prefix.state_offset], "the RAM snapshot's meta", max_size=limits.RAM_HEADER_MAX
    )
    if not isinstance(meta, dict):
        raise _bad("the meta is not an object", PREFIX_SIZE)
    state = decompress(
        data[prefix.state_offset : prefix.index_offset], CODEC_LZ4, None, "device state", prefix.state_offset
    )
    return Control(prefix, meta, state, tuple(_parse_index(data, prefix)))


def _parse_index(data: bytes, prefix: Prefix) -> Iterator[Chunk]:
    next_page, next_offset = 0, 0
    pages_total = prefix.memory_size // PAGE
    for i in range(prefix.chunks):
        at = prefix.index_offset + i * ENTRY_SIZE
        page, pages, stored, offset, codec, reserved, digest = _ENTRY.unpack_from(data, at)
        if not 1 <= pages <= prefix.chunk_pages:
            raise _bad(f"chunk {i} has {pages} pages", at + 8)
        if page < next_page or page + pages > pages_total:
            raise _bad(f"chunk {i} overlaps the one before it or lies beyond the memory", at)
        if codec not in (CODEC_STORED, CODEC_LZ4, CODEC_ZSTD) or reserved != _ZERO7:
            raise _bad(f"chunk {i} has an unknown codec or flags", at + 24)
        if offset != next_offset or not 1 <= stored <= pages * PAGE:
            raise _bad(f"chunk {i} is not stored where it must be", at + 12)
        if codec == CODEC_STORED and stored != pages * PAGE:
            raise _bad(f"chunk {i} is stored as it is, but has another size", at + 12)
        next_page, next_offset = page + pages, offset + stored
        yield Chunk(page, pages, offset, stored, codec, digest)
    if next_offset != prefix.data_size:
        raise _bad("the chunks do not fill the data region", 88)


def build_control(
    meta: Mapping[str, Any], state: bytes, chunks: Sequence[Chunk], *, memory_size: int, chunk_pages: int
) -> bytes:
    """The control part's bytes, filled with zeroes up to the data region.

    Raises:
        SnapshotInvalid: beyond a limit, so that no reader would take it.
    """
    if len(state) > limits.RAM_STATE_MAX:
        raise _bad(f"device state of {len(state)} bytes is out of range", PREFIX_SIZE)
    meta_bytes, stored_state = strictjson.canonical(meta), _compress_block(state)
    index = b"".join(_ENTRY.pack(c.page, c.pages, c.stored_size, c.offset, c.codec, _ZERO7, c.digest) for c in chunks)
    regions = meta_bytes + stored_state + index
    state_at = PREFIX_SIZE + len(meta_bytes)
    index_at = state_at + len(stored_state)
    data_at = _align(index_at + len(index))
    data_size = chunks[-1].offset + chunks[-1].stored_size if chunks else 0
    prefix = _PREFIX.pack(
        MAGIC,
        VERSION,
        PREFIX_SIZE,
        memory_size,
        PAGE,
        chunk_pages,
        PREFIX_SIZE,
        len(meta_bytes),
        state_at,
        len(stored_state),
        index_at,
        len(chunks),
        data_at,
        data_size,
        hashlib.sha256(regions).digest(),
    )
    parse_prefix(prefix)
    return (prefix + regions).ljust(data_at, b"\0")


def _compress_block(data: bytes) -> bytes:
    import lz4.block

    return bytes(lz4.block.compress(data, store_size=True))


def compress(pages: bytes | memoryview) -> tuple[int, bytes | memoryview, bytes]:
    """One chunk's pages → (codec, stored bytes, digest). What lz4 cannot make smaller is stored as it is."""
    import lz4.block

    digest = hashlib.sha256(pages).digest()
    packed = lz4.block.compress(pages, store_size=False)
    if len(packed) < len(pages):
        return CODEC_LZ4, packed, digest
    return CODEC_STORED, pages, digest


def decompress(stored: bytes | memoryview, codec: int, size: int | None, what: str, offset: int) -> bytes:
    """The uncompressed bytes, exactly *size* of them (None: the stored bytes say their size, as the state does).

    Raises:
        SnapshotInvalid: damaged, of another size, or of a codec that is not supported.
    """
    if codec == CODEC_STORED:
        data = bytes(stored)
    elif codec == CODEC_LZ4:
        if size is None:
            size, stored = _claimed_size(stored, what, offset), stored[4:]
        data = _decompress_lz4(stored, size, what, offset)
    else:
        raise SnapshotInvalid(f"RAM snapshot: {what} is compressed with zstd, which this version does not read")
    if size is not None and len(data) != size:
        raise _bad(f"{what} unpacks to {len(data)} bytes, not {size}", offset)
    return data


def _claimed_size(stored: bytes | memoryview, what: str, offset: int) -> int:
    if len(stored) < 4:
        raise _bad(f"{what} is cut short", offset)
    claimed = int.from_bytes(stored[:4], "little")
    if claimed > limits.RAM_STATE_MAX:
        raise _bad(f"{what} claims {claimed} bytes; at most {limits.RAM_STATE_MAX} are allowed", offset)
    return claimed


def _decompress_lz4(stored: bytes | memoryview, size: int, what: str, offset: int) -> bytes:
    import lz4.block

    try:
        # the size is an upper bound here: what unpacks to less comes back shorter
        return bytes(lz4.block.decompress(stored, uncompressed_size=size))
    except (lz4.block.LZ4BlockError, ValueError) as exc:
        raise _bad(f"{what} cannot be unpacked: {exc}", offset) from None


def unpack_chunk(chunk: Chunk, stored: bytes | memoryview, data_offset: int) -> bytes:
    """A chunk's pages, checked against their digest.

    Raises:
        SnapshotInvalid: damaged.
    """
    at = data_offset + chunk.offset
    data = decompress(stored, chunk.codec, chunk.size, f"the chunk of page {chunk.page}", at)
    if hashlib.sha256(data).digest() != chunk.digest:
        raise _bad(f"the chunk of page {chunk.page} does not have its digest", at)
    return data
