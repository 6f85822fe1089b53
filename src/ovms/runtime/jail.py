"""Which jail a VM gets on this host: all of it where the host allows that, and what is missing is known and said.

As root each VM has a user of its own, of a range that nothing else uses; otherwise, and as root of a container that knows no such
users, it runs as the user that started it, in a user namespace that knows nobody else. What the parts are for, and what they cost: ADR 0011.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import OvmsError, UsageError
from ovms.lazy import dataclass, field, replace
from ovms.runtime import cgroups
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.vmm import watch
from ovms.vmm.extras import share_name
from ovms.vmm.jail import Jail, Namespace, User
from ovms.vmm.model import Machine, VmFiles
from ovms.vmm.qemu.binary import Cache, stamp_of

#: The first of the users that VMs get, and how many there are: above what distributions hand out to containers.
UID_FIRST: Final = 0x7A00_0000
UID_COUNT: Final = 0x0010_0000
#: Each root directory begins elsewhere among them, so that the VMs of two have different users, too.
_UID_STEP: Final = 0x400
#: Descriptors that a VMM may have open: its disks, sockets and the guest's notifiers.
NOFILE_MAX: Final = 4096
#: Threads: one for each virtual CPU, 64 for block requests, some of its own.
TASKS_SPARE: Final = 192
#: Memory beyond the guest's own: what QEMU needs, and what TCG keeps of translated code.
OVERHEAD: Final = {Accel.KVM: 384 * limits.MIB, Accel.TCG: 1536 * limits.MIB}
_KVM: Final = Path("/dev/kvm")


class Part(StrEnum):
    """A part of the jail that can be left out by ``--security-opt PART=off``."""

    USER = "user"
    NAMESPACES = "namespaces"
    ROOT = "root"
    NETWORK = "network"
    SECCOMP = "seccomp"
    CGROUPS = "cgroups"
    LIMITS = "limits"


@dataclass(frozen=True)
class SecurityOptions:
    """What the user wants looser: the parts that are left out."""

    off: frozenset[Part] = field(default_factory=frozenset)

    @classmethod
    def parse(cls, texts: list[str]) -> SecurityOptions:
        """Reads what follows each ``--security-opt``.

        Raises:
            UsageError: not of the form.
        """
        off: set[Part] = set()
        for text in texts:
            name, equals, value = text.partition("=")
            if name not in list(Part) or not equals or value not in ("on", "off"):
                raise UsageError(
                    f"{text[:80]!a} is no security option",
                    hint=f"write PART=off, where PART is one of {', '.join(Part)}",
                )
            if value == "off":
                off.add(Part(name))
        return cls(frozenset(off))


_ALL: Final = frozenset(Namespace) - {Namespace.NETWORK}


def plan(
    instance_id: str,
    machine: Machine,
    options: SecurityOptions,
    *,
    cache: Cache,
    own_network: bool,
    taken: Container[int],
    place: Path,
    root: bool | None = None,
) -> Jail:
    """The jail for a new VM; its cgroups exist then.

    *own_network*: whether the VM's network comes from outside its process, so that this can do without the host's.
    *taken*: users that other VMs have. *place*: the root directory, by which users are chosen. *root*: whether we can become any user (None: find out).
    """
    is_root = process.is_root() if root is None else root
    can, why_not = able(cache, is_root)
    missing: dict[str, str] = dict(why_not)
    if not is_root and os.geteuid() == 0:
        missing[str(Part.USER)] = "this user namespace has too few users to give each VM one of its own"
    for part in options.off:
        missing[str(part)] = "left out by --security-opt"
    namespaces, own_root = can.namespaces, can.own_root
    if Part.NAMESPACES in options.off:
        namespaces, own_root = frozenset(), False
    if Part.ROOT in options.off:
        own_root = False
    if namespaces and own_network and Part.NETWORK not in options.off:
        namespaces |= {Namespace.NETWORK}
    elif Part.NETWORK not in options.off and Part.NAMESPACES not in options.off:
        missing.setdefault(
            str(Part.NETWORK), "the network is QEMU's own, in its process: passt, where installed, has it outside"
        )
    user: User | None = _user(machine, is_root, taken, place)
    if Part.USER in options.off:
        namespaces -= {Namespace.USER}
        user = None
        if not is_root and namespaces:
            namespaces, own_root = frozenset(), False
            missing[str(Part.NAMESPACES)] = "without a user namespace only root can make others"
    if not is_root and Namespace.USER not in namespaces:
        user = None  # it is whom it runs as anyway
    # what goes with a part that is left out, or that the host does not give, is missing, too
    if not own_root:
        missing.setdefault(str(Part.ROOT), "a root of its own needs namespaces")
    if own_network and Namespace.NETWORK not in namespaces:
        missing.setdefault(str(Part.NETWORK), "a network of its own needs namespaces")
    groups = cgroups.Groups((), {})
    if Part.CGROUPS not in options.off:
        groups = cgroups.make(instance_id, _bounds(machine))
        missing.update({f"cgroup {name}": why for name, why in groups.missing.items()})
    return Jail(
        namespaces=namespaces,
        user=user,
        own_root=own_root,
        seccomp=Part.SECCOMP not in options.off,
        limits={} if Part.LIMITS in options.off else _limits(),
        cgroups=groups.procs,
        missing=missing,
    )


def renew(jail: Jail, instance_id: str, machine: Machine) -> Jail:
    """The same jail for another VM of the same instance: its cgroups are made anew, so that they tell of this one."""
    return replace(jail, cgroups=cgroups.make(instance_id, _bounds(machine)).procs) if jail.cgroups else jail


def allow_frozen(jail: Jail, machine: Machine) -> None:
    """Lets a VM have its memory twice: as it was when it was frozen, and what the guest writes from then on."""
    cgroups.allow_memory([procs.parent for procs in jail.cgroups], _bounds(machine).memory + machine.memory)


def _bounds(machine: Machine) -> cgroups.Limits:
    memory = machine.memory + sum(region.size for region in machine.regions) + OVERHEAD[machine.accel]
    return cgroups.Limits(memory, machine.vcpus + TASKS_SPARE)


def _limits() -> Mapping[int, int]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = NOFILE_MAX if most == resource.RLIM_INFINITY else min(NOFILE_MAX, most)
    return {resource.RLIMIT_NOFILE: files, resource.RLIMIT_CORE: 0}


def users_of(place: Path) -> Iterator[int]:
    """The users for VMs of a root directory, in the order in which they are given."""
    info = place.stat()
    begin = (info.st_dev * 31 + info.st_ino) * _UID_STEP
    return (UID_FIRST + (begin + number) % UID_COUNT for number in range(UID_COUNT))


def _user(machine: Machine, is_root: bool, taken: Container[int], place: Path) -> User:
    if not is_root:
        return User(os.geteuid(), os.getegid())
    uid = next(uid for uid in users_of(place) if uid not in taken)
    if machine.accel is Accel.KVM:
        info = _KVM.stat()
        if info.st_mode & 0o006 != 0o006:
            return User(uid, info.st_gid)  # the group that may open it
    return User(uid, uid)


# --- what the host allows --------------------------------------------------------------------------------------------


def able(cache: Cache, is_root: bool) -> tuple[Jail, Mapping[str, str]]:
    """The namespaces and the root that this host lets us make, tried for real once each boot."""
    stamp = f"{process.boot_id()}:{os.geteuid()}:{int(is_root)}:{stamp_of(watch.PROGRAM)}"
    known = cache.get("jail", stamp)
    for level, jail in enumerate(_levels(is_root)):
        if isinstance(known, dict) and known.get("level") == level:
            return jail, {str(k): str(v) for k, v in known["missing"].items()}
    missing: dict[str, str] = {}
    for level, jail in enumerate(_levels(is_root)):
        reason = probe(jail)
        if reason is None:
            cache.put("jail", stamp, {"level": level, "missing": missing})
            return jail, missing
        missing[str(Part.NAMESPACES if level else Part.USER if is_root else Part.NAMESPACES)] = reason
        if not jail.namespaces:
            break
    return Jail(), missing


def _levels(is_root: bool) -> list[Jail]:
    user = User(UID_FIRST + UID_COUNT - 1, UID_FIRST + UID_COUNT - 1) if is_root else User(os.geteuid(), os.getegid())
    whole = Jail(_ALL | {Namespace.NETWORK}, user, own_root=True)
    without_user = replace(whole, namespaces=whole.namespaces - {Namespace.USER})
    levels = [whole, *([without_user] if is_root else []), Jail(frozenset(), user if is_root else None)]
    return [replace(jail, namespaces=jail.namespaces - {Namespace.NETWORK}) for jail in levels]


def probe(jail: Jail, share: Path | None = None) -> str | None:
    """Why a program can't be run in *jail* on this host, with the directory *share* to write to; None when it can."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ovms-jail-") as scratch:
        files = VmFiles(Path(scratch))
        try:
            watched = run(jail, files, ("/usr/bin/true",), share)
        except OvmsError as exc:
            return exc.message
        watched.watcher.wait(5.0)
        return None


def run(jail: Jail, files: VmFiles, argv: Sequence[str], share: Path | None = None) -> watch.Watched:
    """Starts a program of the system in *jail*, for a look at what it gives."""
    with ExitStack() as held:
        listen = held.enter_context(fsutil.listen_unix(files.console))
        _, console = watch.socket_pair(held)
        _, events = watch.socket_pair(held)
        shares = dict[str, tuple[int, Path]]()
        if share is not None:
            fd = os.open(share, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, fd)
            shares[share_name(0)] = (fd, share.resolve())
        return watch.start(watch.Launch(argv, [], console, listen.fileno(), events, shares=shares), jail, files)
