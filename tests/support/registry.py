"""A real registry: Debian's docker-registry, on loopback, with its storage in a directory of the test's own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from ovms.process import terminate
from support.tls import Pair

REPOSITORY = Path(__file__).parents[2]
#: The user "ovms" with the password "secret".
HTPASSWD = "ovms:$2b$05$uwDRgmYX/c2utnTNTYEi0eUV4XvBC8y3JWDrQkQ.n5xI0H0ZNunAS\n"


def find_binary() -> Path:
    """The docker-registry that ``make setup`` unpacked, or an installed one."""
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache")
    for candidate in (os.environ.get("OVMS_DOCKER_REGISTRY"), cache / "tools" / "docker-registry"):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    if found := shutil.which("docker-registry"):
        return Path(found)
    pytest.skip("there is no docker-registry: run 'make setup'")


class Registry:
    """A running registry."""

    def __init__(
        self,
        directory: Path,
        *,
        htpasswd: str | None = None,
        auth: str = "",
        tls: Pair | None = None,
        client_ca: Path | None = None,
    ) -> None:
        """*auth* is a section of its configuration; with *tls* it is called ``localhost``, and may ask for clients'
        certificates."""
        self.directory = directory
        self.port = _free_port()
        self.host = f"{'127.0.0.1' if tls is None else 'localhost'}:{self.port}"
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "config.yml"
        config.write_text(
            "version: 0.1\nlog: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}'{_tls(tls, client_ca)}}}\n" + auth + self._auth(htpasswd)
        )
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [find_binary(), "serve", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _auth(self, htpasswd: str | None) -> str:
        if htpasswd is None:
            return ""
        (self.directory / "htpasswd").write_text(htpasswd)
        return f"auth: {{htpasswd: {{realm: test, path: {self.directory / 'htpasswd'}}}}}\n"

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError((self.directory / "log").read_text()) from None
                time.sleep(0.02)

    def get(self, path: str, accept: str = "*/*") -> bytes:
        request = urllib.request.Request(f"http://{self.host}/v2/{path}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            body: bytes = answer.read()
            return body

    def close(self) -> None:
        terminate(self.process)


def _tls(pair: Pair | None, client_ca: Path | None) -> str:
    if pair is None:
        return ""
    clients = "" if client_ca is None else f", clientcas: ['{client_ca}']"
    return f", tls: {{certificate: {pair.cert}, key: {pair.key}{clients}}}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
