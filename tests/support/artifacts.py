"""Inputs of ``ovm build``: small, and right unless a test breaks them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovms.artifact import model
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.spec import mediatypes, ramsnap
from ovms.spec.digest import of_bytes
from ovms.spec.manifest import DiskFormat, PartKind
from support import kernels, qcow2_images, ram

MANIFEST: dict[str, Any] = {
    "schemaVersion": 1,
    "mediaType": mediatypes.MANIFEST,
    "name": "web",
    "version": "1.0",
    "kernel": {"ref": "vmlinuz", "args": "console=ttyS0"},
    "initrd": {"ref": "initrd.img"},
    "diskLayers": [{"ref": "base.img", "format": "raw"}, {"ref": "diff.qcow2", "format": "qcow2"}],
    "ramSnapshot": {"ref": "ram.ovmr"},
    "bootstrap": {"ref": "bootstrap.json"},
}


def ram_blob() -> bytes:
    """A RAM snapshot of two pages."""
    return ram.blob({0: b"a" * ramsnap.PAGE * 2})


def write_inputs(directory: Path) -> None:
    """Every file that :data:`MANIFEST` names."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vmlinuz").write_bytes(kernels.bzimage())
    (directory / "initrd.img").write_bytes(b"initrd")
    (directory / "base.img").write_bytes(b"base" * 1024)
    (directory / "diff.qcow2").write_bytes(qcow2_images.image())
    (directory / "ram.ovmr").write_bytes(ram_blob())
    (directory / "bootstrap.json").write_bytes(b'{"cmd": ["/bin/true"]}')


def write_manifest(directory: Path, *, name: str = "ovms.json", **changes: Any) -> Path:
    """:data:`MANIFEST` with top-level fields changed (None takes one away), as JSON. Returns its path."""
    path = directory / name
    document = {k: v for k, v in {**MANIFEST, **changes}.items() if v is not None}
    path.write_text(json.dumps(document))
    return path


def small(layout: Layout, name: str) -> model.Artifact:
    """An artifact whose blobs are like no other's, without a real kernel: transfers do not look into blobs."""
    return of(layout, name, f"kernel of {name}".encode() * 100, f"disk of {name}".encode() * 40_000)


def of(layout: Layout, name: str, kernel: bytes, disk: bytes, *, subject: Descriptor | None = None) -> model.Artifact:
    """An artifact of these blobs, which are checked by nobody here."""
    parts = model.Parts(
        kernel=model.part_descriptor(PartKind.KERNEL, layout.add_bytes(kernel), len(kernel)),
        disks=(model.part_descriptor(PartKind.DISK, layout.add_bytes(disk), len(disk), format=DiskFormat.RAW),),
    )
    document = {
        "schemaVersion": 1,
        "mediaType": mediatypes.MANIFEST,
        "name": "test",
        "version": "1",
        "kernel": {"ref": of_bytes(kernel)},
        "diskLayers": [{"ref": of_bytes(disk), "format": "raw"}],
    }
    artifact = model.compose(layout, document, parts, subject=subject)
    layout.set_name(name, artifact.image.descriptor())
    return artifact


def of_layers(layout: Layout, name: str, layers: Sequence[bytes]) -> model.Artifact:
    """An artifact of these disk layers, which are checked by nobody here."""
    disks = tuple(
        model.part_descriptor(PartKind.DISK, layout.add_bytes(data), len(data), format=DiskFormat.QCOW2, number=i)
        for i, data in enumerate(layers)
    )
    document = {
        "schemaVersion": 1,
        "mediaType": mediatypes.MANIFEST,
        "name": "test",
        "version": "1",
        "diskLayers": [{"ref": disk.digest, "format": "qcow2"} for disk in disks],
    }
    artifact = model.compose(layout, document, model.Parts(disks=disks))
    layout.set_name(name, artifact.image.descriptor())
    return artifact


def with_ram(
    layout: Layout, name: str, ram_snapshot: bytes, *, disk: bytes = b"disk" * 100_000, annotated: bool = True
) -> model.Artifact:
    """An artifact of a disk and a RAM snapshot, which are checked by nobody here. Not *annotated*: see OCI-14."""
    digest = layout.add_bytes(ram_snapshot)
    size = ramsnap.parse_prefix(ram_snapshot).data_offset
    annotations = {
        mediatypes.RAM_CONTROL_ANNOTATION: of_bytes(ram_snapshot[:size]),
        mediatypes.RAM_CONTROL_SIZE_ANNOTATION: str(size),
    }
    parts = model.Parts(
        disks=(model.part_descriptor(PartKind.DISK, layout.add_bytes(disk), len(disk), format=DiskFormat.RAW),),
        ram_snapshots=(
            model.part_descriptor(
                PartKind.RAM, digest, len(ram_snapshot), annotations=annotations if annotated else {}
            ),
        ),
    )
    document = {
        "schemaVersion": 1,
        "mediaType": mediatypes.MANIFEST,
        "name": "test",
        "version": "1",
        "diskLayers": [{"ref": of_bytes(disk), "format": "raw"}],
        "ramSnapshot": {"ref": digest},
    }
    artifact = model.compose(layout, document, parts)
    layout.set_name(name, artifact.image.descriptor())
    return artifact
