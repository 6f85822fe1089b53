"""Can this kernel give a clone random numbers of its own? Found out from its image, which may be hostile.

After a restore the VMM changes the VM generation ID (RAM-37). Linux has the device's driver since 5.18 (``CONFIG_VMGENID``), and
then reseeds its random number generator. The part of that in ``drivers/char/random.c`` is compiled in wherever there is a driver,
as a module, too, and has a message that stands in the kernel as it is. So a kernel without the message cannot reseed; one with it
can where the driver is in it, and else if somebody loads the module.

Sources: ``Documentation/arch/x86/boot.rst`` (where the payload of a bzImage is), ``scripts/Makefile.lib`` (how it is compressed).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, cast

from ovms.spec import limits

#: What is found out holds as long as this is the same.
STAMP: Final = "1"
#: What the kernel says when it has reseeded.
_RESEEDED: Final = b"crng reseeded due to virtual machine fork"
#: The ACPI ID in the driver.
_DRIVER: Final = b"VMGENCTR"
#: What tells that it is Linux, with the strings of its random number generator in it.
_LINUX: Final = (b"Linux version ", b"crng init done")
_WANTED: Final = (_RESEEDED, _DRIVER, *_LINUX)
_OVERLAP: Final = max(map(len, _WANTED)) - 1

#: Bytes of an unpacked kernel that are looked at; that of a distribution has 70 MB.
UNPACKED_MAX: Final = 512 * limits.MIB
#: What a decompressor may take for itself. A kernel is packed with windows of 32 MiB (xz) and up to 128 MiB (zstd).
_WINDOW_MAX: Final = 128 * limits.MIB
_INPUT: Final = 64 * limits.KIB
_OUTPUT: Final = 1 * limits.MIB
#: The size of a block in lz4's legacy format, unpacked.
_LZ4_BLOCK: Final = 8 * limits.MIB
_LZ4_MAGIC: Final = b"\x02\x21\x4c\x18"


class _UnreadableError(Exception):
    """Not of the format that it seemed to be, or more than the limits."""


def reseeds(fd: int) -> bool | None:
    """Whether the kernel in the open file reseeds when it finds itself in a clone; None where that can't be told."""
    found: set[bytes] = set()
    try:
        for piece in _overlapping(_unpacked(fd)):
            found.update(word for word in _WANTED if word in piece)
            if len(found) == len(_WANTED):
                return True
    except (_UnreadableError, OSError):
        return None
    if _RESEEDED in found or not found.issuperset(_LINUX):
        return None
    return False


def _overlapping(pieces: Iterator[bytes]) -> Iterator[bytes]:
    # what is looked for may lie across two pieces
    before, seen = b"", 0
    for piece in pieces:
        seen += len(piece)
        if seen > UNPACKED_MAX:
            raise _UnreadableError
        yield before + piece
        before = (before + piece)[-_OVERLAP:]


def _unpacked(fd: int) -> Iterator[bytes]:
    head = os.pread(fd, 0x264, 0)
    if head[:4] == b"\x7fELF":
        yield from _read(fd, 0, os.fstat(fd).st_size)
        return
    if len(head) < 0x264 or head[0x202:0x206] != b"HdrS" or int.from_bytes(head[0x206:0x208], "little") < 0x0208:
        raise _UnreadableError
    offset, length = struct.unpack_from("<II", head, 0x248)
    # 0 sectors of setup stand for 4
    start = ((head[0x1F1] or 4) + 1) * 512 + offset
    if start + length > os.fstat(fd).st_size:
        raise _UnreadableError
    magic = os.pread(fd, 6, start)
    for beginning, unpack in _FORMATS.items():
        if magic.startswith(beginning):
            # the packed kernel ends with the size of the unpacked one, which zstd would take for another frame
            whole = int.from_bytes(os.pread(fd, 4, start + length - 4), "little")
            size = 0
            for piece in unpack(_read(fd, start, length - 4 if unpack is _zstd else length)):
                size += len(piece)
                yield piece
            if size & 0xFFFFFFFF != whole:  # what is not there may have been in the rest
                raise _UnreadableError
            return
    raise _UnreadableError


def _read(fd: int, start: int, length: int) -> Iterator[bytes]:
    at, end = start, start + length
    while at < end:
        data = os.pread(fd, min(_INPUT, end - at), at)
        if not data:
            raise _UnreadableError
        yield data
        at += len(data)


def _gzip(packed: Iterator[bytes]) -> Iterator[bytes]:
    import zlib

    unpacker = zlib.decompressobj(31)
    try:
        for data in packed:
            left = data
            while left and not unpacker.eof:
                yield unpacker.decompress(left, _OUTPUT)
                left = unpacker.unconsumed_tail
        yield unpacker.flush(_OUTPUT)
    except zlib.error as exc:
        raise _UnreadableError from exc


def _xz(packed: Iterator[bytes]) -> Iterator[bytes]:
    import lzma

    unpacker = lzma.LZMADecompressor(memlimit=_WINDOW_MAX + 16 * limits.MIB)
    try:
        for data in packed:
            if unpacker.eof:  # the size of the kernel stands behind it
                return
            yield unpacker.decompress(data, _OUTPUT)
            while not unpacker.needs_input and not unpacker.eof:
                yield unpacker.decompress(b"", _OUTPUT)
    except lzma.LZMAError as exc:
        raise _UnreadableError from exc


def _zstd(packed: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    source = cast("BinaryIO", _Source(packed))  # of a file, the reader calls read alone
    try:
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX).stream_reader(source) as reader:
            while data := reader.read(_OUTPUT):
                yield data
    except (zstandard.ZstdError, MemoryError) as exc:
        raise _UnreadableError from exc


class _Source:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        if not self._left:
            self._left = next(self._pieces, b"")
        data = self._left if size < 0 else self._left[:size]
        self._left = self._left[len(data) :]
        return data


def _lz4(packed: Iterator[bytes]) -> Iterator[bytes]:
    import lz4.block

    source = _Source(packed)

    def take(count: int) -> bytes:
        data = bytearray()
        while len(data) < count and (more := source.read(count - len(data))):
            data += more
        return bytes(data)

    take(4)
    while len(head := take(4)) == 4:
        if head == _LZ4_MAGIC:  # another stream begins
            continue
        size = int.from_bytes(head, "little")
        if size > _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16:
            return  # no block any more: the size of the kernel stands behind the last one
        block = take(size)
        if len(block) < size:
            return
        try:
            yield bytes(lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK))
        except (lz4.block.LZ4BlockError, ValueError) as exc:
            raise _UnreadableError from exc


_FORMATS: Final[dict[bytes, Callable[[Iterator[bytes]], Iterator[bytes]]]] = {
    b"\x1f\x8b": _gzip,
    b"\xfd7zXZ\0": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
    _LZ4_MAGIC: _lz4,
}
