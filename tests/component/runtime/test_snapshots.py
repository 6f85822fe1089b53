"""Snapshots and restores: real QEMU, bare guest whose counter lives in its memory alone."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import rfc
from support.guests import MEMORY, Console

from ovms import fsutil
from ovms.artifact import model
from ovms.artifact.resolve import Found, find
from ovms.errors import (
    DiskFull,
    OvmsError,
    ReferenceNotFound,
    SnapshotIncompatible,
    SnapshotInvalid,
    StateConflict,
    VmmError,
)
from ovms.memory import capture, locking, snapshot
from ovms.oci.collector import collect
from ovms.oci.reference import Reference
from ovms.runtime import snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import ramsnap
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.spec.ramheader import Device
from ovms.spec.states import State
from ovms.vmm import freeze, maps
from ovms.vmm.model import PortForward

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
    assert taken.artifact.image.subject is not None
    assert taken.artifact.image.subject.digest == running.digest
    ports = (PortForward("127.0.0.1", 0, 80),)
    options = replace(RESTORE, ports=ports)
    clones = [runtime.start(find(runtime.layout, "echo:snap"), options).record for _ in range(2)]
    assert len({clone.id for clone in (running, *clones)}) == 3
    assert len({clone.ports[0].host_port for clone in clones}) == 2
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
    runtime.remove(runtime.instances.find(running.id), force=True)  # its memory would do for its clones
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


def test_a_paused_instance_is_snapshot_as_often_as_one_likes(runtime: Runtime, running: Record) -> None:
    """QEMU gave its disks away with the first, and aborted with the second."""
    assert console(runtime, running).ping() == 1
    runtime.pause(running)
    for name in ("echo:a", "echo:b"):
        take(runtime, running, name)
        assert runtime.instances.status(runtime.instances.find(running.id)).state is State.PAUSED
    runtime.resume(running)
    assert console(runtime, running).ping() == 2
    assert console(runtime, runtime.start(find(runtime.layout, "echo:b"), RESTORE).record).ping() == 2


@pytest.mark.spec("RAM-50")
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
    original = snapshot.read_needs

    def changed(layout: object, digest: Digest) -> object:
        control = original(layout, digest)  # type: ignore[arg-type]
        more = (*control.header.devices, *change.get("devices", ()))
        return replace(control, header=replace(control.header, **{**change, "devices": more}))

    monkeypatch.setattr(snapshot, "read_needs", changed)


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
    runtime.remove(runtime.instances.find(running.id), force=True)  # its memory would do for its clones
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
    monkeypatch.setattr(fsutil, "free_space", lambda path: 0)
    with pytest.raises(DiskFull):
        take(runtime, running, "echo:snap")
    assert runtime.instances.status(runtime.instances.find(running.id)).state is State.RUNNING
    monkeypatch.undo()
    assert console(runtime, running).ping() == 1


@pytest.mark.spec("RUN-13")
@pytest.mark.parametrize("call", ["frozen", "take"])
def test_a_snapshot_that_fails_half_way_lets_the_guest_go_on(
    call: str, runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise VmmError("the memory is gone")

    monkeypatch.setattr(capture, call, fail)
    if call == "take":
        monkeypatch.setattr(freeze, "able", lambda pid: False)
    with pytest.raises(VmmError):
        take(runtime, running, "echo:snap")
    assert console(runtime, running).ping() == 1
    monkeypatch.undo()
    taken = take(runtime, running, "echo:snap")  # the overlay of the failed one is a layer now
    assert len(taken.artifact.manifest.disk_layers) == 3
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    assert console(runtime, clone).ping() == 2


def test_memory_that_the_vmm_can_still_write_to_is_no_snapshot(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one that was taken over says that it has let go
    monkeypatch.setattr(freeze, "freeze", lambda pid, file, size: True)
    with pytest.raises(VmmError, match="can still write"):
        take(runtime, running, "echo:snap")
    monkeypatch.undo()
    with pytest.raises(ReferenceNotFound):
        find(runtime.layout, "echo:snap")
    assert console(runtime, running).ping() == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_a_vm_that_was_snapshot_goes_on_and_can_be_snapshot_again(
    frozen: bool, runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not frozen:
        monkeypatch.setattr(freeze, "able", lambda pid: False)
    for count in range(1, 4):
        assert console(runtime, running).ping() == count
        take(runtime, running, f"echo:snap{count}")
        with runtime.instances.control(running) as control:
            assert control.ram().private is frozen
    for count in (3, 1, 2):
        clone = runtime.start(find(runtime.layout, f"echo:snap{count}"), RESTORE).record
        assert console(runtime, clone).ping() == count + 1
    assert console(runtime, running).ping() == 4


def test_a_frozen_vm_may_have_its_memory_twice(runtime: Runtime, running: Record) -> None:
    limits = [procs.parent / "memory.limit_in_bytes" for procs in running.jail.cgroups]
    limits += [procs.parent / "memory.max" for procs in running.jail.cgroups]
    there = [path for path in limits if path.exists()]
    if not there:
        pytest.skip("no memory controller here")
    before = int(there[0].read_text())
    take(runtime, running, "echo:snap")
    assert int(there[0].read_text()) == before + MEMORY


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
        address = maps.find(pid, control.ram().file, MEMORY).address
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
    runtime.remove(runtime.instances.find(running.id), force=True)  # its memory would do for its clones
    clone = runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record
    image = clone.ram_image
    assert image is not None
    runtime.layout.remove_name("echo:snap")
    collect(runtime.layout, runtime.instances.needs)
    assert Path(image).exists()  # the clone needs it
    runtime.remove(clone, force=True)
    collect(runtime.layout, runtime.instances.needs)
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


# --- the table of section 7, cell by cell ----------------------------------------------------------------------------


def _damage(runtime: Runtime, found: Found, change: Callable[[bytearray], None]) -> Found:
    assert found.artifact.manifest.ram_snapshot is not None
    blob = runtime.layout.path(Digest(found.artifact.manifest.ram_snapshot.ref))
    data = bytearray(blob.read_bytes())
    change(data)
    blob.chmod(0o600)
    blob.write_bytes(data)
    return found


def _header_without_json(data: bytearray) -> None:
    prefix = ramsnap.parse_prefix(bytes(data))
    data[128 : prefix.state_offset] = b"x" * prefix.header_size
    data[96:128] = hashlib.sha256(data[128 : prefix.index_end]).digest()


def _flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 0xFF

    return change


def _without_its_parent(runtime: Runtime, found: Found) -> Found:
    image = json.loads(found.artifact.image.raw)
    document = copy.deepcopy(dict(found.artifact.manifest.document))
    document["ramSnapshot"]["parents"] = ["sha256:" + "0" * 64]
    raw = json.dumps(document).encode()
    image["config"].update(digest=runtime.layout.add_bytes(raw), size=len(raw))
    return Found("x", model.load(runtime.layout, runtime.layout.add_bytes(json.dumps(image).encode())))


#: (runtime, snapshot, options, patch) → what is started, and how.
Way = Callable[[Runtime, Found, RunOptions, pytest.MonkeyPatch], tuple[Found, RunOptions]]


def _with_header(change: dict[str, Any]) -> Way:
    def way(_: Runtime, found: Found, options: RunOptions, patch: pytest.MonkeyPatch) -> tuple[Found, RunOptions]:
        _change_header(patch, change)
        return found, options

    return way


def _without_state(
    _: Runtime, found: Found, options: RunOptions, patch: pytest.MonkeyPatch
) -> tuple[Found, RunOptions]:
    original = snapshot.read_needs
    patch.setattr(snapshot, "read_needs", lambda *a: replace(original(*a), state=b"no device state"))
    return found, options


def _unlockable(_: Runtime, found: Found, options: RunOptions, patch: pytest.MonkeyPatch) -> tuple[Found, RunOptions]:
    patch.setattr(locking, "_try", lambda size: errno.ENOMEM)
    manifest = found.artifact.manifest
    assert manifest.ram_snapshot is not None
    ram = replace(manifest.ram_snapshot, mlock_required=True)
    return replace(found, artifact=replace(found.artifact, manifest=replace(manifest, ram_snapshot=ram))), options


def _encrypted(
    runtime: Runtime, found: Found, options: RunOptions, patch: pytest.MonkeyPatch
) -> tuple[Found, RunOptions]:
    patch.setenv("XDG_CONFIG_HOME", str(runtime.root.path))
    clone = runtime.start(found, RESTORE).record
    to = "age1ydsp00qday7e3el7ltr0flzx3sw4gjrl6yvdr6k49zjmhshv3q9qwkqgqd"
    snapshots.take(runtime, clone, Reference.parse("echo:encrypted"), encrypt=[to])
    runtime.remove(runtime.instances.find(clone.id), force=True)
    return find(runtime.layout, "echo:encrypted"), options


#: First cell of a row → the ways to come there.
WAYS: dict[str, list[Way]] = {
    "the artifact has no RAM snapshot": [
        lambda runtime, found, options, _: (find(runtime.layout, "echo:1"), options),
    ],
    "the blob is damaged (sections 2 to 6), at once or while it is unpacked": [
        lambda runtime, found, options, _: (_damage(runtime, found, _flip(0)), options),
        lambda runtime, found, options, _: (_damage(runtime, found, _flip(200)), options),
        lambda runtime, found, options, _: (_damage(runtime, found, _flip(-100)), options),
    ],
    "its header is no JSON document of section 4 (RAM-8)": [
        lambda runtime, found, options, _: (_damage(runtime, found, _header_without_json), options),
    ],
    "it is not of this artifact (RAM-30)": [
        _with_header({"kernel_args": "single"}),
    ],
    "the caller asks for another shape (RAM-31)": [
        lambda _, found, options, __: (found, replace(options, memory=2 * MEMORY)),
        lambda _, found, options, __: (found, replace(options, vcpus=2)),
    ],
    "the host is unfit (RAM-32, RAM-33)": [
        _with_header({"accel": "hvf"}),
        _with_header({"devices": (Device("sound"),)}),
    ],
    "it is encrypted, and no identity that is at hand decrypts it (RAM-60)": [
        _encrypted,
    ],
    "mlock_required can't be honoured (SEC-10)": [
        _unlockable,
    ],
    "the VMM refuses the device state although the host is fit": [
        _without_state,
    ],
    "an ancestor of a diff is missing in the artifact (OCI-6)": [
        lambda runtime, found, options, _: (_without_its_parent(runtime, found), options),
    ],
}


POLICIES = [str(policy) for policy in RestorePolicy]
CELLS = [
    pytest.param(row[0], policy, cell, way, id=f"{row[0][:30]}-{i}-{policy}")
    for row in rfc.table(rfc.RAMSNAP, "what is found", *POLICIES)
    for policy, cell in zip(POLICIES, row[1:], strict=True)
    for i, way in enumerate(WAYS[row[0]])
]


@pytest.mark.spec("RAM-50", "RAM-24", "RAM-30", "RAM-31", "RAM-32")
@pytest.mark.parametrize(("found", "policy", "cell", "way"), CELLS)
@pytest.mark.long
def test_each_cell_of_the_table(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch, found: str, policy: str, cell: str, way: Way
) -> None:
    take(runtime, running, "echo:snap")
    runtime.remove(runtime.instances.find(running.id), force=True)  # its memory would do for its clones
    count = len(runtime.instances.records())
    options = replace(TCG, memory=None, restore=RestorePolicy(policy))
    try:
        started = runtime.start(*way(runtime, find(runtime.layout, "echo:snap"), options, monkeypatch))
    except OvmsError as exc:
        assert exc.code == cell, found  # noqa: PT017 - a cold boot is the other outcome
        assert len(runtime.instances.records()) == count
        return
    assert cell == ("cold boot" if started.not_restored is None else "cold boot, and say why"), found
    assert not started.record.restored


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
