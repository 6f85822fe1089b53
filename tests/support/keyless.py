"""A Sigstore of the tests' own: an authority, a log of certificates, a log of signatures, a clock, and what trusts them.

Whatever they make is real: certificates as Fulcio issues them, with an embedded SCT (RFC 6962), log entries as Rekor has them,
with an inclusion proof, a signed checkpoint and a signed time, and timestamps of openssl's (RFC 3161). Nothing is online.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from ovms.oci import cosign
from ovms.spec.digest import Digest
from ovms.trust import payload

IDENTITY = "releases@ovms.example"
ISSUER = "https://accounts.ovms.example"
#: When things are signed, where a test does not say.
SIGNED = datetime(2025, 6, 1, 12, 0, tzinfo=UTC)
START = datetime(2025, 1, 1, tzinfo=UTC)
END = datetime(2035, 1, 1, tzinfo=UTC)
ROOT_TYPE = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
_ISSUER_V1 = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_V2 = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def rfc3339(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _usage(*, sign: bool = False, ca: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(sign, False, False, False, False, ca, ca, False, False)


def _authority(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ovms.example"),
                      x509.NameAttribute(NameOID.COMMON_NAME, name)])  # fmt: skip


@dataclass
class CertificateLog:
    """Signs that it saw a certificate."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def seen(self, tbs: bytes, issuer: bytes, at: datetime) -> bytes:
        """The value of the SCT list's extension for a certificate's signed part without it."""
        milliseconds = int(at.timestamp() * 1000)
        # RFC 6962, section 3.2: a certificate timestamp (0) of a precertificate (1)
        entry = hashlib.sha256(issuer).digest() + len(tbs).to_bytes(3, "big") + tbs
        signature = sign(self.key, struct.pack(">BBQH", 0, 0, milliseconds, 1) + entry + b"\0\0")
        log = hashlib.sha256(spki(self.key)).digest()
        # SHA-256 (4) with ECDSA (3)
        sct = b"\0" + log + struct.pack(">QHBBH", milliseconds, 0, 4, 3, len(signature)) + signature
        listed = struct.pack(">HH", len(sct) + 2, len(sct)) + sct
        return b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed


@dataclass
class Authority:
    """A root and an intermediate certificate, and the certificates that they give."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    root_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def __post_init__(self) -> None:
        root = _authority("root")
        self.root = self._ca(root, root, self.root_key, self.root_key, 1)
        self.certificate = self._ca(_authority("intermediate"), root, self.key, self.root_key, 0)

    @staticmethod
    def _ca(
        subject: x509.Name, issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, length: int,
    ) -> x509.Certificate:  # fmt: skip
        built = (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), START, END)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.BasicConstraints(ca=True, path_length=length), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        )
        if not length:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
            built = built.add_extension(usage, critical=False)
        return built.sign(by, hashes.SHA256())

    def issue(
        self,
        key: ec.EllipticCurvePublicKey,
        log: CertificateLog | None,
        at: datetime,
        *,
        identity: str = IDENTITY,
        issuer: str | None = ISSUER,
        old_issuer: str | None = ISSUER,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING,
    ) -> x509.Certificate:
        """What Fulcio gives to whoever has *key* and proved to be *identity* just before *at*: good for ten minutes."""
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        ]
        by = self.key.public_key()
        built = (
            x509.CertificateBuilder(
                self.certificate.subject, x509.Name([]), key, x509.random_serial_number(),
                at - timedelta(minutes=1), at + timedelta(minutes=9),
            )
            .add_extension(_usage(sign=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
        )  # fmt: skip
        if old_issuer is not None:
            built = built.add_extension(x509.UnrecognizedExtension(_ISSUER_V1, old_issuer.encode()), critical=False)
        if issuer is not None:
            text = issuer.encode()
            value = b"\x0c" + bytes([len(text)]) + text
            built = built.add_extension(x509.UnrecognizedExtension(_ISSUER_V2, value), critical=False)
        if log is not None:
            tbs = built.sign(self.key, hashes.SHA256()).tbs_certificate_bytes
            listed = log.seen(tbs, spki(self.key), at - timedelta(minutes=1))
            oid = ExtensionOID.PRECERT_SIGNED_CERTIFICATE_TIMESTAMPS
            built = built.add_extension(x509.UnrecognizedExtension(oid, listed), critical=False)
        return built.sign(self.key, hashes.SHA256())


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _root(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    return _node(_root(leaves[:half]), _root(leaves[half:]))


def _proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    # RFC 6962, section 2.1.1
    if len(leaves) == 1:
        return []
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    if index < half:
        return [*_proof(leaves[:half], index), _root(leaves[half:])]
    return [*_proof(leaves[half:], index - half), _root(leaves[:half])]


@dataclass
class SignatureLog:
    """Takes entries, and proves that it has them. There are some of others before the first, and after each."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    origin: str = "log.ovms.example"

    def __post_init__(self) -> None:
        self._leaves = [hashlib.sha256(b"\0other %d" % i).digest() for i in range(5)]

    @property
    def id(self) -> bytes:
        return hashlib.sha256(spki(self.key)).digest()

    def add(self, body: bytes, kind: str, version: str, at: datetime | None) -> dict[str, Any]:
        """The entry of a bundle for *body*; with *at*, the log's own time is in it, and signed."""
        index = len(self._leaves)
        self._leaves += [hashlib.sha256(b"\0" + body).digest(), hashlib.sha256(b"\0later %d" % index).digest()]
        root = _root(self._leaves)
        entry: dict[str, Any] = {
            "logIndex": str(index),
            "logId": {"keyId": b64(self.id)},
            "kindVersion": {"kind": kind, "version": version},
            "inclusionProof": {
                "logIndex": str(index),
                "rootHash": b64(root),
                "treeSize": str(len(self._leaves)),
                "hashes": [b64(one) for one in _proof(self._leaves, index)],
                "checkpoint": {"envelope": self._checkpoint(root, tree="" if at is None else " - 1234567890")},
            },
            "canonicalizedBody": b64(body),
        }
        if at is not None:
            seconds = int(at.timestamp())
            promised = {"body": b64(body), "integratedTime": seconds, "logID": self.id.hex(), "logIndex": index}
            entry["integratedTime"] = str(seconds)
            entry["inclusionPromise"] = {"signedEntryTimestamp": b64(sign(self.key, canonical(promised)))}
        return entry

    def _checkpoint(self, root: bytes, *, tree: str) -> str:
        # Rekor's first version says which of its trees it is, and is known by that
        note = f"{self.origin}{tree}\n{len(self._leaves)}\n{b64(root)}\n"
        return f"{note}\n\u2014 {self.origin} {b64(self.id[:4] + sign(self.key, note.encode()))}\n"


class Clock:
    """An RFC 3161 time stamping authority: openssl. It knows no time but the present one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        key, root_key = new_key(), new_key()
        root = _authority("clock root")
        self.root = Authority._ca(root, root, root_key, root_key, 1)
        self.certificate = (
            x509.CertificateBuilder(
                root, _authority("clock"), key.public_key(), x509.random_serial_number(), START, END
            )
            .add_extension(_usage(sign=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
            .sign(root_key, hashes.SHA256())
        )
        (directory / "tsa.crt").write_bytes(self.certificate.public_bytes(Encoding.PEM))
        (directory / "tsa.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (directory / "tsa.cnf").write_text(
            "[tsa]\ndefault_tsa = it\n[it]\nserial = serial\nsigner_cert = tsa.crt\nsigner_key = tsa.key\n"
            "signer_digest = sha256\ndefault_policy = 1.2.3.4\ndigests = sha256\nordering = no\ntsa_name = no\n"
        )

    def stamp(self, data: bytes) -> bytes:
        """A timestamp response over *data*, of now, with the clock's certificate."""
        (self._directory / "data").write_bytes(data)
        self._openssl("-query", "-data", "data", "-sha256", "-cert", "-out", "query")
        return self.reply((self._directory / "query").read_bytes())

    def reply(self, query: bytes) -> bytes:
        """The response to somebody's query."""
        (self._directory / "query").write_bytes(query)
        self._openssl("-reply", "-config", "tsa.cnf", "-section", "it", "-queryfile", "query", "-out", "reply")
        return (self._directory / "reply").read_bytes()

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", "ts", *arguments], cwd=self._directory, check=True, capture_output=True, timeout=30)


@dataclass
class Sigstore:
    """All of them. A test that wants one of its parts to be a stranger's uses ``dataclasses.replace``."""

    authority: Authority = field(default_factory=Authority)
    certificates: CertificateLog = field(default_factory=CertificateLog)
    signatures: SignatureLog = field(default_factory=SignatureLog)
    clock: Clock | None = None

    def trusted_root(self) -> dict[str, Any]:
        def log(name: str, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            return {
                "baseUrl": f"https://{name}",
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": b64(spki(key)),
                    "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                    "validFor": {"start": rfc3339(START)},
                },
                "logId": {"keyId": b64(hashlib.sha256(spki(key)).digest())},
            }

        def chain(*certificates: x509.Certificate) -> dict[str, Any]:
            return {
                "subject": {"organization": "ovms.example", "commonName": "test"},
                "uri": "https://ca.ovms.example",
                "certChain": {
                    "certificates": [{"rawBytes": b64(one.public_bytes(Encoding.DER))} for one in certificates]
                },
                "validFor": {"start": rfc3339(START)},
            }

        return {
            "mediaType": ROOT_TYPE,
            "tlogs": [log(self.signatures.origin, self.signatures.key)],
            "certificateAuthorities": [chain(self.authority.certificate, self.authority.root)],
            "ctlogs": [log("ct.ovms.example", self.certificates.key)],
            **({"timestampAuthorities": [chain(self.clock.certificate, self.clock.root)]} if self.clock else {}),
        }

    def write_root(self, path: Path) -> Path:
        path.write_text(json.dumps(self.trusted_root()))
        return path

    def bundle(
        self, subject: Digest, at: datetime = SIGNED, *, statement: bytes | None = None, logged: bool = True,
        sct: bool = True, key: ec.EllipticCurvePrivateKey | None = None, late: timedelta = timedelta(), **issued: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The bundle that cosign writes beside *subject*: the log has the time, *late* after the certificate was given.

        With a clock (at = now) the log's entry has no time, as Rekor's second version has none, and the clock has it.
        """
        key = key or new_key()
        log = self.certificates if sct else None
        certificate = self.authority.issue(key.public_key(), log, at, **issued)
        statement = payload.statement(subject) if statement is None else statement
        encoded = payload.pae(payload.IN_TOTO, statement)
        signature = sign(key, encoded)
        envelope = {
            "payload": b64(statement),
            "payloadType": payload.IN_TOTO,
            "signatures": [{"sig": b64(signature)}],
        }
        material: dict[str, Any] = {"certificate": {"rawBytes": b64(certificate.public_bytes(Encoding.DER))}}
        if self.clock is None:
            body = _dsse_entry(envelope, statement, certificate)
            entry = self.signatures.add(body, "dsse", "0.0.1", at + late)
        else:
            body = _hashed_entry(encoded, signature, certificate)
            entry = self.signatures.add(body, "hashedrekord", "0.0.2", None)
            stamp = {"signedTimestamp": b64(self.clock.stamp(signature))}
            material["timestampVerificationData"] = {"rfc3161Timestamps": [stamp]}
        material["tlogEntries"] = [entry] if logged else []
        return {"mediaType": cosign.BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}


def _dsse_entry(envelope: dict[str, Any], statement: bytes, certificate: x509.Certificate) -> bytes:
    verifier = b64(certificate.public_bytes(Encoding.PEM))
    [one] = envelope["signatures"]
    spec = {
        "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(canonical(envelope)).hexdigest()},
        "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(statement).hexdigest()},
        "signatures": [{"signature": one["sig"], "verifier": verifier}],
    }
    return canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})


def _hashed_entry(encoded: bytes, signature: bytes, certificate: x509.Certificate) -> bytes:
    verifier = {
        "x509Certificate": {"rawBytes": b64(certificate.public_bytes(Encoding.DER))},
        "keyDetails": "PKIX_ECDSA_P256_SHA_256",
    }
    spec = {
        "hashedRekordV002": {
            "data": {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(encoded).digest())},
            "signature": {"content": b64(signature), "verifier": verifier},
        }
    }
    return canonical({"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": spec})
