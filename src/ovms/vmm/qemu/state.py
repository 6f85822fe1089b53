"""Device state: what ``xen-save-devices-state`` writes, wrapped into a migration stream that ``-incoming`` loads.

QEMU's device sections do without the guest's RAM, which lies in a file that the new QEMU maps. A full stream also
needs a configuration section with the machine type, a RAM section (here without the guest's pages, but with the
firmware's, which a guest that reboots later starts from), and a description of the devices (empty).

Source: QEMU 7.2, ``migration/savevm.c`` and ``migration/ram.c``; the integers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from ovms.errors import VmmError

_HEADER: Final = b"QEVM\0\0\0\3"
_SECTION_START: Final = 1
_SECTION_END: Final = 3
_VMDESC: Final = 6
_CONFIGURATION: Final = 7
_FOOTER: Final = 0x7E

#: Of our choice: QEMU's own sections count from 0 too, but the device sections that follow are full ones, whose numbers
#: need not differ from a finished RAM section's.
_RAM_SECTION: Final = 2
_RAM_VERSION: Final = 4

_FLAG_ZERO: Final = 0x02
_FLAG_SIZES: Final = 0x04
_FLAG_PAGE: Final = 0x08
_FLAG_END: Final = 0x10
_FLAG_SAME_BLOCK: Final = 0x20

PAGE: Final = 4096
_ZERO_PAGE: Final = bytes(PAGE)

#: Where the PC's firmware lies at the end of the first 4 GiB; SeaBIOS has 256 KiB.
BIOS_ADDRESS: Final = 0xFFFC0000
BIOS_SIZE: Final = 0x40000
_OPTION_ROM_SIZE: Final = 0x20000


def wrap(devices: bytes, *, machine_type: str, ram_block: str, ram_size: int, bios: bytes) -> bytes:
    """The stream for ``-incoming``.

    Args:
        devices: what ``xen-save-devices-state`` wrote.
        machine_type: the versioned machine type.
        ram_block: the ID of the memory backend.
        ram_size: its size in bytes.
        bios: the firmware as it stands in the guest's memory at :data:`BIOS_ADDRESS`.

    Raises:
        VmmError: *devices* is of a form that we do not know.
    """
    if devices[:8] != _HEADER:
        raise VmmError(f"QEMU saved its device state in an unknown form (it begins with {devices[:8].hex()})")
    name = machine_type.encode("ascii")
    configuration = bytes([_CONFIGURATION]) + struct.pack(">I", len(name)) + name
    blocks = {"pc.bios": bios, "pc.rom": bytes(_OPTION_ROM_SIZE)}
    description = bytes([_VMDESC]) + struct.pack(">I", 2) + b"{}"
    return _HEADER + configuration + _ram_section(ram_block, ram_size, blocks) + devices[8:] + description


def _ram_section(main: str, main_size: int, blocks: Mapping[str, bytes]) -> bytes:
    sizes = {main: main_size, **{name: len(data) for name, data in blocks.items()}}
    footer = bytes([_FOOTER]) + struct.pack(">I", _RAM_SECTION)
    parts = [
        bytes([_SECTION_START]) + struct.pack(">I", _RAM_SECTION) + b"\x03ram" + struct.pack(">II", 0, _RAM_VERSION),
        struct.pack(">Q", sum(sizes.values()) | _FLAG_SIZES),
        *(_name(name) + struct.pack(">Q", size) for name, size in sizes.items()),
        struct.pack(">Q", _FLAG_END) + footer,
        bytes([_SECTION_END]) + struct.pack(">I", _RAM_SECTION),
        *(_pages(name, data) for name, data in blocks.items()),
        struct.pack(">Q", _FLAG_END) + footer,
    ]
    return b"".join(parts)


def _name(name: str) -> bytes:
    raw = name.encode("ascii")
    return bytes([len(raw)]) + raw


def _pages(name: str, data: bytes) -> bytes:
    out = bytearray()
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        zero = page == _ZERO_PAGE
        flags = (_FLAG_ZERO if zero else _FLAG_PAGE) | (_FLAG_SAME_BLOCK if at else 0)
        out += struct.pack(">Q", at | flags)
        if not at:
            out += _name(name)
        out += b"\0" if zero else page
    return bytes(out)
