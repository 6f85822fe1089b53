"""The disk of an instance as a new artifact: the layers of the old one, shared, and what the guest wrote on top."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ovms import fsutil, process
from ovms.artifact import model, provenance
from ovms.artifact.provenance import Material, Times, Work
from ovms.disk import qcow2
from ovms.errors import Unsupported
from ovms.lazy import dataclass
from ovms.oci.descriptor import Descriptor, created_now
from ovms.oci.origins import Source
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.runtime import disks
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.spec import limits
from ovms.spec.manifest import PartKind


@dataclass(frozen=True)
class Committed:
    """An artifact in the store. ``layers`` are new in it; ``downtime_ms`` is how long a running guest stood still.

    ``user_data``: the guest was given some, and cloud-init keeps it on the disk. ``not_quiesced``: as of :class:`.disks.Frozen`.
    """

    artifact: model.Artifact
    layers: int
    downtime_ms: float
    user_data: bool
    not_quiesced: str | None = None


def take(
    runtime: Runtime,
    record: Record,
    name: Reference,
    progress: Progress = NULL,
    *,
    quiesce: bool = False,
    squash: bool = False,
) -> Committed:
    """Makes an artifact of an instance's disk, whether it runs (it goes on) or not, and lets *name* stand for it.

    With *quiesce* the file systems of a running guest are frozen for the moment, where its agent does that. With *squash* all layers
    above the lowest become one (:mod:`ovms.runtime.squash`).
    What the artifact had beside the disk stays, except a RAM snapshot: that was one of another disk. Its provenance, kept beside
    it, names the artifact that the instance was started from.

    Raises:
        Unsupported: no disk, or too many layers.
        ToolMissing, HostError: of a squash.
        StateConflict: it is just starting or stopping.
        AgentUnavailable: the guest's file systems may stand frozen still.
        DiskFull, VmmError: the guest goes on.
    """
    instances, layout = runtime.instances, runtime.layout
    with instances.locked(record, finish=True) as newest, layout.using():
        source = runtime.artifact(newest)
        below = len(source.manifest.disk_layers)
        if squash:
            added, frozen = _squashed(runtime, newest, source, progress, quiesce=quiesce)
        else:
            frozen = disks.still(instances, newest, below, quiesce=quiesce)
            written = [path for path in frozen.overlays if not _empty(path)]
            if below + len(written) > limits.DISK_LAYERS_MAX:
                raise Unsupported(
                    f"{newest.name} would have more than {limits.DISK_LAYERS_MAX} disk layers",
                    hint="with --squash all but the lowest become one",
                )
            added = tuple(disks.add_overlays(layout, written, below, progress))
        document, kept = disks.extended(source, added, created_now(), keep=1 if squash else limits.DISK_LAYERS_MAX)
        parts = model.Parts(
            kernel=next(iter(kept[PartKind.KERNEL]), None),
            initrd=next(iter(kept[PartKind.INITRD]), None),
            disks=tuple(kept[PartKind.DISK]),
            bootstrap=next(iter(kept[PartKind.BOOTSTRAP]), None),
        )
        artifact = model.compose(
            layout, document, parts, subject=source.image.descriptor(), sources=[Source(source.digest)]
        )
        provenance.add(
            layout, artifact, Work.COMMIT, [Material.of_artifact(source)], Times(document["metadata"]["created"])
        )
        layout.set_name(str(name), artifact.image.descriptor())
        return Committed(artifact, len(added), frozen.downtime_ms, newest.user_data, frozen.not_quiesced)


def _squashed(
    runtime: Runtime, record: Record, source: model.Artifact, progress: Progress, *, quiesce: bool
) -> tuple[tuple[Descriptor, ...], disks.Frozen[bool]]:
    from ovms.runtime import export, images, squash

    process.find_tool(images.TOOL)  # before the guest is bothered
    with contextlib.ExitStack() as held:
        (base, *pieces), frozen = export.opened(runtime, record, source, held, quiesce=quiesce)
        fd = squash.layers(base, pieces, runtime.instances.directory(record.id), held, progress)
        added = () if fd is None else (disks.add_layer(runtime.layout, fd, 1, progress),)
    return added, frozen


def _empty(path: Path) -> bool:
    with fsutil.open_input(path, "the overlay") as file:
        return qcow2.is_empty(file.fileno(), "the overlay")
