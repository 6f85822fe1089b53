"""A chain of RAM snapshots made into one: the same memory, in a base of its own."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

from ovms import fsutil
from ovms.artifact import model
from ovms.artifact.parts import ram_annotations
from ovms.artifact.resolve import Found
from ovms.errors import InputError
from ovms.lazy import dataclass, replace
from ovms.memory import chain, snapshot
from ovms.memory.capture import Capture
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.origins import Source
from ovms.oci.whole import require_whole
from ovms.progress import NULL, Progress
from ovms.spec import ramsnap
from ovms.spec.digest import Digest
from ovms.spec.manifest import PartKind


@dataclass(frozen=True)
class Flattened:
    """An artifact in the store whose RAM snapshot is a base, of ``ram_size`` bytes; of so many ``parents`` is it no diff any more."""

    artifact: model.Artifact
    ram_size: int
    parents: int


def flatten(layout: Layout, found: Found, progress: Progress = NULL) -> Flattened:
    """Makes an artifact with the whole memory in one blob, and everything else as it was; the same input gives the same bytes.

    One without ancestors is what it is already. The caller holds the store (``layout.using()``).

    Raises:
        InputError: it has no RAM snapshot.
        SnapshotInvalid, JsonInvalid: a member of the chain is damaged, or they are no chain.
        BlobNotFound, StoreCorrupt: the store does not have all of it.
        DiskFull: no room.
    """
    artifact = found.artifact
    ram = artifact.manifest.ram_snapshot
    if ram is None:
        raise InputError(
            f"{found.name} has no RAM snapshot to flatten",
            hint="'ovm ls' shows which artifacts have one; 'ovm export' makes one image of a disk",
        )
    require_whole(layout, found.name, artifact.image.blobs)
    digest = Digest(ram.ref)
    if not ram.parents and snapshot.read_control(layout, digest).header.parent is None:
        return Flattened(artifact, artifact.blob(ram.ref).size, 0)
    control = snapshot.read_control(layout, digest)
    ramsnap.check_codecs(control, ram.compression)
    chain.check(layout, digest, control, ram.parents)
    with tempfile.TemporaryFile(dir=layout.staging_root, buffering=0) as memory:
        snapshot.unpack(layout, digest, memory.fileno(), progress, compression=ram.compression)
        whole = Capture(memory.fileno(), None, [], control.prefix.memory_size)
        header = replace(control.header, parent=None)
        base, size = snapshot.store(layout, whole, control.state, header, progress, compression=ram.compression)
    with fsutil.open_input(layout.path(base), "the RAM snapshot") as blob:
        annotations = ram_annotations(blob.fileno())
    descriptor = model.part_descriptor(PartKind.RAM, base, size, compression=ram.compression, annotations=annotations)
    document = _with_base(artifact.manifest.document, base)
    made = model.compose(
        layout,
        document,
        _parts(artifact, descriptor),
        subject=artifact.image.subject,
        sources=[Source(artifact.digest, ram=True)],
    )
    return Flattened(made, size, len(ram.parents))


def _with_base(document: Mapping[str, Any], base: Digest) -> dict[str, Any]:
    answer = copy.deepcopy(dict(document))
    answer["ramSnapshot"]["ref"] = base
    answer["ramSnapshot"].pop("parents", None)
    return answer


def _parts(artifact: model.Artifact, ram: Descriptor) -> model.Parts:
    kept: dict[PartKind, list[Descriptor]] = {kind: [] for kind in PartKind}
    for part in artifact.manifest.parts():
        kept[part.kind].append(model.reused(artifact, part))
    return model.Parts(
        kernel=next(iter(kept[PartKind.KERNEL]), None),
        initrd=next(iter(kept[PartKind.INITRD]), None),
        disks=tuple(kept[PartKind.DISK]),
        ram_snapshots=(ram,),
        bootstrap=next(iter(kept[PartKind.BOOTSTRAP]), None),
    )
