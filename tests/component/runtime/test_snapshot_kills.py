"""Whoever takes a snapshot is killed, at any moment: the guest goes on, and nothing half-made is seen."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from support.guests import MEMORY, Console, qemu_children

from ovms.artifact.resolve import Found, find
from ovms.errors import OvmsError
from ovms.oci.collector import collect
from ovms.oci.fsck import Uses, check
from ovms.oci.reference import Reference
from ovms.runtime import snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.states import State

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG, restore=RestorePolicy.REQUIRE)
#: Few in the quick tests: each is another moment.
KILLS = int(os.environ.get("OVMS_KILLS", "4"))


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def in_child(work: Callable[[], object], after: float | None) -> float:
    """Does *work* in a process of its own, which is killed *after* so many seconds. Returns the seconds that it lived."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0 or after is not None
    return time.monotonic() - began


def whole(runtime: Runtime) -> None:
    """The store is sound, and what a killed command left is gone after a prune."""
    collect(runtime.layout, runtime.instances.needs)
    assert list(runtime.layout.staging_root.iterdir()) == []
    report = check(runtime.layout, lambda: Uses(runtime.instances.needs()))
    assert not report.findings, report.findings


@pytest.mark.spec("RUN-13", "RUN-19")
@pytest.mark.parametrize("kind", ["booted", "clone"])
@pytest.mark.long
def test_a_snapshot_that_is_killed_at_any_time(kind: str, runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    count = console(runtime, record).ping()
    if kind == "clone":
        snapshots.take(runtime, record, Reference.parse("echo:base"))
        runtime.remove(runtime.instances.find(record.id), force=True)
        record = runtime.start(find(runtime.layout, "echo:base"), RESTORE).record

    def take() -> None:
        snapshots.take(
            Runtime(runtime.root), Runtime(runtime.root).instances.find(record.id), Reference.parse("echo:snap")
        )

    took = in_child(take, None)
    rng = random.Random(7)
    for _ in range(KILLS):
        in_child(take, rng.random() * took)
        Runtime(runtime.root).instances.recover()
        newest = runtime.instances.find(record.id)
        assert runtime.instances.status(newest).state is State.RUNNING
        assert not newest.pausing
        count += 1
        assert console(runtime, newest).ping() == count
        # by its name it is the one of before, or a new one: always a whole one
        clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
        assert 1 < console(runtime, clone).ping() <= count + 1
        runtime.remove(clone, force=True)
        whole(runtime)
    snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse("echo:last"))
    clone = runtime.start(find(runtime.layout, "echo:last"), RESTORE).record
    assert console(runtime, clone).ping() == count + 1
    assert console(runtime, record).ping() == count + 1


def recovered(runtime: Runtime) -> None:
    # a process that was just being executed holds the lock for a moment longer
    deadline = time.monotonic() + 20
    while True:
        runtime.instances.recover()
        states = {runtime.instances.status(record).state for record in runtime.instances.records()}
        if not states & {State.STARTING, State.PAUSED}:
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.spec("RUN-19")
def test_a_restore_that_is_killed_at_any_time(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    snapshots.take(runtime, record, Reference.parse("echo:snap"))
    runtime.remove(runtime.instances.find(record.id), force=True)

    def start() -> None:
        child = Runtime(runtime.root)
        child.start(find(child.layout, "echo:snap"), RESTORE)

    took = in_child(start, None)
    rng = random.Random(8)
    for _ in range(KILLS):
        collect(runtime.layout, runtime.instances.needs)  # the memory is unpacked anew, now and then
        in_child(start, rng.random() * took)
        other = Runtime(runtime.root)
        recovered(other)
        for found in other.instances.records():
            state = other.instances.status(found).state
            # noted as what it is: it runs, or its start was broken off
            assert state in (State.RUNNING, State.ERROR, State.STOPPED), state
            if state is State.RUNNING:
                assert console(runtime, found).ping() == 1
            try:
                other.remove(found, force=True)
            except OvmsError as exc:
                raise AssertionError(found) from exc
        assert qemu_children(runtime.root.path) == []
        whole(runtime)
