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
from ovms.runtime import record as records
from ovms.runtime.record import Restart
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.spec.states import State

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
