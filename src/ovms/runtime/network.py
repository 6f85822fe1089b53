"""How a VM is connected: what the user asks for, what comes of it on this host, and that nothing of it outlives the VM.

::

    instances/<uuid>/
    ├── network.json            what runs or stands outside the VMM for this VM's network: passt and its fence (processes,
    │                           and the ports that they forward), or a redirect in a network namespace
    ├── network.count           what has passed the fence since the VM started: two 64-bit numbers
    └── resolv.conf             what passt is shown, where the host's would not do

The file is written before the VMM runs, so whoever is killed, the next command finds what is left. Which network fits
which snapshot, and why passt stands behind a fence: ADR 0012.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ovms import fsutil
from ovms.errors import JsonInvalid, OvmsError, SnapshotIncompatible, Unsupported, UsageError
from ovms.lazy import asdict, dataclass, regex
from ovms.process import ProcessId, is_root
from ovms.spec import limits, strictjson
from ovms.vmm.jail import User
from ovms.vmm.model import Network, PortForward, Uplink
from ovms.vmm.protocol import Control

if TYPE_CHECKING:
    from ovms.runtime.passt import Passt

FILE: Final = "network.json"
_COUNT: Final = "network.count"
_NOBODY: Final = 65534
_INTERFACE: Final = regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_HINT: Final = "write none, user, user:passt, user:slirp, tap, tap:NAME, bridge:NAME or netns:PATH[,redirect=NAME]"


class Kind(StrEnum):
    """What a VM's network is made of."""

    PASST = "passt"
    SLIRP = "slirp"
    TAP = "tap"
    BRIDGE = "bridge"
    NETNS = "netns"
    NONE = "none"

    @property
    def forwards(self) -> bool:
        """Whether ports of the host can lead to the guest."""
        return self in (Kind.PASST, Kind.SLIRP)


@dataclass(frozen=True)
class Wanted:
    """What follows ``--network``. Without a kind, it is the user network, whichever program makes it.

    ``name`` is an existing tap device or a bridge, ``path`` a network namespace, ``redirect`` an interface there whose
    traffic is the guest's.
    """

    kind: Kind | None = None
    name: str | None = None
    path: Path | None = None
    redirect: str | None = None

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Reads what follows ``--network``.

        Raises:
            UsageError: not of the form.
        """
        word, colon, rest = text.partition(":")
        if not colon and word in ("none", "user", "tap"):
            return cls(None if word == "user" else Kind(word))
        if word == "user" and rest in (Kind.PASST, Kind.SLIRP):
            return cls(Kind(rest))
        if word in ("tap", "bridge") and colon:
            return cls(Kind(word), name=_interface(rest))
        if word == "netns" and rest:
            path, comma, option = rest.partition(",")
            key, _, name = option.partition("=")
            if path.startswith("/") and "\0" not in path and (not comma or key == "redirect"):
                return cls(Kind.NETNS, path=Path(path), redirect=_interface(name) if comma else None)
        raise UsageError(f"{text[:80]!a} is no network", hint=_HINT)


def _interface(name: str) -> str:
    if not _INTERFACE.fullmatch(name):
        raise UsageError(f"{name[:80]!a} is no name of a network interface", hint="at most 15 letters, digits, . _ -")
    return name


@dataclass(frozen=True)
class Attachment:
    """How an instance is connected: see :class:`Wanted`. What was not asked for is None."""

    kind: Kind
    name: str | None = None
    path: Path | None = None
    redirect: str | None = None

    def __str__(self) -> str:
        what = self.name or (None if self.path is None else str(self.path))
        return str(self.kind) if what is None else f"{self.kind}:{what}"

    @property
    def state(self) -> str:
        """What a snapshot's header calls it; ``user`` alone has a part in the device state."""
        return "user" if self.kind is Kind.SLIRP else str(self.kind)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "kind": str(self.kind),
            "name": self.name,
            "path": None if self.path is None else str(self.path),
            "redirect": self.redirect,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attachment:
        """Raises KeyError, TypeError or ValueError on anything that :meth:`to_json` does not write."""
        path = value["path"]
        return cls(Kind(value["kind"]), value["name"], None if path is None else Path(path), value["redirect"])


def choose(wanted: Wanted, *, state: str | None, ports: Sequence[PortForward]) -> Attachment:
    """What a VM gets on this host.

    Args:
        wanted: what the user asks for.
        state: what the network of the snapshot was that is restored (None: it is booted).
        ports: what is to be forwarded.

    Raises:
        UsageError: ports on a network that forwards none.
        Unsupported: ports on a network that does not forward these.
        ToolMissing: passt is asked for by name, and not installed.
        SnapshotIncompatible: the snapshot does not go with that network.
    """
    if wanted.kind is not None and not wanted.kind.forwards and ports:
        raise UsageError(f"-p needs the user network; {wanted.kind} is asked for", hint="leave out -p or --network")
    if why := why_not(wanted, state):
        raise SnapshotIncompatible(f"the RAM snapshot cannot be restored: {why}", rule="RAM-32")
    kind = _kind(wanted, state)
    check_ports(kind, ports)
    return Attachment(kind, wanted.name, wanted.path, wanted.redirect)


def _kind(wanted: Wanted, state: str | None) -> Kind:
    if wanted.kind not in (None, Kind.PASST):
        return wanted.kind
    if wanted.kind is None and state == "user":
        return Kind.SLIRP
    from ovms.runtime import passt

    if wanted.kind is Kind.PASST:
        passt.find()
    return wanted.kind or (Kind.PASST if passt.installed() else Kind.SLIRP)


def check_ports(kind: Kind, ports: Sequence[PortForward]) -> None:
    """Whether a network forwards these ports.

    Raises:
        Unsupported: it does not.
    """
    if kind is Kind.SLIRP and any(port.ipv6 for port in ports):
        raise Unsupported(
            "QEMU's own user network forwards ports of IPv4 addresses alone", hint="use one, or install passt"
        )


def why_not(wanted: Wanted, state: str | None) -> str | None:
    """Why a snapshot with such a network can't be restored into what is asked for; None when it can."""
    if state != "user" or wanted.kind in (None, Kind.SLIRP):
        return None
    return (
        f"its network was QEMU's own (user:slirp), whose state no other network takes, and {wanted.kind} is asked for; "
        "leave out --network, or take the snapshot on another network"
    )


# --- a start ---------------------------------------------------------------------------------------------------------


@dataclass()
class Link:
    """The outside of a VM's network, made before the VMM starts: what the VMM gets, and what still has to come up."""

    network: Network
    passt: Passt | None = None

    def settle(self) -> None:
        """Waits until all of it works.

        Raises:
            PortInUse, HostError: it does not.
        """
        if self.passt is not None:
            self.passt.settle()


@contextlib.contextmanager
def connected(
    attachment: Attachment,
    ports: tuple[PortForward, ...],
    directory: Path,
    *,
    mac: str,
    user: User | None,
    anew: bool = True,
) -> Iterator[Link]:
    """Makes the outside of a VM's network. What the VMM inherits is closed at the end; on an error all is taken back.

    Args:
        attachment: what is made.
        ports: forwarded by it.
        directory: the instance's.
        mac: the guest's.
        user: whom the VM runs as.
        anew: for a VM that starts: what was counted is of another one.

    Raises:
        HostError, InUse: the host does not have it, or does not let us.
    """
    with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        undo.callback(sweep, directory)
        if anew:
            (directory / _COUNT).unlink(missing_ok=True)
        link = _make(attachment, ports, directory, mac, user, held)
        yield link
        undo.pop_all()


def _make(
    attachment: Attachment,
    ports: tuple[PortForward, ...],
    directory: Path,
    mac: str,
    user: User | None,
    held: contextlib.ExitStack,
) -> Link:
    match attachment.kind:
        case Kind.NONE:
            return Link(Network(Uplink.NONE))
        case Kind.SLIRP:
            return Link(Network(Uplink.SLIRP, ports=ports))
        case Kind.PASST:
            running, fd = _start_passt(ports, directory, mac, user, held)
            return Link(Network(Uplink.STREAM, fd), running)
        case Kind.TAP | Kind.BRIDGE | Kind.NETNS:
            return Link(Network(Uplink.TAP, _open_tap(attachment, directory, held)))


def _start_passt(
    ports: tuple[PortForward, ...], directory: Path, mac: str, user: User | None, held: contextlib.ExitStack
) -> tuple[Passt, int]:
    from ovms.runtime import passt
    from ovms.vmm import watch

    theirs, ours = watch.socket_pair(held)
    count = _count_to(directory, held)
    running = passt.start(ours, ports, directory, mac=mac, user=user or _somebody(), count=count)
    held.callback(running.forget)
    _note(directory, Outside(running.processes, ports))
    return running, theirs


def _count_to(directory: Path, held: contextlib.ExitStack) -> int | None:
    # a VM is none the worse for it that nobody counts
    with contextlib.suppress(OSError):
        fd = os.open(directory / _COUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        held.callback(os.close, fd)
        return fd
    return None


def _somebody() -> User:
    # a VM that is left the user that started it: for root, passt takes nobody
    return User(_NOBODY, _NOBODY) if is_root() else User(os.geteuid(), os.getegid())


def _open_tap(attachment: Attachment, directory: Path, held: contextlib.ExitStack) -> int:
    from ovms.runtime import taps

    own = taps.name_of(directory.name)
    match attachment.kind:
        case Kind.TAP if attachment.name is not None:
            fd = taps.open_existing(attachment.name)
        case Kind.NETNS:
            assert attachment.path is not None
            if attachment.redirect is not None:
                redirect = Redirect(attachment.path, attachment.redirect, own)
                _note(directory, Outside((), (), redirect))
            fd = taps.make_in(attachment.path, own, attachment.redirect)
        case _:
            fd = taps.make(own, attachment.name)
    held.callback(os.close, fd)
    return fd


# --- what is outside -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Redirect:
    """Traffic that is led from an interface of a network namespace into a tap there, and back."""

    path: Path
    interface: str
    tap: str


@dataclass(frozen=True)
class Outside:
    """What runs or stands outside the VMM: the content of ``network.json``."""

    processes: tuple[ProcessId, ...]
    ports: tuple[PortForward, ...]
    redirect: Redirect | None = None


def _note(directory: Path, outside: Outside) -> None:
    redirect = outside.redirect
    value = {
        "processes": [asdict(process) for process in outside.processes],
        "ports": [asdict(port) for port in outside.ports],
        "redirect": None if redirect is None else {**asdict(redirect), "path": str(redirect.path)},
    }
    # it is of no use after a crash of the host
    fsutil.atomic_write(directory / FILE, strictjson.canonical(value), mode=0o600, durable=False)


def outside(directory: Path) -> Outside | None:
    """What is outside the VMM of the instance in *directory*; None when nothing is noted."""
    path = directory / FILE
    try:
        value = strictjson.parse(path.read_bytes(), str(path), max_size=limits.MANIFEST_MAX)
        redirect = value["redirect"]
        return Outside(
            tuple(ProcessId(**process) for process in value["processes"]),
            tuple(PortForward(**port) for port in value["ports"]),
            None if redirect is None else Redirect(Path(redirect["path"]), redirect["interface"], redirect["tap"]),
        )
    except (OSError, JsonInvalid, KeyError, TypeError):
        return None


def left_over(directory: Path) -> bool:
    """Whether something is to be swept when the VMM has ended."""
    return (directory / FILE).exists()


def sweep(directory: Path) -> None:
    """Ends what is outside a VMM that has ended, or is to be connected anew. Nothing there: nothing done."""
    if not left_over(directory):
        return
    found = outside(directory)
    if found is not None:
        for process in reversed(found.processes):  # passt first: its fence reaps it, and ends
            process.kill()
        if found.redirect is not None:
            from ovms.runtime import taps

            with contextlib.suppress(OvmsError):  # the namespace is gone, or an interface of it
                taps.remove_redirect(found.redirect.path, found.redirect.interface, found.redirect.tap)
    (directory / FILE).unlink(missing_ok=True)


# --- a VM that runs --------------------------------------------------------------------------------------------------


def is_broken(attachment: Attachment, ports: tuple[PortForward, ...], directory: Path) -> bool:
    """Whether the network of a living VM is not what it should be: passt died, or a change of ports was broken off."""
    if attachment.kind is not Kind.PASST:
        return False
    found = outside(directory)
    return found is None or found.ports != ports or not all(process.alive() for process in found.processes)


def rewire(control: Control, ports: tuple[PortForward, ...], directory: Path, *, mac: str, user: User | None) -> None:
    """Gives a living VM another passt, with *ports*. Connections through the one before end.

    Raises:
        PortInUse, HostError, VmmError: it failed; the VM has no network then.
    """
    sweep(directory)
    with connected(Attachment(Kind.PASST), ports, directory, mac=mac, user=user, anew=False) as link:
        assert link.network.fd is not None
        control.replace_stream(link.network.fd)
        link.settle()


def figures(attachment: Attachment, directory: Path) -> dict[str, int]:
    """What the guest has sent and received, as far as somebody counts it: in a network inside QEMU, nobody does."""
    match attachment.kind:
        case Kind.NONE:
            sent = received = 0
        case Kind.PASST:
            from ovms.runtime import passt

            try:
                with open(f"{directory}/{_COUNT}", "rb", buffering=0) as file:  # noqa: PTH123 - with every status
                    data = file.read(passt.COUNTS.size)
            except OSError:
                return {}
            # until something has passed, nothing is written
            sent, received = passt.COUNTS.unpack(data) if len(data) == passt.COUNTS.size else (0, 0)
        case Kind.SLIRP:
            return {}
        case _:
            from ovms.runtime import taps

            tap = attachment.name if attachment.kind is Kind.TAP else None
            try:
                sent, received = taps.counts(tap or taps.name_of(directory.name), attachment.path)
            except (OvmsError, OSError, ValueError):  # the namespace is gone, or another one is ours
                return {}
    return {"net_rx_bytes": received, "net_tx_bytes": sent}
