"""Which token services may see a user's credentials.

A registry names its token service itself, and could name anybody's. Credentials for the registry go there only when the
service is on the registry's own host (whatever the port), on a parent domain of it, or on a sibling: a host that differs
in its first label only, and has two labels or more in common with it. Any other service has to be named by the user, in
``OVMS_TOKEN_SERVICES``. Without credentials a token is asked for wherever the registry says.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from ovms.errors import InputError
from ovms.lazy import regex

VARIABLE: Final = "OVMS_TOKEN_SERVICES"
_SHARED_MIN: Final = 2
#: Strict, so that whoever parses the URL for the connection finds the same host in it.
_HOST_PORT: Final = regex(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(?::([0-9]{1,5}))?")


def is_loopback(host: str) -> bool:
    """Whether ``host[:port]`` can only be this machine."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return False
    return name in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", name) is not None


class TokenServices:
    """The user's word on token services: ``REGISTRY=SERVICE``, each ``HOST[:PORT]``, with blanks or commas between."""

    def __init__(self, text: str = "") -> None:
        """Reads the variable's value.

        Raises:
            InputError: it is malformed.
        """
        self._named: set[tuple[tuple[str, int], tuple[str, int]]] = set()
        for entry in text.replace(",", " ").split():
            registry, equals, service = entry.partition("=")
            try:
                if not equals:
                    raise ValueError
                self._named.add((_split(registry), _split(service)))
            except ValueError:
                raise InputError(
                    f"{VARIABLE}: {entry[:120]!a} is not REGISTRY=SERVICE",
                    hint=f"write it like {VARIABLE}='registry.example=auth.example.net other.example:5000=auth.other.example'",
                ) from None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> TokenServices:
        """What the user whose environment this is has said."""
        return cls(environ.get(VARIABLE, ""))

    def trusts(self, registry: str, service: str) -> bool:
        """Whether credentials for ``registry`` may go to ``service`` (both ``host[:port]``, over TLS)."""
        try:
            own, other = _split(registry), _split(service)
        except ValueError:
            return False
        return same_host(registry, service) or _related(own[0], other[0]) or (own, other) in self._named


def same_host(one: str, other: str) -> bool:
    """Whether both are on one host, whatever the ports. Loopback has many names."""
    if is_loopback(one) and is_loopback(other):
        return True
    try:
        return _split(one)[0] == _split(other)[0]
    except ValueError:
        return False


def is_host(text: str) -> bool:
    """Whether *text* is ``HOST[:PORT]``."""
    return _HOST_PORT.fullmatch(text) is not None


def _split(host: str) -> tuple[str, int]:
    # ValueError where it is no HOST[:PORT]
    match = _HOST_PORT.fullmatch(host)
    if match is None or int(match[2] or 443) > 65535:
        raise ValueError(host)
    return match[1].lower().rstrip(".").strip("[]"), int(match[2] or 443)


def _related(registry: str, service: str) -> bool:
    if _is_address(registry) or _is_address(service):
        return False
    above = registry.split(".")[1:]
    labels = service.split(".")
    return len(above) >= _SHARED_MIN and (labels[1:] == above or _is_parent(labels, above))


def _is_parent(labels: list[str], above: list[str]) -> bool:
    return len(labels) >= _SHARED_MIN and above[-len(labels) :] == labels


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # "127.1" and "0x7f000001" are addresses to some
        return re.fullmatch(r"[0-9.]+|0x[0-9a-f.x]+", host) is not None
    return True
