"""Who may call: peers on the UNIX socket by what the kernel says of them, others by TLS and a token (RUN-1)."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import hmac
import os
import socket
import ssl
import stat
import struct
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import HostError, InputError, OvmsError, Unauthorized, UsageError
from ovms.lazy import dataclass, field
from ovms.runtime.server.http import HttpError, Request

_UCRED: Final = struct.Struct("iII")
_SO_PEERGROUPS: Final = 59
_GROUPS_MAX: Final = 65536
_TOKEN_MIN: Final = 16
_TOKEN_MAX: Final = 4096


@dataclass(frozen=True)
class Peers:
    """Who may call over the UNIX socket: root, the server's own user, and the members of ``groups``."""

    groups: frozenset[int] = field(default_factory=frozenset)

    def refuse(self, sock: socket.socket) -> OvmsError | None:
        """Why the peer of a connection may not call; None where it may."""
        _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid in (0, os.geteuid()) or gid in self.groups:
            return None
        if self.groups and self.groups & _groups(sock):
            return None
        return Unauthorized(
            f"the user {uid} may not call this server",
            hint="'ovm serve --group GROUP' admits the members of a group",
        )


def _groups(sock: socket.socket) -> set[int]:
    with contextlib.suppress(OSError):
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * 4)
        return {number for (number,) in struct.iter_unpack("I", data)}
    return set()


def group_id(name: str) -> int:
    """The number of a group.

    Raises:
        UsageError: there is none.
    """
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"there is no group {name[:80]!a}") from None


@dataclass(frozen=True)
class TlsFiles:
    """What TCP needs: the server's certificate and key, the token, and whose clients are known (None: not asked)."""

    certificate: Path
    key: Path
    token: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The files as they are now.

        Raises:
            InputError: they are not what they should be.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError, ValueError) as exc:
            files = ", ".join(str(path) for path in (self.certificate, self.key, self.client_ca) if path is not None)
            raise InputError(f"the TLS files ({files}) cannot be used: {exc.strerror or exc}") from exc  # type: ignore[union-attr]
        return context

    def read_token(self) -> bytes:
        """The token as it is now.

        Raises:
            FileProblem, InputError, HostError: there is none that would do.
        """
        with fsutil.open_input(self.token, "the token", max_size=_TOKEN_MAX) as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise HostError(f"{self.token} can be read by others", hint=f"chmod 600 {self.token}")
            token = file.read(_TOKEN_MAX).strip()
        if len(token) < _TOKEN_MIN or not all(0x21 <= byte <= 0x7E for byte in token):
            raise InputError(
                f"the token in {self.token} is none: {_TOKEN_MIN} printable characters or more, without blanks",
                hint="'openssl rand -hex 32' makes one",
            )
        return token


class Gate:
    """Checks connections and requests. What it knows can be replaced while it works."""

    def __init__(self, peers: Peers, token: bytes | None) -> None:
        self.peers = peers
        self.token = token

    def refuse(self, writer: asyncio.StreamWriter) -> OvmsError | None:
        """Why a connection is not taken; None where it is."""
        sock = writer.get_extra_info("socket")
        if sock is None or sock.family != socket.AF_UNIX:
            return None  # each request has to show its token
        try:
            return self.peers.refuse(sock)
        except OSError as exc:
            return Unauthorized(f"the kernel does not say who calls: {exc.strerror}")

    def check(self, request: Request) -> None:
        """Whether a request shows the token that it needs.

        Raises:
            HttpError: 401.
        """
        if not request.remote:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        given = shown.strip().encode("utf-8", "replace")
        # also compared where there is nothing to compare: how long it takes tells nothing
        right = hmac.compare_digest(given, self.token or b"\0")
        if scheme.lower() != "bearer" or not right or self.token is None:
            error = Unauthorized("a bearer token is needed", rule="RUN-1")
            raise HttpError(error, headers={"WWW-Authenticate": 'Bearer realm="ovms"'})
