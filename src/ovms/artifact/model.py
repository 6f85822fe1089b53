"""An artifact in the local store: the OCI manifest, the OVMS manifest in it, and the rules that tie them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from ovms.errors import DigestMismatch, ManifestInvalid, Problem, ReferenceNotFound, RegistryProtocol, Unsupported
from ovms.lazy import dataclass
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, build_manifest
from ovms.oci.layout import Layout
from ovms.oci.platform import CONTAINER_HINT, HOST, Platform, check_guest, fitting, is_artifact
from ovms.spec import limits, manifest, mediatypes, strictjson
from ovms.spec.digest import Digest, is_digest, of_bytes
from ovms.spec.manifest import Compression, Part, PartKind

RAM_TYPES: Final = {
    Compression.LZ4: mediatypes.RAM_SNAPSHOT_LZ4,
    Compression.ZSTD: mediatypes.RAM_SNAPSHOT_ZSTD,
}
_TYPES: Final = {
    PartKind.KERNEL: mediatypes.KERNEL,
    PartKind.INITRD: mediatypes.INITRD,
    PartKind.DISK: mediatypes.DISK_LAYER,
    PartKind.BOOTSTRAP: mediatypes.BOOTSTRAP,
}
_TITLES: Final = {PartKind.KERNEL: "kernel", PartKind.INITRD: "initrd", PartKind.BOOTSTRAP: "bootstrap.json"}


def is_encrypted(blob: Descriptor) -> bool:
    """Whether a descriptor is that of an encrypted RAM snapshot."""
    return blob.media_type in mediatypes.RAM_SNAPSHOTS and blob.media_type.endswith(mediatypes.RAM_ENCRYPTED_SUFFIX)


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

    @property
    def encrypted(self) -> bool:
        """Whether a part of its memory is encrypted: of its RAM snapshot, or of an ancestor."""
        refs = {part.ref for part in self.manifest.parts() if part.kind is PartKind.RAM}
        return any(layer.digest in refs and is_encrypted(layer) for layer in self.image.layers)

    def blob(self, ref: str) -> Descriptor:
        """The descriptor of the blob that a ``ref`` of the OVMS manifest names."""
        for layer in self.image.layers:
            if layer.digest == ref:
                return layer
        raise KeyError(ref)


def load(layout: Layout, digest: Digest, platform: Platform | None = None) -> Artifact:
    """Reads the artifact whose OCI manifest is *digest*, or the one of that index for *platform* (None: this host's).

    Raises:
        BlobNotFound, StoreCorrupt: it is not in the store, or damaged there.
        ReferenceNotFound: it is an index, whose manifest for the platform was not pulled.
        Unsupported: it is something else than an OVMS artifact, or for another platform.
        ManifestInvalid, JsonInvalid, RegistryProtocol: its manifests are wrong, or disagree.
        DigestMismatch: a blob that is there has another size than its descriptor says.
    """
    image = layout.manifest(digest)
    if isinstance(image, ImageIndex):
        image = choose(layout, image, platform)
    return Artifact(image, check_documents(layout, image, platform))


def load_any(layout: Layout, digest: Digest) -> Artifact:
    """Like :func:`load`, to be looked at: of an index that has nothing here for this host, the first that is here."""
    try:
        return load(layout, digest)
    except (ReferenceNotFound, Unsupported):
        index = layout.manifest(digest)
        for descriptor in index.manifests if isinstance(index, ImageIndex) else ():
            image = layout.manifest(descriptor.digest) if layout.size(descriptor.digest) is not None else None
            if isinstance(image, ImageManifest) and is_artifact(image):
                return Artifact(image, check_documents(layout, image))
        raise


def check_documents(layout: Layout, image: ImageManifest, platform: Platform | None = None) -> manifest.Manifest:
    """The OVMS manifest of *image*, which is in the store. Raises like :func:`load`."""
    check_image(image)
    for blob in (image.config, *image.layers):
        check_size(layout, blob.digest, blob.size)
    where = ovms_descriptor(image)
    raw = layout.read(where.digest, "the OVMS manifest", max_size=limits.MANIFEST_MAX)
    checked = manifest.parse(raw, f"the OVMS manifest of {image.digest}")
    check_parts(checked, image)
    check_guest(platform, checked.metadata.platform.arch, checked.name)
    return checked


def check_size(layout: Layout, digest: Digest, said: int) -> None:
    """Whether a blob, where the store has it, has the *said* size: its name vouches for its bytes only.

    Raises:
        DigestMismatch: it is not.
        StoreCorrupt: what has the blob's name is no file.
    """
    if (size := layout.file_size(digest)) not in (None, said):
        raise DigestMismatch(
            f"{digest} has {size} bytes, and its descriptor says {said}",
            hint="'ovm fsck' tells whether the blob is damaged; else the artifact is wrong: build it again",
            rule="OCI-21",
        )


def check_image(image: ImageManifest) -> None:
    """Whether an OCI manifest is of the form that an artifact of ours has.

    Raises:
        RegistryProtocol: it does not say that it is an OCI image manifest.
        Unsupported: it says that it is another kind of artifact.
    """
    if image.media_type is None:
        raise RegistryProtocol(f"{image.digest} has no mediaType", rule="OCI-1")
    # OCI's own rule: where there is no artifactType, the config's media type says what it is
    kind = image.config.media_type if image.artifact_type is None else image.artifact_type
    if kind != mediatypes.MANIFEST:
        text = f"{image.digest} is no OVMS artifact: its artifactType is {kind[:80]!a}, not {mediatypes.MANIFEST}"
        raise Unsupported(text, hint=CONTAINER_HINT, rule="OCI-1")


def choose(layout: Layout, index: ImageIndex, platform: Platform | None = None) -> ImageManifest:
    """The manifest of *index* for *platform* (None: this host's), among those that are in the store.

    Raises:
        Unsupported: the index has none.
        ReferenceNotFound: it has one, which was not pulled.
    """
    where = f"the index {of_bytes(index.raw)}"
    listed = fitting(index, platform, where)
    here = [image for d in listed if layout.size(d.digest) is not None for image in [layout.manifest(d.digest)]]
    for image in here:
        if isinstance(image, ImageManifest) and is_artifact(image):
            return image
    if len(here) == len(listed):
        raise Unsupported(f"{where} holds no OVMS artifact for {platform or HOST}", hint=CONTAINER_HINT, rule="OCI-16")
    raise ReferenceNotFound(
        f"what {where} has for {platform or HOST} is not in the local store",
        hint=f"'ovm pull --platform {platform or HOST}' fetches it",
    )


def _manifests_of(image: ImageManifest) -> list[Descriptor]:
    # the config wins, whatever the layers say (OCI-4)
    if image.config.media_type == mediatypes.MANIFEST:
        return [image.config]
    return [layer for layer in image.layers if layer.media_type == mediatypes.MANIFEST]


def ovms_descriptor(image: ImageManifest) -> Descriptor:
    """Where the OVMS manifest is: in the config, or (as plain ``oras push`` makes it) in one of the layers.

    Raises:
        Unsupported: in neither, or in several.
    """
    found = _manifests_of(image)
    if len(found) != 1:
        raise Unsupported(
            f"{image.digest} is no OVMS artifact: its config is {image.config.media_type!a}"
            + (", and several layers claim to be the manifest" if found else ""),
            hint=CONTAINER_HINT,
            rule="OCI-4",
        )
    return found[0]


def check_parts(checked: manifest.Manifest, image: ImageManifest) -> None:
    """Whether the OVMS manifest and the OCI manifest around it say the same of every part.

    Raises:
        ManifestInvalid: they do not; every difference is named.
        Unsupported: a disk layer is compressed as a whole.
    """
    problems: list[Problem] = []
    attached = image.config.media_type != mediatypes.MANIFEST
    layers: dict[str, list[Descriptor]] = {}
    for layer in image.layers:
        layers.setdefault(layer.digest, []).append(layer)
    for part in checked.parts():
        if not is_digest(part.ref):
            text = f"must be a digest in a finished artifact, not {part.ref[:80]!a}"
            problems.append(Problem(part.path, text, "OCI-6"))
        elif (found := layers.get(part.ref)) is None:
            problems.append(Problem(part.path, f"{part.ref} is not among the layers of the OCI manifest", "OCI-6"))
        else:
            problems.extend(_differences(checked, part, found, attached=attached))
    if problems:
        raise ManifestInvalid(
            "the OVMS manifest does not fit the OCI manifest around it",
            problems=problems,
            hint="the artifact was not built by a conforming tool; build it again with 'ovm build'",
        )


def _differences(
    checked: manifest.Manifest, part: Part, layers: list[Descriptor], *, attached: bool
) -> Iterator[Problem]:
    # One blob may be several parts (an image that is kernel and disk, say), with a layer for each.
    wanted = _media_types(checked, part)
    types = {layer.media_type for layer in layers}
    if part.kind is PartKind.DISK and any(
        media_type.removesuffix(suffix) in wanted and media_type not in wanted
        for media_type in types
        for suffix in mediatypes.DISK_LAYER_SUFFIXES
    ):
        raise Unsupported(
            f"disk layer {part.number} is compressed as a whole, which this version does not read",
            hint="qcow2 layers can be compressed inside ('qemu-img convert -c')",
            rule="OCI-13",
        )
    if not types & wanted and not (attached and part.kind is not PartKind.RAM):
        text = f"its layer has the media type {min(types)[:80]!a}, not {' or '.join(sorted(wanted))}"
        yield Problem(part.path, text, "OCI-11")
    if part.size is not None and part.size != layers[0].size:
        path = part.path.removesuffix(".ref") + ".size"
        yield Problem(path, f"says {part.size} bytes, but the layer has {layers[0].size}", "OCI-7")
    if part.format is not None:
        formats = {layer.annotations.get(mediatypes.DISK_FORMAT_ANNOTATION) for layer in layers} - {None}
        if formats and part.format not in formats:
            path = part.path.removesuffix(".ref") + ".format"
            annotated = ascii(min(str(f)[:20] for f in formats))
            yield Problem(path, f"says {part.format}, but the layer's annotation ovms.format {annotated}", "OCI-12")


def _media_types(checked: manifest.Manifest, part: Part) -> frozenset[str]:
    if part.kind is PartKind.DISK:
        return mediatypes.DISK_LAYERS_READ
    if part.kind is PartKind.RAM:
        assert checked.ram_snapshot is not None
        plain = RAM_TYPES[checked.ram_snapshot.compression]
        return frozenset({plain, plain + mediatypes.RAM_ENCRYPTED_SUFFIX})
    return frozenset({_TYPES[part.kind]})


@dataclass(frozen=True)
class Parts:
    """The blobs of a new artifact, all in the store; each list and field in the place that the manifest gives it."""

    kernel: Descriptor | None = None
    initrd: Descriptor | None = None
    disks: tuple[Descriptor, ...] = ()
    ram_snapshots: tuple[Descriptor, ...] = ()
    bootstrap: Descriptor | None = None

    def layers(self) -> tuple[Descriptor, ...]:
        """In the order of the specification: kernel, initrd, disks and RAM snapshots base first, bootstrap config."""
        parts = (self.kernel, self.initrd, *self.disks, *self.ram_snapshots, self.bootstrap)
        return tuple(part for part in parts if part is not None)


def compose(
    layout: Layout, document: Mapping[str, Any], parts: Parts, *, subject: Descriptor | None = None
) -> Artifact:
    """Writes the manifests of a new artifact, whose ``ref`` fields are digests already, and adds them to the store.

    The same input gives the same bytes: nothing of the time or the machine goes in.
    """
    checked = manifest.check(document)
    layers = parts.layers()
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
    check_parts(checked, image)
    layout.add_bytes(raw)
    layout.add_bytes(image.raw)
    return Artifact(image, checked)


def part_descriptor(
    kind: PartKind,
    digest: Digest,
    size: int,
    *,
    format: manifest.DiskFormat | None = None,
    compression: Compression = Compression.LZ4,
    encrypted: bool = False,
    number: int = 0,
    annotations: Mapping[str, str] | None = None,
) -> Descriptor:
    """The descriptor of one part. The title gives ``oras pull`` a file name. *encrypted*: a RAM snapshot that is."""
    extra = dict(annotations or {})
    if format is not None:
        extra[mediatypes.DISK_FORMAT_ANNOTATION] = str(format)
        extra[mediatypes.TITLE_ANNOTATION] = f"disk-{number}.{format}"
    elif kind is PartKind.RAM:
        extra[mediatypes.TITLE_ANNOTATION] = f"ram-{number}.ovmr"
    else:
        extra[mediatypes.TITLE_ANNOTATION] = _TITLES[kind]
    media_type = RAM_TYPES[compression] if kind is PartKind.RAM else _TYPES[kind]
    if encrypted:
        media_type += mediatypes.RAM_ENCRYPTED_SUFFIX
    return Descriptor(media_type, digest, size, extra)


def reused(artifact: Artifact, part: Part) -> Descriptor:
    """The descriptor of an artifact's part as it stands in a new artifact, whatever form the old one has."""
    old = artifact.blob(part.ref)
    compression = artifact.manifest.ram_snapshot.compression if artifact.manifest.ram_snapshot else Compression.LZ4
    return part_descriptor(
        part.kind,
        old.digest,
        old.size,
        format=part.format,
        compression=compression,
        encrypted=is_encrypted(old),
        number=part.number,
        annotations=old.annotations,
    )
