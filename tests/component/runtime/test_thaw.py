"""Whoever has a guest's file systems frozen is killed: it is thawed, by the next command or by a server that runs."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path

import pytest
from support.cli import Ovm
from support.faulty import wait_until
from support.guests import MEMORY, Console, write_project
from support.server import Server

from ovms import fsutil
from ovms.artifact.build import Builder
from ovms.artifact.resolve import find
from ovms.errors import AgentUnavailable
from ovms.oci.collector import collect
from ovms.oci.fsck import Uses, check
from ovms.oci.reference import Reference
from ovms.runtime import commit, disks, quiesce, snapshots
from ovms.runtime.agent import Agent
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.states import State

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG, restore=RestorePolicy.REQUIRE)
#: Few in the quick tests: each is another moment.
KILLS = int(os.environ.get("OVMS_KILLS", "4"))


def no_registry(host: str) -> object:
    raise AssertionError(host)


class Vm:
    """A running guest that has an agent."""

    def __init__(self, runtime: Runtime, record: Record) -> None:
        self.runtime, self.id = runtime, record.id
        self.console = Console(runtime.instances.directory(record.id))

    @property
    def record(self) -> Record:
        return self.runtime.instances.find(self.id)

    def frozen(self) -> bool:
        with Agent(self.runtime.instances.files(self.record), wait=10) as agent:
            return bool(agent.execute("guest-fsfreeze-status") == "frozen")

    def wait_until_it_is_frozen(self, working: subprocess.Popen[bytes], before: int) -> None:
        deadline = time.monotonic() + 30
        while self.console.text().count("FREEZE") <= before:
            assert working.poll() is None, working.returncode
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def whole(self) -> None:
        """It runs, thawed, and nobody takes it for anything else."""
        newest = self.record
        assert (newest.fs_frozen, newest.pausing) == (False, False)
        assert self.runtime.instances.status(newest).state is State.RUNNING
        assert not self.frozen()
        assert self.console.text().count("FREEZE") == self.console.text().count("THAW")
        before = self.console.ping()
        assert self.console.ping() == before + 1


@pytest.fixture
def vm(runtime: Runtime, agent_kernel: Path, tmp_path: Path) -> Vm:
    manifest = write_project(tmp_path / "project", agent_kernel, name="agent")
    Builder(runtime.layout, no_registry).build(manifest, name="agent:1")  # type: ignore[arg-type]
    vm = Vm(runtime, runtime.start(find(runtime.layout, "agent:1"), TCG).record)
    vm.console.wait_for("READY\n")
    return vm


@pytest.fixture
def ovm(runtime: Runtime, tmp_path: Path) -> Ovm:
    return Ovm(runtime.root.path, tmp_path)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Server]:
    server = Server(root)
    try:
        yield server
    finally:
        assert server.close() == 0


def kill_frozen(vm: Vm, ovm: Ovm, words: tuple[object, ...], after: float) -> None:
    """``kill -9`` of a command, *after* so many seconds from when its guest is frozen."""
    before = vm.console.text().count("FREEZE")
    with ovm.popen(*words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as working:
        try:
            vm.wait_until_it_is_frozen(working, before)
            time.sleep(after)
        finally:
            working.kill()


def how_long_it_is_frozen(vm: Vm, ovm: Ovm, words: tuple[object, ...]) -> float:
    done = threading.Event()
    seen: list[float] = []

    def look() -> None:
        while not done.wait(0.001):
            if vm.record.fs_frozen:
                seen.append(time.monotonic())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        ovm.ok(*words)
    finally:
        done.set()
        looking.join()
    assert seen
    return seen[-1] - seen[0]


def store_is_whole(runtime: Runtime) -> None:
    collect(runtime.layout, runtime.instances.needs)
    assert not check(runtime.layout, lambda: Uses(runtime.instances.needs())).findings


@contextlib.contextmanager
def working(vm: Vm, work: Callable[[Runtime, Record], object]) -> Iterator[int]:
    """A process that does *work* under the instance's lock, and is killed at the end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            other = Runtime(vm.runtime.root)
            with other.instances.locked(other.instances.find(vm.id)) as newest:
                os.write(write, b"l")
                work(other, newest)
        finally:
            os._exit(1)
    try:
        assert os.read(read, 1) == b"l"
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def freeze_and_wait(runtime: Runtime, record: Record) -> None:
    instances = runtime.instances
    with instances.control(record) as control, quiesce.file_systems(instances, record, control):
        time.sleep(60)


def pause_and_wait(runtime: Runtime, record: Record) -> None:
    with runtime.instances.control(record) as control:
        disks.freeze(runtime.instances, record, control, lambda: time.sleep(60))


@pytest.mark.long
@pytest.mark.spec("RUN-19")
@pytest.mark.parametrize("command", ["commit", "export"])
def test_a_command_that_is_killed_while_its_guest_is_frozen(command: str, vm: Vm, ovm: Ovm, tmp_path: Path) -> None:
    words: tuple[object, ...] = ("commit", vm.id, "-t", "agent:committed")
    if command == "export":
        words = ("export", "--force", vm.id, "-o", tmp_path / "disk.img")
    took = how_long_it_is_frozen(vm, ovm, words)
    rng, found = random.Random(11), 0
    for number in range(KILLS):
        kill_frozen(vm, ovm, words, rng.random() * took if number else 0)
        found += vm.record.fs_frozen
        ovm.ok("ps")
        vm.whole()
        store_is_whole(vm.runtime)
    assert found > 0
    ovm.ok(*words)
    vm.whole()


@pytest.mark.spec("RUN-19")
def test_a_server_that_runs_thaws_what_a_killed_command_left(vm: Vm, ovm: Ovm) -> None:
    words = ("commit", vm.id, "-t", "agent:committed")
    with serving(vm.runtime.root.path) as server:
        for _ in range(2):
            kill_frozen(vm, ovm, words, 0)
            wait_until(lambda: not vm.record.fs_frozen, 20)
            vm.whole()
        assert server.state(vm.id) == "running"


@pytest.mark.long
@pytest.mark.spec("RUN-19")
def test_a_server_that_is_killed_while_it_thaws(vm: Vm, ovm: Ovm) -> None:
    """A thaw is done again by the next one, also where the first had been heard already."""
    words, rng = ("commit", vm.id, "-t", "agent:committed"), random.Random(12)
    server = Server(vm.runtime.root.path)
    try:
        for number in range(KILLS):
            kill_frozen(vm, ovm, words, 0)
            if number % 2:
                with contextlib.suppress(AssertionError):
                    vm.console.wait_for("THAW", count=vm.console.text().count("FREEZE"), timeout=rng.random())
            else:
                time.sleep(rng.random() * 0.5)
            server.process.kill()
            server.process.wait(10)
            server.start()
            wait_until(lambda: not vm.record.fs_frozen, 20)
            vm.whole()
    finally:
        assert server.close() == 0


@pytest.mark.long
@pytest.mark.spec("RUN-13", "RUN-19")
def test_a_server_that_is_killed_while_it_takes_a_snapshot(vm: Vm) -> None:
    rng = random.Random(13)
    server = Server(vm.runtime.root.path)
    try:
        began = time.monotonic()
        server.post("/snapshot", {"instance_id": vm.id, "tag": "agent:snap"})
        took = time.monotonic() - began
        for _ in range(KILLS):
            asking = threading.Thread(target=lambda: ask(server, vm))
            asking.start()
            time.sleep(rng.random() * took)
            server.process.kill()
            server.process.wait(10)
            asking.join(30)
            server.start()
            wait_until(lambda: not vm.record.pausing and server.state(vm.id) == "running", 20)
            vm.whole()
        store_is_whole(vm.runtime)
    finally:
        assert server.close() == 0


def ask(server: Server, vm: Vm) -> None:
    # it is killed, however far it has come
    with contextlib.suppress(OSError, HTTPException):
        server.call("POST", "/snapshot", {"instance_id": vm.id, "tag": "agent:snap"})


@pytest.mark.spec("RUN-13", "RUN-19")
def test_a_snapshot_that_waited_for_one_who_was_killed_is_not_one_of_a_frozen_guest(vm: Vm) -> None:
    with working(vm, freeze_and_wait):
        vm.console.wait_for("FREEZE")
        taking = threading.Thread(target=snapshots.take, args=(vm.runtime, vm.record, Reference.parse("agent:snap")))
        taking.start()
        time.sleep(0.2)  # it waits for the lock
    taking.join(60)
    vm.whole()
    clone = Vm(vm.runtime, vm.runtime.start(find(vm.runtime.layout, "agent:snap"), RESTORE).record)
    assert not clone.frozen()
    before = clone.console.ping()
    assert clone.console.ping() == before + 1


@pytest.mark.spec("RUN-19")
def test_who_waited_for_one_who_was_killed_lets_its_guest_go_on(vm: Vm) -> None:
    runtime = vm.runtime
    with working(vm, pause_and_wait):
        wait_until(lambda: vm.record.pausing, 20)
        taking = threading.Thread(target=commit.take, args=(runtime, vm.record, Reference.parse("agent:committed")))
        taking.start()
        time.sleep(0.2)
    taking.join(60)
    vm.whole()
    # and the user's own will stays
    with working(vm, pause_and_wait):
        wait_until(lambda: vm.record.pausing, 20)
        pausing = threading.Thread(target=runtime.pause, args=(vm.record,))
        pausing.start()
        time.sleep(0.2)
    pausing.join(60)
    runtime.instances.recover()
    assert runtime.instances.status(vm.record).state is State.PAUSED
    with runtime.instances.locked(vm.record) as newest, runtime.instances.control(newest) as control:
        assert str(control.state()) == "paused"
    runtime.resume(vm.record)
    vm.whole()


@pytest.mark.long
@pytest.mark.spec("RUN-19")
def test_a_guest_that_does_not_thaw_holds_nobody_up_and_is_not_cloned(vm: Vm) -> None:
    instances = vm.runtime.instances
    with working(vm, freeze_and_wait):
        vm.console.wait_for("FREEZE")
        vm.console.send("m")
    recovering = threading.Thread(target=instances.recover)
    recovering.start()
    wait_until(lambda: instances.held(vm.record), 20)
    # what every start needs
    with fsutil.file_lock(instances.lock_path, timeout=0.5):
        assert recovering.is_alive()
    recovering.join(30)
    assert vm.record.fs_frozen
    with pytest.raises(AgentUnavailable, match="clones would wake up so"):
        snapshots.take(vm.runtime, vm.record, Reference.parse("agent:snap"))
    vm.console.send("m")
    snapshots.take(vm.runtime, vm.record, Reference.parse("agent:snap"))
    vm.whole()


@pytest.mark.long
@pytest.mark.spec("RUN-19")
def test_a_guest_that_was_paused_meanwhile_is_thawed_when_it_goes_on(vm: Vm) -> None:
    with working(vm, freeze_and_wait):
        vm.console.wait_for("FREEZE")
        vm.console.send("m")
    vm.runtime.pause(vm.record)
    vm.runtime.instances.recover()
    assert vm.record.fs_frozen
    vm.console.send("m")
    vm.runtime.resume(vm.record)
    vm.whole()
