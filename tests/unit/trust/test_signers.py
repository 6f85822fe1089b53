"""What counts as a signature: exactly that which was made by the key over the digest, in the form that Cosign writes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.oci import cosign
from ovms.spec.digest import Digest, of_bytes
from ovms.trust import keys, payload
from ovms.trust.model import Bad, Format, Found, Good
from ovms.trust.signers import KeySigner

KEY = keys.generate()
OTHER = keys.generate()
SUBJECT = of_bytes(b"the artifact")
ANOTHER = of_bytes(b"another")
SIGNER = KeySigner("us", KEY.public)
MANIFEST = of_bytes(b"m")


def simple(data: bytes, key: keys.PrivateKey = KEY) -> Found:
    return Found(Format.CLASSIC, MANIFEST, 0, data, base64.b64encode(key.sign(data)).decode())


def bundle(
    statement: bytes, key: keys.PrivateKey = KEY, *, hint: str | None = None, kind: str = payload.IN_TOTO
) -> dict[str, Any]:
    made = payload.bundle(
        hint if hint is not None else key.public.hint, statement, key.sign(payload.pae(kind, statement))
    )
    document: dict[str, Any] = json.loads(made)
    document["dsseEnvelope"]["payloadType"] = kind
    return document


def found(document: Any) -> Found:
    return Found(Format.BUNDLE, MANIFEST, 0, json.dumps(document).encode(), "")


def why(one: Found, subject: Digest = SUBJECT, signer: KeySigner = SIGNER) -> str:
    result = signer.check(one, subject)
    assert isinstance(result, Bad)
    assert result.detail.isprintable()
    return result.detail


def test_good_ones() -> None:
    one = simple(payload.simple(SUBJECT, "r/x"))
    assert SIGNER.check(one, SUBJECT) == Good(one, "us")
    one = found(bundle(payload.statement(SUBJECT)))
    assert SIGNER.check(one, SUBJECT) == Good(one, "us")
    one = found(bundle(payload.statement(SUBJECT), hint=""))
    assert isinstance(SIGNER.check(one, SUBJECT), Good)


def test_another_key() -> None:
    assert "not made with this key" in why(simple(payload.simple(SUBJECT, "r/x"), OTHER))
    assert "made with another key" in why(found(bundle(payload.statement(SUBJECT), OTHER)))
    # who lies about the key has not its signature
    assert "not made with this key" in why(found(bundle(payload.statement(SUBJECT), OTHER, hint=KEY.public.hint)))


def test_another_subject() -> None:
    assert "over another digest" in why(simple(payload.simple(ANOTHER, "r/x")))
    assert "over another digest" in why(found(bundle(payload.statement(ANOTHER))))


def _changed(**changes: Any) -> dict[str, Any]:
    return {**json.loads(payload.statement(SUBJECT)), **changes}


@pytest.mark.parametrize(
    ("statement", "detail"),
    [
        (_changed(_type="https://example/Statement"), "not an in-toto statement"),
        (_changed(predicateType="https://slsa.dev/provenance/v1"), "no signature of an artifact"),
        (_changed(predicateType=None), "no signature of an artifact"),
        (_changed(subject=[]), "no subject"),
        (_changed(subject={}), "no subject"),
        (_changed(subject=[{}]), "no digest"),
        (_changed(subject=["x"]), "no digest"),
        (_changed(subject=_changed()["subject"] * 2), "several subjects"),
        (_changed(subject=[{"digest": {"sha512": "ab"}}]), "over another digest"),
        (_changed(subject=[{"digest": {"sha256": ["ab"]}}]), "over another digest"),
        ([], "no JSON object"),
    ],
)
def test_a_signed_statement_of_another_kind(statement: Any, detail: str) -> None:
    assert detail in why(found(bundle(json.dumps(statement).encode())))


def _with(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = bundle(payload.statement(SUBJECT))
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda d: d.update(mediaType="application/vnd.dev.sigstore.bundle.v0.2+json"), "of the type"),
        (lambda d: d.pop("mediaType"), "of the type"),
        (lambda d: d.pop("verificationMaterial"), "no verificationMaterial"),
        (lambda d: d.update(verificationMaterial={}), "one key or one certificate"),
        (lambda d: d["verificationMaterial"].update(certificate={}), "one key or one certificate"),
        (lambda d: d.update(verificationMaterial={"certificate": {"rawBytes": ""}}), "made with a certificate"),
        (lambda d: d["verificationMaterial"]["publicKey"].update(hint=7), "no string"),
        (lambda d: d.update(messageSignature={}), "over a file"),
        (lambda d: d.pop("dsseEnvelope"), "no dsseEnvelope"),
        (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), "payload is of the type"),
        (lambda d: d["dsseEnvelope"].pop("payload"), "payload is missing"),
        (lambda d: d["dsseEnvelope"].update(payload="%%"), "not base64"),
        (lambda d: d["dsseEnvelope"].update(payload="ä"), "not base64"),
        (lambda d: d["dsseEnvelope"].update(signatures=[]), "exactly one signature"),
        (lambda d: d["dsseEnvelope"].update(signatures=d["dsseEnvelope"]["signatures"] * 2), "exactly one signature"),
        (lambda d: d["dsseEnvelope"].update(signatures=["x"]), "exactly one signature"),
        (lambda d: d["dsseEnvelope"].update(signatures=[{}]), "signature is missing"),
        (lambda d: d["dsseEnvelope"].update(signatures=[{"sig": "A" * 3000}]), "3000 characters"),
        (lambda d: d["dsseEnvelope"].update(signatures=[{"sig": ""}]), "not made with this key"),
    ],
)
def test_a_bundle_that_is_none(change: Callable[[dict[str, Any]], object], detail: str) -> None:
    assert detail in why(found(_with(change)))


def test_the_payload_type_is_signed_too() -> None:
    document = bundle(payload.statement(SUBJECT), kind="text/plain")
    document["dsseEnvelope"]["payloadType"] = payload.IN_TOTO
    assert "not made with this key" in why(found(document))


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (payload.simple(SUBJECT, "x").replace(b"cosign container", b"atomic container"), "its type is"),
        (payload.simple(SUBJECT, "x").replace(b'"critical":', b'"critical":{},"critical":'), "twice"),
        (b"[" * 100, "deeper"),
        (b"[]", "no JSON object"),
        (b'{"critical": 7}', "no critical"),
        (b'{"critical": {"type": "cosign container image signature"}}', "no image"),
        (b'{"critical": {"type": "\x1b[31m"}}', "not JSON"),
        (b"\xff", "not UTF-8"),
        (b" " * 70_000, "70000 bytes"),
    ],
)
def test_a_signed_document_that_is_none(data: bytes, detail: str) -> None:
    assert detail in why(simple(data))


def test_a_changed_document_or_signature() -> None:
    one = simple(payload.simple(SUBJECT, "r/x"))
    assert "was changed" in why(Found(one.format, MANIFEST, 0, one.payload.replace(b"r/x", b"r/y"), one.signature))
    for text in ("", "%%%", "ä", "A" * 5000, one.signature[:-8]):
        assert why(Found(one.format, MANIFEST, 0, one.payload, text))


@given(st.binary(max_size=200), st.text(max_size=40), st.sampled_from(Format))
def test_nothing_makes_it_raise(data: bytes, signature: str, kind: Format) -> None:
    result = SIGNER.check(Found(kind, MANIFEST, 0, data, signature), SUBJECT)
    assert isinstance(result, Bad)
    assert result.detail.isprintable()


def _changed_byte(data: bytes, where: int, by: int) -> bytes:
    at = where % len(data)
    return data[:at] + bytes([data[at] ^ by]) + data[at + 1 :]


@given(st.integers(0, 2**16), st.integers(1, 255))
def test_no_changed_byte_of_what_is_signed_counts(where: int, by: int) -> None:
    document = payload.simple(SUBJECT, "registry.example/vms/web")
    signature = base64.b64encode(KEY.sign(document)).decode()
    why(Found(Format.CLASSIC, MANIFEST, 0, _changed_byte(document, where, by), signature))
    made: Any = bundle(payload.statement(SUBJECT))
    statement = _changed_byte(payload.statement(SUBJECT), where, by)
    made["dsseEnvelope"]["payload"] = base64.b64encode(statement).decode()
    why(found(made))


@given(st.integers(0, 2**16), st.integers(1, 255))
def test_no_changed_byte_of_a_bundle_makes_it_another(where: int, by: int) -> None:
    """It is the same signature over the same statement, or none."""
    one = found(bundle(payload.statement(SUBJECT)))
    changed = Found(one.format, MANIFEST, 0, _changed_byte(one.payload, where, by), "")
    if isinstance(SIGNER.check(changed, SUBJECT), Good):
        assert payload.read_bundle(changed.payload).payload == payload.statement(SUBJECT)
    else:
        why(changed)
    why(changed, ANOTHER)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from([cosign.BUNDLE_TYPE, payload.IN_TOTO]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PLACES = (
    (),
    ("mediaType",),
    ("verificationMaterial",),
    ("verificationMaterial", "publicKey"),
    ("verificationMaterial", "publicKey", "hint"),
    ("dsseEnvelope",),
    ("dsseEnvelope", "payload"),
    ("dsseEnvelope", "payloadType"),
    ("dsseEnvelope", "signatures"),
)


@given(st.sampled_from(PLACES), JSON)
def test_nothing_in_a_bundle_makes_it_raise(place: tuple[str, ...], value: Any) -> None:
    document: Any = bundle(payload.statement(SUBJECT))
    if not place:
        document = value
    else:
        inner = document
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
    result = SIGNER.check(found(document), SUBJECT)
    good = place == ("verificationMaterial", "publicKey", "hint") and value == ""
    good = good or (place == ("dsseEnvelope", "payloadType") and value == payload.IN_TOTO)
    good = good or (place == ("mediaType",) and value == cosign.BUNDLE_TYPE)
    good = good or (place == ("verificationMaterial", "publicKey") and value in ({}, {"hint": ""}))
    good = good or (
        place == ("verificationMaterial", "publicKey") and isinstance(value, dict) and not value.get("hint", "")
    )
    assert isinstance(result, Good) is good or isinstance(result, Bad)
