"""Chains with encrypted members are unpacked whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator

import pytest
from support import ram

from ovms.errors import IdentityMissing, ResourceError, SnapshotInvalid, Unsupported
from ovms.memory import snapshot
from ovms.oci.layout import Layout
from ovms.spec import limits, ramsnap
from ovms.spec.digest import Digest
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Encryption, Header

PAGE = ramsnap.PAGE
ENCRYPTION = Encryption(("age1" + "q" * 58,), b"wrapped")
OTHER = Encryption(("age1" + "p" * 58,), b"wrapped")
KEYS = {ENCRYPTION: Cipher(bytes(32)), OTHER: Cipher(b"other" + bytes(27))}
BASE = {0: b"a" * PAGE, 4: b"b" * PAGE, 8: b"c" * PAGE}
DIFF = {4: b"d" * PAGE, 8: b""}


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    yield fd
    os.close(fd)


def decrypt(header: Header) -> Cipher:
    assert header.encryption is not None
    return KEYS[header.encryption]


def add(layout: Layout, pages: dict[int, bytes], encryption: Encryption | None, parent: Digest | None = None) -> Digest:
    header = ram.header(encryption=encryption, parent=parent)
    cipher = None if encryption is None else KEYS[encryption]
    return layout.add_bytes(ram.blob(pages, header, cipher=cipher))


@pytest.mark.spec("RAM-43", "RAM-61")
@pytest.mark.parametrize("first", [None, ENCRYPTION])
@pytest.mark.parametrize("second", [None, OTHER])
def test_each_member_has_a_key_of_its_own_or_none(
    layout: Layout, memory: int, first: Encryption | None, second: Encryption | None
) -> None:
    digest = add(layout, DIFF, second, add(layout, BASE, first))
    snapshot.unpack(layout, digest, memory, compression=Compression.LZ4, decrypt=decrypt)
    pages = {number: os.pread(memory, PAGE, number * PAGE) for number in (0, 4, 8, 9)}
    assert pages == {0: BASE[0], 4: DIFF[4], 8: bytes(PAGE), 9: bytes(PAGE)}
    assert os.fstat(memory).st_size == limits.RAM_MIN
    if first is not None or second is not None:
        with pytest.raises(Unsupported):
            snapshot.unpack(layout, digest, memory)


@pytest.mark.spec("RAM-62")
def test_a_parent_whose_index_was_changed(layout: Layout, memory: int) -> None:
    """Its last entry is for a page more: nothing that a chunk's own tag would notice before."""
    whole = bytearray(ram.blob(BASE, ram.header(encryption=ENCRYPTION), cipher=KEYS[ENCRYPTION]))
    prefix = ramsnap.parse_prefix(bytes(whole))
    whole[prefix.index_end - 64 : prefix.index_end - 56] = struct.pack("<Q", 9)
    whole[96:128] = hashlib.sha256(whole[128 : prefix.index_end]).digest()
    digest = add(layout, {8: b"e" * PAGE, 9: b"f" * PAGE}, OTHER, layout.add_bytes(bytes(whole)))
    with pytest.raises(SnapshotInvalid, match="in the parent") as info:
        snapshot.unpack(layout, digest, memory, decrypt=decrypt)
    assert info.value.context["rule"] == "RAM-62"


@pytest.mark.spec("RAM-60")
def test_a_parent_that_nobody_here_can_read(layout: Layout, memory: int) -> None:
    def ours(header: Header) -> Cipher:
        if header.encryption == ENCRYPTION:
            raise IdentityMissing("it is for others")
        return decrypt(header)

    digest = add(layout, DIFF, OTHER, add(layout, BASE, ENCRYPTION))
    with pytest.raises(IdentityMissing):
        snapshot.unpack(layout, digest, memory, decrypt=ours)
    assert os.fstat(memory).st_blocks == 0


def test_too_little_memory_is_told_before(layout: Layout, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = add(layout, BASE, ENCRYPTION)
    monkeypatch.setattr("ovms.process.memory_available", lambda: 2 * PAGE)
    with pytest.raises(ResourceError, match="too little memory"):
        snapshot.unpack(layout, digest, memory, decrypt=decrypt)
    assert os.fstat(memory).st_blocks == 0
