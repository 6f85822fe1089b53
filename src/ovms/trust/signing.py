"""Making signatures, as Cosign makes them, in a registry or in the local store."""

from __future__ import annotations

from typing import Protocol

from ovms.errors import HostError
from ovms.lazy import dataclass
from ovms.oci import cosign
from ovms.oci.descriptor import Descriptor, ImageManifest, created_now, parse_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec.digest import Digest
from ovms.trust import payload, sources
from ovms.trust.keys import PublicKey
from ovms.trust.model import Format


class Key(Protocol):
    """What signs: a private key in memory, or one that a program has."""

    @property
    def public(self) -> PublicKey:
        """The other half."""
        ...

    def sign(self, message: bytes) -> bytes:
        """A signature over *message*."""
        ...


@dataclass(frozen=True)
class Signed:
    """What was signed, and the manifest that holds the signature."""

    subject: Digest
    manifest: Digest


def sign_remote(client: RegistryClient, reference: Reference, key: Key, kind: Format) -> Signed:
    """Signs what *reference* stands for in its registry. A tag is looked up once, and its digest is what is signed.

    Raises:
        ReferenceNotFound: the registry has no such artifact.
        HostError: the key makes no signature that its public half takes.
        RegistryError: and its kinds: as the registry met us.
    """
    raw, _ = client.get_manifest(reference)
    subject = parse_manifest(raw, f"the manifest of {reference}").descriptor()
    repository = reference.repository
    if kind is Format.BUNDLE:
        image, data = _bundle(key, subject)
        cosign.push(client, repository, image, (cosign.EMPTY, data))
        return Signed(subject.digest, image.digest)
    layer, data = _simple(key, subject.digest, reference.name)
    if kind is Format.CLASSIC:
        return Signed(subject.digest, cosign.add_classic(client, repository, subject.digest, layer, data))
    image, config = cosign.referrer_manifest(layer, subject)
    cosign.push(client, repository, image, (config, data))
    return Signed(subject.digest, image.digest)


def sign_local(layout: Layout, digest: Digest, name: str, key: Key, kind: Format) -> Signed:
    """Signs an artifact of the local store, and keeps the signature beside it, from where a push sends both.

    *name* is what a simple signing calls it.

    Raises:
        BlobNotFound: it is not here.
        HostError: the key makes no signature that its public half takes.
    """
    with layout.using():
        subject = layout.manifest(digest).descriptor()
        if kind is Format.BUNDLE:
            image, data = _bundle(key, subject)
            config = cosign.EMPTY
        else:
            layer, data = _simple(key, digest, name)
            image, config = cosign.referrer_manifest(layer, subject, classic=kind is Format.CLASSIC)
        sources.add(layout, image, config, data)
        return Signed(digest, image.digest)


def _bundle(key: Key, subject: Descriptor) -> tuple[ImageManifest, bytes]:
    statement = payload.statement(subject.digest)
    signature = _sign(key, payload.pae(payload.IN_TOTO, statement))
    data = payload.bundle(key.public.hint, statement, signature)
    created = created_now()
    return cosign.bundle_manifest(data, subject, created), data


def _simple(key: Key, subject: Digest, name: str) -> tuple[Descriptor, bytes]:
    import base64

    data = payload.simple(subject, name)
    signature = base64.b64encode(_sign(key, data)).decode()
    return Descriptor.of(cosign.SIMPLE_SIGNING, data, {cosign.SIGNATURE_ANNOTATION: signature}), data


def _sign(key: Key, message: bytes) -> bytes:
    signature = key.sign(message)
    if not key.public.verify(signature, message):
        raise HostError("the signature does not fit the public key, so it was thrown away")
    return signature
