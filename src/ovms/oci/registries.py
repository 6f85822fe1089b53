"""What the user has told podman and skopeo of registries: ``registries.conf`` and ``certs.d``. Files only, no network.

Sources: ``containers-registries.conf(5)`` (version 2 of the format), ``containers-registries.conf.d(5)`` and
``containers-certs.d(5)``. Unknown keys are ignored, as there.

Short names are not resolved, though ``aliases`` and ``unqualified-search-registries`` are read: a name without a host is
*local* to ovms (see :mod:`ovms.oci.reference`). A search would run whatever VM a stranger has put under that name into
the first registry that has one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import FileProblem, InputError, Problem, RegistryDenied, Unsupported
from ovms.lazy import dataclass, regex
from ovms.oci.http import shown
from ovms.spec import limits
from ovms.spec.document import Reader

#: Of each file, in bytes.
_FILE_MAX: Final = 1 * limits.MIB
#: Of each list in a file; clusters write files with hundreds of mirrors.
_ENTRIES_MAX: Final = 10_000
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_NAME: Final = rf"{_LABEL}(?:\.{_LABEL})*"
_PORT: Final = r"(?::[0-9]{1,5})?"
_HOST: Final = rf"(?:\[[0-9A-Fa-f:]{{2,45}}\]|{_NAME}){_PORT}"
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH: Final = rf"{_COMPONENT}(?:/{_COMPONENT})*"
_HOST_PORT: Final = regex(_HOST)
_LOCATION: Final = regex(rf"{_HOST}(?:/{_PATH})?")
_PREFIX: Final = regex(
    rf"\*\.{_NAME}|(?P<host>{_HOST})(?:/(?P<path>{_PATH})(?P<pin>(?::[\w.-]+)?(?:@[\w:.+-]+)?))?", re.ASCII
)
_USES: Final = ("", "all", "digest-only", "tag-only")
_HINT: Final = "correct the file, or name another one in CONTAINERS_REGISTRIES_CONF; see containers-registries.conf(5)"


@dataclass(frozen=True)
class Endpoint:
    """One place to ask for an artifact.

    Attributes:
        host: ``host[:port]``.
        prefix_path: the path to put before the repository there; mostly ``""``.
        insecure: plain HTTP, and TLS with a certificate of anybody, are allowed there.
        mirror: whether it stands in for the registry that was named.
        digest_only: to be asked by digest, never by tag.
        tag_only: to be asked by tag, never by digest.
        strip_path: what to take off the front of the repository first; mostly ``""``.
    """

    host: str
    prefix_path: str
    insecure: bool
    mirror: bool
    digest_only: bool
    tag_only: bool = False
    strip_path: str = ""

    def rewrite(self, repository: str) -> str:
        """What the repository that :meth:`Registries.endpoints` was asked for is called there."""
        rest = repository.removeprefix(self.strip_path).lstrip("/")
        return "/".join(part for part in (self.prefix_path, rest) if part)

    def serves(self, *, by_digest: bool) -> bool:
        """Whether it may be asked by digest, or else by tag."""
        return not (self.tag_only if by_digest else self.digest_only)


@dataclass(frozen=True)
class Certificates:
    """The files for TLS with one registry: CAs to trust beside the system's, and a client's certificate with its key."""

    ca_files: tuple[Path, ...] = ()
    client_cert: Path | None = None
    client_key: Path | None = None


@dataclass(frozen=True)
class _Mirror:
    location: str
    insecure: bool
    use: str


@dataclass(frozen=True)
class _Table:
    """A ``[[registry]]``. An empty location (with a wildcard only) leaves names as they are."""

    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirrors: tuple[_Mirror, ...]
    source: Path

    @property
    def wildcard(self) -> bool:
        return self.prefix.startswith("*.")

    @property
    def path(self) -> str:
        return self._part("path")

    @property
    def pin(self) -> str:
        """The tag or digest that the prefix ends with."""
        return self._part("pin")

    def _part(self, name: str) -> str:
        match = _PREFIX.fullmatch(self.prefix)
        return (match and match[name]) or ""

    def matches(self, host: str, repository: str) -> bool:
        # No host is another one for its capitals: they must not lead around "blocked".
        host = host.lower()
        if self.wildcard:
            return host.partition(":")[0].endswith(self.prefix[1:].lower())
        if host != self.prefix.partition("/")[0].lower():
            return False
        # An exact match where there is a tag: nothing lies below one.
        inside = not self.pin and repository.startswith(f"{self.path}/")
        return not self.path or repository == self.path or inside

    def endpoint(self, host: str, repository: str, mirror: _Mirror | None) -> Endpoint:
        """Where the location (a mirror's, else the table's own), put in place of the prefix, leads."""
        location = self.location if mirror is None else mirror.location
        where, _, path = (location or host).partition("/")
        port = host.partition(":")[2]
        if self.wildcard and port and ":" not in where:
            where = f"{where}:{port}"  # a wildcard stands for the host's name only, and the rest stays
        strip = self.path
        if not path and strip == repository:
            raise InputError(
                f"{self.source}: the [[registry]] with the prefix {self.prefix} makes {where} of {host}/{repository},"
                " which names no repository",
                hint="let the location name a repository, or the prefix none",
                path=str(self.source),
            )
        if f"/{path}".endswith(f"/{strip}"):  # taken off and put back
            path, strip = path.removesuffix(strip).rstrip("/"), ""
        if mirror is None:
            return Endpoint(where, path, self.insecure, False, False, strip_path=strip)
        only = (mirror.use == "digest-only", mirror.use == "tag-only")
        return Endpoint(where, path, mirror.insecure, True, *only, strip_path=strip)


class Registries:
    """What the configuration says of registries.

    Attributes:
        aliases: short names and the full names that they stand for; ovms itself does not use them.
        unqualified_search_registries: where podman searches for short names; ovms does not.
    """

    aliases: Mapping[str, str]
    unqualified_search_registries: tuple[str, ...]

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads *files*; what a later one says of a prefix or an alias replaces what an earlier one says.

        Raises:
            InputError: a file is malformed, unreadable or larger than 1 MiB. Missing and empty ones are fine.
        """
        self._tables: dict[str, _Table] = {}
        self.unqualified_search_registries = ()
        aliases: dict[str, str] = {}
        for path in files:
            problems: list[Problem] = []
            reader = Reader(_read(path), "$", problems, rule="", text_rule="")
            tables = _read_tables(reader, path)
            aliases.update(_read_aliases(reader))
            search = reader.strings("unqualified-search-registries", _ENTRIES_MAX)
            _refuse_version_1(reader)
            if problems:
                raise _malformed(path, problems)
            self._tables.update(tables)
            if "unqualified-search-registries" in reader.value:
                self.unqualified_search_registries = search
        # an empty one is how a later file removes an alias
        self.aliases = {name: value for name, value in aliases.items() if value}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, *, system_root: Path = Path("/")) -> Registries:
        """The configuration of the user whose environment this is.

        ``CONTAINERS_REGISTRIES_CONF`` alone where it is set; else the user's ``registries.conf`` and
        ``registries.conf.d``; without the former ``/etc/containers/registries.conf``, its ``.d`` and the user's.
        *system_root* is where ``/etc`` is looked for.

        Raises:
            InputError: as for the constructor.
        """
        values = os.environ if environ is None else environ
        if named := values.get("CONTAINERS_REGISTRIES_CONF"):
            # the usual way to say "none", but no regular file
            return cls(() if named == os.devnull else (Path(named),))
        user, system = _user_directory(values), system_root / "etc/containers"
        if _exists(user / "registries.conf"):
            return cls((user / "registries.conf", *_drop_ins(user)))
        return cls((system / "registries.conf", *_drop_ins(system), *_drop_ins(user)))

    def endpoints(self, host: str, repository: str, *, pull: bool) -> list[Endpoint]:
        """Where to pull ``host/repository`` from, in order, or the one place to push it to.

        Only the ``[[registry]]`` with the longest matching prefix counts. For a pull its mirrors come first; whether
        each may be asked says :meth:`Endpoint.serves`. Its location comes last, for a push alone. (podman pushes to
        the name itself, whatever the location.)

        Raises:
            RegistryDenied: the configuration blocks the name.
            InputError: what the configuration makes of the name is none.
            Unsupported: the prefix holds a tag or digest of this very repository.
        """
        table = self._table(host, repository)
        if table is None:
            return [Endpoint(host, "", False, False, False)]
        if table.pin:  # it may block, so it is not passed over
            raise Unsupported(
                f"{table.source}: the prefix {table.prefix} holds a tag or digest, which ovms does not match",
                hint="let the prefix end with the repository",
                path=str(table.source),
            )
        _refuse_blocked(table, f"{host}/{repository}")
        mirrors = table.mirrors if pull else ()
        return [table.endpoint(host, repository, mirror) for mirror in (*mirrors, None)]

    def host(self, host: str) -> Endpoint:
        """The registry itself, whatever its location and mirrors: to log in to.

        Raises:
            RegistryDenied: the configuration blocks all of it.
        """
        table = self._table(host, "")
        if table is not None:
            _refuse_blocked(table, host)
        return Endpoint(host, "", table is not None and table.insecure, False, False)

    def insecure(self, host: str) -> bool:
        """Whether the configuration allows plain HTTP to a host, that of a registry or one that a registry leads to."""
        table = self._table(host, "")
        return table is not None and table.insecure and not table.blocked

    def _table(self, host: str, repository: str) -> _Table | None:
        found = [table for table in self._tables.values() if table.matches(host, repository)]
        # *.example.com is as long as a.example.com, and less exact
        return max(found, key=lambda table: (len(table.prefix), not table.wildcard), default=None)


def _refuse_blocked(table: _Table, name: str) -> None:
    if table.blocked:
        raise RegistryDenied(
            f"{name} is blocked: {table.source} says so of {table.prefix}",
            hint=f"use another registry, or take 'blocked' out of {table.source}",
            path=str(table.source),
        )


def certificates(host: str, environ: Mapping[str, str] | None = None, *, system_root: Path = Path("/")) -> Certificates:
    """The TLS files for ``host[:port]``, out of the first directory that exists.

    Searched are ``certs.d/<host[:port]>`` of the user's ``containers`` directory, of ``/etc/containers`` and of
    ``/etc/docker``: ``*.crt`` are CAs, ``*.cert`` and ``*.key`` of one stem a client's pair. No file is opened.
    *system_root* is where ``/etc`` is looked for.

    Raises:
        InputError: *host* is none; the directory cannot be listed; one half of a pair is missing.
        Unsupported: more than one pair.
    """
    if not _HOST_PORT.fullmatch(host):  # it becomes part of a path
        raise InputError(f"{shown(host)!a} is no HOST[:PORT]", hint="write it like registry.example:5000")
    values = os.environ if environ is None else environ
    for parent in (_user_directory(values), system_root / "etc/containers", system_root / "etc/docker"):
        directory = parent / "certs.d" / host
        with contextlib.suppress(PermissionError):  # Docker often keeps /etc/docker to root; podman passes on, too
            if directory.is_dir():
                return _read_certificates(directory)
    return Certificates()


def _read_certificates(directory: Path) -> Certificates:
    files = _list(directory)
    certs, keys = ({p.stem: p for p in files if p.suffix == suffix} for suffix in (".cert", ".key"))
    for stem in sorted(certs.keys() ^ keys.keys()):
        there = certs.get(stem) or keys[stem]
        missing = there.with_suffix(".key" if stem in certs else ".cert")
        raise InputError(
            f"{there} is half of a pair: there is no {missing.name}",
            hint="put the other half beside it; a CA certificate must end in .crt",
            path=str(there),
        )
    if len(certs) > 1:
        raise Unsupported(
            f"{directory} holds {len(certs)} client certificates, and ovms takes one",
            hint="leave one pair there, or put it into ~/.config/containers/certs.d",
            path=str(directory),
        )
    authorities = tuple(p for p in files if p.suffix == ".crt")
    return Certificates(authorities, *certs.values(), *keys.values())


def _user_directory(environ: Mapping[str, str]) -> Path:
    home = Path(environ.get("HOME") or "/")
    return Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "containers")


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise FileProblem(f"cannot read {path}: {exc.strerror}", hint=_HINT, path=str(path)) from exc
    return True


def _drop_ins(parent: Path) -> list[Path]:
    return [p for p in _list(parent / "registries.conf.d") if p.suffix == ".conf" and not p.is_dir()]


def _list(directory: Path) -> list[Path]:
    """What is in a directory, sorted; nothing where there is none."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        hint = "make it readable for you, or remove it"
        raise FileProblem(f"cannot list {directory}: {exc.strerror}", hint=hint, path=str(directory)) from exc


def _read(path: Path) -> dict[str, Any]:
    try:
        text = fsutil.read_input(path, "the registries' configuration", max_size=_FILE_MAX).decode("utf-8")
        import tomllib

        return tomllib.loads(text)
    except FileProblem as exc:
        if exc.code in ("file-missing", "file-empty") or isinstance(exc.__cause__, NotADirectoryError):
            return {}
        exc.hint = exc.hint or _HINT
        raise
    except UnicodeDecodeError as exc:
        raise InputError(f"{path} is not UTF-8, at offset {exc.start}", hint=_HINT, path=str(path)) from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply", hint=_HINT, path=str(path)) from None
    except ValueError as exc:  # TOMLDecodeError, which names the line, or an integer that Python does not convert
        raise InputError(f"{path} is not TOML: {shown(str(exc))}", hint=_HINT, path=str(path)) from exc


def _malformed(path: Path, problems: list[Problem]) -> InputError:
    text = "; ".join(f"{problem.path.removeprefix('$.')} {problem.message}" for problem in problems)
    return InputError(f"{path}: {shown(text)}", hint=_HINT, path=str(path))


def _read_tables(reader: Reader, source: Path) -> dict[str, _Table]:
    tables: dict[str, _Table] = {}
    locations: dict[str, _Table] = {}
    for child in reader.children("registry", _ENTRIES_MAX):
        table = _read_table(child, source)
        other = locations.setdefault(table.location or table.prefix, table)
        for key in ("insecure", "blocked"):
            if getattr(table, key) != getattr(other, key):
                child.problem(key, f"differs from what another [[registry]] says of {other.location or other.prefix}")
        tables.setdefault(table.prefix, table)  # within one file podman takes the first, too
    return tables


def _read_table(reader: Reader, source: Path) -> _Table:
    location = (reader.string("location", empty=True, check=_check_location) or "").rstrip("/")
    prefix = (reader.string("prefix", empty=True, check=_check_prefix) or "").rstrip("/") or location
    if not reader.value.get("location") and not prefix.startswith("*."):
        reader.problem("location", "is required, unless the prefix is like *.example.com")
    if reader.value.get("pull-from-mirror"):
        reader.problem("pull-from-mirror", "belongs to a mirror, not to the registry")
    by_digest = reader.boolean("mirror-by-digest-only", False)
    return _Table(
        prefix,
        location,
        reader.boolean("insecure", False),
        reader.boolean("blocked", False),
        tuple(_read_mirror(child, by_digest) for child in reader.children("mirror", _ENTRIES_MAX)),
        source,
    )


def _read_mirror(reader: Reader, by_digest: bool) -> _Mirror:
    location = reader.string("location", required=True, check=_check_location) or ""
    use = reader.string("pull-from-mirror", empty=True, check=_check_use) or ""
    if by_digest and use:
        reader.problem("pull-from-mirror", "does not go with the registry's mirror-by-digest-only")
    return _Mirror(location.rstrip("/"), reader.boolean("insecure", False), "digest-only" if by_digest else use)


def _read_aliases(reader: Reader) -> dict[str, str]:
    table = reader.child("aliases")
    return {} if table is None else {name: table.string(name, empty=True) or "" for name in table.value}


def _refuse_version_1(reader: Reader) -> None:
    # A search list we would not use, and old distributions ship one. What is blocked must not be overlooked.
    old = reader.child("registries")
    for key in ("insecure", "block"):
        if old is not None and (section := old.child(key)) is not None and section.value.get("registries"):
            section.problem("registries", "is of version 1 of the format; write a [[registry]] for each")


def _check_location(value: str) -> str | None:
    if not value or _LOCATION.fullmatch(value.rstrip("/")):
        return None
    return f"must be HOST[:PORT][/PATH], without a scheme, not {shown(value)!a}"


def _check_prefix(value: str) -> str | None:
    if not value or _PREFIX.fullmatch(value.rstrip("/")):
        return None
    return f"must be HOST[:PORT][/PATH] or *.HOST, not {shown(value)!a}"


def _check_use(value: str) -> str | None:
    return None if value in _USES else f"must be one of {', '.join(_USES[1:])}, not {shown(value)!a}"
