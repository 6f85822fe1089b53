"""A real Debian with cloud-init: what it is told through the seed disk, and what becomes of its disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from support import cloud_guest
from support.cli import Ovm
from support.guests import Console

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO5HKCDbq0tCSVTlSSKkKxCWLjz0pDPZyKpWGcSZ6dYV somebody@example"
SECRET = "s3cret-of-the-test"
SCRIPT = """\
exec >/dev/ttyS0 2>&1
echo "host=$(hostname)"
echo "key=$(cat /home/debian/.ssh/authorized_keys)"
echo "seed=$(readlink -f /dev/disk/by-id/virtio-seed) volume=$(readlink -f /dev/disk/by-id/virtio-data)"
echo "read=$(head -c 4 /dev/disk/by-id/virtio-data)"
echo from-guest | dd of=/dev/disk/by-id/virtio-data bs=512 seek=1 conv=sync,fsync status=none
echo kept >/srv/mark
sync
echo all-is-done
"""


def user_data() -> bytes:
    body = "".join(f"      {line}\n" for line in SCRIPT.splitlines())
    return f"#cloud-config\npassword: {SECRET}\nruncmd:\n  - - sh\n    - -c\n    - |\n{body}".encode()


@pytest.mark.spec("BOOT-33", "BOOT-43", "BOOT-44", "BOOT-52")
def test_cloud_init_does_what_it_is_told(ovm: Ovm, tmp_path: Path) -> None:
    ovm.ok("build", cloud_guest.make(), "-t", "cloud:1", timeout=120)
    (tmp_path / "user-data").write_bytes(user_data())
    (tmp_path / "key.pub").write_text(KEY + "\n")
    volume = tmp_path / "volume"
    volume.write_bytes(b"host".ljust(1 << 20, b"\0"))
    started = ovm.ok(
        *("run", "-d", "--json", "--name", "seeded", "--accel", "tcg", "-m", "512m", "-v", f"{volume},serial=data"),
        *(
            "--user-data",
            tmp_path / "user-data",
            "--ssh-key",
            tmp_path / "key.pub",
            "--hostname",
            "seedling",
            "cloud:1",
        ),
    ).json
    directory = ovm.root / "instances" / started["instance_id"]
    console = Console(directory)
    began = time.monotonic()
    said = console.wait_for("all-is-done", timeout=600)
    print(f"cloud-init took {time.monotonic() - began:.0f} s")
    lines = [line.strip() for line in said.splitlines()]
    assert "host=seedling" in lines
    assert f"key={KEY}" in lines
    assert "seed=/dev/vdb volume=/dev/vdc" in lines
    assert "read=host" in lines
    shown = ovm.ok("inspect", "seeded")
    assert shown.json["user_data"] is True
    for name in ("record.json", "vmm.log", "events.out", "console.log"):
        assert SECRET not in (directory / name).read_text(errors="replace"), name
    assert SECRET not in shown.out + str(started)

    ovm.ok("export", "seeded", "-o", tmp_path / "running.img")
    ovm.ok("commit", "seeded", "-t", "cloud:2")
    ovm.ok("stop", "-t", "0", "seeded")
    assert volume.read_bytes().startswith(b"host".ljust(512, b"\0") + b"from-guest\n")
    ovm.ok("export", "cloud:2", "-o", tmp_path / "committed.img")
    for name in ("running.img", "committed.img"):
        assert read(tmp_path / name, "/srv/mark") == "kept\n"


def read(image: Path, path: str) -> str:
    """A file of an ext4 image, after what a mount would replay of its journal."""
    tool = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin")
    check = shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin")
    assert tool is not None
    assert check is not None
    subprocess.run([check, "-fy", image], capture_output=True, timeout=120, check=False)
    done = subprocess.run([tool, "-R", f"cat {path}", image], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.spec("BOOT-14", "BOOT-15", "BOOT-18", "BOOT-20", "BOOT-22", "BOOT-23", "BOOT-33")
def test_a_workload_runs_and_its_exit_status_is_shown(ovm: Ovm, tmp_path: Path) -> None:
    directory = tmp_path / "project"
    shutil.copytree(cloud_guest.make().parent, directory)
    config = {
        "profile": "cloud-init",
        "entrypoint": ["/bin/sh", "-c"],
        "cmd": ['echo "workload of $(id -un) in $PWD: $GREETING"; grep -rl "$GREETING" /etc /run 2>/dev/null; exit 7'],
        "env": ["GREETING=it's a 'quote'"],
        "workdir": "/srv/work",
        "user": "nobody",
    }
    (directory / "bootstrap.json").write_text(json.dumps(config))
    manifest = directory / "ovms.yaml"
    manifest.write_text(manifest.read_text() + "bootstrap: {ref: bootstrap.json}\n")
    ovm.ok("build", manifest, "-t", "work:1", timeout=120)
    started = ovm.ok("run", "-d", "--json", "--name", "work", "--accel", "tcg", "-m", "512m", "work:1").json
    console = Console(ovm.root / "instances" / started["instance_id"])
    console.wait_for("ovms-exit: ", timeout=600)
    deadline = time.monotonic() + 120
    while (shown := ovm.ok("inspect", "work").json)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (shown["state"], shown["ending"], shown["exit_status"]) == ("stopped", "powered-off", 7)
    lines = [line.strip() for line in console.text().splitlines()]
    assert "workload of nobody in /srv/work: it's a 'quote'" in lines
