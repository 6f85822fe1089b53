"""Digests: one form, one algorithm."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import ReferenceInvalid
from ovms.spec import digest

EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_known_values() -> None:
    assert digest.of_bytes(b"") == EMPTY
    assert digest.from_hasher(hashlib.sha256()) == EMPTY
    assert digest.parse_digest(EMPTY) == EMPTY
    assert digest.hex_of(digest.of_bytes(b"")) == EMPTY[7:]


@given(st.binary())
def test_both_ways_agree(data: bytes) -> None:
    assert digest.is_digest(digest.of_bytes(data))
    assert digest.of_bytes(memoryview(data)) == digest.from_hasher(hashlib.sha256(data))


@pytest.mark.spec("DOC-9")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        EMPTY[:-1],
        EMPTY + "0",
        EMPTY + "\n",
        EMPTY.upper(),
        "sha256:" + EMPTY[7:].upper(),
        "SHA256:" + EMPTY[7:],
        "sha512:" + "0" * 128,
        "sha256:" + "g" * 64,
        "sha256:" + "\u0661" * 64,
        "sha256:../../etc/passwd",
        EMPTY[7:],
        "x" * 100_000,
    ],
)
def test_refused(text: str) -> None:
    assert not digest.is_digest(text)
    with pytest.raises(ReferenceInvalid) as info:
        digest.parse_digest(text)
    assert len(info.value.message) < 300
