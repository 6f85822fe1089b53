"""The proxies that the environment names: ``HTTPS_PROXY``, ``HTTP_PROXY``, ``NO_PROXY`` (the lower case comes first).

Go's rules, as podman and skopeo have them: the variable of the URL's scheme decides; ``NO_PROXY`` lists hosts (with all
that lies below them), ``.domains``, addresses and CIDR blocks, each with a port if it is meant for that one, or ``*``.
Nothing that is on loopback goes through a proxy, whatever they say.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from ovms.errors import InputError, Unsupported
from ovms.lazy import dataclass, field
from ovms.oci.realm import is_loopback

_PORTS: Final = {"http": 80, "https": 443}
_HINT: Final = "write it like http://proxy.example:3128"


@dataclass(frozen=True)
class Proxy:
    """A proxy's URL, without the user name and password that it may ask for."""

    url: str
    credentials: str | None = field(default=None, repr=False)


class Proxies:
    """Finds the proxy for a URL."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {
            name: environ.get(name) or environ.get(name.upper()) or ""
            for name in ("https_proxy", "http_proxy", "no_proxy")
        }

    def find(self, url: str) -> Proxy | None:
        """The proxy through which *url* is reached, None where there is none.

        Raises:
            InputError: the variable holds no URL.
            Unsupported: it is no HTTP proxy.
        """
        parts = urlsplit(url)
        name = f"{parts.scheme}_proxy"
        text = self._environ.get(name, "")
        host = parts.hostname or ""
        if not text or is_loopback(parts.netloc) or self._excepted(host, parts.port or _PORTS.get(parts.scheme, 0)):
            return None
        return _parse(text, name.upper())

    def _excepted(self, host: str, port: int) -> bool:
        return any(_fits(entry, host, port) for entry in self._environ["no_proxy"].replace(",", " ").split())


def _fits(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        pass
    try:
        parts = urlsplit(f"//{entry}")
        name, only = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return False
    if only is not None and only != port:
        return False
    name = name.removeprefix("*")
    return bool(name) and (host == name or host.endswith(name if name.startswith(".") else f".{name}"))


def _parse(text: str, variable: str) -> Proxy:
    # the value is in no message: it may hold a password
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{variable} holds no URL of a proxy", hint=_HINT) from None
    if not host:
        raise InputError(f"{variable} holds no URL of a proxy", hint=_HINT)
    if parts.scheme not in _PORTS:
        raise Unsupported(f"{variable} names a proxy that does not speak HTTP", hint=_HINT)
    credentials = None
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    shown = f"[{host}]" if ":" in host else host
    return Proxy(f"{parts.scheme}://{shown}:{port or _PORTS[parts.scheme]}", credentials)
