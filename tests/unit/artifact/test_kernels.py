"""Is this a kernel?"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import bzimage, elf, note

from ovms.artifact.kernels import KernelKind, check_kernel
from ovms.errors import KernelInvalid
from ovms.spec import limits


@contextmanager
def opened(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("kernel")
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


def check(data: bytes) -> KernelKind:
    with opened(data) as fd:
        return check_kernel(fd)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (bzimage(), KernelKind.BZIMAGE),
        (bzimage(version=0x0200), KernelKind.BZIMAGE),
        (b"MZ" + bzimage()[2:], KernelKind.BZIMAGE),  # with an EFI stub, as distributions ship it
        (elf(), KernelKind.ELF_PVH),
        (elf(bits=32, machine=3), KernelKind.ELF_PVH),
        (elf(kind=3), KernelKind.ELF_PVH),
        (elf(segments=5), KernelKind.ELF_PVH),
        (elf(notes=note(b"GNU\0", 3, b"x" * 20) + note(b"Linux\0", 257) + note()), KernelKind.ELF_PVH),
    ],
)
def test_kernels(data: bytes, kind: KernelKind) -> None:
    assert check(data) is kind


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "neither a bzImage nor an ELF kernel"),
        (b"#!/bin/sh\n", "begins with 23212f62696e2f73"),
        (b"\x1f\x8b\x08" + bytes(1000), "neither"),
        (bytes(4096), "neither"),
        (bzimage(loadflags=0), "before bzImage"),
        (bzimage(version=0x01FF), "before bzImage"),
        (b"\x7fELF", "damaged"),
        (elf()[:63], "damaged"),
        (elf()[:4] + b"\x03" + elf()[5:], "damaged"),
        (elf()[:5] + b"\x02" + elf()[6:], "big-endian"),
        (elf(machine=183), "no x86 executable"),
        (elf(kind=1), "no x86 executable"),
        (elf(kind=4), "no x86 executable"),
        (elf(notes=b""), "without a PVH entry note"),
        (elf(notes=note(b"GNU\0")), "without a PVH entry note"),
        (elf(notes=note(b"Xen\0", 6)), "without a PVH entry note"),
        (elf(notes=note()[:11]), "without a PVH entry note"),
        (elf(segments=70), "program headers are damaged"),
        (elf()[:54] + b"\x20\0" + elf()[56:], "program headers are damaged"),
        (elf()[:56] + b"\0\0" + elf()[58:], "program headers are damaged"),
        (elf()[:100], "program headers are cut short"),
        (elf()[:32] + struct.pack("<Q", 2**63) + elf()[40:], "program headers are cut short"),
        (elf()[:32] + struct.pack("<Q", 2**62 - 1) + elf()[40:], "program headers are cut short"),
    ],
)
def test_no_kernels(data: bytes, words: str) -> None:
    with pytest.raises(KernelInvalid, match=words) as info:
        check(data)
    assert info.value.message.startswith("the kernel")


@pytest.mark.parametrize("size", range(0x1FD, 0x216))
def test_a_bzimage_cut_within_its_header(size: int) -> None:
    with pytest.raises(KernelInvalid):
        check(bzimage(size=size))


def test_a_note_segment_beyond_everything() -> None:
    data = bytearray(elf(segments=0))
    for offset, length in ((2**64 - 1, 4096), (2**62 - 1, 2**64 - 1), (0, 2**64 - 1)):
        struct.pack_into("<Q", data, 64 + 8, offset)
        struct.pack_into("<Q", data, 64 + 32, length)
        with pytest.raises(KernelInvalid):
            check(bytes(data))


def test_hostile_notes_take_no_time() -> None:
    # 64 segments that all hold the same 64 KiB of empty notes
    notes = struct.pack("<III", 0, 0, 0) * (limits.ELF_NOTES_MAX // 12)
    data = bytearray(elf(notes=notes, segments=63))
    last = bytes(data[64 + 56 * 63 : 64 + 56 * 64])
    data[64 : 64 + 56 * 63] = last * 63
    with pytest.raises(KernelInvalid, match="without a PVH"):
        check(bytes(data))


@pytest.mark.spec("BIN-1", "LIM-1")
def test_the_limits_of_an_elf_kernel() -> None:
    filler = note(b"GNU\0", 3, bytes(limits.ELF_NOTES_MAX - len(note()) - 16))
    assert check(elf(notes=filler + note())) is KernelKind.ELF_PVH
    with pytest.raises(KernelInvalid, match="bytes of ELF notes"):
        check(elf(notes=filler + note(b"GNU\0", 3, b"") + note()))
    assert check(elf(segments=limits.ELF_HEADERS_MAX - 1)) is KernelKind.ELF_PVH
    with pytest.raises(KernelInvalid, match="program headers are damaged"):
        check(elf(segments=limits.ELF_HEADERS_MAX))


@pytest.mark.spec("BIN-1")
@pytest.mark.parametrize("owner", [b"Xenx", b"Xen", b"Xen\0\0", b"XEN\0", b""])
def test_a_note_of_another_owner(owner: bytes) -> None:
    with pytest.raises(KernelInvalid, match="without a PVH"):
        check(elf(notes=note(owner)))


@given(st.binary(max_size=80), st.sampled_from([b"", elf()[:64], elf(bits=32, machine=3)[:52], bzimage()[:0x202]]))
def test_any_bytes(data: bytes, start: bytes) -> None:
    try:
        check(start + data)
    except KernelInvalid:
        pass


@given(
    st.sampled_from([elf(), elf(bits=32, machine=3), elf(segments=3), bzimage()]),
    st.lists(st.tuples(st.integers(0, 250) | st.integers(0x1F0, 0x268), st.integers(0, 255)), max_size=6),
    st.none() | st.integers(0, 0x268),
)
def test_mutated_kernels(data: bytes, changes: list[tuple[int, int]], cut: int | None) -> None:
    mutated = bytearray(data)
    for at, value in changes:
        if at < len(mutated):
            mutated[at] = value
    try:
        check(bytes(mutated[:cut]))
    except KernelInvalid:
        pass
