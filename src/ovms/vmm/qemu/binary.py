"""Which QEMU is installed, and what it can do; asked once for each binary, and remembered in a cache file."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Final

from ovms import fsutil, process
from ovms.errors import HostError, JsonInvalid, OvmsError
from ovms.lazy import dataclass, regex
from ovms.spec import strictjson

BINARY: Final = "qemu-system-x86_64"
_CACHE_MAX: Final = 256 * 1024
#: Machine types are tied to a version for ever, so the newest ``pc`` is what new VMs get.
_MACHINE: Final = regex(r"^(pc-i440fx-[0-9]+\.[0-9]+)\s", re.MULTILINE)
_VERSION: Final = regex(r"version ([0-9]+\.[0-9]+\.[0-9]+)")


@dataclass(frozen=True)
class QemuBinary:
    """An installed QEMU: ``machines`` are its versioned ``pc`` types, ``default_machine`` is its newest."""

    path: Path
    version: str
    machines: tuple[str, ...]
    default_machine: str
    sandbox: bool


class Cache:
    """A small JSON file of things that are slow to find out. A lost or damaged one costs time, nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str, stamp: str) -> Any:
        """What was put under *key* with the same *stamp*, or None."""
        try:
            value = strictjson.parse(self._path.read_bytes(), str(self._path), max_size=_CACHE_MAX)
        except (OSError, JsonInvalid):
            return None
        item = value.get(key) if isinstance(value, dict) else None
        return item.get("value") if isinstance(item, dict) and item.get("stamp") == stamp else None

    def put(self, key: str, stamp: str, value: Any) -> None:
        """Remembers *value*; does nothing where the file can't be written."""
        try:
            known = strictjson.parse(self._path.read_bytes(), str(self._path), max_size=_CACHE_MAX)
        except (OSError, JsonInvalid):
            known = {}
        if not isinstance(known, dict):
            known = {}
        known[key] = {"stamp": stamp, "value": value}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fsutil.atomic_write(self._path, strictjson.canonical(known), durable=False)


def stamp_of(path: Path) -> str:
    """What changes when another build of the program is installed at *path*."""
    info = path.resolve().stat()
    return f"{path.resolve()}:{info.st_size}:{info.st_mtime_ns}"


def find(cache: Cache) -> QemuBinary:
    """The installed QEMU.

    Raises:
        ToolMissing: there is none; the hint names the package.
        HostError: it does not answer, or has no versioned ``pc`` machine.
    """
    # the program itself: a link to it may lie where the VM's own root has nothing
    path = process.find_tool(BINARY).resolve()
    stamp = stamp_of(path)
    known = _from_cache(path, cache.get("qemu", stamp))
    if known is not None:
        return known
    version = _VERSION.search(process.run([path, "--version"], timeout=20).stdout.decode("utf-8", "replace"))
    listing = process.run([path, "-machine", "help"], timeout=20).stdout.decode("utf-8", "replace")
    machines = sorted(set(_MACHINE.findall(listing)), key=_number)
    if version is None or not machines:
        raise HostError(f"{path} is no QEMU that ovms can use: it has no versioned pc machine")
    found = QemuBinary(path, version[1], tuple(machines), machines[-1], _has_sandbox(path))
    cache.put("qemu", stamp, {"version": found.version, "machines": list(found.machines), "sandbox": found.sandbox})
    return found


def _number(machine: str) -> tuple[int, ...]:
    return tuple(int(part) for part in machine.rpartition("-")[2].split("."))


def _has_sandbox(path: Path) -> bool:
    try:
        return process.run([path, "-sandbox", "on", "-machine", "help"], timeout=20, check=False).returncode == 0
    except OvmsError:
        return False


def _from_cache(path: Path, value: Any) -> QemuBinary | None:
    try:
        machines = tuple(str(m) for m in value["machines"])
        return QemuBinary(path, str(value["version"]), machines, machines[-1], bool(value["sandbox"]))
    except (KeyError, TypeError, IndexError):
        return None
