"""The attacks of ``spec/vectors/hostile``, and the artifacts that they come in."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ovms.spec import limits, mediatypes
from support import kernels
from support.schemas import SPEC

VECTORS: Final = SPEC / "vectors" / "hostile"
SECRET: Final = b"what the host keeps to itself\n".ljust(4096, b".")


@dataclass(frozen=True)
class Attack:
    """A case of the index, and its input."""

    name: str
    form: str
    code: str | None
    rules: tuple[str, ...]
    data: bytes

    def __str__(self) -> str:
        return f"{self.form}: {self.name}"


def attacks(*forms: str) -> list[Attack]:
    """Those of the index that claim to be one of *forms*; all, without any."""
    cases = json.loads((VECTORS / "index.json").read_bytes())["cases"]
    return [
        Attack(c["name"], c["form"], c.get("code"), tuple(c["rules"]), (VECTORS / c["file"]).read_bytes())
        for c in cases
        if not forms or c["form"] in forms
    ]


def load_script(name: str) -> ModuleType:
    """A script as a module, which is not kept."""
    spec = importlib.util.spec_from_file_location(name, SPEC.parent / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[name] = module  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
        sys.path[:] = path
    return module


def project(directory: Path, attack: Attack) -> Path:
    """The inputs of ``ovm build`` with the attack among them, beside the secret. Returns the manifest's path."""
    directory.mkdir()
    (directory / "secret").write_bytes(SECRET)
    (directory / "disk.raw").write_bytes(b"disk" * 128)
    (directory / "vmlinuz").write_bytes(kernels.bzimage())
    manifest = directory / "ovms.json"
    if attack.form == "manifest":
        manifest.write_bytes(attack.data)
        return manifest
    (directory / "attack").write_bytes(attack.data)
    manifest.write_text(json.dumps(document(attack, "attack", "disk.raw", "vmlinuz")))
    return manifest


def document(attack: Attack, ref: str, disk: str, kernel: str) -> dict[str, Any]:
    """An OVMS manifest in which *ref* is the attack."""
    plain = {"ref": disk, "format": "raw"}
    parts: dict[str, dict[str, Any]] = {
        "qcow2": {"diskLayers": [{"ref": ref, "format": "qcow2"}]},
        "raw": {"diskLayers": [{"ref": ref, "format": "raw"}]},
        "kernel": {"kernel": {"ref": ref}, "diskLayers": [plain]},
        "initrd": {"kernel": {"ref": kernel}, "initrd": {"ref": ref}, "diskLayers": [plain]},
        "bootstrap": {"bootstrap": {"ref": ref}, "diskLayers": [plain]},
        "ramsnap": {"ramSnapshot": {"ref": ref}, "diskLayers": [plain]},
    }
    head = {"schemaVersion": 1, "mediaType": mediatypes.MANIFEST, "name": "web", "version": "1"}
    return {**head, **parts[attack.form]}


_MEDIA_TYPES: Final = {
    "qcow2": mediatypes.DISK_LAYER,
    "raw": mediatypes.DISK_LAYER,
    "kernel": mediatypes.KERNEL,
    "bootstrap": mediatypes.BOOTSTRAP,
    "ramsnap": mediatypes.RAM_SNAPSHOT_LZ4,
}


def oci_archive(attack: Attack, script: ModuleType) -> bytes:
    """An archive of a layout with an artifact that holds the attack; *script* is ``make_hostile_vectors``."""
    if attack.form == "oci-archive":
        return attack.data
    if attack.form == "manifest":
        oci, ovms = script.image(manifest=attack.data)
        return bytes(script.archive(script.layout(oci, ovms)))
    disk = json.loads(script.image()[0])["layers"][0]
    annotations = {} if attack.form not in ("qcow2", "raw") else {mediatypes.DISK_FORMAT_ANNOTATION: attack.form}
    layer = script.descriptor(_MEDIA_TYPES[attack.form], attack.data, annotations=annotations)
    ovms = json.dumps(document(attack, layer["digest"], disk["digest"], disk["digest"])).encode()
    assert len(ovms) < limits.MANIFEST_MAX
    layers = [layer] if attack.form in ("qcow2", "raw") else [layer, disk]
    oci, _ = script.image(manifest=ovms, layers=layers)
    return bytes(script.archive(script.layout(oci, ovms, attack.data)))
