"""What a RAM snapshot needs of the host that it is restored on: checked before a byte of its memory is touched.

Source: ``spec/rfc/ramsnap-v1.md``, section 7.
"""

from __future__ import annotations

from typing import Final

from ovms.errors import SnapshotIncompatible
from ovms.oci.descriptor import created_now
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.spec.digest import Digest
from ovms.spec.manifest import Manifest
from ovms.spec.ramheader import Device, Header
from ovms.vmm.model import AGENT_PORT, Machine, Region
from ovms.vmm.protocol import Vmm

#: The name of the seed disk; the disk of the layers has none.
_SEED: Final = "seed"
_SEED_MAX: Final = 64 * limits.MIB


def describe(
    vmm: Vmm,
    machine: Machine,
    manifest: Manifest,
    source: Digest,
    extra_disks: tuple[Digest, ...],
    *,
    network: str,
    parent: str | None = None,
) -> Header:
    """The header of a new snapshot of a VM that runs *manifest* (of the artifact *source*) with further disk layers.

    *parent*: the RAM snapshot that it will be a diff on.

    *network*: what the network card is connected to. ``user`` is QEMU's own user network, whose state is a part of the
    device state (its section "slirp"); of any other there is nothing in it.
    """
    return Header(
        created=created_now(),
        source=source,
        vmm=vmm.name,
        vmm_version=vmm.version,
        state_format=vmm.state_format,
        machine_type=machine.machine_type,
        accel=machine.accel,
        cpu_model=machine.cpu,
        cpu_flags=machine.cpu_flags,
        vcpus=machine.vcpus,
        memory=machine.memory,
        devices=_devices(machine, network),
        kernel=manifest.kernel.ref if manifest.kernel else None,
        initrd=manifest.initrd.ref if manifest.initrd else None,
        kernel_args=manifest.kernel.args if manifest.kernel else "",
        disks=(*(layer.ref for layer in manifest.disk_layers), *extra_disks),
        parent=parent,
    )


def _devices(machine: Machine, network: str) -> tuple[Device, ...]:
    # in the order in which the VMM gets them
    card = Device("virtio-net", mac=machine.mac, backend=network)
    disk = () if machine.disk_size is None else (Device("virtio-blk", size=machine.disk_size),)
    port = (Device("virtio-serial", name=AGENT_PORT),) if machine.agent else ()
    seed = () if machine.seed_size is None else (Device("virtio-blk", name=_SEED, size=machine.seed_size),)
    shared = (Device("ivshmem", name=region.name, size=region.size) for region in machine.regions)
    return (Device("serial"), Device("vmgenid"), Device("virtio-rng"), card, *disk, *port, *seed, *shared)


def _regions(header: Header) -> tuple[Region, ...]:
    shared = (device for device in header.devices if device.type == "ivshmem")
    return tuple(Region(device.name or "", device.size or 0) for device in shared)


def network_of(header: Header) -> str | None:
    """What the network card was connected to; None without one."""
    return next((device.backend for device in header.devices if device.type == "virtio-net"), None)


def _sizes(header: Header) -> tuple[int | None, int | None]:
    # of the disk and of the seed disk
    blocks = [device for device in header.devices if device.type == "virtio-blk"]
    disk = next((device.size for device in blocks if device.name is None), None)
    return disk, next((device.size for device in blocks if device.name == _SEED), None)


def machine_of(header: Header) -> Machine:
    """The shape of the machine that a snapshot restores into; for one that :func:`why_not` has nothing against."""
    network = header.device("virtio-net")
    assert network is not None
    assert network.mac is not None
    return Machine(
        header.machine_type,
        Accel(header.accel),
        header.cpu_model,
        header.cpu_flags,
        header.memory,
        header.vcpus,
        network.mac,
        *_sizes(header),
        agent=header.device("virtio-serial") is not None,
        regions=_regions(header),
    )


def require_shape(header: Header, *, memory: int | None, vcpus: int | None) -> None:
    """Whether what the user asks for is what the snapshot has; *memory* in bytes, None where nothing is asked.

    Raises:
        SnapshotIncompatible: it is not: a snapshot's memory and CPUs can't be changed.
    """
    wrong = None
    if memory is not None and memory != header.memory:
        wrong = f"it has {header.memory >> 20} MiB of memory, and {memory >> 20} MiB are asked for"
    elif vcpus is not None and vcpus != header.vcpus:
        wrong = f"it has {header.vcpus} CPUs, and {vcpus} are asked for"
    if wrong is not None:
        raise SnapshotIncompatible(
            f"the RAM snapshot cannot be restored: {wrong}",
            hint="leave out --memory and --cpus, or add --cold to boot from the disk instead",
            rule="RAM-31",
        )


def why_not(vmm: Vmm, header: Header, accel: Accel) -> str | None:
    """Why the snapshot can't be restored on this host; None when it can."""
    if header.vmm != vmm.name:
        return f"it was taken by {header.vmm!a:.40}, and this is {vmm.name}"
    if header.state_format not in (reads := vmm.capabilities.state_formats):
        return f"its device state is of the form {header.state_format!a:.40}, and {vmm.name} reads {', '.join(reads)}"
    if header.arch != "x86_64":
        return f"it was taken on {header.arch!a:.40}, and this is x86_64"
    if header.accel != accel:
        return f"it was taken under {header.accel.upper()!a:.40}, and this VM runs under {accel.upper()}"
    card = header.device("virtio-net")
    expected = None
    if card is not None and card.mac is not None and card.backend is not None:
        expected = _devices(machine_of(header), card.backend)
    if header.devices != expected:
        return f"it has other devices than this version gives: {', '.join(d.type for d in header.devices)!a:.200}"
    seed_size = _sizes(header)[1]
    if seed_size is not None and (seed_size > _SEED_MAX or seed_size % 512):
        return f"its seed disk has {seed_size} bytes, and this version gives none of that size"
    if (header.clock_rtc, header.clock_source) != ("utc", "host"):
        return "its real-time clock is not the host's in UTC"
    return vmm.why_incompatible(machine_of(header), header.vmm_version)
