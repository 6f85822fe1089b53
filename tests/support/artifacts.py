"""Inputs of ``ovm build``: small, and right unless a test breaks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovms.spec import mediatypes, ramsnap
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
