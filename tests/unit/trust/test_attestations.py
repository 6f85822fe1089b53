"""Rules that ask for signed statements: provenance, SBOMs."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from support import policies
from support.policies import ACCEPT, REJECT, signed

from ovms.errors import InputError, PolicyRefused, SignatureInvalid, SignatureMissing, Untrusted
from ovms.spec.digest import of_bytes
from ovms.trust import judge, keys, payload, policy
from ovms.trust.keys import PrivateKey
from ovms.trust.model import Format, Found

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
KEYS: Final = {name: keys.generate() for name in ("a", "b", "c")}
STRANGER: Final = keys.generate()
SUBJECT: Final = of_bytes(b"the artifact")
SLSA: Final = "https://slsa.dev/provenance/v1"


def attested(key: PrivateKey, predicate: str = SLSA, subject: Any = SUBJECT) -> Found:
    document = {**json.loads(payload.statement(subject)), "predicateType": predicate, "predicate": {"x": 1}}
    return bundled(key, json.dumps(document).encode())


def bundled(key: PrivateKey, statement: bytes) -> Found:
    data = payload.bundle(key.public.hint, statement, key.sign(payload.pae(payload.IN_TOTO, statement)))
    return Found(Format.BUNDLE, of_bytes(data), 0, data, "")


def ask_for(
    rule: dict[str, Any], *statements: Found, signatures: Any = (), created: datetime | None = NOW
) -> judge.Verdict:
    read = policy.parse(json.dumps(policies.document(rule, KEYS)).encode(), "policy.json")
    case = judge.Case("x:1", SUBJECT, "registry.example/x", False, created)

    def evidence() -> judge.Evidence:
        return [(SUBJECT, one) for one in signatures]

    return judge.judge(read, judge.Signers(read), case, evidence, NOW, lambda: [(SUBJECT, one) for one in statements])


def needs(predicate: str = SLSA, **names: Any) -> dict[str, Any]:
    return {"predicateType": predicate, **(names or {"anyOf": ["a"]})}


A = bundled(KEYS["a"], payload.statement(SUBJECT))
PA, PB, PS = (attested(key) for key in (KEYS["a"], KEYS["b"], STRANGER))


@pytest.mark.parametrize(
    ("rule", "statements", "refused"),
    [
        ({**ACCEPT, "attestations": [needs()]}, [], SignatureMissing),
        ({**ACCEPT, "attestations": [needs()]}, [PA], None),
        ({**ACCEPT, "attestations": [needs()]}, [PS, PB, PA], None),
        ({**ACCEPT, "attestations": [needs()]}, [PB], SignatureInvalid),
        ({**ACCEPT, "attestations": [needs()]}, [attested(KEYS["a"], "https://example.org/x")], SignatureInvalid),
        ({**ACCEPT, "attestations": [needs()]}, [attested(KEYS["a"], SLSA + "1")], SignatureInvalid),
        ({**ACCEPT, "attestations": [needs()]}, [attested(KEYS["a"], SLSA, of_bytes(b"other"))], SignatureInvalid),
        # a signature says nothing of how it was made
        ({**ACCEPT, "attestations": [needs()]}, [A], SignatureInvalid),
        ({**ACCEPT, "attestations": [needs("https://slsa.dev/provenance/")]}, [PA], None),
        ({**ACCEPT, "attestations": [needs("https://slsa.dev/provenance")]}, [PA], SignatureInvalid),
        ({**ACCEPT, "attestations": [needs(allOf=["a", "b"])]}, [PA], SignatureMissing),
        ({**ACCEPT, "attestations": [needs(allOf=["a", "b"])]}, [PA, PB], None),
        ({**ACCEPT, "attestations": [needs(atLeast=2, of=["a", "b", "c"])]}, [PB, PA], None),
        ({**ACCEPT, "attestations": [needs(), needs("https://spdx.dev/Document")]}, [PA], SignatureInvalid),
        ({**ACCEPT, "attestations": [needs(), needs("https://spdx.dev/Document")]}, [PA, attested(KEYS["a"], "https://spdx.dev/Document")], None),
        ({**REJECT, "attestations": [needs()]}, [PA], PolicyRefused),
        ({**signed("a"), "attestations": [needs()]}, [PA], SignatureMissing),
    ],
)  # fmt: skip
def test_a_rule_may_ask_for_signed_statements(
    rule: Any, statements: list[Found], refused: type[Untrusted] | None
) -> None:
    verdict = ask_for(rule, *statements)
    assert (None if verdict.refusal is None else type(verdict.refusal)) is refused


def test_a_statement_is_no_signature() -> None:
    rule = {**signed("a"), "attestations": [needs()]}
    assert isinstance(ask_for(rule, PA, signatures=[PA]).refusal, SignatureInvalid)
    verdict = ask_for(rule, PA, signatures=[A])
    assert (verdict.allowed, verdict.signed) == (True, ("a",))


@pytest.mark.parametrize("kind", [Format.CLASSIC, Format.REFERRER])
def test_a_simple_signature_is_no_statement(kind: Format) -> None:
    data = payload.simple(SUBJECT, "registry.example/x")
    one = Found(kind, of_bytes(data), 0, data, base64.b64encode(KEYS["a"].sign(data)).decode())
    assert ask_for(signed("a"), signatures=[one]).allowed
    assert isinstance(ask_for({**ACCEPT, "attestations": [needs()]}, one).refusal, SignatureInvalid)


def test_a_refusal_says_which_statement_is_missing() -> None:
    verdict = ask_for({**ACCEPT, "attestations": [needs("https://spdx.dev/Document")]}, PA)
    assert verdict.refusal is not None
    assert "of the type https://spdx.dev/Document has to be there, signed by a (key " in verdict.refusal.message
    assert "slsa.dev" in verdict.refusal.message


def test_statements_age_too() -> None:
    rule = {**ACCEPT, "maxAge": "1d", "attestations": [needs()]}
    assert ask_for(rule, PA).allowed
    assert isinstance(ask_for(rule, PA, created=NOW - timedelta(days=2)).refusal, (PolicyRefused, SignatureInvalid))


@pytest.mark.parametrize(
    "one",
    [
        {},
        needs("provenance"),
        needs("https://sigstore.dev/cosign/sign/v1"),
        needs("https://x\n"),
        needs("https://" + "x" * 255),
        needs(anyOf=[]),
        needs(anyOf=["nobody"]),
        needs(anyOf=["a"], allOf=["a"]),
        needs(of=["a"]),
        {**needs(), "type": "signed"},
        "https://slsa.dev/provenance/v1",
    ],
    ids=range(11),
)
def test_an_attestation_that_is_none(one: Any) -> None:
    with pytest.raises(InputError, match=r"attestations\[0\]"):
        ask_for({**ACCEPT, "attestations": [one]})
