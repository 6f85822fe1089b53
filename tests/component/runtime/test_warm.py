"""Warm pools, in this process: what waits, what is handed out, and what becomes of it when somebody is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import MEMORY, Console, qemu_children

from ovms import process
from ovms.artifact.resolve import Found, find
from ovms.errors import (
    Conflict,
    DiskFull,
    InputError,
    NameTaken,
    PortInUse,
    ReferenceNotFound,
    SnapshotIncompatible,
    VmmError,
)
from ovms.oci.collector import Options, collect
from ovms.oci.reference import Reference
from ovms.runtime import snapshots, warm
from ovms.runtime.identity import Identity
from ovms.runtime.record import Record, StartKey
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.runtime.warm import Pools
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import of_bytes
from ovms.spec.states import State
from ovms.vmm.model import PortForward
from ovms.vmm.qemu.control import QemuControl

ANY = RunOptions()


def no_registry(host: str) -> object:
    raise AssertionError(host)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


@pytest.fixture
def snap(runtime: Runtime, echo: Found) -> str:
    """The name of a snapshot of a guest that was asked twice."""
    record = runtime.start(echo, RunOptions(memory=MEMORY, accel=Accel.TCG)).record
    console(runtime, record).wait_for("READY")
    assert [console(runtime, record).ping() for _ in range(2)] == [1, 2]
    snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse("echo:snap"))
    runtime.kill(record)
    runtime.remove(record)
    return "echo:snap"


@pytest.fixture
def pools(runtime: Runtime) -> Iterator[Pools]:
    with contextlib.closing(warm.opened(runtime)) as pools:
        yield pools
    assert parked(runtime) == []


def parked(runtime: Runtime) -> list[str]:
    return [path.name for path in runtime.root.parked.iterdir() if not path.name.startswith(".")]


def fill(pools: Pools, name: str, size: int) -> None:
    pools.set(name, size, no_registry)  # type: ignore[arg-type]
    while pools.work():
        pass
    assert pools.list()[0]["ready"] == size, pools.list()


def taken(pools: Pools, name: str, options: RunOptions = ANY, key: StartKey | None = None) -> Record:
    handed = pools.take(name, options, key)
    assert handed is not None
    handed.finish()
    return handed.record


@pytest.mark.spec("RUN-21", "RUN-20")
def test_each_start_gets_a_clone_of_its_own(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 3)
    assert runtime.instances.records() == []
    first, second = taken(pools, snap), taken(pools, snap, replace(ANY, name="mine", remove_on_exit=True))
    assert [console(runtime, record).ping() for record in (first, second)] == [3, 3]
    assert console(runtime, first).ping() == 4
    assert second.name == "mine"
    assert first.name.startswith("echo-")
    assert {record.id for record in runtime.instances.records()} == {first.id, second.id}
    for record in (first, second):
        newest = runtime.instances.find(record.id)
        # written down afterwards, when it has become itself
        assert newest.identity == Identity(note="no agent runs in the guest")
        assert replace(newest, identity=None, timings=record.timings) == record
        assert (newest.warm, newest.restored, newest.pausing) == (True, True, False)
        assert runtime.instances.status(newest).state is State.RUNNING
        assert newest.start_ms is not None
    assert len({record.jail.user for record in (first, second)} - {None}) in (0, 2)
    assert pools.list()[0]["ready"] == 1
    assert pools.list()[0]["handed_out"] == 2
    assert pools.work()
    assert pools.list()[0]["ready"] == 2
    # what the first of them wrote is in its own snapshot, and it is an instance as any other
    more = snapshots.take(runtime, runtime.instances.find(first.id), Reference.parse("echo:more"))
    assert more.artifact.manifest.ram_snapshot is not None
    runtime.kill(first)
    assert runtime.instances.status(runtime.instances.find(first.id)).state is State.STOPPED


def test_who_wants_a_double_gets_one_from_a_pool_too(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 1)
    record = taken(pools, snap, replace(ANY, keep_identity=True))
    assert record.warm
    assert runtime.instances.find(record.id).identity is None


@pytest.mark.parametrize(
    "options",
    [
        replace(ANY, memory=MEMORY),
        replace(ANY, accel=Accel.TCG),
        replace(ANY, restore=RestorePolicy.NEVER),
        replace(ANY, vcpus=1),
    ],
)
def test_a_start_that_asks_for_more_takes_the_usual_way(
    options: RunOptions, runtime: Runtime, snap: str, pools: Pools
) -> None:
    fill(pools, snap, 1)
    assert pools.take(snap, options) is None
    assert pools.take("echo:1", ANY) is None
    assert pools.list()[0]["ready"] == 1


def test_a_name_that_is_taken_takes_no_clone(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 2)
    taken(pools, snap, replace(ANY, name="mine"))
    with pytest.raises(NameTaken):
        pools.take(snap, replace(ANY, name="mine"))
    assert pools.list()[0]["ready"] == 1
    assert console(runtime, taken(pools, snap)).ping() == 3


@pytest.mark.spec("RUN-11")
def test_a_key_makes_one_instance(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 2)
    key = StartKey(of_bytes(b"key"), of_bytes(b"body"))
    record = taken(pools, snap, key=key)
    assert runtime.instances.find(record.id).start_key == key
    assert pools.take(snap, ANY, key) is None  # who asks goes on as without a pool, and finds it
    assert pools.list()[0]["ready"] == 1


def test_ports_are_forwarded(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 2)
    ports = (PortForward("127.0.0.1", 0, 80),)
    record = taken(pools, snap, replace(ANY, ports=ports))
    port = record.ports[0].host_port
    assert port
    assert console(runtime, record).ping() == 3
    with pytest.raises(PortInUse):
        pools.take(snap, replace(ANY, ports=(PortForward("127.0.0.1", port, 80),)))
    assert pools.list()[0]["ready"] == 1


def test_a_start_that_fails_before_it_is_an_instance_leaves_nothing(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pools, snap, 1)

    def full(*arguments: object, **more: object) -> None:
        raise DiskFull("no room")

    with monkeypatch.context() as patch, pytest.raises(DiskFull):
        patch.setattr(warm, "save", full)
        pools.take(snap, replace(ANY, name="mine"))
    assert runtime.instances.records() == []
    assert parked(runtime) == []
    assert qemu_children(runtime.root.path) == []
    assert pools.work()
    assert console(runtime, taken(pools, snap)).ping() == 3


def test_dead_ones_are_never_handed_out(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 2)
    first = Runtime(runtime.root, parked=True).instances.records()[0]
    assert first.process is not None
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(20)
    assert console(runtime, taken(pools, snap)).ping() == 3
    assert pools.take(snap, ANY) is None
    pools.set(snap, 0, no_registry)  # type: ignore[arg-type]
    pools.tidy()
    assert parked(runtime) == []


def test_one_that_dies_as_it_is_resumed_is_no_instance(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pools, snap, 1)

    def fail(self: QemuControl, **_: object) -> None:
        raise VmmError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(QemuControl, "resume", fail)
        assert pools.take(snap, ANY) is None
    pools.set(snap, 0, no_registry)  # type: ignore[arg-type]
    pools.tidy()
    assert runtime.instances.records() == []
    assert qemu_children(runtime.root.path) == []


def test_whoever_is_killed_before_the_resume_leaves_an_instance_that_the_next_lets_go(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pools, snap, 1)

    class Killed(BaseException):
        pass

    def kill(self: QemuControl, **_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(QemuControl, "resume", kill)
        pools.take(snap, ANY)
    (record,) = runtime.instances.records()
    assert runtime.instances.status(record).state is State.PAUSED
    Runtime(runtime.root).instances.recover()
    assert console(runtime, record).ping() == 3
    assert runtime.instances.status(runtime.instances.find(record.id)).state is State.RUNNING


def test_a_pool_of_nothing_ends(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 2)
    assert pools.set(snap, 0, no_registry)["ready"] == 0  # type: ignore[arg-type]
    assert pools.list() == []
    assert parked(runtime) == []
    assert not pools.work()
    with pytest.raises(ReferenceNotFound):
        pools.set(snap, 0, no_registry)  # type: ignore[arg-type]


def test_a_smaller_pool_is_made_smaller(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 3)
    pools.set(snap, 1, no_registry)  # type: ignore[arg-type]
    pools.tidy()
    assert pools.list()[0]["ready"] == len(parked(runtime)) == 1


def test_what_has_waited_too_long_is_replaced(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pools, snap, 1)
    (old,) = parked(runtime)
    monkeypatch.setattr(warm, "AGE_MAX", 0.0)
    pools.tidy()
    assert parked(runtime) == []
    monkeypatch.undo()
    assert pools.work()
    assert parked(runtime) != [old]
    assert console(runtime, taken(pools, snap)).ping() == 3


def test_a_host_that_runs_short_of_memory_gets_it_back(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pools, snap, 1)
    monkeypatch.setattr(process, "memory_available", lambda: warm.RESERVE - 1)
    assert not pools.work()
    pools.tidy()
    assert parked(runtime) == []
    assert not pools.work()
    monkeypatch.undo()
    assert pools.work()
    assert pools.list()[0]["ready"] == 1


def test_the_name_s_new_artifact_takes_the_old_one_s_place(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 1)
    record = taken(pools, snap)
    console(runtime, record).ping()
    snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse(snap))
    assert pools.work()
    assert pools.take(snap, ANY) is None  # what waits is of the old one
    pools.tidy()
    assert parked(runtime) == []
    assert pools.work()
    assert console(runtime, taken(pools, snap)).ping() == 4


@pytest.mark.parametrize(
    ("name", "size", "error"),
    [
        ("echo:1", 1, SnapshotIncompatible),
        ("echo:none", 1, ReferenceNotFound),
        ("echo:snap", -1, InputError),
        ("echo:snap", 1001, InputError),
    ],
)
def test_what_can_be_no_pool(
    name: str, size: int, error: type[Exception], runtime: Runtime, snap: str, pools: Pools
) -> None:
    with pytest.raises(error):
        pools.set(name, size, no_registry)  # type: ignore[arg-type]
    assert pools.list() == []
    assert not runtime.root.pools.exists()


def test_why_one_could_not_be_made_is_said(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> object:
        raise VmmError("no")

    monkeypatch.setattr(Runtime, "start", fail)
    pools.set(snap, 1, no_registry)  # type: ignore[arg-type]
    assert pools.work()
    assert pools.list()[0]["problem"] == "no"
    assert not pools.work()  # not at once again
    monkeypatch.undo()
    pools.set(snap, 1, no_registry)  # type: ignore[arg-type]
    assert pools.work()
    assert pools.list()[0]["problem"] is None


def test_what_waits_is_in_use(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 1)
    digest = find(runtime.layout, snap).artifact.digest
    collect(runtime.layout, runtime.instances.needs, Options(unused=True))
    assert find(runtime.layout, snap).artifact.digest == digest
    assert console(runtime, taken(pools, snap)).ping() == 3


def test_one_server_has_the_pools(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 1)
    with pytest.raises(Conflict):
        warm.opened(runtime)
    warm.sweep_left(runtime.root)
    assert len(parked(runtime)) == 1


def test_what_a_killed_server_left_is_ended_and_its_pools_come_again(runtime: Runtime, snap: str) -> None:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            pools = warm.opened(runtime)
            fill(pools, snap, 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(parked(runtime)) == 2
    warm.sweep_left(runtime.root)
    assert parked(runtime) == []
    assert qemu_children(runtime.root.path) == []
    with contextlib.closing(warm.opened(runtime)) as pools:
        said: list[str] = []
        pools.load(no_registry, said.append)  # type: ignore[arg-type]
        assert (said, [(one["manifest"], one["size"]) for one in pools.list()]) == ([], [(snap, 2)])
        assert pools.work()
        assert console(runtime, taken(pools, snap)).ping() == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pools": 1}', '{"pools": [{"manifest": "x"}]}', "{}"])
def test_a_damaged_list_of_pools_stops_nobody(text: str, runtime: Runtime, pools: Pools) -> None:
    runtime.root.pools.write_text(text)
    said: list[str] = []
    pools.load(no_registry, said.append)  # type: ignore[arg-type]
    assert len(said) == 1
    assert str(runtime.root.pools) in said[0]


def test_a_pool_that_is_not_to_be_had_is_left_out(runtime: Runtime, snap: str, pools: Pools) -> None:
    pools.set(snap, 1, no_registry)  # type: ignore[arg-type]
    document = runtime.root.pools.read_text().replace('"manifest": "echo:snap"', '"manifest": "echo:none"')
    runtime.root.pools.write_text(document)
    said: list[str] = []
    pools.load(no_registry, said.append)  # type: ignore[arg-type]
    assert len(said) == 1
    assert "echo:none" in said[0]


def test_a_start_soon_after_another_finds_the_host_idle(
    runtime: Runtime, snap: str, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pools, snap, 2)
    taken(pools, snap)
    waited: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(warm, "QUIET", 60.0)
        patch.setattr(time, "sleep", waited.append)
        assert pools.work()  # waits, and spawns nothing
    assert 0 < waited[0] <= 60
    assert len(parked(runtime)) == 1
    monkeypatch.setattr(warm, "QUIET", 0.0)
    assert pools.work()
    assert len(parked(runtime)) == 2


def test_nothing_of_a_parked_clone_is_told_as_an_instance(runtime: Runtime, snap: str, pools: Pools) -> None:
    fill(pools, snap, 1)
    assert runtime.instances.records() == []
    (name,) = parked(runtime)
    assert runtime.instances.by_id(name) is None
    assert Path(runtime.root.parked / name / "overlay-0.qcow2").exists()
