"""One registry's host: how it is spoken to, and the credentials for it.

TLS is the rule. Plain HTTP is spoken to loopback (unless ``certs.d`` has files for the host, or it turns out to speak
TLS), and where the user has called the registry insecure: there TLS with any certificate comes first, then plain HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import IO, Final, Protocol

from ovms.errors import RegistryDenied, RegistryError, RegistryProtocol, RegistryUnreachable
from ovms.lazy import dataclass, field
from ovms.oci import auth
from ovms.oci.connections import NoneIdle
from ovms.oci.credentials import Credential
from ovms.oci.http import CONNECT_TIMEOUT, READ_TIMEOUT, Answer, Asked, Broken, Transport, origin
from ovms.oci.proxies import Proxies
from ovms.oci.realm import TokenServices, is_loopback, same_host
from ovms.oci.registries import Endpoint
from ovms.oci.tls import Trust

#: Statuses after which another try may go better.
BUSY: Final = frozenset({429, 500, 502, 503, 504})
_PROBE_MAX: Final = 64 * 1024
#: Where Docker Hub's registry is, whose name it is not.
HUB: Final = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}

#: Opens a request's body anew for each attempt.
MakeBody = Callable[[], "bytes | IO[bytes]"]


class Busy(RegistryError):
    """429 or 5xx: another try may go better, after *wait* seconds where the registry says so."""

    def __init__(self, message: str, wait: float | None, *, more: str = "") -> None:
        """*more*: what else can be done."""
        seconds = None if not wait else round(wait)
        hint = ("try again later" if seconds is None else f"try again in {seconds} s") + more
        super().__init__(message, hint=hint, retry_after_s=seconds)
        self.wait = wait


class CredentialSource(Protocol):
    """Where credentials come from."""

    def get(self, host: str, repository: str) -> Credential | None:
        """The credential for a repository of a host, None where there is none."""


@dataclass(frozen=True)
class Settings:
    """What the sessions of one command have in common.

    Attributes:
        tls_verify: what the command line says: None leaves it to the configuration; True asks for TLS everywhere, with
            certificates that are good; False takes any, and plain HTTP.
        plain: whether the configuration allows plain HTTP to a ``host[:port]`` that a registry leads to.
    """

    credentials: CredentialSource | None = None
    proxies: Proxies | None = None
    services: TokenServices = field(default_factory=TokenServices)
    tls_verify: bool | None = None
    plain: Callable[[str], bool] = lambda _host: False
    connect_timeout: float = CONNECT_TIMEOUT
    read_timeout: float = READ_TIMEOUT


class Session:
    """Requests to one host, with what it asks for. Several threads may use it at once."""

    def __init__(self, host: str, settings: Settings, *, trust: Trust | None = None, insecure: bool = False) -> None:
        """Connects to nothing yet. *insecure* allows any certificate there, and plain HTTP."""
        self.host = host
        self._address = HUB.get(host.lower(), host)
        self._settings = settings
        self._insecure = insecure
        self._trust = trust or Trust(self._address, insecure=insecure)
        self._transport = Transport(
            registry=self.host,
            trust=self._trust,
            proxies=settings.proxies,
            plain=self._plain,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )
        self._known: dict[str, Credential | None] = {}
        self._lock = threading.Lock()
        self._auth: auth.Authenticator | None = None
        self._base = ""
        self._guessed = False

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def request(
        self,
        method: str,
        path: str,
        repository: str,
        scope: str,
        headers: Mapping[str, str],
        body: MakeBody | None = None,
    ) -> Answer:
        """Sends a request: *path* below ``/v2/``, or a URL that the registry gave. A challenge is answered.

        Raises:
            RegistryUnreachable, RegistryDenied, RegistryProtocol, Busy: as the registry or its token service met us.
        """
        while True:
            base, authenticator = self._ready()
            url = path if path.startswith(("http://", "https://")) else base + path
            answer = self._exchange(authenticator, method, url, repository, scope, headers, body)
            if not self._guessed or answer.status != 400:
                self._guessed = False
                return answer
            if not self._speaks_tls():
                return answer
            with answer:
                self._use("https")

    def send(self, path: str, repository: str, scope: str) -> Asked | None:
        """Sends a GET, and does not wait for the answer, which may be a challenge; *path* is below ``/v2/``.

        None where it is not known yet how the host is spoken to, or a proxy is in between. Raises as
        :meth:`ovms.oci.http.Transport.send`; also NoneIdle where a token has to be fetched first.
        """
        with self._lock:
            base, authenticator = self._base, self._auth
        if authenticator is None or self._guessed:
            return None

        def header() -> str | None:
            return authenticator.header(scope, lambda: self._credential(repository))

        if not authenticator.ready(scope):
            raise NoneIdle(header)
        authorization = header()
        headers = {} if authorization is None else {"Authorization": authorization}
        return self._noting(self._transport.send(base + path, headers), repository)

    def _noting(self, asked: Asked | None, repository: str) -> Asked | None:
        if asked is None:
            return None
        return asked._replace(
            answer=lambda: self._noted(asked.answer(), repository),
            follow=lambda location: self._noting(asked.follow(location), repository),
        )

    def _noted(self, answer: Answer, repository: str) -> Answer:
        answer.asked, answer.home = self.host, origin(self._base)
        answer.authorized = self._known.get(repository) is not None
        return answer

    def owns(self, url: str) -> bool:
        """Whether a URL that an answer gave leads to this host."""
        try:
            return origin(url) == origin(self._base)
        except ValueError:
            return False  # what is no address is said where it is connected to

    def _exchange(
        self,
        authenticator: auth.Authenticator,
        method: str,
        url: str,
        repository: str,
        scope: str,
        headers: Mapping[str, str],
        body: MakeBody | None,
    ) -> Answer:
        # also below another path, or with the port that goes without saying: some write their addresses so
        ours = self.owns(url)
        for last in (False, True):
            sent = dict(headers)
            authorization = authenticator.header(scope, lambda: self._credential(repository)) if ours else None
            if authorization is not None:
                sent["Authorization"] = authorization
            content = None if body is None else body()
            try:
                answer = self._transport.request(method, url, sent, content)
            except Broken:
                if ours and content:
                    authenticator.forget(scope, authorization)
                raise
            finally:
                if content is not None and not isinstance(content, bytes):
                    content.close()
            self._noted(answer, repository)
            # nobody else's challenge is answered
            if answer.status != 401 or last or not ours or answer.elsewhere:
                return answer
            if not authenticator.challenged(answer.headers("www-authenticate"), scope, authorization):
                return answer
            with answer:  # the rest of it is nobody's
                pass
        raise AssertionError

    def log_in(self, credential: Credential) -> bool:
        """Whether the registry asks for credentials and takes these; False where it asks for none.

        Raises:
            RegistryDenied: it does not take them.
            RegistryError: and its kinds, as for :meth:`request`.
        """
        self._known[""] = credential
        with self.request("GET", "", "", "", {}) as answer:
            base, authenticator = self._ready()
            if answer.status in BUSY:
                raise busy(answer, "its API")
            if answer.status in (401, 403):
                if answer.elsewhere:
                    raise refused_elsewhere(answer, "its API")
                raise auth.denied(self.host, "", has_credential=True)
            if answer.status != 200:
                raise RegistryProtocol(f"{self.host} answers with {answer.status} at {base}: it is no registry")
            return authenticator.asks

    def _plain(self, host: str) -> bool:
        if is_loopback(host) or (self._insecure and same_host(host, self._address)):
            return True
        return not self._settings.tls_verify and self._settings.plain(host)

    # --- how it is spoken to -----------------------------------------------------------------------------------

    def _ready(self) -> tuple[str, auth.Authenticator]:
        with self._lock:
            if self._auth is None:
                self._choose()
            assert self._auth is not None
            return self._base, self._auth

    def _choose(self) -> None:
        if self._insecure:
            self._use(self._try_both())
        elif is_loopback(self.host) and not self._settings.tls_verify and not self._trust.named():
            self._use("http")
            self._guessed = True
        else:
            self._use("https")

    def _use(self, scheme: str) -> None:
        self._base = f"{scheme}://{self._address}/v2/"
        self._auth = auth.Authenticator(
            self._address, plain_http=scheme == "http", fetch=self._fetch, services=self._settings.services
        )

    def _try_both(self) -> str:
        try:
            self._probe("https")
        except RegistryUnreachable as exc:
            try:
                self._probe("http")
            except RegistryUnreachable:
                raise exc from None
            return "http"
        return "https"

    def _probe(self, scheme: str) -> tuple[int, bytes]:
        with self._transport.request("GET", f"{scheme}://{self._address}/v2/", {}) as answer:
            return answer.status, answer.read(_PROBE_MAX)

    def _speaks_tls(self) -> bool:
        # Servers say in plain text that they speak TLS: Go's, nginx and Apache all with this status and this word.
        try:
            status, body = self._probe("http")
        except RegistryError:
            return False
        return status == 400 and b"HTTPS" in body

    # --- credentials -------------------------------------------------------------------------------------------

    def _credential(self, repository: str) -> Credential | None:
        if repository not in self._known:
            source = self._settings.credentials
            self._known[repository] = None if source is None else source.get(self.host, repository)
        return self._known[repository]

    def _fetch(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, limit: int
    ) -> tuple[int, bytes]:
        with self._transport.request(method, url, headers, body) as answer:
            answer.asked, answer.home = self.host, origin(self._base)
            answer.authorized = "Authorization" in headers or body is not None
            if answer.status in BUSY:
                raise busy(answer, "a token")
            return answer.status, answer.read(limit, what="a token")


@dataclass(frozen=True)
class Place:
    """A session, and what the repositories are called there."""

    session: Session
    endpoint: Endpoint


def busy(answer: Answer, what: str) -> Busy:
    """The error for one of the statuses :data:`BUSY`."""
    wait = _seconds(answer.header("retry-after") or "")
    asks = "" if not wait else f", and asks to wait {wait:.0f} s"
    # those who say who they are may often ask for more
    nobody = answer.status == 429 and not answer.authorized and not answer.elsewhere
    more = f"; a login may raise the limit: ovm login {answer.asked}" if nobody else ""
    return Busy(f"{answer.who} answers with {answer.status} to a request for {what}{asks}", wait, more=more)


def refused_elsewhere(answer: Answer, what: str, said: str = "") -> RegistryDenied:
    """The error for a 401 or 403 of a host that the registry sent us to: no login at the registry helps."""
    return RegistryDenied(
        f"{answer.who} refuses access to {what} ({answer.status})" + (f": {said}" if said else ""),
        hint="that host is given no credentials, so a login does not help: try again, else ask the registry's owner",
    )


def _seconds(after: str) -> float | None:
    """What a Retry-After says: seconds, or a date."""
    if after.isascii() and after.isdigit() and len(after) < 13:
        return float(after)
    import email.utils
    from datetime import UTC, datetime

    try:
        return max(0.0, (email.utils.parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return None
