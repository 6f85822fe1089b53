"""A snapshot of a running VM is found from the artifact that the VM was started from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import Ovm
from support.guests import Console
from support.registry import KINDS, Registry


@pytest.fixture(params=KINDS)
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    registry = KINDS[request.param](tmp_path / "registry")
    yield registry
    registry.close()


@pytest.mark.spec("OCI-19", "OCI-20")
def test_a_snapshot_is_a_referrer_of_its_base(ovm: Ovm, project: Path, registry: Registry) -> None:
    base, warm = f"{registry.host}/t/echo:1", f"{registry.host}/t/echo:warm"
    digest = ovm.ok("build", project, "-t", base).out.strip()
    ovm.ok("push", base)
    instance = ovm.ok("run", "-d", "--accel", "tcg", "--memory", "32m", base).out.strip()
    Console(ovm.root / "instances" / instance).wait_for("READY")
    taken = ovm.ok("snapshot", instance, "-t", warm, "--json").json
    assert taken["pushed"]
    for where in ((), ("--local",)):
        value = ovm.ok("referrers", base, "--json", *where).json
        assert value["digest"] == digest
        (node,) = (one for one in value["referrers"] if one["kind"] == "artifact")
        assert node["digest"] == taken["snapshot_ref"]
        assert node["artifact_type"] == "application/vnd.ovms.manifest.v1+json"
        # how each of the two was made is told here alone: nobody asked to send it
        told = ["provenance"] if where else []
        assert [one["kind"] for one in value["referrers"] if one is not node] == told
        assert [one["kind"] for one in node["referrers"]] == told
