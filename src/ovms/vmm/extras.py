"""What a VM has beside what its artifact gives it: plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ovms.lazy import dataclass
from ovms.spec.manifest import DiskFormat

#: How many volumes and shared directories the machine has room for.
VOLUMES_MAX: Final = 8
SHARES_MAX: Final = 4
#: How a directory is shared, as :mod:`~ovms.vmm.capabilities` names it: by the VMM itself, or by a program beside it.
BY_9P: Final = "9p"
BY_VIRTIOFS: Final = "virtiofs"
_SHARES: Final = "shared"


def share_name(number: int) -> str:
    """Where a VMM has a directory of the host in its own root (without the slash before it)."""
    return f"{_SHARES}/{number}"


@dataclass(frozen=True)
class ExtraDisk:
    """A disk of its own: an open file of the right access mode, checked, and locked as long as it is open anywhere.

    ``path`` is where it comes from, ``name`` the serial number by which the guest knows it.
    """

    fd: int
    path: Path
    format: DiskFormat
    read_only: bool
    name: str


@dataclass(frozen=True)
class Share:
    """A directory of the host, by an open descriptor of it; ``name`` is the tag that the guest mounts, ``via`` how."""

    fd: int
    path: Path
    read_only: bool
    name: str
    via: str = BY_9P


@dataclass(frozen=True)
class Extras:
    """The seed disk, and what the user attached, in the order of the command line."""

    seed: ExtraDisk | None = None
    volumes: tuple[ExtraDisk, ...] = ()
    shares: tuple[Share, ...] = ()

    def disks(self) -> tuple[ExtraDisk, ...]:
        """All disks among them."""
        return (*((self.seed,) if self.seed else ()), *self.volumes)

    def fds(self) -> list[int]:
        """The descriptors that the VMM gets."""
        return [disk.fd for disk in self.disks()]
