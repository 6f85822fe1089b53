"""Who may sign: identities that a certificate authority vouches for ("keyless"), told by a Sigstore bundle.

Nothing is fetched. All that is trusted stands in one file, a Sigstore ``trusted_root.json``: the authorities that give
certificates (Fulcio), the logs of certificates (CT), the logs of signatures (Rekor) and, if there are any, the clocks
(RFC 3161). The package ``sigstore`` checks certificates, logs and clocks; what the signature is over, who made it and whether what
vouches for it was valid then is checked here.

Sources: Sigstore's client specification and ``trustroot.proto``; the extensions in Fulcio's ``docs/oid-info.md``.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovms import fsutil
from ovms.errors import InputError, ToolMissing
from ovms.lazy import dataclass
from ovms.spec import limits, strictjson
from ovms.spec.digest import Digest
from ovms.spec.document import check_time
from ovms.text import printable
from ovms.trust import payload
from ovms.trust.model import Bad, Format, Found, Good

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from sigstore.models import Bundle, TrustedRoot
    from sigstore.verify import Verifier
    from sigstore.verify.policy import VerificationPolicy

#: Values in a bundle, of whatever kind: the package describes each that is wrong, in memory. One with a long proof has 200.
VALUES_MAX: Final = 500
#: Bytes of a trust root, values in it, and entries of one of its lists.
ROOT_MAX: Final = 1 * limits.MIB
ROOT_VALUES_MAX: Final = 10_000
ENTRIES_MAX: Final = 64
_DEPTH_MAX: Final = 16
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_LISTS: Final = {
    "certificateAuthorities": "certificate authority",
    "tlogs": "log of signatures",
    "ctlogs": "log of certificates",
}


class TrustRoot:
    """The authorities, logs and clocks that are trusted. :meth:`load` makes one."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    @classmethod
    def load(cls, path: Path) -> TrustRoot:
        """The trust root in a file, as Sigstore's TUF repositories hold it and ``cosign trusted-root create`` writes it.

        Raises:
            InputError: there is no such file, or it is no trust root that says whom to trust for signatures.
            ToolMissing: the package ``sigstore`` is not installed.
        """
        try:
            from sigstore.errors import Error
        except ImportError:
            raise ToolMissing(
                "identities can't be checked: the Python package 'sigstore' is not installed",
                hint="install it beside ovms: pip install 'ovms[keyless]'",
            ) from None
        # it warns of keys that it does not know, which are then not trusted: that is for programs that listen
        if not (logger := logging.getLogger("sigstore")).handlers:
            logger.addHandler(logging.NullHandler())
        data = fsutil.read_input(path, "trust root", max_size=ROOT_MAX)
        what = f"the trust root {path}"
        document = strictjson.parse(data, what, max_size=ROOT_MAX, max_depth=_DEPTH_MAX)
        _check_shape(document, what)
        import ssl

        try:
            _verifier(document)
            _check_clocks(document)
        except (Error, ValueError, ssl.SSLError) as exc:
            raise InputError(
                f"{what} can't be used: {_line(exc)}", hint="it is a Sigstore trusted_root.json", path=str(path)
            ) from None
        return cls(document)

    def verify(self, data: bytes, policy: VerificationPolicy) -> tuple[str, bytes, datetime]:
        """The type and the bytes that the bundle *data* is a signature over, and when a log or a clock saw it.

        Raises:
            payload.Malformed: it does not hold, for whatever reason.
        """
        from sigstore.errors import CertValidationError
        from sigstore.models import Bundle

        try:
            document = strictjson.parse(data, "the bundle", max_size=payload.BUNDLE_MAX, max_depth=_DEPTH_MAX)
            if _has_more(document, VALUES_MAX):
                raise payload.Malformed(
                    f"it has more than {VALUES_MAX} values, and no bundle of one signature has so many"
                )
            bundle = Bundle.from_json(data)
            # it is only claimed until the verifier, which trusts nothing that was not valid then, has checked it
            at = _claimed_time(bundle)
            _check_period(bundle.signing_certificate, at)
            kind, signed = _verifier(_valid_at(self._document, at)).verify_dsse(bundle, policy)
        except payload.Malformed:
            raise
        except CertValidationError as exc:
            raise payload.Malformed(
                f"no authority of the trust root stands for its certificate: {_line(exc)}"
            ) from None
        except BaseException as exc:
            # Whatever a stranger's bundle does to the parsers, it is no signature. A panic of those in Rust is no Exception.
            if isinstance(exc, Exception) or type(exc).__module__ == "pyo3_runtime":
                raise payload.Malformed(_line(exc)) from None
            raise
        return kind, signed, at


@dataclass(frozen=True)
class IdentitySigner:
    """Whoever proved to *issuer*, an OpenID Connect provider, to be *identity*: an address, or the URI of a workflow.

    Both are compared as they stand, with every sign. *name* is what messages call it, without control characters.
    """

    name: str
    root: TrustRoot
    identity: str
    issuer: str

    def check(self, found: Found, subject: Digest) -> Good | Bad:
        """Whether this identity signed exactly *subject*. Never raises for what is in *found*."""
        try:
            at = self._check(found, subject)
        except payload.Malformed as exc:
            return Bad(found, self.name, str(exc))
        return Good(found, self.name, at)

    def _check(self, found: Found, subject: Digest) -> datetime:
        if found.format is not Format.BUNDLE:
            raise payload.Malformed("identities are read from Sigstore bundles alone, and it is none")
        envelope = payload.read_bundle(found.payload)
        if envelope.hint is not None:
            raise payload.Malformed("it was made with a key, not with a certificate")
        payload.check_statement(envelope.payload, subject)
        kind, signed, at = self.root.verify(found.payload, _Policy(self.identity, self.issuer))
        # two parsers read the bundle: what one of them saw signed must be what the other saw to be over the subject
        if (kind, signed) != (envelope.payload_type, envelope.payload):
            raise payload.Malformed("what it is over can be read in two ways")
        return at


class _Policy:
    """Sigstore's own, but for the issuer, of which it looks only into the older of two extensions."""

    def __init__(self, identity: str, issuer: str) -> None:
        self._identity = identity
        self._issuer = issuer

    def verify(self, cert: Certificate) -> None:
        from sigstore.errors import VerificationError
        from sigstore.verify import policy

        kinds = (policy.OIDCIssuerV2, policy.OIDCIssuer)
        present = {extension.oid for extension in cert.extensions}
        issuers = [kind(self._issuer) for kind in kinds if kind.oid in present]
        if not issuers:
            raise payload.Malformed("its certificate does not say who issued the identity")
        try:
            policy.AllOf([*issuers, policy.Identity(identity=self._identity)]).verify(cert)
        except VerificationError as exc:
            raise payload.Malformed(f"it was made by another identity: {_line(exc)}") from None


def _check_shape(document: Any, what: str) -> None:
    def wrong(detail: str) -> InputError:
        return InputError(f"{what} {detail}", hint="it is a Sigstore trusted_root.json")

    if not isinstance(document, dict):
        raise wrong("is no JSON object")
    if _has_more(document, ROOT_VALUES_MAX):
        raise wrong(f"has more than {ROOT_VALUES_MAX} values")
    for name, kind in _LISTS.items():
        entries = document.get(name)
        if not isinstance(entries, list) or not entries:
            raise wrong(f"names no {kind} ({name})")
        if len(entries) > ENTRIES_MAX:
            raise wrong(f"has {len(entries)} {name}; at most {ENTRIES_MAX} are allowed")
        for number, entry in enumerate(entries):
            try:
                _period(entry)
            except (AttributeError, TypeError, ValueError):
                raise wrong(f"can't be used: {name}[{number}] has no validity period that can be read") from None


def _period(entry: dict[str, Any]) -> tuple[datetime | None, datetime | None]:
    # of an authority it stands in the entry, of a log beside its key; without one it is always valid
    holder = entry.get("publicKey", entry)
    if any("_" in name for name in (*entry, *holder)):
        # the package knows valid_for, too; taken for always valid, it would be no period at all
        raise ValueError("a name with an underscore")
    period = holder.get("validFor") or {}
    times = period.get("start"), period.get("end")
    for one in times:
        if one is not None and (problem := check_time(one)):
            raise ValueError(problem)
    start, end = (None if one is None else datetime.fromisoformat(one.upper()) for one in times)
    return start, end


def _valid_at(document: dict[str, Any], at: datetime) -> dict[str, Any]:
    """The trust root without the authorities and logs that were not valid at a time: the package asks for none of it.

    Logs of certificates stay: they speak of the certificate, which is a little older than the signature.
    """
    kept = dict(document)
    for name in ("certificateAuthorities", "tlogs"):
        periods = ((one, *_period(one)) for one in document[name])
        kept[name] = [one for one, start, end in periods if (not start or start <= at) and (not end or at <= end)]
        if not kept[name]:
            raise payload.Malformed(f"the trust root has no {_LISTS[name]} that was valid then ({at:%Y-%m-%d})")
    return kept


def _verifier(document: dict[str, Any]) -> Verifier:
    from sigstore.verify import Verifier

    return Verifier(trusted_root=_trusted_root(document))


def _trusted_root(document: dict[str, Any]) -> TrustedRoot:
    from sigstore.models import TrustedRoot

    # it reads files alone
    fd = os.memfd_create("trusted_root.json")
    try:
        fsutil.pwrite_all(fd, json.dumps(document).encode(), 0)
        return TrustedRoot.from_file(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _check_clocks(document: dict[str, Any]) -> None:
    # The package reads their certificates when a timestamp comes, and panics where OpenSSL takes one for none.
    import ssl

    from cryptography.hazmat.primitives.serialization import Encoding

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for clock in _trusted_root(document).get_timestamp_authorities():
        for certificate in clock.certificates(allow_expired=True):
            context.load_verify_locations(cadata=certificate.public_bytes(Encoding.DER))


def _has_more(document: Any, values: int) -> bool:
    count, left = 0, [document]
    while left and count <= values:
        value = left.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        left += inner
    return count > values


def _claimed_time(bundle: Bundle) -> datetime:
    # as the package read it, which is not sure to be as anybody else would
    entry = json.loads(bundle.to_json())["verificationMaterial"]["tlogEntries"][0]
    if (seconds := int(entry.get("integratedTime", 0))) and entry.get("inclusionPromise"):
        return datetime.fromtimestamp(seconds, UTC)
    data = bundle.verification_material.timestamp_verification_data
    stamps = [] if data is None else data.rfc3161_timestamps
    if len(stamps) != 1:
        raise payload.Malformed(f"it tells its time by a log, or by one timestamp; this one has {len(stamps)}")
    return stamps[0].tst_info.gen_time


def _check_period(certificate: Certificate, at: datetime) -> None:
    # the verifier asks, too, but says it less plainly
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= at <= end:
        raise payload.Malformed(
            f"its certificate was good from {start:{_TIME}} to {end:{_TIME}}, and it was made {at:{_TIME}}"
        )


def _line(exc: BaseException) -> str:
    """What the package says, in one short line without control characters: much of it may come from a stranger."""
    # after the bracket pydantic shows what it was given
    text = " ".join(str(exc).partition(" [type=")[0].split()) or type(exc).__name__
    return printable(text, 200)
