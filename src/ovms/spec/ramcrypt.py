"""Encryption of a RAM snapshot's device state and chunks, with one key for each blob.

Source: ``spec/rfc/ramsnap-v1.md``, section 11. AES-256-GCM; a nonce says whether it is the device state or a chunk, and of which
page, so none comes twice with a key. How the key is wrapped for recipients is not known here (:mod:`ovms.trust.age`).
"""

from __future__ import annotations

import struct
from typing import Final

#: Bytes of a key, and what encryption adds to whatever is encrypted.
KEY_SIZE: Final = 32
TAG_SIZE: Final = 16

_NONCE: Final = struct.Struct("<IQ")
_STATE: Final = 0
_CHUNK: Final = 1
_CHUNK_BOUND: Final = struct.Struct("<IB")


class Cipher:
    """Encrypts and decrypts the parts of one blob. Its ``repr`` says nothing of the key."""

    def __init__(self, key: bytes) -> None:
        """*key*: :data:`KEY_SIZE` random bytes, never used for another blob."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead = AESGCM(key)

    def encrypt_state(self, stored: bytes, bound: bytes) -> bytes:
        """The device state, and the tag that vouches for it and for *bound*, too."""
        return self._aead.encrypt(_NONCE.pack(_STATE, 0), stored, bound)

    def decrypt_state(self, encrypted: bytes, bound: bytes) -> bytes | None:
        """The inverse; None where it was not encrypted so."""
        return self._decrypt(_NONCE.pack(_STATE, 0), encrypted, bound)

    def encrypt_chunk(self, page: int, pages: int, codec: int, stored: bytes | memoryview) -> bytes:
        """The *stored* bytes of so many pages from *page* on, which *codec* made of them."""
        return self._aead.encrypt(_NONCE.pack(_CHUNK, page), stored, _CHUNK_BOUND.pack(pages, codec))

    def decrypt_chunk(self, page: int, pages: int, codec: int, encrypted: bytes | memoryview) -> bytes | None:
        """The inverse; None where it was not encrypted so."""
        return self._decrypt(_NONCE.pack(_CHUNK, page), encrypted, _CHUNK_BOUND.pack(pages, codec))

    def _decrypt(self, nonce: bytes, encrypted: bytes | memoryview, bound: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(nonce, encrypted, bound)
        except InvalidTag:
            return None
