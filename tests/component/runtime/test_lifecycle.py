"""Starting, finding, stopping and removing instances: real QEMU, bare guest."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.guests import MEMORY, Console, qemu_children

from ovms import process
from ovms.artifact import resolve
from ovms.artifact.resolve import Found
from ovms.errors import (
    InputError,
    InstanceNotFound,
    NameTaken,
    PortInUse,
    StateConflict,
    ToolMissing,
    Unsupported,
    VmmError,
)
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.runtime import commit, ports, starting
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.manifest import Device, Metadata, Platform, RamSnapshot
from ovms.spec.states import State
from ovms.vmm.model import Ending
from ovms.vmm.qemu.binary import BINARY

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def state(runtime: Runtime, record: Record) -> State:
    return runtime.instances.status(runtime.instances.find(record.id)).state


def test_an_artifact_is_read_once_and_anew_where_its_name_stands_for_another(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def find(layout: Layout, text: str, platform: Any = None) -> Found:
        reads.append(text)
        return resolve.find(layout, text, platform)

    monkeypatch.setattr(starting, "find", find)
    records: list[Record] = []
    for renamed in (False, True):
        begun = starting.begin(runtime, "echo:1", TCG)
        assert isinstance(begun, starting.Start)
        if renamed:
            commit.take(runtime, runtime.instances.find(records[0].id), Reference.parse("echo:1"))
        assert begun.answered()
        records.append(begun.run(lambda host: pytest.fail(host)).record)
        assert (records[-1].digest == echo.artifact.digest) is not renamed
    assert len(reads) == 3


def test_the_vmm_may_be_a_link_that_the_jail_has_not(
    runtime: Runtime, echo: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / BINARY).symlink_to(process.find_tool(BINARY))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")


@pytest.mark.spec("RUN-12", "STA-3", "LAY-1")
def test_a_vm_runs_and_powers_down_when_asked(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, name="one")).record
    assert state(runtime, record) is State.RUNNING
    console(runtime, record).wait_for("READY")
    assert console(runtime, record).ping() == 1
    status = runtime.stop(record, grace=20)
    assert (status.state, status.ending) == (State.STOPPED, Ending.POWERED_OFF)
    runtime.remove(record)
    with pytest.raises(InstanceNotFound):
        runtime.instances.find("one")


@pytest.mark.spec("STA-3")
def test_a_guest_that_powers_off_by_itself_is_stopped(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    console(runtime, record).send("q")
    assert record.process is not None
    assert record.process.wait(20)
    status = runtime.instances.status(record)
    assert (status.state, status.ending) == (State.STOPPED, Ending.POWERED_OFF)


@pytest.mark.spec("RUN-12")
def test_a_guest_that_ignores_the_button_is_ended_after_the_grace(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    console(runtime, record).send("i")
    status = runtime.stop(record, grace=0.5)
    assert (status.state, status.ending) == (State.STOPPED, Ending.STOPPED)


@pytest.mark.spec("STA-6")
def test_stopping_twice_is_no_error(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    runtime.stop(record, grace=0)
    assert runtime.stop(record, grace=0).state is State.STOPPED
    assert runtime.stop(record, grace=1).state is State.STOPPED


@pytest.mark.spec("STA-2", "STA-3")
def test_a_killed_vmm_is_an_error_and_can_be_removed(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    assert record.process is not None
    record.process.kill()
    status = runtime.instances.status(record)
    assert (status.state, status.ending) == (State.ERROR, Ending.KILLED)
    runtime.remove(record)
    assert runtime.instances.records() == []


@pytest.mark.spec("STA-2")
def test_a_running_instance_is_removed_by_force_only(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    with pytest.raises(StateConflict):
        runtime.remove(record)
    assert state(runtime, record) is State.RUNNING
    runtime.remove(record, force=True)
    assert qemu_children(runtime.root.path) == []


@pytest.mark.spec("RUN-20", "LAY-1", "LAY-4")
def test_several_vms_have_overlays_of_their_own_and_leave_the_base_alone(runtime: Runtime, echo: Found) -> None:
    base = runtime.layout.path(echo.artifact.image.layers[1].digest)
    before = base.read_bytes()
    records = [runtime.start(echo, TCG).record for _ in range(3)]
    assert len({r.name for r in records}) == 3
    for record in records:
        console(runtime, record).wait_for("READY")
        assert (runtime.instances.directory(record.id) / "overlay-0.qcow2").exists()
        assert record.process is not None
        process = Path(f"/proc/{record.process.pid}")
        opened = [fd.name for fd in (process / "fd").iterdir() if fd.exists() and fd.samefile(base)]
        flags = [int((process / "fdinfo" / fd).read_text().split("flags:\t")[1].split()[0], 8) for fd in opened]
        assert flags
        assert all(flag & os.O_ACCMODE == os.O_RDONLY for flag in flags)
    assert base.read_bytes() == before


def test_a_name_is_taken_once(runtime: Runtime, echo: Found) -> None:
    runtime.start(echo, replace(TCG, name="same"))
    with pytest.raises(NameTaken):
        runtime.start(echo, replace(TCG, name="same"))
    assert len(runtime.instances.records()) == 1


def test_a_port_in_use_is_said_before_anything_starts(runtime: Runtime, echo: Found) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            runtime.start(echo, replace(TCG, ports=(ports.parse(f"{port}:80"),)))
    assert caught.value.context["port"] == port
    assert runtime.instances.records() == []


def test_a_port_that_is_taken_at_the_last_moment_is_still_a_port_in_use(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = ports.parse(f"{taken.getsockname()[1]}:80")
        monkeypatch.setattr(ports, "settle", tuple)
        with pytest.raises(PortInUse):
            runtime.start(echo, replace(TCG, ports=(forward,)))
    assert runtime.instances.records() == []
    assert list(runtime.root.instances.iterdir()) == [runtime.root.instances / ".lock"]


def test_without_qemu_the_message_names_the_package(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(ToolMissing) as caught:
        runtime.start(echo, TCG)
    assert "qemu-system-x86" in str(caught.value.hint)
    assert runtime.instances.records() == []


@pytest.mark.spec("GEN-3")
def test_a_vmm_that_refuses_says_why_and_leaves_nothing(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovms.vmm.qemu.accel.cpu_model", lambda accel: "no-such-cpu")
    with pytest.raises(VmmError, match="no-such-cpu"):
        runtime.start(echo, TCG)
    assert runtime.instances.records() == []
    assert qemu_children(runtime.root.path) == []


def changed(echo: Found, **changes: Any) -> Found:
    return replace(echo, artifact=replace(echo.artifact, manifest=replace(echo.artifact.manifest, **changes)))


@pytest.mark.spec("BIN-4", "DEV-1")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": Metadata(platform=Platform(arch="aarch64"))}, "the architecture aarch64"),
        ({"metadata": Metadata(platform=Platform(uefi=True))}, "UEFI"),
        ({"devices": (Device("gpu", "g"),)}, "a device of the type"),
    ],
)
def test_what_this_version_does_not_run_is_refused(
    runtime: Runtime, echo: Found, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Unsupported, match=words):
        runtime.start(changed(echo, **changes), TCG)
    assert runtime.instances.records() == []


@pytest.mark.spec("BIN-3", "RAM-51")
@pytest.mark.parametrize("policy", list(RestorePolicy))
@pytest.mark.parametrize("ram", [None, RamSnapshot("sha256:" + "0" * 64)])
def test_what_has_nothing_to_boot_from_is_refused(
    runtime: Runtime, echo: Found, policy: RestorePolicy, ram: RamSnapshot | None
) -> None:
    """Whatever RAM snapshot it has, and whatever is asked for: nothing of the snapshot is looked at."""
    found = changed(echo, kernel=None, initrd=None, disk_layers=(), ram_snapshot=ram)
    with pytest.raises(InputError, match="neither a kernel nor a disk") as info:
        runtime.start(found, replace(TCG, restore=policy))
    assert (info.value.code, info.value.context["rule"]) == ("invalid-input", "BIN-3")
    assert runtime.instances.records() == []


@pytest.mark.spec("RUN-19")
def test_an_instance_whose_starter_was_killed_is_found_again(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    runtime.instances.save(replace(record, process=None, started=None))  # killed before it could note the process
    assert runtime.instances.status(runtime.instances.find(record.id)).state is State.ERROR
    runtime.instances.recover()
    found = runtime.instances.find(record.id)
    assert found.process == record.process
    assert runtime.instances.status(found).state is State.RUNNING
    assert found.started is not None
    assert record.started is not None
    late = datetime.fromisoformat(found.started) - datetime.fromisoformat(record.started)
    assert abs(late.total_seconds()) < 30, "and when it began is known, by its process"


def test_a_start_that_ends_while_it_is_looked_at_has_not_failed(runtime: Runtime, echo: Found) -> None:
    """A hundred starts at once, and a client that lists them: a record that is read is old when its lock is looked at."""
    record = runtime.start(echo, TCG).record
    for a_moment_ago in (replace(record, process=None, started=None), replace(record, pausing=True)):
        assert runtime.instances.status(a_moment_ago).state is State.RUNNING


@pytest.mark.spec("RUN-19")
def test_an_instance_to_be_removed_goes_with_its_vm_even_when_nobody_waits(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, remove_on_exit=True)).record
    runtime.instances.recover()
    assert state(runtime, record) is State.RUNNING
    runtime.stop(record, grace=0)
    runtime.instances.recover()
    assert runtime.instances.records() == []


@pytest.mark.spec("RUN-19")
def test_a_paused_vm_of_a_killed_snapshot_goes_on(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    with runtime.instances.locked(record) as newest:
        runtime.instances.save(replace(newest, pausing=True))
        with runtime.instances.control(newest) as control:
            control.pause()
    assert state(runtime, record) is State.PAUSED
    runtime.instances.recover()
    assert state(runtime, record) is State.RUNNING
    assert console(runtime, record).ping() == 1


@pytest.mark.spec("RUN-19")
def test_the_vm_outlives_a_starter_that_is_killed(runtime: Runtime, echo: Found) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ovms.artifact.resolve import find\n"
        "from ovms.runtime.root import Root\n"
        "from ovms.runtime.runtime import RunOptions, Runtime\n"
        "from ovms.vmm.model import Accel\n"
        "runtime = Runtime(Root(Path(sys.argv[1])))\n"
        "options = RunOptions(memory=32 << 20, accel=Accel.TCG, name='orphan')\n"
        "runtime.start(find(runtime.layout, 'echo:1'), options)\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, runtime.root.path], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        os.kill(starter.pid, signal.SIGKILL)
    record = runtime.instances.find("orphan")
    assert runtime.instances.status(record).state is State.RUNNING
    console(runtime, record).wait_for("READY")  # before it, nobody hears the button
    assert runtime.stop(record, grace=20).ending is Ending.POWERED_OFF
