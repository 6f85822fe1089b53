"""What the parts of this package tell each other: signatures as found, who may have made them, and what came of a check.

A :class:`Source` finds signatures and checks nothing; :class:`Signer` checks and finds nothing. A policy puts both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from ovms.lazy import dataclass
from ovms.oci.cosign import SIGN_PREDICATE
from ovms.spec.digest import Digest


class Format(StrEnum):
    """How a signature is kept beside what it signs (docs/signing)."""

    #: The tag ``sha256-<hex>.sig``.
    CLASSIC = "classic"
    #: The same layers, with a ``subject``: found through the referrers API.
    REFERRER = "referrer"
    #: A Sigstore bundle, a referrer too.
    BUNDLE = "bundle"


@dataclass(frozen=True)
class Found:
    """A signature as it was found: nothing in it is to be believed.

    *payload* is the simple signing document, or the whole bundle as JSON. *signature* is the base64 text of a simple
    signing's annotation, and empty for a bundle. *annotations* are those of its layer, *manifest* is the digest of the OCI
    manifest that holds it, and *layer* its number there.
    """

    format: Format
    manifest: Digest
    layer: int
    payload: bytes
    signature: str
    annotations: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"the {self.format.value} signature {self.manifest[:19]}…, layer {self.layer}"


@dataclass(frozen=True)
class Unreadable:
    """Something stands where a signature should, and is none. *detail* is one line, without control characters."""

    manifest: Digest
    detail: str


@dataclass(frozen=True)
class Good:
    """A signature that *signer* made over the subject. *signed_at* is known only where a trusted log or clock says it."""

    found: Found
    signer: str
    signed_at: datetime | None = None


@dataclass(frozen=True)
class Bad:
    """A signature that does not count for *signer*. *detail* says why in one line, without control characters."""

    found: Found
    signer: str
    detail: str


class Source(Protocol):
    """Where the signatures of an artifact are looked for: a repository in a registry, or the local store."""

    def signatures(self, subject: Digest, *, attested: bool = False) -> Sequence[Found | Unreadable]:
        """All signatures of *subject*, in every format, bounded in number and size. *attested*: signed statements of other
        kinds instead.

        Raises:
            RegistryError: and its kinds: as the registry met us.
        """
        ...


class Signer(Protocol):
    """Somebody who may sign: a key, or an identity that a certificate authority vouches for."""

    @property
    def name(self) -> str:
        """What messages call it, without control characters."""
        ...

    def check(self, found: Found, subject: Digest, predicate: str = SIGN_PREDICATE) -> Good | Bad:
        """Whether this signer signed exactly *subject*, or a statement about it whose *predicate* is of that type (see
        :func:`ovms.trust.payload.check_statement`). Never raises for what is in *found*.
        """
        ...
