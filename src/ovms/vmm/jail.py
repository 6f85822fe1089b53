"""What confines a VMM: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Self

from ovms.lazy import dataclass, field

#: What the user of a VMM, and its group, are called inside its user namespace.
INSIDE: Final = 1000


class Namespace(IntEnum):
    """A kind of namespace, as ``clone(2)`` counts them."""

    MOUNT = 0x00020000
    CGROUP = 0x02000000
    UTS = 0x04000000
    IPC = 0x08000000
    USER = 0x10000000
    PID = 0x20000000
    NETWORK = 0x40000000

    @property
    def proc_name(self) -> str:
        """What it is called in ``/proc/PID/ns``."""
        return {"MOUNT": "mnt", "NETWORK": "net"}.get(self.name, self.name.lower())


@dataclass(frozen=True)
class User:
    """A user and a group, by the numbers that the host has for them."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Jail:
    """How a VMM is confined. What is empty, None or False is not done.

    Attributes:
        namespaces: those that it gets of its own.
        user: whom it runs as.
        own_root: whether it sees a file system of its own (needs the mount and the pid namespace).
        seccomp: whether system calls that no VMM needs are refused.
        limits: resource (``resource.RLIMIT_*``) → value.
        cgroups: ``cgroup.procs`` files that it is entered into.
        missing: what a jail should have and this one has not: part → why.
    """

    namespaces: frozenset[Namespace] = frozenset()
    user: User | None = None
    own_root: bool = False
    seccomp: bool = True
    limits: Mapping[int, int] = field(default_factory=dict)
    cgroups: tuple[Path, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "namespaces": sorted(namespace.name.lower() for namespace in self.namespaces),
            "user": None if self.user is None else {"uid": self.user.uid, "gid": self.user.gid},
            "own_root": self.own_root,
            "seccomp": self.seccomp,
            "limits": {str(resource): value for resource, value in self.limits.items()},
            "cgroups": [str(path) for path in self.cgroups],
            "missing": dict(self.missing),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError on anything that :meth:`to_json` does not write."""
        user = value["user"]
        return cls(
            frozenset(Namespace[name.upper()] for name in value["namespaces"]),
            None if user is None else User(int(user["uid"]), int(user["gid"])),
            bool(value["own_root"]),
            bool(value["seccomp"]),
            {int(resource): int(limit) for resource, limit in value["limits"].items()},
            tuple(Path(path) for path in value["cgroups"]),
            {str(part): str(why) for part, why in value["missing"].items()},
        )
