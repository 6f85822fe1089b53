"""Artifacts with a bootstrap config, up to what the guest finds: real QEMU, bare guest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.guests import MEMORY, Console, write_project

from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.disk import seed
from ovms.errors import InputError, ManifestInvalid, SnapshotIncompatible, Unsupported
from ovms.oci.reference import Reference
from ovms.runtime import snapshots
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.runtime.seeds import Seed
from ovms.spec import bootstrap
from ovms.spec.choices import Accel, RestorePolicy

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
CONFIG = {"profile": "cloud-init", "entrypoint": ["/bin/service"], "env": ["TOKEN=s3cret"]}

Make = Callable[[dict[str, Any]], Found]


@pytest.fixture
def make(runtime: Runtime, echo_kernel: Path, tmp_path: Path) -> Make:
    def build(config: dict[str, Any]) -> Found:
        manifest = write_project(tmp_path / "workload", echo_kernel, name="work")
        (manifest.parent / "bootstrap.json").write_text(json.dumps(config))
        manifest.write_text(manifest.read_text() + "bootstrap: {ref: bootstrap.json}\n")
        Builder(runtime.layout, lambda host: pytest.fail(host)).build(manifest, name="work:1")
        return find(runtime.layout, "work:1")

    return build


@pytest.mark.spec("BOOT-33", "BOOT-43", "BOOT-44", "BOOT-51", "BOOT-52")
def test_the_seed_holds_the_config_and_nothing_else(runtime: Runtime, make: Make) -> None:
    record = runtime.start(make(CONFIG), replace(TCG, name="web")).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")
    image = (runtime.instances.directory(record.id) / "seed.img").read_bytes()
    config = bootstrap.parse(json.dumps(CONFIG).encode())
    expected = {
        "meta-data": bootstrap.meta_data(record.id, "web").encode(),
        "user-data": bootstrap.user_data(config).encode(),
    }
    assert image == seed.image(expected)
    assert json.loads(expected["meta-data"]) == {"instance-id": record.id, "local-hostname": "web"}
    assert (record.workload, record.user_data) == (True, True)
    assert "s3cret" not in (runtime.instances.directory(record.id) / "record.json").read_text()


@pytest.mark.spec("BOOT-10")
@pytest.mark.parametrize("profile", [{}, {"profile": "ovms-init"}, {"profile": "other"}])
def test_a_profile_that_we_do_not_have_is_refused(runtime: Runtime, make: Make, profile: dict[str, str]) -> None:
    with pytest.raises(Unsupported, match="bootstrap profile"):
        runtime.start(make({"cmd": ["x"], **profile}), TCG)
    assert runtime.instances.records() == []


@pytest.mark.spec("BOOT-11", "BOOT-12")
def test_a_config_is_checked_before_there_is_a_vm(runtime: Runtime, make: Make) -> None:
    with pytest.raises(InputError, match="no program"):
        runtime.start(make({"profile": "cloud-init"}), TCG)
    found = make(CONFIG)
    assert found.artifact.manifest.bootstrap is not None
    blob = runtime.layout.path(found.artifact.blob(found.artifact.manifest.bootstrap.ref).digest)
    blob.chmod(0o600)
    blob.write_text('{"profile": "cloud-init", "cmd": 1}'.ljust(blob.stat().st_size))
    with pytest.raises(ManifestInvalid, match="bootstrap config"):
        runtime.start(found, TCG)
    assert runtime.instances.records() == []


def test_what_the_user_tells_the_guest_does_not_go_with_it(runtime: Runtime, make: Make) -> None:
    with pytest.raises(InputError, match="has a bootstrap config"):
        runtime.start(make(CONFIG), replace(TCG, seed=Seed(hostname="x")))


@pytest.mark.spec("BOOT-34")
def test_no_ram_snapshot_is_taken_of_one_or_restored_to_one(
    runtime: Runtime, make: Make, echo: Found, tmp_path: Path
) -> None:
    record = runtime.start(make(CONFIG), TCG).record
    with pytest.raises(Unsupported, match="same bytes"):
        snapshots.take(runtime, record, Reference.parse("work:snap"))
    # somebody else's artifact has both
    plain = runtime.start(echo, TCG).record
    found = snapshots.take(runtime, plain, Reference.parse("echo:snap")).artifact
    manifest = replace(found.manifest, bootstrap=make(CONFIG).artifact.manifest.bootstrap)
    both = Found("both:1", replace(found, manifest=manifest))
    started = runtime.start(both, TCG)
    assert started.not_restored is not None
    assert "same bytes" in started.not_restored
    with pytest.raises(SnapshotIncompatible, match="same bytes"):
        runtime.start(both, replace(TCG, restore=RestorePolicy.REQUIRE))
