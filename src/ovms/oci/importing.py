"""Artifacts from a layout on disk into the local store. Nothing gets a name before all of it is there and checked."""

from __future__ import annotations

import os
from collections.abc import Callable

from ovms import fsutil
from ovms.errors import RegistryProtocol
from ovms.oci import absent, source, workers
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, label
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform, fitting
from ovms.oci.source import Entry, Source
from ovms.oci.transfer import Leave, check_image
from ovms.oci.transport import Place
from ovms.oci.whole import to_fetch
from ovms.progress import NULL, Progress
from ovms.spec import mediatypes
from ovms.spec.digest import Digest

#: From what a layout holds to its name in the store; None: it gets none.
Naming = Callable[[Entry], str | None]


def fetch(
    layout: Layout,
    place: Place,
    progress: Progress = NULL,
    *,
    name: Naming,
    check: Callable[[ImageManifest, Descriptor], object] | None = None,
    leave: Leave | None = None,
    platform: Platform | None = None,
) -> Descriptor:
    """Copies the artifact at *place* into the store, and returns the descriptor of its manifest or index.

    *name* says what shall stand for it there; it is asked before the bulk is copied, and once more after. *check*, *leave* and
    *platform* are those of :func:`ovms.oci.transfer.pull`. The bytes that are kept are the bytes that were hashed.

    Raises:
        FileProblem, InputError, ReferenceNotFound: there is no layout, or not that artifact in it.
        BlobNotFound, DigestMismatch: it is not complete, or not what its manifests promise.
        Unsupported: it is no OVMS artifact, or none for the platform.
        DiskFull: said before the bulk is copied.
    """
    with layout.using(), source.opened(place) as files:
        entry = files.select(place)
        manifest, top, raws = manifests(files, entry, place, platform)
        name(entry)
        missing = to_fetch(layout, manifest.blobs, place)
        documents = [blob for blob in manifest.blobs if blob.media_type == mediatypes.MANIFEST]
        if leave is None:
            fsutil.require_space(layout.root, _needed(files, missing), f"importing {place}")
        _copy(layout, files, documents, missing, progress)
        if check is not None:
            check(manifest, top)
        left_out: list[Descriptor] = []
        controls: dict[Digest, bytes] = {}
        if leave is not None:
            leaving = leave(manifest, lambda blob: controls.setdefault(blob.digest, _control(files, blob)))
            left_out = [blob for blob in missing if blob.digest in leaving]
            missing = [blob for blob in missing if blob.digest not in leaving]
            fsutil.require_space(layout.root, _needed(files, missing), f"importing {place}")
        _copy(
            layout, files, [blob for blob in manifest.blobs if blob not in [*documents, *left_out]], missing, progress
        )
        for blob in left_out:
            absent.note(layout, blob, controls.get(blob.digest))
        layout.sync()
        absent.forget(layout, missing)
        for raw in raws:
            layout.add_bytes(raw)
        if (chosen := name(entry)) is not None:
            layout.set_name(chosen, top)
        return top


def manifests(
    files: Source, entry: Entry, place: Place, platform: Platform | None = None
) -> tuple[ImageManifest, Descriptor, list[bytes]]:
    """The manifest of *entry*, its descriptor or that of its index, and the bytes of all that. Raises like :func:`fetch`."""
    top = entry.descriptor
    manifest = files.manifest(top)
    raws = [manifest.raw]
    if isinstance(manifest, ImageIndex):
        top = Descriptor(mediatypes.OCI_INDEX, top.digest, top.size)
        manifest = _choose(files, manifest, platform)
        raws.append(manifest.raw)
    else:
        top = manifest.descriptor()
    check_image(manifest, place)
    return manifest, top, raws


def _control(files: Source, blob: Descriptor) -> bytes:
    from ovms.oci import control

    with files.blob(blob) as content:
        return control.fetch(blob, lambda offset, size: os.pread(content.fd, size, content.offset + offset))


def _choose(files: Source, index: ImageIndex, platform: Platform | None) -> ImageManifest:
    manifest = files.manifest(fitting(index, platform, files.what)[0])
    if isinstance(manifest, ImageIndex):
        raise RegistryProtocol(f"{files.what}: the index names an index where a manifest belongs", rule="OCI-18")
    return manifest


def _needed(files: Source, missing: list[Descriptor]) -> int:
    # Opens every one, too: what is not there, or of another size, is found before anything is copied.
    needed = 0
    for blob in missing:
        with files.blob(blob) as content:
            needed += content.allocated
    return needed


def _copy(
    layout: Layout, files: Source, blobs: list[Descriptor], missing: list[Descriptor], progress: Progress
) -> None:
    for blob in blobs:
        if blob not in missing:
            with progress.task(label(blob), blob.size) as task:
                task.note("exists already")
    wanted = sorted((blob for blob in blobs if blob in missing), key=lambda blob: -blob.size)
    workers.run_all([_job(layout, files, blob, progress) for blob in wanted])


def _job(layout: Layout, files: Source, blob: Descriptor, progress: Progress) -> workers.Job:
    def copy(stopped: Callable[[], bool]) -> None:
        with (
            progress.task(label(blob), blob.size) as task,
            files.blob(blob) as content,
            layout.writer() as writer,
        ):
            if not (content.whole and writer.clone(content.fd, task.advance)):
                for data in source.pieces(content, f"{files.what}: {blob.digest}"):
                    if stopped():
                        return
                    writer.write(data)
                    task.advance(len(data))
            writer.commit(expected=blob, durable=False)

    return copy
