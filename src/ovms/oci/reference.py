"""Names of artifacts: ``[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]``.

A name whose first part holds a dot or a colon, or is ``localhost``, names a registry. Any other name is *local*: it
lives in the local store alone, until it is tagged with a registry's host. (Docker would make Docker Hub of it. A VM
that comes from a public registry by a typing error is not what we want.)
"""

from __future__ import annotations

import ipaddress
from typing import Final, Self

from ovms.errors import ReferenceInvalid
from ovms.lazy import dataclass, regex, replace
from ovms.spec import limits
from ovms.spec.digest import Digest, is_digest

DEFAULT_TAG: Final = "latest"

_HOST: Final = regex(
    r"(?:\[[0-9a-fA-F:]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
    r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*)(?::(?P<port>[0-9]{1,5}))?"
)
_REPOSITORY: Final = regex(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG: Final = regex(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{limits.TAG_MAX - 1}}}")


def _is_address(host: str) -> bool:
    # what stands in brackets; ipaddress also takes zones, which the grammar has sorted out
    if not host.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(host[1 : host.index("]")])
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Reference:
    """A checked name of an artifact.

    ``registry`` is ``host[:port]`` or None for a local name. At least one of ``tag`` and ``digest`` is set.
    """

    registry: str | None
    repository: str
    tag: str | None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a reference; a name with neither tag nor digest gets the tag ``latest``.

        Raises:
            ReferenceInvalid: not of the grammar; the message says which part.
        """
        shown = ascii(text[:120])
        hint = "write it as [HOST[:PORT]/]NAME[:TAG][@sha256:DIGEST], for example registry.example:5000/vms/web:1"
        if not text or len(text) > limits.REFERENCE_MAX:
            raise ReferenceInvalid(
                f"a reference has 1 to {limits.REFERENCE_MAX} characters, not {len(text)}", hint=hint, rule="REF-1"
            )
        rest, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise ReferenceInvalid(f"{shown}: what follows '@' is no sha256 digest", hint=hint, rule="REF-1")
        registry: str | None = None
        first, slash, remainder = rest.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            host = _HOST.fullmatch(first)
            if host is None or not _is_address(first) or not 1 <= int(host["port"] or 443) <= 65535:
                raise ReferenceInvalid(f"{shown}: {first!a} is no HOST[:PORT]", hint=hint, rule="REF-1")
            registry, rest = first, remainder
        repository, colon, tag = rest.partition(":")
        if not _REPOSITORY.fullmatch(repository):
            raise ReferenceInvalid(
                f"{shown}: {repository!a} is no repository name (lower case, digits, and . _ - / between them)",
                hint=hint,
                rule="REF-1",
            )
        if colon and not _TAG.fullmatch(tag):
            raise ReferenceInvalid(f"{shown}: {tag!a} is no tag", hint=hint, rule="REF-1")
        if not colon and not at:
            tag = DEFAULT_TAG
        return cls(registry, repository, tag or None, Digest(digest) if at else None)

    def __str__(self) -> str:
        text = self.name
        if self.tag is not None:
            text += f":{self.tag}"
        if self.digest is not None:
            text += f"@{self.digest}"
        return text

    @property
    def name(self) -> str:
        """The reference without tag and digest."""
        return self.repository if self.registry is None else f"{self.registry}/{self.repository}"

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest where there is one, else the tag."""
        target = self.digest or self.tag
        assert target is not None
        return target

    def with_digest(self, digest: Digest) -> Reference:
        """The same name, pinned to *digest*."""
        return replace(self, digest=digest)
