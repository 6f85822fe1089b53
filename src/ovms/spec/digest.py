"""Content digests: ``sha256:`` and 64 hexadecimal digits in lower case, and nothing else."""

from __future__ import annotations

import hashlib
from typing import Final, NewType

from ovms.errors import ReferenceInvalid
from ovms.lazy import regex

#: A checked digest, ``sha256:<64 hex>``.
Digest = NewType("Digest", str)

_PATTERN: Final = regex(r"sha256:[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether *text* is a digest that we take."""
    return _PATTERN.fullmatch(text) is not None


def parse_digest(text: str) -> Digest:
    """A digest from a stranger's text.

    Raises:
        ReferenceInvalid: another form, or another algorithm than SHA-256.
    """
    if not is_digest(text):
        raise ReferenceInvalid(
            f"{text[:80]!r} is no digest: 'sha256:' and 64 hexadecimal digits are needed", rule="DOC-9"
        )
    return Digest(text)


def of_bytes(data: bytes | memoryview) -> Digest:
    """The digest of *data*."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def from_hasher(hasher: hashlib._Hash) -> Digest:
    """The digest that a SHA-256 hasher has arrived at."""
    return Digest("sha256:" + hasher.hexdigest())


def hex_of(digest: Digest) -> str:
    """The 64 hexadecimal digits: the file name in an OCI image layout."""
    return digest.removeprefix("sha256:")
