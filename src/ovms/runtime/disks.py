"""What the guest of an instance wrote: made to stand still, and made into layers of a new artifact.

While a VM runs, its newest overlay changes. So it is given another one, in a moment in which it is paused, and what was written until
then is complete. Where the guest's agent helps, its file systems are frozen meanwhile (:mod:`ovms.runtime.quiesce`); without that it is
a disk as after a power failure, which file systems and databases are made for.

A VMM that a guest has taken over can still write to an overlay that it does not use any more. So nothing of a living VM is believed
that was checked before it was copied.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ovms import fsutil
from ovms.artifact import model
from ovms.disk import qcow2
from ovms.disk.layers import check_layer
from ovms.errors import StateConflict, Unsupported
from ovms.lazy import dataclass, replace
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.progress import Progress
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record
from ovms.spec import limits
from ovms.spec.digest import Digest
from ovms.spec.manifest import DiskFormat, PartKind
from ovms.spec.states import State
from ovms.vmm.model import RunState
from ovms.vmm.protocol import Control

T = TypeVar("T")


@dataclass(frozen=True)
class Frozen(Generic[T]):
    """What was written until the VM stood still, and what was *seen* then. ``record`` names the overlay in use now.

    ``not_quiesced``: why the guest's file systems were not frozen then (None: they were, or no guest runs).
    """

    record: Record
    overlays: tuple[Path, ...]
    seen: T
    downtime_ms: float
    not_quiesced: str | None = None


def freeze(
    instances: Instances, record: Record, control: Control, look: Callable[[], T], *, hold: bool = False
) -> Frozen[T]:
    """Pauses a VM, puts a new overlay on its disk, calls *look*, and lets it go on (under the instance's lock).

    With *hold* it stands still when this returns, as a snapshot that goes on: whoever finds it unlocked lets it go on.
    """
    directory = instances.directory(record.id)
    record = _drop_unused(directory, record, control.active_overlay())
    used = record.overlays
    new, disk_size = None, record.machine.disk_size
    if disk_size is not None:
        record = record.with_overlay()
        new = directory / record.overlays[-1]
        # of a snapshot that was killed before it noted it: no VM writes to it
        new.unlink(missing_ok=True)
        with fsutil.noticing_full_disk("a new overlay", directory):
            qcow2.create_overlay(new, disk_size)
    was_running = control.state() is RunState.RUNNING
    # Noted first: should we be killed, the next command lets the guest go on.
    record = instances.save(replace(record, pausing=was_running))
    held = False
    try:
        with control.prepare(new):
            began = time.monotonic()
            try:
                control.pause()
                if new is not None:
                    control.add_overlay(new)
                seen = look()
                held = hold
            finally:
                if was_running and not held:
                    control.resume()
                downtime = round((time.monotonic() - began) * 1000, 1)
    finally:
        record = instances.save(replace(record, pausing=was_running and held))
    return Frozen(record, tuple(directory / name for name in used), seen, downtime)


def _drop_unused(directory: Path, record: Record, active: str | None) -> Record:
    # A snapshot that was broken off may have left a new overlay that the VMM never took.
    if active is None or active not in record.overlays:
        return record
    used = record.overlays[: record.overlays.index(active) + 1]
    for name in record.overlays[len(used) :]:
        (directory / name).unlink(missing_ok=True)
    return replace(record, overlays=used)


def still(instances: Instances, record: Record, below: int, *, quiesce: bool = False) -> Frozen[bool]:
    """The overlays of an instance, on *below* layers, in a state that stays (under its lock). *seen*: whether its VM lives.

    With *quiesce* its guest's file systems are frozen at that moment, where it runs an agent that does that.

    Raises:
        AgentUnavailable: they may stand frozen still.
        Unsupported: it has no disk, or it would become one of too many layers.
        StateConflict: it is just starting or stopping.
    """
    if not record.overlays:
        raise Unsupported(f"{record.name} has no disk")
    state = instances.status(record).state
    directory = instances.directory(record.id)
    if state in (State.STOPPED, State.ERROR):
        return Frozen(record, tuple(directory / name for name in record.overlays), False, 0.0)
    if state not in (State.RUNNING, State.PAUSED):
        raise StateConflict(
            f"the instance {record.name} is {state}, and its disk changes", hint="wait until it has stopped, and try again",
            instance=record.name, state=str(state),
        )  # fmt: skip
    require_layers(record, below)
    with instances.control(record) as control:
        if not quiesce:
            return replace(freeze(instances, record, control, lambda: True), not_quiesced="it was not asked for")
        if state is State.PAUSED:
            return replace(freeze(instances, record, control, lambda: True), not_quiesced="the instance is paused")
        from ovms.runtime.quiesce import file_systems

        with file_systems(instances, record, control) as (noted, why):
            frozen = freeze(instances, noted, control, lambda: True)
        return replace(frozen, record=replace(frozen.record, fs_frozen=False), not_quiesced=why)


def require_layers(record: Record, below: int) -> None:
    """Whether a running VM's disk can get one overlay more.

    Raises:
        Unsupported: it has too many already.
    """
    if below + len(record.overlays) > limits.DISK_LAYERS_MAX:
        raise Unsupported(
            f"{record.name} would have more than {limits.DISK_LAYERS_MAX} disk layers",
            hint="'ovm export' of the stopped instance makes one image of them",
        )


def add_overlays(layout: Layout, overlays: Sequence[Path], first: int, progress: Progress) -> Iterator[Descriptor]:
    """Adds overlays to the store, as disk layers from number *first* on.

    Raises:
        DiskInvalid: a VMM that was taken over made something else of one.
    """
    for number, path in enumerate(overlays, start=first):
        with fsutil.open_input(path, "the overlay") as file:
            yield add_layer(layout, file.fileno(), number, progress)


def add_layer(layout: Layout, fd: int, number: int, progress: Progress) -> Descriptor:
    """Adds an open qcow2 file to the store, as the disk layer of that number. Raises as :func:`add_overlays`."""
    what = f"disk layer {number}"
    with progress.task(what, os.fstat(fd).st_size) as task:
        digest, size, _ = layout.add_file(fd, what, advance=task.advance)
    with fsutil.open_input(layout.path(Digest(digest)), what) as stored:
        check_layer(stored.fileno(), DiskFormat.QCOW2, what)
    return model.part_descriptor(PartKind.DISK, Digest(digest), size, format=DiskFormat.QCOW2, number=number)


def extended(
    source: model.Artifact, disks: Sequence[Descriptor], created: str, *, keep: int = limits.DISK_LAYERS_MAX
) -> tuple[dict[str, Any], Mapping[PartKind, list[Descriptor]]]:
    """The manifest of *source* with *disks* on the first *keep* of its own, and without its RAM snapshot; and the parts that stay."""
    document = copy.deepcopy(dict(source.manifest.document))
    if "diskLayers" in document:
        document["diskLayers"] = document["diskLayers"][:keep]
    if disks:
        document["diskLayers"] = [
            *document.get("diskLayers", []),
            *({"ref": d.digest, "format": str(DiskFormat.QCOW2), "size": d.size} for d in disks),
        ]
    document.pop("ramSnapshot", None)
    document["metadata"] = {**document.get("metadata", {}), "created": created}
    kept: dict[PartKind, list[Descriptor]] = {kind: [] for kind in PartKind}
    for part in source.manifest.parts():
        if part.kind is not PartKind.RAM and (part.kind is not PartKind.DISK or part.number < keep):
            kept[part.kind].append(model.reused(source, part))
    kept[PartKind.DISK].extend(disks)
    return document, kept
