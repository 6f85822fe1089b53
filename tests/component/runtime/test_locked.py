"""Snapshots whose memory must be locked: real VMs, and what the kernel says of their processes."""

from __future__ import annotations

import copy
import errno
import mmap
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import MEMORY, Console

from ovms import fsutil
from ovms.artifact import model
from ovms.artifact.resolve import Found
from ovms.errors import SnapshotIncompatible
from ovms.memory import locking, sealing, template
from ovms.oci.descriptor import Descriptor
from ovms.oci.reference import Reference
from ovms.runtime import security, snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import of_bytes
from ovms.spec.manifest import PartKind

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG)


def with_fields(runtime: Runtime, taken: snapshots.Taken, **fields: bool) -> Found:
    """The snapshot again, with other fields of ``ramSnapshot`` in its manifest."""
    document = copy.deepcopy(dict(taken.artifact.manifest.document))
    document["ramSnapshot"].update(fields)
    parts: dict[PartKind, list[Descriptor]] = {kind: [] for kind in PartKind}
    for part in taken.artifact.manifest.parts():
        parts[part.kind].append(model.reused(taken.artifact, part))
    artifact = model.compose(
        runtime.layout,
        document,
        model.Parts(
            kernel=parts[PartKind.KERNEL][0],
            disks=tuple(parts[PartKind.DISK]),
            ram_snapshots=tuple(parts[PartKind.RAM]),
        ),
    )
    return Found("echo:locked", artifact)


@pytest.fixture
def taken(runtime: Runtime, echo: Found) -> snapshots.Taken:
    record = runtime.start(echo, TCG).record
    there = console(runtime, record)
    there.wait_for("READY")
    there.ping()
    return snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse("echo:snap"))


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def locked_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck:"))


def mappings(pid: int) -> list[dict[str, int]]:
    """KiB of each of its mappings of a template, by the names in ``smaps``."""
    found: list[dict[str, int]] = []
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if " " in key:  # the line that begins a mapping
            inside = "memfd:ovms-template" in line
            if inside:
                found.append({})
        elif inside and rest.strip().endswith("kB"):
            found[-1][key] = int(rest.split()[0])
    return found


def template_of(record: Record) -> Path:
    assert record.watcher is not None
    fds = Path(f"/proc/{record.watcher.pid}/fd").iterdir()
    return next(fd for fd in fds if "memfd:ovms-template" in str(fd.readlink()))


@pytest.mark.spec("SEC-10", "RAM-35")
def test_the_template_is_locked_once_and_copy_on_write_stays(runtime: Runtime, taken: snapshots.Taken) -> None:
    found = with_fields(runtime, taken, mlock_required=True, preload_hint=True)
    clones = [runtime.start(found, RESTORE).record for _ in range(2)]
    assert template_of(clones[0]).stat().st_ino == template_of(clones[1]).stat().st_ino
    data = template_of(clones[0]).stat().st_blocks * 512
    assert 0 < data < MEMORY / 4, "the holes of the template were filled"
    for clone in clones:
        assert clone.memory_locked
        assert clone.watcher is not None
        assert clone.process is not None
        (here,) = mappings(clone.watcher.pid)
        assert locked_kib(clone.watcher.pid) == MEMORY // 1024
        with template_of(clone).open("rb") as held:
            needed = sum(end - start for start, end in fsutil.data_extents(held.fileno(), MEMORY))
        assert needed <= here["Rss"] * 1024 <= data, "not all that is data is in memory, and so locked"
        assert here["Locked"] > 0
        # the VMM locks nothing of its own, and has copied what its guest wrote and no more
        assert locked_kib(clone.process.pid) == 0
        assert sum(part["Private_Dirty"] for part in mappings(clone.process.pid)) < MEMORY // 1024 / 4
        children = Path(f"/proc/{clone.watcher.pid}/task/{clone.watcher.pid}/children").read_text().split()
        assert [mappings(int(child)) for child in children if int(child) != clone.process.pid] == [[]]
        assert console(runtime, clone).ping() == 2
        # what it writes later is not locked, and stays out of swap where a cgroup counts it
        for procs in clone.jail.cgroups:
            for name in ("memory.swap.max", "memory.swappiness"):
                assert not (procs.parent / name).exists() or (procs.parent / name).read_text() == "0\n"
        said = security.in_force(clone)["memory"]
        assert said == {"required": True, "locked_bytes": MEMORY}
    runtime.remove(clones[0], force=True)
    assert console(runtime, clones[1]).ping() == 3
    # a snapshot that does not ask for it: nothing is locked
    plain = runtime.start(with_fields(runtime, taken), RESTORE).record
    assert not plain.memory_locked
    assert security.in_force(plain)["memory"] == {"required": False, "locked_bytes": 0}


@pytest.mark.spec("SEC-10", "RAM-50")
def test_where_memory_cannot_be_locked_nothing_is_started(
    runtime: Runtime, taken: snapshots.Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "_try", lambda size: errno.ENOMEM)
    found = with_fields(runtime, taken, mlock_required=True)
    before = len(runtime.instances.records())
    with pytest.raises(SnapshotIncompatible, match=f"takes {MEMORY >> 20} MiB.*RLIMIT_MEMLOCK") as caught:
        runtime.start(found, replace(RESTORE, restore=RestorePolicy.REQUIRE))
    assert "limits.d" in str(caught.value.hint)
    assert len(runtime.instances.records()) == before
    started = runtime.start(found, TCG)
    assert (started.record.restored, started.record.memory_locked) == (False, False)
    assert "RLIMIT_MEMLOCK" in str(started.not_restored)


@pytest.mark.parametrize(
    ("limit", "size", "fits"), [(1 << 20, 2 << 20, False), (4 << 20, 2 << 20, True), (0, 4096, False)]
)
def test_the_limit_is_tried_without_the_capability(limit: int, size: int, fits: bool) -> None:
    code = f"from ovms.memory import locking; print(locking.why_not({size}))"
    argv = ["prlimit", f"--memlock=0:{limit}", "setpriv", "--bounding-set=-ipc_lock", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("only root can do without a capability")
    assert done.returncode == 0, done.stderr
    assert (done.stdout == "None\n") is fits
    assert fits or f"this user may lock {limit >> 20} MiB (RLIMIT_MEMLOCK)" in done.stdout


def test_what_is_read_in_fills_no_holes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"x" * 8192)
    with template.opened(lambda: image, image.stat().st_size, of_bytes(b"preload"), (), preload=True) as fd:
        assert list(fsutil.data_extents(fd, 64 << 20)) == [(32 << 20, (32 << 20) + 8192)]


def test_a_mapping_that_is_just_going_is_waited_for() -> None:
    fd = os.memfd_create("seal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        memory = mmap.mmap(fd, 4096)
        threading.Timer(0.1, memory.close).start()
        sealing.seal(fd)
        assert sealing.is_sealed(fd)
        sealing.seal(fd)
    finally:
        os.close(fd)
