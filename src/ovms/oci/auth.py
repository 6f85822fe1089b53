"""Challenges of registries, and the tokens that answer them.

Sources: RFC 9110 §11 for the header, the distribution project's token specification for Bearer. A credential goes to the
registry that it belongs to, or to a token service that :mod:`ovms.oci.realm` lets have it, and over TLS only (loopback
aside).
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlencode, urlsplit

from ovms.errors import JsonInvalid, RegistryDenied, RegistryProtocol
from ovms.lazy import dataclass, regex
from ovms.oci.credentials import Credential
from ovms.oci.http import shown
from ovms.oci.realm import VARIABLE, TokenServices, is_host, is_loopback, same_host
from ovms.spec import limits, strictjson

__all__ = ["Authenticator", "Challenge", "denied", "is_loopback", "parse_challenges"]

#: Seconds that a token is good for at least, whatever the service says.
_LIFETIME_MIN: Final = 60
_LIFETIME_MAX: Final = 24 * 3600
_TOKEN_ANSWER_MAX: Final = 1 * limits.MIB
_HEADER_MAX: Final = 8192
_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME: Final = regex(rf"\s*,*\s*({_WORD})(?=\s|,|$)(?!\s*=)")
_PARAMETER: Final = regex(rf'\s*,*\s*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')

#: Sends a request: method, URL, headers, body → status, body (at most the given bytes).
Fetch = Callable[[str, str, Mapping[str, str], bytes | None, int], tuple[int, bytes]]


@dataclass(frozen=True)
class Challenge:
    """One challenge of a ``WWW-Authenticate`` header; names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """Reads a ``WWW-Authenticate`` header; what does not fit the grammar ends the list."""
    answer: list[Challenge] = []
    at = 0
    header = header[:_HEADER_MAX]
    while (scheme := _SCHEME.match(header, at)) is not None:
        at = scheme.end()
        parameters: dict[str, str] = {}
        while (parameter := _PARAMETER.match(header, at)) is not None:
            at = parameter.end()
            quoted, plain = parameter[2], parameter[3]
            value = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(parameter[1].lower(), value)
        answer.append(Challenge(scheme[1].lower(), parameters))
    return answer


class Authenticator:
    """The ``Authorization`` headers for one registry. Tokens are kept for each scope."""

    def __init__(self, host: str, *, plain_http: bool, fetch: Fetch, services: TokenServices | None = None) -> None:
        """*services* are the token services that the user has named."""
        self._host = host
        self._plain_http = plain_http
        self._fetch = fetch
        self._services = services or TokenServices()
        # what was asked for first; and the first token that was asked for
        self._challenge: Challenge | None = None
        self._bearer: Challenge | None = None
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    @property
    def asks(self) -> bool:
        """Whether the registry has asked for credentials."""
        return self._challenge is not None

    def ready(self, scope: str) -> bool:
        """Whether :meth:`header` knows what to say, and need ask nobody."""
        if not self._lock.acquire(blocking=False):
            return False  # somebody asks just now
        try:
            bearer = self._challenge is not None and self._challenge.scheme == "bearer"
            return not bearer or time.monotonic() < self._tokens.get(scope, ("", 0.0))[1]
        finally:
            self._lock.release()

    def header(self, scope: str, credential: Callable[[], Credential | None]) -> str | None:
        """What to send with a request of this *scope*; None before the registry has asked for anything.

        Raises:
            RegistryDenied, RegistryProtocol: the token service refuses, or is none that we trust.
        """
        with self._lock:  # four transfers that begin together need one token
            challenge = self._challenge
            if challenge is None:
                return None
            found = credential()
            if challenge.scheme == "basic" and (found is None or found.identity):
                # no password for it; a token may be had without one
                challenge = self._bearer
                if challenge is None:
                    return None
            if challenge.scheme == "basic":
                assert found is not None
                if self._plain_http and not is_loopback(self._host):
                    raise self._unprotected(self._host)
                return _basic(found)
            token, expires = self._tokens.get(scope, ("", 0.0))
            if time.monotonic() >= expires:
                token, lifetime = self._request_token(challenge, scope, found)
                self._tokens[scope] = (token, time.monotonic() + lifetime)
            return f"Bearer {token}"

    def challenged(self, headers: list[str], scope: str, sent: str | None = None) -> bool:
        """Takes note of a 401 to a request with the header *sent*.

        Whether another try makes sense: whether there is a challenge that we can answer.
        """
        challenges = [challenge for header in headers for challenge in parse_challenges(header)]
        bearers = [one for one in challenges if one.scheme == "bearer" and "realm" in one.parameters]
        usable = [one for one in challenges if one.scheme == "basic" or one in bearers]
        if not usable:
            return False
        with self._lock:
            self._challenge = usable[0]
            self._bearer = next(iter(bearers), None)
        self.forget(scope, sent)
        return True

    def forget(self, scope: str, sent: str | None) -> None:
        """Drops the token that was sent in the header *sent*, unless another transfer has a newer one already.

        It may also be why a connection broke: a registry need not read what it refuses.
        """
        with self._lock:
            if sent is not None and sent == f"Bearer {self._tokens.get(scope, ('', 0.0))[0]}":
                del self._tokens[scope]

    def _request_token(self, challenge: Challenge, scope: str, credential: Credential | None) -> tuple[str, float]:
        realm = challenge.parameters["realm"]
        self._check_realm(realm, credential)
        query = {"service": challenge.parameters.get("service", ""), "scope": scope}
        if credential is not None and credential.identity:
            form = {**query, "grant_type": "refresh_token", "refresh_token": credential.secret, "client_id": "ovms"}
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            status, body = self._fetch("POST", realm, headers, urlencode(form).encode(), _TOKEN_ANSWER_MAX)
        else:
            headers = {} if credential is None else {"Authorization": _basic(credential)}
            # a mount needs two scopes, which every service takes as two parameters
            pairs = [("service", query["service"])] if query["service"] else []
            pairs += [("scope", one) for one in scope.split(" ") if one]
            joined = f"{realm}{'&' if '?' in realm else '?'}{urlencode(pairs)}"
            status, body = self._fetch("GET", joined, headers, None, _TOKEN_ANSWER_MAX)
        if status in (400, 401, 403):
            raise denied(self._host, scope, has_credential=credential is not None)
        if status != 200:
            raise RegistryProtocol(f"the token service of {self._host} answers with {status}")
        return _read_token(body, self._host)

    def _check_realm(self, realm: str, credential: Credential | None) -> None:
        try:
            parts = urlsplit(realm)
            service, _ = parts.netloc, parts.port
        except ValueError:
            raise RegistryProtocol(f"{self._host} names a token service that is no URL: {shown(realm)!a}") from None
        # who speaks plain text to us anyway may have its token service do the same, beside it
        beside = parts.scheme == "http" and self._plain_http and same_host(service, self._host)
        if not is_host(service) or (parts.scheme != "https" and not beside):
            raise RegistryProtocol(
                f"{self._host} wants credentials sent to {shown(realm)!a}, which is not protected by TLS",
                hint="do not use this registry, or ask its owner",
            )
        if credential is None:
            return
        # a token stands for the password for a while
        for plain, where in ((self._plain_http, self._host), (parts.scheme == "http", service)):
            if plain and not is_loopback(where):
                raise self._unprotected(where)
        if not self._services.trusts(self._host, service):
            raise RegistryDenied(
                f"{self._host} wants its credentials sent to {shown(service)}, which is neither its own host nor beside it",
                hint=f"if that is its token service: {VARIABLE}='{self._host}={shown(service)}'; else do not use this registry",
                registry=self._host,
                token_service=shown(service),
            )

    def _unprotected(self, where: str) -> RegistryDenied:
        return RegistryDenied(
            f"{self._host} asks for credentials, and they would go to {where} without TLS",
            hint=f"use a registry with TLS; ovms sends no credentials in plain text (log out with: ovm logout {self._host})",
        )


def _basic(credential: Credential) -> str:
    pair = f"{credential.username}:{credential.secret}"
    return "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")


def _read_token(body: bytes, host: str) -> tuple[str, float]:
    try:
        answer = strictjson.parse(body, "the token service's answer", max_size=_TOKEN_ANSWER_MAX)
    except JsonInvalid as exc:
        raise RegistryProtocol(f"the token service of {host}: {exc.message}") from exc
    if not isinstance(answer, dict):
        raise RegistryProtocol(f"the token service of {host} does not answer with an object")
    token = answer.get("token") or answer.get("access_token")
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise RegistryProtocol(f"the token service of {host} gives no token")
    lifetime = answer.get("expires_in")
    if not isinstance(lifetime, int | float) or isinstance(lifetime, bool):
        lifetime = _LIFETIME_MIN
    # a little less than it says: the clock runs while the request travels
    return token, min(max(float(lifetime) - 5, _LIFETIME_MIN), _LIFETIME_MAX)


def denied(host: str, scope: str, *, has_credential: bool, said: str = "") -> RegistryDenied:
    """The error for a 401 or 403."""
    what = scope.removeprefix("repository:").rpartition(":")[0] or "its API"
    detail = f": {said}" if said else ""
    if has_credential:
        return RegistryDenied(
            f"{host} refuses access to {what} with the credentials that it was given{detail}",
            hint=f"check the name, the user and the password; log in with: ovm login {host}",
        )
    return RegistryDenied(
        f"{host} refuses access to {what} without credentials{detail}",
        hint=f"check the name (many registries say this of one that does not exist), or log in: ovm login {host}",
    )
