"""Checks of single layers and of the chain that they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.disk import qcow2
from ovms.errors import DiskInvalid, Unsupported
from ovms.lazy import dataclass
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat

SECTOR: Final = 512


@dataclass(frozen=True)
class Layer:
    """A checked layer on disk; ``virtual_size`` is what the guest would see, in bytes."""

    path: Path
    format: DiskFormat
    virtual_size: int


def check_layer(fd: int, format: DiskFormat, what: str) -> int:
    """Checks an open layer file. Returns the size that the guest sees, in bytes.

    Raises:
        DiskInvalid: not of that format, or with anything that a layer must not have.
        Unsupported: a format that no runtime takes.
    """
    if format is DiskFormat.OVFMS:
        raise Unsupported(
            f"{what}: the format 'ovfms' is a name without a definition, which ovms does not run",
            hint="use qcow2 (or raw for the base layer)",
            rule="LAY-7",
        )
    if format is DiskFormat.QCOW2:
        return qcow2.check_header(fd, what).virtual_size
    size = os.fstat(fd).st_size
    if os.pread(fd, 4, 0) == qcow2.MAGIC:
        raise DiskInvalid(f"{what} is a qcow2 image, but is said to be raw", hint="say format: qcow2", rule="LAY-6")
    if size % SECTOR or not 0 < size <= limits.DISK_VIRTUAL_MAX:
        raise DiskInvalid(f"{what}: a raw disk has a multiple of {SECTOR} bytes, not {size}", rule="LAY-6")
    return size


def open_chain(layers: Sequence[tuple[Path, DiskFormat]]) -> list[Layer]:
    """Checks the layers of a disk, base first, and that they make a chain.

    Raises:
        FileProblem, DiskInvalid, Unsupported: a layer is missing or wrong, or a raw one is not the base.
    """
    chain: list[Layer] = []
    for i, (path, format) in enumerate(layers):
        what = f"disk layer {i}"
        if format is DiskFormat.RAW and i > 0:
            raise DiskInvalid(f"{what} is raw: only the base layer can be", rule="MAN-13")
        with fsutil.open_input(path, what, max_size=limits.DISK_LAYER_MAX) as file:
            chain.append(Layer(path, format, check_layer(file.fileno(), format, what)))
    return chain
