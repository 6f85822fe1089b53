"""Keys: what is made is read again, and nothing else is."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import InputError
from ovms.trust import keys

PASSWORD = b"correct horse"
PUBLIC = keys.generate().public
PEM_KEY = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def never() -> bytes:
    raise AssertionError("no password is needed")


@pytest.fixture(scope="module")
def sealed() -> tuple[keys.PrivateKey, bytes]:
    key = keys.generate()
    return key, key.encrypted(PASSWORD)


def test_a_key_in_cosigns_format_is_read_again(sealed: tuple[keys.PrivateKey, bytes]) -> None:
    key, data = sealed
    assert data.startswith(b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n")
    assert keys.load_private(data, "k", lambda: PASSWORD).public == key.public
    older = data.replace(b"SIGSTORE", b"COSIGN")
    assert keys.load_private(older, "k", lambda: PASSWORD).public == key.public


def test_a_wrong_password_is_said(sealed: tuple[keys.PrivateKey, bytes]) -> None:
    with pytest.raises(InputError, match="password of the key is wrong"):
        keys.load_private(sealed[1], "the key", lambda: b"wrong")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kdf", "params", "N"), 2**30),
        (("kdf", "params", "N"), True),
        (("kdf", "params", "r"), 1024),
        (("kdf", "params", "p"), 0),
        (("kdf", "name"), "argon2"),
        (("kdf", "salt"), "AAAA"),
        (("kdf", "salt"), 7),
        (("cipher", "nonce"), ""),
        (("cipher", "name"), "none"),
        (("ciphertext",), "%%%"),
        (("kdf",), []),
    ],
)
def test_a_hostile_key_file_costs_nothing(
    sealed: tuple[keys.PrivateKey, bytes], path: tuple[str, ...], value: object
) -> None:
    document = json.loads(base64.b64decode(b"".join(sealed[1].splitlines()[1:-1])))
    inner = document
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    body = base64.b64encode(json.dumps(document).encode())
    data = b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n%b\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n" % body
    with pytest.raises(InputError, match="k is damaged"):
        keys.load_private(data, "k", never)


def private_keys() -> list[Any]:
    return [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ]


@pytest.mark.parametrize("number", range(5))
def test_each_kind_of_key_signs_and_verifies(number: int) -> None:
    raw = private_keys()[number]
    pem = raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key = keys.load_private(pem, "k", never)
    signature = key.sign(b"message")
    public = keys.load_public(key.public.pem, "p")
    assert public == key.public
    assert public.verify(signature, b"message")
    assert not public.verify(signature, b"massage")
    assert not public.verify(signature[:-1], b"message")
    assert not public.verify(b"", b"message")
    assert not public.verify(b"0" * 100_000, b"message")
    assert not keys.generate().public.verify(signature, b"message")
    locked = raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD))
    assert keys.load_private(locked, "k", lambda: PASSWORD).public == public
    with pytest.raises(InputError, match="password"):
        keys.load_private(locked, "k", lambda: b"wrong")


def test_what_sec1_holds_is_read() -> None:
    raw = ec.generate_private_key(ec.SECP256R1())
    pem = raw.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    assert keys.load_private(pem, "k", never).sign(b"x")


def test_a_larger_curve_signs_over_sha256_and_its_own_hash_is_taken_too() -> None:
    from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512

    raw = ec.generate_private_key(ec.SECP384R1())
    pem = raw.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    key = keys.load_private(raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "k", never)
    raw.public_key().verify(key.sign(b"m"), b"m", ec.ECDSA(SHA256()))
    for hashed, taken in ((SHA256(), True), (SHA384(), True), (SHA512(), False)):
        assert keys.load_public(pem, "p").verify(raw.sign(b"m", ec.ECDSA(hashed)), b"m") is taken


@pytest.mark.parametrize("number", range(4))
def test_weak_and_strange_keys_are_refused(number: int) -> None:
    makers: list[Any] = [
        lambda: rsa.generate_private_key(65537, 1024),
        lambda: ec.generate_private_key(ec.SECP256K1()),
        lambda: ec.generate_private_key(ec.SECP224R1()),
        lambda: dsa.generate_private_key(1024),
    ]
    raw = makers[number]()
    with pytest.raises(InputError, match="of a kind or a size that is not taken"):
        keys.load_public(raw.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "p")
    with pytest.raises(InputError, match="of a kind or a size that is not taken"):
        keys.load_private(raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "k", never)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\0" * 70_000]
)
def test_rubbish_is_no_key(data: bytes) -> None:
    with pytest.raises(InputError):
        keys.load_public(data, "p")
    with pytest.raises(InputError):
        keys.load_private(data, "k", never)


def test_a_private_key_is_no_public_one(sealed: tuple[keys.PrivateKey, bytes]) -> None:
    with pytest.raises(InputError, match="is a private key"):
        keys.load_public(sealed[1], "p")
    with pytest.raises(InputError, match="one public key"):
        keys.load_public(sealed[0].public.pem * 2, "p")


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise_otherwise(data: bytes) -> None:
    kinds = (
        b"PUBLIC KEY",
        b"PRIVATE KEY",
        b"EC PRIVATE KEY",
        b"ENCRYPTED PRIVATE KEY",
        b"ENCRYPTED SIGSTORE PRIVATE KEY",
    )
    for kind in kinds:
        for body in (data, base64.b64encode(data)):
            text = b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (kind, body, kind)
            with contextlib.suppress(InputError):
                keys.load_public(text, "k")
            with contextlib.suppress(InputError):
                keys.load_private(text, "k", lambda: b"x")


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_no_changed_byte_of_a_key_makes_it_raise_otherwise(where: int, value: int) -> None:
    changed = bytearray(PEM_KEY)
    changed[where % len(changed)] = value
    try:
        key = keys.load_private(bytes(changed), "k", lambda: b"x")
    except InputError:
        return
    assert key.public.verify(key.sign(b"m"), b"m")


@given(st.binary(max_size=80), st.binary(max_size=40))
def test_no_bytes_are_a_signature(signature: bytes, message: bytes) -> None:
    assert not PUBLIC.verify(signature, message)
