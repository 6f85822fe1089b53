"""What this QEMU was built with, of what our command lines name; and what its version changes in them.

Read for the versions: the sources of 7.2 and, from there to 11.0, ``docs/about/removed-features.rst``, ``deprecated.rst`` and the
QAPI documentation. 7.2 is what the tests run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from ovms import process

#: The oldest that is known to work: the first with ``-netdev stream``.
OLDEST: Final = (7, 2)
_TIMEOUT: Final = 20.0


class Since(Enum):
    """What we say otherwise from a version on.

    What changed as well, and asks nothing of us: the machine types of a version are deprecated three years after it and removed
    three later (pc-i440fx-2.3 and before went in 9.1 and 10.0), so a snapshot can be restored for six years (RAM-32 tells);
    ``-smp`` refuses parameters that a machine does not have, even as 1 (deprecated in 9.0: ours are sockets, cores and threads);
    ``-no-acpi``, ``-no-hpet``, ``-chroot`` and ``-runas`` are gone (we give none); ``reconnect`` of sockets became ``reconnect-ms``
    in 9.2 (ours do not reconnect).
    """

    #: ``readonly=on,rom=off`` of a memory-backend-file: the template is opened to read only, and mapped privately.
    PRIVATE_OF_READONLY = (8, 2)
    #: ``-incoming fd:`` takes no plain files any more (deprecated in 9.1): ``file:`` with a set of descriptors does.
    INCOMING_FILE = (11, 0)

    def in_version(self, version: str) -> bool:
        """Whether a QEMU of *version* has it."""
        return number(version) >= self.value


def number(version: str) -> tuple[int, ...]:
    """``7.2.22`` as numbers that can be compared."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:3])


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
