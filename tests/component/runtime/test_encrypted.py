"""Encrypted snapshots: real QEMU, and a guest with a secret in its memory that no file may ever have."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.guests import MEMORY, Console

from ovms.artifact.resolve import Found, find
from ovms.errors import IdentityMissing
from ovms.oci.reference import Reference
from ovms.runtime import snapshots
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, Path]:
    return make_pair(tmp_path / "identity.txt")


def make_pair(path: Path) -> tuple[str, Path]:
    from pyrage import x25519

    identity = x25519.Identity.generate()
    path.write_text(f"# public key: {identity.to_public()}\n{identity}\n")
    return str(identity.to_public()), path


def test_x(runtime: Runtime, echo: Found, pair: tuple[str, Path]) -> None:
    to, identity = pair
    record = runtime.start(echo, TCG).record
    console = Console(runtime.instances.directory(record.id))
    console.wait_for("READY")
    assert console.ping() == 1
    taken = snapshots.take(runtime, record, Reference.parse("echo:enc"), encrypt=[to])
    print(taken.to_json(), [l.media_type for l in taken.artifact.image.layers])
    found = find(runtime.layout, "echo:enc")
    runtime.remove(runtime.instances.find(record.id), force=True)
    with pytest.raises(IdentityMissing) as info:
        runtime.start(found, RunOptions(accel=Accel.TCG))
    print(info.value.message, info.value.hint)
    again = runtime.start(found, RunOptions(accel=Accel.TCG, identities=(identity,))).record
    assert Console(runtime.instances.directory(again.id)).ping() == 2
    print(list(runtime.layout.derived_dir.iterdir()), again.memory_locked)
