"""Where an artifact comes from or goes to: a reference, or a place on disk as ``containers-transports(5)`` writes it.

::

    oci:DIR[:TAG]            a directory that is an OCI image layout
    oci-archive:FILE[:TAG]   a tar of one

DIR and FILE end at the first colon, so neither can hold one; both may be relative. TAG is whatever the layout's
``org.opencontainers.image.ref.name`` says, often a whole reference with colons of its own; ``@sha256:…`` instead of it
chooses by digest. What begins like this is always a place on disk, never an artifact or a registry called ``oci``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

from ovms.errors import InputError, ReferenceInvalid
from ovms.lazy import dataclass, regex, replace
from ovms.oci.reference import Reference
from ovms.spec.digest import Digest, is_digest

#: Printable ASCII without spaces: what the image layout allows, and what ``skopeo`` writes, is less.
_TAG: Final = regex(r"[!-~]{1,512}")


class Kind(StrEnum):
    """What a place on disk is, by its prefix."""

    DIRECTORY = "oci"
    ARCHIVE = "oci-archive"


@dataclass(frozen=True)
class Place:
    """A layout on disk, and which of its artifacts. At most one of ``tag`` and ``digest`` is set."""

    kind: Kind
    path: Path
    tag: str | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        chosen = self.tag or (f"@{self.digest}" if self.digest else None)
        return f"{self.kind}:{self.path}" + (f":{chosen}" if chosen else "")

    def below(self, directory: Path) -> Place:
        """The same place, where a relative path counts from *directory*."""
        return replace(self, path=directory / self.path)


def parse_place(text: str) -> Place | None:
    """The place on disk that *text* names; None when it does not begin like one.

    Raises:
        ReferenceInvalid: it begins like one, and is none.
    """
    prefix, colon, rest = text.partition(":")
    if not colon or prefix not in tuple(Kind):
        return None
    kind = Kind(prefix)
    form = "oci:DIR[:TAG]" if kind is Kind.DIRECTORY else "oci-archive:FILE[:TAG]"
    path, colon, chosen = rest.partition(":")
    if not path or "\0" in path:
        raise ReferenceInvalid(f"{text[:120]!a} names no path", hint=f"write it as {form}")
    if not colon:
        return Place(kind, Path(path))
    if not _TAG.fullmatch(chosen):
        raise ReferenceInvalid(
            f"{text[:120]!a}: {chosen[:80]!a} is no tag", hint=f"write it as {form}; a path cannot hold a colon"
        )
    if not chosen.startswith("@"):
        return Place(kind, Path(path), tag=chosen)
    if not is_digest(chosen[1:]):
        raise ReferenceInvalid(f"{text[:120]!a}: what follows '@' is no sha256 digest", hint=f"write it as {form}")
    return Place(kind, Path(path), digest=Digest(chosen[1:]))


def parse(text: str) -> Reference | Place:
    """What *text* names: a place on disk, else a reference.

    Raises:
        ReferenceInvalid: neither.
    """
    return parse_place(text) or Reference.parse(text)


def new_name(text: str) -> Reference:
    """A name for an artifact in the local store that is new there.

    Raises:
        ReferenceInvalid: not of the grammar.
        InputError: it has a digest, or would always be taken for a place on disk.
    """
    reference = Reference.parse(text)
    if reference.digest is not None:
        raise InputError(f"{reference}: a name for a new artifact has no digest", hint="leave out what follows '@'")
    if parse_place(str(reference)) is not None:
        raise InputError(
            f"{reference} would be taken for a place on disk",
            hint="choose another name; 'ovm push NAME oci:DIR' exports",
        )
    return reference


def name_in(tag: str | None) -> str | None:
    """The name that a layout's tag stands for by itself: a reference with its own tag. ``v1`` is none."""
    try:
        return tag if tag is not None and str(new_name(tag)) == tag else None
    except InputError:
        return None
