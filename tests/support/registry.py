"""Real registries on loopback, each with its storage in a directory of the test's own.

:class:`Registry` is Debian's docker-registry, which has no referrers API; :class:`ReferrersRegistry` has it.
"""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ovms.process import terminate
from support import tools
from support.tls import Pair

#: The user "ovms" with the password "secret".
HTPASSWD = "ovms:$2b$05$uwDRgmYX/c2utnTNTYEi0eUV4XvBC8y3JWDrQkQ.n5xI0H0ZNunAS\n"


class Registry:
    """A running docker-registry."""

    _tls: Pair | None = None
    #: Whether it has the referrers API.
    has_referrers = False
    #: Whether it answers with OCI-Subject: then clients write no fallback tag.
    says_subject = False

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
        self._htpasswd = htpasswd
        self._section = auth
        self._tls = tls
        self._client_ca = client_ca
        self._start(directory)

    def _start(self, directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        self.host = f"{'127.0.0.1' if self._tls is None else 'localhost'}:{self.port}"
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _command(self) -> Sequence[str | Path]:
        program = tools.find("docker-registry")
        config = self.directory / "config.yml"
        config.write_text(
            "version: 0.1\nlog: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory / 'data'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}'{_tls(self._tls, self._client_ca)}}}\n"
            + self._section
            + self._auth(self._htpasswd)
        )
        return [program, "serve", config]

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


class ReferrersRegistry(Registry):
    """go-containerregistry's registry (``tests/support/referrers-registry``): it has the referrers API.

    Its list gives a manifest's config type as ``artifactType``, whatever the manifest's own is; it mounts nothing; a range
    without an end is refused.
    """

    has_referrers = True

    def __init__(self, directory: Path, *, oci_subject: bool = True) -> None:
        """Without *oci_subject* it is as its makers left it: it does not say that it takes care of a subject."""
        self.says_subject = oci_subject
        self._start(directory)

    def _command(self) -> Sequence[str | Path]:
        program = tools.find("referrers-registry")
        blobs = self.directory / "data"
        blobs.mkdir()
        subject = str(self.says_subject).lower()
        return [program, f"-listen={self.host}", f"-blobs={blobs}", f"-oci-subject={subject}"]


#: The kinds that tests are parametrised over.
KINDS: Final[dict[str, type[Registry]]] = {"docker-registry": Registry, "referrers-registry": ReferrersRegistry}


def _tls(pair: Pair | None, client_ca: Path | None) -> str:
    if pair is None:
        return ""
    clients = "" if client_ca is None else f", clientcas: ['{client_ca}']"
    return f", tls: {{certificate: {pair.cert}, key: {pair.key}{clients}}}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
