"""Snapshots and restores: real QEMU, bare guest whose counter lives in its memory alone."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.guests import MEMORY, Console

from ovms.artifact import model
from ovms.artifact.resolve import Found, find
from ovms.errors import DiskFull, SnapshotIncompatible, SnapshotInvalid, StateConflict, VmmError
from ovms.memory import capture, snapshot
from ovms.oci.descriptor import Descriptor
from ovms.oci.reference import Reference
from ovms.runtime import snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import ramsnap
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.spec.manifest import PartKind
from ovms.spec.ramheader import Device
from ovms.spec.states import State

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


@pytest.fixture
def running(runtime: Runtime, echo: Found) -> Record:
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    return record


def take(runtime: Runtime, record: Record, name: str) -> snapshots.Taken:
    return snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse(name))


@pytest.mark.spec("RUN-13", "RUN-14", "RUN-20", "RAM-10", "RAM-36", "SEC-9", "OCI-19")
def test_memory_lives_on_in_the_original_and_in_every_clone(runtime: Runtime, running: Record) -> None:
    assert [console(runtime, running).ping() for _ in range(3)] == [1, 2, 3]
    taken = take(runtime, running, "echo:snap")
    assert taken.artifact.manifest.ram_snapshot is not None
    assert console(runtime, running).ping() == 4
    clones = [runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record for _ in range(2)]
    for clone in clones:
        assert clone.restored
        assert console(runtime, clone).ping() == 4
        assert "READY" not in console(runtime, clone).text()
    assert console(runtime, clones[0]).ping() == 5
    assert console(runtime, clones[1]).ping() == 5
    assert console(runtime, running).ping() == 5


@pytest.mark.spec("RUN-13", "RAM-36")
def test_a_clone_is_snapshot_again_with_what_it_changed(runtime: Runtime, running: Record) -> None:
    console(runtime, running).ping()
    take(runtime, running, "echo:a")
    clone = runtime.start(find(runtime.layout, "echo:a"), RESTORE).record
    assert console(runtime, clone).ping() == 2
    second = take(runtime, clone, "echo:b")
    assert console(runtime, clone).ping() == 3
    again = runtime.start(find(runtime.layout, "echo:b"), RESTORE).record
    assert console(runtime, again).ping() == 3
    # base, what the first wrote, what the clone wrote
    assert len(second.artifact.manifest.disk_layers) == 3
    assert second.artifact.image.subject is not None


def test_a_clone_that_resets_boots_again(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    assert console(runtime, clone).ping() == 1
    console(runtime, clone).send("r")
    console(runtime, clone).wait_for("READY")
    assert console(runtime, clone).ping() == 1


def test_a_clone_powers_down_when_asked(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    assert runtime.stop(clone, grace=20).ending == "powered-off"


@pytest.mark.spec("RAM-35", "RUN-20")
def test_the_ram_image_is_never_written_to_by_its_clones(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    assert clone.ram_image is not None
    before = clone.ram_image.read_bytes()
    console(runtime, clone).ping()
    assert clone.ram_image.read_bytes() == before
    assert len(before) == MEMORY


@pytest.mark.spec("RUN-14")
def test_two_snapshots_of_one_instance_are_whole_each(runtime: Runtime, running: Record) -> None:
    console(runtime, running).ping()
    take(runtime, running, "echo:a")
    console(runtime, running).ping()
    take(runtime, running, "echo:b")
    first = runtime.start(find(runtime.layout, "echo:a"), RESTORE).record
    second = runtime.start(find(runtime.layout, "echo:b"), RESTORE).record
    assert (console(runtime, first).ping(), console(runtime, second).ping()) == (2, 3)


@pytest.mark.spec("RAM-50", "RAM-52")
def test_cold_boots_a_snapshot_from_its_disk(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    record = runtime.start(find(runtime.layout, "echo:snap"), replace(TCG, restore=RestorePolicy.NEVER)).record
    assert not record.restored
    assert not list(runtime.layout.derived_dir.glob("*.ram")), "nothing of the snapshot is unpacked"
    console(runtime, record).wait_for("READY")


@pytest.mark.spec("RAM-31", "RAM-50")
def test_another_shape_than_the_snapshots_is_refused(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    found = find(runtime.layout, "echo:snap")
    with pytest.raises(SnapshotIncompatible, match="32 MiB"):
        runtime.start(found, replace(RESTORE, memory=64 << 20))
    with pytest.raises(SnapshotIncompatible, match="1 CPUs"):
        runtime.start(found, replace(RESTORE, vcpus=2))


@pytest.mark.spec("RAM-10", "RAM-24", "RAM-32", "RAM-33", "RAM-34", "RAM-50")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"machine_type": "pc-i440fx-99.0"}, "machine type"),
        ({"accel": "kvm"}, "KVM"),
        ({"cpu_model": "EPYC"}, "CPU model"),
        ({"cpu_flags": ("no-such-flag",)}, "no-such-flag"),
        ({"vmm": "firecracker"}, "was taken by 'firecracker'"),
        ({"vmm_version": "99.0"}, "an older one"),
        ({"state_format": "vmstate-1"}, "of the form 'vmstate-1'"),
        ({"arch": "riscv64"}, "riscv64"),
        ({"accel": "hvf"}, "HVF"),
        ({"devices": (Device("sound"),)}, "other devices than this version gives: 'serial, .*sound'"),
        ({"clock_rtc": "local"}, "real-time clock"),
        ({"parent": "sha256:" + "0" * 64}, "a diff on another snapshot"),
    ],
)
def test_a_host_that_cannot_restore_boots_and_says_why(
    runtime: Runtime, running: Record, change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(runtime, running, "echo:snap")
    found = find(runtime.layout, "echo:snap")
    _change_header(monkeypatch, change)
    started = runtime.start(found, TCG)
    assert not started.record.restored
    assert re.search(why, str(started.not_restored))
    console(runtime, started.record).wait_for("READY")


def _change_header(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    original = snapshot.read_control

    def changed(layout: object, digest: Digest) -> object:
        control = original(layout, digest)  # type: ignore[arg-type]
        more = (*control.header.devices, *change.get("devices", ()))
        return replace(control, header=replace(control.header, **{**change, "devices": more}))

    monkeypatch.setattr(snapshot, "read_control", changed)


@pytest.mark.spec("RAM-30", "RAM-50")
def test_a_snapshot_of_another_vm_is_refused(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(runtime, running, "echo:snap")
    found = find(runtime.layout, "echo:snap")
    _change_header(monkeypatch, {"kernel_args": "single", "disks": ("sha256:" + "0" * 64,)})
    with pytest.raises(SnapshotInvalid, match="another kernel arguments and another disk layers"):
        runtime.start(found, RESTORE)


@pytest.mark.spec("GEN-3", "RAM-16", "RAM-50")
def test_a_damaged_snapshot_starts_nothing(runtime: Runtime, running: Record) -> None:
    taken = take(runtime, running, "echo:snap")
    assert taken.artifact.manifest.ram_snapshot is not None
    blob = runtime.layout.path(Digest(taken.artifact.manifest.ram_snapshot.ref))
    data = bytearray(blob.read_bytes())
    data[-100] ^= 0xFF  # inside the last chunk
    blob.chmod(0o600)
    blob.write_bytes(data)
    count = len(runtime.instances.records())
    with pytest.raises(SnapshotInvalid):
        runtime.start(find(runtime.layout, "echo:snap"), RESTORE)
    assert len(runtime.instances.records()) == count
    assert [p for p in runtime.layout.derived_dir.iterdir() if p.suffix != ".lock"] == []


@pytest.mark.spec("STA-2")
def test_a_stopped_instance_is_not_snapshot(runtime: Runtime, running: Record) -> None:
    runtime.stop(running, grace=0)
    with pytest.raises(StateConflict):
        take(runtime, running, "echo:snap")


def test_a_full_disk_is_said_before_the_guest_is_paused(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"total": 1, "used": 1, "free": 0})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(DiskFull):
        take(runtime, running, "echo:snap")
    assert runtime.instances.status(runtime.instances.find(running.id)).state is State.RUNNING
    monkeypatch.undo()
    assert console(runtime, running).ping() == 1


@pytest.mark.spec("RUN-13")
def test_a_snapshot_that_fails_half_way_lets_the_guest_go_on(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(guest: object, fd: int) -> object:
        raise VmmError("the memory is gone")

    monkeypatch.setattr(capture, "take", fail)
    with pytest.raises(VmmError):
        take(runtime, running, "echo:snap")
    assert console(runtime, running).ping() == 1
    monkeypatch.undo()
    taken = take(runtime, running, "echo:snap")  # the overlay of the failed one is a layer now
    assert len(taken.artifact.manifest.disk_layers) == 3
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    assert console(runtime, clone).ping() == 2


def test_an_overlay_that_the_vmm_never_took_is_dropped(runtime: Runtime, running: Record) -> None:
    with runtime.instances.locked(running) as newest:
        pending = newest.with_overlay()
        directory = runtime.instances.directory(running.id)
        (directory / pending.overlays[-1]).write_bytes(b"")
        runtime.instances.save(pending)
    taken = take(runtime, running, "echo:snap")
    assert len(taken.artifact.manifest.disk_layers) == 2
    assert runtime.instances.find(running.id).overlays == ("overlay-0.qcow2", "overlay-1.qcow2")


def test_both_ways_to_find_written_pages_agree(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    console(runtime, clone).ping()
    assert clone.process is not None
    pid = clone.process.pid
    with runtime.instances.control(clone) as control:
        control.pause()
        address = capture.find_mapping(pid, control.ram().file, MEMORY)
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        try:
            slow = set(_pages(capture.read_pagemap(fd, address, MEMORY)))
            try:
                fast = set(_pages(capture.scan_pagemap(fd, address, MEMORY)))
            except OSError:
                pytest.skip("this kernel has no PAGEMAP_SCAN")
        finally:
            os.close(fd)
        control.resume()
    assert slow == fast
    assert len(slow) >= 64  # a ping writes to 64 pages


def _pages(runs: object) -> list[int]:
    return [page for run in runs for page in range(run.start, run.end, 4096)]  # type: ignore[attr-defined]


@pytest.mark.spec("OCI-23")
def test_the_store_forgets_a_snapshot_with_its_ram_image(runtime: Runtime, running: Record) -> None:
    take(runtime, running, "echo:snap")
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    image = clone.ram_image
    assert image is not None
    runtime.layout.remove_name("echo:snap")
    runtime.layout.collect(runtime.instances.artifacts)
    assert Path(image).exists()  # the clone needs it
    runtime.remove(clone, force=True)
    runtime.layout.collect(runtime.instances.artifacts)
    assert list(runtime.layout.derived_dir.iterdir()) == []


@pytest.mark.spec("RAM-50")
def test_a_required_restore_does_not_become_a_boot(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(runtime, running, "echo:snap")
    found = find(runtime.layout, "echo:snap")
    required = replace(RESTORE, restore=RestorePolicy.REQUIRE)
    assert runtime.start(found, required).record.restored
    _change_header(monkeypatch, {"accel": "hvf"})
    count = len(runtime.instances.records())
    with pytest.raises(SnapshotIncompatible, match="HVF"):
        runtime.start(found, required)
    with pytest.raises(SnapshotIncompatible, match="has no RAM snapshot"):
        runtime.start(find(runtime.layout, str(running.digest)), required)
    assert len(runtime.instances.records()) == count


@pytest.mark.spec("SEC-10", "RAM-50")
def test_memory_that_must_be_locked_is_not_restored_unlocked(runtime: Runtime, running: Record) -> None:
    taken = take(runtime, running, "echo:snap")
    document = copy.deepcopy(dict(taken.artifact.manifest.document))
    document["ramSnapshot"]["mlock_required"] = True
    parts: dict[PartKind, list[Descriptor]] = {kind: [] for kind in PartKind}
    for part in taken.artifact.manifest.parts():
        parts[part.kind].append(model.reused(taken.artifact, part))
    locked = model.compose(
        runtime.layout,
        document,
        model.Parts(
            kernel=parts[PartKind.KERNEL][0],
            disks=tuple(parts[PartKind.DISK]),
            ram_snapshots=tuple(parts[PartKind.RAM]),
        ),
    )
    found = Found("echo:locked", locked)
    started = runtime.start(found, TCG)
    assert not started.record.restored
    assert "mlock_required" in str(started.not_restored)
    with pytest.raises(SnapshotIncompatible, match="mlock_required"):
        runtime.start(found, replace(RESTORE, restore=RestorePolicy.REQUIRE))


@pytest.mark.spec("RAM-19")
def test_chunks_are_aligned_and_zero_pages_left_out(runtime: Runtime, running: Record) -> None:
    taken = take(runtime, running, "echo:snap")
    assert taken.artifact.manifest.ram_snapshot is not None
    control = snapshot.read_control(runtime.layout, Digest(taken.artifact.manifest.ram_snapshot.ref))
    assert control.prefix.chunk_pages == 16
    assert control.chunks
    for chunk in control.chunks:
        assert chunk.page // 16 == (chunk.page + chunk.pages - 1) // 16, "a chunk reaches over a multiple of 16 pages"
    blob = runtime.layout.path(Digest(taken.artifact.manifest.ram_snapshot.ref)).read_bytes()
    for chunk in control.chunks:
        at = control.prefix.data_offset + chunk.offset
        pages = ramsnap.unpack_chunk(chunk, blob[at : at + chunk.stored_size], control.prefix.data_offset)
        assert any(pages[: ramsnap.PAGE])
        assert any(pages[-ramsnap.PAGE :])
