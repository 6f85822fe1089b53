"""Where the signatures of an artifact are found: in a repository of a registry, and in the local store.

Whoever may write to a repository may put anything beside an artifact, so everything here is bounded: manifests, signatures,
bytes. What is beyond a limit is not looked at, and a line says so: too much rubbish hides a good signature, and then the
artifact is refused; no amount of it makes a bad signature good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from ovms.errors import (
    BlobNotFound,
    IntegrityError,
    JsonInvalid,
    ReferenceNotFound,
    RegistryProtocol,
)
from ovms.oci import cosign, referrers
from ovms.oci.descriptor import Descriptor, ImageManifest, parse_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import limits
from ovms.spec.digest import Digest, of_bytes
from ovms.text import printable
from ovms.trust import payload
from ovms.trust.model import Format, Found, Unreadable

#: Manifests with signatures of one artifact that are read, signatures in all of them, and their bytes.
MANIFESTS_MAX: Final = 64
SIGNATURES_MAX: Final = 256
BYTES_MAX: Final = 8 * limits.MIB
#: Annotations of one layer: their number, and the characters of all.
_ANNOTATIONS_MAX: Final = 32
_ANNOTATIONS_SIZE: Final = 64 * limits.KIB
#: What is no signature, whatever it holds.
_STRANGE: Final = (BlobNotFound, IntegrityError, JsonInvalid, ReferenceNotFound, RegistryProtocol)


#: Whether a referrer is one to be read, from what a list says of it.
_Wanted = Callable[[Descriptor], bool]


class _Place(Protocol):
    """Reads what belongs to a signature."""

    def blob(self, descriptor: Descriptor) -> bytes: ...


class RegistrySource:
    """The signatures in one repository: the classic tag, and referrers by the API and by the fallback tag."""

    def __init__(self, client: RegistryClient, repository: str) -> None:
        self._client = client
        self._repository = repository

    def signatures(self, subject: Digest, *, attested: bool = False) -> Sequence[Found | Unreadable]:
        """All signatures of *subject*, or (*attested*) its signed statements of other kinds. What can't be read is told in one
        line each.

        Raises:
            RegistryError: and its kinds: as the registry met us; the fallback tag holds no index.
        """
        reader = _Reader(self, subject)
        if not attested and (image := self._classic(subject, reader)) is not None:
            reader.take(image, classic=True)
        for image in self._referring(subject, reader, cosign.may_attest if attested else cosign.may_sign):
            reader.take(image, classic=False)
        return reader.found

    def _referring(self, subject: Digest, reader: _Reader, wanted: _Wanted) -> Iterator[ImageManifest]:
        for digest in self._referrers(subject, reader, wanted):
            target = Reference(self._client.host, self._repository, None, digest)
            with reader.noting(digest):
                image = parse_manifest(self._client.get_manifest(target)[0], f"the manifest {digest}")
                if not isinstance(image, ImageManifest) or image.subject is None or image.subject.digest != subject:
                    reader.note(digest, "it is listed as a referrer, but names another subject")
                    continue
                yield image

    def _classic(self, subject: Digest, reader: _Reader) -> ImageManifest | None:
        tag = Reference(self._client.host, self._repository, cosign.classic_tag(subject))
        try:
            raw, _ = self._client.get_manifest(tag)
        except ReferenceNotFound:
            return None
        except IntegrityError as exc:
            reader.note(subject, exc.message)
            return None
        digest = of_bytes(raw)
        with reader.noting(digest):
            image = parse_manifest(raw, f"the tag {tag.tag}")
            # one with a subject is not what is looked for under this tag, but no worse for it
            if isinstance(image, ImageManifest):
                return image
            reader.note(digest, "the tag of the classic signatures holds an index")
        return None

    def _referrers(self, subject: Digest, reader: _Reader, wanted: _Wanted) -> list[Digest]:
        listing = referrers.fetch(self._client, self._repository, subject)
        listed = [d for d in listing.descriptors if wanted(d)]
        if not listing.complete or len(listed) > MANIFESTS_MAX:
            reader.note(subject, "it has more referrers than are looked at")
        return [d.digest for d in listed[:MANIFESTS_MAX]]

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob, checked. Raises like a registry client, and :class:`IntegrityError`."""
        return self._client.small_blob(self._repository, descriptor)


class LocalSource:
    """The signatures that are kept in the local store, beside what they belong to."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def signatures(self, subject: Digest, *, attested: bool = False) -> Sequence[Found | Unreadable]:
        """All signatures of *subject* that are here: those that were made here, and those that :func:`keep` fetched. *attested*: its
        signed statements of other kinds instead.
        """
        reader = _Reader(self, subject)
        fits = cosign.may_attest if attested else cosign.may_sign
        wanted = [d for d in referrers.local_lister(self._layout)(subject, None).descriptors if fits(d)]
        if len(wanted) > MANIFESTS_MAX + SIGNATURES_MAX:
            reader.note(subject, "it has more referrers than are looked at")
        for descriptor in wanted[: MANIFESTS_MAX + SIGNATURES_MAX]:
            with reader.noting(descriptor.digest):
                image = self._layout.manifest(descriptor.digest)
                if isinstance(image, ImageManifest):
                    reader.take(image, classic=cosign.is_classic(image))
        return reader.found

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob, checked."""
        return self._layout.read(descriptor.digest, "a signature", max_size=payload.BUNDLE_MAX)


class _Reader:
    """Reads signatures out of manifests, as long as there is room."""

    def __init__(self, place: _Place, subject: Digest) -> None:
        self._place = place
        self._subject = subject
        self._seen: set[tuple[object, ...]] = set()
        self._bytes = 0
        self._count = 0
        self._full = False
        self.found: list[Found | Unreadable] = []

    def note(self, manifest: Digest, detail: str) -> None:
        if len(self.found) < 2 * SIGNATURES_MAX:
            self.found.append(Unreadable(manifest, printable(detail, 300)))

    @contextlib.contextmanager
    def noting(self, manifest: Digest) -> Iterator[None]:
        try:
            yield
        except _STRANGE as exc:
            self.note(manifest, exc.message)

    def take(self, image: ImageManifest, *, classic: bool) -> None:
        bundled = image.as_referrer().artifact_type == cosign.BUNDLE_TYPE
        kind = Format.BUNDLE if bundled and not classic else Format.CLASSIC if classic else Format.REFERRER
        wanted = cosign.BUNDLE_TYPE if kind is Format.BUNDLE else cosign.SIMPLE_SIGNING
        digest = image.digest
        if not image.layers:
            self.note(digest, "it has no layers, where signatures should be")
        for number, layer in enumerate(image.layers):
            if self._full:
                return
            if layer.media_type != wanted:
                self.note(digest, f"layer {number} is of the type {payload.shown(layer.media_type)}, no signature")
                continue
            with self.noting(digest):
                self._take_layer(kind, digest, number, layer)

    def _take_layer(self, kind: Format, digest: Digest, number: int, layer: Descriptor) -> None:
        signature = layer.annotations.get(cosign.SIGNATURE_ANNOTATION, "")
        if (kind, layer.digest, signature) in self._seen:
            return
        largest = payload.BUNDLE_MAX if kind is Format.BUNDLE else payload.PAYLOAD_MAX
        notes = layer.annotations
        if layer.size > largest:
            self.note(digest, f"layer {number} has {layer.size} bytes, where a signature has at most {largest}")
            return
        if len(notes) > _ANNOTATIONS_MAX or sum(len(k) + len(v) for k, v in notes.items()) > _ANNOTATIONS_SIZE:
            self.note(digest, f"layer {number} has more annotations than any signature")
            return
        if self._count == SIGNATURES_MAX or self._bytes + layer.size > BYTES_MAX:
            self.note(self._subject, f"it has more signatures than are looked at ({self._count})")
            self._full = True
            return
        self._count += 1
        self._bytes += layer.size
        self._seen.add((kind, layer.digest, signature))
        data = self._place.blob(layer)
        self.found.append(
            Found(kind, digest, number, data, "" if kind is Format.BUNDLE else signature, tuple(sorted(notes.items())))
        )


# --- keeping ---------------------------------------------------------------------------------------------------------


def keep(
    layout: Layout, client: RegistryClient, repository: str, subject: Descriptor, *, attested: bool = False
) -> int:
    """Keeps the signatures of *subject* in the local store, where :class:`LocalSource` finds them without the registry; or
    (*attested*) its signed statements of other kinds.

    They have no name, and live as long as the artifact. Nothing is checked but digests. Returns how many signatures are
    here now that the registry has; what can't be read there, or is beyond a limit, stays there.

    Raises:
        DiskFull: there is no room.
        RegistryError: and its kinds: as the registry met us.
    """
    with layout.using():
        source = RegistrySource(client, repository)
        found = [f for f in source.signatures(subject.digest, attested=attested) if isinstance(f, Found)]
        whole: dict[Digest, bool] = {}
        for one in found:
            if one.format is Format.CLASSIC:
                layer = _layer_of(one)
                add(layout, *cosign.referrer_manifest(layer, subject, classic=True), one.payload)
            elif one.manifest not in whole:
                whole[one.manifest] = _keep_referrer(layout, client, repository, one.manifest, subject.digest, found)
    return sum(one.format is Format.CLASSIC or whole[one.manifest] for one in found)


def add(layout: Layout, image: ImageManifest, config: bytes, data: bytes) -> None:
    """Puts a signature into the local store, as a referrer without a name. The caller holds ``layout.using()``."""
    for blob in (config, data, image.raw):
        layout.add_bytes(blob)
    layout.add_nameless(image.descriptor())


def _layer_of(found: Found) -> Descriptor:
    return Descriptor.of(cosign.SIMPLE_SIGNING, found.payload, dict(found.annotations))


def _keep_referrer(
    layout: Layout,
    client: RegistryClient,
    repository: str,
    digest: Digest,
    subject: Digest,
    found: Sequence[Found],
) -> bool:
    try:
        raw, _ = client.get_manifest(Reference(client.host, repository, None, digest))
        image = parse_manifest(raw, f"the manifest {digest}")
        if not isinstance(image, ImageManifest) or image.subject is None or image.subject.digest != subject:
            return False
        payloads = {of_bytes(one.payload): one.payload for one in found if one.manifest == digest}
        # a store has all of what it lists, or the artifact could not be pushed again
        if image.config.size > payload.BUNDLE_MAX or any(layer.digest not in payloads for layer in image.layers):
            return False
        payloads[image.config.digest] = RegistrySource(client, repository).blob(image.config)
    except _STRANGE:
        return False
    for data in (*payloads.values(), image.raw):
        layout.add_bytes(data)
    layout.add_nameless(image.descriptor())
    return True


__all__ = ["LocalSource", "RegistrySource", "add", "keep"]
