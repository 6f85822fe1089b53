"""QEMU's command line, from a :class:`~ovms.vmm.model.VmConfig`: pure, no files are touched.

Every device has an address of its own on the bus, and every block node a name: a snapshot restores only into a machine
that is the same to the letter, and a disk layer must never get to name a file by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ovms.lazy import dataclass, field
from ovms.spec.manifest import DiskFormat
from ovms.vmm.extras import BY_9P, BY_VIRTIOFS, ExtraDisk, Share, share_name
from ovms.vmm.model import AGENT_PORT, Machine, Network, PortForward, Region, Uplink, VmConfig
from ovms.vmm.qemu.versions import Since

RAM_ID: Final = "mem0"
DISK_ID: Final = "disk0"
NETDEV_ID: Final = "net0"
AGENT_ID: Final = "agent"
NIC_ID: Final = "nic0"
#: Between the card and a stream there is a hub: so another stream can take the first one's place.
HUB: Final = 0
HUB_PORT_ID: Final = "hub0"
OVERLAY_NODE: Final = "overlay"

_SLOT_RNG: Final = "0x3"
_SLOT_NET: Final = "0x4"
_SLOT_DISK: Final = "0x5"
_SLOT_AGENT: Final = "0x6"
_SLOT_SEED: Final = 0x7
_SLOT_VOLUMES: Final = 0x8
_SLOT_SHARES: Final = 0x18
SEED_ID: Final = "seed"
#: The first slot of the shared memory regions: four to a slot, so that as many as a manifest may have (32) take eight.
_SLOT_REGIONS: Final = 0x10
_REGIONS_A_SLOT: Final = 4
#: The set of descriptors for the device state; those of the disks count from 0.
_STATE_SET: Final = 9999

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Descriptors:
    """File descriptors that QEMU inherits: it opens nothing of ours by name.

    Attributes:
        control: the listening socket of its control channel.
        agent: the listening socket of the channel to the guest's agent.
        console, events: its ends of the socket pairs for the serial console and for its events.
        layers: one for each disk layer, read-only.
        overlay: for the overlay: to write, and to read only (what becomes of it when another takes the writes).
        kernel, initrd: to read.
        ram, state: the memory; on a restore, the device state.
        extras: of the seed disk and the volumes.
        regions: the memory of each of the machine's regions.
        network: what the network card is connected to.
        virtiofs: number of a directory → its end of the socket to that's virtiofsd.
    """

    control: int
    console: int
    events: int
    ram: int
    layers: tuple[int, ...] = ()
    overlay: tuple[int, int] | None = None
    kernel: int | None = None
    initrd: int | None = None
    state: int | None = None
    extras: tuple[int, ...] = ()
    agent: int | None = None
    regions: tuple[int, ...] = ()
    network: int | None = None
    virtiofs: Mapping[int, int] = field(default_factory=dict)

    def all(self) -> list[int]:
        """All of them."""
        ends = (self.control, self.console, self.events, self.agent, self.network)
        one = (*ends, self.kernel, self.initrd, self.ram, self.state)
        many = (*self.layers, *(self.overlay or ()), *self.extras, *self.regions, *self.virtiofs.values())
        return [fd for fd in (*one, *many) if fd is not None]


def build(
    binary: Path, config: VmConfig, fds: Descriptors, *, sandbox: bool, since: frozenset[Since] = frozenset()
) -> list[str]:
    """The whole command line, for a QEMU of the version that *since* tells of."""
    return [
        str(binary),
        *_identity(config),
        *machine_args(config.machine),
        *_memory(config, fds, since),
        *(("-sandbox", SANDBOX) if sandbox else ()),
        *_channels(fds),
        "-device",
        "vmgenid,guid=auto",
        # by which a guest says that it panicked, and ends the VM. It has no state: snapshots without it restore with it, and back
        "-device",
        "pvpanic",
        "-action",
        "panic=shutdown",
        "-object",
        "rng-builtin,id=rng0",
        "-device",
        f"virtio-rng-pci,rng=rng0,addr={_SLOT_RNG}",
        *_network(config.machine.mac, config.network),
        *_disk(config, fds),
        *_agent(fds),
        *_extras(config, fds),
        *_regions(config.machine.regions, fds.regions),
        *_boot(config, fds),
        *_incoming(fds.state, since),
    ]


def _identity(config: VmConfig) -> list[str]:
    return [
        "-name",
        f"guest={escape(config.name)},process=ovms-{config.uuid[:8]}",
        "-uuid",
        config.uuid,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]


def machine_args(machine: Machine) -> list[str]:
    """Machine, CPUs, clock; what a snapshot depends on."""
    return [
        "-machine",
        f"{machine.machine_type},accel={machine.accel},memory-backend={RAM_ID},usb=off,vmport=off,dump-guest-core=off",
        "-cpu",
        machine.cpu,
        "-smp",
        f"cpus={machine.vcpus},sockets=1,cores={machine.vcpus},threads=1",
        "-m",
        f"size={machine.memory // 1024}k",
        "-rtc",
        "base=utc,clock=host",
    ]


def _memory(config: VmConfig, fds: Descriptors, since: frozenset[Since]) -> list[str]:
    # shared by one that boots, so that what is in the file is its memory: see ovms.vmm.freeze
    restored = config.restore is not None
    backend: dict[str, Any] = {"id": RAM_ID, "size": config.machine.memory}
    backend.update({"qom-type": "memory-backend-file", "mem-path": fd_path(fds.ram), "share": not restored})
    if restored and Since.PRIVATE_OF_READONLY in since:
        backend.update({"readonly": True, "rom": "off"})
    return ["-object", json.dumps(backend)]


def fd_path(fd: int | None) -> str:
    """A path by which QEMU opens what it has inherited."""
    assert fd is not None
    return f"/proc/self/fd/{fd}"


def _channels(fds: Descriptors) -> list[str]:
    return [
        "-chardev",
        f"socket,id=control,fd={fds.control},server=on,wait=off",
        "-mon",
        "chardev=control,mode=control",
        "-chardev",
        f"socket,id=events,fd={fds.events}",
        "-mon",
        "chardev=events,mode=control",
        "-chardev",
        f"socket,id=console,fd={fds.console}",
        "-serial",
        "chardev:console",
    ]


def _network(mac: str, network: Network) -> list[str]:
    return [
        *_uplink(network),
        "-device",
        # no option ROM: nothing boots from the network, and it would be one more block in every snapshot
        f"virtio-net-pci,id={NIC_ID},netdev={NETDEV_ID},mac={mac},romfile=,addr={_SLOT_NET}",
    ]


def _uplink(network: Network) -> list[str]:
    match network.uplink:
        case Uplink.SLIRP:
            forwards = "".join(f",hostfwd={forward(port)}" for port in network.ports)
            return ["-netdev", f"user,id={NETDEV_ID}{forwards}"]
        case Uplink.TAP:
            # no virtio headers, no offloads: the guest gets the same card whatever it is connected to
            return ["-netdev", f"tap,id={NETDEV_ID},fd={network.fd},vhost=off"]
        case Uplink.STREAM:
            stream = stream_id(0)
            return [
                "-netdev",
                f"socket,id={stream},fd={network.fd}",
                "-netdev",
                f"hubport,id={HUB_PORT_ID},hubid={HUB},netdev={stream}",
                "-netdev",
                f"hubport,id={NETDEV_ID},hubid={HUB}",
            ]
        case Uplink.NONE:
            return ["-netdev", f"hubport,id={NETDEV_ID},hubid={HUB}"]


def stream_id(number: int) -> str:
    """What the stream of that number is called; the one of a start is 0."""
    return f"stream{number}"


def forward(port: PortForward) -> str:
    """A forward as slirp takes it."""
    return f"{port.protocol}:{port.host_ip}:{port.host_port}-:{port.guest_port}"


def _disk(config: VmConfig, fds: Descriptors) -> Iterator[str]:
    if config.overlay is None:
        return
    assert fds.overlay is not None
    below: str | None = None
    for i, (layer, fd) in enumerate(zip(config.layers, fds.layers, strict=True)):
        node = f"layer{i}"
        yield from _fd_set(i, fd)
        for value in layer_nodes(node, i, layer.format, below=below, read_only=True):
            yield from ("-blockdev", json.dumps(value))
        below = node
    top, number = node_of(config.overlay), len(config.layers)
    for fd in fds.overlay:
        yield from _fd_set(number, fd)
    for value in layer_nodes(top, number, DiskFormat.QCOW2, below=below, read_only=False):
        yield from ("-blockdev", json.dumps(value))
    yield from ("-device", f"virtio-blk-pci,id={DISK_ID},drive={top},addr={_SLOT_DISK},bootindex=1")


def _extras(config: VmConfig, fds: Descriptors) -> Iterator[str]:
    extras, first = config.extras, len(config.layers) + 1
    if extras.seed is not None:
        yield from _extra_disk(SEED_ID, extras.seed, first, _SLOT_SEED)
    for i, disk in enumerate(extras.volumes):
        yield from _extra_disk(f"volume{i}", disk, first + 1 + i, _SLOT_VOLUMES + i)
    for i, share in enumerate(extras.shares):
        end = f"{share.name},addr={_SLOT_SHARES + i:#x}"
        if share.via == BY_VIRTIOFS:
            yield from ("-chardev", f"socket,id=share{i},fd={fds.virtiofs[i]}")
            yield from ("-device", f"vhost-user-fs-pci,id=share{i}-device,chardev=share{i},tag={end}")
            continue
        # what the host's kernel says of the mount QEMU says again. No model: what QEMU makes belongs to whom the mount says
        model = f"security_model=none,readonly={'on' if share.read_only else 'off'},multidevs=remap"
        yield from ("-fsdev", f"local,id=share{i},path=/{share_name(i)},{model}")
        yield from ("-device", f"virtio-9p-pci,id=share{i},fsdev=share{i},mount_tag={end}")


def _extra_disk(node: str, disk: ExtraDisk, fd_set: int, slot: int) -> Iterator[str]:
    yield from _fd_set(fd_set, disk.fd)
    for value in layer_nodes(node, fd_set, disk.format, below=None, read_only=disk.read_only):
        yield from ("-blockdev", json.dumps(value))
    yield from ("-device", f"virtio-blk-pci,id={node},drive={node},serial={escape(disk.name)},addr={slot:#x}")


def share_trees(shares: Sequence[Share]) -> dict[str, Path]:
    """The directories that QEMU needs in its own root to read."""
    return {share_name(i): share.path for i, share in _by_9p(shares) if share.read_only}


def writable_shares(shares: Sequence[Share]) -> dict[str, tuple[int, Path]]:
    """Those that it needs there to write to, each with a descriptor of it."""
    return {share_name(i): (share.fd, share.path) for i, share in _by_9p(shares) if not share.read_only}


def _by_9p(shares: Sequence[Share]) -> list[tuple[int, Share]]:
    # the others are in the root of their virtiofsd
    return [(i, share) for i, share in enumerate(shares) if share.via == BY_9P]


def _agent(fds: Descriptors) -> tuple[str, ...]:
    # A port that a guest's agent finds by its name. Who talks to it connects to the socket; without anybody there, what
    # the guest writes is thrown away.
    if fds.agent is None:
        return ()
    return (
        "-chardev",
        f"socket,id={AGENT_ID},fd={fds.agent},server=on,wait=off",
        "-device",
        f"virtio-serial-pci,id=serial0,max_ports=2,addr={_SLOT_AGENT}",
        "-device",
        f"virtserialport,bus=serial0.0,nr=1,chardev={AGENT_ID},name={AGENT_PORT}",
    )


def _fd_set(number: int, fd: int) -> tuple[str, str]:
    return "-add-fd", f"fd={fd},set={number}"


def node_of(overlay: Path) -> str:
    """The name of an overlay's block node: its file's name without the suffix."""
    return overlay.stem


def layer_nodes(
    node: str, fd_set: int, format: DiskFormat, *, below: str | None, read_only: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The protocol node and the format node of one layer, as ``blockdev-add`` takes them; its file is in *fd_set*.

    ``backing`` is always said, so that what the file itself says is never looked at.
    """
    filename = f"/dev/fdset/{fd_set}"
    file = {"driver": "file", "node-name": f"{node}-file", "filename": filename, "read-only": read_only}
    top: dict[str, Any] = {
        "driver": str(format),
        "node-name": node,
        "file": f"{node}-file",
        "read-only": read_only,
    }
    if format is DiskFormat.QCOW2:
        top["backing"] = below
    if not read_only:
        file["discard"] = top["discard"] = "unmap"
    return file, top


def _regions(regions: Sequence[Region], fds: Sequence[int]) -> Iterator[str]:
    # master: the device's state is saved; its memory is no part of a snapshot
    for i, (region, fd) in enumerate(zip(regions, fds, strict=True)):
        slot, function = divmod(i, _REGIONS_A_SLOT)
        more = ",multifunction=on" if function == 0 and len(regions) > i + 1 else ""
        backend = {"id": f"shm{i}", "size": region.size, "mem-path": fd_path(fd), "share": True}
        yield from ("-object", json.dumps({"qom-type": "memory-backend-file", **backend}))
        address = f"{_SLOT_REGIONS + slot:#x}.{function}"
        yield from ("-device", f"ivshmem-plain,id=region{i},memdev=shm{i},master=on,addr={address}{more}")


def _boot(config: VmConfig, fds: Descriptors) -> Iterator[str]:
    # On a restore these are not run, but a guest that reboots later boots from them again.
    if config.kernel is None:
        return
    yield from ("-kernel", fd_path(fds.kernel))
    if config.initrd is not None:
        yield from ("-initrd", fd_path(fds.initrd))
    if config.kernel_args:
        yield from ("-append", config.kernel_args)


def _incoming(state: int | None, since: frozenset[Since]) -> list[str]:
    if state is None:
        return []
    if Since.INCOMING_FILE in since:
        return [*_fd_set(_STATE_SET, state), "-S", "-incoming", f"file:/dev/fdset/{_STATE_SET}"]
    return ["-S", "-incoming", f"fd:{state}"]


def escape(value: str) -> str:
    """A value for QEMU's ``key=value,…`` syntax, where a comma is written twice."""
    return value.replace(",", ",,")
