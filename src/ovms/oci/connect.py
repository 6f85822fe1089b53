"""The one place that makes clients for registries, as the user's configuration says.

What counts is told in ``docs/registries.md``: ``registries.conf`` (mirrors, other locations, insecure and blocked
registries), ``certs.d``, the credentials, token services, proxies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ovms.lazy import replace
from ovms.oci.credentials import Credentials
from ovms.oci.proxies import Proxies
from ovms.oci.realm import TokenServices
from ovms.oci.registries import Certificates, Endpoint, Registries, certificates
from ovms.oci.registry import RegistryClient
from ovms.oci.session import HUB, Place, Session, Settings
from ovms.oci.tls import Trust


class Connector:
    """Makes clients. One for each command, so that the configuration is read once."""

    def __init__(
        self,
        settings: Settings,
        registries: Registries | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        system_root: Path = Path("/"),
        say: Callable[[str], None] | None = None,
    ) -> None:
        """*environ* and *system_root* are where ``certs.d`` is looked for; *say* is told of mirrors."""
        self._registries = registries or Registries(())
        self._settings = replace(settings, plain=self._registries.insecure)
        self._environ = os.environ if environ is None else environ
        self._system_root = system_root
        self._say = say
        # shared by the clients of a command: connections, tokens and TLS contexts are
        self._sessions: dict[tuple[str, bool], Session] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        tls_verify: bool | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Connector:
        """With the configuration of the user whose environment this is. *tls_verify* is what the command line says.

        Raises:
            InputError: the configuration is malformed.
        """
        values = os.environ if environ is None else environ
        settings = Settings(
            credentials=Credentials.from_environment(values),
            proxies=Proxies(values),
            services=TokenServices.from_environment(values),
            tls_verify=tls_verify,
        )
        return cls(settings, Registries.from_environment(values), environ=values, say=say)

    def __call__(self, host: str) -> RegistryClient:
        """A client for the registry that names call *host*. It connects to nothing yet."""

        def find(repository: str, *, pull: bool) -> Sequence[Place]:
            answer = []
            for endpoint in self._registries.endpoints(host, repository, pull=pull):
                key = (endpoint.host, endpoint.insecure)
                with self._lock:
                    if key not in self._sessions:
                        self._sessions[key] = self._session(endpoint)
                    answer.append(Place(self._sessions[key], _hub(endpoint, repository)))
            return answer

        return RegistryClient(host, find=find, say=self._say)

    def session(self, host: str) -> Session:
        """The registry itself, whatever its mirrors: to log in to.

        Raises:
            RegistryDenied: the configuration blocks it.
        """
        return self._session(self._registries.host(host))

    def _session(self, endpoint: Endpoint) -> Session:
        verify = self._settings.tls_verify
        insecure = endpoint.insecure if verify is None else not verify
        trust = Trust(endpoint.host, self._certificates, insecure=insecure)
        return Session(endpoint.host, self._settings, trust=trust, insecure=insecure)

    def _certificates(self, host: str) -> Certificates:
        return certificates(host, self._environ, system_root=self._system_root)


def _hub(endpoint: Endpoint, repository: str) -> Endpoint:
    # Docker Hub's own repositories, whose names have one part
    if endpoint.host in HUB and "/" not in endpoint.rewrite(repository):
        return replace(endpoint, prefix_path="library")
    return endpoint
