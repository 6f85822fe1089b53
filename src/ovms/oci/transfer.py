"""Artifacts between the local store and a registry. Nothing gets a name before all of it is there and checked.

Blobs go several at once. A download that ends early is kept and gone on with (:mod:`ovms.oci.partial`), whatever ended it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ovms import fsutil
from ovms.errors import RegistryProtocol, Unsupported
from ovms.oci import absent, partial, small
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, parse_manifest
from ovms.oci.download import Download, Tally
from ovms.oci.layout import Layout
from ovms.oci.platform import CONTAINER_HINT, Platform, fitting, is_artifact
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.oci.whole import to_fetch
from ovms.progress import NULL, Progress
from ovms.spec import limits, mediatypes
from ovms.spec.digest import Digest

#: Reads the control part of a RAM snapshot where it is pulled from. Raises as :func:`ovms.oci.control.fetch`.
ReadControl = Callable[[Descriptor], bytes]
#: Says which of an artifact's blobs are to be left out, by their digests; asked when both manifests are in the store.
Leave = Callable[[ImageManifest, ReadControl], Collection[Digest]]


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
    pool: small.Pool | None = None,
) -> Descriptor:
    """Fetches an artifact, and lets *name* (or the reference) stand for it. Returns the descriptor of what it stands for.

    *check* is asked when both manifests are in the store, while small blobs may be on their way: with the manifest, and with the
    descriptor of what the reference stands for. What it raises ends the pull before the bulk is fetched; then *leave* says which RAM snapshots
    are not fetched at all. *platform* is the one to take of an index; None: this host's. *tally* is counted up. *pool* are
    the connections that it shares with others.

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
        download = Download(layout, client, reference.repository, progress, tally, pool)
        documents = [blob for blob in manifest.blobs if blob.media_type == mediatypes.MANIFEST]
        left_out: list[Descriptor] = []
        if leave is None:
            _require_space(layout, missing, reference)
            download.large(documents, missing)
            # while they are looked at, the small ones come
            with download.coming(list(manifest.blobs), missing, documents) as small_ones:
                small_ones.come_first()
                if check is not None:
                    check(manifest, top)
                small_ones.finish()
            others = {blob.digest for blob in documents}
            download.large([blob for blob in manifest.blobs if blob.digest not in others], missing)
        else:
            download.blobs(documents, missing)
            if check is not None:
                check(manifest, top)
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
    Download(layout, client, repository, progress).blobs(list(image.blobs), missing)
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
        Download(layout, client, repository, progress, tally).blobs(blobs, missing)
        layout.sync()
        absent.forget(layout, blobs)


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
    from ovms.oci.upload import Upload

    with layout.using():
        manifest = layout.manifest(digest)
        upload = Upload(layout, client, reference.repository, progress)
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
    from ovms.oci.upload import Upload

    Upload(layout, client, repository, progress, files).image(image, image.digest)
