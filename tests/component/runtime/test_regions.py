"""Memory shared with a guest: real QEMU, and a bare guest that finds the PCI devices by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import MEMORY, Console, write_project

from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.errors import InputError, NotFound, ResourceError, SnapshotInvalid, StateConflict, Unsupported
from ovms.oci.reference import Reference
from ovms.runtime import regions, snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import limits
from ovms.spec.choices import Accel

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
DEVICES = "devices: [{type: ivshmem, name: mail, size: 65536, mmio_addr: '0xfe000000'}]\n"

Make = Callable[[str], Found]


@pytest.fixture
def make(runtime: Runtime, echo_kernel: Path, tmp_path: Path) -> Make:
    def made(devices: str) -> Found:
        manifest = write_project(tmp_path / "project", echo_kernel, more=devices)
        Builder(runtime.layout, None).build(manifest, name="echo:1")  # type: ignore[arg-type]
        return find(runtime.layout, "echo:1")

    return made


def start(runtime: Runtime, found: Found, options: RunOptions = TCG) -> tuple[Record, Console]:
    record = runtime.start(found, options).record
    console = Console(runtime.instances.directory(record.id))
    if not record.restored:
        console.wait_for("READY")
    return record, console


def word(runtime: Runtime, record: Record, device: str = "mail", offset: int = 0) -> int:
    return int.from_bytes(regions.read(runtime.instances, record, device, offset, 4), "little")


@pytest.mark.spec("DEV-2", "DEV-4", "RUN-15")
def test_host_and_guest_read_what_the_other_writes(runtime: Runtime, make: Make) -> None:
    record, console = start(runtime, make(DEVICES))
    assert console.ask("n", "REGION ") != 0
    assert console.ask("g", "GOT ") == 0
    runtime.inject(record, "mail", 0, (0x12345678).to_bytes(4, "little"))
    assert console.ask("g", "GOT ") == 0x12345678
    console.send("pp")
    assert console.ask("g", "GOT ") == 0x12345678
    assert word(runtime, record, offset=4) == 2
    assert console.ask("n", "REGION ") == 0


@pytest.mark.spec("DEV-3")
def test_regions_are_on_the_bus_in_the_order_of_the_manifest(runtime: Runtime, make: Make) -> None:
    count = 6  # more than one slot of the bus has
    listing = ", ".join(f"{{type: ivshmem, name: r{i}, size: {4096 << i}}}" for i in range(count))
    record, console = start(runtime, make(f"devices: [{listing}]\n"))
    for i in range(count):
        runtime.inject(record, f"r{i}", 0, (100 + i).to_bytes(4, "little"))
    seen = []
    while console.ask("n", "REGION "):
        seen.append(console.ask("g", "GOT "))
    assert seen == [100 + i for i in range(count)]


@pytest.mark.long
@pytest.mark.spec("DEV-3")
def test_as_many_regions_as_a_manifest_may_have(runtime: Runtime, make: Make) -> None:
    listing = ", ".join(f"{{type: ivshmem, name: r{i}, size: 4096}}" for i in range(limits.DEVICES_MAX))
    record, console = start(runtime, make(f"devices: [{listing}]\n"))
    runtime.inject(record, f"r{limits.DEVICES_MAX - 1}", 0, b"\7")
    last = 0
    while console.ask("n", "REGION "):
        last = console.ask("g", "GOT ")
    assert last == 7


@pytest.mark.spec("DEV-5", "RUN-20", "RAM-30", "RAM-36")
def test_a_clone_has_regions_of_its_own_that_begin_as_zeroes(runtime: Runtime, make: Make) -> None:
    record, console = start(runtime, make(DEVICES))
    console.ask("n", "REGION ")
    runtime.inject(record, "mail", 0, b"\1\0\0\0")
    taken = snapshots.take(runtime, record, Reference.parse("echo:snap"))
    assert console.ask("g", "GOT ") == 1
    snap = find(runtime.layout, "echo:snap")
    clones = [start(runtime, snap, RunOptions(accel=Accel.TCG)) for _ in range(2)]
    for i, (clone, there) in enumerate(clones):
        assert clone.restored
        assert clone.machine.regions == record.machine.regions
        assert there.ask("g", "GOT ") == 0
        runtime.inject(clone, "mail", 0, (10 + i).to_bytes(4, "little"))
        there.send("p")
    for i, (clone, there) in enumerate(clones):
        assert there.ask("g", "GOT ") == 10 + i
        assert word(runtime, clone, offset=4) == 1
    assert (word(runtime, record), word(runtime, record, offset=4)) == (1, 0)
    # a clone is snapshot and restored again, and a snapshot is of this artifact's devices alone
    snapshots.take(runtime, clones[0][0], Reference.parse("echo:again"))
    again, there = start(runtime, find(runtime.layout, "echo:again"), RunOptions(accel=Accel.TCG))
    assert again.restored
    assert there.ask("g", "GOT ") == 0
    manifest = replace(taken.artifact.manifest, devices=())
    with pytest.raises(SnapshotInvalid, match="another shared memory"):
        runtime.start(replace(snap, artifact=replace(snap.artifact, manifest=manifest)), RunOptions(accel=Accel.TCG))


@pytest.mark.spec("RUN-15")
def test_what_does_not_fit_is_refused_and_nothing_is_written(runtime: Runtime, make: Make) -> None:
    record, _ = start(runtime, make(DEVICES))
    size = 65536
    runtime.inject(record, "mail", size - 4, b"last")
    runtime.inject(record, "mail", size, b"")
    for offset, data in ((size - 3, b"1234"), (size, b"1"), (2**62, b"1"), (-1, b"1"), (size + 1, b"")):
        with pytest.raises(InputError, match="do not lie within") as caught:
            runtime.inject(record, "mail", offset, data)
        assert caught.value.code == "invalid-input"
    assert regions.read(runtime.instances, record, "mail", 0, size) == bytes(size - 4) + b"last"
    with pytest.raises(InputError):
        regions.read(runtime.instances, record, "mail", 1, size)
    with pytest.raises(NotFound, match="no ivshmem device") as missing:
        runtime.inject(record, "male", 0, b"x")
    assert missing.value.code == "not-found"
    assert "mail" in str(missing.value.hint)


@pytest.mark.spec("STA-2")
def test_a_paused_instance_has_memory_and_a_stopped_one_has_none(runtime: Runtime, make: Make) -> None:
    record, console = start(runtime, make(DEVICES))
    console.ask("n", "REGION ")
    with runtime.instances.locked(record) as newest:
        runtime.instances.save(replace(newest, pausing=True))
        with runtime.instances.control(newest) as control:
            control.pause()
    runtime.inject(record, "mail", 0, b"\5")
    runtime.instances.recover()
    assert console.ask("g", "GOT ") == 5
    runtime.stop(record, grace=0)
    with pytest.raises(StateConflict, match="is stopped, which does not allow inject"):
        runtime.inject(record, "mail", 0, b"\5")


def test_a_vm_that_is_started_again_has_a_new_region(runtime: Runtime, make: Make) -> None:
    record, _ = start(runtime, make(DEVICES))
    runtime.inject(record, "mail", 0, b"old")
    runtime.stop(record, grace=0)
    again = runtime.start_again(record)
    assert word(runtime, again) == 0
    runtime.inject(again, "mail", 0, b"new")


@pytest.mark.spec("SEC-6")
def test_a_vmm_can_not_make_a_region_smaller_under_us(runtime: Runtime, make: Make) -> None:
    record, _ = start(runtime, make(DEVICES))
    assert record.process is not None
    descriptors = Path(f"/proc/{record.process.pid}/fd").iterdir()
    entry = next(fd for fd in descriptors if "ovms-region:0" in str(fd.readlink()))
    with entry.open("r+b") as file:
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(file.fileno(), size)


def test_memory_that_is_not_to_be_had_is_said(runtime: Runtime, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = start(runtime, make(DEVICES))

    def full(fd: int, offset: int, count: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="no memory for 1 bytes of mail"):
        runtime.inject(record, "mail", 0, b"x")
    assert word(runtime, record) == 0


@pytest.mark.spec("DEV-1")
def test_another_type_of_device_is_refused_by_name(runtime: Runtime, make: Make) -> None:
    with pytest.raises(Unsupported, match=r"a device of the type 'gpu'.*runtime qemu") as caught:
        runtime.start(make("devices: [{type: gpu, name: one}]\n"), TCG)
    assert caught.value.context == {"adapter": "qemu", "feature": "devices", "rule": "DEV-1"}
    assert runtime.instances.records() == []


def test_the_command_writes_and_reads(runtime: Runtime, make: Make, tmp_path: Path) -> None:
    record, _ = start(runtime, make(DEVICES))

    def ovm(*words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "ovms.cli", "--root", str(runtime.root.path), "inject", record.name, *words]
        return subprocess.run(command, input=data, capture_output=True, timeout=30, check=False)

    assert ovm("mail", "0x10", data=b"\0\xffdata").returncode == 0
    assert ovm("mail", "16", "--read", "6").stdout == b"\0\xffdata"
    (tmp_path / "file").write_bytes(b"from a file")
    said = ovm("mail", "65525", "--file", str(tmp_path / "file"), "--json")
    answer = {"instance_id": record.id, "device": "mail", "offset": 65525}
    assert json.loads(said.stdout) == {**answer, "bytes": 11}
    said = ovm("mail", "65530", "--read", "6", "--json")
    assert json.loads(said.stdout) == {**answer, "offset": 65530, "bytes": 6, "data": "YSBmaWxl"}
    refused = ovm("mail", "65525", data=bytes(12))
    assert (refused.returncode, refused.stdout) == (3, b"")
    assert b"do not lie within the 65536 bytes" in refused.stderr
    assert ovm("male", "0", data=b"x").returncode == 4
    command = [sys.executable, "-m", "ovms.cli", "--root", str(runtime.root.path), "inject", record.name, "male", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as waiting:
        assert waiting.wait(30) == 4  # not after what may never come
    assert ovm("mail", "-1", data=b"x").returncode == 2
