"""Encrypted snapshots over HTTP and by the commands: identities are the server's where it does the work, else the caller's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyrage import x25519
from support.cli import Ovm
from support.guests import Console
from support.server import Server, prepare, with_snapshot

pytestmark = pytest.mark.long

IDENTITY = x25519.Identity.generate()
RECIPIENT = str(IDENTITY.to_public())


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "identity.txt"
    path.write_text(f"{IDENTITY}\n")
    return path


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, echo_kernel: Path, qemu_cache: Path, identity: Path
) -> Iterator[Server]:
    """A server with an identity, and echo:snap, an encrypted snapshot."""
    root = prepare(tmp_path_factory.mktemp("encrypted"), echo_kernel, qemu_cache)
    with with_snapshot(root, env={"OVMS_IDENTITY": str(identity)}, encrypt=[RECIPIENT]) as running:
        yield running


@pytest.mark.spec("RUN-13", "RAM-60", "RAM-65")
def test_the_server_s_identity_restores_and_fills_pools(server: Server) -> None:
    started = server.post("/start", {"manifest": "echo:snap", "overrides": {"accel": "tcg"}})["instance_id"]
    server.wait(started, "running")
    assert Console(server.root / "instances" / started).ping() == 1
    refused = server.call("POST", "/snapshot", {"instance_id": started})
    assert (refused.status, refused.json["code"], refused.json["rule"]) == (400, "invalid-input", "RAM-65")
    server.post("/warm", {"manifest": "echo:snap", "size": 1})
    deadline = time.monotonic() + 30
    while not (pool := server.get("/warm")["pools"][0])["ready"]:
        assert time.monotonic() < deadline, pool
        time.sleep(0.02)
    parked = server.post("/start", {"manifest": "echo:snap"})
    assert parked["state"] == "running"
    assert Console(server.root / "instances" / parked["instance_id"]).ping() == 1
    server.post("/warm", {"manifest": "echo:snap", "size": 0})


@pytest.mark.spec("RAM-60")
def test_the_commands_without_a_server(server: Server, identity: Path, tmp_path: Path) -> None:
    ovm = Ovm(server.root, tmp_path)
    shown = ovm.ok("inspect", "echo:snap", "--json").json["ram_snapshot"]["encryption"]
    assert (shown["type"], shown["recipients"]) == ("age", [RECIPIENT])
    assert "encrypted" in ovm.ok("ls").out
    assert [one["ram_encrypted"] for one in ovm.ok("ls", "--json").json if one["name"] == "echo:snap"] == [True]
    assert ovm("validate", "echo:snap").code == 0
    local = ("--host", "local")
    lacking = ovm(*local, "run", "-d", "--accel", "tcg", "echo:snap", "--json")
    assert (lacking.code, lacking.error["code"], lacking.error["recipients"]) == (3, "identity-missing", [RECIPIENT])
    # a start with an identity of its own is not the server's to make
    started = ovm.ok("run", "-d", "--accel", "tcg", "--identity", identity, "echo:snap", "--json").json
    name = started["name"]
    assert ovm("snapshot", name, "-t", "echo:plain").code == 3
    secret = ovm("snapshot", name, "-t", "echo:again", "--encrypt", IDENTITY)
    assert secret.code == 2
    assert str(IDENTITY)[20:] not in secret.err
    team = tmp_path / "team.txt"
    team.write_text(f"# all of us\n{RECIPIENT}\n")
    taken = ovm.ok("snapshot", name, "-t", "echo:again", "--encrypt", f"@{team}", "--json").json
    assert (taken["encrypted"], taken["parents"]) == (True, 1)
    flat = ovm("snapshot", "flatten", "echo:again", "--json")
    assert (flat.code, flat.error["code"], flat.error["rule"]) == (3, "unsupported", "RAM-64")
    assert ovm("snapshot", "flatten", "echo:again", "--encrypt", RECIPIENT).code == 2
    lost = ovm("fork", name, "-n", "2", "--json")
    assert (lost.code, lost.error["code"]) == (3, "invalid-input")
    ovm.ok("rm", "-f", name)
