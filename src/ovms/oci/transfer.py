"""Artifacts between the local store and a registry. Nothing gets a name before all of it is there and checked.

Blobs go several at once. A download that ends early is kept and gone on with (:mod:`ovms.oci.partial`), whatever ended it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from ovms import fsutil
from ovms.errors import BlobNotFound, DigestMismatch, OvmsError, RegistryProtocol, StoreCorrupt, Unsupported
from ovms.oci import partial, workers
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, fits_host, parse_manifest
from ovms.oci.fsck import damage
from ovms.oci.http import Broken, Refused
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import ATTEMPTS_MAX, Busy, RegistryClient
from ovms.progress import NULL, Progress, Task
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of

_CONTAINER_HINT: Final = "container images cannot be run as they are; 'ovm build' makes an OVMS artifact"
#: A connection that brought this much before it broke is not counted as a failure.
_PROGRESS: Final = 1 * limits.MIB
#: Blobs up to this size are fetched in one piece.
_SMALL: Final = 256 * limits.KIB
#: Tries to get one's entry into a fallback index that others write to, too.
_REFERRER_TRIES: Final = 8


class _Stopped(OvmsError):
    """Another transfer of the same artifact has failed; its error is the one to show."""


def pull(
    layout: Layout,
    client: RegistryClient,
    reference: Reference,
    progress: Progress = NULL,
    *,
    check: Callable[[ImageManifest], object] | None = None,
    name: str | None = None,
    platform: str | None = None,
) -> Descriptor:
    """Fetches an artifact, and lets *name* (or the reference) stand for it. Returns the descriptor of what it stands for.

    *check* is asked when both manifests are in the store, and nothing else: what it raises ends the pull before the
    bulk is fetched. *platform* (``linux/amd64``) is the one to take of an index; None: this host's.

    Raises:
        ReferenceNotFound, BlobNotFound: the registry does not have it, or not all of it.
        Unsupported: it is no OVMS artifact, or none for this machine.
        DigestMismatch: what came is not what was promised.
        DiskFull: said before the first blob is fetched.
        RegistryError: and its kinds: as the registry met us.
    """
    with layout.using():
        raw, top = client.get_manifest(reference)
        manifest = parse_manifest(raw, f"the manifest of {reference}")
        raws = [raw]
        if isinstance(manifest, ImageIndex):
            top = Descriptor(mediatypes.OCI_INDEX, top.digest, top.size)
            raw, manifest = _choose(client, reference, manifest, platform)
            raws.append(raw)
        else:
            top = manifest.descriptor()
        _check(manifest, reference)
        missing = [blob for blob in manifest.blobs if not layout.has(blob)]
        needed = sum(blob.size - partial.have(layout, blob) for blob in missing)
        fsutil.require_space(layout.root, needed, f"pulling {reference}")
        download = _Download(layout, client, reference.repository, progress)
        documents = [blob for blob in manifest.blobs if blob.media_type == mediatypes.MANIFEST]
        download.blobs(documents, missing)
        if check is not None:
            check(manifest)
        download.blobs([blob for blob in manifest.blobs if blob not in documents], missing)
        layout.sync()
        for raw in raws:
            layout.add_bytes(raw)
        layout.set_name(name or str(reference), top)
        return top


def _choose(
    client: RegistryClient, reference: Reference, index: ImageIndex, platform: str | None
) -> tuple[bytes, ImageManifest]:
    fitting = [
        d
        for d in index.manifests
        if d.media_type == mediatypes.OCI_MANIFEST
        and d.artifact_type in (None, mediatypes.MANIFEST)
        and fits_host(d, platform)
    ]
    # One that says that it is an OVMS artifact before one that says nothing: an index may hold both kinds.
    fitting.sort(key=lambda d: (d.artifact_type != mediatypes.MANIFEST, d.platform is None))
    if not fitting:
        raise Unsupported(f"{reference} holds nothing for {platform or 'linux/amd64'}", hint=_CONTAINER_HINT)
    chosen = fitting[0]
    raw, _ = client.get_manifest(reference.with_digest(chosen.digest))
    manifest = parse_manifest(raw, f"the manifest {chosen.digest}")
    if isinstance(manifest, ImageIndex):
        raise RegistryProtocol(f"{reference}: the index names an index where a manifest belongs")
    return raw, manifest


def _check(manifest: ImageManifest, reference: Reference) -> None:
    types = {manifest.artifact_type, manifest.config.media_type, *(layer.media_type for layer in manifest.layers)}
    if mediatypes.MANIFEST not in types:
        raise Unsupported(
            f"{reference} is no OVMS artifact: its config is {manifest.config.media_type!a}", hint=_CONTAINER_HINT
        )
    for blob in manifest.blobs:
        if blob.size > (limits.MANIFEST_MAX if blob.media_type == mediatypes.MANIFEST else limits.DISK_LAYER_MAX):
            raise RegistryProtocol(f"{reference}: a blob of {blob.size} bytes is out of range")


def _label(blob: Descriptor) -> str:
    title = blob.annotations.get(mediatypes.TITLE_ANNOTATION)
    if title is None:
        title = "config" if blob.media_type == mediatypes.MANIFEST else "blob"
    return f"{title[:16]} {hex_of(blob.digest)[:7]}"


# --- download --------------------------------------------------------------------------------------------------------


class _Download:
    def __init__(self, layout: Layout, client: RegistryClient, repository: str, progress: Progress) -> None:
        self._layout = layout
        self._client = client
        self._repository = repository
        self._progress = progress

    def blobs(self, blobs: list[Descriptor], missing: list[Descriptor]) -> None:
        """Fetches those of *blobs* that are *missing*, several at once, the largest first."""
        for blob in blobs:
            if blob not in missing:
                with self._progress.task(_label(blob), blob.size) as task:
                    task.note("exists already")
        wanted = sorted((blob for blob in blobs if blob in missing), key=lambda blob: -blob.size)
        workers.run_all([self._job(blob) for blob in wanted])

    def _job(self, blob: Descriptor) -> workers.Job:
        def fetch(stopped: Callable[[], bool]) -> None:
            if blob.size <= _SMALL:
                with self._progress.task(_label(blob), blob.size) as task:
                    self._fetch_small(blob, task)
                return
            with (
                self._progress.task(_label(blob), blob.size) as task,
                partial.receiving(self._layout, blob, stopped) as receiver,
            ):
                if receiver is None:
                    task.note("exists already")
                    return
                task.advance(receiver.size)
                if receiver.resumed:
                    task.note("resumed")
                self._fetch(blob, receiver, task, stopped)

        return fetch

    def _fetch_small(self, blob: Descriptor, task: Task) -> None:
        # Not worth a file that could be gone on with: it comes whole, or again.
        def attempt() -> bytes:
            return b"".join(self._client.read_blob(self._repository, blob))

        data = self._client.retrying(attempt)
        with self._layout.loose(blob.digest) as receiver:
            receiver.write(data)
            receiver.commit(expected=blob, durable=False)
        task.advance(len(data))

    def _fetch(self, blob: Descriptor, receiver: partial.Partial, task: Task, stopped: Callable[[], bool]) -> None:
        failures = 0
        while True:
            began = receiver.size
            try:
                if receiver.size < blob.size:
                    self._receive(blob, receiver, task, stopped)
                receiver.commit()
                return
            except (Broken, Refused, Busy) as exc:
                failures = 1 if receiver.size - began >= _PROGRESS else failures + 1
                if failures == ATTEMPTS_MAX or stopped():
                    raise
                time.sleep(self._client.pause(exc, failures))
            except DigestMismatch:
                # Bytes of an earlier pull may be what is wrong: after a power failure, or of another registry's doing.
                if not receiver.resumed and not began:
                    receiver.reset()
                    raise
                receiver.reset()
                task.advance(-began)

    def _receive(self, blob: Descriptor, receiver: partial.Partial, task: Task, stopped: Callable[[], bool]) -> None:
        for data in self._client.read_blob(self._repository, blob, receiver.size):
            receiver.write(data)
            task.advance(len(data))
            if stopped():
                raise _Stopped("the transfer was broken off")


# --- upload ----------------------------------------------------------------------------------------------------------


def push(
    layout: Layout, client: RegistryClient, reference: Reference, digest: Digest, progress: Progress = NULL
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
            for child in manifest.manifests:
                if layout.size(child.digest) is not None:
                    image = layout.manifest(child.digest)
                    if isinstance(image, ImageManifest):
                        upload.image(image, child.digest)
            media_type = mediatypes.OCI_INDEX
            client.put_manifest(reference.repository, reference.tag or digest, manifest.raw, media_type)
        else:
            upload.image(manifest, reference.tag or digest)


class _Upload:
    def __init__(self, layout: Layout, client: RegistryClient, repository: str, progress: Progress) -> None:
        self._layout = layout
        self._client = client
        self._repository = repository
        self._progress = progress
        self._elsewhere: dict[Digest, str] | None = None
        self._lock = threading.Lock()

    def image(self, image: ImageManifest, target: str) -> None:
        """Every blob, several at once; then the manifest."""
        for blob in image.blobs:
            if not self._layout.has(blob):
                raise BlobNotFound(
                    f"the store has lost the blob {blob.digest}",
                    hint="build or pull the artifact again",
                    digest=blob.digest,
                )
        workers.run_all([self._job(blob) for blob in sorted(image.blobs, key=lambda blob: -blob.size)])
        handled = self._client.put_manifest(self._repository, target, image.raw, mediatypes.OCI_MANIFEST)
        if image.subject is not None and not handled:
            _add_referrer(self._client, self._repository, image, image.subject)

    def _job(self, blob: Descriptor) -> workers.Job:
        def send(stopped: Callable[[], bool]) -> None:
            with self._progress.task(_label(blob), blob.size) as task:
                if self._client.has_blob(self._repository, blob.digest):
                    task.note("exists already")
                elif (source := self._source(blob.digest)) and self._client.mount_blob(
                    self._repository, blob.digest, source
                ):
                    task.note(f"mounted from {source}")
                else:
                    body = _Body(self._layout.path(blob.digest), task, stopped)
                    with contextlib.closing(body):
                        self._push(blob, body)

        return send

    def _push(self, blob: Descriptor, body: _Body) -> None:
        try:
            self._client.push_blob(self._repository, blob, body.open)
        except RegistryProtocol:
            # what it refuses may well be our fault
            if (why := damage(self._layout, blob.digest)) is None:
                raise
            hint = "'ovm fsck --repair' takes it out of the way, and tells how to get it back"
            raise StoreCorrupt(why, hint=hint, digest=blob.digest) from None

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

    def close(self) -> None:
        self._file.close()


# --- referrers -------------------------------------------------------------------------------------------------------


def _add_referrer(client: RegistryClient, repository: str, image: ImageManifest, subject: Descriptor) -> None:
    """The tag fallback of the distribution specification, for a registry without a referrers API.

    The specification has no way to replace a tag only if nobody else did meanwhile. So the index is read again after it
    was written, and written again when another client's entry took ours away: the last of several to finish keeps all.
    """
    tag = f"sha256-{hex_of(subject.digest)}"
    entry = image.descriptor().to_json()
    if image.annotations:
        entry["annotations"] = dict(image.annotations)
    for attempt in range(_REFERRER_TRIES):
        entries = _entries(client.fallback_index(repository, subject.digest), subject.digest)
        if any(isinstance(e, dict) and e.get("digest") == image.digest for e in entries):
            return
        if attempt:
            time.sleep(client.pause(Broken("another client writes, too"), min(attempt, 4)))
        index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [*entries, entry]}
        client.put_manifest(repository, tag, strictjson.canonical(index), mediatypes.OCI_INDEX)
    raise RegistryProtocol(
        f"{client.host} does not keep the referrers of {subject.digest}: other clients write them, too",
        hint="try again",
    )


def _entries(raw: bytes | None, digest: Digest) -> list[object]:
    from ovms.errors import JsonInvalid

    if raw is None:
        return []
    try:
        value = strictjson.parse(raw, f"the referrers of {digest}", max_size=limits.OCI_MANIFEST_MAX)
    except JsonInvalid:
        return []
    entries = value.get("manifests") if isinstance(value, dict) else None
    return entries if isinstance(entries, list) else []
