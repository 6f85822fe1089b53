"""Artifacts between the local store and a registry. Nothing gets a name before all of it is there and checked.

Blobs go several at once. A download that ends early is kept and gone on with (:mod:`ovms.oci.partial`), whatever ended it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from ovms import fsutil
from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    InputError,
    IntegrityError,
    OvmsError,
    ReferenceNotFound,
    RegistryError,
    RegistryProtocol,
    StoreCorrupt,
    Unsupported,
)
from ovms.lazy import dataclass
from ovms.oci import absent, partial, ranges, small, workers
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, parse_manifest
from ovms.oci.http import Broken, Refused
from ovms.oci.layout import REPAIR, BlobWriter, Layout
from ovms.oci.platform import CONTAINER_HINT, Platform, fitting, is_artifact
from ovms.oci.reference import Reference
from ovms.oci.registry import Busy, RegistryClient
from ovms.oci.whole import to_fetch
from ovms.progress import NULL, Progress, Task
from ovms.spec import limits, mediatypes
from ovms.spec.digest import Digest, hex_of

if TYPE_CHECKING:
    import socket

    from ovms.oci import reuse

#: A connection that brought this much before it broke is not counted as a failure.
_PROGRESS: Final = 1 * limits.MIB
#: Bytes of an upload after which progress is told, and it is asked whether to go on.
_SENT_AT_ONCE: Final = 1 * limits.MIB
#: Manifests that a message names.
_NAMED_MAX: Final = 3
#: Blobs up to this size are fetched in one piece.
_SMALL: Final = 256 * limits.KIB
#: Up to so many of them, it does not matter how.
_FEW: Final = 2
#: Of them, so many are made durable together: one by one, each would be a transaction of the file system.
_DURABLE_AT_ONCE: Final = 16


class _Stopped(OvmsError):
    """Another transfer of the same artifact has failed; its error is the one to show."""


class _Borne(Exception):
    """A range did not come however often it was asked for: *error* is the user's."""

    def __init__(self, error: RegistryError) -> None:
        super().__init__(error.message)
        self.error = error


class _NoReuse(Exception):
    """What is here of other blobs is of no use; the rest is fetched plainly."""


#: Reads the control part of a RAM snapshot where it is pulled from. Raises as :func:`ovms.oci.control.fetch`.
ReadControl = Callable[[Descriptor], bytes]
#: Says which of an artifact's blobs are to be left out, by their digests; asked when both manifests are in the store.
Leave = Callable[[ImageManifest, ReadControl], Collection[Digest]]


@dataclass()
class Tally:
    """Bytes of blobs that a transfer has fetched, and those that it took from other blobs here instead."""

    fetched: int = 0
    reused: int = 0


def pull(
    layout: Layout,
    client: RegistryClient,
    reference: Reference,
    progress: Progress = NULL,
    *,
    check: Callable[[ImageManifest, Descriptor], object] | None = None,
    leave: Leave | None = None,
    name: str | None = None,
    platform: Platform | None = None,
    tally: Tally | None = None,
    parallel: int = workers.PARALLEL,
) -> Descriptor:
    """Fetches an artifact, and lets *name* (or the reference) stand for it. Returns the descriptor of what it stands for.

    *check* is asked when both manifests are in the store, and nothing else: with the manifest, and with the descriptor of what
    the reference stands for. What it raises ends the pull before the bulk is fetched; then *leave* says which RAM snapshots
    are not fetched at all. *platform* is the one to take of an index; None: this host's. *tally* is counted up. *parallel* is
    how many connections it takes.

    Raises:
        ReferenceNotFound, BlobNotFound: the registry does not have it, or not all of it.
        Unsupported: it is no OVMS artifact, or none for this machine.
        DigestMismatch: what came is not what was promised.
        DiskFull: said before the bulk is fetched.
        RegistryError: and its kinds: as the registry met us.
    """
    with fsutil.noticing_full_disk(f"pulling {reference}", layout.root), layout.using():
        manifest, top, raws = manifests(client, reference, platform)
        missing = to_fetch(layout, manifest.blobs, reference)
        download = _Download(layout, client, reference.repository, progress, tally, parallel)
        documents = [blob for blob in manifest.blobs if blob.media_type == mediatypes.MANIFEST]
        if leave is None:
            _require_space(layout, missing, reference)
        download.blobs(documents, missing)
        if check is not None:
            check(manifest, top)
        left_out: list[Descriptor] = []
        if leave is not None:
            leaving = leave(manifest, download.control)
            left_out = [blob for blob in missing if blob.digest in leaving]
            missing = [blob for blob in missing if blob.digest not in leaving]
            _require_space(layout, missing, reference)
        others = {blob.digest for blob in [*documents, *left_out]}
        download.blobs([blob for blob in manifest.blobs if blob.digest not in others], missing)
        download.note_absent(left_out)
        layout.sync()
        absent.forget(layout, missing)
        for raw in raws:
            layout.add_bytes(raw)
        layout.set_name(name or str(reference), top)
        return top


def manifests(
    client: RegistryClient, reference: Reference, platform: Platform | None = None
) -> tuple[ImageManifest, Descriptor, list[bytes]]:
    """An artifact's manifest in a registry, the descriptor of what *reference* stands for, and the bytes of that and of the manifest.

    Raises like :func:`pull`; nothing is fetched but these.
    """
    raw, top = client.get_manifest(reference)
    manifest = parse_manifest(raw, f"the manifest of {reference}")
    raws = [raw]
    if isinstance(manifest, ImageIndex):
        top = Descriptor(mediatypes.OCI_INDEX, top.digest, top.size)
        raw, manifest = _choose(client, reference, manifest, platform)
        raws.append(raw)
    else:
        top = manifest.descriptor()
    check_image(manifest, reference)
    return manifest, top, raws


def fetch(
    layout: Layout, client: RegistryClient, repository: str, image: ImageManifest, progress: Progress = NULL
) -> None:
    """Fetches a manifest's blobs, and keeps it with them; no name stands for it yet. Raises like :func:`pull`."""
    missing = to_fetch(layout, image.blobs, image.digest)
    fsutil.require_space(layout.root, sum(blob.size for blob in missing), f"pulling {image.digest}")
    _Download(layout, client, repository, progress).blobs(list(image.blobs), missing)
    layout.sync()
    absent.forget(layout, missing)
    layout.add_bytes(image.raw)


def complete(
    layout: Layout,
    client: RegistryClient,
    repository: str,
    blobs: list[Descriptor],
    progress: Progress = NULL,
    tally: Tally | None = None,
) -> None:
    """Fetches blobs that were left out of an artifact in the store. Raises like :func:`pull`."""
    with fsutil.noticing_full_disk("pulling a RAM snapshot", layout.root), layout.using():
        missing = to_fetch(layout, blobs, repository)
        _require_space(layout, missing, repository)
        _Download(layout, client, repository, progress, tally).blobs(blobs, missing)
        layout.sync()
        absent.forget(layout, blobs)


def read_control(client: RegistryClient, repository: str, blob: Descriptor, progress: Progress = NULL) -> bytes:
    """The control part of a RAM snapshot in a registry, by ranges; from the beginning of the blob where it knows none.

    Raises:
        DigestMismatch, SnapshotInvalid: see :func:`ovms.oci.control.fetch`.
        RegistryError: and its kinds: as the registry met us.
    """
    from ovms.oci import control

    with progress.task(f"what {label(blob)} needs") as task:

        def read(offset: int, size: int) -> bytes:
            try:
                data = client.retrying(lambda: client.read_range(repository, blob, offset, size), tell=task.waiting)
            except ranges.NoRanges:
                data = client.retrying(lambda: begin(offset + size), tell=task.waiting)[offset:]
            task.advance(len(data))
            return data

        def begin(size: int) -> bytes:
            data = bytearray()
            with contextlib.closing(client.read_blob(repository, blob)) as stream:
                for piece in stream:
                    data += piece[: size - len(data)]
                    if len(data) == size:
                        break
            return bytes(data)

        return control.fetch(blob, read)


def _require_space(layout: Layout, missing: list[Descriptor], what: object) -> None:
    needed = sum(blob.size - partial.have(layout, blob) for blob in missing)
    fsutil.require_space(layout.root, needed, f"pulling {what}")


def _choose(
    client: RegistryClient, reference: Reference, index: ImageIndex, platform: Platform | None
) -> tuple[bytes, ImageManifest]:
    chosen = fitting(index, platform, reference)[0]
    raw, _ = client.get_manifest(reference.with_digest(chosen.digest))
    manifest = parse_manifest(raw, f"the manifest {chosen.digest}")
    if isinstance(manifest, ImageIndex):
        raise RegistryProtocol(f"{reference}: the index names an index where a manifest belongs")
    return raw, manifest


def check_image(manifest: ImageManifest, reference: object) -> None:
    """Whether *manifest* can be an OVMS artifact at all, before its blobs are there.

    Raises:
        Unsupported: it is something else.
        RegistryProtocol: a blob is larger than any of ours may be.
    """
    if not is_artifact(manifest):
        raise Unsupported(
            f"{reference} is no OVMS artifact: its config is {manifest.config.media_type!a}", hint=CONTAINER_HINT
        )
    for blob in manifest.blobs:
        if blob.size > (limits.MANIFEST_MAX if blob.media_type == mediatypes.MANIFEST else limits.DISK_LAYER_MAX):
            raise RegistryProtocol(f"{reference}: a blob of {blob.size} bytes is out of range")


def label(blob: Descriptor) -> str:
    """What progress calls a blob."""
    title = blob.annotations.get(mediatypes.TITLE_ANNOTATION)
    if title is None:
        title = "config" if blob.media_type == mediatypes.MANIFEST else "blob"
    return f"{title[:16]} {hex_of(blob.digest)[:7]}"


# --- download --------------------------------------------------------------------------------------------------------


class _Download:
    def __init__(
        self,
        layout: Layout,
        client: RegistryClient,
        repository: str,
        progress: Progress,
        tally: Tally | None = None,
        parallel: int = workers.PARALLEL,
    ) -> None:
        self._layout = layout
        self._client = client
        self._repository = repository
        self._progress = progress
        self._tally = tally or Tally()
        self._parallel = parallel
        self._unfinished = 0
        self._several = True
        self._lock = threading.Lock()
        self._controls: dict[Digest, bytes] = {}

    def control(self, blob: Descriptor) -> bytes:
        """The control part of a RAM snapshot: of the blob, or of what was left out, where that is here; else fetched."""
        known = self._controls.get(blob.digest) or absent.control_part(self._layout, blob)
        if known is None:
            known = read_control(self._client, self._repository, blob, self._progress)
            self._count(len(known))
        self._controls[blob.digest] = known
        return known

    def note_absent(self, blobs: list[Descriptor]) -> None:
        """Notes that *blobs* were left out, with what is known of them."""
        for blob in blobs:
            absent.note(self._layout, blob, self._controls.get(blob.digest))
            with self._progress.task(label(blob), blob.size) as task:
                task.note("left out")

    def _count(self, fetched: int, reused: int = 0) -> None:
        with self._lock:
            self._tally.fetched += fetched
            self._tally.reused += reused

    def blobs(self, blobs: list[Descriptor], missing: list[Descriptor]) -> None:
        """Fetches those of *blobs* that are *missing*, several at once: the small ones, then the others, largest first."""
        lacking = {blob.digest for blob in missing}
        for blob in blobs:
            if blob.digest not in lacking:
                with self._progress.task(label(blob), blob.size) as task:
                    task.note("exists already")
        wanted = sorted((blob for blob in blobs if blob.digest in lacking), key=lambda blob: -blob.size)
        self._fetch_all_small([blob for blob in wanted if blob.size <= _SMALL])
        large = [blob for blob in wanted if blob.size > _SMALL]
        self._unfinished = len(large)
        workers.run_all([self._job(blob) for blob in large], parallel=self._parallel)

    def _fetch_all_small(self, blobs: list[Descriptor]) -> None:
        # Not worth files that could be gone on with: each comes whole, or again. They are made durable together.
        with contextlib.ExitStack() as held:
            writers: list[BlobWriter] = []

            def keep(blob: Descriptor, data: bytes, stopped: Callable[[], bool] = lambda: False) -> None:
                with self._lock:
                    if stopped():
                        return
                    writer = held.enter_context(self._layout.loose(blob.digest))
                writer.write(data)
                writer.finish(blob)
                writers.append(writer)
                self._count(len(data))
                if len(writers) % _DURABLE_AT_ONCE == 0:
                    # while the others come, and not all of them at the end
                    for one in writers[-_DURABLE_AT_ONCE:]:
                        one.wait()

            def job(blob: Descriptor) -> workers.Job:
                def fetch(stopped: Callable[[], bool]) -> None:
                    with self._progress.task(label(blob), blob.size) as task:
                        data = self._read_small(blob, task)
                        keep(blob, data, stopped)
                        task.advance(len(data))

                return fetch

            left = {blob.digest: blob for blob in blobs}
            at_once = blobs if len(blobs) > _FEW else []
            with contextlib.closing(small.fetch(self._client, self._repository, at_once, self._parallel)) as coming:
                for blob, data in coming:
                    with self._progress.task(label(blob), blob.size) as task:
                        keep(blob, data)
                        task.advance(len(data))
                    left.pop(blob.digest, None)
            workers.run_all([job(blob) for blob in left.values()], parallel=self._parallel)
            self._layout.commit_all(writers)

    def _spare(self) -> int:
        # connections that no blob is waiting for, shared out among those at work
        if not self._several:
            return 0
        return max(0, self._parallel - self._unfinished) // max(1, self._unfinished)

    def _job(self, blob: Descriptor) -> workers.Job:
        def fetch(stopped: Callable[[], bool]) -> None:
            try:
                fetch_one(stopped)
            finally:
                with self._lock:
                    self._unfinished -= 1

        def fetch_one(stopped: Callable[[], bool]) -> None:
            with (
                self._progress.task(label(blob), blob.size) as task,
                partial.receiving(self._layout, blob, stopped, task.waiting) as receiver,
            ):
                if receiver is None:
                    task.note("exists already")
                    return
                task.advance(receiver.size)
                if receiver.resumed:
                    task.note("resumed")
                self._fetch(blob, receiver, task, stopped)

        return fetch

    def _read_small(self, blob: Descriptor, task: Task) -> bytes:
        def attempt() -> bytes:
            return b"".join(bytes(piece) for piece in self._client.read_blob(self._repository, blob))

        return self._client.retrying(attempt, tell=task.waiting)

    def _fetch(self, blob: Descriptor, receiver: partial.Partial, task: Task, stopped: Callable[[], bool]) -> None:
        patience = self._client.patience(task.waiting, stopped)
        plan = self._reusable(blob, receiver.size)
        reused = Tally()
        if receiver.size == 0 and (head := self._controls.get(blob.digest)) is not None:
            receiver.write(head)  # was fetched to decide by
            task.advance(len(head))
        while True:
            began, reached = receiver.size, 0
            try:
                if receiver.size < blob.size and plan is not None:
                    self._put_together(plan, blob, receiver, task, stopped, reused)
                if receiver.size < blob.size:
                    self._receive(blob, receiver, task, stopped)
                reached = receiver.size
                receiver.commit()
                self._count(0, reused.reused)
                return
            except (Broken, Refused, Busy) as exc:
                if receiver.size - began >= _PROGRESS:
                    patience.progressed()
                patience.bear(exc)
            except _Borne as exc:
                if receiver.size - began < _PROGRESS:
                    raise exc.error from None
                patience.progressed()
            except DigestMismatch:
                # Bytes of an earlier pull may be what is wrong (after a power failure, or of another registry's doing), a
                # control part that nothing vouched for, or what was taken from other blobs.
                if not receiver.resumed and not began:
                    receiver.reset()
                    raise
                task.advance(-(receiver.size or reached))
                receiver.reset()
                if plan is not None:
                    task.note("chunks of other snapshots did not fit")
                    plan, reused = None, Tally()

    def _reusable(self, blob: Descriptor, have: int) -> reuse.Plan | None:
        # What of the blob need not be fetched. Whatever is wrong with its control part shows when all of it is here.
        if blob.media_type not in absent.RAM_TYPES or not self._several:
            return None
        from ovms.oci import reuse

        if blob.size - have < reuse.SAVED_MIN or not (candidates := reuse.others(self._layout, blob.digest)):
            return None
        try:
            return reuse.plan(self.control(blob), candidates)
        except (IntegrityError, InputError, RegistryProtocol):
            return None

    def _put_together(
        self,
        plan: reuse.Plan,
        blob: Descriptor,
        receiver: partial.Partial,
        task: Task,
        stopped: Callable[[], bool],
        reused: Tally,
    ) -> None:
        """Writes what *receiver* lacks, in order and as far as the plan goes: what is here, and ranges of what is not."""

        def take(data: bytes | memoryview) -> None:
            receiver.write(data)
            task.advance(len(data))
            if stopped():
                raise _Stopped("the transfer was broken off")

        if receiver.size < len(plan.control):
            head = plan.control[receiver.size :]
            receiver.write(head)
            task.advance(len(head))
        rest = plan.rest(receiver.size)
        task.note(f"{plan.reused / limits.MIB:.1f} MiB from other snapshots here")
        spans = [(piece.offset, piece.size) for piece in rest if piece.source is None]
        lanes = min(1 + self._spare(), len(spans))
        with contextlib.closing(ranges.fetch_spans(spans, lanes, self._fetcher(blob, task, stopped))) as fetched:
            try:
                for piece in rest:
                    if piece.source is None:
                        take(next(fetched))
                        self._count(piece.size)
                    else:
                        for data in _copied(self._layout.path(piece.source), piece.at, piece.size):
                            take(data)
                            reused.reused += len(data)
            except ranges.NoRanges:
                self._several = False  # and the rest comes plainly
            except _NoReuse:
                pass

    def _receive(self, blob: Descriptor, receiver: partial.Partial, task: Task, stopped: Callable[[], bool]) -> None:
        judge = ranges.Judge(spare=self._spare)

        def take(data: bytes | memoryview) -> None:
            receiver.write(data)
            task.advance(len(data))
            self._count(len(data))
            if stopped():
                raise _Stopped("the transfer was broken off")

        try:
            with contextlib.closing(self._client.read_blob(self._repository, blob, receiver.size)) as stream:
                for data in stream:
                    take(data)
                    judge.received(len(data), blob.size - receiver.size)
        except ranges.Slow:
            pass
        else:
            return
        try:
            for segment in self._ranges(blob, receiver.size, judge.rate, task, stopped):
                take(segment)
        except (ranges.NoRanges, ranges.NoGain):
            self._several = False
            self._receive(blob, receiver, task, stopped)

    def _ranges(
        self, blob: Descriptor, start: int, rate: float, task: Task, stopped: Callable[[], bool]
    ) -> Iterator[bytes]:
        return ranges.fetch(start, blob.size, 1 + self._spare(), self._fetcher(blob, task, stopped), rate=rate)

    def _fetcher(self, blob: Descriptor, task: Task, stopped: Callable[[], bool]) -> ranges.FetchRange:
        def fetch_range(offset: int, size: int) -> bytes:
            def attempt() -> bytes:
                if stopped():
                    raise _Stopped("the transfer was broken off")
                return self._client.read_range(self._repository, blob, offset, size)

            try:
                return self._client.retrying(attempt, tell=task.waiting, stopped=stopped)
            except (Broken, Refused, Busy) as exc:
                raise _Borne(exc) from exc

        return fetch_range


def _copied(path: Path, offset: int, size: int) -> Iterator[bytes]:
    # a part of another blob here
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while size:
                data = os.pread(fd, min(size, fsutil.COPY_BUFFER), offset)
                if not data:
                    raise _NoReuse
                yield data
                offset, size = offset + len(data), size - len(data)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _NoReuse from exc


# --- upload ----------------------------------------------------------------------------------------------------------


def push(
    layout: Layout,
    client: RegistryClient,
    reference: Reference,
    digest: Digest,
    progress: Progress = NULL,
) -> None:
    """Uploads the artifact *digest* as *reference*: what the registry lacks of its blobs, then its manifest.

    Raises:
        BlobNotFound: the store does not have all of it.
        RegistryError: and its kinds: as the registry met us.
    """
    with layout.using():
        manifest = layout.manifest(digest)
        upload = _Upload(layout, client, reference.repository, progress)
        if isinstance(manifest, ImageIndex):
            upload.index(manifest, reference)
        else:
            upload.blobs(manifest)
            upload.manifest(manifest, reference.tag or digest)


def push_files(
    layout: Layout,
    client: RegistryClient,
    repository: str,
    image: ImageManifest,
    files: Mapping[Digest, Path],
    progress: Progress = NULL,
) -> None:
    """Uploads an artifact whose blobs are *files*, and under no tag: nothing of it comes into the store.

    Raises:
        RegistryError: and its kinds: as the registry met us; among them that a file was changed meanwhile.
    """
    _Upload(layout, client, repository, progress, files).image(image, image.digest)


class _Upload:
    def __init__(
        self,
        layout: Layout,
        client: RegistryClient,
        repository: str,
        progress: Progress,
        files: Mapping[Digest, Path] | None = None,
    ) -> None:
        self._layout = layout
        self._client = client
        self._repository = repository
        self._progress = progress
        self._files = files or {}
        self._elsewhere: dict[Digest, str] | None = None
        self._lock = threading.Lock()

    def image(self, image: ImageManifest, target: str) -> None:
        """Every blob, several at once; then the manifest."""
        self.blobs(image)
        self.manifest(image, target)

    def blobs(self, image: ImageManifest) -> None:
        """Every blob, several at once."""
        left_out = [] if self._files else absent.left_out(self._layout, image.blobs)
        for blob in left_out:
            if not self._client.has_blob(self._repository, blob.digest):
                raise absent.missing(self._layout, image.digest, blob.digest, "the artifact is not whole here")
        for blob in image.blobs:
            if blob in left_out:
                continue
            if blob.digest not in self._files and not self._layout.has(blob):
                raise BlobNotFound(
                    f"the store has lost the blob {blob.digest}",
                    hint="build or pull the artifact again",
                    digest=blob.digest,
                )
        workers.run_all([self._job(blob) for blob in sorted(image.blobs, key=lambda blob: -blob.size)])

    def index(self, index: ImageIndex, reference: Reference) -> None:
        """What is here of an index, then the index. The rest of it may be there already; not every registry asks for it."""
        absent_here: list[Digest] = []
        here: list[Digest] = []
        for child in index.manifests:
            if self._layout.size(child.digest) is None:
                absent_here.append(child.digest)
                continue
            image = self._layout.manifest(child.digest)
            if isinstance(image, ImageManifest):
                self.image(image, child.digest)
                here.append(child.digest)
        lacking = [digest for digest in absent_here if not self._there(digest)]
        try:
            self.manifest(index, reference.tag or index.digest, retry=not lacking)
        except (Busy, RegistryProtocol) as exc:
            if not lacking:
                raise
            raise BlobNotFound(
                f"the registry {self._client.host} takes no index that is not whole, and what {reference} lists for other "
                f"platforms is neither here nor there: {', '.join(lacking[:_NAMED_MAX])}{', …' if lacking[_NAMED_MAX:] else ''}",
                hint=f"push what is here by itself: 'ovm push {here[0]} {reference}'" if here else "pull it again",
                missing=lacking,
            ) from exc

    def _there(self, digest: Digest) -> bool:
        try:
            self._client.get_manifest(Reference(self._client.host, self._repository, None, digest))
        except ReferenceNotFound:
            return False
        return True

    def manifest(self, manifest: ImageManifest | ImageIndex, target: str, *, retry: bool = True) -> None:
        """The manifest, and what lets it be found by its subject."""
        entry = manifest.as_referrer()
        handled = self._client.put_manifest(self._repository, target, manifest.raw, entry.media_type, retry=retry)
        if manifest.subject is not None and not handled:
            from ovms.oci import referrers

            referrers.add(self._client, self._repository, entry, manifest.subject.digest)

    def _job(self, blob: Descriptor) -> workers.Job:
        def send(stopped: Callable[[], bool]) -> None:
            with self._progress.task(label(blob), blob.size) as task:
                if self._client.has_blob(self._repository, blob.digest):
                    task.note("exists already")
                elif (source := self._source(blob.digest)) and self._client.mount_blob(
                    self._repository, blob.digest, source
                ):
                    task.note(f"mounted from {source}")
                else:
                    path = self._files.get(blob.digest) or self._layout.path(blob.digest)
                    body = _Body(path, task, stopped)
                    with contextlib.closing(body):
                        self._push(blob, body, task)

        return send

    def _push(self, blob: Descriptor, body: _Body, task: Task) -> None:
        try:
            self._client.push_blob(self._repository, blob, body.open, tell=task.waiting)
        except RegistryProtocol:
            from ovms.oci.fsck import damage

            # what it refuses may well be our fault
            if (why := damage(self._layout, blob.digest)) is None:
                raise
            raise StoreCorrupt(why, hint=REPAIR, digest=blob.digest) from None

    def _source(self, digest: Digest) -> str | None:
        # Another repository of this registry that we have pushed the blob to, or pulled it from.
        with self._lock:
            if self._elsewhere is None:
                self._elsewhere = self._find_elsewhere()
            return self._elsewhere.get(digest)

    def _find_elsewhere(self) -> dict[Digest, str]:
        answer: dict[Digest, str] = {}
        for entry in self._layout.entries():
            with contextlib.suppress(OvmsError):
                reference = Reference.parse(entry.name)
                if reference.registry == self._client.host and reference.repository != self._repository:
                    for digest in self._layout.reachable(entry.descriptor.digest):
                        answer.setdefault(digest, reference.repository)
        return answer


class _Body:
    """A blob's file, opened anew for each attempt, whose reading is the progress."""

    def __init__(self, path: Path, task: Task, stopped: Callable[[], bool]) -> None:
        self._path = path
        self._task = task
        self._stopped = stopped
        self._sent = 0
        self._reader: _Reader | None = None

    def open(self, offset: int, size: int) -> IO[bytes]:
        """What an HTTP body needs of a file: ``read``, ``close`` and iteration over *size* bytes from *offset* on."""
        self.close()
        self._task.advance(offset - self._sent)
        self._sent = offset
        self._reader = _Reader(self._path, offset, size, self._advance)
        return self._reader  # type: ignore[return-value]

    def _advance(self, amount: int) -> None:
        if self._stopped():
            raise _Stopped("the transfer was broken off")
        self._sent += amount
        self._task.advance(amount)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Reader:
    def __init__(self, path: Path, offset: int, size: int, advance: Callable[[int], None]) -> None:
        self._file = path.open("rb", buffering=0)
        self._at = offset
        self._left = size
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        wanted = min(self._left, size if size >= 0 else self._left)
        data = os.pread(self._file.fileno(), wanted, self._at)
        self._at += len(data)
        self._left -= len(data)
        self._advance(len(data))
        return data

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(fsutil.COPY_BUFFER):
            yield data

    def send_to(self, sock: socket.socket) -> None:
        """All that is left, from the page cache into the socket: no copy comes by here."""
        while self._left and (sent := sock.sendfile(self._file, self._at, min(self._left, _SENT_AT_ONCE))):
            self._at += sent
            self._left -= sent
            self._advance(sent)

    def close(self) -> None:
        self._file.close()
