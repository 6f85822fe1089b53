"""Snapshots of running instances: memory, device state and what the guest wrote, as a new artifact."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovms import fsutil
from ovms.artifact import model
from ovms.artifact.parts import ram_annotations
from ovms.disk import qcow2
from ovms.errors import Unsupported
from ovms.memory import capture, compat, snapshot
from ovms.oci.descriptor import Descriptor
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.spec import limits
from ovms.spec.digest import Digest
from ovms.spec.manifest import Compression, DiskFormat, PartKind
from ovms.spec.states import Call, after
from ovms.vmm.capabilities import require_snapshots
from ovms.vmm.model import RunState
from ovms.vmm.protocol import Control


@dataclass(frozen=True)
class Taken:
    """A snapshot in the store. ``downtime_ms`` is how long the guest stood still; ``ram_size`` the blob's bytes."""

    artifact: model.Artifact
    downtime_ms: float
    ram_size: int


@dataclass(frozen=True)
class _Frozen:
    """What was taken while the VM stood still. ``record`` names the overlay that takes the writes now."""

    record: Record
    state: bytes
    memory: capture.Capture
    overlays: tuple[Path, ...]
    downtime_ms: float


def take(runtime: Runtime, record: Record, name: Reference | None, progress: Progress = NULL) -> Taken:
    """Takes a snapshot of a running instance, which goes on, and lets *name* stand for it in the store.

    Raises:
        StateConflict: the instance does not run.
        DiskFull: said before the guest is paused, wherever the need is known.
        VmmError, HostError: the VMM or the host refused; the guest goes on.
    """
    instances, layout = runtime.instances, runtime.layout
    # before the lock, which a start may hold for long
    after(instances.status(record).state, Call.SNAPSHOT, record.name)
    with instances.locked(record) as newest, layout.using(), contextlib.ExitStack() as scratch:
        state = instances.status(newest).state
        after(state, Call.SNAPSHOT, newest.name)
        require_snapshots(runtime.vmm(newest.vmm), newest.name, disk=newest.machine.disk_size is not None)
        source = runtime.artifact(newest)
        if len(source.manifest.disk_layers) + len(newest.overlays) > limits.DISK_LAYERS_MAX:
            raise Unsupported(f"{newest.name} would have more than {limits.DISK_LAYERS_MAX} disk layers")
        directory = instances.directory(newest.id)
        fsutil.require_space(directory, newest.machine.memory // 2, "a snapshot")
        # without a name: gone whatever happens to us
        memory = scratch.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))
        with instances.control(newest) as control:
            frozen = _freeze(runtime, newest, control, memory.fileno())
        frozen.memory.finish()
        parts, document, size = _add_parts(runtime, frozen, source, progress)
        artifact = model.compose(layout, document, parts, subject=source.image.descriptor())
        if name is not None:
            layout.set_name(str(name), artifact.image.descriptor())
        return Taken(artifact, frozen.downtime_ms, size)


def _freeze(runtime: Runtime, record: Record, control: Control, memory: int) -> _Frozen:
    instances = runtime.instances
    directory = instances.directory(record.id)
    record = _drop_unused(directory, record, control.active_overlay())
    used = record.overlays
    new, disk_size = None, record.machine.disk_size
    if disk_size is not None:
        record = record.with_overlay()
        new = directory / record.overlays[-1]
        qcow2.create_overlay(new, disk_size)
    was_running = control.state() is RunState.RUNNING
    # Noted first: should we be killed, the next command lets the guest go on.
    record = instances.save(replace(record, pausing=was_running))
    began = time.monotonic()
    try:
        control.pause()
        if new is not None:
            control.add_overlay(new)
        state = control.save_state()
        taken = capture.take(control.ram(), memory)
    finally:
        if was_running:
            control.resume()
        downtime = round((time.monotonic() - began) * 1000, 1)
        record = instances.save(replace(record, pausing=False))
    return _Frozen(record, state, taken, tuple(directory / name for name in used), downtime)


def _drop_unused(directory: Path, record: Record, active: str | None) -> Record:
    # A snapshot that was broken off may have left a new overlay that the VMM never took.
    if active is None or active not in record.overlays:
        return record
    used = record.overlays[: record.overlays.index(active) + 1]
    for name in record.overlays[len(used) :]:
        (directory / name).unlink(missing_ok=True)
    return replace(record, overlays=used)


def _add_parts(
    runtime: Runtime, frozen: _Frozen, source: model.Artifact, progress: Progress
) -> tuple[model.Parts, dict[str, Any], int]:
    # The blobs of the snapshot's artifact, its manifest, and the size of the RAM blob.
    layout, manifest, record = runtime.layout, source.manifest, frozen.record
    disks = list(_add_overlays(runtime, frozen, len(manifest.disk_layers), progress))
    header = compat.describe(
        runtime.vmm(record.vmm),
        record.machine,
        manifest,
        source.digest,
        tuple(d.digest for d in disks),
        network=record.network.state,
    )
    ram, size = snapshot.store(layout, frozen.memory, frozen.state, header, progress)
    document = copy.deepcopy(dict(manifest.document))
    if disks:
        document["diskLayers"] = [
            *document.get("diskLayers", []),
            *({"ref": d.digest, "format": str(DiskFormat.QCOW2), "size": d.size} for d in disks),
        ]
    document["ramSnapshot"] = {
        **{key: value for key, value in document.get("ramSnapshot", {}).items() if key != "parents"},
        "ref": ram,
        "compression": str(Compression.LZ4),
    }
    document["metadata"] = {**document.get("metadata", {}), "created": header.created}
    with fsutil.open_input(layout.path(ram), "the RAM snapshot") as blob:
        descriptor = model.part_descriptor(PartKind.RAM, ram, size, annotations=ram_annotations(blob.fileno()))
    kept: dict[PartKind, list[Descriptor]] = {kind: [] for kind in PartKind}
    for part in manifest.parts():
        kept[part.kind].append(model.reused(source, part))
    return (
        model.Parts(
            kernel=next(iter(kept[PartKind.KERNEL]), None),
            initrd=next(iter(kept[PartKind.INITRD]), None),
            disks=(*kept[PartKind.DISK], *disks),
            ram_snapshots=(descriptor,),
        ),
        document,
        size,
    )


def _add_overlays(runtime: Runtime, frozen: _Frozen, first: int, progress: Progress) -> Iterator[Descriptor]:
    for i, path in enumerate(frozen.overlays):
        with (
            fsutil.open_input(path, "the overlay") as file,
            progress.task(f"disk layer {first + i}", os.fstat(file.fileno()).st_size) as task,
        ):
            digest, size, _ = runtime.layout.add_file(file.fileno(), "the overlay", advance=task.advance)
        yield model.part_descriptor(PartKind.DISK, Digest(digest), size, format=DiskFormat.QCOW2, number=first + i)
