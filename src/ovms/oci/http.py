"""HTTP to one registry: connections, redirects, and errors of ours in place of everybody else's.

An answer is read through :class:`Answer`, which never gives more than is asked for. No ``Authorization`` follows a redirect
to another host, no redirect leads from TLS to plain text, and none to plain text where that may not be spoken. What TLS
trusts is :mod:`ovms.oci.tls`'s matter, and which proxy is used :mod:`ovms.oci.proxies`'.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, Self
from urllib.parse import urljoin, urlsplit

from ovms.errors import OvmsError, RegistryProtocol, RegistryUnreachable
from ovms.oci.connections import AddressInvalid, Connections, Release, RequestInvalid, Response
from ovms.oci.realm import is_loopback
from ovms.text import printable

if TYPE_CHECKING:
    import ssl

    import urllib3

    from ovms.oci.proxies import Proxies, Proxy
    from ovms.oci.tls import Trust

CONNECT_TIMEOUT: Final = 10.0
READ_TIMEOUT: Final = 60.0
#: A body that brings less than so many bytes a second, over so many seconds of waiting for it, is broken off.
RATE_MIN: Final = 1024
RATE_WINDOW: Final = 30.0
#: Seconds that a document (a manifest, a list, a token) may take in all.
DOCUMENT_TIME: Final = 60.0
#: Seconds that the rest of a body which nobody wants may take; after that the connection is given up.
_DRAIN_TIME: Final = 1.0
#: Seconds after which what has come is handed on, though there is room for more.
_HAND_ON: Final = 0.2
REDIRECTS_MAX: Final = 5
#: The largest lever on speed: 256 KiB beat 1 MiB by half when measured.
BUFFER: Final = 256 * 1024
_SHOWN_MAX: Final = 300
_OWN_PORTS: Final = {"http": ":80", "https": ":443"}
_ASTRAY: Final = "it may be no registry, or what lies between (a proxy, a firewall) changes what it says"
#: Statuses that lead elsewhere.
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class Refused(RegistryUnreachable):
    """Nobody listens there. Trying again helps only where something is just being started."""


class Broken(RegistryUnreachable):
    """The connection broke, timed out, or carried nonsense: another try may go better."""


class NoTls(RegistryUnreachable):
    """No TLS connection, and another try would go no better."""


class Answer:
    """A status, headers, and a body that is read in pieces. Use it as a context manager."""

    def __init__(self, response: Response, url: str, release: Release) -> None:
        """*release* is called once, at the end, and told whether the connection can be used again."""
        self._response = response
        self._release = release
        self.url = url
        self.status = response.status
        #: The registry that was asked, its scheme and host, and whether credentials of the user stood behind the request.
        self.asked = host_of(url)
        self.home = origin(url)
        self.authorized = False

    @property
    def elsewhere(self) -> bool:
        """Whether another host answered than the registry: one that it sent us to, and that got no credentials."""
        return origin(self.url)[1] != self.home[1]

    @property
    def who(self) -> str:
        """Who answered, for messages."""
        if not self.elsewhere:
            return f"the registry {self.asked}"
        return f"{host_of(self.url)}, where the registry {self.asked} sends us,"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        again = False
        try:
            again = kind is None and (self._response.isclosed() or (self._small() and self._drained()))
        finally:
            with contextlib.suppress(OSError):
                self._release(again)

    def _drained(self) -> bool:
        buffer = memoryview(bytearray(16 * 1024))
        pace = _Pace(self.url, _DRAIN_TIME)
        try:
            self._patient(_DRAIN_TIME)
            while self._read_into(buffer, pace):
                pass
        except (RegistryUnreachable, OSError, ValueError):
            return False
        return True

    def _patient(self, seconds: float) -> None:
        # The socket's own time limit, which the next request on it sets anew.
        sock = self._response.sock
        if sock is not None and (sock.gettimeout() or seconds + 1) > seconds:
            sock.settimeout(seconds)

    def _small(self) -> bool:
        # What is left of a small body is read, so that the connection can be used again.
        length = self.length()
        return length is not None and length <= BUFFER

    def header(self, name: str) -> str | None:
        """A header's value."""
        values = self._response.get_all(name)
        return ", ".join(values) if values else None

    def headers(self, name: str) -> list[str]:
        """Every value of a header that may come several times."""
        return self._response.get_all(name)

    def length(self) -> int | None:
        """What Content-Length says, None where it says nothing, or nothing that counts: a body in chunks has another end."""
        text = self.header("content-length")
        if text is None or self._response.chunked or not (text.isascii() and text.isdigit() and len(text) < 20):
            return None
        return int(text)

    def chunks(self, seconds: float | None = None, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The body, as it comes, all in one buffer: a piece is overwritten when the next is asked for.

        *buffer* is that buffer, where the caller has a reason to make it.

        Raises:
            Broken: it ends too early, stalls, comes slower than :data:`RATE_MIN`, takes more than *seconds* in all (of
                waiting for it), or the connection breaks.
        """
        length = self.length()
        buffer = buffer or memoryview(bytearray(BUFFER if length is None else max(1, min(BUFFER, length))))
        received = 0
        pace = _Pace(self.url, seconds)
        with _translated(self.url, reached=True):
            self._patient(RATE_WINDOW)
            while count := self._read_into(buffer, pace):
                received += count
                yield buffer[:count]
        if length is not None and received < length:
            raise _broken_off(self.url, "the connection was closed too early")

    def _read_into(self, buffer: memoryview, pace: _Pace) -> int:
        # not read, which allocates and copies each piece: a sixth of a pull's processor time. Nothing is ever decoded.
        filled, began = 0, pace.waited
        # not readinto, which comes back when the buffer is full, however long that takes
        while filled < len(buffer) and pace.waited - began < _HAND_ON:
            with pace:
                count = self._response.read_some(buffer[filled:])
            if not count:
                break
            filled += count
            pace.received(count)
        return filled

    def read(self, limit: int, seconds: float = DOCUMENT_TIME, *, what: str = "a document") -> bytes:
        """The whole body, of a document that is small; *what* was asked for.

        Raises:
            RegistryProtocol: it has more than *limit* bytes.
            Broken: as for :meth:`chunks`.
        """
        body = bytearray()
        for data in self.chunks(seconds):
            body += data
            if len(body) > limit:
                raise RegistryProtocol(
                    f"{self.who} answers with more than {limit} bytes to a request for {what}",
                    hint="check the name: no such document may be that large; what lies between may have sent it",
                    limit=limit,
                )
        return bytes(body)


class Asked(NamedTuple):
    """A request whose answer is still to come.

    Attributes:
        fileno: the descriptor that can be read when something comes.
        take: what came then of a blob of so many bytes: the blob when it is whole, else None. Raises
            :class:`ovms.oci.plain.Unlike` where *answer* has to read it, and as :meth:`Transport.request`.
        answer: waits for it; to be called once. Raises as :meth:`Transport.request`; a redirect is an answer.
        follow: sends the same to where a redirect leads, given its Location, under the rules of :meth:`Transport.request`; raises
            as :meth:`Transport.send`.
        close: what to call instead where nobody wants it any more.
    """

    fileno: int
    take: Callable[[int], bytes | None]
    answer: Callable[[], Answer]
    follow: Callable[[str | None], Asked | None]
    close: Callable[[], None]


class _Pace:
    """Watches how fast a body comes. Used as a context manager around each wait for bytes: no other time counts."""

    def __init__(self, url: str, seconds: float | None) -> None:
        self._url = url
        self._seconds = seconds
        self._since = self._window = 0.0
        self._bytes = 0
        self.waited = 0.0

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.waited += time.monotonic() - self._since

    def received(self, amount: int) -> None:
        """*amount* bytes have come. Raises Broken where that is too little, or too late."""
        self._bytes += amount
        if self._seconds is not None and self.waited > self._seconds:
            raise _broken_off(self._url, f"a document takes more than {self._seconds:.0f} s")
        if self.waited - self._window >= RATE_WINDOW:
            if self._bytes < RATE_MIN * RATE_WINDOW:
                raise _broken_off(self._url, f"less than {RATE_MIN} bytes a second come")
            self._window, self._bytes = self.waited, 0


class Transport:
    """Connections, kept open and used again; several threads may use them at once."""

    def __init__(
        self,
        *,
        registry: str = "the registry",
        trust: Trust | None = None,
        proxies: Proxies | None = None,
        plain: Callable[[str], bool] = is_loopback,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
    ) -> None:
        """*registry* is who leads to the URLs. Without *trust* the system's CAs count; without *proxies* there are none.

        *plain* says of a ``host[:port]`` whether plain HTTP may be spoken to it.
        """
        self._registry = registry
        self._plain = plain
        self._trust = trust
        self._proxies = proxies
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._connections = Connections(connect_timeout, read_timeout)
        self._proxied: dict[tuple[ssl.SSLContext | None, Proxy], urllib3.ProxyManager] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections that are kept."""
        self._connections.close()
        with self._lock:
            for pool in self._proxied.values():
                pool.clear()
            self._proxied.clear()

    def _context(self, url: str) -> ssl.SSLContext | None:
        parts = urlsplit(url)
        if parts.scheme != "https":
            return None
        from ovms.oci.tls import Trust

        with self._lock:
            self._trust = self._trust or Trust(parts.netloc)
        return self._trust.context(parts.netloc)

    def _through(self, proxy: Proxy, context: ssl.SSLContext | None) -> urllib3.ProxyManager:
        # urllib3 speaks to proxies for us, also to those that want TLS; it takes its time to import.
        import urllib3

        with self._lock:
            if (context, proxy) not in self._proxied:
                # Where no certificate is checked, the user has said so: urllib3 need not warn of every request.
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
                credentials = proxy.credentials
                manager = self._proxied[context, proxy] = urllib3.ProxyManager(
                    proxy.url,
                    proxy_headers=None if credentials is None else urllib3.make_headers(proxy_basic_auth=credentials),
                    retries=False,
                    timeout=urllib3.Timeout(connect=self._connect_timeout, read=self._read_timeout),
                    maxsize=8,
                    blocksize=BUFFER,
                    ssl_context=context,
                )
                manager.pool_classes_by_scheme = _pools()
            return self._proxied[context, proxy]

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | IO[bytes] | None = None
    ) -> Answer:
        """Sends one request, and follows the redirects of a GET or HEAD.

        Raises:
            Refused, Broken: no answer came.
            RegistryProtocol: *url* or a redirect leads nowhere that we go; plain HTTP to just anybody is such a place.
        """
        self._check_plain(url, self._registry)
        sent = dict(headers)
        for _ in range(REDIRECTS_MAX + 1):
            answer = self._send(method, url, sent, body)
            if method not in ("GET", "HEAD") or answer.status not in REDIRECTS:
                return answer
            with answer:
                target = next_url(url, answer.header("location"))
            self._check_plain(target, host_of(url))
            sent = _without_secrets(sent, url, target)
            url = target
        raise RegistryProtocol(f"{host_of(url)} redirects more than {REDIRECTS_MAX} times", hint=_ASTRAY)

    def send(self, url: str, headers: Mapping[str, str], *, sender: str | None = None, hops: int = 0) -> Asked | None:
        """Sends a GET, and waits for nothing; None where a proxy is in between.

        *sender* is who leads to the URL, after so many *hops*.

        Raises:
            ovms.oci.connections.NoneIdle: there is no connection yet.
            RegistryUnreachable, RegistryProtocol: as :meth:`request`.
        """
        if hops > REDIRECTS_MAX:
            raise RegistryProtocol(f"{host_of(url)} redirects more than {REDIRECTS_MAX} times", hint=_ASTRAY)
        self._check_plain(url, sender or self._registry)
        with _translated(url):
            if self._proxies is not None and self._proxies.find(url) is not None:
                return None
            sent = self._connections.send(url, headers, self._context(url))

        def answer() -> Answer:
            with _translated(url):
                response, release = sent.read()
            return Answer(response, url, release)

        def take(size: int) -> bytes | None:
            with _translated(url, reached=True):
                return sent.take(size)

        def follow(location: str | None) -> Asked | None:
            target = next_url(url, location)
            return self.send(target, _without_secrets(headers, url, target), sender=host_of(url), hops=hops + 1)

        return Asked(sent.fileno, take, answer, follow, sent.close)

    def _check_plain(self, url: str, sender: str) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise RegistryProtocol(f"{shown(url)!a} is no address") from None
        if parts.scheme != "http" or self._plain(parts.netloc):
            return
        host = host_of(url)
        raise RegistryProtocol(
            f"{sender} sends us to {host} in plain HTTP, which is spoken to loopback only, and where it is allowed",
            hint=f"allow it with 'insecure = true' for {host} in registries.conf, or let the registry use TLS there",
        )

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | IO[bytes] | None) -> Answer:
        with _translated(url):
            context = self._context(url)
            proxy = None if self._proxies is None else self._proxies.find(url)
            if proxy is None:
                response, release = self._connections.request(method, url, headers, body, context)
                return Answer(response, url, release)
            raw = self._through(proxy, context).request(
                method, url, headers=dict(headers), body=body, preload_content=False, redirect=False
            )
            return _answer_through(raw, url)


def _pools() -> dict[str, Any]:
    # urllib3's, whose answers have an end
    from urllib3 import connectionpool

    from ovms.oci.response import Response

    answer = {}
    for scheme, pool in (("http", connectionpool.HTTPConnectionPool), ("https", connectionpool.HTTPSConnectionPool)):
        connection = type("Connection", (pool.ConnectionCls,), {"response_class": Response})
        answer[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})
    return answer


def _answer_through(raw: urllib3.BaseHTTPResponse, url: str) -> Answer:
    def release(again: bool) -> None:
        if again:
            raw.drain_conn()
        else:
            raw.close()
        raw.release_conn()

    return Answer(raw._fp, url, release)  # type: ignore[attr-defined]  # noqa: SLF001 - its own reads copy everything


def origin(url: str) -> tuple[str, str]:
    """Scheme and host of a URL: what credentials belong to. The port is left out where it is the scheme's own."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower().removesuffix(_OWN_PORTS.get(parts.scheme, ""))


def host_of(url: str) -> str:
    """The host of a URL, for messages."""
    try:
        return shown(urlsplit(url).netloc)
    except ValueError:
        return "the registry"


def _without_secrets(headers: Mapping[str, str], url: str, target: str) -> dict[str, str]:
    # what may follow from one to the other
    if origin(target) == origin(url):
        return dict(headers)
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def next_url(url: str, location: str | None) -> str:
    """Where a ``Location`` leads, seen from *url*.

    Raises:
        RegistryProtocol: nowhere that we go: no location, another scheme, from TLS to plain text.
    """
    try:
        target = urljoin(url, location or "")
        parts = urlsplit(target)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc
        bad = bad or any(c <= " " or c == "\x7f" for c in target)
    except ValueError:
        target, parts, bad = location or "", urlsplit(""), True
    if not location:
        raise RegistryProtocol(
            f"{host_of(url)} does not say where to go on: its answer has no Location",
            hint=_ASTRAY,
        )
    if bad:
        raise RegistryProtocol(
            f"{host_of(url)} sends us to {shown(str(location))!a}, which is no address", hint=_ASTRAY
        )
    if urlsplit(url).scheme == "https" and parts.scheme == "http":
        raise RegistryProtocol(f"{host_of(url)} sends us from TLS to plain text, at {parts.netloc}", hint=_ASTRAY)
    return target


def shown(text: str) -> str:
    """A stranger's words, short and without control characters."""
    return printable(text, _SHOWN_MAX) + ("…" if len(text) > _SHOWN_MAX else "")


@contextlib.contextmanager
def _translated(url: str, *, reached: bool = False) -> Iterator[None]:
    try:
        yield
    except OvmsError:
        raise
    except AddressInvalid as exc:
        raise RegistryProtocol(f"{shown(url)!a} is no address") from exc
    except RequestInvalid as exc:
        raise RegistryProtocol(f"nothing can be asked of {host_of(url)}: {exc}", hint=_ASTRAY) from exc
    except Exception as exc:
        # what urllib3 raises derives from nothing that is known here, and it is imported for a proxy alone
        if not isinstance(exc, (OSError, ValueError)) and not _no_http(exc) and not _of_urllib3(exc):
            raise
        raise _translate(exc, url, reached=reached) from exc


def _no_http(exc: BaseException) -> bool:
    # what the standard library says of an answer, which it reads only where it has to
    library = sys.modules.get("http.client")
    return library is not None and isinstance(exc, library.HTTPException)


def _of_urllib3(exc: Exception) -> bool:
    return type(exc).__module__.startswith("urllib3.")


def _translate(exc: Exception, url: str, *, reached: bool) -> OvmsError:
    name = type(exc).__name__ if _of_urllib3(exc) else ""
    inner = _innermost(exc)
    if name == "ProxyError":
        # a proxy that refuses (407, 403) does so again
        reason = _reason(exc)
        return (RegistryUnreachable if "failed: 4" in reason else Broken)(
            f"the registry {host_of(url)} cannot be reached through the proxy: {shown(reason)}",
            hint="check HTTPS_PROXY and HTTP_PROXY, or name the registry in NO_PROXY",
        )
    if name in ("LocationValueError", "LocationParseError"):
        return RegistryProtocol(f"{shown(url)!a} is no address")
    if isinstance(inner, ConnectionRefusedError):
        return Refused(
            f"the registry {host_of(url)} cannot be reached: connection refused",
            hint="check the host and the port, and that the registry runs",
        )
    unreachable = _broken_off if reached else _unreachable
    if isinstance(exc, TimeoutError) or name.endswith("TimeoutError"):
        return unreachable(url, "nothing more comes" if reached else "it does not answer in time")
    from ovms.oci import tls

    if (explained := tls.explain(inner, host_of(url))) is not None:
        why, hint = explained
        return NoTls(f"no TLS connection to {host_of(url)}: {shown(why)}", hint=hint)
    if _no_http(inner) and not isinstance(inner, ConnectionError):
        return Broken(
            f"the registry {host_of(url)} answers with what is not HTTP: {shown(_reason(exc))}",
            hint="check the host and the port, and what lies between (a proxy, a firewall)",
        )
    return unreachable(url, _reason(exc))


def _broken_off(url: str, reason: str) -> Broken:
    return Broken(
        f"the registry {host_of(url)} does not get to the end of an answer: {shown(reason)}",
        hint="check the network, and what lies between (a proxy, a firewall); then try again",
    )


def _unreachable(url: str, reason: str) -> Broken:
    return Broken(
        f"the registry {host_of(url)} cannot be reached: {shown(reason)}",
        hint="check the host, the network, and that the registry runs",
    )


def _reason(exc: BaseException) -> str:
    inner = _innermost(exc)
    return str(getattr(inner, "strerror", None) or inner) or type(inner).__name__


def _innermost(exc: BaseException) -> BaseException:
    inner: BaseException = exc
    while (deeper := inner.__cause__ or inner.__context__) is not None and deeper is not inner:
        inner = deeper
    return inner
