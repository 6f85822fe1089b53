"""Who may sign: keys. (Identities are in :mod:`ovms.trust.identity`.)"""

from __future__ import annotations

from ovms.lazy import dataclass
from ovms.oci.cosign import SIGN_PREDICATE
from ovms.spec.digest import Digest
from ovms.trust import payload
from ovms.trust.keys import PublicKey
from ovms.trust.model import Bad, Format, Found, Good


@dataclass(frozen=True)
class KeySigner:
    """Whoever has the private half of *key*. *name* is what messages call it, without control characters."""

    name: str
    key: PublicKey

    def check(self, found: Found, subject: Digest, predicate: str = SIGN_PREDICATE) -> Good | Bad:
        """See :meth:`ovms.trust.model.Signer.check`. No time is known: keys tell none."""
        try:
            self._check(found, subject, predicate)
        except payload.Malformed as exc:
            return Bad(found, self.name, str(exc))
        return Good(found, self.name)

    def _check(self, found: Found, subject: Digest, predicate: str) -> None:
        # What it says first: that it is over another digest helps people more than that it is no signature of this key.
        if found.format is Format.BUNDLE:
            envelope = payload.read_bundle(found.payload)
            if envelope.hint is None:
                raise payload.Malformed("it was made with a certificate, not with a key")
            payload.check_statement(envelope.payload, subject, predicate)
            if envelope.hint not in ("", self.key.hint):
                raise payload.Malformed("it was made with another key")
            signature, message = envelope.signature, envelope.signed
        else:
            if predicate != SIGN_PREDICATE:
                raise payload.Malformed("it is a signature, and says nothing else")
            payload.check_simple(found.payload, subject)
            signature, message = payload.decode(found.signature, "the signature"), found.payload
        if not self.key.verify(signature, message):
            raise payload.Malformed("it was not made with this key, or what it was made over was changed")
