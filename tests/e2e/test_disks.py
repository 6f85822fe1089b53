"""Volumes, user data, commit and export, as a user has them: the bare guest."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from support.cli import OVM, Ovm
from support.guests import DISK, Console

RUN = ("run", "-d", "--accel", "tcg", "--memory", "32m")
SECRET = "s3cret-of-the-test"


@pytest.fixture
def built(ovm: Ovm, project: Path) -> str:
    return ovm.ok("build", project, "-t", "echo:1").out.strip()


def test_commit_and_export_from_the_command_line(ovm: Ovm, built: str, tmp_path: Path) -> None:
    ovm.ok(*RUN, "--name", "one", "echo:1")
    told = ovm.ok("commit", "one", "-t", "echo:2", "--json").json
    assert (told["name"], told["new_layers"]) == ("echo:2", 0)
    assert told["digest"] != built
    target = tmp_path / "out.img"
    assert ovm.ok("export", "one", "-o", target).out.strip() == str(target)
    assert target.read_bytes() == bytes(DISK)
    again = ovm("export", "echo:2", "-o", target, "--json")
    assert (again.code, again.error["code"]) == (3, "file-unreadable")
    told = ovm.ok("export", "echo:2", "-o", target, "--force", "--format", "qcow2", "--json").json
    assert (told["format"], told["virtual_size"]) == ("qcow2", DISK)
    assert target.read_bytes()[:4] == b"QFI\xfb"
    assert ovm("export", "nothing", "-o", tmp_path / "x").code == 4
    assert ovm("commit", "nothing", "-t", "x:1").code == 4
    assert ovm("commit", "one", "-t", "NOT A NAME").code == 3


@pytest.mark.parametrize("hard", [False, True])
def test_a_killed_export_leaves_nothing(ovm: Ovm, built: str, tmp_path: Path, hard: bool) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "qemu-img").write_text(
        '#!/bin/sh\ncase $1 in measure) echo \'{"required": 1}\';; *) while echo "    (1.00/100%)"; do sleep 0.1; done;; esac\n'
    )
    (tools / "qemu-img").chmod(0o755)
    target = tmp_path / "out.img"
    before = sorted(path.name for path in tmp_path.iterdir())
    argv = [str(OVM), "--progress", "json", "export", "echo:1", "-o", str(target)]
    environment = ovm.env({"PATH": f"{tools}:/usr/bin:/bin"})
    with subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert running.stderr.readline()
        number = signal.SIGKILL if hard else signal.SIGTERM
        running.send_signal(number)
        assert running.wait(20) == (-9 if hard else 143)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_user_data_from_stdin_is_in_nobody_s_sight(ovm: Ovm, built: str, tmp_path: Path) -> None:
    argv = [str(OVM), *RUN, "--user-data", "-", "--name", "told", "--json", "echo:1"]
    data = f"#cloud-config\npassword: {SECRET}\n".encode()
    run = subprocess.run(argv, env=ovm.env(), input=data, capture_output=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    shown = run.stdout + run.stderr + ovm.ok("inspect", "told").out.encode()
    assert SECRET.encode() not in shown
    assert ovm.ok("inspect", "told").json["user_data"] is True
    taken = ovm.ok("snapshot", "told", "-t", "echo:told", "--json")
    assert taken.json["user_data"] is True
    assert "secrets are in its memory" in taken.err
    for words in (("commit", "told", "-t", "echo:disk"), ("export", "told", "-o", str(tmp_path / "out.img"))):
        done = ovm.ok(*words, "--json")
        assert done.json["user_data"] is True
        assert "cloud-init keeps it on the disk" in done.err


def test_what_a_guest_cannot_be_told(ovm: Ovm, built: str, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n")
    refused = ovm(*RUN, "--ssh-key", tmp_path / "id", "--json", "echo:1")
    assert (refused.code, refused.error["code"]) == (3, "invalid-input")
    assert "private key" in refused.err
    assert "c2VjcmV0" not in refused.err
    assert ovm(*RUN, "--hostname", "no name", "echo:1").code == 3
    assert ovm(*RUN, "--user-data", tmp_path / "none", "echo:1").code == 3
    assert ovm(*RUN, "--user-data", "-", "-i", "echo:1").code == 2
    assert ovm(*RUN, "--user-data", "-", "echo:1").code == 3, "nothing is on stdin"
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", OVM, *RUN, "--user-data", "-", "echo:1"],
        env=ovm.env(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert closed.returncode == 3, closed.stderr
    assert ovm("ps", "-aq").out == ""


def test_volumes_from_the_command_line(ovm: Ovm, built: str, tmp_path: Path) -> None:
    volume = tmp_path / "a,b"
    volume.write_bytes(bytes(1 << 20))
    started = ovm.ok(*RUN, "--json", "-v", f"{tmp_path}/a,,b,serial=data", "echo:1").json
    Console(ovm.root / "instances" / started["instance_id"]).wait_for("READY")
    shown = ovm.ok("inspect", started["name"]).json
    assert shown["volumes"] == [{"path": str(volume), "format": "raw", "read_only": False, "name": "data"}]
    taken = ovm(*RUN, "--json", "-v", f"{tmp_path}/a,,b", "echo:1")
    assert (taken.code, taken.error["code"]) == (5, "locked")
    refused = ovm("snapshot", started["name"], "-t", "echo:snap", "--json")
    assert (refused.code, refused.error["code"]) == (3, "unsupported")
    typo = ovm(*RUN, "-v", f"{tmp_path}/a,b", "echo:1")
    assert typo.code == 2
    assert ovm(*RUN, "-v", f"{tmp_path}:/mnt", "echo:1").code == 3
