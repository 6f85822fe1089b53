"""How a VM that is no more is told, and what is done then: real QEMU, bare guest."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli import Ovm
from support.faulty import wait_until
from support.guests import MEMORY, Console

from ovms.artifact.resolve import Found, find
from ovms.cli import view
from ovms.errors import InstanceNotFound, Interrupted, StateConflict, UsageError
from ovms.oci.reference import Reference
from ovms.runtime import cgroups, document, jail, restart, security, snapshots
from ovms.runtime.instances import STOP
from ovms.runtime.jail import SecurityOptions
from ovms.runtime.record import Record, Restart
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.spec.states import State
from ovms.vmm import watch
from ovms.vmm.model import Ending

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def kill(record: Record, number: signal.Signals = signal.SIGKILL) -> None:
    assert record.process is not None
    record.process.signal(number)
    assert record.process.wait(20)


def until(runtime: Runtime, record: Record, state: State, *, pid: int | None = None, timeout: float = 30) -> Record:
    """Waits until the instance is in a state, under another process than *pid*."""
    deadline = time.monotonic() + timeout
    while True:
        newest = runtime.instances.find(record.id)
        other = newest.process is not None and newest.process.pid != pid
        if runtime.instances.status(newest).state is state and other:
            return newest
        assert time.monotonic() < deadline, runtime.instances.status(newest)
        time.sleep(0.02)


def test_a_signal_is_told(runtime: Runtime, echo: Found) -> None:
    # the first process of a pid namespace takes no signal from outside but SIGKILL; a fault of its own it does take
    options = replace(TCG, security=SecurityOptions.parse(["namespaces=off"]))
    record = runtime.start(echo, options).record
    kill(record, signal.SIGSEGV)
    status = runtime.instances.status(record)
    assert (status.state, status.ending) == (State.ERROR, Ending.KILLED)
    assert status.exit is not None
    assert status.exit.returncode == -signal.SIGSEGV
    assert status.failed
    assert status.ran_s is not None
    assert 0 <= status.ran_s < 30


def test_a_guest_that_powers_off_is_no_failure(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")  # before it, nobody hears the button
    status = runtime.stop(record, grace=20)
    assert not status.failed
    assert status.exit is not None
    assert status.exit.returncode == 0
    assert status.exit.memory_max > 10 << 20


@pytest.mark.spec("STA-3")
def test_a_guest_that_panics(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    snapshots.take(runtime, record, Reference.parse("echo:snap"))
    for vm in (record, runtime.start(find(runtime.layout, "echo:snap"), RunOptions(accel=Accel.TCG)).record):
        assert vm.process is not None
        console(runtime, vm).send("c")
        assert vm.process.wait(20)
        status = runtime.instances.status(vm)
        assert (status.state, status.ending, status.failed) == (State.ERROR, Ending.PANICKED, True)
        told = document.instance(status)
        assert (told["state"], told["error"]["detail"]) == ("error", "the guest panicked")
        assert view.state_text(told) == "Error (the guest panicked)"
    # one that was to be stopped has stopped
    stopped = replace(record, stop_requested=True)
    assert runtime.instances.status(stopped).state is State.STOPPED


def test_a_guest_that_panics_is_booted_again(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, restart=Restart(1))).record
    console(runtime, record).wait_for("READY")
    assert record.process is not None
    console(runtime, record).send("c")
    again = until(runtime, record, State.RUNNING, pid=record.process.pid)
    assert again.restart == Restart(1, 1)


def test_a_host_that_was_rebooted(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    assert record.process is not None
    kill(record)
    files = runtime.instances.files(record)
    assert record.watcher is not None
    watch.wait_exit(files, record.watcher, 5)
    files.exit.unlink()  # nobody saw it
    before = replace(record.process, boot_id="00000000-0000-0000-0000-000000000000")
    with runtime.instances.locked(record) as newest:
        runtime.instances.save(replace(newest, process=before))
    status = runtime.instances.status(runtime.instances.find(record.id))
    assert (status.state, status.ending) == (State.STOPPED, Ending.HOST_REBOOTED)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cgroups.make("probe", cgroups.Limits(64 << 20, 100))
    cgroups.remove(made.directories)
    if "memory" in made.missing:
        pytest.skip(f"no memory cgroup here: {made.missing['memory']}")
    monkeypatch.setattr("ovms.runtime.jail.OVERHEAD", {Accel.TCG: -(MEMORY // 2), Accel.KVM: 0})


@pytest.mark.usefixtures("little")
def test_a_vmm_that_the_kernel_ended_for_want_of_memory(runtime: Runtime, echo: Found) -> None:
    with pytest.raises(Exception, match="QEMU") as caught:  # 16 MiB: it does not even start
        runtime.start(echo, TCG)
    assert "SIGKILL" in str(caught.value)
    assert runtime.instances.records() == []


def test_cgroups_go_with_their_vm(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    groups = [procs.parent for procs in record.jail.cgroups]
    if not groups:
        pytest.skip("no cgroups here")
    assert record.process is not None
    for procs in record.jail.cgroups:
        assert str(record.process.pid) in procs.read_text().split()
    kill(record)
    runtime.instances.recover()
    assert not any(group.exists() for group in groups)
    assert not runtime.instances.find(record.id).oom_killed


def test_groups_of_a_killed_start_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "PARENT", f"ovms-test-{os.getpid()}")  # those of others are none of its business
    made = cgroups.make("left-by-a-killed-start", cgroups.Limits(1 << 30, 100))
    if not made.directories:
        pytest.skip("no cgroups here")
    cgroups.sweep({"left-by-a-killed-start"}, age=0)
    cgroups.sweep(set())
    assert all(directory.exists() for directory in made.directories), "known, or too young"
    cgroups.sweep(set(), age=0)
    assert not any(directory.exists() for directory in made.directories)
    for parent in {directory.parent for directory in made.directories}:
        parent.rmdir()  # fails where something else is left


# --- started again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy"),
    [("no", None), ("on-failure", Restart()), ("on-failure:3", Restart(3)), ("on-failure:0", Restart(0))],
)
def test_policies(text: str, policy: Restart | None) -> None:
    assert restart.parse(text) == policy


@pytest.mark.parametrize("text", ["", "always", "on-failure:", "on-failure:-1", "no:1", "on-failure:9999999"])
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(UsageError, match="no restart policy"):
        restart.parse(text)


def test_a_vm_that_fails_is_booted_again_on_its_disk(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, restart=Restart(2))).record
    console(runtime, record).wait_for("READY")
    assert console(runtime, record).ping() == 1
    assert record.process is not None
    kill(record)
    again = until(runtime, record, State.RUNNING, pid=record.process.pid)
    assert again.restart == Restart(2, 1)
    console(runtime, again).wait_for("READY", count=2)  # what it said before is still in its log
    told = document.instance(runtime.instances.status(again), files=runtime.instances.files(again))
    assert again.start_ms is not None
    assert again.start_ms / 2 < told["timings_ms"]["first_output"] < 30_000, "of this boot, not of the one before"
    assert console(runtime, again).ping() == 1, "its memory is new"
    assert again.overlays == record.overlays
    # stopped by its user: that is no failure
    runtime.stop(again, grace=0)
    time.sleep(0.5)
    assert runtime.instances.status(runtime.instances.find(record.id)).state is State.STOPPED


def test_it_is_given_up_after_so_many_times(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, restart=Restart(1))).record
    assert record.process is not None
    kill(record)
    again = until(runtime, record, State.RUNNING, pid=record.process.pid)
    kill(again)
    time.sleep(1.0)
    status = runtime.instances.status(runtime.instances.find(record.id))
    assert status.state is State.ERROR
    assert status.record.restart == Restart(1, 1)


def test_one_that_is_stopped_while_it_waits_is_not_booted_again(runtime: Runtime, echo: Found) -> None:
    for number, grace in enumerate((0.0, 5.0)):
        record = runtime.start(echo, replace(TCG, restart=Restart(None, 3))).record
        kill(record)  # the next try is 0.8 s from here
        assert runtime.stop(record, grace=grace).state is State.ERROR, "how it ended is not forgotten"
        assert restart.ended(runtime, record.id, sleep=lambda _: None) is None
        with pytest.raises(Interrupted):
            runtime.start_again(record)
        if number == 0:
            time.sleep(1.5)  # its watcher's own try
            assert runtime.instances.status(runtime.instances.find(record.id)).state is State.ERROR
        runtime.remove(record)


def test_one_that_waits_to_be_booted_again_says_so(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = runtime.start(echo, replace(TCG, restart=Restart(None, 9))).record  # the next try is 51 s from here
    kill(record)

    def told() -> dict[str, Any]:
        return document.instance(runtime.instances.status(runtime.instances.find(record.id)))

    wait_until(lambda: told()["restarts_in_ms"] is not None, 20)
    assert 20_000 < told()["restarts_in_ms"] < 51_300
    assert re.fullmatch(r"Restarting in [1-5][0-9] s \(the VMM died: signal SIGKILL\)", view.state_text(told()))
    ovm = Ovm(runtime.root.path, tmp_path)
    assert ovm.ok("ps", "-q").out.split() == [record.id]
    assert "Restarting in" in ovm.ok("ps").out
    # not any more when its user has stopped it, or when nobody waits
    runtime.stop(record, grace=0)
    assert told()["restarts_in_ms"] is None
    assert view.state_text(told()) == "Error (the VMM died: signal SIGKILL)"
    assert ovm.ok("ps", "-q").out == ""
    (runtime.instances.directory(record.id) / STOP).unlink()
    assert told()["restarts_in_ms"] is not None
    for pid in waiting(record):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: told()["restarts_in_ms"] is None, 10)


def waiting(record: Record) -> list[int]:
    """Who waits to start an instance again."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if record.id.encode() in words and restart.COMMAND.encode() in words:
                found.append(int(path.parent.name))
    return found


def test_the_wait_grows_and_begins_anew(runtime: Runtime, echo: Found) -> None:
    assert [restart._pause(Restart(None, n), 0.5) for n in (0, 1, 2, 3, 20)] == [0.1, 0.2, 0.4, 0.8, 60.0]
    assert restart._pause(Restart(None, 5), 11.0) == 0.1
    assert restart._pause(Restart(None, 5), None) == 3.2


def test_a_running_instance_is_not_started_again(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    with pytest.raises(StateConflict):
        runtime.start_again(record)


def test_with_rm_it_is_removed_at_once_though_nobody_waits(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, remove_on_exit=True)).record
    kill(record)
    deadline = time.monotonic() + 20
    while runtime.instances.directory(record.id).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(InstanceNotFound):
        runtime.instances.find(record.id)


# --- what confines it ------------------------------------------------------------------------------------------------


def test_what_is_in_force_is_read_from_the_kernel(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    found = security.in_force(record)
    assert found["capabilities"] == {"effective": [], "permitted": [], "bounding": []}
    assert found["no_new_privileges"]
    assert found["seccomp"]["mode"] == "filter"
    assert found["limits"]["core"] == 0
    if record.jail.own_root:
        assert {found["namespaces"][name] for name in ("mnt", "pid", "user", "ipc", "uts")} == {True}
    if os.geteuid() == 0:
        assert found["user"]["uid"] != 0
    assert "namespace pid" not in found["missing"]
    runtime.stop(record, grace=0)
    with pytest.raises(StateConflict):
        security.in_force(record)


def test_two_vms_have_two_users(runtime: Runtime, echo: Found) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has users to give away")
    users = [security.in_force(runtime.start(echo, TCG).record)["user"]["uid"] for _ in range(2)]
    assert len(set(users)) == 2


def test_vms_of_two_roots_have_two_users(tmp_path: Path) -> None:
    places = [tmp_path / f"root-{number}" for number in range(20)]
    for place in places:
        place.mkdir()
    firsts = {next(jail.users_of(place)) for place in places}
    assert len(firsts) > 10, "by their inodes, so that some may meet"
    every = list(jail.users_of(places[0]))
    assert set(every) == set(range(jail.UID_FIRST, jail.UID_FIRST + jail.UID_COUNT))
    assert len({number // 0x400 for number in every[:0x400]}) == 1, "those of one are side by side"


@pytest.mark.parametrize("part", ["seccomp", "cgroups", "limits", "root", "namespaces", "user"])
def test_one_part_is_left_out_at_a_time(runtime: Runtime, echo: Found, part: str) -> None:
    options = replace(TCG, security=SecurityOptions.parse([f"{part}=off"]))
    record = runtime.start(echo, options).record
    found = security.in_force(record)
    assert "left out" in found["missing"][part]
    if part == "namespaces":
        assert "namespaces" in found["missing"]["root"], "what goes with it is told, too"
    assert found["own_root"] or "root" in found["missing"]
    assert (found["cgroups"] == []) == (part == "cgroups" or not record.jail.cgroups)
    if part == "seccomp":
        assert found["seccomp"]["filters"] <= 1, "QEMU's own"
    if part == "user" and os.geteuid() == 0:
        assert found["user"]["uid"] == 0
    assert found["capabilities"]["effective"] == []
    console(runtime, record).wait_for("READY")


@pytest.mark.parametrize("text", ["", "seccomp", "seccomp=maybe", "all=off", "seccomp=off,user=off"])
def test_what_is_no_security_option(text: str) -> None:
    with pytest.raises(UsageError, match="no security option"):
        SecurityOptions.parse([text])


def test_a_vm_has_nothing_of_the_host_open(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    assert record.process is not None
    ours = [*runtime.instances.directory(record.id).glob("overlay-*"), *runtime.layout.blob_dir.iterdir()]
    known = {(file.stat().st_dev, file.stat().st_ino) for file in ours}
    for fd in Path(f"/proc/{record.process.pid}/fd").iterdir():
        info = fd.stat()
        if stat.S_ISREG(info.st_mode) and "memfd:" not in str(fd.readlink()):
            assert (info.st_dev, info.st_ino) in known, fd.readlink()
        assert not stat.S_ISDIR(info.st_mode)
