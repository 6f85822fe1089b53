"""Where a process has mapped a file: ``/proc/PID/maps``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ovms.errors import HostError
from ovms.lazy import dataclass, regex

#: Address range, permissions, offset, device, inode, path.
_MAPPING: Final = regex(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ ([0-9]+)\s*(.*)")


@dataclass(frozen=True)
class Mapped:
    """A mapping's address; *private*: writes go to copies of the file's pages."""

    address: int
    private: bool


def find(pid: int, file: Path, size: int) -> Mapped:
    """Where process *pid* has mapped all *size* bytes of *file* (a path, or a descriptor in ``/proc``).

    Raises:
        HostError: there is no such mapping.
    """
    inode = file.stat().st_ino
    # a memfd is called the same wherever it is mapped, and its descriptor's link tells how
    name = (str(file.readlink()) if file.is_symlink() else str(file)).removesuffix(" (deleted)")
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if (match := _MAPPING.fullmatch(line)) is None:
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        # Not the device: on btrfs and overlayfs the number there is another than that of stat.
        if end - start == size and int(match[4]) == inode and match[5].removesuffix(" (deleted)") == name:
            return Mapped(start, match[3].endswith("p"))
    raise HostError(f"process {pid} has not mapped {file}")
