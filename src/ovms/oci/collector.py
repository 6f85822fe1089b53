"""The garbage collector: what nothing needs, found first and then removed, so that a dry run tells exactly what a run does.

What is needed: the manifests that an entry of ``index.json`` or an instance names, and what those manifests name. An entry
without a name that belongs to another artifact (by its ``subject``: a signature, an SBOM) counts as long as that one does. A
manifest that can't be read hides what it needs; while there is one, no blob is removed at all.

The collector works alone: it holds ``ovms.lock``, which everybody shares who adds blobs or uses some without a name. Work
in progress that it finds under that lock is therefore nobody's any more.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import BlobNotFound, Locked, OvmsError
from ovms.lazy import dataclass, field, regex
from ovms.oci import origins, partial
from ovms.oci.descriptor import ImageIndex, ImageManifest
from ovms.oci.layout import Entry, Layout
from ovms.process import boot_id
from ovms.spec import limits, mediatypes
from ovms.spec.digest import Digest, hex_of

#: Seconds to wait for those who add or use blobs. A transfer may take an hour: nobody waits for that.
WAIT: Final = 3.0

_HEX: Final = regex(r"[0-9a-f]{64}")
#: ``memory/snapshot.py`` names what it unpacks after the boot that it was unpacked in.
_RAM: Final = regex(r"[0-9a-f]{64}\.([0-9a-f]{8})\.ram")


class Kind(StrEnum):
    """What takes room in a store."""

    BLOB = "blobs"
    DERIVED = "derived"
    PARTIAL = "partial"
    STAGING = "staging"
    QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Needs:
    """What is in use outside of the store: manifests, by instances; and derived files (their names), by VMs."""

    artifacts: frozenset[Digest] = frozenset()
    files: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Item:
    """Something to be removed, and the bytes on disk that this frees."""

    kind: Kind
    path: Path
    size: int


@dataclass(frozen=True)
class Broken:
    """A manifest that is needed and can't be read, so that nobody knows what it needs."""

    digest: Digest
    names: tuple[str, ...]
    error: OvmsError


@dataclass(frozen=True)
class Options:
    """What goes beside what nothing needs.

    ``unused``: artifacts that no instance uses, and that no kept artifact is based on, in spite of their names; also
    every partial download and every derived file that is not in use. ``since``: artifacts that came into the store
    later than this time are kept (seconds since 1970). ``quarantine``: what repairs took out of the way.
    """

    unused: bool = False
    since: float | None = None
    quarantine: bool = False


@dataclass(frozen=True)
class Plan:
    """What goes: entries of the index first, then files, in this order."""

    entries: tuple[Entry, ...] = ()
    items: tuple[Item, ...] = ()
    broken: tuple[Broken, ...] = ()

    @property
    def size(self) -> int:
        """The bytes on disk that it frees."""
        return sum(item.size for item in self.items)

    def by_kind(self) -> dict[Kind, tuple[int, int]]:
        """How many of each kind, and their bytes."""
        found = {kind: [item.size for item in self.items if item.kind is kind] for kind in Kind}
        return {kind: (len(sizes), sum(sizes)) for kind, sizes in found.items()}


@dataclass()
class Reach:
    """What some manifests need: digests of blobs and manifests, whether they are here or not."""

    digests: set[Digest] = field(default_factory=set)
    broken: dict[Digest, OvmsError] = field(default_factory=dict)
    images: dict[Digest, ImageManifest] = field(default_factory=dict)


def reach(layout: Layout, roots: Iterable[Digest]) -> Reach:
    """What *roots* need. Children of an index that are not here are none of ours: they are for other machines."""
    answer = Reach()
    pending = [(digest, True) for digest in roots]
    seen: set[tuple[Digest, bool]] = set()  # a manifest may be a blob of another one, too, and is followed all the same
    while pending:
        digest, is_root = current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        answer.digests.add(digest)
        try:
            manifest = answer.images.get(digest) or layout.manifest(digest)
        except BlobNotFound as exc:
            if is_root:
                answer.broken[digest] = exc
            continue
        except OvmsError as exc:
            answer.broken[digest] = exc
            continue
        if isinstance(manifest, ImageIndex):
            pending.extend((child.digest, False) for child in manifest.manifests)
        else:
            answer.images[digest] = manifest
            answer.digests.update(blob.digest for blob in manifest.blobs)
    return answer


# --- what goes -------------------------------------------------------------------------------------------------------


def plan(layout: Layout, needs: Needs, options: Options | None = None) -> Plan:
    """What can go now. Exact under the collector's lock; without it, a good guess."""
    options = options or Options()
    entries = layout.entries()
    going = _unused(layout, entries, needs, options) if options.unused else ()
    named = [entry for entry in entries if entry not in going]
    orphans = _orphans(layout, named, needs)
    going = (*going, *orphans)
    named = [entry for entry in named if entry not in orphans]
    needed = reach(layout, needs.artifacts | {entry.descriptor.digest for entry in named})
    if needed.broken:
        going, named = (), entries
    broken = tuple(
        Broken(digest, tuple(e.name for e in named if e.descriptor.digest == digest), error)
        for digest, error in needed.broken.items()
    )
    names = {hex_of(digest) for digest in needed.digests}
    items: list[Item] = []
    if broken:
        items += _derived(layout, None, needs.files, unused=options.unused)
    else:
        items += _blobs(layout, names)
        items += _derived(layout, names, needs.files, unused=options.unused)
    items += _partial(layout, 0.0 if options.unused else partial.KEPT)
    items += _absent(layout, None if broken else names)
    items += _staging(layout)
    if options.quarantine:
        items += [Item(Kind.QUARANTINE, path, allocated(path)) for path in _list(layout.quarantine_dir)]
    return Plan(tuple(going), tuple(items), broken)


def stale(layout: Layout, needs: Needs) -> list[Item]:
    """What killed commands left, and derived files that are of no use: what every clean-up takes. Exact under the lock."""
    return [
        *_derived(layout, None, needs.files, unused=False),
        *_partial(layout, partial.KEPT),
        *_absent(layout, None),
        *_staging(layout),
    ]


def remove(items: Iterable[Item]) -> None:
    """Removes files, and directories of killed commands."""
    for item in items:
        if item.kind is Kind.STAGING and fsutil.remove_abandoned(item.path):
            continue
        if item.path.is_symlink() or not item.path.is_dir():
            item.path.unlink(missing_ok=True)
        elif item.kind is Kind.QUARANTINE:  # which had a blob's name
            fsutil.remove_tree(item.path)


def _unused(layout: Layout, entries: list[Entry], needs: Needs, options: Options) -> tuple[Entry, ...]:
    # What instances use is kept, with what it is based on; and what belongs to a kept artifact (a signature, say)
    # without being a VM itself. An instance names its manifest, and an entry may name an index that holds it.
    of = {entry.descriptor.digest: reach(layout, [entry.descriptor.digest]) for entry in entries}
    manifests = {digest: {digest, *reached.images} for digest, reached in of.items()}
    used = reach(layout, needs.artifacts)
    kept = {digest for digest in of if options.since is not None and (layout.came(digest) or 0.0) > options.since}
    while True:
        images = [*used.images.values(), *(image for digest in kept for image in of[digest].images.values())]
        wanted = needs.artifacts | {image.subject.digest for image in images if image.subject is not None}
        there = needs.artifacts.union(*(manifests[digest] for digest in kept))
        more = {
            digest
            for digest, reached in of.items()
            if manifests[digest] & wanted
            or any(i.subject and i.subject.digest in there and not _is_vm(i) for i in reached.images.values())
        }
        if more <= kept:
            return tuple(entry for entry in entries if entry.descriptor.digest not in kept)
        kept |= more


def _orphans(layout: Layout, entries: list[Entry], needs: Needs) -> tuple[Entry, ...]:
    # What has no name and belongs to another artifact (a signature, an SBOM) lives as long as that one. What is a VM
    # itself is nobody's: a repair may have found it without its name.
    roots = set(needs.artifacts)
    referrers: dict[Digest, Digest] = {}
    for entry in entries:
        digest = entry.descriptor.digest
        image = None if entry.name else reach(layout, [digest]).images.get(digest)
        if image is None or image.subject is None or _is_vm(image):
            roots.add(digest)
        else:
            referrers[digest] = image.subject.digest
    live = reach(layout, roots).digests if referrers else set()
    # referrers have referrers
    while found := [digest for digest, subject in referrers.items() if subject in live]:
        live |= reach(layout, found).digests
        referrers = {digest: subject for digest, subject in referrers.items() if digest not in found}
    return tuple(entry for entry in entries if not entry.name and entry.descriptor.digest in referrers)


def _is_vm(image: ImageManifest) -> bool:
    return mediatypes.MANIFEST in (image.artifact_type, image.config.media_type)


def _blobs(layout: Layout, names: set[str]) -> list[Item]:
    items = [
        Item(Kind.BLOB, path, info.st_blocks * 512)
        for path, info in _files(layout.blob_dir)
        if _HEX.fullmatch(path.name) and path.name not in names
    ]
    # Manifests go first: one that is still here when we are killed has all of its blobs.
    manifests = set(unnamed_manifests(layout, (Digest(f"sha256:{item.path.name}") for item in items)))
    return sorted(items, key=lambda item: f"sha256:{item.path.name}" not in manifests)


def unnamed_manifests(layout: Layout, digests: Iterable[Digest]) -> dict[Digest, ImageManifest | ImageIndex]:
    """Those of some blobs that are manifests."""
    answer = {}
    for digest in digests:
        size = layout.size(digest)
        if size is None or size > limits.OCI_MANIFEST_MAX or not _is_object(layout.path(digest)):
            continue
        with contextlib.suppress(OvmsError):
            answer[digest] = layout.manifest(digest)
    return answer


def _is_object(path: Path) -> bool:
    # before megabytes are parsed: JSON objects begin like this, whoever wrote them
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return os.pread(fd, 16, 0).lstrip()[:1] == b"{"
    except OSError:
        return False
    finally:
        os.close(fd)


def _derived(layout: Layout, names: set[str] | None, used: frozenset[str], *, unused: bool) -> Iterator[Item]:
    # Derived files are named <hex of the blob that they were made from>.<kind>.
    boot = boot_id()[:8]
    for path, info in _files(layout.derived_dir):
        digits, dot, _ = path.name.partition(".")
        if not dot or not _HEX.fullmatch(digits) or path.name in used:
            continue
        ram = _RAM.fullmatch(path.name)
        gone = digits not in names if names is not None else not (layout.blob_dir / digits).exists()
        # Of another boot: it may have been damaged when that one ended, and will be made again.
        stale = path.suffix == ".tmp" or (ram is not None and ram[1] != boot)
        if gone or stale or (unused and path.suffix != ".lock"):
            yield Item(Kind.DERIVED, path, info.st_blocks * 512)


def _partial(layout: Layout, age: float) -> Iterator[Item]:
    now = time.time()
    files = dict(_files(layout.partial_dir))
    for path, info in files.items():
        digits, dot, kind = path.name.partition(".")
        if not _HEX.fullmatch(digits):
            continue
        if kind == "lock":
            stale = path.with_name(digits) not in files or now - files[path.with_name(digits)].st_mtime >= age
        else:  # one with a number of its own belonged to a writer that is no more
            stale = bool(dot) or now - info.st_mtime >= age or (layout.blob_dir / digits).exists()
        if stale:
            yield Item(Kind.PARTIAL, path, info.st_blocks * 512)


def _absent(layout: Layout, names: set[str] | None) -> Iterator[Item]:
    # What says that a blob was left out: of no use when it has come, or when no artifact names it any more.
    for path, info in _files(layout.absent_dir):
        gone = names is not None and path.name not in names
        if gone or not _HEX.fullmatch(path.name) or (layout.blob_dir / path.name).exists():
            yield Item(Kind.PARTIAL, path, info.st_blocks * 512)


def _staging(layout: Layout) -> Iterator[Item]:
    for path in _abandoned(layout.staging_root):
        yield Item(Kind.STAGING, path, allocated(path))
    for path, info in _files(layout.root):
        if layout.is_temporary(path.name):
            yield Item(Kind.STAGING, path, info.st_blocks * 512)


def _abandoned(parent: Path) -> Iterator[Path]:
    for path in _list(parent):
        if fsutil.is_abandoned(path):
            yield path


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    # directories are none of ours
    for path in _list(directory):
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode):
                yield path, info


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def allocated(path: Path) -> int:
    """The bytes on disk that a file takes, or a directory with all that is in it. Links are not followed."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return 0
    if not stat.S_ISDIR(info.st_mode):
        return info.st_blocks * 512
    return info.st_blocks * 512 + sum(allocated(child) for child in _list(path))


# --- removing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(layout: Layout, *, wait: float) -> Iterator[None]:
    """Holds the store against everybody who adds blobs, or uses some without a name.

    Raises:
        Locked: somebody does, and did not end within *wait* seconds.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(fsutil.file_lock(layout.root / "ovms.lock", timeout=wait))
        except Locked:
            raise Locked(
                f"another ovm process{fsutil.shown_holders(layout.root / 'ovms.lock')} adds or uses blobs just now (pull, push, "
                "build, run, snapshot or fsck); nothing was changed",
                hint="try again when it has ended",
                path=str(layout.root / "ovms.lock"),
            ) from None
        yield


def collect(
    layout: Layout,
    needs: Callable[[], Needs],
    options: Options | None = None,
    *,
    dry_run: bool = False,
    wait: float = WAIT,
) -> Plan:
    """Removes what can go, or (*dry_run*) only tells. Returns what went.

    *needs* is asked under the lock, when nobody can begin to use another artifact.

    Raises:
        Locked: another process adds or uses blobs just now; nothing was removed.
        StoreCorrupt: the index can't be read; nothing was removed.
    """
    with alone(layout, wait=wait):
        found = plan(layout, needs(), options)
        if not dry_run:
            _remove(layout, found)
        return found


def _remove(layout: Layout, found: Plan) -> None:
    # Names first: whenever we are killed, what has a name is whole.
    layout.remove_entries(found.entries)
    remove(found.items)
    origins.sweep(layout)
