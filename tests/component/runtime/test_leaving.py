"""What becomes of an instance after a snapshot: it goes on, stands still, or was ended, at the very moment of the snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.guests import MEMORY, Console

from ovms.artifact.resolve import Found, find
from ovms.errors import AgentUnavailable, DiskFull, ResourceError, StateConflict
from ovms.memory import content, snapshot
from ovms.oci.reference import Reference
from ovms.runtime import scrub, snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, Leave
from ovms.spec.digest import Digest
from ovms.spec.states import State

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


@pytest.fixture
def running(runtime: Runtime, echo: Found) -> Record:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    console(runtime, record).ping()
    return record


def take(runtime: Runtime, record: Record, leave: Leave, *, scrub: bool = False) -> snapshots.Taken:
    record = runtime.instances.find(record.id)
    return snapshots.take(runtime, record, Reference.parse("echo:snap"), leave=leave, scrub=scrub)


def state(runtime: Runtime, record: Record) -> State:
    return runtime.instances.status(runtime.instances.find(record.id)).state


@pytest.mark.spec("RUN-13", "STA-2")
def test_one_that_is_left_paused_goes_on_from_there(runtime: Runtime, running: Record) -> None:
    take(runtime, running, Leave.PAUSED)
    assert state(runtime, running) is State.PAUSED
    runtime.instances.recover()
    assert state(runtime, running) is State.PAUSED
    runtime.resume(runtime.instances.find(running.id))
    assert state(runtime, running) is State.RUNNING
    assert console(runtime, running).ping() == 2
    # of one that stands still already
    runtime.pause(runtime.instances.find(running.id))
    for leave in (Leave.RUNNING, Leave.PAUSED):
        take(runtime, running, leave)
        assert state(runtime, running) is State.PAUSED
    runtime.resume(runtime.instances.find(running.id))
    assert console(runtime, running).ping() == 3


@pytest.mark.spec("RUN-13", "RUN-19")
def test_one_that_is_stopped_lives_on_in_its_clones(runtime: Runtime, running: Record) -> None:
    take(runtime, running, Leave.STOPPED)
    status = runtime.instances.status(runtime.instances.find(running.id))
    assert (status.state, status.record.stop_requested, status.record.pausing) == (State.STOPPED, True, False)
    assert running.process is not None
    assert not running.process.alive()
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    assert console(runtime, clone).ping() == 2
    # and can be booted anew, on its disk
    again = runtime.start_again(runtime.instances.find(running.id))
    console(runtime, again).wait_for("READY")


@pytest.mark.spec("RUN-13")
@pytest.mark.parametrize("leave", [Leave.PAUSED, Leave.STOPPED])
@pytest.mark.parametrize("error", [DiskFull("no room"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_where_the_snapshot_fails_it_goes_on(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch, leave: Leave, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        # the guest stands still all the while
        assert runtime.instances.find(running.id).pausing
        raise error

    monkeypatch.setattr(snapshot, "store", fail)
    with pytest.raises(type(error)):
        take(runtime, running, leave)
    record = runtime.instances.find(running.id)
    assert (record.pausing, record.paused, record.stop_requested) == (False, False, False)
    assert state(runtime, running) is State.RUNNING
    assert console(runtime, running).ping() == 2


@pytest.mark.spec("RUN-13")
def test_without_an_agent_there_is_no_scrub_and_no_snapshot(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wanted in (AgentUnavailable, ResourceError):
        with pytest.raises(wanted) as caught:
            take(runtime, running, Leave.STOPPED, scrub=True)
        assert caught.value.hint
        assert state(runtime, running) is State.RUNNING
        assert runtime.layout.find("echo:snap") is None
        monkeypatch.setattr(scrub, "_HOST_KEPT", 1 << 50)
    assert console(runtime, running).ping() == 2
    runtime.pause(runtime.instances.find(running.id))
    with pytest.raises(StateConflict, match="is paused"):
        take(runtime, running, Leave.RUNNING, scrub=True)


def test_what_of_a_memory_is_not_zero(runtime: Runtime, running: Record, tmp_path: Path) -> None:
    booted = scrub.measure(runtime.instances, running)
    assert 0 < booted < MEMORY
    taken = take(runtime, running, Leave.RUNNING)
    ram = taken.artifact.manifest.ram_snapshot
    assert ram is not None
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    with snapshot.materialise(runtime.layout, Digest(ram.ref)).open("rb") as image:
        stored = content.nonzero(image.fileno(), MEMORY)
    assert abs(stored - booted) < 64 * 4096
    # of a clone both what it came from and what it wrote count, and no hole of the former is filled
    watcher = clone.watcher
    assert watcher is not None
    fds = Path(f"/proc/{watcher.pid}/fd").iterdir()
    held = next(fd for fd in fds if "memfd:ovms-template" in str(fd.readlink()))
    before = held.stat().st_blocks
    assert abs(scrub.measure(runtime.instances, clone) - stored) < 64 * 4096
    assert held.stat().st_blocks == before
    sparse = tmp_path / "sparse"
    with sparse.open("w+b") as file:
        file.truncate(1 << 30)
        file.seek(5 * 4096)
        file.write(b"\0" * 4095 + b"x" + b"y" + bytes(8191))
        file.flush()
        assert content.nonzero(file.fileno(), 1 << 30) == 2 * 4096
