"""Credentials that the user has given to ovms, podman, skopeo or Docker: they share their files.

Searched in this order, as ``containers-auth.json(5)`` has it: ``REGISTRY_AUTH_FILE`` alone where it is set; else
``${XDG_RUNTIME_DIR}/containers/auth.json`` (or ``/run/containers/<uid>/auth.json``),
``${XDG_CONFIG_HOME:-~/.config}/containers/auth.json``, ``${DOCKER_CONFIG:-~/.docker}/config.json``, ``~/.dockercfg``. In
each: the helper that ``credHelpers`` names for the host, and nothing else then; else the entry of ``auths`` with the
longest path; where there is none, or an empty one, ``credsStore``. An empty entry means that this file has none: no
shorter path is tried. Writing is :mod:`ovms.oci.authfile`'s.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovms import fsutil
from ovms.errors import InputError, JsonInvalid, OvmsError, ToolMissing
from ovms.lazy import dataclass, field, regex
from ovms.spec import limits, strictjson

if TYPE_CHECKING:
    from ovms import process

_FILE_MAX: Final = 1 * limits.MIB
_HELPER: Final = regex(r"[A-Za-z0-9_.-]{1,64}")
_HELPER_TIMEOUT: Final = 30.0
#: What a helper may need to find its own store; the rest of the environment stays with us.
_HELPER_ENV: Final = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "DBUS_SESSION_BUS_ADDRESS",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
    "GNUPGHOME",
    "GPG_TTY",
    "DOCKER_CONFIG",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    *(name for proxy in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY") for name in (proxy, proxy.lower())),
)
#: Those of clouds are many, and what their helpers log in with.
_HELPER_ENV_PREFIXES: Final = ("AWS_", "AZURE_", "CLOUDSDK_", "GOOGLE_", "PASSWORD_STORE_")
_IDENTITY_USER: Final = "<token>"
#: Docker Hub has more names than one; the first is what its helpers know it by.
_HUB: Final = ("https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class Credential:
    """A user name and a secret. ``identity`` says that the secret is a refresh token, and no password."""

    username: str
    secret: str = field(repr=False)
    identity: bool = False


class Credentials:
    """Looks credentials up when a registry asks for some."""

    def __init__(self, files: tuple[Path, ...], environ: Mapping[str, str]) -> None:
        """*files* are searched in this order; *environ* is what helpers get (in part)."""
        self._files = files
        self._environ = {
            name: value
            for name, value in environ.items()
            if name in _HELPER_ENV or name.startswith(_HELPER_ENV_PREFIXES)
        }

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, uid: int | None = None) -> Credentials:
        """The files of the user whose environment this is."""
        values = os.environ if environ is None else environ
        if values.get("REGISTRY_AUTH_FILE"):
            return cls((primary(values, uid),), values)
        home = Path(values.get("HOME") or "/")
        return cls(
            (
                primary(values, uid),
                Path(values.get("XDG_CONFIG_HOME") or home / ".config", "containers/auth.json"),
                Path(values.get("DOCKER_CONFIG") or home / ".docker", "config.json"),
                home / ".dockercfg",
            ),
            values,
        )

    def check(self) -> list[Path]:
        """The files that are there, each of which can be read.

        Raises:
            OvmsError: one can't be, or is malformed.
        """
        return [path for path in self._files if read(path) is not None]

    def get(self, host: str, repository: str) -> Credential | None:
        """The credential for a repository, None where there is none. A repository ``""`` stands for the host.

        Raises:
            InputError: a file is malformed, or a helper fails; no secret is in the message.
        """
        for path in self._files:
            document = read(path)
            if document is not None and (found := self._search(path, document, host, repository)) is not None:
                return found
        return None

    def _search(self, path: Path, document: Mapping[str, Any], host: str, repository: str) -> Credential | None:
        if (name := helper(document, host, path)) is not None:
            return self._ask(name, host, path)
        auths: dict[str, Any] = {}
        for key, value in entries(document, path).items():
            if key == normal(key):
                auths[key] = value  # before what Docker wrote as a URL
            else:
                auths.setdefault(normal(key), value)
        for key in _keys(host, repository):
            if key in auths:
                if (found := _decode(auths[key], key, path)) is not None:
                    return found
                break
        store = document.get("credsStore")
        return self._ask(store, host, path) if store else None

    def _ask(self, name: Any, host: str, path: Path) -> Credential | None:
        done = self.run_helper(name, "get", server(host).encode(), path)
        if done is None:
            return None
        program = f"docker-credential-{name}"
        try:
            answer = strictjson.parse(done.stdout, "its answer", max_size=_FILE_MAX)
            username, secret = answer["Username"], answer["Secret"]
        except (JsonInvalid, KeyError, TypeError):
            raise InputError(f"{program} did not answer with a user name and a secret") from None
        if not isinstance(username, str) or not isinstance(secret, str) or not secret:
            return None
        return Credential(username, secret, identity=username == _IDENTITY_USER)

    def run_helper(self, name: Any, verb: str, stdin: bytes, path: Path) -> process.Completed | None:
        """Has the credential helper that *path* names do something; None where it says that it has none.

        Raises:
            InputError: it is no helper, is not installed, or fails.
        """
        if not isinstance(name, str) or not _HELPER.fullmatch(name):
            raise InputError(f"{path}: {str(name)[:80]!a} is no name of a credential helper", path=str(path))
        from ovms import process

        program = f"docker-credential-{name}"
        try:
            done = process.run(
                [self._find(program), verb],
                timeout=_HELPER_TIMEOUT,
                check=False,
                input=stdin,
                env=self._environ,
            )
        except OvmsError as exc:
            # which package has it, we do not know
            hint = f"install {program}, or take it out of that file" if isinstance(exc, ToolMissing) else exc.hint
            raise InputError(f"{path} names the credential helper {name}: {exc.message}", hint=hint) from exc
        if done.returncode != 0:
            # the protocol's only way to say "none": a text
            if b"credentials not found" in done.stdout + done.stderr:
                return None
            raise InputError(f"{program} failed: {_complaint(done)}", path=str(path))
        return done

    def _find(self, program: str) -> Path:
        # on the PATH of the environment that the files come from
        import shutil

        from ovms import process

        found = shutil.which(program, path=self._environ.get("PATH"))
        return Path(found) if found else process.find_tool(program)


def _complaint(done: process.Completed) -> str:
    from ovms import process

    # Errors come by the way that answers come, and a helper may have got as far as that, or repeat what it was given.
    said = process.tail(done.stderr or done.stdout)
    return "what it said may hold a secret, and is not shown" if "{" in said else said


def primary(environ: Mapping[str, str], uid: int | None = None) -> Path:
    """The file that is read first, and the one that a login writes to."""
    if named := environ.get("REGISTRY_AUTH_FILE"):
        return Path(named)
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "containers/auth.json")
    return Path(f"/run/containers/{os.geteuid() if uid is None else uid}/auth.json")


def server(host: str) -> str:
    """What helpers call a registry."""
    return _HUB[0] if host in _HUB else host


def helper(document: Mapping[str, Any], host: str, path: Path) -> Any:
    """What ``credHelpers`` names for the host; None where it names nothing."""
    helpers = _object(document, "credHelpers", path)
    return next((helpers[name] for name in (host, *(_HUB if host in _HUB else ())) if name in helpers), None)


def entries(document: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The entries of ``auths``, by the keys that stand in the file. ``.dockercfg`` holds nothing else."""
    return document if path.name == ".dockercfg" else _object(document, "auths", path)


def read(path: Path) -> Mapping[str, Any] | None:
    """A file's document; None where there is no file, or an empty one.

    Raises:
        InputError: it is malformed.
    """
    try:
        data = fsutil.read_input(path, "the credentials", max_size=_FILE_MAX)
        value = strictjson.parse(data, str(path), max_size=_FILE_MAX)
    except JsonInvalid as exc:
        raise InputError(f"the credentials cannot be read: {exc.message}", path=str(path)) from exc
    except OvmsError as exc:
        if exc.code in ("file-missing", "file-empty") or isinstance(exc.__cause__, NotADirectoryError):
            return None
        raise
    if not isinstance(value, dict):
        raise InputError(f"the credentials in {path} are not an object", path=str(path))
    return value


def _object(document: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} is not an object", path=str(path))
    return value


def normal(key: str) -> str:
    """What a key of ``auths`` stands for: ``HOST[:PORT][/PATH]``. Docker writes some as URLs, whose path says nothing."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, rest = bare.partition("/")
    host = "docker.io" if host in _HUB else host
    rest = rest.rstrip("/")
    return host if bare != key or rest in ("", "v1", "v2") else f"{host}/{rest}"


def _keys(host: str, repository: str) -> Iterator[str]:
    host = normal(host)
    parts = repository.split("/") if repository else []
    for count in range(len(parts), 0, -1):
        yield "/".join((host, *parts[:count]))
    yield host


def _decode(entry: Any, key: str, path: Path) -> Credential | None:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: auths of {key[:80]!a} is not an object", path=str(path))
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return Credential(_IDENTITY_USER, token, identity=True)
    auth = entry.get("auth")
    if auth is None or auth == "":
        # as Docker has it: what others write for it may hold these, and no "auth"
        username, secret = entry.get("username"), entry.get("password")
        if isinstance(username, str) and isinstance(secret, str) and username and secret:
            return Credential(username, secret)
        return None
    try:
        bare = re.sub(r"[\r\n]", "", auth)  # base64(1) breaks lines, and Go minds none
        username, colon, secret = base64.b64decode(bare, validate=True).decode("utf-8").partition(":")
    except (TypeError, ValueError, binascii.Error):
        colon = username = secret = ""
    if not colon:
        raise InputError(f"{path}: the credentials of {key[:80]!a} are not base64 of USER:SECRET", path=str(path))
    # Docker pads secrets with NULs
    return Credential(username, secret.rstrip("\0"))
