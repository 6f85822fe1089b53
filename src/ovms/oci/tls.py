"""TLS: which certificates are trusted where, and what a failed handshake means for the user.

The CAs of ``certs.d`` count beside the system's (or those that ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` name). Contexts are
made when they are first needed, once for each set of files: loading the system's CAs takes 20 ms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from ovms import fsutil
from ovms.errors import InputError
from ovms.oci.registries import Certificates
from ovms.spec import limits

if TYPE_CHECKING:
    import ssl

#: May be left out, by the registry too where the user has written it.
_PORT: Final = ":443"
_PEM_MAX: Final = 4 * limits.MIB
_CERTS_D: Final = "~/.config/containers/certs.d"
#: Alerts of a server that wants a certificate of ours, or another one (RFC 8446 §6.2; TLS 1.2 has only the second).
_CLIENT_ALERTS: Final = ("CERTIFICATE_REQUIRED", "ALERT_BAD_CERTIFICATE", "ALERT_UNKNOWN_CA")
#: What OpenSSL says of an answer that is no TLS.
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
#: X509_V_ERR_*: self-signed, no issuer known.
_UNKNOWN_CA: Final = frozenset({2, 18, 19, 20, 21})
#: Not yet valid, or no longer.
_NOT_NOW: Final = frozenset({9, 10})

#: Finds the files for a ``host[:port]``.
Find = Callable[[str], Certificates]


class Trust:
    """The TLS contexts for one registry, and for where it sends us.

    Its certificates in ``certs.d`` count for its host. Elsewhere (its token service, a redirect) that host's own count,
    and where it has none the CAs of the registry: never the registry's client certificate. ``insecure`` takes any
    certificate of the registry's own host, and of no other.
    """

    def __init__(self, registry: str, find: Find | None = None, *, insecure: bool = False) -> None:
        """*registry* is ``host[:port]``."""
        self._registry = registry.lower()
        self._find_files = find or (lambda _host: Certificates())
        self._found: dict[str, Certificates] = {}
        self._insecure = insecure
        self._contexts: dict[tuple[Certificates, bool], ssl.SSLContext] = {}
        self._lock = threading.Lock()

    def _find(self, host: str) -> Certificates:
        if host not in self._found:
            self._found[host] = self._find_files(host)
        return self._found[host]

    def named(self) -> bool:
        """Whether ``certs.d`` has a directory with files for the registry."""
        return self._find(self._registry) != Certificates()

    def context(self, host: str) -> ssl.SSLContext:
        """The context for a connection to ``host[:port]``.

        Raises:
            InputError, FileProblem: a file of ``certs.d`` cannot be used.
        """
        host = host.lower()
        own = host.removesuffix(_PORT) == self._registry.removesuffix(_PORT)
        if own:
            host = self._registry
        found = self._find(host)
        if not own and found == Certificates():
            found = Certificates(self._find(self._registry).ca_files)
        verify = not (self._insecure and _name(host) == _name(self._registry))
        with self._lock:
            key = (found, verify)
            if key not in self._contexts:
                self._contexts[key] = _make(found, verify=verify)
            return self._contexts[key]


def _name(host: str) -> str | None:
    return urlsplit(f"//{host}").hostname


def _make(files: Certificates, *, verify: bool) -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context()
    # Python 3.13 asks more of certificates than Go does, and than the authorities that people make for themselves give.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for path in files.ca_files:
        _read(path, "the CA certificate")
        try:
            context.load_verify_locations(cafile=path)
        except (ssl.SSLError, OSError) as exc:
            raise _unusable(path, "no CA certificate in PEM") from exc
    if files.client_cert is not None and files.client_key is not None:
        _read(files.client_cert, "the client certificate")
        _read(files.client_key, "the client certificate's key")
        try:
            # nobody is asked for a passphrase in the middle of a transfer
            context.load_cert_chain(files.client_cert, files.client_key, password="")
        except (ssl.SSLError, OSError) as exc:
            what = f"no client certificate in PEM with its unencrypted key in {files.client_key.name}"
            raise _unusable(files.client_cert, what) from exc
    return context


def _read(path: Path, what: str) -> None:
    fsutil.read_input(path, what, max_size=_PEM_MAX)


def _unusable(path: Path, what: str) -> InputError:
    return InputError(f"{path} is {what}", hint="correct the file, or remove it", path=str(path))


def explain(exc: BaseException, host: str) -> tuple[str, str] | None:
    """What a TLS error means, and what to do; None where the connection only broke, and another try may go better."""
    import ssl

    if isinstance(exc, ssl.SSLCertVerificationError):
        if exc.verify_code in _UNKNOWN_CA:
            place = f"{_CERTS_D}/{host}/ca.crt"
            return (
                "its certificate is signed by an authority that is not trusted here",
                f"put the authority's certificate into {place} (or /etc/containers/certs.d), or among the system's",
            )
        if exc.verify_code in _NOT_NOW:
            return exc.verify_message or str(
                exc
            ), "check this machine's clock; if it is right, the registry's owner has to renew it"
        return exc.verify_message or str(exc), "ask the registry's owner for a certificate that is good for this name"
    if not isinstance(exc, ssl.SSLError) or isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return None
    reason = (exc.reason or "").upper()
    if any(alert in reason for alert in _CLIENT_ALERTS):
        return (
            "it asks for a client certificate, and does not take what it was given",
            f"put the certificate and its key into {_CERTS_D}/{host}/ as client.cert and client.key",
        )
    if any(sign in reason for sign in _NO_TLS):
        return (
            "it does not speak TLS there",
            "check the port; a registry without TLS needs --tls-verify=false, or 'insecure = true' in registries.conf",
        )
    if "ALERT" in reason or "HANDSHAKE" in reason or "PROTOCOL" in reason:
        return reason.lower().replace("_", " "), "check what TLS versions the registry speaks"
    return None
