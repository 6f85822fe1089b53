"""What a signature says: simple signing documents, and Sigstore bundles around a DSSE envelope.

Readers are strict and bounded: one key twice, a number out of place, or a second signature is no signature at all. They raise
:class:`Malformed` and nothing else, whatever they are given.

Sources: cosign 3.1 (``specs/SIGNATURE_SPEC.md``), Sigstore's ``bundle.proto`` v0.3, DSSE v1, in-toto Statement v1.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Final

from ovms.errors import JsonInvalid
from ovms.lazy import dataclass, regex
from ovms.oci.cosign import BUNDLE_TYPE, SIGN_PREDICATE
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of
from ovms.text import printable

#: Bytes of a simple signing document, and of a bundle.
PAYLOAD_MAX: Final = 64 * limits.KIB
BUNDLE_MAX: Final = 512 * limits.KIB
_DEPTH_MAX: Final = 16
_SIGNATURE_TEXT_MAX: Final = 2048
SIMPLE_TYPE: Final = "cosign container image signature"
IN_TOTO: Final = mediatypes.IN_TOTO
# tuples: a list is not hashable, and may stand where a string belongs
_BUNDLE_TYPES: Final = (BUNDLE_TYPE, "application/vnd.dev.sigstore.bundle+json;version=0.3")
_HEX: Final = regex(r"[0-9a-f]{64}")


class Malformed(Exception):
    """Why something is no signature, in one line without control characters."""


@dataclass(frozen=True)
class Envelope:
    """What a bundle holds: the hint of a key (None where a certificate stands for it), and a DSSE envelope."""

    hint: str | None
    payload_type: str
    payload: bytes
    signature: bytes

    @property
    def signed(self) -> bytes:
        """What the signature is over: DSSE's pre-authentication encoding."""
        return pae(self.payload_type, self.payload)


def shown(value: object) -> str:
    """A stranger's value in a message: short, without control characters."""
    return ascii(value)[:80]


def pae(payload_type: str, payload: bytes) -> bytes:
    """``DSSEv1 LEN(type) type LEN(payload) payload``."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


# --- simple signing --------------------------------------------------------------------------------------------------


def simple(subject: Digest, docker_reference: str) -> bytes:
    """The simple signing document for *subject*, as Cosign writes it."""
    document = {
        "critical": {
            "identity": {"docker-reference": docker_reference},
            "image": {"docker-manifest-digest": subject},
            "type": SIMPLE_TYPE,
        },
        "optional": None,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def check_simple(data: bytes, subject: Digest) -> None:
    """Whether a simple signing document speaks of *subject*, and of nothing else. Raises :class:`Malformed`."""
    critical = _object(_parse(data, "the payload", PAYLOAD_MAX), "critical", "the payload")
    kind = critical.get("type")
    if kind != SIMPLE_TYPE:
        raise Malformed(f"its type is {shown(kind)}, not {SIMPLE_TYPE!r}")
    digest = _object(critical, "image", "critical").get("docker-manifest-digest")
    if digest != subject:
        raise Malformed(f"it is over another digest, {shown(digest)}")


def decode(text: str, what: str) -> bytes:
    """A signature from its base64 text. Raises :class:`Malformed`."""
    if len(text) > _SIGNATURE_TEXT_MAX:
        raise Malformed(f"{what} has {len(text)} characters, more than any signature")
    return _base64(text, what)


# --- bundles ---------------------------------------------------------------------------------------------------------


def statement(subject: Digest) -> bytes:
    """The in-toto statement that a signature over *subject* is made of."""
    document = {
        "_type": mediatypes.STATEMENT,
        "subject": [{"digest": {"sha256": hex_of(subject)}}],
        "predicateType": SIGN_PREDICATE,
        "predicate": {},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def bundle(hint: str, payload: bytes, signature: bytes) -> bytes:
    """A bundle around the *signature* of a key over the statement *payload*."""
    document = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": IN_TOTO,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def read_bundle(data: bytes) -> Envelope:
    """What a Sigstore bundle holds. What it names besides (log entries, timestamps) is not looked at.

    Raises:
        Malformed: it is no bundle of the version 0.3 with one DSSE envelope of one signature.
    """
    document = _parse(data, "the bundle", BUNDLE_MAX)
    kind = document.get("mediaType")
    if kind not in _BUNDLE_TYPES:
        raise Malformed(f"it is a bundle of the type {shown(kind)}; {BUNDLE_TYPE} is read")
    material = _object(document, "verificationMaterial", "the bundle")
    kinds = [name for name in ("publicKey", "certificate", "x509CertificateChain") if name in material]
    if len(kinds) != 1:
        raise Malformed("it does not name one key or one certificate")
    hint = None
    if kinds == ["publicKey"]:
        hint = _object(material, "publicKey", "verificationMaterial").get("hint", "")
        if not isinstance(hint, str):
            raise Malformed("the hint of its key is no string")
    if "messageSignature" in document:
        raise Malformed("it holds a signature over a file, not over an artifact")
    envelope = _object(document, "dsseEnvelope", "the bundle")
    payload_type, payload, signatures = (envelope.get(key) for key in ("payloadType", "payload", "signatures"))
    if payload_type != IN_TOTO:
        raise Malformed(f"its payload is of the type {shown(payload_type)}, not {IN_TOTO}")
    if not isinstance(payload, str):
        raise Malformed("its payload is missing")
    if not isinstance(signatures, list) or len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise Malformed("it does not hold exactly one signature")
    text = signatures[0].get("sig")
    if not isinstance(text, str):
        raise Malformed("its signature is missing")
    return Envelope(hint, payload_type, _base64(payload, "the payload"), decode(text, "the signature"))


def check_statement(data: bytes, subject: Digest, wanted: str = SIGN_PREDICATE) -> None:
    """Whether a statement is a signature over *subject*, and over nothing else. Raises :class:`Malformed`.

    *wanted* is the type of its predicate, where it is to say something else of *subject*; one that ends with ``/`` is the
    beginning of it.
    """
    document = _parse(data, "the statement", BUNDLE_MAX)
    kind, predicate, subjects = (document.get(key) for key in ("_type", "predicateType", "subject"))
    if kind not in mediatypes.STATEMENTS:
        raise Malformed(f"its payload is a {shown(kind)}, not an in-toto statement")
    if not isinstance(predicate, str) or not (
        predicate == wanted or (wanted.endswith("/") and predicate.startswith(wanted))
    ):
        what = "no signature of an artifact" if wanted == SIGN_PREDICATE else f"none of {shown(wanted)}"
        raise Malformed(f"its predicate is of the type {shown(predicate)}: it is {what}")
    if not isinstance(subjects, list) or not subjects:
        raise Malformed("its statement has no subject")
    if len(subjects) != 1:
        raise Malformed("its statement has several subjects")
    digest = _object(subjects[0] if isinstance(subjects[0], dict) else {}, "digest", "the subject").get("sha256")
    if not isinstance(digest, str) or not _HEX.fullmatch(digest) or digest != hex_of(subject):
        raise Malformed(f"it is over another digest, {shown(digest)}")


# --- common ----------------------------------------------------------------------------------------------------------


def _parse(data: bytes, what: str, max_size: int) -> dict[str, Any]:
    try:
        value = strictjson.parse(data, what, max_size=max_size, max_depth=_DEPTH_MAX)
    except JsonInvalid as exc:
        raise Malformed(printable(exc.message, 200)) from None
    if not isinstance(value, dict):
        raise Malformed(f"{what} is no JSON object")
    return value


def _object(value: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise Malformed(f"{what} has no {key}")
    return found


def _base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise Malformed(f"{what} is not base64") from None
