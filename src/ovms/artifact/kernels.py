"""Is this a kernel? Header checks before a file becomes an artifact, and again before a VMM sees it.

Sources: ``Documentation/arch/x86/boot.rst`` of Linux (bzImage), the ELF specification, and Xen's PVH note that QEMU
needs to start an ELF image directly.
"""

from __future__ import annotations

import os
import struct
from enum import StrEnum
from typing import Final

from ovms.errors import KernelInvalid
from ovms.spec import limits

#: The end of the bzImage setup header; no kernel is shorter.
SETUP_SIZE: Final = 0x264
NOTE_PVH_ENTRY: Final = 18
NOTE_OWNER: Final = b"Xen\0"


class KernelKind(StrEnum):
    """How a VMM starts it."""

    BZIMAGE = "bzimage"
    ELF_PVH = "elf-pvh"


def check_kernel(fd: int, what: str = "the kernel") -> KernelKind:
    """What kind of kernel the open file is.

    Raises:
        KernelInvalid: none that x86-64 boots.
    """
    head = os.pread(fd, SETUP_SIZE, 0)
    if head[:4] == b"\x7fELF":
        return _check_elf(fd, head, what)
    if len(head) == SETUP_SIZE and head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS":
        version = int.from_bytes(head[0x206:0x208], "little")
        if version < 0x0200 or not head[0x211] & 1:
            raise KernelInvalid(f"{what} is a Linux kernel of a format before bzImage", rule="BIN-1")
        return KernelKind.BZIMAGE
    raise KernelInvalid(
        f"{what} is neither a bzImage nor an ELF kernel (it begins with {head[:8].hex()})",
        rule="BIN-1",
        hint="give the vmlinuz of a distribution, or an ELF vmlinux built with CONFIG_PVH",
    )


def _check_elf(fd: int, head: bytes, what: str) -> KernelKind:
    hint = "an ELF kernel must be x86-64 (or i386) and carry a PVH entry note (CONFIG_PVH)"
    if len(head) < 64 or head[4] not in (1, 2) or head[5] != 1:
        raise KernelInvalid(f"{what} is a damaged or big-endian ELF file", hint=hint, rule="BIN-1")
    wide = head[4] == 2
    kind, machine = struct.unpack_from("<HH", head, 16)
    if kind not in (2, 3) or machine not in (3, 62):
        raise KernelInvalid(f"{what} is an ELF file, but no x86 executable", hint=hint, rule="BIN-1")
    table, size, count = struct.unpack_from("<Q14xHH", head, 32) if wide else struct.unpack_from("<I10xHH", head, 28)
    if size != (56 if wide else 32) or not 0 < count <= limits.ELF_HEADERS_MAX:
        raise KernelInvalid(f"{what}: the ELF program headers are damaged", hint=hint, rule="BIN-1")
    for i in range(count):
        entry = os.pread(fd, size, table + i * size) if table < 2**62 else b""
        if len(entry) < size:
            raise KernelInvalid(f"{what}: the ELF program headers are cut short", hint=hint, rule="BIN-1")
        if struct.unpack_from("<I", entry)[0] != 4:  # PT_NOTE
            continue
        offset, length = (
            (struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0])
            if wide
            else (struct.unpack_from("<I", entry, 4)[0], struct.unpack_from("<I", entry, 16)[0])
        )
        if length > limits.ELF_NOTES_MAX:
            raise KernelInvalid(f"{what} has {length} bytes of ELF notes", hint=hint, rule="BIN-1")
        if offset < 2**62 and _has_pvh_note(os.pread(fd, length, offset)):
            return KernelKind.ELF_PVH
    raise KernelInvalid(f"{what} is an ELF file without a PVH entry note", hint=hint, rule="BIN-1")


def _has_pvh_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, desc_size, kind = struct.unpack_from("<III", notes, at)
        if kind == NOTE_PVH_ENTRY and notes[at + 12 : at + 12 + name_size] == NOTE_OWNER:
            return True
        at += 12 + -(-name_size // 4) * 4 + -(-desc_size // 4) * 4
    return False
