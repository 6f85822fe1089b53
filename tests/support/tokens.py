"""A token service: TLS, and JWTs that Debian's docker-registry checks for itself.

Source: the distribution project's token specification (the handshake, JWT claims, and the key identifier of libtrust).
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from support.tls import Pair, server_context

SERVICE = "ovms test registry"
ISSUER = "ovms test tokens"
#: Seconds that docker-registry adds to a token's end, for clocks that differ.
LEEWAY = 60


@dataclass(frozen=True)
class Asked:
    """A request for a token."""

    method: str
    scopes: tuple[str, ...]
    user: str | None
    status: int


class TokenService:
    """Runs until it is closed. What it was asked is in ``asked``."""

    def __init__(self, directory: Path, tls: Pair, *, host: str = "localhost") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.key = directory / "token.key"
        #: What the registry trusts: its ``rootcertbundle``.
        self.bundle = directory / "token.crt"
        _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tokens",
                 "-keyout", self.key, "-out", self.bundle)  # fmt: skip
        self.kid = _key_id(_openssl("rsa", "-in", self.key, "-pubout", "-outform", "DER"))
        self.users = {"ovms": "secret"}
        self.refresh_tokens = {"refresh-me": "ovms"}
        #: What a user (None: nobody) may do in a repository.
        self.allow: Callable[[str | None, str], set[str]] = lambda user, _repository: (
            {"pull", "push"} if user else set()
        )
        #: Seconds after which the registry no longer takes a token, and what clients are told of it.
        self.lifetime, self.told = 300, 300
        self.asked: list[Asked] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.service = self
        self._server.tls = server_context(tls)
        self.port: int = self._server.server_address[1]
        self.realm = f"https://{host}:{self.port}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def registry_config(self) -> str:
        """The ``auth`` section of a docker-registry's configuration."""
        return (
            f"auth: {{token: {{realm: '{self.realm}', service: '{SERVICE}', issuer: '{ISSUER}',"
            f" rootcertbundle: {self.bundle}}}}}\n"
        )

    def token(self, user: str | None, scopes: tuple[str, ...]) -> str:
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":", 2)
            granted = sorted(self.allow(user, name) & set(actions.split(",")))
            access.append({"type": kind, "name": name, "actions": granted})
        header = {"typ": "JWT", "alg": "RS256", "kid": self.kid}
        claims = {
            "iss": ISSUER,
            "sub": user or "",
            "aud": SERVICE,
            "exp": now - LEEWAY + self.lifetime,
            "nbf": now - 2 * LEEWAY,
            "iat": now,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        signed = f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"
        signature = _openssl("dgst", "-sha256", "-sign", self.key, stdin=signed.encode())
        return f"{signed}.{_encode(signature)}"


class _Server(ThreadingHTTPServer):
    service: TokenService
    tls: ssl.SSLContext
    daemon_threads = True

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self.tls.wrap_socket(request, server_side=True) as connection:
                _Handler(connection, client_address, self)
        except OSError:  # the client does not like our certificate
            pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        user: str | None = None
        refused = False
        if header := self.headers.get("Authorization"):
            name, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
            user, refused = name, self.server.service.users.get(name) != password
        self._answer(parse_qs(urlsplit(self.path).query), user, refused=refused)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        form = parse_qs(body.decode())
        service = self.server.service
        grant = form.get("grant_type", [""])[0]
        user: str | None = None
        if grant == "password":
            name, password = form["username"][0], form["password"][0]
            user = name if service.users.get(name) == password else None
        elif grant == "refresh_token":
            user = service.refresh_tokens.get(form["refresh_token"][0])
        form["scope"] = form.get("scope", [""])[0].split()
        self._answer(form, user, refused=user is None)

    def _answer(self, query: dict[str, list[str]], user: str | None, *, refused: bool) -> None:
        service = self.server.service
        scopes = tuple(query.get("scope", ()))
        status = 401 if refused or query.get("service") != [SERVICE] else 200
        service.asked.append(Asked(self.command, scopes, user, status))
        answer: dict[str, object] = {"errors": [{"code": "UNAUTHORIZED", "message": "no"}]}
        if status == 200:
            token = service.token(user, scopes)
            answer = {"token": token, "access_token": token, "expires_in": service.told}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _key_id(public: bytes) -> str:
    # libtrust's: 240 bits of the SHA-256 of the key, in groups of four base32 digits
    text = base64.b32encode(hashlib.sha256(public).digest()[:30]).decode()
    return ":".join(text[i : i + 4] for i in range(0, len(text), 4))


def _openssl(*arguments: object, stdin: bytes | None = None) -> bytes:
    return subprocess.run(
        ["openssl", *map(str, arguments)], input=stdin, check=True, capture_output=True, timeout=30
    ).stdout
