"""The demo's guest with an agent, on the distribution's generic kernel: that has CONFIG_VMGENID, the one for clouds has not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.cloud_guest import _maker
from support.tools import REPOSITORY

PACKAGE = "linux-image-amd64"
NEEDED = ("mmdebstrap", "mke2fs", "debugfs", "qemu-img", "apt-get", "apt-cache", "dpkg-deb")


def agent_images() -> Path:
    """The directory of the demo's images with qemu-guest-agent. Takes a minute or two when they are not in the cache."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: run scripts/setup-system.sh --demo")
    maker = REPOSITORY / "demo" / "make_images.py"
    done = subprocess.run(
        [sys.executable, maker, "--agent"], stdout=subprocess.PIPE, text=True, check=True, timeout=800
    )
    return Path(done.stdout.splitlines()[-1])


def make() -> Path:
    """The manifest of the guest, ready for ``ovm build``."""
    agent = agent_images()
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache").resolve()
    package = _package()
    maker = _maker()
    key = maker.digest(Path(__file__).read_bytes(), package.encode(), agent.name.encode())
    guests = cache / "generic-guest"
    guests.mkdir(exist_ok=True)
    target: Path = guests / key
    with maker.locked(guests / ".lock"):
        if not (target / "manifest.yaml").exists():
            with maker.staging(guests) as work:
                new = work / "new"
                new.mkdir()
                # unpacked and not installed
                maker.run(["dpkg-deb", "-x", _download(package, work), work / "root"])
                (work / "kernel").mkdir()
                picker = REPOSITORY / "scripts" / "pick_modules.py"
                subprocess.run([sys.executable, picker, work / "root", work / "kernel"], check=True, timeout=120)
                initrd = maker.make_initrd(
                    cache / "tools" / "busybox",
                    work / "kernel" / "modules",
                    REPOSITORY / "demo" / "guest" / "initrd-init",
                )
                (new / "initrd.img").write_bytes(initrd)
                shutil.copy(work / "kernel" / "vmlinuz", new / "vmlinuz")
                for name in ("base.qcow2", "service.qcow2"):
                    (new / name).hardlink_to(agent / name)
                # without init_on_free, as a distribution boots it
                text = (
                    (agent / "manifest.yaml").read_text().replace(" init_on_free=1", "").replace("ovms-demo", "generic")
                )
                (new / "manifest.yaml").write_text(text)
                maker.publish(new, target)
        os.utime(target)
        maker.prune(guests)
    return target / "manifest.yaml"


def _package() -> str:
    done = subprocess.run(
        ["apt-cache", "depends", PACKAGE], capture_output=True, text=True, timeout=60, check=False, env=_environment()
    )
    found = re.search(r"Depends: *(linux-image-[0-9]\S*)", done.stdout)
    if found is None:
        pytest.skip(f"this machine's package lists have no {PACKAGE}")
    return found[1]


def _download(package: str, work: Path) -> Path:
    argv = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
    done = subprocess.run(argv, cwd=work, capture_output=True, text=True, timeout=300, check=False, env=_environment())
    found = next(iter(work.glob("linux-image-*.deb")), None)
    if done.returncode != 0 or found is None:
        pytest.skip(f"the package {package} is not to be had: {done.stderr.strip()[-300:]}")
    return found


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
