"""A disk of a few small files in its root, which Linux and Windows guests mount: ISO 9660, written by ourselves.

::

    sector 16  primary volume descriptor        sector 20, 22  path tables, big-endian
           17  the same for Joliet                     23, 24  root directories (ISO 9660, Joliet)
           18  end of the descriptors                  25 …    the files, each from a sector's start
       19, 21  path tables, little-endian

A sector has 2048 bytes. The names stand in the one directory as Rock Ridge has them (Linux looks there first), and in the
other as Joliet has them; below both there are names as old as the format. Sources: ECMA-119, the Rock Ridge Interchange
Protocol 1.10 with SUSP 1.10, and the Joliet specification of 1995. The same files give the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from ovms.errors import InputError
from ovms.lazy import regex
from ovms.spec import limits

SECTOR: Final = 2048
#: What the guest knows the disk by; cloud-init's NoCloud looks for it.
LABEL: Final = "cidata"
FILES_MAX: Final = 8
#: Bytes of one file.
FILE_MAX: Final = 4 * limits.MIB
#: Images have a multiple of this size, so that what the user wrote is not told by the size of the disk.
STEP: Final = 64 * limits.KIB

_NAME: Final = regex(r"[a-z0-9][a-z0-9-]{0,29}")
_PRIMARY, _JOLIET, _END = 16, 17, 18
_PATHS: Final = {_PRIMARY: (19, 20), _JOLIET: (21, 22)}
_ROOTS: Final = {_PRIMARY: 23, _JOLIET: 24}
_FIRST_FILE: Final = 25
#: 2000-01-01, in UTC: years from 1900, month, day, hour, minute, second, quarters of an hour from UTC.
_TIME: Final = bytes((100, 1, 1, 0, 0, 0, 0))
_NO_DATE: Final = b"0" * 16 + b"\0"
_UCS2_LEVEL_3: Final = b"%/E"
#: Root's alone in the guest, too: there may be passwords.
_DIRECTORY_MODE, _FILE_MODE = 0o040500, 0o100400


def image(files: Mapping[str, bytes]) -> bytes:
    """The image of a disk with *files* (name → content), all in the root.

    Raises:
        InputError: too many, too large, or a name that is none.
    """
    if not 1 <= len(files) <= FILES_MAX:
        raise InputError(f"a seed disk has 1 to {FILES_MAX} files, not {len(files)}")
    at, places = _FIRST_FILE, dict[str, tuple[int, int]]()
    for name, content in sorted(files.items()):
        if _NAME.fullmatch(name) is None:
            raise InputError(f"{name[:40]!a} is no name for a file of a seed disk")
        if len(content) > FILE_MAX:
            raise InputError(f"{name} has {len(content)} bytes; a file of a seed disk has at most {FILE_MAX}")
        places[name] = (at, len(content))
        at += -(-len(content) // SECTOR)
    size = -(-at * SECTOR // STEP) * STEP
    disk = bytearray(size)

    def put(sector: int, data: bytes) -> None:
        disk[sector * SECTOR : sector * SECTOR + len(data)] = data

    for kind in (_PRIMARY, _JOLIET):
        put(kind, _descriptor(kind, size // SECTOR))
        for sector, order in zip(_PATHS[kind], "<>", strict=True):
            put(sector, struct.pack(f"{order}BBIHBx", 1, 0, _ROOTS[kind], 1, 0))
        put(_ROOTS[kind], _directory(kind, places))
    put(_END, b"\xffCD001\1")
    for name, (sector, _) in places.items():
        put(sector, files[name])
    return bytes(disk)


def _both16(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _both32(value: int) -> bytes:
    return struct.pack("<I", value) + struct.pack(">I", value)


def _text(text: str, size: int, kind: int) -> bytes:
    if kind == _PRIMARY:
        return text.encode("ascii").ljust(size)
    encoded = text.encode("utf-16-be") + " ".encode("utf-16-be") * size
    return encoded[: size // 2 * 2].ljust(size, b"\0")


def _descriptor(kind: int, sectors: int) -> bytes:
    little, big = _PATHS[kind]
    parts = (
        b"\1" if kind == _PRIMARY else b"\2",
        b"CD001\1\0",
        _text("", 32, kind),
        _text(LABEL, 32, kind),
        bytes(8),
        _both32(sectors),
        (b"" if kind == _PRIMARY else _UCS2_LEVEL_3).ljust(32, b"\0"),
        _both16(1),  # volumes of the set
        _both16(1),  # of which this is the first
        _both16(SECTOR),
        _both32(10),  # bytes of a path table
        struct.pack("<II", little, 0),
        struct.pack(">II", big, 0),
        _record(_ROOTS[kind], SECTOR, b"\0", directory=True),
        *(_text("", 128, kind) for _ in range(4)),  # set, publisher, preparer, application
        *(_text("", 37, kind) for _ in range(3)),  # copyright, abstract, bibliography
        _NO_DATE * 4,
        b"\1\0",
    )
    return b"".join(parts)


def _directory(kind: int, places: Mapping[str, tuple[int, int]]) -> bytes:
    root, rock_ridge = _ROOTS[kind], kind == _PRIMARY
    itself = _protocol() + _mode(_DIRECTORY_MODE, 2) if rock_ridge else b""
    parent = _mode(_DIRECTORY_MODE, 2) if rock_ridge else b""
    records = [
        _record(root, SECTOR, b"\0", itself, directory=True),
        _record(root, SECTOR, b"\1", parent, directory=True),
    ]
    for number, (name, (sector, size)) in enumerate(sorted(places.items())):
        if rock_ridge:
            more = _mode(_FILE_MODE, 1) + _alternate_name(name)
            # upper case letters and digits alone, so that nothing asks what was meant by the name
            records.append(_record(sector, size, b"FILE%d.;1" % number, more))
        else:
            records.append(_record(sector, size, name.encode("utf-16-be")))
    directory = b"".join(records)
    assert len(directory) <= SECTOR, "FILES_MAX files with names of _NAME fit one sector"
    return directory.ljust(SECTOR, b"\0")


def _record(sector: int, size: int, name: bytes, more: bytes = b"", *, directory: bool = False) -> bytes:
    body = b"".join(
        (
            b"\0",  # no extended attributes
            _both32(sector),
            _both32(size),
            _TIME,
            b"\2" if directory else b"\0",
            bytes(2),  # not interleaved
            _both16(1),
            bytes((len(name),)),
            name,
            b"" if len(name) % 2 else b"\0",
            more,
            b"\0" if len(more) % 2 else b"",
        )
    )
    return bytes((len(body) + 1,)) + body


def _protocol() -> bytes:
    # SP: the protocol is in use; ER: and Rock Ridge is what uses it
    name = b"RRIP_1991A"
    return b"SP\7\1\xbe\xef\0" + b"ER" + bytes((8 + len(name), 1, len(name), 0, 0, 1)) + name


def _mode(mode: int, links: int) -> bytes:
    return b"PX\x24\1" + _both32(mode) + _both32(links) + _both32(0) + _both32(0)


def _alternate_name(name: str) -> bytes:
    return b"NM" + bytes((5 + len(name), 1, 0)) + name.encode("ascii")
