"""Certificates for tests, made by openssl: a CA, servers on loopback, a client."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """A CA of the test's own, whose certificates are good for ``localhost`` and ``127.0.0.1``."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ca = self._paths(name)
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN=ovms test {name}", "-keyout", self.ca.key, "-out", self.ca.cert,
        )  # fmt: skip

    def _paths(self, name: str) -> Pair:
        return Pair(self.directory / f"{name}.crt", self.directory / f"{name}.key")

    def issue(self, name: str, *, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 2) -> Pair:
        """A certificate for *names*, good for servers and clients, for so many *days* (less than none: it has ended)."""
        pair = self._paths(name)
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        _openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-subj", f"/CN={name}", "-keyout", pair.key, "-out", request,
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", request, "-days", days, "-CA", self.ca.cert, "-CAkey", self.ca.key,
            "-CAcreateserial", "-extfile", extensions, "-out", pair.cert,
        )  # fmt: skip
        return pair

    def trust(self, home: Path, host: str, client: Pair | None = None) -> None:
        """Puts the CA, and a client's pair, into ``certs.d`` of the user at *home*."""
        directory = home / ".config/containers/certs.d" / host
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ca.crt").write_bytes(self.ca.cert.read_bytes())
        if client is not None:
            (directory / "client.cert").write_bytes(client.cert.read_bytes())
            (directory / "client.key").write_bytes(client.key.read_bytes())


def server_context(pair: Pair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    return context


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)
