"""A server asks the policies: 403, and a problem document that says why."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support import policies
from support.cli import Ovm
from support.policies import ACCEPT, REJECT, came_from, signed
from support.server import LEAST, Server, prepare, with_snapshot

from ovms.artifact.resolve import find
from ovms.oci.layout import Layout
from ovms.trust import keys

KEY: Final = keys.generate()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, echo_kernel: Path, qemu_cache: Path) -> Iterator[Server]:
    """A server with the snapshot echo:snap, and the policy beside its root."""
    directory = tmp_path_factory.mktemp("policy")
    hold(directory, ACCEPT)
    root = prepare(directory, echo_kernel, qemu_cache)
    with with_snapshot(root, env={"OVMS_POLICY": str(directory / "policy.json")}) as running:
        yield running


def hold(directory: Path, default: dict[str, Any], **scopes: Any) -> None:
    policies.write(directory / "policy.json", policies.document(default, {"us": KEY}, scopes=scopes))


def refused(server: Server, manifest: str, code: str) -> dict[str, Any]:
    reply = server.call("POST", "/start", {"manifest": manifest, "overrides": {}})
    assert reply.status == 403, reply.body
    problem = reply.json
    assert problem["code"] == code
    assert problem["scope"]
    return dict(problem)


@pytest.mark.spec("RUN-3")
def test_a_start_that_a_policy_refuses(guarded: Server) -> None:
    hold(guarded.root.parent, REJECT)
    assert "rule for default" in refused(guarded, "echo:1", "policy-refused")["detail"]
    assert guarded.get("/instances") == {"instances": []}
    hold(guarded.root.parent, ACCEPT, local=signed("us"))
    assert "us (key " in refused(guarded, "echo:1", "signature-missing")["detail"]
    hold(guarded.root.parent, ACCEPT)
    started = guarded.post("/start", {"manifest": "echo:1", "overrides": LEAST})["instance_id"]
    guarded.wait(started, "running")


def test_a_warm_clone_is_not_handed_out_when_the_policy_has_changed(guarded: Server) -> None:
    hold(guarded.root.parent, ACCEPT)
    guarded.post("/warm", {"manifest": "echo:snap", "size": 1})
    _ready(guarded)
    hold(guarded.root.parent, ACCEPT, local={**ACCEPT, "ramSnapshots": signed("us")})
    assert "its RAM snapshot" in refused(guarded, "echo:snap", "signature-missing")["detail"]
    hold(guarded.root.parent, REJECT, local=ACCEPT)
    for _ in range(2):
        _ready(guarded)
        assert guarded.post("/start", {"manifest": "echo:snap", "overrides": {}})["state"] == "running"
    hold(guarded.root.parent, REJECT)
    assert guarded.call("POST", "/warm", {"manifest": "echo:snap", "size": 2}).status == 403
    hold(guarded.root.parent, ACCEPT)
    guarded.post("/warm", {"manifest": "echo:snap", "size": 0})


def test_the_command_line_says_the_same(guarded: Server, tmp_path: Path) -> None:
    hold(guarded.root.parent, ACCEPT, **{"oci-archive": signed("us"), "local": ACCEPT})
    layout = Layout(guarded.root / "store")
    env = {"OVMS_POLICY": str(guarded.root.parent / "policy.json")}
    for host in ("local", str(guarded.root / "ovms.sock")):
        ovm = Ovm(guarded.root, tmp_path, extra={**env, "OVMS_SOCKET": host})
        assert ovm.ok("policy", "check", "echo:1").out.splitlines()[-1] == "accepted"
    digest = find(layout, "echo:1").artifact.digest
    came_from(layout, digest, "oci-archive")
    for host in ("local", str(guarded.root / "ovms.sock")):
        ovm = Ovm(guarded.root, tmp_path, extra={**env, "OVMS_SOCKET": host})
        for command in (("run", "-d", "echo:1"), ("fork", "echo:1"), ("export", "echo:1", "-o", str(tmp_path / "x"))):
            done = ovm(*command)
            assert done.code == 14, done.err
            assert "rule for oci-archive" in done.err
        checked = ovm("policy", "check", "echo:1", "--json")
        assert checked.code == 14
        (verdict,) = checked.json["verdicts"]
        assert (verdict["rule"], verdict["allowed"]) == ("oci-archive", False)
    came_from(layout, digest, "other.example/x")


def _ready(server: Server) -> None:
    deadline = time.monotonic() + 30
    while server.get("/warm")["pools"][0]["ready"] < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_policy_that_can_t_be_used_is_the_server_s_fault(guarded: Server) -> None:
    (guarded.root.parent / "policy.json").write_text('{"version": 1}')
    reply = guarded.call("POST", "/start", {"manifest": "echo:1", "overrides": LEAST})
    assert (reply.status, reply.json["code"]) == (503, "host")
    assert "$.default is required" in reply.json["detail"]
    hold(guarded.root.parent, ACCEPT)
