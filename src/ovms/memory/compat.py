"""What a RAM snapshot needs of the machine that it is restored on: checked before a byte of its memory is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ovms.errors import SnapshotIncompatible, SnapshotInvalid
from ovms.spec.digest import Digest
from ovms.spec.manifest import Manifest
from ovms.vmm.model import Accel, Machine
from ovms.vmm.protocol import Vmm


@dataclass(frozen=True)
class Meta:
    """What a RAM snapshot says of itself, checked. Digests are those of the artifact's blobs."""

    vmm: str
    vmm_version: str
    machine: Machine
    kernel: str | None
    initrd: str | None
    kernel_args: str
    disks: tuple[str, ...]
    source: str
    created: str

    def to_json(self) -> dict[str, Any]:
        """As the blob's meta region holds it."""
        return {
            "vmm": {"name": self.vmm, "version": self.vmm_version},
            "machine": self.machine.to_json(),
            "kernel": self.kernel,
            "initrd": self.initrd,
            "kernel_args": self.kernel_args,
            "disks": list(self.disks),
            "source": self.source,
            "created": self.created,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Meta:
        """Raises :class:`SnapshotInvalid` when a field is missing or of another type."""
        vmm = value.get("vmm")
        if not isinstance(vmm, dict):
            raise SnapshotInvalid("the RAM snapshot's meta.vmm is not an object")
        disks = value.get("disks")
        if not isinstance(disks, list) or not all(isinstance(d, str) for d in disks):
            raise SnapshotInvalid("the RAM snapshot's meta.disks is not a list of digests")
        return cls(
            _text(vmm, "name"),
            _text(vmm, "version"),
            Machine.from_json(value.get("machine"), "the RAM snapshot's meta.machine"),
            None if value.get("kernel") is None else _text(value, "kernel"),
            None if value.get("initrd") is None else _text(value, "initrd"),
            _text(value, "kernel_args"),
            tuple(disks),
            _text(value, "source"),
            _text(value, "created"),
        )


def _text(value: Mapping[str, Any], key: str) -> str:
    item = value.get(key)
    if not isinstance(item, str):
        raise SnapshotInvalid(f"the RAM snapshot's meta.{key} is missing or no string")
    return item


def describe(vmm: Vmm, machine: Machine, manifest: Manifest, source: Digest, extra_disks: tuple[Digest, ...]) -> Meta:
    """The meta of a new snapshot of a VM that runs *manifest* (of the artifact *source*) with further disk layers."""
    return Meta(
        vmm.name,
        vmm.version,
        machine,
        manifest.kernel.ref if manifest.kernel else None,
        manifest.initrd.ref if manifest.initrd else None,
        manifest.kernel.args if manifest.kernel else "",
        (*(layer.ref for layer in manifest.disk_layers), *extra_disks),
        source,
        datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def check_belongs(meta: Meta, manifest: Manifest, memory_size: int, disk_size: int | None) -> None:
    """Whether a snapshot was taken of the very VM that the manifest around it describes.

    Raises:
        SnapshotInvalid: it was not; no machine could restore it.
    """
    wanted = {
        "kernel": (manifest.kernel.ref if manifest.kernel else None, meta.kernel),
        "initrd": (manifest.initrd.ref if manifest.initrd else None, meta.initrd),
        "kernel arguments": (manifest.kernel.args if manifest.kernel else "", meta.kernel_args),
        "disk layers": (tuple(layer.ref for layer in manifest.disk_layers), meta.disks),
        "memory size": (memory_size, meta.machine.memory),
        "disk size": (disk_size, meta.machine.disk_size),
    }
    wrong = [name for name, (here, there) in wanted.items() if here != there]
    if wrong:
        raise SnapshotInvalid(
            f"the RAM snapshot is not one of this artifact: another {' and another '.join(wrong)}",
            hint="start it with --cold to boot from the disk instead",
        )


def require_shape(meta: Meta, *, memory: int | None, vcpus: int | None) -> None:
    """Whether what the user asks for is what the snapshot has; *memory* in bytes, None where nothing is asked.

    Raises:
        SnapshotIncompatible: it is not: a snapshot's memory and CPUs can't be changed.
    """
    machine = meta.machine
    wrong = None
    if memory is not None and memory != machine.memory:
        wrong = f"it has {machine.memory >> 20} MiB of memory, and {memory >> 20} MiB are asked for"
    elif vcpus is not None and vcpus != machine.vcpus:
        wrong = f"it has {machine.vcpus} CPUs, and {vcpus} are asked for"
    if wrong is not None:
        raise SnapshotIncompatible(
            f"the RAM snapshot cannot be restored: {wrong}",
            hint="leave out --memory and --cpus, or add --cold to boot from the disk instead",
        )


def why_not(vmm: Vmm, meta: Meta, accel: Accel) -> str | None:
    """Why the snapshot can't be restored on this host; None when it can."""
    machine = meta.machine
    if meta.vmm != vmm.name:
        return f"it was taken by {meta.vmm!r:.40}, and this is {vmm.name}"
    if machine.accel is not accel:
        return f"it was taken under {machine.accel.upper()}, and this VM runs under {accel.upper()}"
    return vmm.why_incompatible(machine, meta.vmm_version)
