"""Snapshots of running instances: memory, device state and what the guest wrote, as a new artifact."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

from ovms import fsutil, process
from ovms.artifact import model
from ovms.artifact.parts import ram_annotations
from ovms.lazy import dataclass
from ovms.memory import capture, compat, snapshot
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.runtime import attachments, disks, jail
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.spec.manifest import Compression, PartKind
from ovms.spec.states import Call, after
from ovms.vmm.capabilities import require_snapshots


@dataclass(frozen=True)
class Taken:
    """A snapshot in the store. ``downtime_ms`` is how long the guest stood still; ``ram_size`` the blob's bytes.

    ``user_data``: the guest was given some, so its memory may hold secrets.
    """

    artifact: model.Artifact
    downtime_ms: float
    ram_size: int
    user_data: bool = False


#: What was taken while the VM stood still: its device state and its memory.
_Frozen = disks.Frozen[tuple[bytes, capture.Capture]]


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
        attachments.require_snapshot(newest)
        require_snapshots(runtime.vmm(newest.vmm), newest.name, disk=newest.machine.disk_size is not None)
        source = runtime.artifact(newest)
        disks.require_layers(newest, len(source.manifest.disk_layers))
        directory = instances.directory(newest.id)
        fsutil.require_space(directory, newest.machine.memory // 2, "a snapshot")
        # without a name: gone whatever happens to us
        memory = scratch.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))
        with instances.control(newest) as control:
            # a guest that writes to all of its memory has it twice then
            freezes = not control.ram().private and process.memory_available() >= newest.machine.memory
            if freezes:
                jail.allow_frozen(newest.jail, newest.machine)

            def look() -> tuple[bytes, capture.Capture]:
                state = control.save_state()
                if freezes and control.freeze_ram():
                    return state, scratch.enter_context(contextlib.closing(capture.frozen(control.ram())))
                return state, capture.take(control.ram(), memory.fileno())

            frozen: _Frozen = disks.freeze(instances, newest, control, look)
        frozen.seen[1].finish()
        parts, document, size = _add_parts(runtime, frozen, source, progress)
        artifact = model.compose(layout, document, parts, subject=source.image.descriptor())
        if name is not None:
            layout.set_name(str(name), artifact.image.descriptor())
        return Taken(artifact, frozen.downtime_ms, size, newest.user_data)


def _add_parts(
    runtime: Runtime, frozen: _Frozen, source: model.Artifact, progress: Progress
) -> tuple[model.Parts, dict[str, Any], int]:
    # The blobs of the snapshot's artifact, its manifest, and the size of the RAM blob.
    layout, manifest, record = runtime.layout, source.manifest, frozen.record
    state, memory = frozen.seen
    added = tuple(disks.add_overlays(layout, frozen.overlays, len(manifest.disk_layers), progress))
    header = compat.describe(
        runtime.vmm(record.vmm),
        record.machine,
        manifest,
        source.digest,
        tuple(d.digest for d in added),
        network=record.network.state,
    )
    ram, size = snapshot.store(layout, memory, state, header, progress)
    document, kept = disks.extended(source, added, header.created)
    document["ramSnapshot"] = {
        **{k: value for k, value in manifest.document.get("ramSnapshot", {}).items() if k != "parents"},
        "ref": ram,
        "compression": str(Compression.LZ4),
    }
    with fsutil.open_input(layout.path(ram), "the RAM snapshot") as blob:
        descriptor = model.part_descriptor(PartKind.RAM, ram, size, annotations=ram_annotations(blob.fileno()))
    return (
        model.Parts(
            kernel=next(iter(kept[PartKind.KERNEL]), None),
            initrd=next(iter(kept[PartKind.INITRD]), None),
            disks=tuple(kept[PartKind.DISK]),
            ram_snapshots=(descriptor,),
        ),
        document,
        size,
    )
