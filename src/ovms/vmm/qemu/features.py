"""What this QEMU was built with, of what our command lines name: distributions leave devices out, or pack them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ovms import process
from ovms.lazy import dataclass

_TIMEOUT: Final = 20.0


@dataclass(frozen=True)
class Lacking:
    """Something that this QEMU was built without: what it is called, what it is for, and whether no VM runs without it."""

    name: str
    purpose: str
    needed: bool


#: Option → name → what for; the first tables are those without which no VM of ours starts.
_NEEDED: Final[Mapping[str, Mapping[str, str]]] = {
    "-device": {
        "virtio-blk-pci": "disks",
        "virtio-net-pci": "networks",
        "virtio-rng-pci": "random numbers",
        "vmgenid": "telling clones apart",
    },
    "-object": {
        "memory-backend-memfd": "the guest's memory",
        "memory-backend-file": "restores",
        "rng-builtin": "random numbers",
    },
    "-netdev": {"user": "the network inside QEMU"},
}
_WANTED: Final[Mapping[str, Mapping[str, str]]] = {
    "-device": {
        "ivshmem-plain": "shared memory (ovm inject)",
        "virtio-serial-pci": "the guest's agent",
        "pvpanic": "hearing of a guest's panic",
        "virtio-9p-pci": "shared directories by 9p",
        "vhost-user-fs-pci": "shared directories by virtiofs",
    },
    "-netdev": {"stream": "networks outside QEMU (passt)"},
}


def lacking(path: Path) -> list[Lacking]:
    """What the QEMU at *path* lacks of what we use.

    Raises:
        HostError: it does not answer.
    """
    found: list[Lacking] = []
    for option in _NEEDED:
        # several of these lists need a machine to be named, and this one has nothing
        said = process.run([path, "-machine", "none", option, "help"], timeout=_TIMEOUT).stdout
        words = set(re.findall(r"[\w-]+", said.decode("utf-8", "replace")))
        for needed, table in ((True, _NEEDED), (False, _WANTED)):
            entries = table.get(option, {}).items()
            found += [Lacking(name, purpose, needed) for name, purpose in entries if name not in words]
    return found
