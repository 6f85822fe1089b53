"""A Debian guest whose memory goes through a chain of diffs: what it had in it is there, byte for byte."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests
from support.cli import Ovm

MAKE = Path(__file__).parents[2] / "demo" / "make_images.py"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


@pytest.fixture
def ovm(tmp_path: Path) -> Iterator[Ovm]:
    """With an instance "web" whose agent answers."""
    done = subprocess.run([sys.executable, MAKE, "--agent"], stdout=subprocess.PIPE, text=True, check=True, timeout=800)
    for name in ("root", "home"):
        (tmp_path / name).mkdir()
    ovm = Ovm(tmp_path / "root", tmp_path / "home")
    ovm.ok("build", f"{done.stdout.splitlines()[-1]}/manifest.yaml", "-t", "debian:1")
    ovm.ok("run", "-d", "--name", "web", "--memory", "256m", "debian:1")
    yield ovm
    ovm("rm", "-f", *ovm("ps", "-aq").out.split())
    assert guests.qemu_children(tmp_path / "root") == []


def sh(ovm: Ovm, name: str, script: str) -> str:
    return ovm.ok("exec", "--wait", "120", name, "--", "sh", "-c", script, timeout=180).out


#: Files in the guest's memory; dd is in every Debian.
FILL = "head -c 16777216 /dev/urandom >/dev/shm/a; cp /dev/shm/a /dev/shm/b"
CHANGE = "dd if=/dev/urandom of=/dev/shm/a bs=4096 seek=1000 count=100 conv=notrunc 2>/dev/null; rm /dev/shm/b"
SUMS = "cd /dev/shm && sha256sum $(ls)"


@pytest.mark.spec("RAM-40", "RAM-43", "RUN-13")
def test_files_in_memory_outlast_a_chain(ovm: Ovm) -> None:
    sh(ovm, "web", f"until [ -d /run/lock ]; do sleep 0.1; done; mount -t tmpfs none /dev/shm 2>/dev/null; {FILL}")
    sums = sh(ovm, "web", SUMS)
    assert sums.count("\n") == 2
    base = ovm.ok("snapshot", "web", "-t", "debian:a", "--json").json
    ovm.ok("rm", "-f", "web")

    ovm.ok("run", "-d", "--name", "idle", "--restore", "require", "debian:a")
    time.sleep(2)
    idle = ovm.ok("snapshot", "idle", "-t", "debian:idle", "--json").json
    assert (idle["parents"], idle["ram_bytes"] < 1 << 20) == (1, True), idle
    assert sh(ovm, "idle", SUMS) == sums
    ovm.ok("rm", "-f", "idle")

    ovm.ok("run", "-d", "--name", "b", "--restore", "require", "debian:idle")
    changed = sh(ovm, "b", f"{CHANGE}; {SUMS}")
    assert changed != sums
    taken = ovm.ok("snapshot", "b", "-t", "debian:b", "--json").json
    assert taken["parents"] == 2
    assert taken["ram_bytes"] < base["ram_bytes"] / 2
    ovm.ok("rm", "-f", "b")
    ovm.ok("snapshot", "flatten", "debian:b", "-t", "debian:flat")
    ovm.ok("prune")
    for name in ("debian:b", "debian:flat"):
        ovm.ok("validate", name, timeout=120)
        ovm.ok("run", "-d", "--name", "c", "--restore", "require", name)
        assert sh(ovm, "c", SUMS) == changed
        ovm.ok("rm", "-f", "c")


#: Answers with what it is told, on one connection.
ECHO = (
    "socket(S, PF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(90, INADDR_ANY)) or die; listen(S, 1); accept(C, S);"
    " while (sysread(C, $b, 64)) { syswrite(C, $b) }"
)


@pytest.mark.spec("RUN-13")
def test_an_open_connection_outlasts_snapshots(ovm: Ovm) -> None:
    sh(ovm, "web", f"perl -MSocket -e '{ECHO}' </dev/null >/dev/null 2>&1 & sleep 1")
    (forward,) = ovm.ok("port", "web", "--add", "90", "--json").json
    with socket.create_connection(("127.0.0.1", forward["host_port"]), timeout=60) as connection:

        def ask(word: bytes) -> bytes:
            connection.sendall(word)
            got = b""
            while len(got) < len(word):
                more = connection.recv(64)
                assert more, got
                got += more
            return got

        assert ask(b"before") == b"before"
        first = ovm.ok("snapshot", "web", "-t", "debian:open", "--json").json
        assert ask(b"after the first") == b"after the first"
        second = ovm.ok("snapshot", "web", "-t", "debian:open2", "--json").json
        assert ask(b"after the second") == b"after the second"
        assert (first["parents"], second["parents"]) == (0, 1)
        # a clone has the guest's half of it, which leads nowhere; the original goes on
        ovm.ok("run", "-d", "--name", "clone", "--restore", "require", "debian:open2")
        assert "perl" in sh(ovm, "clone", "cat /proc/[0-9]*/comm")
        assert ask(b"beside a clone") == b"beside a clone"
