"""Where Cosign keeps signatures in a registry, and how they get there. Nothing here looks into a signature.

========  ========================================================================================================
classic   the tag ``sha256-<hex of the subject>.sig``: an image manifest, a layer a signature
referrer  the same layers in a manifest with a ``subject``
bundle    a Sigstore bundle as the only layer of a manifest with a ``subject``
========  ========================================================================================================

The local store has no tags, so a classic signature stands in it as a referrer with one layer and the annotation
:data:`CLASSIC`: it lives as long as its subject, and goes under the tag again when it is pushed.

Source: cosign 3.1, ``pkg/oci`` and ``specs/SIGNATURE_SPEC.md``.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from ovms.errors import JsonInvalid, ReferenceNotFound, RegistryProtocol
from ovms.oci import referrers
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest, parse_manifest
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of

SIMPLE_SIGNING: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_TYPE: Final = "application/vnd.dev.cosign.artifact.sig.v1+json"
SIGNATURE_ANNOTATION: Final = "dev.cosignproject.cosign/signature"
BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
BUNDLE_CONTENT: Final = "dev.sigstore.bundle.content"
BUNDLE_PREDICATE: Final = "dev.sigstore.bundle.predicateType"
SIGN_PREDICATE: Final = "https://sigstore.dev/cosign/sign/v1"
#: On the manifest of a classic signature in the local store.
CLASSIC: Final = "ovms.signature.classic"
EMPTY: Final = b"{}"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
#: Times that a tag is written which others write to, too.
_TRIES: Final = 8
_SETTLE: Final = 0.1


def classic_tag(subject: Digest) -> str:
    """The tag of the classic signatures of *subject*."""
    return f"sha256-{hex_of(subject)}.sig"


def bundle_manifest(bundle: bytes, subject: Descriptor, created: str) -> ImageManifest:
    """The manifest around a bundle of ours; its config is :data:`EMPTY`. *created* is an RFC 3339 time."""
    return build_manifest(
        artifact_type=BUNDLE_TYPE,
        config=Descriptor.of(mediatypes.OCI_EMPTY, EMPTY),
        layers=(Descriptor.of(BUNDLE_TYPE, bundle),),
        subject=subject,
        annotations={
            mediatypes.CREATED_ANNOTATION: created,
            BUNDLE_CONTENT: "dsse-envelope",
            BUNDLE_PREDICATE: SIGN_PREDICATE,
        },
    )


def layers_config(layers: Sequence[Descriptor]) -> bytes:
    """The image config that Cosign puts beside simple signings: it names the layers."""
    return strictjson.canonical({
        "architecture": "",
        "os": "",
        "created": "0001-01-01T00:00:00Z",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    })  # fmt: skip


def referrer_manifest(layer: Descriptor, subject: Descriptor, *, classic: bool = False) -> tuple[ImageManifest, bytes]:
    """A manifest with a ``subject`` around one simple signing, and its config."""
    config = layers_config([layer])
    image = build_manifest(
        artifact_type=SIGNATURE_TYPE,
        config=Descriptor.of(SIGNATURE_TYPE, config),
        layers=(layer,),
        subject=subject,
        annotations={CLASSIC: "true"} if classic else None,
    )
    return image, config


def is_classic(image: ImageManifest) -> bool:
    """Whether a manifest of the local store holds a classic signature."""
    return image.artifact_type == SIGNATURE_TYPE and CLASSIC in image.annotations and image.subject is not None


def may_sign(descriptor: Descriptor) -> bool:
    """Whether a referrer may hold signatures, from what a list says of it.

    A bundle says what its statement is about. Provenance and the like are none of ours; one that lies is not found.
    """
    if descriptor.artifact_type == BUNDLE_TYPE:
        return descriptor.annotations.get(BUNDLE_PREDICATE, SIGN_PREDICATE) == SIGN_PREDICATE
    return descriptor.artifact_type == SIGNATURE_TYPE


def push(client: RegistryClient, repository: str, image: ImageManifest, blobs: Sequence[bytes]) -> None:
    """Uploads a small manifest with a subject, and its blobs; lists it where the registry does not."""
    for data in blobs:
        _put_blob(client, repository, Descriptor.of("", data), data)
    kept = client.put_manifest(repository, image.digest, image.raw, mediatypes.OCI_MANIFEST)
    if image.subject is not None and not kept:
        referrers.add(client, repository, image.as_referrer(), image.subject.digest)


def add_classic(client: RegistryClient, repository: str, subject: Digest, layer: Descriptor, payload: bytes) -> Digest:
    """Adds a signature to the classic tag of *subject*, beside those that are there. Returns the manifest's digest.

    Two clients that write the tag at once each write it without the other's signature (see :mod:`ovms.oci.referrers`), so it
    is looked for again afterwards.

    Raises:
        RegistryProtocol: something else has this tag, or it is full; or others write it all the time.
        RegistryError: and its kinds: as the registry met us.
    """
    _put_blob(client, repository, layer, payload)
    tag = Reference(client.host, repository, classic_tag(subject))
    for _ in range(_TRIES):
        there = _classic(client, tag)
        layers = [] if there is None else list(there[1])
        if there is not None and any(_same(item, layer) for item in layers):
            return there[0]
        layers.append(layer.to_json())
        if len(layers) > limits.OCI_LAYERS_MAX:
            raise RegistryProtocol(
                f"{tag} has {len(layers) - 1} signatures: there is no room for another one",
                hint="delete the tag, and sign anew; or sign as a bundle",
            )
        config = layers_config([Descriptor.from_json(item, str(tag)) for item in layers])
        described = Descriptor.of(_CONFIG, config)
        _put_blob(client, repository, described, config)
        raw = strictjson.canonical({
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_MANIFEST,
            "config": described.to_json(),
            "layers": layers,
        })  # fmt: skip
        client.put_manifest(repository, str(tag.tag), raw, mediatypes.OCI_MANIFEST)
        time.sleep(_SETTLE * random.uniform(1, 2))  # noqa: S311 - no secret
    raise RegistryProtocol(f"{tag} does not keep the signature: other clients write it, too", hint="try again")


def _classic(client: RegistryClient, tag: Reference) -> tuple[Digest, list[Any]] | None:
    try:
        raw, _ = client.get_manifest(tag)
    except ReferenceNotFound:
        return None
    try:
        image = parse_manifest(raw, str(tag))
    except JsonInvalid:
        image = None
    if not isinstance(image, ImageManifest):
        raise RegistryProtocol(f"{tag} holds no signatures, so none can be added", hint="look at what is there")
    # what others wrote stays as it is
    layers = strictjson.parse(raw, str(tag), max_size=limits.OCI_MANIFEST_MAX)["layers"]
    return image.digest, layers


def _same(item: Any, layer: Descriptor) -> bool:
    there = Descriptor.from_json(item, "a signature")
    signature = there.annotations.get(SIGNATURE_ANNOTATION)
    return there.digest == layer.digest and signature == layer.annotations.get(SIGNATURE_ANNOTATION)


def _put_blob(client: RegistryClient, repository: str, descriptor: Descriptor, data: bytes) -> None:
    if not client.has_blob(repository, descriptor.digest):
        client.push_blob(repository, descriptor, lambda offset, size: io.BytesIO(data[offset : offset + size]))
