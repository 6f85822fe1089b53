"""The agent's port on real VMs, whose bare guest runs no agent."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from support.guests import MEMORY, Console

from ovms import fsutil
from ovms.artifact.resolve import Found, find
from ovms.errors import AgentUnavailable, StateConflict, Unsupported
from ovms.memory import compat
from ovms.oci.reference import Reference
from ovms.runtime import agent, guest, snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.vmm.model import AGENT_PORT, Ending
from ovms.vmm.qemu.vmm import QemuVmm

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def start(runtime: Runtime, echo: Found) -> Record:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    return record


def snapshot(runtime: Runtime, record: Record, name: str) -> Found:
    snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse(name))
    return find(runtime.layout, name)


def test_a_guest_without_an_agent_is_told_at_once(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo)
    for vm in (record, runtime.start(snapshot(runtime, record, "echo:snap"), RESTORE).record):
        began = time.monotonic()
        with pytest.raises(AgentUnavailable) as caught, guest.agent_of(runtime.instances, vm) as there:
            guest.run(there, ["true"])
        assert time.monotonic() - began < agent.WAIT / 2
        assert (caught.value.code, "qemu-guest-agent" in str(caught.value.hint)) == ("agent-unavailable", True)
        assert console(runtime, vm).ping() == 1


def test_what_nobody_reads_harms_nobody(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo)
    with fsutil.connect_unix(runtime.instances.files(record).agent, timeout=0.5) as sock:
        with pytest.raises(TimeoutError):
            for _ in range(100):
                sock.sendall(b"x" * 65536)
        assert console(runtime, record).ping() == 1
    assert runtime.stop(record, grace=20).ending is Ending.POWERED_OFF


def test_without_an_agent_the_button_is_pressed(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo)
    assert runtime.stop(record, grace=20, agent=True).ending is Ending.POWERED_OFF
    assert runtime.stop(record, grace=20, agent=True).ending is Ending.POWERED_OFF
    with pytest.raises(StateConflict):
        guest.agent_of(runtime.instances, runtime.instances.find(record.id))


@pytest.mark.spec("RAM-24", "RAM-36")
def test_a_snapshot_without_the_port_is_restored_without_it(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = QemuVmm.machine
    monkeypatch.setattr(QemuVmm, "machine", lambda *args, **options: replace(original(*args, **options), agent=False))
    before = start(runtime, echo)
    assert console(runtime, before).ping() == 1
    old = snapshot(runtime, before, "echo:old")
    monkeypatch.undo()
    clone = runtime.start(old, RESTORE).record
    assert (clone.restored, clone.machine.agent) == (True, False)
    assert console(runtime, clone).ping() == 2
    assert not runtime.instances.files(clone).agent.exists()
    with pytest.raises(Unsupported, match="the snapshot that it was restored from has none"):
        guest.agent_of(runtime.instances, clone)
    # its own snapshot says the same, and so do those of its clones
    again = runtime.start(snapshot(runtime, clone, "echo:again"), RESTORE).record
    assert (again.restored, again.machine.agent) == (True, False)
    assert console(runtime, again).ping() == 3


@pytest.mark.spec("RAM-24", "RAM-32")
def test_a_port_of_another_name_is_not_restored(runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "AGENT_PORT", "org.example.0")
    other = snapshot(runtime, start(runtime, echo), "echo:other")
    monkeypatch.undo()
    started = runtime.start(other, TCG)
    assert not started.record.restored
    assert "it has other devices than this version gives" in str(started.not_restored)


@pytest.mark.spec("RAM-24")
def test_the_port_stands_in_the_header(runtime: Runtime, echo: Found) -> None:
    found = snapshot(runtime, start(runtime, echo), "echo:snap")
    ram = found.artifact.manifest.ram_snapshot
    assert ram is not None
    devices = json.dumps({"type": "virtio-serial", "name": AGENT_PORT})
    from ovms.memory.snapshot import read_control
    from ovms.spec.digest import Digest

    header = read_control(runtime.layout, Digest(ram.ref)).header.to_json()
    assert json.loads(devices) in header["devices"]
