"""Snapshots under KVM, with the bare guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from support import kvm
from support.guests import MEMORY, Console

from ovms.artifact.resolve import Found, find
from ovms.oci.reference import Reference
from ovms.runtime import snapshots, warm
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy

pytestmark = pytest.mark.long

RESTORE = RunOptions(accel=Accel.KVM, restore=RestorePolicy.REQUIRE)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


@pytest.fixture
def running(runtime: Runtime, echo: Found) -> Iterator[Record]:
    """A bare guest under KVM; skips where it does not come up."""
    try:
        with kvm.running(runtime, echo, MEMORY) as record:
            yield record
    except kvm.NoKvm as exc:
        pytest.skip(str(exc))


def test_a_snapshot_under_kvm(runtime: Runtime, running: Record) -> None:
    assert running.machine.accel is Accel.KVM
    assert [console(runtime, running).ping() for _ in range(3)] == [1, 2, 3]
    first = snapshots.take(runtime, running, Reference.parse("echo:kvm"))
    # it goes on on a private copy: KVM has followed the mapping
    assert console(runtime, running).ping() == 4
    with runtime.instances.control(runtime.instances.find(running.id)) as control:
        assert control.ram().private
    second = snapshots.take(runtime, runtime.instances.find(running.id), Reference.parse("echo:kvm2"))
    assert (first.parents, second.parents) == (0, 1)
    assert console(runtime, running).ping() == 5
    clones = [runtime.start(find(runtime.layout, f"echo:{name}"), RESTORE).record for name in ("kvm", "kvm2")]
    assert [console(runtime, clone).ping() for clone in clones] == [4, 5]
    assert console(runtime, clones[0]).ping() == 5
    runtime.remove(runtime.instances.find(running.id), force=True)
    alone = runtime.start(find(runtime.layout, "echo:kvm2"), RESTORE).record
    assert console(runtime, alone).ping() == 5


def test_a_warm_pool_under_kvm(runtime: Runtime, running: Record) -> None:
    assert console(runtime, running).ping() == 1
    snapshots.take(runtime, running, Reference.parse("echo:kvm"))
    with contextlib.closing(warm.opened(runtime)) as pools:
        pools.set("echo:kvm", 2, lambda host: None)  # type: ignore[arg-type, return-value]
        while pools.work():
            pass
        for _ in range(2):
            handed = pools.take("echo:kvm", RunOptions())
            assert handed is not None
            handed.finish()
            assert console(runtime, handed.record).ping() == 2
