"""What an adapter can do, and the one place where a start is compared with it: before anything exists of the VM.

An adapter declares :class:`Capabilities`, from what it knows without asking its VMM. A start is an :class:`Asked`. Each line
of :data:`CHECKS` says what of the one is lacking in the other; a new feature is a field in both, and a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from ovms.errors import Unsupported
from ovms.lazy import dataclass, field
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.spec.document import shown
from ovms.spec.manifest import DiskFormat, Manifest

if TYPE_CHECKING:
    from ovms.vmm.protocol import Vmm


@dataclass(frozen=True)
class Capabilities:
    """What one adapter gives its guests. The defaults are what nobody needs to declare: nothing, or no bound but ours.

    Attributes:
        archs: architectures of guests, as manifests name them.
        accels: accelerators.
        bios, uefi: whether a guest can boot from its disk by this firmware.
        disk_formats: formats of disk layers.
        disk_layers: how many layers a disk may have.
        memory_max: bytes of memory; *memory_unit* is what it must be a multiple of.
        vcpus_max: virtual CPUs: one, or a multiple of *vcpus_unit*.
        state_formats: forms of device state that it restores, empty where it takes no snapshots; it writes the first.
        live_overlay: whether a running VM can be given a new overlay (a snapshot with a disk needs it).
        devices: type of the manifest → how many a VM may have.
        networks: what a network may be made of, as the headers of RAM snapshots name it.
        port_protocols: protocols of forwarded ports.
        shares: how directories of the host can be shared (``9p``, ``virtiofs``).
        volumes: how many disks beside the first a VM may have.
        vsock, agent: whether a guest has a virtual socket, a channel for its agent.
        hotplug: what can be added to a running VM (``disk``, ``net``, ``memory``, ``cpu``).
        power_button: whether a guest can be asked to power down without an agent.
    """

    archs: frozenset[str]
    accels: frozenset[Accel]
    disk_formats: frozenset[DiskFormat]
    bios: bool = False
    uefi: bool = False
    disk_layers: int = limits.DISK_LAYERS_MAX
    memory_max: int = limits.RAM_MAX
    memory_unit: int = 1
    vcpus_max: int = limits.VCPUS_MAX
    vcpus_unit: int = 1
    state_formats: tuple[str, ...] = ()
    live_overlay: bool = False
    devices: Mapping[str, int] = field(default_factory=dict)
    networks: frozenset[str] = frozenset()
    port_protocols: frozenset[str] = frozenset()
    shares: frozenset[str] = frozenset()
    volumes: int = 0
    vsock: bool = False
    agent: bool = False
    hotplug: frozenset[str] = frozenset()
    power_button: bool = False


@dataclass(frozen=True)
class Asked:
    """What a start asks for: an artifact's manifest, and what the caller adds. None and empty: not asked for."""

    manifest: Manifest
    accel: Accel | None = None
    memory: int | None = None
    vcpus: int | None = None
    network: str | None = None
    port_protocols: frozenset[str] = frozenset()
    shares: frozenset[str] = frozenset()
    volumes: int = 0
    vsock: bool = False
    agent: bool = False


class Check(NamedTuple):
    """A feature, the rule that lets a runtime refuse it, and what of it is asked for and not there (None: nothing)."""

    feature: str
    lacking: Callable[[Asked, Capabilities], str | None]
    rule: str | None = None


def _arch(asked: Asked, can: Capabilities) -> str | None:
    arch = asked.manifest.metadata.platform.arch
    return None if arch in can.archs else f"the architecture {arch}"


def _firmware(asked: Asked, can: Capabilities) -> str | None:
    if asked.manifest.metadata.platform.uefi:
        return None if can.uefi else "UEFI firmware"
    by_disk = asked.manifest.kernel is None and asked.manifest.disk_layers
    return "a BIOS, to boot from its disk" if by_disk and not can.bios else None


def _disks(asked: Asked, can: Capabilities) -> str | None:
    layers = asked.manifest.disk_layers
    unknown = sorted({str(layer.format) for layer in layers if layer.format not in can.disk_formats})
    if unknown:
        return f"disks of the format {', '.join(unknown)}"
    return f"{len(layers)} disk layers, of {can.disk_layers} at most" if len(layers) > can.disk_layers else None


def _memory(asked: Asked, can: Capabilities) -> str | None:
    if asked.memory is None:
        return None
    if asked.memory > can.memory_max:
        return f"{asked.memory >> 20} MiB of memory, of {can.memory_max >> 20} MiB at most"
    odd = asked.memory % can.memory_unit
    return f"memory that is no multiple of {can.memory_unit} bytes" if odd else None


def _vcpus(asked: Asked, can: Capabilities) -> str | None:
    if asked.vcpus is None or asked.vcpus == 1:
        return None
    if asked.vcpus > can.vcpus_max:
        return f"{asked.vcpus} CPUs, of {can.vcpus_max} at most"
    return f"CPUs that are no multiple of {can.vcpus_unit}" if asked.vcpus % can.vcpus_unit else None


def _devices(asked: Asked, can: Capabilities) -> str | None:
    types = [device.type for device in asked.manifest.devices]
    for kind in dict.fromkeys(types):
        if kind not in can.devices:
            return f"a device of the type {shown(kind)}"
        if types.count(kind) > can.devices[kind]:
            return f"{types.count(kind)} devices of the type {kind}, of {can.devices[kind]} at most"
    return None


def _words(what: str, asked: frozenset[str], can: frozenset[str]) -> str | None:
    missing = sorted(asked - can)
    return f"{what} {', '.join(missing)}" if missing else None


#: In the order in which they are told: the first that lacks something is the answer.
CHECKS: Final[tuple[Check, ...]] = (
    Check("arch", _arch, "BIN-4"),
    Check("firmware", _firmware, "BIN-4"),
    Check("devices", _devices, "DEV-1"),
    Check("disk", _disks),
    Check("accel", lambda a, c: f"the accelerator {a.accel}" if a.accel not in (None, *c.accels) else None),
    Check("memory", _memory),
    Check("cpus", _vcpus),
    Check("network", lambda a, c: f"the network {a.network}" if a.network not in (None, *c.networks) else None),
    Check("ports", lambda a, c: _words("forwarded ports of", a.port_protocols, c.port_protocols)),
    Check("shares", lambda a, c: _words("shared directories by", a.shares, c.shares)),
    Check("volumes", lambda a, c: f"{a.volumes} volumes, of {c.volumes} at most" if a.volumes > c.volumes else None),
    Check("vsock", lambda a, c: "a virtual socket" if a.vsock and not c.vsock else None),
    Check("agent", lambda a, c: "a channel for its agent" if a.agent and not c.agent else None),
)


def require(vmm: Vmm, asked: Asked) -> None:
    """Whether the adapter can do all that is asked for.

    Raises:
        Unsupported: it can't; names the adapter and the feature.
    """
    for check in CHECKS:
        lacking = check.lacking(asked, vmm.capabilities)
        if lacking is not None:
            raise _refusal(vmm, check.feature, f"{asked.manifest.name} needs {lacking}", check.rule)


def require_snapshots(vmm: Vmm, name: str, *, disk: bool) -> None:
    """Whether the adapter can take a snapshot of the instance *name*, which has a *disk* or none.

    Raises:
        Unsupported: it can't.
    """
    can = vmm.capabilities
    if not can.state_formats:
        raise _refusal(vmm, "snapshots", f"a snapshot of {name} needs its memory saved")
    if disk and not can.live_overlay:
        raise _refusal(vmm, "snapshots", f"a snapshot of {name} needs a new overlay on its disk")


def _refusal(vmm: Vmm, feature: str, needs: str, rule: str | None = None) -> Unsupported:
    return Unsupported(
        f"{needs}, which the runtime {vmm.name} does not give",
        adapter=vmm.name,
        feature=feature,
        rule=rule,
    )
