"""QEMU's command line, from a :class:`~ovms.vmm.model.VmConfig`: pure, no files are touched.

Every device has an address of its own on the bus, and every block node a name: a snapshot restores only into a machine
that is the same to the letter, and a disk layer must never get to name a file by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ovms.spec.manifest import DiskFormat
from ovms.vmm.model import Machine, PortForward, VmConfig, VmFiles

RAM_ID: Final = "mem0"
DISK_ID: Final = "disk0"
NETDEV_ID: Final = "net0"
OVERLAY_NODE: Final = "overlay"

_SLOT_RNG: Final = "0x3"
_SLOT_NET: Final = "0x4"
_SLOT_DISK: Final = "0x5"

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Descriptors:
    """File descriptors that QEMU inherits: listening sockets, and the state that it loads on a restore."""

    control: int
    console: int
    state: int | None = None


def build(binary: Path, config: VmConfig, files: VmFiles, fds: Descriptors, *, sandbox: bool) -> list[str]:
    """The whole command line."""
    return [
        str(binary),
        *_identity(config, files),
        *machine_args(config.machine),
        *_memory(config),
        *(("-sandbox", SANDBOX) if sandbox else ()),
        *_channels(files, fds),
        "-device",
        "vmgenid,guid=auto",
        "-object",
        "rng-builtin,id=rng0",
        "-device",
        f"virtio-rng-pci,rng=rng0,addr={_SLOT_RNG}",
        *_network(config.machine.mac, config.ports),
        *_disk(config),
        *_boot(config),
        *(("-S", "-incoming", f"fd:{fds.state}") if fds.state is not None else ()),
    ]


def _identity(config: VmConfig, files: VmFiles) -> list[str]:
    return [
        "-name",
        f"guest={escape(config.name)},process=ovms-{config.uuid[:8]}",
        "-uuid",
        config.uuid,
        "-pidfile",
        str(files.pid),
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


def _memory(config: VmConfig) -> list[str]:
    backend: dict[str, Any] = {"id": RAM_ID, "size": config.machine.memory}
    if config.restore is None:
        # shared, so that a snapshot reads it through the descriptor without stopping for a copy through QEMU
        backend.update({"qom-type": "memory-backend-memfd", "share": True})
    else:
        backend.update({"qom-type": "memory-backend-file", "mem-path": str(config.restore.ram), "share": False})
    return ["-object", json.dumps(backend)]


def _channels(files: VmFiles, fds: Descriptors) -> list[str]:
    events = files.directory / files.EVENTS
    return [
        "-chardev",
        f"socket,id=control,fd={fds.control},server=on,wait=off",
        "-mon",
        "chardev=control,mode=control",
        "-chardev",
        f"pipe,id=events,path={escape(str(events))}",
        "-mon",
        "chardev=events,mode=control",
        "-chardev",
        f"socket,id=console,fd={fds.console},server=on,wait=off,logfile={escape(str(files.console_log))},logappend=on",
        "-serial",
        "chardev:console",
    ]


def _network(mac: str, ports: Sequence[PortForward]) -> list[str]:
    forwards = "".join(f",hostfwd={p.protocol}:{p.host_ip}:{p.host_port}-:{p.guest_port}" for p in ports)
    return [
        "-netdev",
        f"user,id={NETDEV_ID}{forwards}",
        "-device",
        # no option ROM: nothing boots from the network, and it would be one more block in every snapshot
        f"virtio-net-pci,netdev={NETDEV_ID},mac={mac},romfile=,addr={_SLOT_NET}",
    ]


def _disk(config: VmConfig) -> Iterator[str]:
    if config.overlay is None:
        return
    below: str | None = None
    for i, layer in enumerate(config.layers):
        node = f"layer{i}"
        for value in layer_nodes(node, layer.path, layer.format, below=below, read_only=True):
            yield from ("-blockdev", json.dumps(value))
        below = node
    top = node_of(config.overlay)
    for value in layer_nodes(top, config.overlay, DiskFormat.QCOW2, below=below, read_only=False):
        yield from ("-blockdev", json.dumps(value))
    yield from ("-device", f"virtio-blk-pci,id={DISK_ID},drive={top},addr={_SLOT_DISK},bootindex=1")


def node_of(overlay: Path) -> str:
    """The name of an overlay's block node: its file's name without the suffix."""
    return overlay.stem


def layer_nodes(
    node: str, path: Path, format: DiskFormat, *, below: str | None, read_only: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The protocol node and the format node of one layer, as ``blockdev-add`` takes them.

    ``backing`` is always said, so that what the file itself says is never looked at.
    """
    file = {"driver": "file", "node-name": f"{node}-file", "filename": str(path), "read-only": read_only}
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


def _boot(config: VmConfig) -> Iterator[str]:
    # On a restore these are not run, but a guest that reboots later boots from them again.
    if config.kernel is None:
        return
    yield from ("-kernel", str(config.kernel))
    if config.initrd is not None:
        yield from ("-initrd", str(config.initrd))
    if config.kernel_args:
        yield from ("-append", config.kernel_args)


def escape(value: str) -> str:
    """A value for QEMU's ``key=value,…`` syntax, where a comma is written twice."""
    return value.replace(",", ",,")
