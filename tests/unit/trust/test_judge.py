"""Rule × signatures × RAM snapshot × age: what comes of it, and what is told."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from support import policies
from support.keyless import IDENTITY, ISSUER, SIGNED, Sigstore
from support.policies import ACCEPT, REJECT, signed

from ovms.errors import (
    HostError,
    PolicyRefused,
    SignatureInvalid,
    SignatureMissing,
    ToolMissing,
    Untrusted,
)
from ovms.spec.digest import of_bytes
from ovms.trust import judge, keys, payload, policy
from ovms.trust.keys import PrivateKey
from ovms.trust.model import Format, Found, Good, Unreadable

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
KEYS: Final = {name: keys.generate() for name in ("a", "b", "c")}
STRANGER: Final = keys.generate()
SUBJECT: Final = of_bytes(b"the artifact")
INDEX: Final = of_bytes(b"the index")


def found(key: PrivateKey, subject: Any = SUBJECT) -> Found:
    statement = payload.statement(subject)
    data = payload.bundle(key.public.hint, statement, key.sign(payload.pae(payload.IN_TOTO, statement)))
    return Found(Format.BUNDLE, of_bytes(data), 0, data, "")


def tampered(key: PrivateKey) -> Found:
    statement = payload.statement(SUBJECT)
    data = payload.bundle(key.public.hint, statement, key.sign(payload.pae(payload.IN_TOTO, statement + b" ")))
    return Found(Format.BUNDLE, of_bytes(data), 0, data, "")


def ask(
    rule: dict[str, Any],
    *evidence: Found | Unreadable,
    ram: bool = False,
    created: datetime | None = NOW,
    place: str = "registry.example/x",
    **more: Any,
) -> judge.Verdict:
    read = policy.parse(json.dumps(policies.document(rule, KEYS, **more)).encode(), "policy.json")
    case = judge.Case("x:1", SUBJECT, place, ram, created)
    return judge.judge(read, judge.Signers(read), case, lambda: [(SUBJECT, one) for one in evidence], NOW)


A, B, C, S = (found(key) for key in (*KEYS.values(), STRANGER))
OTHER = found(KEYS["a"], of_bytes(b"another artifact"))
BAD = tampered(KEYS["a"])
JUNK = Unreadable(INDEX, "its layer is no bundle")
ALL_OF = {"type": "signed", "allOf": ["a", "b"]}


@pytest.mark.parametrize(
    ("rule", "evidence", "refused"),
    [
        (ACCEPT, [], None),
        (ACCEPT, [S], None),
        (REJECT, [A], PolicyRefused),
        (signed("a"), [], SignatureMissing),
        (signed("a"), [A], None),
        (signed("a"), [S], SignatureInvalid),
        (signed("a"), [S, JUNK, BAD, A], None),
        (signed("a"), [OTHER], SignatureInvalid),
        (signed("a"), [BAD], SignatureInvalid),
        (signed("a"), [JUNK], SignatureInvalid),
        (signed("a", "b"), [B], None),
        (signed("a", "b"), [C], SignatureInvalid),
        (ALL_OF, [A], SignatureMissing),
        (ALL_OF, [A, A, A], SignatureMissing),
        (ALL_OF, [A, B], None),
        (signed("a", "b", "c", of=2), [A, S], SignatureMissing),
        (signed("a", "b", "c", of=2), [C, S, A], None),
        (signed("a", "b", "c", of=3), [C, A], SignatureMissing),
    ],
)
@pytest.mark.parametrize("ram", [False, True])
def test_what_a_rule_makes_of_signatures(
    rule: Any, evidence: list[Any], refused: type[Untrusted] | None, ram: bool
) -> None:
    verdict = ask(rule, *evidence, ram=ram)
    assert (None if verdict.refusal is None else type(verdict.refusal)) is refused


@pytest.mark.parametrize(
    ("rule", "evidence", "cold", "warm"),
    [
        ({**ACCEPT, "ramSnapshots": signed("a")}, [], None, SignatureMissing),
        ({**ACCEPT, "ramSnapshots": signed("a")}, [S], None, SignatureInvalid),
        ({**ACCEPT, "ramSnapshots": signed("a")}, [A], None, None),
        ({**ACCEPT, "ramSnapshots": REJECT}, [A], None, PolicyRefused),
        ({**signed("a"), "ramSnapshots": signed("b")}, [A], None, SignatureMissing),
        ({**signed("a"), "ramSnapshots": signed("b")}, [B], SignatureInvalid, SignatureInvalid),
        ({**signed("a"), "ramSnapshots": signed("b")}, [A, B], None, None),
        ({**REJECT, "ramSnapshots": ACCEPT}, [A], PolicyRefused, PolicyRefused),
    ],
)
def test_ram_snapshots_may_need_more(rule: Any, evidence: list[Any], cold: Any, warm: Any) -> None:
    for ram, expected in ((False, cold), (True, warm)):
        refusal = ask(rule, *evidence, ram=ram).refusal
        if expected is None:
            assert refusal is None
        elif ram and rule.get("ramSnapshots") == signed("b") and evidence == [A]:
            assert isinstance(refusal, (SignatureMissing, SignatureInvalid))
        else:
            assert type(refusal) is expected


@pytest.mark.parametrize("rule", [{**ACCEPT, "maxAge": "2d"}, {**signed("a"), "maxAge": "2d"}])
@pytest.mark.parametrize(
    ("created", "allowed"),
    [
        (NOW, True),
        (NOW - timedelta(days=2), True),
        (NOW - timedelta(days=2, seconds=1), False),
        (NOW + timedelta(minutes=4), True),
        (NOW + timedelta(hours=1), False),
        (None, False),
    ],
)
def test_what_is_too_old(rule: Any, created: datetime | None, allowed: bool) -> None:
    assert ask(rule, A, created=created).allowed is allowed


def test_a_refusal_says_which_rule_which_key_and_what_was_found() -> None:
    refusal = ask(signed("a", "b"), S, JUNK, scopes={"registry.example": signed("a", "b")}).refusal
    assert refusal is not None
    text = refusal.message
    assert "x:1 is refused by the rule for registry.example in policy.json" in text
    for name in ("a", "b"):
        assert f"{name} (key {KEYS[name].public.fingerprint[:16]})" in text
    assert str(S) in text
    assert "made with another key" in text
    assert "its layer is no bundle" in text
    assert refusal.context["digest"] == SUBJECT
    assert refusal.context["scope"] == "registry.example"
    assert "only a has signed it" in str(ask(ALL_OF, A).refusal)
    assert "there is no signature" in str(ask(signed("a")).refusal)


def test_a_registry_that_is_not_allowed() -> None:
    refused = ask(ACCEPT, registries=["other.example"])
    assert type(refused.refusal) is PolicyRefused
    assert "is none of the allowed registries (other.example)" in str(refused.refusal)
    assert ask(ACCEPT, registries=["other.example"], place="local").allowed


def test_one_key_does_not_count_twice() -> None:
    pem = KEYS["a"].public.pem.decode()
    value = {"version": 1, "signers": {"x": {"key": pem}, "y": {"key": pem}}, "default": signed("x", "y", of=2)}
    read = policy.parse(json.dumps(value).encode(), "policy.json")
    case = judge.Case("x:1", SUBJECT, "", False, None)
    with pytest.raises(HostError, match="x and y are the same key"):
        judge.judge(read, judge.Signers(read), case, lambda: [(SUBJECT, A)], NOW)


def test_keys_in_files_beside_the_policy(tmp_path: Path) -> None:
    value = {"version": 1, "signers": {"a": {"keyPath": "keys/a.pub"}}, "default": signed("a")}
    read = policy.parse(json.dumps(value).encode(), str(tmp_path / "policy.json"))
    case = judge.Case("x:1", SUBJECT, "", False, None)
    with pytest.raises(HostError, match="the key of a"):
        judge.judge(read, judge.Signers(read), case, lambda: [(SUBJECT, A)], NOW)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/a.pub").write_bytes(KEYS["a"].public.pem)
    assert judge.judge(read, judge.Signers(read), case, lambda: [(SUBJECT, A)], NOW).allowed


def test_nobody_is_asked_for_signatures_that_no_rule_wants() -> None:
    read = policy.parse(json.dumps(policies.document(ACCEPT)).encode(), "policy.json")

    def evidence() -> judge.Evidence:
        raise AssertionError

    case = judge.Case("x:1", SUBJECT, "", False, None)
    assert judge.judge(read, judge.Signers(read), case, evidence, NOW).allowed


def by_identity(path: Path, *others: str) -> tuple[policy.Policy, judge.Signers]:
    """A policy of the identity that :data:`SIGSTORE` vouches for, and of *others*."""
    SIGSTORE.write_root(path / "root.json")
    common = {"issuer": ISSUER, "trustRoot": "root.json"}
    signers = {f"s{i}": {"identity": name, **common} for i, name in enumerate([IDENTITY, *others])}
    value = {"version": 1, "signers": signers, "default": {"type": "signed", "allOf": list(signers)}}
    read = policy.parse(json.dumps(value).encode(), str(path / "policy.json"))
    return read, judge.Signers(read)


SIGSTORE: Final = Sigstore()
KEYLESS: Final = Found(Format.BUNDLE, INDEX, 0, json.dumps(SIGSTORE.bundle(SUBJECT)).encode(), "")


def test_identities(tmp_path: Path) -> None:
    case = judge.Case("x:1", SUBJECT, "", False, None)
    now = datetime.now(UTC)
    assert judge.judge(*by_identity(tmp_path), case, lambda: [(SUBJECT, KEYLESS)], now).signed == ("s0",)
    refused = judge.judge(*by_identity(tmp_path), case, lambda: [(INDEX, KEYLESS)], now).refusal
    assert type(refused) is SignatureInvalid
    assert repr(IDENTITY) in refused.message
    refused = judge.judge(*by_identity(tmp_path, "else@example.com"), case, lambda: [(SUBJECT, KEYLESS)], now).refusal
    assert type(refused) is SignatureMissing
    # its time is known
    read, signers = by_identity(tmp_path)
    aged = policy.parse(json.dumps({**_document(read), "default": {**_rule(), "maxAge": "1h"}}).encode(), read.where)
    soon, later = SIGNED + timedelta(minutes=59), SIGNED + timedelta(hours=2)
    assert judge.judge(aged, judge.Signers(aged), case, lambda: [(SUBJECT, KEYLESS)], soon).allowed
    assert not judge.judge(aged, judge.Signers(aged), case, lambda: [(SUBJECT, KEYLESS)], later).allowed
    with pytest.raises(HostError, match="s0 and s1 are the same identity"):
        judge.judge(*by_identity(tmp_path, IDENTITY), case, lambda: [(SUBJECT, KEYLESS)], now)
    assert signers.get(["s0"])


def _rule() -> dict[str, Any]:
    return {"type": "signed", "anyOf": ["s0"]}


def _document(read: policy.Policy) -> dict[str, Any]:
    spec = read.signers["s0"]
    signer = {"identity": spec.identity, "issuer": spec.issuer, "trustRoot": spec.trust_root}
    return {"version": 1, "signers": {"s0": signer}}


def test_without_the_package_that_checks_identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_identity(tmp_path)
    monkeypatch.setitem(sys.modules, "sigstore.errors", None)
    case = judge.Case("x:1", SUBJECT, "", False, None)
    with pytest.raises(ToolMissing, match="sigstore"):
        judge.judge(*found, case, lambda: [(SUBJECT, KEYLESS)], NOW)


class Anybody:
    """A signer who takes every signature for theirs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, found: Found, _subject: Any, predicate: str = "") -> Good:
        return Good(found, self.name)


def test_one_signature_counts_for_one_signer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.Signers, "get", lambda _, names: [Anybody(name) for name in names])
    assert type(ask(signed("a", "b", of=2), S).refusal) is SignatureMissing
