"""Snapshots of running instances: memory, device state and what the guest wrote, as a new artifact."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ovms import fsutil, process
from ovms.artifact import model, provenance
from ovms.artifact.parts import ram_annotations
from ovms.artifact.provenance import Material, Times, Work
from ovms.errors import AgentUnavailable, InputError, OvmsError, StateConflict
from ovms.lazy import asdict, dataclass, replace
from ovms.memory import capture, chain, compat, content, snapshot, template
from ovms.oci.descriptor import Descriptor
from ovms.oci.origins import Source
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.runtime import attachments, disks, jail
from ovms.runtime.record import Record, Still
from ovms.runtime.runtime import Runtime
from ovms.runtime.scrub import Scrubbed
from ovms.spec import ramsnap
from ovms.spec.choices import Leave
from ovms.spec.digest import Digest
from ovms.spec.manifest import Compression, PartKind
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Encryption
from ovms.spec.states import Call, State, after
from ovms.vmm.capabilities import require_snapshots
from ovms.vmm.qemu.binary import Cache


@dataclass(frozen=True)
class Taken:
    """A snapshot in the store. ``downtime_ms`` is how long the guest stood still; ``ram_size`` the blob's bytes.

    ``parents``: how many ancestors it is a diff on. ``user_data``: the guest was given some, so its memory may hold secrets; ``injected``: so may what was written into
    memory that it shares with the host. ``reseeds``: whether the guest's kernel makes random
    numbers of its own in each clone (None: that can't be told). ``scrubbed``: what a scrub made of the memory. ``encrypted``: its memory is.
    """

    artifact: model.Artifact
    downtime_ms: float
    ram_size: int
    user_data: bool = False
    injected: bool = False
    parents: int = 0
    reseeds: bool | None = None
    scrubbed: Scrubbed | None = None
    encrypted: bool = False

    def to_json(self) -> dict[str, Any]:
        """What of it is told, as a JSON object."""
        return {
            "snapshot_ref": self.artifact.digest,
            "size": self.artifact.size,
            "ram_bytes": self.ram_size,
            "parents": self.parents,
            "downtime_ms": self.downtime_ms,
            "reseeds": self.reseeds,
            "scrubbed": None if self.scrubbed is None else asdict(self.scrubbed),
            "encrypted": self.encrypted,
        }


#: What was taken while the VM stood still: its device state and its memory.
_Frozen = disks.Frozen[tuple[bytes, capture.Capture]]


def take(
    runtime: Runtime,
    record: Record,
    name: Reference | None,
    progress: Progress = NULL,
    *,
    leave: Leave = Leave.RUNNING,
    scrub: bool = False,
    encrypt: Sequence[str] = (),
) -> Taken:
    """Takes a snapshot of a running instance, and lets *name* stand for it in the store.

    *leave* is what the instance does then: what is to be paused or stopped does not run on after the moment of the snapshot, and
    goes on where that fails. With a name, its provenance is kept beside it. With *scrub* the guest's agent makes its memory small before (:mod:`ovms.runtime.scrub`). *encrypt*
    are the recipients who alone can restore it: then no file has anything of the memory or the device state in plain.

    Raises:
        StateConflict: the instance does not run.
        UsageError, InputError: *encrypt* is wrong, or empty where the memory came from an encrypted snapshot.
        AgentUnavailable: a killed command may have left its file systems frozen, and its agent does not thaw them.
        AgentUnavailable, GuestError, ResourceError: it cannot be scrubbed; nothing was done.
        DiskFull: said before the guest is paused, wherever the need is known.
        VmmError, HostError: the VMM or the host refused; the guest goes on.
    """
    instances, layout = runtime.instances, runtime.layout
    wrapped = _wrapped(encrypt)
    # before the lock, which a start may hold for long
    after(instances.status(record).state, Call.SNAPSHOT, record.name)
    before = zeroed = None
    if scrub:
        # else the guest would have worked for nothing
        attachments.require_snapshot(record)
        before, zeroed = _scrub(runtime, record)
    with instances.locked(record, finish=True) as newest, layout.using(), contextlib.ExitStack() as scratch:
        state = instances.status(newest).state
        after(state, Call.SNAPSHOT, newest.name)
        _require_thawed(newest)
        attachments.require_snapshot(newest)
        require_snapshots(runtime.vmm(newest.vmm), newest.name, disk=newest.machine.disk_size is not None)
        source = runtime.artifact(newest)
        disks.require_layers(newest, len(source.manifest.disk_layers))
        directory = instances.directory(newest.id)
        if not newest.restored:  # of one that was, it is known what it needs
            fsutil.require_space(directory, newest.machine.memory // 2, "a snapshot")
        if wrapped is None:
            _require_plain(newest, source)
        # without a name: gone whatever happens to us
        memory = scratch.enter_context(_scratch(None if wrapped is not None else directory))
        in_directory = directory if wrapped is None else None
        with instances.control(newest) as control, capture.room(control.ram(), memory.fileno(), in_directory) as room:
            # a guest that writes to all of its memory has it twice then
            freezes = not control.ram().private and process.memory_available() >= newest.machine.memory
            if wrapped is not None and not control.ram().private and not freezes:
                snapshot.require_memory(newest.machine.memory, "an encrypted snapshot, which is copied to no disk")
            if freezes:
                jail.allow_frozen(newest.jail, newest.machine)

            def look() -> tuple[bytes, capture.Capture]:
                state = control.save_state()
                if freezes and control.freeze_ram():
                    return state, scratch.enter_context(contextlib.closing(capture.frozen(control.ram())))
                copy = capture.take(control.ram(), memory.fileno(), room)
                return state, scratch.enter_context(contextlib.closing(copy))

            frozen: _Frozen = disks.freeze(instances, newest, control, look, hold=leave is not Leave.RUNNING)
        with _left(runtime, frozen.record, leave):
            copy, done = frozen.seen[1], None
            if before is not None:
                _finish(copy, wrapped)  # a diff has only what was written
                done = Scrubbed(before, content.nonzero(copy.fd, newest.machine.memory), bool(zeroed))
            parts, document, size = _add_parts(runtime, frozen, source, progress, wrapped)
            # the memory of a diff goes on from the snapshot that the VM was restored from
            made_from = Source(source.digest, ram=newest.restored)
            artifact = model.compose(layout, document, parts, subject=source.image.descriptor(), sources=[made_from])
            if name is not None:  # one without is taken to be cloned at once, more often than not
                materials = [Material.of_artifact(source)]
                provenance.add(layout, artifact, Work.SNAPSHOT, materials, Times(document["metadata"]["created"]))
                layout.set_name(str(name), artifact.image.descriptor())
            if copy.shared:
                newest_ram = Digest(parts.ram_snapshots[-1].digest)
                still = Still(os.fstat(copy.fd).st_ino, artifact.digest, newest_ram, artifact.encrypted)
                instances.save(replace(instances.newest(newest) or frozen.record, still=still))
        parents = len(parts.ram_snapshots) - 1
        taken = Taken(
            artifact,
            frozen.downtime_ms,
            size,
            newest.user_data,
            newest.injected,
            parents,
            scrubbed=done,
            encrypted=wrapped is not None,
        )
    return replace(taken, reseeds=_reseeds(runtime, source))


def _require_thawed(record: Record) -> None:
    # nobody would know of its clones that they have to be thawed
    if record.fs_frozen:
        raise AgentUnavailable(
            f"the file systems of the guest of {record.name} may stand frozen since a command was killed, and clones would wake up so",
            hint="try again when its agent answers ('ovm resume' it first if it is paused), or start it anew",
        )


def _wrapped(encrypt: Sequence[str]) -> tuple[Encryption, Cipher] | None:
    if not encrypt:
        return None
    from ovms.trust import age

    return age.new(encrypt)


def _scratch(directory: Path | None) -> BinaryIO:
    # An unnamed file in *directory*; without one, in memory.
    if directory is None:
        return os.fdopen(os.memfd_create("ovms-snapshot", os.MFD_CLOEXEC), "w+b", buffering=0)
    return cast("BinaryIO", tempfile.TemporaryFile(dir=directory, buffering=0))


def _finish(memory: capture.Capture, wrapped: tuple[Encryption, Cipher] | None) -> None:
    if wrapped is not None and memory.base is not None:  # the copy is in memory
        snapshot.require_memory(os.fstat(memory.base).st_blocks * 512, "an encrypted snapshot")
    memory.finish()


def _require_plain(record: Record, source: model.Artifact) -> None:
    # Nobody gets what was secret in plain because an option was forgotten. (A VM that was booted may have outlived its snapshot.)
    if (record.restored and source.encrypted) or (record.still is not None and record.still.encrypted):
        raise InputError(
            f"the memory of {record.name} is that of an encrypted snapshot, and this one would not be",
            hint="name who may restore it: 'ovm snapshot --encrypt RECIPIENT'; 'ovm fork' clones that",
            rule="RAM-65",
        )


def _scrub(runtime: Runtime, record: Record) -> tuple[int, bool]:
    from ovms.runtime import scrub

    if runtime.instances.status(record).state is State.PAUSED:
        raise StateConflict(
            f"the instance {record.name} is paused, and its agent can do nothing",
            hint="'ovm resume' it first, or leave out --scrub",
            instance=record.name,
        )
    # an agent that is not there is told before anything is read
    scrub.check(runtime.instances, record)
    before = scrub.measure(runtime.instances, record)
    return before, scrub.scrub(runtime.instances, record)


@contextlib.contextmanager
def _left(runtime: Runtime, record: Record, leave: Leave) -> Iterator[None]:
    # A VM that is held goes on, unless all is well (under its lock).
    if leave is Leave.RUNNING:
        yield
        return
    instances = runtime.instances
    try:
        yield
    except BaseException:
        if record.pausing:
            with instances.control(record) as control:
                control.resume()
            instances.save(replace(record, pausing=False))
        raise
    if leave is Leave.STOPPED:
        runtime.end(record)
        ended = instances.newest(record)
        if ended is not None:
            instances.save(replace(ended, pausing=False))
    else:
        instances.save(replace(instances.newest(record) or record, pausing=False, paused=True))


def _reseeds(runtime: Runtime, source: model.Artifact) -> bool | None:
    kernel = source.manifest.kernel
    if kernel is None:
        return None
    from ovms.artifact import reseeding

    digest = Digest(kernel.ref)
    cache = Cache(runtime.root.cache / "kernels.json")
    known = cache.get(digest, reseeding.STAMP)
    if known is None:
        # the snapshot is there already: nothing here may take it back
        with contextlib.suppress(OvmsError), fsutil.open_input(runtime.layout.path(digest), "the kernel") as file:
            known = {"reseeds": reseeding.reseeds(file.fileno())}
            cache.put(digest, reseeding.STAMP, known)
    answer = known.get("reseeds") if isinstance(known, dict) else None
    return answer if isinstance(answer, bool) else None


def _add_parts(
    runtime: Runtime,
    frozen: _Frozen,
    source: model.Artifact,
    progress: Progress,
    wrapped: tuple[Encryption, Cipher] | None,
) -> tuple[model.Parts, dict[str, Any], int]:
    # The blobs of the snapshot's artifact, its manifest, and the size of the RAM blob.
    layout, manifest, record = runtime.layout, source.manifest, frozen.record
    state, memory = frozen.seen
    added = tuple(disks.add_overlays(layout, frozen.overlays, len(manifest.disk_layers), progress))
    all_disks = (*(layer.ref for layer in manifest.disk_layers), *(d.digest for d in added))
    parents = _parents(runtime, record, source, memory, all_disks)
    if not parents:
        _finish(memory, wrapped)
    encryption, cipher = (None, None) if wrapped is None else wrapped
    header = compat.describe(
        runtime.vmm(record.vmm),
        record.machine,
        manifest,
        source.digest,
        tuple(d.digest for d in added),
        network=record.network.state,
        parent=parents[-1].digest if parents else None,
    )
    header = replace(header, encryption=encryption)
    # one for the whole chain, and what whoever made the artifact has chosen
    compression = Compression.LZ4 if manifest.ram_snapshot is None else manifest.ram_snapshot.compression
    ram, size = snapshot.store(layout, memory, state, header, progress, compression=compression, cipher=cipher)
    document, kept = disks.extended(source, added, header.created)
    document["ramSnapshot"] = {
        **{key: value for key, value in manifest.document.get("ramSnapshot", {}).items() if key != "parents"},
        "ref": ram,
        "compression": str(compression),
        **({"parents": [parent.digest for parent in parents]} if parents else {}),
    }
    with fsutil.open_input(layout.path(ram), "the RAM snapshot") as blob:
        descriptor = model.part_descriptor(
            PartKind.RAM,
            ram,
            size,
            compression=compression,
            encrypted=cipher is not None,
            number=len(parents),
            annotations=ram_annotations(blob.fileno()),
        )
    return (
        model.Parts(
            kernel=next(iter(kept[PartKind.KERNEL]), None),
            initrd=next(iter(kept[PartKind.INITRD]), None),
            disks=tuple(kept[PartKind.DISK]),
            ram_snapshots=(*parents, descriptor),
        ),
        document,
        size,
    )


def _parents(
    runtime: Runtime, record: Record, source: model.Artifact, memory: capture.Capture, disks: tuple[str, ...]
) -> tuple[Descriptor, ...]:
    """The ancestors of a diff on what *memory* goes on from, base first; none where it has to be a base.

    It has to be one at the first snapshot of a VM that was booted, when the chain would become too long, and when something of the
    chain is not what it should be, or not here any more: a diff on it would be lost. *disks* are the layers of the new artifact.
    """
    try:
        origin = _origin(runtime, record, source, memory)
        ram = None if origin is None else origin.manifest.ram_snapshot
        if origin is None or ram is None:
            return ()
        if len(ram.parents) + 1 > chain.PARENTS:
            return ()
        links = chain.read(runtime.layout, Digest(ram.ref))
        # at most an entry for each page
        ramsnap.check_entries([*(link.entries for link in links), memory.written // ramsnap.PAGE])
    except OvmsError:
        return ()
    below = links[-1].header.disks
    if [link.digest for link in links] != [*ram.parents, ram.ref] or disks[: len(below)] != below:
        return ()
    return tuple(model.reused(origin, part) for part in origin.manifest.parts() if part.kind is PartKind.RAM)


def _origin(runtime: Runtime, record: Record, source: model.Artifact, memory: capture.Capture) -> model.Artifact | None:
    # The artifact whose RAM snapshot a VM's memory was, before it went on. By the memfd itself: what a record says of a VM may
    # be of the one before.
    if memory.base is None:
        return None
    ram = source.manifest.ram_snapshot
    if ram is not None and template.digest_of(memory.base) == ram.ref:
        return source
    if record.still is not None and record.still.inode == os.fstat(memory.base).st_ino:
        return model.load(runtime.layout, record.still.artifact)
    return None
