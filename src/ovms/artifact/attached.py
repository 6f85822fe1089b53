"""The file that was attached to an artifact, out of its referrer: found in a tree, fetched, and checked by its digest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from ovms.artifact import kinds
from ovms.errors import InputError, NotFound
from ovms.lazy import dataclass
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, parse_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.referrers import Node
from ovms.oci.registry import RegistryClient
from ovms.spec import limits
from ovms.spec.digest import Digest

#: Bytes of a file that is taken out: it is held in memory until its digest is checked.
FILE_MAX: Final = 64 * limits.MIB
#: Digits of a digest that are enough to name a referrer.
_DIGITS_MIN: Final = 6


class Source(Protocol):
    """Where referrers and their blobs are."""

    def manifest(self, digest: Digest) -> ImageManifest | ImageIndex:
        """A manifest, checked against its digest."""

    def blob(self, descriptor: Descriptor) -> bytes:
        """A blob of at most :data:`FILE_MAX` bytes, checked."""


class Local:
    """The local store."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def manifest(self, digest: Digest) -> ImageManifest | ImageIndex:
        """Raises :class:`~ovms.errors.BlobNotFound` and :class:`~ovms.errors.StoreCorrupt`."""
        return self._layout.manifest(digest)

    def blob(self, descriptor: Descriptor) -> bytes:
        """Raises as :meth:`manifest`."""
        if descriptor.size == 0 and self._layout.size(descriptor.digest) == 0:
            return b""
        return self._layout.read(descriptor.digest, "the attached file", max_size=FILE_MAX)


class Remote:
    """A repository of a registry."""

    def __init__(self, client: RegistryClient, repository: str) -> None:
        self._client = client
        self._repository = repository

    def manifest(self, digest: Digest) -> ImageManifest | ImageIndex:
        """Raises :class:`~ovms.errors.RegistryError` and its kinds."""
        raw, _ = self._client.get_manifest(Reference(self._client.host, self._repository, None, digest))
        return parse_manifest(raw, f"the referrer {digest}")

    def blob(self, descriptor: Descriptor) -> bytes:
        """Raises as :meth:`manifest`, and :class:`~ovms.errors.BlobNotFound`."""
        return self._client.small_blob(self._repository, descriptor)


@dataclass(frozen=True)
class AttachedFile:
    """A file that was attached, whole, and the digest of the referrer that it was attached as."""

    referrer: Digest
    media_type: str
    digest: Digest
    data: bytes


def choose(nodes: Sequence[Node], text: str) -> Node:
    """The referrer that *text* names: a digest, the first digits of one, or the kind of the only one.

    Raises:
        NotFound: there is none.
        InputError: there are several.
    """
    digits = text.removeprefix("sha256:")
    by_digest = len(digits) >= _DIGITS_MIN and all(c in "0123456789abcdef" for c in digits)

    def fits(node: Node) -> bool:
        if by_digest:
            return node.descriptor.digest.removeprefix("sha256:").startswith(digits)
        return kinds.of_referrer(node.descriptor) == text

    found = {node.descriptor.digest: node for node in _all(nodes) if fits(node)}
    if not found:
        raise NotFound(
            f"there is no referrer {text[:80]!a}", hint="'ovm referrers REF' lists them, with digests and kinds"
        )
    if len(found) > 1:
        raise InputError(
            f"{len(found)} referrers are {text[:80]!a}: {', '.join(sorted(found)[:8])}", hint="name one by its digest"
        )
    return next(iter(found.values()))


def _all(nodes: Sequence[Node]) -> list[Node]:
    pending, answer = list(nodes), []
    while pending:
        answer.append(pending.pop())
        pending += answer[-1].children
    return answer


def read(source: Source, node: Node) -> AttachedFile:
    """The file that was attached as a referrer.

    Raises:
        InputError: the referrer is no file that belongs to the artifact: it has another subject, or not exactly one layer; or
            the file is larger than :data:`FILE_MAX`.
        IntegrityError: what came is not what its digest says.
        NotFound, RegistryError: and their kinds: as the store or the registry met us.
    """
    referrer = node.descriptor.digest
    image = source.manifest(referrer)
    if not isinstance(image, ImageManifest) or len(image.layers) != 1:
        raise InputError(f"{referrer} is no single file", hint="'ovm pull' fetches an artifact by its name")
    if image.subject is None or image.subject.digest != node.subject:
        raise InputError(f"{referrer} is listed as a referrer of {node.subject}, and says that it is none")
    layer = image.layers[0]
    if layer.size > FILE_MAX:
        raise InputError(
            f"the file has {layer.size} bytes; at most {FILE_MAX} are taken out",
            hint="other tools take any size: 'oras blob fetch'",
        )
    return AttachedFile(referrer, layer.media_type, layer.digest, source.blob(layer))
