"""Verdicts: one good signature is enough, no number of bad ones is, and each signer counts once."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import SignatureInvalid, SignatureMissing
from ovms.lazy import dataclass
from ovms.spec.digest import Digest, of_bytes
from ovms.trust import verifying
from ovms.trust.model import Bad, Format, Found, Good, Unreadable

SUBJECT = of_bytes(b"the artifact")
MANIFEST = of_bytes(b"m")


@dataclass(frozen=True)
class Named:
    """Signs what has its name as the payload."""

    name: str
    at: datetime | None = None

    def check(self, found: Found, subject: Digest) -> Good | Bad:
        assert subject == SUBJECT
        if found.payload == self.name.encode():
            return Good(found, self.name, self.at)
        return Bad(found, self.name, "it was made with another key")


def by(name: str) -> Found:
    return Found(Format.BUNDLE, MANIFEST, 0, name.encode(), "")


STRANGE = Unreadable(MANIFEST, "it has no layers")
ALICE, BOB = Named("alice"), Named("bob")


def test_one_good_one_beside_rubbish() -> None:
    verdict = verifying.check([by("eve"), STRANGE, by("alice")], SUBJECT, [ALICE, BOB])
    assert (verdict.by, verdict.without) == (("alice",), ("bob",))
    assert [one.found for one in verdict.good] == [by("alice")]
    verifying.require(verdict, 1, "web")
    # each of the others is told of once, whatever the number of signers
    assert len(verdict.details()) == 2
    with pytest.raises(SignatureInvalid, match=r"no good signature by bob, and all of 2 are needed: .*another key"):
        verifying.require(verdict, 2, "web")


def test_nothing_there_is_another_error_than_nothing_good() -> None:
    with pytest.raises(SignatureMissing, match="web has no signature"):
        verifying.require(verifying.check([], SUBJECT, [ALICE]), 1, "web")
    with pytest.raises(SignatureInvalid, match="no layers"):
        verifying.require(verifying.check([STRANGE], SUBJECT, [ALICE]), 1, "web")
    with pytest.raises(SignatureInvalid, match="another key"):
        verifying.require(verifying.check([by("eve")], SUBJECT, [ALICE]), 1, "web")


def test_a_signer_counts_once() -> None:
    verdict = verifying.check([by("alice")] * 5, SUBJECT, [ALICE, BOB])
    assert verdict.by == ("alice",)
    with pytest.raises(SignatureInvalid):
        verifying.require(verdict, 2, "web")


def test_two_of_three() -> None:
    three = [ALICE, BOB, Named("carol")]
    verifying.require(verifying.check([by("alice"), by("carol")], SUBJECT, three), 2, "web")
    with pytest.raises(SignatureInvalid, match="by alice, bob, and 2 of 3 are needed"):
        verifying.require(verifying.check([by("carol")], SUBJECT, three), 2, "web")


def test_much_rubbish_makes_no_long_message() -> None:
    verdict = verifying.check([Unreadable(MANIFEST, f"bad {i}") for i in range(200)], SUBJECT, [ALICE])
    with pytest.raises(SignatureInvalid, match="and 196 more") as caught:
        verifying.require(verdict, 1, "web")
    assert len(caught.value.message) < 600


def test_as_json() -> None:
    then = datetime(2026, 1, 1, tzinfo=UTC)
    value = verifying.check([by("alice"), by("eve"), STRANGE], SUBJECT, [Named("alice", then)]).to_json()
    good = {"format": "bundle", "manifest": MANIFEST, "layer": 0, "signer": "alice", "good": True}
    assert value == {
        "digest": SUBJECT,
        "signers": ["alice"],
        "signatures": [
            {**good, "signed_at": "2026-01-01T00:00:00+00:00"},
            {**good, "good": False, "detail": "it was made with another key"},
            {"manifest": MANIFEST, "good": False, "detail": "it has no layers"},
        ],
    }


NAMES = st.sampled_from(["alice", "bob", "carol", "eve", "?"])


@given(st.lists(NAMES, max_size=12), st.sets(st.sampled_from(["alice", "bob", "carol"]), min_size=1), st.data())
def test_it_is_the_number_of_different_signers(found: list[str], asked: set[str], data: st.DataObject) -> None:
    signers = [Named(name) for name in sorted(asked)]
    needed = data.draw(st.integers(1, len(signers)))
    verdict = verifying.check([STRANGE if name == "?" else by(name) for name in found], SUBJECT, signers)
    enough = len(asked & set(found)) >= needed
    if enough:
        verifying.require(verdict, needed, "web")
        return
    with pytest.raises(SignatureInvalid if found else SignatureMissing):
        verifying.require(verdict, needed, "web")
