"""An artifact in the local store: the OCI manifest, the OVMS manifest in it, and the rules that tie them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ovms.errors import ManifestInvalid, Problem, Unsupported
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, build_manifest
from ovms.oci.layout import Layout
from ovms.spec import limits, manifest, mediatypes, strictjson
from ovms.spec.digest import Digest, is_digest

_PLATFORM: Final = {"os": "linux", "architecture": "amd64"}
_NOT_OURS: Final = "container images cannot be run as they are; 'ovm build' makes an OVMS artifact"


@dataclass(frozen=True)
class Artifact:
    """An OVMS artifact whose manifests are in the local store and agree with each other."""

    image: ImageManifest
    manifest: manifest.Manifest

    @property
    def digest(self) -> Digest:
        """The digest of the OCI manifest: what the artifact is known by."""
        return self.image.digest

    @property
    def size(self) -> int:
        """Bytes of all blobs and of the manifest."""
        return len(self.image.raw) + sum(blob.size for blob in self.image.blobs)

    def blob(self, ref: str) -> Descriptor:
        """The descriptor of the blob that a ``ref`` of the OVMS manifest names."""
        for layer in self.image.layers:
            if layer.digest == ref:
                return layer
        raise KeyError(ref)


def load(layout: Layout, digest: Digest) -> Artifact:
    """Reads the artifact whose OCI manifest is *digest*.

    Raises:
        BlobNotFound, StoreCorrupt: it is not in the store, or damaged there.
        Unsupported: it is something else than an OVMS artifact.
        ManifestInvalid, JsonInvalid, RegistryProtocol: its manifests are wrong, or disagree.
    """
    image = layout.manifest(digest)
    if isinstance(image, ImageIndex):
        image = choose(layout, image)
    where = ovms_descriptor(image)
    raw = layout.read(where.digest, "the OVMS manifest", max_size=limits.MANIFEST_MAX)
    checked = manifest.parse(raw, f"the OVMS manifest of {image.digest}")
    check_refs(checked, {layer.digest for layer in image.layers})
    return Artifact(image, checked)


def choose(layout: Layout, index: ImageIndex) -> ImageManifest:
    """The manifest of *index* that this machine runs, among those that are in the store."""
    for descriptor in index.manifests:
        if not _fits(descriptor) or layout.size(descriptor.digest) is None:
            continue
        image = layout.manifest(descriptor.digest)
        if isinstance(image, ImageManifest) and _claims_manifest(image):
            return image
    raise Unsupported("the index holds no OVMS artifact for this machine", hint=_NOT_OURS)


def _fits(descriptor: Descriptor) -> bool:
    platform = descriptor.platform
    return platform is None or all(platform.get(key) == value for key, value in _PLATFORM.items())


def _claims_manifest(image: ImageManifest) -> bool:
    return mediatypes.MANIFEST in {
        image.artifact_type,
        image.config.media_type,
        *(layer.media_type for layer in image.layers),
    }


def ovms_descriptor(image: ImageManifest) -> Descriptor:
    """Where the OVMS manifest is: in the config, or (as plain ``oras push`` makes it) in one of the layers.

    Raises:
        Unsupported: in neither, or in several.
    """
    if image.config.media_type == mediatypes.MANIFEST:
        return image.config
    found = [layer for layer in image.layers if layer.media_type == mediatypes.MANIFEST]
    if len(found) != 1:
        raise Unsupported(
            f"{image.digest} is no OVMS artifact: its config is {image.config.media_type!a}"
            + (", and several layers claim to be the manifest" if found else ""),
            hint=_NOT_OURS,
        )
    return found[0]


def check_refs(checked: manifest.Manifest, layers: set[Digest]) -> None:
    """Raises :class:`ManifestInvalid` unless each ``ref`` is the digest of one of the OCI manifest's layers."""
    problems = []
    for path, ref in checked.refs():
        if not is_digest(ref):
            problems.append(Problem(path, f"must be a digest in a finished artifact, not {ref[:80]!a}", "OCI-6"))
        elif Digest(ref) not in layers:
            problems.append(Problem(path, f"{ref} is not among the layers of the OCI manifest", "OCI-6"))
    if problems:
        raise ManifestInvalid(
            "the OVMS manifest does not fit the OCI manifest around it",
            problems=problems,
            hint="the artifact was not built by a conforming tool; build it again with 'ovm build'",
        )


@dataclass(frozen=True)
class Parts:
    """The blobs of a new artifact, all in the store; each list and field in the place that the manifest gives it."""

    kernel: Descriptor | None = None
    initrd: Descriptor | None = None
    disks: tuple[Descriptor, ...] = ()
    ram_snapshot: Descriptor | None = None
    bootstrap: Descriptor | None = None

    def layers(self) -> tuple[Descriptor, ...]:
        """In the order of the specification: kernel, initrd, disks base first, RAM snapshot, bootstrap config."""
        parts = (self.kernel, self.initrd, *self.disks, self.ram_snapshot, self.bootstrap)
        return tuple(part for part in parts if part is not None)


def compose(
    layout: Layout, document: Mapping[str, Any], parts: Parts, *, subject: Descriptor | None = None
) -> Artifact:
    """Writes the manifests of a new artifact, whose ``ref`` fields are digests already, and adds them to the store.

    The same input gives the same bytes: nothing of the time or the machine goes in.
    """
    checked = manifest.check(document)
    layers = parts.layers()
    check_refs(checked, {layer.digest for layer in layers})
    raw = strictjson.canonical(document)
    annotations = {
        mediatypes.TITLE_ANNOTATION: checked.name,
        mediatypes.VERSION_ANNOTATION: checked.version,
    }
    if checked.metadata.created is not None:
        annotations[mediatypes.CREATED_ANNOTATION] = checked.metadata.created
    image = build_manifest(
        artifact_type=mediatypes.MANIFEST,
        config=Descriptor.of(mediatypes.MANIFEST, raw),
        layers=layers,
        subject=subject,
        annotations=annotations,
    )
    layout.add_bytes(raw)
    layout.add_bytes(image.raw)
    return Artifact(image, checked)


def part_descriptor(kind: str, digest: Digest, size: int, *, format: manifest.DiskFormat | None = None, number: int = 0,
                    annotations: Mapping[str, str] | None = None) -> Descriptor:  # fmt: skip
    """The descriptor of one part; *kind* is kernel, initrd, disk, ram or bootstrap.

    The title gives ``oras pull`` a file name.
    """
    titles = {"kernel": "kernel", "initrd": "initrd", "ram": "ram.ovmr", "bootstrap": "bootstrap.json"}
    types = {
        "kernel": mediatypes.KERNEL,
        "initrd": mediatypes.INITRD,
        "disk": mediatypes.DISK_LAYER,
        "ram": mediatypes.RAM_SNAPSHOT_LZ4,
        "bootstrap": mediatypes.BOOTSTRAP,
    }
    extra = dict(annotations or {})
    if format is not None:
        extra[mediatypes.DISK_FORMAT_ANNOTATION] = str(format)
        extra[mediatypes.TITLE_ANNOTATION] = f"disk-{number}.{format}"
    else:
        extra[mediatypes.TITLE_ANNOTATION] = titles[kind]
    return Descriptor(types[kind], digest, size, extra)
