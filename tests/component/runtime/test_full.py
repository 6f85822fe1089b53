"""On a file system without a byte of room: what frees some works, and what needs some says so. Real QEMU, bare guest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import disks, guests
from support.cli import Ovm
from support.disks import Disk

from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.errors import DiskFull
from ovms.memory import capture
from ovms.oci.reference import Reference
from ovms.runtime import record as records
from ovms.runtime import snapshots
from ovms.runtime.record import Restart
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.spec.states import State
from ovms.vmm import maps

TCG = RunOptions(memory=guests.MEMORY, accel=Accel.TCG)


def no_registry(host: str) -> object:
    raise AssertionError(f"a test of the runtime asks for the registry {host}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with disks.small(tmp_path / "disk", size=48 << 20) as disk:
        yield disk


@pytest.fixture
def runtime(disk: Disk, qemu_cache: Path) -> Iterator[Runtime]:
    root = Root(disk.path / "root")
    root.prepare()
    root.cache.symlink_to(qemu_cache)
    runtime = Runtime(root)
    yield runtime
    for record in runtime.instances.records():
        runtime.remove(record, force=True)
    assert guests.qemu_children(root.path) == []


@pytest.fixture
def ovm(runtime: Runtime, tmp_path: Path) -> Ovm:
    return Ovm(runtime.root.path, tmp_path)


@pytest.fixture
def echo(runtime: Runtime, echo_kernel: Path, tmp_path: Path) -> Found:
    manifest = guests.write_project(tmp_path / "project", echo_kernel)
    Builder(runtime.layout, no_registry).build(manifest, name="echo:1")  # type: ignore[arg-type]
    return find(runtime.layout, "echo:1")


def room(disk: Disk) -> int:
    return os.statvfs(disk.path).f_bavail


def test_a_vm_is_stopped_and_removed(runtime: Runtime, echo: Found, disk: Disk, ovm: Ovm) -> None:
    record = runtime.start(echo, replace(TCG, name="one", restart=Restart())).record
    disk.fill()
    # more than once: the room that was kept is kept again
    for _ in range(3):
        with runtime.instances.locked(record) as newest:
            runtime.instances.save(replace(newest, pausing=not newest.pausing))
        disk.fill()
    assert room(disk) == 0
    assert ovm("stop", "-t", "0", "one").code == 0
    assert record.process is not None
    assert not record.process.alive()
    assert runtime.instances.status(runtime.instances.find("one")).state is State.STOPPED
    disk.fill()
    ovm.ok("rm", "one")
    assert runtime.instances.records() == []


def test_a_vm_is_removed_by_force(runtime: Runtime, echo: Found, disk: Disk, ovm: Ovm) -> None:
    record = runtime.start(echo, replace(TCG, name="one", restart=Restart())).record
    (runtime.instances.directory(record.id) / "record.spare").unlink()  # of an ovm that kept none
    disk.fill()
    assert room(disk) == 0
    done = ovm("stop", "--json", "-t", "0", "one")
    assert (done.code, done.error["code"]) == (8, "disk-full"), done.err
    assert "one" in done.error["message"]
    assert record.process is not None
    assert record.process.alive(), "it would be started again at once"
    ovm.ok("rm", "-f", "one")
    assert not record.process.alive()
    assert runtime.instances.records() == []


def test_what_needs_room_says_so(runtime: Runtime, echo: Found, disk: Disk, ovm: Ovm) -> None:
    disk.fill()
    assert room(disk) == 0
    done = ovm("run", "--json", "-d", "--accel", "tcg", "echo:1")
    assert (done.code, done.error["code"]) == (8, "disk-full"), done.err
    assert done.error["hint"]
    assert str(runtime.root.path) in done.error["message"]
    assert runtime.instances.records() == []
    disk.free()
    assert list(runtime.root.instances.glob("[!.]*")) == []


def test_a_record_is_whole_whatever_the_room(runtime: Runtime, echo: Found, disk: Disk) -> None:
    record = runtime.start(echo, TCG).record
    directory = runtime.instances.directory(record.id)
    (directory / "record.spare").unlink()
    disk.fill()
    with pytest.raises(DiskFull, match=record.name):
        runtime.instances.save(replace(record, pausing=True))
    assert records.load(directory) == record
    assert not list(directory.glob("*.tmp"))


@pytest.mark.parametrize("asked", [True, False])
def test_a_clone_goes_on_whose_pages_find_no_room(
    runtime: Runtime, echo: Found, disk: Disk, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Before the pause, where somebody asks; a full disk below a mapped file is a fault for who writes there: the kernel does."""
    monkeypatch.setattr("ovms.fsutil.SPACE_RESERVE", 0)
    first = runtime.start(echo, TCG).record
    guests.Console(runtime.instances.directory(first.id)).wait_for("READY")
    snapshots.take(runtime, first, Reference.parse("echo:a"))
    runtime.remove(runtime.instances.find(first.id), force=True)
    clone = runtime.start(find(runtime.layout, "echo:a"), RunOptions(accel=Accel.TCG)).record
    with runtime.instances.locked(clone) as newest, runtime.instances.control(newest) as control:
        ram = control.ram()
        memory = os.open(f"/proc/{ram.pid}/mem", os.O_RDWR)
        os.pwrite(memory, b"x" * (12 << 20), maps.find(ram.pid, ram.file, ram.size).address + (16 << 20))
        os.close(memory)
    disk.take(room(disk) * 4096 - (2 << 20))
    with monkeypatch.context() as patch, pytest.raises(DiskFull, match="memory"):
        if not asked:
            patch.setattr("ovms.fsutil.require_space", lambda *_: None)
            patch.setattr(capture, "_POPULATE_WRITE", 12345)
        snapshots.take(runtime, clone, Reference.parse("echo:b"))
    assert (len(runtime.instances.find(clone.id).overlays) == 1) == asked, "the guest was not paused for it"
    console = guests.Console(runtime.instances.directory(clone.id))
    assert console.ping() == 1
    disk.free()
    assert snapshots.take(runtime, runtime.instances.find(clone.id), Reference.parse("echo:b")).parents == 1
    assert console.ping() == 2
