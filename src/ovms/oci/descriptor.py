"""OCI descriptors, image manifests and indexes: read strictly, unknown fields kept in the original bytes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping
from typing import Any, Final

from ovms.errors import OvmsError, RegistryProtocol
from ovms.lazy import dataclass, field, replace
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of, is_digest, of_bytes

_SIZE_MAX = 2**63 - 1
#: Bytes of a manifest that is worth being remembered, and whose like cannot fill a server's memory.
_REMEMBERED_MAX: Final = 64 * limits.KIB


@dataclass(frozen=True)
class Descriptor:
    """What a manifest says of a blob: media type, digest, size in bytes, annotations."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str | None = None
    platform: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, value: Any, where: str) -> Descriptor:
        """Raises :class:`RegistryProtocol` with *where* as the place when a required field is missing or wrong."""
        if not isinstance(value, dict):
            raise RegistryProtocol(f"{where} is not an object", rule="OCI-9")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not media_type or len(media_type) > limits.NAME_MAX:
            raise RegistryProtocol(f"{where}.mediaType is missing or no string", rule="OCI-9")
        if not isinstance(digest, str) or not is_digest(digest):
            raise RegistryProtocol(f"{where}.digest is missing or no sha256 digest", rule="OCI-9")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _SIZE_MAX:
            raise RegistryProtocol(f"{where}.size is missing or no size", rule="OCI-9")
        platform = value.get("platform")
        if "platform" in value and not isinstance(platform, dict):
            raise RegistryProtocol(f"{where}.platform is not an object", rule="OCI-9")
        artifact_type = value.get("artifactType")
        if "artifactType" in value and not isinstance(artifact_type, str):
            raise RegistryProtocol(f"{where}.artifactType is no string", rule="OCI-9")
        return cls(media_type, Digest(digest), size, annotations_of(value, where), artifact_type, platform)

    @classmethod
    def of(cls, media_type: str, data: bytes, annotations: Mapping[str, str] | None = None) -> Descriptor:
        """The descriptor of *data*."""
        return cls(media_type, of_bytes(data), len(data), annotations or {})

    def to_json(self) -> dict[str, Any]:
        """The JSON object, without the fields that are not set."""
        answer: dict[str, Any] = {"mediaType": self.media_type}
        if self.artifact_type is not None:
            answer["artifactType"] = self.artifact_type
        answer.update(digest=self.digest, size=self.size)
        if self.annotations:
            answer["annotations"] = dict(self.annotations)
        if self.platform is not None:
            answer["platform"] = dict(self.platform)
        return answer


def annotations_of(value: Mapping[str, Any], where: str) -> dict[str, str]:
    """The ``annotations`` of a manifest or descriptor (an empty dict where there are none)."""
    annotations = value.get("annotations", {})
    if not isinstance(annotations, dict) or not all(isinstance(v, str) for v in annotations.values()):
        raise RegistryProtocol(f"{where}.annotations is not an object of strings", rule="OCI-9")
    return annotations


@dataclass(frozen=True)
class ImageManifest:
    """An OCI image manifest: what it names, and its original bytes."""

    raw: bytes
    artifact_type: str | None
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None
    annotations: Mapping[str, str]
    #: As it stands there: general OCI documents may leave it out, artifacts of ours may not (OCI-1).
    media_type: str | None = mediatypes.OCI_MANIFEST

    @property
    def digest(self) -> Digest:
        """The digest of the original bytes."""
        return of_bytes(self.raw)

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The config and the layers, each digest once."""
        seen: dict[Digest, Descriptor] = {}
        for descriptor in (self.config, *self.layers):
            seen.setdefault(descriptor.digest, descriptor)
        return tuple(seen.values())

    def descriptor(self) -> Descriptor:
        """What an index says of this manifest."""
        return Descriptor(mediatypes.OCI_MANIFEST, self.digest, len(self.raw), artifact_type=self.artifact_type)

    def as_referrer(self) -> Descriptor:
        """What a list of referrers says of this manifest: its type and its annotations, too."""
        artifact_type = self.artifact_type or self.config.media_type
        return replace(self.descriptor(), artifact_type=artifact_type, annotations=self.annotations)


def created_now() -> str:
    """The time, as :data:`~ovms.spec.mediatypes.CREATED_ANNOTATION` has it (RFC 3339, whole seconds)."""
    return rfc3339(time.time())


def rfc3339(seconds: float) -> str:
    """Seconds since 1970 as ``2026-11-25T10:00:00Z``."""
    from datetime import UTC, datetime  # not every command needs one

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class ImageIndex:
    """An OCI image index: a list of manifests to choose from, and its original bytes."""

    raw: bytes
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    artifact_type: str | None = None
    subject: Descriptor | None = None

    @property
    def digest(self) -> Digest:
        """The digest of the original bytes."""
        return of_bytes(self.raw)

    def descriptor(self) -> Descriptor:
        """What an index says of this index."""
        return Descriptor(mediatypes.OCI_INDEX, self.digest, len(self.raw), artifact_type=self.artifact_type)

    def as_referrer(self) -> Descriptor:
        """What a list of referrers says of this index: its annotations, too."""
        return replace(self.descriptor(), annotations=self.annotations)


def parse_manifest(raw: bytes, where: str) -> ImageManifest | ImageIndex:
    """An image manifest or index from its bytes; *where* names it in errors.

    Raises:
        JsonInvalid: not strict JSON, or too large.
        RegistryProtocol: not an OCI manifest or index.
    """
    if len(raw) <= _REMEMBERED_MAX:
        with contextlib.suppress(OvmsError):  # which is to tell where
            return _remembered(raw)
    return _parse(raw, where)


@functools.lru_cache(maxsize=16)
def _remembered(raw: bytes) -> ImageManifest | ImageIndex:
    # a pull or a start meets the same manifest several times: from the registry, from the store, for a policy
    return _parse(raw, "a manifest")


def _parse(raw: bytes, where: str) -> ImageManifest | ImageIndex:
    value = strictjson.parse(raw, where, max_size=limits.OCI_MANIFEST_MAX)
    if not isinstance(value, dict):
        raise RegistryProtocol(f"{where} is not an object", rule="OCI-1")
    version = value.get("schemaVersion")
    if version != 2 or not isinstance(version, int):
        raise RegistryProtocol(f"{where}.schemaVersion is not 2", rule="DOC-6" if version == 2 else "OCI-1")
    media_type = value.get("mediaType")
    if "mediaType" in value and media_type is None:
        raise RegistryProtocol(f"{where}.mediaType is null", rule="DOC-8")
    artifact_type = value.get("artifactType")
    if "artifactType" in value and not isinstance(artifact_type, str):
        raise RegistryProtocol(f"{where}.artifactType is no string", rule="OCI-9")
    subject = Descriptor.from_json(value["subject"], f"{where}.subject") if "subject" in value else None
    if media_type == mediatypes.OCI_INDEX or (media_type is None and "manifests" in value):
        manifests = value.get("manifests")
        if not isinstance(manifests, list) or "config" in value:
            raise RegistryProtocol(f"{where}.manifests is not a list", rule="OCI-16")
        return ImageIndex(
            raw,
            tuple(Descriptor.from_json(m, f"{where}.manifests[{i}]") for i, m in enumerate(manifests)),
            annotations_of(value, where),
            artifact_type,
            subject,
        )
    if media_type not in (mediatypes.OCI_MANIFEST, None) or "manifests" in value:
        raise RegistryProtocol(
            f"{where} is of the type {str(media_type)[:100]!a}, not an OCI image manifest or index",
            hint="ovms artifacts are OCI manifests; Docker's own manifest types hold container images",
            rule="OCI-1",
        )
    layers = value.get("layers")
    if not isinstance(layers, list) or len(layers) > limits.OCI_LAYERS_MAX:
        raise RegistryProtocol(f"{where}.layers is not a list of at most {limits.OCI_LAYERS_MAX}", rule="OCI-1")
    return ImageManifest(
        raw,
        artifact_type,
        Descriptor.from_json(value.get("config"), f"{where}.config"),
        tuple(Descriptor.from_json(layer, f"{where}.layers[{i}]") for i, layer in enumerate(layers)),
        subject,
        annotations_of(value, where),
        media_type,
    )


def build_manifest(
    *,
    artifact_type: str,
    config: Descriptor,
    layers: tuple[Descriptor, ...],
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
) -> ImageManifest:
    """A new image manifest, with its bytes."""
    value: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if subject is not None:
        value["subject"] = Descriptor(subject.media_type, subject.digest, subject.size).to_json()
    if annotations:
        value["annotations"] = dict(annotations)
    raw = strictjson.canonical(value)
    return ImageManifest(raw, artifact_type, config, layers, subject, annotations or {})


#: The config of an artifact that needs none (OCI image specification 1.1).
EMPTY_CONFIG: Final = b"{}"


def build_file_manifest(
    artifact_type: str, layer: Descriptor, subject: Descriptor, annotations: Mapping[str, str]
) -> ImageManifest:
    """The manifest around one file that belongs to *subject*. Its config is :data:`EMPTY_CONFIG`."""
    return build_manifest(
        artifact_type=artifact_type,
        config=Descriptor.of(mediatypes.OCI_EMPTY, EMPTY_CONFIG),
        layers=(layer,),
        subject=subject,
        annotations=annotations,
    )


def with_subject(manifest: ImageManifest | ImageIndex, subject: Descriptor) -> ImageManifest | ImageIndex:
    """The same manifest with another ``subject``; whatever else stands in it stays."""
    value = strictjson.parse(manifest.raw, "the manifest", max_size=limits.OCI_MANIFEST_MAX)
    value["subject"] = Descriptor(subject.media_type, subject.digest, subject.size).to_json()
    return parse_manifest(strictjson.canonical(value), "the manifest")


def label(blob: Descriptor) -> str:
    """What progress calls a blob."""
    title = blob.annotations.get(mediatypes.TITLE_ANNOTATION)
    if title is None:
        title = "config" if blob.media_type == mediatypes.MANIFEST else "blob"
    return f"{title[:16]} {hex_of(blob.digest)[:7]}"
