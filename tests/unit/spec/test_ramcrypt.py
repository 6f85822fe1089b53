"""Encrypted RAM snapshots: round trips, and that nothing of one can be changed."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ram

from ovms.errors import JsonInvalid, SnapshotInvalid
from ovms.spec import limits, ramcrypt, ramsnap
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Encryption
from ovms.spec.ramsnap import PAGE

KEY = hashlib.sha256(b"key").digest()
HEADER = ram.header(encryption=Encryption(("age1" + "q" * 58,), b"wrapped"))
DIFF = ram.header(encryption=HEADER.encryption, parent=ram.DIGEST)
NOISE = hashlib.shake_128(b"noise").digest(PAGE)
PAGES = {0: b"A" * PAGE, 3: NOISE + b"B" * PAGE, 7: b"C" * PAGE}


def encrypted(pages: dict[int, bytes] | None = None, compression: Compression = Compression.LZ4) -> bytes:
    return ram.blob(
        PAGES if pages is None else pages, DIFF, state=b"state" * 9, compression=compression, cipher=Cipher(KEY)
    )


def read(blob: bytes, key: bytes = KEY) -> tuple[bytes, dict[int, bytes]]:
    """(device state, page → its content; nothing for zero), as a restore reads it."""
    control = ramsnap.parse_control(blob)
    if control.prefix.blob_size != len(blob):
        raise SnapshotInvalid("another size", rule="RAM-1")
    cipher = Cipher(key)
    state = ramsnap.decrypt_state(control, cipher)
    found = {}
    for chunk in control.chunks:
        at = control.prefix.data_offset + chunk.offset
        stored = blob[at : at + chunk.stored_size]
        found[chunk.page] = ramsnap.unpack_chunk(chunk, stored, at, cipher) if chunk.stored_size else b""
    return state, found


def resealed(blob: bytes) -> bytes:
    """With the right digest of the control part: whoever changes it can do that."""
    index, entries = struct.unpack_from("<QQ", blob, 64)
    end = min(index + entries * 64, len(blob))
    return blob[:96] + hashlib.sha256(blob[128:end]).digest() + blob[128:]


@pytest.mark.spec("RAM-61", "RAM-62", "RAM-63")
@given(
    st.dictionaries(
        st.integers(0, 20).map(lambda n: 2 * n),
        st.sampled_from([b"", b"A" * PAGE, NOISE, NOISE[::-1], b"B" * PAGE + NOISE]),
    ),
    st.sampled_from(Compression),
)
def test_what_is_encrypted_is_read_again(pages: dict[int, bytes], compression: Compression) -> None:
    blob = encrypted(pages, compression)
    assert read(blob) == (b"state" * 9, pages)
    ramsnap.check_codecs(ramsnap.parse_control(blob), compression)
    for content in pages.values():
        assert not content or content[:64] not in blob
    assert b"state" * 2 not in blob


BLOB = encrypted({**PAGES, 9: b""})
CONTROL = ramsnap.parse_control(BLOB)


@pytest.mark.spec("RAM-62", "RAM-63")
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_every_changed_byte_is_noticed(at: int, flipped: int) -> None:
    changed = bytearray(BLOB)
    changed[at] ^= flipped
    with pytest.raises((SnapshotInvalid, JsonInvalid)):
        read(bytes(changed) if 96 <= at < 128 else resealed(bytes(changed)))


@pytest.mark.spec("RAM-62")
def test_each_byte_of_the_control_part_is_vouched_for() -> None:
    prefix = CONTROL.prefix
    for at in range(128, prefix.index_end, 3):
        changed = bytearray(BLOB)
        changed[at] ^= 0x20  # also what turns letters of JSON into others
        with pytest.raises((SnapshotInvalid, JsonInvalid)):
            read(resealed(bytes(changed)))


@pytest.mark.spec("RAM-62")
def test_no_chunk_comes_from_another_snapshot() -> None:
    other = ram.blob(PAGES, DIFF, cipher=Cipher(bytes(32)))
    theirs, ours = ramsnap.parse_control(other).chunks[0], CONTROL.chunks[0]
    assert theirs.stored_size == ours.stored_size
    at = CONTROL.prefix.data_offset
    their_bytes = other[ramsnap.parse_control(other).prefix.data_offset :][: theirs.stored_size]
    entry = CONTROL.prefix.index_offset + 32
    changed = BLOB[:entry] + theirs.digest + BLOB[entry + 32 : at] + their_bytes + BLOB[at + ours.stored_size :]
    with pytest.raises(SnapshotInvalid) as info:
        read(resealed(changed))
    assert info.value.context["rule"] == "RAM-62"
    # nor with the digest that it had
    with pytest.raises(SnapshotInvalid) as info:
        read(BLOB[:at] + their_bytes + BLOB[at + ours.stored_size :])
    assert info.value.context["rule"] == "RAM-16"
    with pytest.raises(SnapshotInvalid) as info:
        ramsnap.unpack_chunk(theirs, their_bytes, 0, Cipher(KEY))
    assert info.value.context["rule"] == "RAM-63"


@pytest.mark.spec("RAM-62")
def test_another_key_reads_nothing() -> None:
    with pytest.raises(SnapshotInvalid) as info:
        read(BLOB, bytes(32))
    assert info.value.context["rule"] == "RAM-62"


def test_incompressible_memory_may_be_full() -> None:
    noise = hashlib.shake_128(b"full").digest(limits.RAM_MIN)
    pages = {at // PAGE: noise[at : at + 2 * PAGE] for at in range(0, limits.RAM_MIN, 2 * PAGE)}
    blob = ram.blob(pages, HEADER, cipher=Cipher(KEY))
    assert ramsnap.parse_prefix(blob).data_size == limits.RAM_MIN + len(pages) * ramcrypt.TAG_SIZE
    assert read(blob)[1] == pages


def test_what_a_reader_without_a_key_sees() -> None:
    assert CONTROL.state == b""
    assert CONTROL.header == DIFF
    for chunk in CONTROL.chunks:
        if chunk.stored_size:
            at = CONTROL.prefix.data_offset + chunk.offset
            stored = BLOB[at : at + chunk.stored_size]
            ramsnap.check_stored(chunk, stored, 0)
            with pytest.raises(SnapshotInvalid):
                ramsnap.check_stored(chunk, stored[:-1], 0)
            with pytest.raises(SnapshotInvalid):
                ramsnap.check_stored(chunk, stored[:-1] + bytes([stored[-1] ^ 1]), 0)


@pytest.mark.spec("RAM-61")
def test_a_header_and_its_chunks_agree() -> None:
    entry = CONTROL.prefix.index_offset + 24
    for codec, rule in ((1, "RAM-61"), (19, "RAM-15"), (32, "RAM-15")):
        changed = BLOB[:entry] + bytes([codec]) + BLOB[entry + 1 :]
        with pytest.raises(SnapshotInvalid) as info:
            ramsnap.parse_control(resealed(changed))
        assert info.value.context["rule"] == rule


def test_the_size_of_a_tag_counts() -> None:
    chunk = ramsnap.parse_control(encrypted({0: NOISE})).chunks[0]
    assert chunk.stored_size == PAGE + ramcrypt.TAG_SIZE
    blob = encrypted({0: b"A" * PAGE})
    at = ramsnap.parse_control(blob).prefix.index_offset + 12
    for size in (ramcrypt.TAG_SIZE, PAGE + ramcrypt.TAG_SIZE + 1):
        changed = bytearray(blob)
        struct.pack_into("<I", changed, at, size)
        with pytest.raises(SnapshotInvalid) as info:
            ramsnap.parse_control(resealed(bytes(changed)))
        assert info.value.context["rule"] == "RAM-13"
