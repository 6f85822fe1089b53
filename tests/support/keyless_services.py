"""The services that cosign signs with, over HTTP on loopback: Fulcio, Rekor (both versions), and a timestamping authority.

They give to anybody what is asked for: whom a token belongs to is Fulcio's matter, and not what is tried here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from support.keyless import IDENTITY, ISSUER, Sigstore, b64, canonical


def token() -> str:
    """An OpenID Connect token for our identity, which nobody signed."""
    now = int(time.time())
    parts = (
        {"alg": "ES256", "typ": "JWT"},
        {"iss": ISSUER, "sub": "1", "aud": "sigstore", "email": IDENTITY, "email_verified": True, "iat": now, "exp": now + 600},
    )  # fmt: skip
    return ".".join([base64.urlsafe_b64encode(canonical(part)).rstrip(b"=").decode() for part in parts] + ["c2ln"])


def write_keys(sigstore: Sigstore, directory: Path) -> None:
    """What ``cosign trusted-root create`` asks for, as PEM: ``fulcio.pem``, ``ct.pub``, ``rekor.pub`` and ``tsa.pem``."""
    assert sigstore.clock is not None
    for name, certificates in (
        ("fulcio.pem", (sigstore.authority.certificate, sigstore.authority.root)),
        ("tsa.pem", (sigstore.clock.certificate, sigstore.clock.root)),
    ):
        (directory / name).write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in certificates))
    for name, key in (("ct.pub", sigstore.certificates.key), ("rekor.pub", sigstore.signatures.key)):
        (directory / name).write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@contextmanager
def serving(sigstore: Sigstore) -> Iterator[str]:
    """Runs them. Gives the address of all, ``http://127.0.0.1:PORT``; the log is called by its host, as cosign asks."""
    sigstore.signatures.origin = "127.0.0.1"

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            status, kind, etag, answer = _ANSWERS[self.path](sigstore, data)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


Answer = tuple[int, str, str, bytes]


def _json(status: int, document: Any, etag: str = "") -> Answer:
    return status, "application/json", etag, json.dumps(document).encode()


def _certificate(sigstore: Sigstore, data: bytes) -> Answer:
    key = load_pem_public_key(json.loads(data)["publicKeyRequest"]["publicKey"]["content"].encode())
    assert isinstance(key, EllipticCurvePublicKey)
    issued = sigstore.authority.issue(key, sigstore.certificates, datetime.now(UTC))
    chain = (issued, sigstore.authority.certificate, sigstore.authority.root)
    texts = [one.public_bytes(Encoding.PEM).decode() for one in chain]
    return _json(200, {"signedCertificateEmbeddedSct": {"chain": {"certificates": texts}}})


def _timestamp(sigstore: Sigstore, data: bytes) -> Answer:
    assert sigstore.clock is not None
    return 201, "application/timestamp-reply", "", sigstore.clock.reply(data)


def _entry_v2(sigstore: Sigstore, data: bytes) -> Answer:
    asked = json.loads(data)["hashedRekordRequestV002"]
    hashed = {"data": {"algorithm": "SHA2_256", "digest": asked["digest"]}, "signature": asked["signature"]}
    body = canonical({"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": {"hashedRekordV002": hashed}})
    return _json(201, sigstore.signatures.add(body, "hashedrekord", "0.0.2", None))


def _entry_v1(sigstore: Sigstore, data: bytes) -> Answer:
    asked = json.loads(data)["spec"]["proposedContent"]
    envelope = json.loads(asked["envelope"])
    statement = base64.b64decode(envelope["payload"])
    [verifier] = asked["verifiers"]
    spec = {
        "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(asked["envelope"].encode()).hexdigest()},
        "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(statement).hexdigest()},
        "signatures": [{"signature": one["sig"], "verifier": verifier} for one in envelope["signatures"]],
    }
    body = canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
    entry = sigstore.signatures.add(body, "dsse", "0.0.1", datetime.now(UTC))
    proof = entry["inclusionProof"]
    name = hashlib.sha256(b"\0" + body).hexdigest()
    answer = {
        "body": b64(body),
        "integratedTime": int(entry["integratedTime"]),
        "logID": _hex(entry["logId"]["keyId"]),
        "logIndex": int(entry["logIndex"]),
        "verification": {
            "signedEntryTimestamp": entry["inclusionPromise"]["signedEntryTimestamp"],
            "inclusionProof": {
                "hashes": [_hex(one) for one in proof["hashes"]],
                "rootHash": _hex(proof["rootHash"]),
                "logIndex": int(proof["logIndex"]),
                "treeSize": int(proof["treeSize"]),
                "checkpoint": proof["checkpoint"]["envelope"],
            },
        },
    }
    return _json(201, {name: answer}, etag=name)


def _hex(text: str) -> str:
    return base64.b64decode(text).hex()


_ANSWERS = {
    "/api/v2/signingCert": _certificate,
    "/api/v1/timestamp": _timestamp,
    "/api/v1/log/entries": _entry_v1,
    "/api/v2/log/entries": _entry_v2,
}
