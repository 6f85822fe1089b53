"""Artifacts between the local store and a registry. Nothing gets a name before all of it is there and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from ovms import fsutil
from ovms.errors import BlobNotFound, RegistryProtocol, Unsupported
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, parse_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.progress import NULL, Progress, Task
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of

_PLATFORM: Final = {"os": "linux", "architecture": "amd64"}
_CONTAINER_HINT: Final = "container images cannot be run as they are; 'ovm build' makes an OVMS artifact"


def pull(
    layout: Layout,
    client: RegistryClient,
    reference: Reference,
    progress: Progress = NULL,
    *,
    check: Callable[[ImageManifest], object] | None = None,
) -> Descriptor:
    """Fetches an artifact, and lets *reference* stand for it. Returns the descriptor of what the name stands for.

    *check* is asked when both manifests are in the store, and nothing else: what it raises ends the pull before the
    bulk is fetched.

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
            raw, manifest = _choose(client, reference, manifest)
            raws.append(raw)
        else:
            top = manifest.descriptor()
        _check(manifest, reference)
        missing = [blob for blob in manifest.blobs if not layout.has(blob)]
        fsutil.require_space(layout.root, sum(blob.size for blob in missing), f"pulling {reference}")

        def fetch(blobs: Iterable[Descriptor]) -> None:
            for blob in blobs:
                with progress.task(_label(blob), blob.size) as task:
                    if blob in missing:
                        _fetch(layout, client, reference.repository, blob, task)
                    else:
                        task.note("exists already")

        documents = [blob for blob in manifest.blobs if blob.media_type == mediatypes.MANIFEST]
        fetch(documents)
        if check is not None:
            check(manifest)
        fetch(blob for blob in manifest.blobs if blob not in documents)
        for raw in raws:
            layout.add_bytes(raw)
        layout.set_name(str(reference), top)
        return top


def _choose(client: RegistryClient, reference: Reference, index: ImageIndex) -> tuple[bytes, ImageManifest]:
    fitting = [d for d in index.manifests if d.media_type == mediatypes.OCI_MANIFEST and _fits(d)]
    # One that says that it is an OVMS artifact before one that says nothing: an index may hold both kinds.
    fitting.sort(key=lambda d: (d.artifact_type != mediatypes.MANIFEST, d.platform is None))
    if not fitting:
        raise Unsupported(f"{reference} holds nothing for linux/amd64", hint=_CONTAINER_HINT)
    chosen = fitting[0]
    raw, _ = client.get_manifest(reference.with_digest(chosen.digest))
    manifest = parse_manifest(raw, f"the manifest {chosen.digest}")
    if isinstance(manifest, ImageIndex):
        raise RegistryProtocol(f"{reference}: the index names an index where a manifest belongs")
    return raw, manifest


def _fits(descriptor: Descriptor) -> bool:
    if descriptor.artifact_type not in (None, mediatypes.MANIFEST):
        return False
    platform = descriptor.platform
    return platform is None or all(platform.get(key) == value for key, value in _PLATFORM.items())


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


def _fetch(layout: Layout, client: RegistryClient, repository: str, blob: Descriptor, task: Task) -> None:
    def attempt() -> None:
        done = 0
        try:
            with layout.writer() as writer:
                for data in client.read_blob(repository, blob):
                    writer.write(data)
                    task.advance(len(data))
                    done += len(data)
                writer.commit(expected=blob)
        except BaseException:
            task.advance(-done)
            raise

    client.retrying(attempt)


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
        if isinstance(manifest, ImageIndex):
            for child in manifest.manifests:
                if layout.size(child.digest) is not None:
                    image = layout.manifest(child.digest)
                    if isinstance(image, ImageManifest):
                        _push_image(layout, client, reference.repository, image, child.digest, progress)
            media_type = mediatypes.OCI_INDEX
            client.put_manifest(reference.repository, reference.tag or digest, manifest.raw, media_type)
        else:
            _push_image(layout, client, reference.repository, manifest, reference.tag or digest, progress)


def _push_image(
    layout: Layout, client: RegistryClient, repository: str, image: ImageManifest, target: str, progress: Progress
) -> None:
    for blob in image.blobs:
        _push_blob(layout, client, repository, blob, progress)
    handled = client.put_manifest(repository, target, image.raw, mediatypes.OCI_MANIFEST)
    if image.subject is not None and not handled:
        _add_referrer(client, repository, image, image.subject)


def _push_blob(layout: Layout, client: RegistryClient, repository: str, blob: Descriptor, progress: Progress) -> None:
    if not layout.has(blob):
        raise BlobNotFound(
            f"the store has lost the blob {blob.digest}", hint="build or pull the artifact again", digest=blob.digest
        )
    with progress.task(_label(blob), blob.size) as task:
        if client.has_blob(repository, blob.digest):
            task.note("exists already")
            return
        with contextlib.closing(_Upload(layout.path(blob.digest), task)) as upload:
            client.push_blob(repository, blob, upload.open)


class _Upload:
    """A blob's file, opened anew for each attempt, whose reading is the progress."""

    def __init__(self, path: Path, task: Task) -> None:
        self._path = path
        self._task = task
        self._reader: _Reader | None = None

    def open(self) -> IO[bytes]:
        self.close()
        if self._reader is not None:
            self._task.advance(-self._reader.done)
        self._reader = _Reader(self._path.open("rb", buffering=0), self._task)
        return self._reader  # type: ignore[return-value]  # read and close are all that an HTTP body needs

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


class _Reader:
    def __init__(self, file: IO[bytes], task: Task) -> None:
        self._file = file
        self._task = task
        self.done = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.done += len(data)
        self._task.advance(len(data))
        return data

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(fsutil.COPY_BUFFER):
            yield data

    def close(self) -> None:
        self._file.close()


def _add_referrer(client: RegistryClient, repository: str, image: ImageManifest, subject: Descriptor) -> None:
    """The tag fallback of the distribution specification, for a registry without a referrers API.

    Two pushes at the same time may lose one of the two entries: the specification has no way around that.
    """
    from ovms.errors import JsonInvalid, ReferenceNotFound

    tag = f"sha256-{hex_of(subject.digest)}"
    entries: list[object] = []
    try:
        raw, _ = client.get_manifest(Reference(client.host, repository, tag))
        value = strictjson.parse(raw, f"the referrers of {subject.digest}", max_size=limits.OCI_MANIFEST_MAX)
        if isinstance(value, dict) and isinstance(value.get("manifests"), list):
            entries = value["manifests"]
    except (ReferenceNotFound, JsonInvalid):
        pass
    if any(isinstance(e, dict) and e.get("digest") == image.digest for e in entries):
        return
    entry = image.descriptor().to_json()
    if image.annotations:
        entry["annotations"] = dict(image.annotations)
    index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [*entries, entry]}
    client.put_manifest(repository, tag, strictjson.canonical(index), mediatypes.OCI_INDEX)
