"""The migration stream around QEMU's device state, read back the way QEMU does it."""

from __future__ import annotations

import struct

import pytest

from ovms.errors import VmmError
from ovms.vmm.qemu import state

DEVICES = b"QEVM\0\0\0\3" + b"\x04sections\0"
BIOS = bytes(4096) + b"B" * 4096 + bytes(4096) + b"C" * 4096


def wrapped() -> bytes:
    return state.wrap(DEVICES, machine_type="pc-i440fx-7.2", ram_block="mem0", ram_size=1 << 28, bios=BIOS)


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        assert len(piece) == count
        self.at += count
        return piece

    def number(self, form: str) -> int:
        return int(struct.unpack(">" + form, self.take(struct.calcsize(">" + form)))[0])

    def text(self) -> str:
        return self.take(self.number("B")).decode()


def test_qemu_would_read_it() -> None:
    stream = Reader(wrapped())
    assert stream.take(8) == b"QEVM\0\0\0\3"
    assert stream.number("B") == 7
    assert stream.take(stream.number("I")) == b"pc-i440fx-7.2"
    assert (stream.number("B"), stream.number("I"), stream.text()) == (1, 2, "ram")
    assert (stream.number("I"), stream.number("I")) == (0, 4)
    total = stream.number("Q")
    assert total & 4
    blocks: dict[str, int] = {}
    while sum(blocks.values()) < total & ~0xFFF:
        name = stream.text()
        blocks[name] = stream.number("Q")
    assert blocks == {"mem0": 1 << 28, "pc.bios": len(BIOS), "pc.rom": 0x20000}
    assert (stream.number("Q"), stream.number("B"), stream.number("I")) == (0x10, 0x7E, 2)
    assert (stream.number("B"), stream.number("I")) == (3, 2)
    memory = read_pages(stream)
    assert memory == {"pc.bios": BIOS, "pc.rom": bytes(0x20000)}
    assert (stream.number("B"), stream.number("I")) == (0x7E, 2)
    assert stream.take(len(DEVICES) - 8) == DEVICES[8:]
    assert stream.take(7) == b"\x06\0\0\0\x02{}"
    assert stream.at == len(stream.data)


def read_pages(stream: Reader) -> dict[str, bytes]:
    memory: dict[str, bytes] = {}
    name = ""
    while True:
        word = stream.number("Q")
        flags, address = word & 0xFFF, word & ~0xFFF
        if flags & 0x10:
            return memory
        if not flags & 0x20:
            name = stream.text()
            memory[name] = b""
        assert address == len(memory[name])
        memory[name] += stream.take(1) * 4096 if flags & 2 else stream.take(4096)


@pytest.mark.parametrize("devices", [b"", b"QEVM\0\0\0\4rest", b"ELF"])
def test_an_unknown_form_is_refused(devices: bytes) -> None:
    with pytest.raises(VmmError, match="unknown form"):
        state.wrap(devices, machine_type="pc", ram_block="mem0", ram_size=4096, bios=b"")
