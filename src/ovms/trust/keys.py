"""Keys: public ones as PEM, private ones as PEM or in Cosign's encrypted format.

Cosign's format (source: cosign's ``pkg/cosign/keys.go`` and ``go-securesystemslib/encrypted``): PEM with the label
``ENCRYPTED SIGSTORE PRIVATE KEY`` (once ``ENCRYPTED COSIGN PRIVATE KEY``) around a JSON document ::

    {"kdf": {"name": "scrypt", "params": {"N": 65536, "r": 8, "p": 1}, "salt": 32 bytes in base64},
     "cipher": {"name": "nacl/secretbox", "nonce": 24 bytes in base64}, "ciphertext": PKCS#8 in DER, sealed, in base64}

Signatures are Cosign's, too: ECDSA with SHA-256, whatever the curve (cosign 3.1 takes no other hash), Ed25519 over the message itself,
RSA with PKCS#1 v1.5 and SHA-256. Of ECDSA, the hash of the curve's size is taken, too: a KMS may know no other one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ovms.errors import InputError, JsonInvalid
from ovms.lazy import dataclass, regex
from ovms.spec import limits, strictjson

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: Bytes of a key file.
KEY_MAX: Final = 64 * limits.KIB
#: Bits of an RSA key: fewer are too weak, more take too long.
RSA_MIN: Final = 2048
RSA_MAX: Final = 8192
#: Bytes of a signature: those of the largest RSA key.
SIGNATURE_MAX: Final = RSA_MAX // 8
#: What scrypt may cost. A key file of a stranger's must not take all memory.
_SCRYPT_N: Final = frozenset({32768, 65536, 131072})
_SCRYPT_R: Final = 8
_SCRYPT_P: Final = 1
_SALT: Final = 32
_NONCE: Final = 24
_LABEL: Final = "ENCRYPTED SIGSTORE PRIVATE KEY"
_PEM: Final = regex(
    rb"-----BEGIN (ENCRYPTED (?:SIGSTORE|COSIGN) PRIVATE KEY)-----\r?\n([A-Za-z0-9+/=\s]+)-----END \1-----\s*"
)
_KINDS: Final = "ECDSA (P-256, P-384, P-521), Ed25519, and RSA of 2048 to 8192 bits"

#: Gives the password of a key, when one is needed.
AskPassword = Callable[[], bytes]


@dataclass(frozen=True)
class PublicKey:
    """A public key. *spki* is its SubjectPublicKeyInfo in DER."""

    spki: bytes

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the SubjectPublicKeyInfo, in hexadecimal."""
        return hashlib.sha256(self.spki).hexdigest()

    @property
    def hint(self) -> str:
        """What a Sigstore bundle calls the key: the same hash, in base64."""
        return base64.b64encode(hashlib.sha256(self.spki).digest()).decode()

    @property
    def pem(self) -> bytes:
        """The key as PEM, as ``cosign.pub`` holds it."""
        text = base64.encodebytes(self.spki).replace(b"\n", b"")
        lines = [text[i : i + 64] for i in range(0, len(text), 64)]
        return b"\n".join([b"-----BEGIN PUBLIC KEY-----", *lines, b"-----END PUBLIC KEY-----", b""])

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether *signature* was made over *message* with this key."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import load_der_public_key

        if len(signature) > SIGNATURE_MAX:
            return False
        key = load_der_public_key(self.spki)
        if isinstance(key, ec.EllipticCurvePublicKey):
            for hashed in dict.fromkeys(("SHA256", _HASHES[key.curve.name])):
                try:
                    key.verify(signature, message, ec.ECDSA(_hash(hashed)))
                except InvalidSignature:
                    continue
                return True
            return False
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, message)
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, message, padding.PKCS1v15(), SHA256())
            else:
                return False
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """A private key that is in our memory. Its ``repr`` says nothing of it."""

    def __init__(self, key: EllipticCurvePrivateKey | Ed25519PrivateKey | RSAPrivateKey) -> None:
        self._key = key
        self.public = _public_of(key.public_key(), "the key")

    def sign(self, message: bytes) -> bytes:
        """A signature over *message*: DER for ECDSA, the raw bytes for the others."""
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding
        from cryptography.hazmat.primitives.hashes import SHA256

        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(message, ec.ECDSA(SHA256()))
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(message)
        return self._key.sign(message, padding.PKCS1v15(), SHA256())

    def encrypted(self, password: bytes) -> bytes:
        """The key in Cosign's encrypted format, as ``cosign.key`` holds it."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from nacl.secret import SecretBox

        salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
        plain = self._key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        sealed = SecretBox(_derive(password, salt, 65536)).encrypt(plain, nonce).ciphertext
        document = {
            "kdf": {
                "name": "scrypt",
                "params": {"N": 65536, "r": _SCRYPT_R, "p": _SCRYPT_P},
                "salt": base64.b64encode(salt).decode(),
            },
            "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
            "ciphertext": base64.b64encode(sealed).decode(),
        }
        import json

        text = base64.b64encode(json.dumps(document, separators=(",", ":")).encode())
        lines = [text[i : i + 64] for i in range(0, len(text), 64)]
        head, tail = f"-----BEGIN {_LABEL}-----".encode(), f"-----END {_LABEL}-----".encode()
        return b"\n".join([head, *lines, tail, b""])


def generate() -> PrivateKey:
    """A new key as Cosign makes them: ECDSA on P-256."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return PrivateKey(ec.generate_private_key(ec.SECP256R1()))


def load_public(data: bytes, what: str) -> PublicKey:
    """A public key from PEM; *what* names it in errors.

    Raises:
        InputError: it is none, or of a kind that is not taken.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if len(data) > KEY_MAX:
        raise InputError(f"{what} has {len(data)} bytes; at most {KEY_MAX} are allowed")
    if b"PRIVATE KEY-----" in data:
        raise InputError(
            f"{what} is a private key, where a public one belongs", hint="'ovm key public KEY' writes the public one"
        )
    if data.count(b"-----BEGIN ") != 1:
        raise InputError(
            f"{what} does not hold one public key in PEM", hint="a file begins with '-----BEGIN PUBLIC KEY-----'"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(
            f"{what} is no public key in PEM that can be read", hint="it begins with '-----BEGIN PUBLIC KEY-----'"
        ) from None
    return _public_of(key, what)


def load_private(data: bytes, what: str, ask: AskPassword) -> PrivateKey:
    """A private key from Cosign's format, or from PEM (PKCS#8, also encrypted; or SEC 1); *ask* is called if it is encrypted.

    Raises:
        InputError: it is none, or of a kind that is not taken; or the password is wrong.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

    if len(data) > KEY_MAX:
        raise InputError(f"{what} has {len(data)} bytes; at most {KEY_MAX} are allowed")
    if match := _PEM.fullmatch(data.strip() + b"\n"):
        plain = _open(match[2], what, ask)
        try:
            return _checked(load_der_private_key(plain, None), what)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise InputError(f"{what}: what it holds is no private key that can be read") from None
    try:
        try:
            return _checked(load_pem_private_key(data, None), what)
        except TypeError:  # it is encrypted
            return _checked(load_pem_private_key(data, ask()), what)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(
            f"{what} is no private key that can be read, or the password is wrong",
            hint="keys of 'ovm key generate', of 'cosign generate-key-pair', and PEM (PKCS#8, SEC 1) are taken",
        ) from None


def _checked(key: Any, what: str) -> PrivateKey:
    _public_of(key.public_key() if hasattr(key, "public_key") else None, what)
    return PrivateKey(key)


def _public_of(key: Any, what: str) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    fits = (
        (isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES)
        or isinstance(key, ed25519.Ed25519PublicKey)
        or (isinstance(key, rsa.RSAPublicKey) and RSA_MIN <= key.key_size <= RSA_MAX)
    )
    if not fits:
        raise InputError(f"{what} is a key of a kind or a size that is not taken", hint=f"taken are {_KINDS}")
    return PublicKey(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


_HASHES: Final = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


def _hash(name: str) -> Any:
    from cryptography.hazmat.primitives import hashes

    return getattr(hashes, name)()


def _open(body: bytes, what: str, ask: AskPassword) -> bytes:
    # every number of it is a stranger's until the seal is whole
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox

    def wrong(detail: str) -> InputError:
        return InputError(f"{what} is damaged, or of another version of Cosign's format: {detail}")

    try:
        document = strictjson.parse(base64.b64decode(body), what, max_size=KEY_MAX, max_depth=4)
        kdf, cipher = document["kdf"], document["cipher"]
        params = kdf["params"]
        names = kdf["name"], cipher["name"]
        cost = params["N"], params["r"], params["p"]
        salt = base64.b64decode(kdf["salt"], validate=True)
        nonce = base64.b64decode(cipher["nonce"], validate=True)
        sealed = base64.b64decode(document["ciphertext"], validate=True)
    except (binascii.Error, JsonInvalid, KeyError, TypeError, ValueError) as exc:
        raise wrong(f"it is no such document ({type(exc).__name__})") from None
    if names != ("scrypt", "nacl/secretbox"):
        raise wrong("another key derivation or cipher")
    if (
        not all(type(number) is int for number in cost)
        or cost[0] not in _SCRYPT_N
        or cost[1:] != (_SCRYPT_R, _SCRYPT_P)
    ):
        raise wrong("the parameters of its key derivation are none that Cosign writes")
    if len(salt) != _SALT or len(nonce) != _NONCE:
        raise wrong("its salt or its nonce has a wrong length")
    try:
        return SecretBox(_derive(ask(), salt, cost[0])).decrypt(sealed, nonce)
    except CryptoError:
        raise InputError(f"the password of {what} is wrong, or the file is damaged") from None


def _derive(password: bytes, salt: bytes, cost: int) -> bytes:
    memory = 128 * _SCRYPT_R * (cost + _SCRYPT_P + 2)
    return hashlib.scrypt(password, salt=salt, n=cost, r=_SCRYPT_R, p=_SCRYPT_P, maxmem=memory, dklen=32)
