"""From what the user calls an artifact to the artifact in the local store, pulling it where needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ovms.artifact.model import Artifact, check_documents, load
from ovms.errors import InputError, ReferenceNotFound
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.spec.digest import Digest, is_digest

if TYPE_CHECKING:
    from ovms.oci.registry import RegistryClient

#: Opens a client for a registry's ``host[:port]``.
Connect = Callable[[str], "RegistryClient"]

PullPolicy = Literal["missing", "always", "never"]


@dataclass(frozen=True)
class Found:
    """An artifact in the store, and the name that it was found by (a digest where it has none)."""

    name: str
    artifact: Artifact


def find(layout: Layout, text: str) -> Found:
    """The artifact in the local store that *text* names: a reference, a digest, or the first digits of one.

    Raises:
        ReferenceNotFound: nothing of that name here.
        InputError: a short digest that fits several artifacts.
        ReferenceInvalid: no reference at all.
    """
    known = lookup(layout, text)
    if known is not None:
        name, digest = known
        return Found(name or _name_of(layout, digest) or digest, load(layout, digest))
    reference = Reference.parse(text)
    descriptor = _find_descriptor(layout, reference)
    if descriptor is None:
        raise ReferenceNotFound(
            f"there is no artifact {reference} in the local store",
            hint="'ovm ls' lists what is there; 'ovm pull' fetches from a registry",
            reference=str(reference),
        )
    return Found(str(reference), load(layout, descriptor.digest))


def lookup(layout: Layout, text: str) -> tuple[str | None, Digest] | None:
    """What *text* names in the store, without reading the artifact: its name (None for a digest) and its digest.

    None when there is nothing of that name. Raises like :func:`find` on what is no reference at all. A name comes
    before the first digits of a digest: an artifact called ``decade`` is found, whatever else is in the store.
    """
    whole = f"sha256:{text.removeprefix('sha256:')}"
    if is_digest(whole):
        return (None, Digest(whole)) if layout.size(Digest(whole)) is not None else None
    reference = Reference.parse(text)
    descriptor = layout.find(str(reference))
    if descriptor is not None:
        return str(reference), descriptor.digest
    if reference.digest is not None:
        # NAME@DIGEST of what was built or pulled by a tag
        for entry in layout.entries():
            same = entry.name.startswith((f"{reference.name}:", f"{reference.name}@"))
            if same and entry.descriptor.digest == reference.digest:
                return entry.name, reference.digest
        return None
    digest = _by_first_digits(layout, text)
    return None if digest is None else (None, digest)


def _find_descriptor(layout: Layout, reference: Reference) -> Descriptor | None:
    descriptor = layout.find(str(reference))
    if descriptor is None and reference.digest is not None:
        # The same name under a tag, or pulled by another name: a digest means the same everywhere.
        for entry in layout.entries():
            if entry.descriptor.digest == reference.digest:
                return entry.descriptor
    return descriptor


def _name_of(layout: Layout, digest: Digest) -> str | None:
    return next((e.name for e in layout.entries() if e.descriptor.digest == digest and e.name), None)


def _by_first_digits(layout: Layout, text: str) -> Digest | None:
    digits = text.removeprefix("sha256:")
    if not 6 <= len(digits) < 64 or any(c not in "0123456789abcdef" for c in digits):
        return None
    fitting = {e.descriptor.digest for e in layout.entries() if e.descriptor.digest[7:].startswith(digits)}
    if len(fitting) > 1:
        raise InputError(f"{text} fits {len(fitting)} artifacts; give more digits")
    return next(iter(fitting), None)


def pull(layout: Layout, connect: Connect, text: str, progress: Progress = NULL) -> Found:
    """Fetches an artifact from its registry, checks it, and names it in the store.

    Raises:
        InputError: the reference names no registry.
        RegistryError, ReferenceNotFound, DigestMismatch, DiskFull: as the transfer met them.
        Unsupported, ManifestInvalid: what came is no OVMS artifact.
    """
    from ovms.oci import transfer

    reference = Reference.parse(text)
    if reference.registry is None:
        raise InputError(
            f"{reference} names no registry",
            hint=f"write the registry's host before it, such as registry.example/{reference}",
        )
    transfer.pull(
        layout,
        connect(reference.registry),
        reference,
        progress,
        check=lambda image: check_documents(layout, image),
    )
    return find(layout, str(reference))


def push(layout: Layout, connect: Connect, text: str, progress: Progress = NULL) -> Descriptor:
    """Uploads the artifact that is called *text* here to the registry that the name says.

    Raises:
        InputError: the name has no registry.
        ReferenceNotFound: nothing of that name here.
        RegistryError: as the transfer met it.
    """
    from ovms.oci import transfer

    reference = pushable(text)
    assert reference.registry is not None
    with layout.using():
        found = find(layout, text)
        descriptor = _find_descriptor(layout, reference) or found.artifact.image.descriptor()
        transfer.push(layout, connect(reference.registry), reference, descriptor.digest, progress)
        return descriptor


def pushable(text: str) -> Reference:
    """A reference with a registry. Raises :class:`InputError` where it has none."""
    reference = Reference.parse(text)
    if reference.registry is None:
        raise InputError(
            f"{reference} names no registry to push to",
            hint=f"tag it first: 'ovm tag {reference} registry.example/{reference}'",
        )
    return reference


def resolve(
    layout: Layout, connect: Connect, text: str, *, policy: PullPolicy = "missing", progress: Progress = NULL
) -> Found:
    """The artifact that *text* names, pulled from its registry as *policy* says.

    Raises:
        ReferenceNotFound: neither here nor there (or not here, and not to be pulled).
    """
    if policy != "always":
        try:
            return find(layout, text)
        except ReferenceNotFound:
            if policy == "never" or Reference.parse(text).registry is None:
                raise
    return pull(layout, connect, text, progress)
