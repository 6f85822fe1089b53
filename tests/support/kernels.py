"""Files that look like kernels, and files that nearly do."""

from __future__ import annotations

import struct


def bzimage(*, version: int = 0x020F, loadflags: int = 1, size: int = 4096) -> bytes:
    """The setup header of a bzImage (``Documentation/arch/x86/boot.rst``), and nothing behind it."""
    data = bytearray(max(size, 0x268))
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x206, version)
    data[0x211] = loadflags
    return bytes(data[:size])


def note(name: bytes = b"Xen\0", kind: int = 18, content: bytes = b"\0\0\x10\0") -> bytes:
    """An ELF note."""

    def padded(data: bytes) -> bytes:
        return data.ljust(-(-len(data) // 4) * 4, b"\0")

    return struct.pack("<III", len(name), len(content), kind) + padded(name) + padded(content)


def elf(*, bits: int = 64, notes: bytes | None = None, kind: int = 2, machine: int = 62, segments: int = 1) -> bytes:
    """An ELF executable with *segments* loadable segments and, behind them, a segment of notes."""
    notes = note() if notes is None else notes
    count = segments + 1
    if bits == 64:
        table, entry, start = 64, 56, 64 + 56 * count
        head = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, table, 0, 0, 64, entry, count, 0, 0, 0)
        load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0)
        last = struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(notes), len(notes), 4)
    else:
        table, entry, start = 52, 32, 52 + 32 * count
        head = struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, 0, table, 0, 0, 52, entry, count, 0, 0, 0)
        load = struct.pack("<IIIIIIII", 1, 0, 0, 0, 0, 0, 5, 0)
        last = struct.pack("<IIIIIIII", 4, start, 0, 0, len(notes), len(notes), 4, 4)
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    return ident + head + load * segments + last + notes
