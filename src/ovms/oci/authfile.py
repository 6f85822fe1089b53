"""Credentials are stored where podman and skopeo store them: in the first file that :mod:`ovms.oci.credentials` reads.

The file is replaced whole, with mode 0600, under a lock of ours (podman takes none); what else is in it stays as it was.
Where the file names a credential helper for the host, the helper keeps the secret.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import HostError, InputError
from ovms.oci import credentials
from ovms.oci.credentials import Credential, Credentials

_LOCK_TIMEOUT: Final = 20.0
#: What a login replaces in an entry; whatever else is in it stays.
_OURS: Final = frozenset({"auth", "identitytoken", "username", "password", "registrytoken"})


class AuthFile:
    """The file that logins go to."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        """*environ* is what helpers get (in part)."""
        # a link to where the file is kept for good stays one
        self.path = Path(os.path.realpath(path))
        self._helpers = Credentials((self.path,), environ)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, uid: int | None = None) -> AuthFile:
        """``REGISTRY_AUTH_FILE``, else the one in ``XDG_RUNTIME_DIR`` or ``/run/containers/<uid>``."""
        values = os.environ if environ is None else environ
        return cls(credentials.primary(values, uid), values)

    def get(self, key: str) -> Credential | None:
        """What is stored for ``HOST[:PORT][/PATH]``. Raises like :meth:`Credentials.get`."""
        host, _, repository = key.partition("/")
        return self._helpers.get(host, repository)

    def store(self, key: str, credential: Credential) -> None:
        """Keeps a credential for ``HOST[:PORT][/PATH]``.

        Raises:
            InputError: the file is malformed (it is left alone), or its helper fails.
            HostError: it cannot be written.
            Locked: another ovms writes it.
        """
        with self._changing(create=True) as document:
            auths = self._auths(document)
            if auths is None:
                auths = document["auths"] = {}
            entry = auths.get(key)
            kept = {k: v for k, v in entry.items() if k not in _OURS} if isinstance(entry, dict) else {}
            known = _drop(auths, key)
            name, shared = self._helper(document, key)
            if name is None:
                pair = f"{credential.username}:{credential.secret}".encode()
                kept["auth"] = base64.b64encode(pair).decode("ascii")
            else:
                server, username, secret = credentials.server(key), credential.username, credential.secret
                message = {"ServerURL": server, "Username": username, "Secret": secret}
                self._helpers.run_helper(name, "store", json.dumps(message).encode(), self.path)
            # an empty entry is how Docker notes what its store has; a secret of before goes in any case
            if name is None or shared or known:
                auths[key] = kept

    def erase(self, key: str) -> bool:
        """Forgets the credential for ``HOST[:PORT][/PATH]``. Whether there was one. Raises like :meth:`store`."""
        with self._changing() as document:
            found = _drop(self._auths(document) or {}, key)
            return self._erase_helped(document, key) or found

    def erase_all(self) -> list[str]:
        """Forgets every credential, also those that helpers keep; returns for what. Raises like :meth:`store`."""
        with self._changing() as document:
            auths = self._auths(document) or {}
            gone = dict.fromkeys(credentials.normal(key) for key in auths)
            for key in gone:
                self._erase_helped(document, key)
            helpers = document.get("credHelpers")
            for host in helpers if isinstance(helpers, dict) else ():
                if host not in gone and self._erase_helped(document, host):
                    gone[host] = None
            auths.clear()
            return list(gone)

    def _erase_helped(self, document: Mapping[str, Any], key: str) -> bool:
        name, _ = self._helper(document, key)
        if name is None:
            return False
        server = credentials.server(key).encode()
        if self._helpers.run_helper(name, "get", server, self.path) is None:
            return False
        self._helpers.run_helper(name, "erase", server, self.path)
        return True

    def _helper(self, document: Mapping[str, Any], key: str) -> tuple[Any, bool]:
        """The helper for a key, if any, and whether it is Docker's one for all hosts. Helpers know hosts only."""
        if "/" in key:
            return None, False
        name = credentials.helper(document, key, self.path)
        return (name, False) if name is not None else (document.get("credsStore") or None, True)

    def _auths(self, document: Mapping[str, Any]) -> dict[str, Any] | None:
        auths = document.get("auths")
        if auths is not None and not isinstance(auths, dict):
            raise InputError(f"{self.path}: auths is not an object", path=str(self.path))
        return auths

    @contextmanager
    def _changing(self, *, create: bool = False) -> Iterator[dict[str, Any]]:
        """The document; what was changed in it is written, unless an error comes."""
        path = self.path
        try:
            if not create and not path.exists():
                yield {}
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with fsutil.file_lock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT):
                before = credentials.read(path)
                text = json.dumps(before or {})
                document: dict[str, Any] = json.loads(text)
                yield document
                if json.dumps(document) != text:
                    data = json.dumps(document, indent="\t", ensure_ascii=False).encode() + b"\n"
                    fsutil.sweep_temporaries(path)
                    fsutil.atomic_write(path, data, mode=0o600)
        except OSError as exc:
            raise HostError(
                f"credentials cannot be stored in {path}: {exc.strerror}",
                hint="make its directory writable, or name another file in REGISTRY_AUTH_FILE (or with --authfile)",
                path=str(path),
            ) from exc


def _drop(auths: dict[str, Any], key: str) -> bool:
    """Removes an entry under whatever key it stands. Whether there was one."""
    same = [other for other in auths if credentials.normal(other) == credentials.normal(key)]
    for other in same:
        del auths[other]
    return bool(same)
