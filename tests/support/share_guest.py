"""A guest of one initrd, on the distribution's generic kernel: that has 9p, the one for clouds has virtiofs alone. It runs a
script that lies in the directory that its host shares with it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from support.cloud_guest import _maker
from support.generic_guest import _download, _package
from support.tools import REPOSITORY

INIT = REPOSITORY / "tests" / "guests" / "share-init"
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "virtiofs")
ARGS = "console=ttyS0 quiet panic=-1 random.trust_cpu=on"
MOUNTS = {"9p": "share=9p options=trans=virtio,version=9p2000.L", "virtiofs": "share=virtiofs options=rw"}


def make(via: str = "9p") -> Path:
    """The manifest of the guest that mounts the directory by *via*, ready for ``ovm build``."""
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache").resolve()
    package = _package()
    maker = _maker()
    maker.fetch_tools(cache)
    busybox = cache / "tools" / "busybox"
    key = maker.digest(Path(__file__).read_bytes(), INIT.read_bytes(), busybox.read_bytes(), package.encode())
    guests = cache / "share-guest"
    guests.mkdir(exist_ok=True)
    target: Path = guests / key
    with maker.locked(guests / ".lock"):
        if not (target / "9p.yaml").exists():
            with maker.staging(guests) as work:
                new = work / "new"
                new.mkdir()
                maker.run(["dpkg-deb", "-x", _download(package, work), work / "root"])
                _pick(work / "root", work / "modules")
                (new / "initrd.img").write_bytes(maker.make_initrd(busybox, work / "modules", INIT))
                shutil.copy(next((work / "root" / "boot").glob("vmlinuz-*")), new / "vmlinuz")
                for name, mount in MOUNTS.items():
                    (new / f"{name}.yaml").write_text(
                        "schemaVersion: 1\nmediaType: application/vnd.ovms.manifest.v1+json\nname: share\nversion: '1'\n"
                        f"kernel: {{ref: vmlinuz, args: '{ARGS} {mount}'}}\ninitrd: {{ref: initrd.img}}\n"
                    )
                maker.publish(new, target)
        os.utime(target)
        maker.prune(guests)
    return target / f"{via}.yaml"


def _pick(root: Path, modules: Path) -> None:
    modules.mkdir()
    picker = _picker().Picker(next(path for path in root.rglob("modules/*") if (path / "kernel").is_dir()))
    for name in MODULES:
        picker.pick(name, needed=True)
    for i, (name, module) in enumerate(picker.picked.items()):
        (modules / f"{i:02}-{name}.ko").write_bytes(module)


def _picker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pick_modules", REPOSITORY / "scripts" / "pick_modules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pick_modules"] = module
    spec.loader.exec_module(module)
    return module
