"""A Debian with cloud-init and an SSH server, as a cloud's image has them: made once, with the demo's tools, into the cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.tools import REPOSITORY

PACKAGES = ("cloud-init", "systemd-sysv", "udev", "netbase", "iproute2", "openssh-server", "busybox-static")
KERNEL_ARGS = "console=ttyS0 root=/dev/vda rw panic=-1 random.trust_cpu=on"
#: What a kernel needs to mount the seed, and the demo's does not have.
MODULES = ("cdrom", "isofs")
NEEDED = ("mmdebstrap", "mke2fs", "debugfs", "qemu-img", "apt-get", "dpkg-deb")


def make() -> Path:
    """The manifest of the guest, ready for ``ovm build``. Takes a minute or two when it is not in the cache."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: run scripts/setup-system.sh --demo")
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache").resolve()
    maker = _maker()
    maker.fetch_tools(cache)
    kernel = cache / "tools" / "kernel"
    version = (kernel / "version").read_text().strip()
    recipe = Path(__file__).read_bytes() + (REPOSITORY / "demo" / "make_images.py").read_bytes()
    key = maker.digest(recipe, version.encode(), Path("/etc/os-release").read_bytes())
    guests = cache / "cloud-guest"
    guests.mkdir(exist_ok=True)
    target: Path = guests / key
    with maker.locked(guests / ".lock"):
        if not (target / "ovms.yaml").exists():
            with maker.staging(guests) as work:
                _fill(maker, work, cache, kernel, version)
                maker.publish(work / "new", target)
        os.utime(target)
        maker.prune(guests)
    return target / "ovms.yaml"


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_images", REPOSITORY / "demo" / "make_images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_images"] = module
    spec.loader.exec_module(module)
    return module


def _fill(maker: ModuleType, work: Path, cache: Path, kernel: Path, version: str) -> None:
    new = work / "new"
    new.mkdir()
    modules = work / "modules"
    shutil.copytree(kernel / "modules", modules)
    _add_modules(work, modules, version)
    initrd = maker.make_initrd(cache / "tools" / "busybox", modules, REPOSITORY / "demo" / "guest" / "initrd-init")
    (new / "initrd.img").write_bytes(initrd)
    shutil.copy(kernel / "vmlinuz", new / "vmlinuz")
    epoch = int((kernel / "vmlinuz").stat().st_mtime)
    image = maker.make_base(work, maker.debootstrap(work, epoch, cache / "apt/lists", include=PACKAGES), epoch)
    # as in a cloud's image: the machine gets its ID, and nobody is asked for anything, when it first boots
    (work / "empty").touch()
    commands = [f'write "{work / "empty"}" /etc/machine-id', "sif /etc/machine-id mode 0100444"]
    maker.debugfs(work, image, commands, epoch)
    maker.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, new / "base.qcow2"])
    (new / "ovms.yaml").write_text(
        "schemaVersion: 1\nmediaType: application/vnd.ovms.manifest.v1+json\nname: cloud\nversion: '1'\n"
        f"kernel: {{ref: vmlinuz, args: '{KERNEL_ARGS}'}}\ninitrd: {{ref: initrd.img}}\n"
        "diskLayers: [{ref: base.qcow2, format: qcow2}]\n"
    )


def _add_modules(work: Path, modules: Path, version: str) -> None:
    # the package that the demo's kernel came from, unpacked and not installed
    argv = ["apt-get", "download", f"linux-image-{version}"]
    done = subprocess.run(argv, cwd=work, capture_output=True, text=True, timeout=300, check=False)
    packages = list(work.glob("linux-image-*.deb"))
    if done.returncode != 0 or not packages:
        pytest.skip(f"the package linux-image-{version} is not to be had: {done.stderr.strip()[-300:]}")
    subprocess.run(["dpkg-deb", "-x", packages[0], work / "kernel"], check=True, timeout=120)
    for number, name in enumerate(MODULES, start=90):
        found = next(iter((work / "kernel").rglob(f"{name}.ko")), None)
        if found is not None:  # else it is built in
            shutil.copy(found, modules / f"{number}-{name}.ko")
