"""Artifacts in a store, made without looking at what is in them."""

from __future__ import annotations

from pathlib import Path

from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest
from ovms.oci.layout import Layout
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of


def add(
    layout: Layout,
    *contents: bytes,
    name: str | None = None,
    subject: Descriptor | None = None,
    artifact_type: str = mediatypes.MANIFEST,
) -> ImageManifest:
    """Adds an artifact of these blobs, the first of them as its config."""
    for content in contents:
        layout.add_bytes(content)
    image = build_manifest(
        artifact_type=artifact_type,
        config=Descriptor.of("application/x", contents[0]),
        layers=tuple(Descriptor.of("application/x", content) for content in contents[1:]),
        subject=subject,
    )
    layout.add_bytes(image.raw)
    if name is not None:
        layout.set_name(name, image.descriptor())
    return image


def blobs(layout: Layout) -> set[str]:
    """The names of all files where blobs are."""
    return {path.name for path in layout.blob_dir.iterdir()}


def files_of(*images: ImageManifest) -> set[str]:
    """The files that artifacts consist of."""
    return {hex_of(d) for image in images for d in (image.digest, *(blob.digest for blob in image.blobs))}


def damage(layout: Layout, digest: Digest) -> Path:
    """Turns one bit of a blob."""
    path = layout.path(digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    return path
