"""What every VMM is told, and what every VMM answers: plain data, no processes.

Sizes are bytes, times seconds unless a name says otherwise.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from ovms.disk.layers import Layer
from ovms.errors import SnapshotInvalid
from ovms.lazy import asdict, dataclass, field
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.vmm.extras import Extras
from ovms.vmm.jail import Jail


@dataclass(frozen=True)
class AccelChoice:
    """The accelerator that was taken; ``reason`` says why it is not KVM, in one line."""

    accel: Accel
    reason: str | None = None


#: What the port is called that qemu-guest-agent opens.
AGENT_PORT: Final = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class Region:
    """Memory that the host and one guest share: an ivshmem device, by the name that its manifest gives it."""

    name: str
    size: int


@dataclass(frozen=True)
class Machine:
    """The shape of a machine: what a snapshot and the VM that it is restored into must agree on to the letter.

    ``cpu_flags`` are those of the host's processor where the guest sees them (KVM), else empty. ``disk_size`` is the
    size of the disk as the guest sees it, or None without one; ``seed_size`` that of the seed disk. ``agent`` says whether there is a port for the guest's
    agent (a snapshot may be of a machine without). ``regions`` are in their order on the bus.
    """

    machine_type: str
    accel: Accel
    cpu: str
    cpu_flags: tuple[str, ...]
    memory: int
    vcpus: int
    mac: str
    disk_size: int | None
    seed_size: int | None = None
    agent: bool = False
    regions: tuple[Region, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        lists = {"cpu_flags": list(self.cpu_flags), "regions": [asdict(region) for region in self.regions]}
        return {**asdict(self), "accel": str(self.accel), **lists}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Raises :class:`SnapshotInvalid` when a field is missing or of another type."""
        if not isinstance(value, dict):
            raise SnapshotInvalid(f"{where} is not an object")
        accel = _field(value, "accel", str, where)
        if accel not in list(Accel):
            raise SnapshotInvalid(f"{where}.accel is {accel!r:.40}, which is no accelerator")
        flags = _field(value, "cpu_flags", list, where)
        if not all(isinstance(flag, str) for flag in flags):
            raise SnapshotInvalid(f"{where}.cpu_flags is not a list of strings")
        memory, vcpus = _field(value, "memory", int, where), _field(value, "vcpus", int, where)
        if not limits.RAM_MIN <= memory <= limits.RAM_MAX or not 1 <= vcpus <= limits.VCPUS_MAX:
            raise SnapshotInvalid(f"{where}: {memory} bytes of memory and {vcpus} CPUs are out of range")
        disk_size = None if value.get("disk_size") is None else _field(value, "disk_size", int, where)
        seed_size = None if value.get("seed_size") is None else _field(value, "seed_size", int, where)
        return cls(
            _field(value, "machine_type", str, where),
            Accel(accel),
            _field(value, "cpu", str, where),
            tuple(flags),
            memory,
            vcpus,
            _field(value, "mac", str, where),
            disk_size,
            seed_size=seed_size,
            agent=_field(value, "agent", bool, where),
            regions=tuple(
                Region(_field(region, "name", str, where), _field(region, "size", int, where))
                for region in _field(value, "regions", list, where)
            ),
        )


def _field(value: Any, key: str, kind: type, where: str) -> Any:
    item = value.get(key) if isinstance(value, dict) else None
    if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
        raise SnapshotInvalid(f"{where}.{key} is missing or of another type than it should be")
    return item


@dataclass(frozen=True)
class PortForward:
    """A port of the host that leads to one of the guest. ``host_ip`` is an address of IPv4 or IPv6, as :mod:`ipaddress` writes it."""

    host_ip: str
    host_port: int
    guest_port: int
    protocol: str = "tcp"

    def __str__(self) -> str:
        return f"{self.host}->{self.guest_port}/{self.protocol}"

    @property
    def ipv6(self) -> bool:
        """Whether the host's address is one of IPv6."""
        return ":" in self.host_ip

    @property
    def host(self) -> str:
        """Address and port of the host."""
        return f"[{self.host_ip}]:{self.host_port}" if self.ipv6 else f"{self.host_ip}:{self.host_port}"


class Uplink(StrEnum):
    """What the VM's network card is connected to, as the VMM sees it."""

    #: QEMU's own user network (slirp), in its process. The device state of such a VM holds the network's, too.
    SLIRP = "slirp"
    #: A stream socket: frames, each after its length in 32 bits.
    STREAM = "stream"
    #: A tap device.
    TAP = "tap"
    #: Nothing: the card is there, its link is down.
    NONE = "none"


@dataclass(frozen=True)
class Network:
    """How a VM is connected. ``fd`` is the socket or the tap device; ``ports`` are forwarded by the VMM (slirp alone)."""

    uplink: Uplink = Uplink.SLIRP
    fd: int | None = None
    ports: tuple[PortForward, ...] = ()


#: What the memfds are called that hold the memory of snapshots.
TEMPLATE: Final = "ovms-template"


@dataclass(frozen=True)
class Restore:
    """What a VM is restored from: its memory, in an open file of exactly the machine's size, and its device state.

    ``ram`` is the descriptor of a memfd that is sealed against writes; it is mapped privately. ``state`` is in the VMM's
    own form. With ``lock`` none of that memory is swapped out as long as the VM lives.
    """

    ram: int
    state: bytes
    lock: bool = False


@dataclass(frozen=True)
class VmConfig:
    """One VM to start. ``layers`` (base first) are never written to; ``overlay`` takes every write.

    ``kernel`` None means that the firmware boots from the disk. ``regions`` are descriptors, one for each of the machine's.
    """

    name: str
    uuid: str
    machine: Machine
    kernel: Path | None
    initrd: Path | None
    kernel_args: str
    layers: tuple[Layer, ...]
    overlay: Path | None
    network: Network = field(default_factory=Network)
    restore: Restore | None = None
    regions: tuple[int, ...] = ()
    jail: Jail = field(default_factory=Jail)
    #: It is loaded, and stands still until it is resumed (a restore alone).
    parked: bool = False
    #: A program and its arguments that are run, as whoever starts the VM, when it has ended.
    at_end: tuple[str, ...] = ()
    extras: Extras = field(default_factory=Extras)


@dataclass(frozen=True)
class VmFiles:
    """The files of one VM, all in its instance's directory."""

    directory: Path

    #: The control channel's and the console's socket, what the console printed, what the VMM said, its events.
    CONTROL: ClassVar[str] = "qmp.sock"
    CONSOLE: ClassVar[str] = "console.sock"
    AGENT: ClassVar[str] = "agent.sock"
    CONSOLE_LOG: ClassVar[str] = "console.log"
    CONSOLE_INDEX: ClassVar[str] = "console.idx"
    VMM_LOG: ClassVar[str] = "vmm.log"
    EVENTS: ClassVar[str] = "events.out"
    PID: ClassVar[str] = "vmm.pid"
    EXIT: ClassVar[str] = "exit"
    #: Behind the name of a log: what was in it before it was begun anew.
    OLD: ClassVar[str] = ".1"

    @property
    def control(self) -> Path:
        """The socket of the VMM's control channel: one client at a time."""
        return self.directory / self.CONTROL

    @property
    def console(self) -> Path:
        """The socket of the serial console: the watcher lets some clients look and type at once."""
        return self.directory / self.CONSOLE

    @property
    def agent(self) -> Path:
        """The socket of the guest's agent: one client at a time (``ovms.runtime.agent`` sees to it)."""
        return self.directory / self.AGENT

    @property
    def console_log(self) -> Path:
        """What the serial console printed since the VM was started, or since the log was begun anew."""
        return self.directory / self.CONSOLE_LOG

    @property
    def console_index(self) -> Path:
        """When it printed that: pairs of numbers of 64 bits, a byte's number and its time in ns."""
        return self.directory / self.CONSOLE_INDEX

    def old(self, path: Path) -> Path:
        """Where what was in a log goes when it is begun anew."""
        return path.with_name(f"{path.name}{self.OLD}")

    @property
    def vmm_log(self) -> Path:
        """The VMM's own stderr."""
        return self.directory / self.VMM_LOG

    @property
    def events(self) -> Path:
        """The VMM's events, one JSON object a line."""
        return self.directory / self.EVENTS

    @property
    def pid(self) -> Path:
        """The numbers of VMM and watcher, written by the latter: for the case that we die before we can note them."""
        return self.directory / self.PID

    @property
    def exit(self) -> Path:
        """How the VMM ended."""
        return self.directory / self.EXIT


class RunState(StrEnum):
    """What a living VM does."""

    RUNNING = "running"
    PAUSED = "paused"
    #: The guest is gone, or cannot go on; only the VMM is still there.
    HALTED = "halted"


class Ending(StrEnum):
    """How a VM that is no more came to its end."""

    POWERED_OFF = "powered-off"
    PANICKED = "panicked"
    STOPPED = "stopped"
    KILLED = "killed"
    #: The kernel ended the VMM because its cgroup had no memory left.
    OUT_OF_MEMORY = "oom-killed"
    #: The host was rebooted, or lost its power.
    HOST_REBOOTED = "host-rebooted"


@dataclass(frozen=True)
class GuestRam:
    """Where the memory of a paused VM can be read.

    ``file`` is a path to its backing file (below ``/proc``, so it stays valid as long as the VM lives); pages that the
    guest wrote since a restore are not in it when ``private``.
    """

    pid: int
    size: int
    file: Path
    private: bool
