r"""The RAM snapshot blob: codec for its control part (everything before the chunks) and for single chunks.

Source: ``spec/rfc/ramsnap-v1.md``, which sets the layout; every error names the rule there that is broken. The control
part can be fetched by itself, and checked before the bulk; the blob can be read in one pass, or chunk by chunk.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from ovms.errors import SnapshotInvalid, Unsupported
from ovms.lazy import dataclass
from ovms.spec import limits, ramcrypt, ramheader, strictjson
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Header

MAGIC: Final = b"\x89OVMR\r\n\x1a"
VERSION: Final = 1
PREFIX_SIZE: Final = 128
ENTRY_SIZE: Final = 64
#: Where in an entry its codec stands.
_CODEC_AT: Final = 24
PAGE: Final = limits.RAM_PAGE

CODEC_STORED: Final = 0
CODEC_LZ4: Final = 1
CODEC_ZSTD: Final = 2
#: Pages of a diff that are zero where the parent's are not; nothing is stored.
CODEC_ZERO: Final = 3
#: Added to the codec of a chunk with bytes where these are encrypted.
ENCRYPTED: Final = 16

#: The codecs that a blob of each compression may hold; where it is encrypted, with :data:`ENCRYPTED` added to all but the last.
CODECS: Final = {
    Compression.LZ4: frozenset({CODEC_STORED, CODEC_LZ4, CODEC_ZERO}),
    Compression.ZSTD: frozenset({CODEC_STORED, CODEC_ZSTD, CODEC_ZERO}),
}

_PREFIX: Final = struct.Struct("<8sIIQIIQQQQQQQQ32s")
_CONTROL_DIGEST_AT: Final = PREFIX_SIZE - 32
_ENTRY: Final = struct.Struct("<QIIQB7s32s")
_ZERO7: Final = bytes(7)
_ZERO_DIGEST: Final = bytes(32)
_ZSTD_LEVEL: Final = 3
_ZSTD_WINDOW_MAX: Final = limits.RAM_CHUNK_PAGES_MAX * PAGE


class Chunk(NamedTuple):
    """One index entry: which pages, where their bytes lie in the data region, how they are stored, their digest.

    The digest is that of the pages; where the chunk is encrypted, that of its stored bytes.

    (A restore makes 16,000 of them for each GiB: a frozen dataclass would take 40 ms for that.)
    """

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

    @property
    def encrypted(self) -> bool:
        """Whether its bytes are encrypted."""
        return self.codec >= ENCRYPTED


@dataclass(frozen=True)
class Prefix:
    """The first 128 bytes: where everything is."""

    memory_size: int
    chunk_pages: int
    header_size: int
    state_size: int
    chunks: int
    data_offset: int
    data_size: int
    control_digest: bytes

    @property
    def state_offset(self) -> int:
        """Where the stored device state begins."""
        return PREFIX_SIZE + self.header_size

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


def _bad(text: str, offset: int, rule: str) -> SnapshotInvalid:
    return SnapshotInvalid(f"RAM snapshot: {text}, at offset {offset}", offset=offset, rule=rule)


def parse_prefix(data: bytes) -> Prefix:
    """Reads the first 128 bytes, and checks every number in them against the limits.

    Raises:
        SnapshotInvalid: not a RAM snapshot, another version, or numbers that cannot be.
    """
    if len(data) < PREFIX_SIZE:
        raise _bad(f"only {len(data)} of the {PREFIX_SIZE} bytes of the prefix are there", len(data), "RAM-1")
    if data[:8] != MAGIC:
        raise _bad("the magic number is not that of a RAM snapshot", 0, "RAM-4")
    fields = _PREFIX.unpack_from(data)
    version, prefix_size, memory, page, chunk_pages = fields[1:6]
    header_at, header, state_at, state, index_at, chunks, data_at, data_size, digest = fields[6:15]
    if version != VERSION:
        raise _bad(f"version {version} is not supported; this is {VERSION}", 8, "RAM-5")
    answer = Prefix(memory, chunk_pages, header, state, chunks, data_at, data_size, digest)
    for wrong, text, offset in (
        (prefix_size != PREFIX_SIZE, f"the prefix has {prefix_size} bytes, not {PREFIX_SIZE}", 12),
        (
            not limits.RAM_MIN <= memory <= limits.RAM_MAX or memory % PAGE != 0,
            f"a memory size of {memory} bytes is out of range",
            16,
        ),
        (page != PAGE, f"pages of {page} bytes are not supported", 24),
        (not 1 <= chunk_pages <= limits.RAM_CHUNK_PAGES_MAX, f"{chunk_pages} pages a chunk are out of range", 28),
        (header_at != PREFIX_SIZE, "the regions do not follow each other", 32),
        (not 2 <= header <= limits.RAM_HEADER_MAX, f"a header of {header} bytes is out of range", 40),
        (state_at != answer.state_offset, "the regions do not follow each other", 48),
        (not 5 <= state <= limits.RAM_STATE_MAX, f"device state of {state} bytes is out of range", 56),
        (index_at != answer.index_offset, "the regions do not follow each other", 64),
        (chunks > memory // PAGE, f"{chunks} chunks are more than there are pages", 72),
        (
            chunks > limits.RAM_CHUNKS_MAX,
            f"{chunks} chunks are out of range; at most {limits.RAM_CHUNKS_MAX} are allowed",
            72,
        ),
        (data_at != _align(answer.index_end), "the data region is not where it must be", 80),
        (
            data_size > memory + chunks * ramcrypt.TAG_SIZE,
            f"{data_size} bytes of chunks are more than the memory holds",
            88,
        ),
    ):
        if wrong:
            raise _bad(text, offset, "RAM-6")
    return answer


def _align(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


@dataclass(frozen=True)
class Needs:
    """What a restore has to know before the memory: prefix, header and uncompressed device state, checked.

    *codecs* has a byte for each entry of the index: what its chunk is compressed with, not checked. Where the snapshot is encrypted,
    *state* is empty: :func:`decrypt_state` gives it, of *encrypted*: its bytes, and the digest of what they vouch for, too.
    """

    prefix: Prefix
    header: Header
    state: bytes
    codecs: bytes
    encrypted: tuple[bytes, bytes] | None


@dataclass(frozen=True)
class Control(Needs):
    """The control part, checked: the index, too."""

    chunks: tuple[Chunk, ...]


def parse_head(data: bytes) -> tuple[Prefix, Header]:
    """The prefix and the header, which the digest of the control part vouches for; *data* reaches to the index's end at least.

    Raises:
        SnapshotInvalid: malformed, or the digest is wrong.
        JsonInvalid: the header is not strict JSON.
    """
    prefix = parse_prefix(data)
    if len(data) < prefix.index_end:
        raise _bad("the index is cut short", len(data), "RAM-1")
    if hashlib.sha256(memoryview(data)[PREFIX_SIZE : prefix.index_end]).digest() != prefix.control_digest:
        raise _bad("header, state and index do not have the digest that the prefix says", 96, "RAM-7")
    header = ramheader.parse(data[PREFIX_SIZE : prefix.state_offset], PREFIX_SIZE)
    if header.memory != prefix.memory_size:
        raise _bad(
            f"the header says {header.memory} bytes of memory, the prefix {prefix.memory_size}", PREFIX_SIZE, "RAM-22"
        )
    return prefix, header


def parse_control(data: bytes) -> Control:
    """Reads everything before the chunks; *data* begins at offset 0 and reaches to the data region at least.

    Raises:
        SnapshotInvalid: malformed, or its digest is wrong.
        JsonInvalid: the header is not strict JSON.
    """
    needs = parse_needs(data)
    index = _parse_index(data, needs.prefix, needs.header)
    return Control(needs.prefix, needs.header, needs.state, needs.codecs, needs.encrypted, tuple(index))


def parse_needs(data: bytes) -> Needs:
    """Like :func:`parse_control`, and leaves the index alone but for its digest: it is told when the memory is unpacked."""
    prefix, header = parse_head(data)
    if any(data[prefix.index_end : prefix.data_offset]) or len(data) < prefix.data_offset:
        raise _bad("there are no zeroes between the index and the data", prefix.index_end, "RAM-1")
    stored = bytes(data[prefix.state_offset : prefix.index_offset])
    codecs = data[prefix.index_offset + _CODEC_AT : prefix.index_end : ENTRY_SIZE]
    if header.encryption is None:
        return Needs(prefix, header, _unpack_state(stored, prefix.state_offset), codecs, None)
    index = memoryview(data)[prefix.index_offset : prefix.index_end]
    bound = _bound(data[:PREFIX_SIZE], data[PREFIX_SIZE : prefix.state_offset], index)
    return Needs(prefix, header, b"", codecs, (stored, bound))


def _bound(prefix: bytes, header: bytes, index: bytes | memoryview) -> bytes:
    # What the tag of an encrypted device state vouches for beside it: all of the control part.
    hasher = hashlib.sha256(prefix[:_CONTROL_DIGEST_AT])
    hasher.update(header)
    hasher.update(index)
    return hasher.digest()


def decrypt_state(needs: Needs, cipher: Cipher) -> bytes:
    """The uncompressed device state of an encrypted snapshot. Where this returns, header and index are its producer's, too.

    Raises:
        SnapshotInvalid: another key, or something of the control part was changed.
    """
    assert needs.encrypted is not None
    stored = cipher.decrypt_state(*needs.encrypted)
    at = needs.prefix.state_offset
    if stored is None:
        raise _bad("the device state, the header or the index is not as it was encrypted", at, "RAM-62")
    return _unpack_state(stored, at)


def check_codecs(needs: Needs, compression: Compression) -> None:
    """Whether the chunks are compressed as the artifact's media type says.

    Raises:
        SnapshotInvalid: a chunk is compressed otherwise.
    """
    if wrong := {codec for codec in set(needs.codecs) if codec & ~ENCRYPTED not in CODECS[compression]}:
        i = next(i for i, codec in enumerate(needs.codecs) if codec in wrong)
        at = needs.prefix.index_offset + i * ENTRY_SIZE + _CODEC_AT
        raise _bad(f"chunk {i} has the codec {needs.codecs[i]}, which is not of {compression}", at, "RAM-17")


def check_entries(counts: Iterable[int]) -> None:
    """Whether the members of a chain, of so many index entries each, have few enough in all.

    Raises:
        SnapshotInvalid: they have not.
    """
    if (total := sum(counts)) > limits.RAM_CHUNKS_MAX:
        text = f"a chain of RAM snapshots has {total} index entries; at most {limits.RAM_CHUNKS_MAX} are allowed"
        raise SnapshotInvalid(text, rule="RAM-41", hint="whoever made it has to take a snapshot without parents")


def _parse_index(data: bytes, prefix: Prefix, header: Header) -> Iterator[Chunk]:
    diff, added = header.parent is not None, 0 if header.encryption is None else ENCRYPTED
    tag = ramcrypt.TAG_SIZE if added else 0
    stored_as_is = CODEC_STORED + added
    known = frozenset((stored_as_is, CODEC_LZ4 + added, CODEC_ZSTD + added, CODEC_ZERO))
    next_page, next_offset = 0, 0
    pages_total = prefix.memory_size // PAGE
    at = prefix.index_offset - ENTRY_SIZE
    index = memoryview(data)[prefix.index_offset : prefix.index_end]
    for i, (page, pages, stored, offset, codec, reserved, digest) in enumerate(_ENTRY.iter_unpack(index)):
        at += ENTRY_SIZE
        if codec not in known or reserved != _ZERO7:
            if codec & ~ENCRYPTED < CODEC_ZERO and reserved == _ZERO7:
                raise _bad(
                    f"chunk {i} is {'not ' if added else ''}encrypted, and the header says otherwise", at + 24, "RAM-61"
                )
            raise _bad(f"chunk {i} has an unknown codec or flags", at + 24, "RAM-15")
        if page < next_page or page + pages > pages_total:
            raise _bad(f"chunk {i} overlaps the one before it or lies beyond the memory", at, "RAM-11")
        if offset != next_offset:
            raise _bad(f"chunk {i} is not stored where it must be", at + 16, "RAM-12")
        if codec == CODEC_ZERO:
            if not diff:
                raise _bad(f"chunk {i} is zero, in a snapshot without a parent", at + 24, "RAM-14")
            if not pages or stored or digest != _ZERO_DIGEST:
                raise _bad(f"chunk {i} is zero, and has no pages, stored bytes or a digest", at + 8, "RAM-14")
        elif not 1 <= pages <= prefix.chunk_pages:
            raise _bad(f"chunk {i} has {pages} pages", at + 8, "RAM-13")
        elif not 1 <= stored - tag <= pages * PAGE:
            raise _bad(f"chunk {i} is stored in {stored} bytes", at + 12, "RAM-13")
        elif codec == stored_as_is and stored - tag != pages * PAGE:
            raise _bad(f"chunk {i} is stored as it is, but has another size", at + 12, "RAM-13")
        next_page, next_offset = page + pages, offset + stored
        yield Chunk(page, pages, offset, stored, codec, digest)
    if next_offset != prefix.data_size:
        raise _bad("the chunks do not fill the data region", 88, "RAM-12")


def build_control(
    header: Header, state: bytes, chunks: Sequence[Chunk], *, chunk_pages: int, cipher: Cipher | None = None
) -> bytes:
    """The control part's bytes, filled with zeroes up to the data region. *cipher*: where the header says that it is encrypted.

    Raises:
        SnapshotInvalid: beyond a limit, so that no reader would take it.
    """
    if len(state) > limits.RAM_STATE_MAX:
        raise _bad(f"device state of {len(state)} bytes is out of range", PREFIX_SIZE, "RAM-9")
    assert (cipher is None) == (header.encryption is None)
    document = header.to_json()
    ramheader.check(document)
    header_bytes, stored_state = strictjson.canonical(document), _pack_state(state)
    index = b"".join(_ENTRY.pack(c.page, c.pages, c.stored_size, c.offset, c.codec, _ZERO7, c.digest) for c in chunks)
    state_size = len(stored_state) + (0 if cipher is None else ramcrypt.TAG_SIZE)
    state_at = PREFIX_SIZE + len(header_bytes)
    index_at = state_at + state_size
    data_at = _align(index_at + len(index))
    data_size = chunks[-1].offset + chunks[-1].stored_size if chunks else 0
    fields = (
        MAGIC,
        VERSION,
        PREFIX_SIZE,
        header.memory,
        PAGE,
        chunk_pages,
        PREFIX_SIZE,
        len(header_bytes),
        state_at,
        state_size,
        index_at,
        len(chunks),
        data_at,
        data_size,
    )
    if cipher is not None:
        stored_state = cipher.encrypt_state(stored_state, _bound(_PREFIX.pack(*fields, b""), header_bytes, index))
    regions = header_bytes + stored_state + index
    prefix = _PREFIX.pack(*fields, hashlib.sha256(regions).digest())
    parse_prefix(prefix)
    return (prefix + regions).ljust(data_at, b"\0")


def _pack_state(state: bytes) -> bytes:
    import lz4.block

    # lz4's own size field is signed in some versions, so ours is written by ourselves
    return len(state).to_bytes(4, "little") + bytes(lz4.block.compress(state, store_size=False))


def _unpack_state(stored: bytes | memoryview, offset: int) -> bytes:
    if len(stored) < 5:
        raise _bad("device state is cut short", offset, "RAM-9")
    claimed = int.from_bytes(stored[:4], "little")
    if claimed > limits.RAM_STATE_MAX:
        raise _bad(f"device state claims {claimed} bytes; at most {limits.RAM_STATE_MAX} are allowed", offset, "RAM-9")
    return _exactly(_unpack_lz4(stored[4:], claimed), claimed, "device state", offset, "RAM-9")


def compress(
    pages: bytes | memoryview, compression: Compression = Compression.LZ4
) -> tuple[int, bytes | memoryview, bytes]:
    """One chunk's pages → (codec, stored bytes, digest). What can't be made smaller is stored as it is."""
    return *_smaller(pages, compression), hashlib.sha256(pages).digest()


def encrypt(
    page: int, pages: bytes | memoryview, compression: Compression, cipher: Cipher
) -> tuple[int, bytes | memoryview, bytes]:
    """As :func:`compress`, of the pages from number *page* on, encrypted."""
    codec, packed = _smaller(pages, compression)
    stored = cipher.encrypt_chunk(page, len(pages) // PAGE, codec, packed)
    return codec + ENCRYPTED, stored, hashlib.sha256(stored).digest()


def _smaller(pages: bytes | memoryview, compression: Compression) -> tuple[int, bytes | memoryview]:
    codec, packed = _PACKERS[compression](pages)
    return (codec, packed) if len(packed) < len(pages) else (CODEC_STORED, pages)


def _pack_lz4(pages: bytes | memoryview) -> tuple[int, bytes]:
    import lz4.block

    return CODEC_LZ4, bytes(lz4.block.compress(pages, store_size=False))


def _pack_zstd(pages: bytes | memoryview) -> tuple[int, bytes]:
    import zstandard

    return CODEC_ZSTD, zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(pages)


_PACKERS: Final = {Compression.LZ4: _pack_lz4, Compression.ZSTD: _pack_zstd}


def unpack_chunk(chunk: Chunk, stored: bytes | memoryview, data_offset: int, cipher: Cipher | None = None) -> bytes:
    """A chunk's pages, checked against their digest. *cipher* is that of the blob, where it is encrypted.

    Raises:
        SnapshotInvalid: damaged, or encrypted with another key.
    """
    check_stored(chunk, stored, data_offset)
    what, at = f"the chunk of page {chunk.page}", data_offset + chunk.offset
    codec, packed = chunk.codec, stored
    if chunk.encrypted:
        assert cipher is not None
        codec -= ENCRYPTED
        decrypted = cipher.decrypt_chunk(chunk.page, chunk.pages, codec, stored)
        if decrypted is None:
            raise _bad(f"{what} is not as it was encrypted", at, "RAM-63")
        packed = decrypted
    data = _exactly(_UNPACKERS[codec](packed, chunk.size), chunk.size, what, at, "RAM-16")
    if not chunk.encrypted:
        _check_digest(chunk, data, at)
    return data


def check_stored(chunk: Chunk, stored: bytes | memoryview, data_offset: int) -> None:
    """What can be checked of a chunk without unpacking it: the size of its stored bytes, and their digest where it is encrypted.

    Raises:
        SnapshotInvalid: damaged.
    """
    at = data_offset + chunk.offset
    if chunk.codec == CODEC_ZERO:
        raise Unsupported(f"RAM snapshot: the chunk of page {chunk.page} has no bytes; it is to be filled with zeroes")
    if len(stored) != chunk.stored_size:
        raise _bad(f"the chunk of page {chunk.page} is cut short", at, "RAM-16")
    if chunk.encrypted:
        _check_digest(chunk, stored, at)


def _check_digest(chunk: Chunk, data: bytes | memoryview, at: int) -> None:
    if hashlib.sha256(data).digest() != chunk.digest:
        raise _bad(f"the chunk of page {chunk.page} does not have its digest", at, "RAM-16")


def _exactly(found: bytes | str, size: int, what: str, offset: int, rule: str) -> bytes:
    # a string is the decompressor's complaint
    if isinstance(found, str):
        raise _bad(f"{what} cannot be unpacked: {found}", offset, rule)
    if len(found) != size:
        raise _bad(f"{what} unpacks to {len(found)} bytes, not {size}", offset, rule)
    return found


def _unpack_lz4(stored: bytes | memoryview, size: int) -> bytes | str:
    import lz4.block

    try:
        # the size is an upper bound here: what unpacks to less comes back shorter
        return bytes(lz4.block.decompress(stored, uncompressed_size=size))
    except (lz4.block.LZ4BlockError, ValueError) as exc:
        return str(exc)


def _unpack_zstd(stored: bytes | memoryview, size: int) -> bytes | str:
    import zstandard

    try:
        # The frame's own word on its size is what would be allocated, so it must be ours.
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != size or frame.dict_id:
            return "the frame does not say this size, or needs a dictionary"
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
        return reader.decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        return str(exc)


_UNPACKERS: Final = {CODEC_STORED: lambda stored, _: bytes(stored), CODEC_LZ4: _unpack_lz4, CODEC_ZSTD: _unpack_zstd}
