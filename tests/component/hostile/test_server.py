"""The attacks, started over the runtime contract: each is an error with its code, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import guests, hostile
from support.cli import Ovm
from support.hostile import Attack
from support.server import Server, prepare

pytestmark = pytest.mark.long

FORMS = ("qcow2", "kernel", "bootstrap", "ramsnap", "manifest", "oci-archive")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return hostile.load_script("make_hostile_vectors")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, echo_kernel: Path, qemu_cache: Path) -> Iterator[Server]:
    running = Server(prepare(tmp_path_factory.mktemp("server"), echo_kernel, qemu_cache))
    try:
        yield running
        assert running.get("/instances")["instances"] == []
    finally:
        assert running.close() == 0
    assert guests.qemu_children(running.root) == []


@pytest.mark.spec("SEC-2")
@pytest.mark.parametrize("attack", [one for one in hostile.attacks(*FORMS) if one.code is not None], ids=str)
def test_a_start_fails_with_its_code(server: Server, script: ModuleType, tmp_path: Path, attack: Attack) -> None:
    archive = tmp_path / "attack.tar"
    archive.write_bytes(hostile.oci_archive(attack, script))
    overrides = {"memory": "32M", "accel": "tcg", "restore": "require" if attack.form == "ramsnap" else "auto"}
    reply = server.call("POST", "/start", {"manifest": f"oci-archive:{archive}", "overrides": overrides})
    document = reply.json
    if reply.status == 200:
        document = server.wait(document["instance_id"], "error", "running")
        server.post("/remove", {"instance_id": document["instance_id"], "force": True})
        document = document["error"]
    other = {"ramsnap": {"snapshot-incompatible"}, "manifest": {"registry-protocol"}}.get(attack.form, set())
    assert document["code"] in {attack.code} | other, document
    assert reply.status != 500


def test_the_command_line_is_the_same_program(tmp_path: Path, script: ModuleType) -> None:
    """As the other tests call it inside their own process."""
    ovm = Ovm(tmp_path / "root", tmp_path)
    attack = next(one for one in hostile.attacks("qcow2") if one.name == "a backing file")
    (tmp_path / "attack.tar").write_bytes(hostile.oci_archive(attack, script))
    ovm.ok("pull", f"oci-archive:{tmp_path / 'attack.tar'}", "-t", "web:1")
    done = ovm("run", "-d", "web:1", "--json")
    assert (done.code, done.error["code"]) == (3, attack.code)
    assert ovm.ok("ps", "-aq").out == ""
