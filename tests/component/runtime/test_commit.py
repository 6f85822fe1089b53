"""Commit and export: real QEMU and qemu-img, bare guest, whose disk is written to through QEMU's monitor."""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from support import disks as file_systems
from support.guests import DISK, MEMORY, Console, qemu_io, write_project

from ovms import process
from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.disk import qcow2
from ovms.errors import DiskFull, DiskInvalid, FileProblem, HostError, StateConflict, ToolMissing, Unsupported
from ovms.oci.reference import Reference
from ovms.progress import NULL, Task
from ovms.runtime import commit, disks, export, images, snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.spec.digest import Digest
from ovms.spec.manifest import DiskFormat
from ovms.spec.states import State

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)


@pytest.fixture
def running(runtime: Runtime, echo: Found) -> Record:
    record = runtime.start(echo, TCG).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")
    return record


def write(runtime: Runtime, record: Record, byte: str, offset: str) -> None:
    assert qemu_io(runtime, record, "disk0", f"write -P {ord(byte)} {offset} 64k") == ""


def make(runtime: Runtime, record: Record, name: str) -> commit.Committed:
    return commit.take(runtime, runtime.instances.find(record.id), Reference.parse(name))


def raw_target(tmp_path: Path, *, over: bool = False) -> export.Target:
    return export.Target(tmp_path / "out.img", DiskFormat.RAW, over)


def exported(runtime: Runtime, name: str, tmp_path: Path) -> bytes:
    target = raw_target(tmp_path, over=True)
    with runtime.layout.using():
        export.of_artifact(runtime.layout, find(runtime.layout, name).artifact, target)
    return target.path.read_bytes()


def disk(**blocks: str) -> bytes:
    """What the disk should hold: block (of 64 KiB) → the byte that fills it."""
    content = bytearray(DISK)
    for name, byte in blocks.items():
        at = int(name[1:]) << 16
        content[at : at + 65536] = byte.encode() * 65536
    return bytes(content)


@pytest.mark.long
def test_a_running_guest_gets_as_many_overlays_as_there_may_be_layers(
    runtime: Runtime, running: Record, echo: Found
) -> None:
    below = len(echo.artifact.manifest.disk_layers)
    record = running
    while below + len(record.overlays) <= limits.DISK_LAYERS_MAX:
        record = disks.still(runtime.instances, record, below).record
    assert runtime.instances.directory(record.id).joinpath(record.overlays[-1]).exists()
    with runtime.instances.control(record) as control:
        assert control.active_overlay() == record.overlays[-1]
        assert control.figures()["disk_read_bytes"] == 0
    with pytest.raises(Unsupported, match="disk layers"):
        disks.still(runtime.instances, record, below)


@pytest.mark.spec("LAY-1", "LAY-4", "OCI-19")
def test_what_a_running_guest_wrote_becomes_one_layer(
    runtime: Runtime, running: Record, echo: Found, tmp_path: Path
) -> None:
    write(runtime, running, "a", "0")
    taken = make(runtime, running, "echo:1-a")
    write(runtime, running, "b", "64k")
    assert taken.layers == 1
    old, new = echo.artifact.manifest.disk_layers, taken.artifact.manifest.disk_layers
    assert new[: len(old)] == old
    assert len(new) == len(old) + 1
    assert taken.artifact.image.subject == echo.artifact.image.descriptor()
    assert exported(runtime, "echo:1-a", tmp_path) == disk(b0="a")
    assert Console(runtime.instances.directory(running.id)).ping() == 1
    record = runtime.start(find(runtime.layout, "echo:1-a"), TCG).record
    write(runtime, record, "c", "128k")
    export.of_instance(runtime, record, raw_target(tmp_path, over=True))
    assert (tmp_path / "out.img").read_bytes() == disk(b0="a", b2="c")


def test_pieces_in_which_nothing_was_written_become_no_layers(
    runtime: Runtime, running: Record, tmp_path: Path
) -> None:
    assert make(runtime, running, "echo:none").layers == 0
    write(runtime, running, "a", "0")
    make(runtime, running, "echo:one")
    assert make(runtime, running, "echo:same").layers == 1
    write(runtime, running, "b", "64k")
    assert make(runtime, running, "echo:two").layers == 2
    runtime.kill(running)
    assert make(runtime, running, "echo:stopped").layers == 2
    assert exported(runtime, "echo:none", tmp_path) == disk()
    assert exported(runtime, "echo:same", tmp_path) == disk(b0="a")
    assert (
        exported(runtime, "echo:two", tmp_path) == exported(runtime, "echo:stopped", tmp_path) == disk(b0="a", b1="b")
    )


def test_a_stopped_instance_s_disk_is_committed_as_it_is(runtime: Runtime, running: Record, tmp_path: Path) -> None:
    write(runtime, running, "a", "1m")
    runtime.stop(running, grace=20)
    before = runtime.instances.find(running.id)
    taken = make(runtime, running, "echo:stopped")
    assert (taken.layers, taken.downtime_ms) == (1, 0.0)
    assert runtime.instances.find(running.id) == before
    assert exported(runtime, "echo:stopped", tmp_path) == disk(b16="a")


def test_the_ram_snapshot_of_another_disk_is_left_behind(runtime: Runtime, running: Record) -> None:
    snapshots.take(runtime, running, Reference.parse("echo:snap"))
    clone = runtime.start(find(runtime.layout, "echo:snap"), RunOptions(accel=Accel.TCG)).record
    write(runtime, clone, "c", "0")
    taken = make(runtime, clone, "echo:disk")
    assert taken.artifact.manifest.ram_snapshot is None
    assert not runtime.start(find(runtime.layout, "echo:disk"), TCG).record.restored


def test_an_overlay_that_a_hostile_vmm_has_changed_is_refused(
    runtime: Runtime, running: Record, tmp_path: Path
) -> None:
    write(runtime, running, "a", "0")
    make(runtime, running, "echo:good")
    runtime.kill(running)
    # not the newest, which is looked at anyway
    overlay = runtime.instances.directory(running.id) / running.overlays[0]
    with overlay.open("r+b") as file:
        file.seek(72)
        file.write((1 << 2).to_bytes(8, "big"))
    with pytest.raises(DiskInvalid, match="external data file"):
        make(runtime, running, "echo:bad")
    with pytest.raises(DiskInvalid, match="external data file"):
        export.of_instance(runtime, running, raw_target(tmp_path))
    # one that was changed after it was looked at
    with pytest.raises(DiskInvalid, match="external data file"):
        list(disks.add_overlays(runtime.layout, [overlay], 1, NULL))
    assert not list(tmp_path.glob("*out.img*"))


def test_an_instance_that_changes_is_left_alone(runtime: Runtime, running: Record, tmp_path: Path) -> None:
    runtime.instances.save(replace(runtime.instances.find(running.id), stop_requested=True))
    assert runtime.instances.status(runtime.instances.find(running.id)).state is State.STOPPING
    with pytest.raises(StateConflict, match="is stopping"):
        make(runtime, running, "echo:x")
    with pytest.raises(StateConflict, match="is stopping"):
        export.of_instance(runtime, running, raw_target(tmp_path))


def test_too_many_layers_are_refused(
    runtime: Runtime, running: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(runtime, running, "a", "0")
    monkeypatch.setattr(limits, "DISK_LAYERS_MAX", 1)
    before = runtime.instances.find(running.id)
    with pytest.raises(Unsupported, match="more than 1 disk layers"):
        make(runtime, running, "echo:x")
    with pytest.raises(Unsupported, match="more than 1 disk layers"):
        export.of_instance(runtime, running, raw_target(tmp_path))
    assert runtime.instances.find(running.id) == before, "the guest was not paused for it"
    runtime.kill(running)
    with pytest.raises(Unsupported, match="more than 1 disk layers"):
        make(runtime, running, "echo:x")
    export.of_instance(runtime, running, raw_target(tmp_path))
    assert (tmp_path / "out.img").read_bytes() == disk(b0="a")


def test_a_vm_without_a_disk_has_nothing_to_commit(runtime: Runtime, echo_kernel: Path, tmp_path: Path) -> None:
    manifest = write_project(tmp_path / "bare", echo_kernel, disk=False)
    Builder(runtime.layout, lambda host: pytest.fail(host)).build(manifest, name="bare:1")
    found = find(runtime.layout, "bare:1")
    record = runtime.start(found, TCG).record
    with pytest.raises(Unsupported, match="has no disk"):
        make(runtime, record, "bare:2")
    with pytest.raises(Unsupported, match="has no disk"):
        export.of_instance(runtime, record, raw_target(tmp_path))
    with pytest.raises(Unsupported, match="has no disk"):
        export.of_artifact(runtime.layout, found.artifact, raw_target(tmp_path))


# --- export ----------------------------------------------------------------------------------------------------------


def test_a_running_guest_is_exported_as_it_was_in_one_moment(runtime: Runtime, running: Record, tmp_path: Path) -> None:
    write(runtime, running, "a", "0")
    written = export.of_instance(runtime, running, raw_target(tmp_path))
    write(runtime, running, "b", "64k")
    content = (tmp_path / "out.img").read_bytes()
    assert content == disk(b0="a")
    assert written.virtual_size == DISK
    assert written.size == os.stat(tmp_path / "out.img").st_blocks * 512 < 1 << 20
    assert written.downtime_ms > 0
    target = export.Target(tmp_path / "out.qcow2", DiskFormat.QCOW2)
    export.of_instance(runtime, running, target)
    told = subprocess.run(["qemu-img", "check", target.path], capture_output=True, text=True, timeout=30)
    assert "No errors" in told.stdout, told
    with target.path.open("rb") as file:
        assert qcow2.check_header(file.fileno(), "it").virtual_size == DISK
    # an artifact can be built of it at once
    directory = tmp_path / "again"
    directory.mkdir()
    target.path.rename(directory / "base.qcow2")
    manifest = write_project(directory, runtime.layout.path(_kernel(runtime)))
    Builder(runtime.layout, lambda host: pytest.fail(host)).build(manifest, name="flat:1")
    assert exported(runtime, "flat:1", tmp_path) == disk(b0="a", b1="b")
    assert Console(runtime.instances.directory(running.id)).ping() == 1


def _kernel(runtime: Runtime) -> Digest:
    kernel = find(runtime.layout, "echo:1").artifact.manifest.kernel
    assert kernel is not None
    return Digest(kernel.ref)


@pytest.mark.spec("LAY-10")
def test_a_hostile_layer_is_refused_as_at_a_start(runtime: Runtime, echo: Found, tmp_path: Path) -> None:
    blob = runtime.layout.path(Digest(echo.artifact.manifest.disk_layers[0].ref))
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(72)
        file.write((1 << 2).to_bytes(8, "big"))
    with pytest.raises(DiskInvalid, match="external data file"):
        export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path))
    assert not (tmp_path / "out.img").exists()


def test_progress_is_told_up_to_the_end(runtime: Runtime, echo: Found, tmp_path: Path) -> None:
    told: list[int] = []

    class Counting(AbstractContextManager["Counting"]):
        def __exit__(self, *error: object) -> None:
            return None

        def advance(self, amount: int, /) -> None:
            told.append(amount)

        def note(self, text: str, /) -> None:
            return None

        waiting = note

    class Tasks:
        def task(self, label: str, total: int | None = None) -> Task:
            assert (label, total) == ("out.img", DISK)
            return Counting()

    export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path), Tasks())
    assert sum(told) == DISK


def test_nothing_of_the_user_s_is_replaced_unless_asked_for(runtime: Runtime, echo: Found, tmp_path: Path) -> None:
    (tmp_path / "out.img").write_text("mine")
    with pytest.raises(FileProblem, match="is there already"):
        export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path))
    assert (tmp_path / "out.img").read_text() == "mine"
    export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path, over=True))
    assert (tmp_path / "out.img").read_bytes() == disk()
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    (tmp_path / "link").symlink_to("elsewhere")
    for path in (tmp_path, tmp_path / "none" / "x", tmp_path / "link"):
        with pytest.raises(FileProblem):
            export.of_artifact(runtime.layout, echo.artifact, export.Target(path, DiskFormat.RAW, replace=True))


@pytest.mark.parametrize("over", [False, True])
def test_a_file_system_without_files_that_have_no_name(
    runtime: Runtime, echo: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    monkeypatch.setattr(export, "_NAMELESS", os.O_DIRECTORY)
    before = {path.name for path in tmp_path.iterdir()}
    export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path, over=over))
    assert (tmp_path / "out.img").read_bytes() == disk()
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out.img"}


def test_a_file_that_comes_meanwhile_stays(
    runtime: Runtime, echo: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export._publish

    def publish(fd: int, target: export.Target) -> None:
        target.path.write_text("mine")
        real(fd, target)

    monkeypatch.setattr(export, "_publish", publish)
    with pytest.raises(FileProblem, match="meanwhile"):
        export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path))
    assert [path.name for path in tmp_path.glob("*out.img*")] == ["out.img"]
    assert (tmp_path / "out.img").read_text() == "mine"


def test_a_tool_that_fails_or_hangs_leaves_nothing(
    runtime: Runtime, echo: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    script = "#!/bin/sh\ncase $1 in measure) echo '{\"required\": 1}';; *) %s;; esac\n"
    (tools / "qemu-img").write_text(script % "echo broken >&2; exit 3")
    (tools / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(HostError, match=r"exit code 3.*broken"):
        export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path))
    (tools / "qemu-img").write_text(script % "exec sleep 60")
    monkeypatch.setattr(images, "STALL", 0.2)
    with pytest.raises(HostError, match="no progress"):
        export.of_artifact(runtime.layout, echo.artifact, raw_target(tmp_path))
    assert not list(tmp_path.glob("*out.img*"))


def test_the_tool_that_is_missing_is_named(
    runtime: Runtime, running: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "TOOL", "no-such-qemu-img")
    before = runtime.instances.find(running.id)
    with pytest.raises(ToolMissing, match="no-such-qemu-img"):
        export.of_instance(runtime, running, raw_target(tmp_path))
    assert runtime.instances.find(running.id) == before, "the guest was not bothered for it"
    assert process.PACKAGES["qemu-img"] == "qemu-utils"


def test_a_full_disk_is_told_before_the_work(runtime: Runtime, running: Record, tmp_path: Path) -> None:
    for i in range(4):
        write(runtime, running, "a", f"{i}m")
    make(runtime, running, "echo:full")
    artifact = find(runtime.layout, "echo:full").artifact
    with file_systems.small(tmp_path / "small", size=8 << 20) as small:
        target = export.Target(small.path / "out.img", DiskFormat.RAW)
        with pytest.raises(DiskFull, match="the image needs"):
            export.of_artifact(runtime.layout, artifact, target)
        assert list(small.path.iterdir()) == []


@pytest.mark.spec("LAY-2", "LAY-3")
def test_every_node_says_what_is_below_it_and_no_file_is_named() -> None:
    layers = [images.Open(i + 10, format, "x") for i, format in enumerate([DiskFormat.RAW, *[DiskFormat.QCOW2] * 2])]
    node = images._graph(layers)
    assert node["file"]["filename"] == "/proc/self/fd/12"
    assert node["backing"]["backing"]["driver"] == "raw"
    assert images._graph(layers[1:])["backing"]["backing"] is None


def test_a_broken_off_freeze_lets_the_guest_go_on(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.instances.locked(running) as record, runtime.instances.control(record) as control:

        def look() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            disks.freeze(runtime.instances, record, control, look)
        assert control.state() == "running"
    assert Console(runtime.instances.directory(running.id)).ping() == 1
