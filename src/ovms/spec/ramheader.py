"""The header of a RAM snapshot: what a host must know before it restores it.

Source: ``spec/rfc/ramsnap-v1.md``, sections 3 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ovms.errors import Problem, SnapshotInvalid
from ovms.lazy import dataclass, regex
from ovms.spec import limits, strictjson
from ovms.spec.digest import is_digest
from ovms.spec.document import Reader, check_time, from_base64, shown
from ovms.spec.manifest import Manifest

SCHEMA_VERSION: Final = 1

#: The least and the most bytes of a device.
_SIZES: Final = {
    "virtio-blk": (1, limits.DISK_VIRTUAL_MAX),
    "ivshmem": (limits.IVSHMEM_MIN, limits.IVSHMEM_MAX),
}
#: The device types of version 1.
DEVICE_TYPES: Final = ("virtio-blk", "virtio-net", "virtio-rng", "vmgenid", "serial", "virtio-serial", "ivshmem")

#: How the key of an encrypted snapshot is wrapped.
ENCRYPTION: Final = "age"
#: An X25519 recipient of age: 32 bytes in Bech32.
_RECIPIENT: Final = regex(r"age1[02-9ac-hj-np-z]{58}")
_MAC: Final = regex(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True)
class Device:
    """A device whose state is in the snapshot; the fields that its type does not need are None. ``size`` in bytes."""

    type: str
    name: str | None = None
    size: int | None = None
    mac: str | None = None
    backend: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As the header lists it."""
        fields = {"type": self.type, "name": self.name, "size": self.size, "mac": self.mac, "backend": self.backend}
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Encryption:
    """How a snapshot's key is wrapped: ``key`` is an age file. ``recipients`` is for messages alone: nothing holds them to it."""

    recipients: tuple[str, ...]
    key: bytes

    def to_json(self) -> dict[str, Any]:
        """As the header has it."""
        import base64

        return {"type": ENCRYPTION, "recipients": list(self.recipients), "key": base64.b64encode(self.key).decode()}


@dataclass(frozen=True)
class Header:
    """A checked header. ``memory`` in bytes; digests are those of the artifact's blobs."""

    created: str
    source: str
    vmm: str
    vmm_version: str
    state_format: str
    machine_type: str
    accel: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    vcpus: int
    memory: int
    devices: tuple[Device, ...]
    kernel: str | None
    initrd: str | None
    kernel_args: str
    disks: tuple[str, ...]
    parent: str | None = None
    arch: str = "x86_64"
    clock_rtc: str = "utc"
    clock_source: str = "host"
    encryption: Encryption | None = None

    def device(self, type: str) -> Device | None:
        """The first device of a type."""
        return next((device for device in self.devices if device.type == type), None)

    def to_json(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schemaVersion": SCHEMA_VERSION,
            "created": self.created,
            "source": self.source,
            **({} if self.parent is None else {"parent": self.parent}),
            **({} if self.encryption is None else {"encryption": self.encryption.to_json()}),
            "vmm": {"name": self.vmm, "version": self.vmm_version, "state_format": self.state_format},
            "machine": {"type": self.machine_type, "arch": self.arch, "accel": self.accel},
            "cpu": {"model": self.cpu_model, "flags": list(self.cpu_flags), "count": self.vcpus},
            "memory": {"size": self.memory},
            "devices": [device.to_json() for device in self.devices],
            "kernel": self.kernel,
            "initrd": self.initrd,
            "kernel_args": self.kernel_args,
            "disks": list(self.disks),
            "clock": {"rtc": self.clock_rtc, "source": self.clock_source},
        }


def parse(data: bytes | memoryview, offset: int = 0) -> Header:
    """A header from its bytes, which lie at *offset* of the blob.

    Raises:
        JsonInvalid: not strict JSON.
        SnapshotInvalid: breaks the specification; names every problem.
    """
    what = "the RAM snapshot's header"
    return check(strictjson.parse(bytes(data), what, max_size=limits.RAM_HEADER_MAX), offset)


def check(document: Any, offset: int = 0) -> Header:
    """A header from its parsed JSON.

    Raises:
        SnapshotInvalid: breaks the specification; names every problem.
    """
    problems: list[Problem] = []
    header = _read(Reader(document, "$", problems, rule="RAM-20", text_rule="RAM-25", missing_rule="RAM-20"))
    if problems:
        first = min(problems)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SnapshotInvalid(
            f"RAM snapshot: the header's {first.path} {first.message}{more}, at offset {offset}",
            rule=first.rule,
            offset=offset,
            problems=[problem.to_json() for problem in sorted(problems, key=lambda p: p[:2])[: limits.PROBLEMS_MAX]],
        )
    return header


def _read(top: Reader) -> Header:
    version = top.integer("schemaVersion", 0, 2**31, required=True)
    if version not in (None, SCHEMA_VERSION):
        top.problem("schemaVersion", f"must be {SCHEMA_VERSION}, not {version}")
    nothing = Reader({}, "$", [], rule="RAM-20", text_rule="RAM-25")
    vmm = top.child("vmm", required=True) or nothing
    machine = top.child("machine", required=True) or nothing
    cpu = top.child("cpu", required=True) or nothing
    memory = top.child("memory", required=True) or nothing
    clock = top.child("clock", required=True) or nothing
    return Header(
        created=top.string("created", required=True, check=check_time) or "",
        source=_digest(top, "source") or "",
        parent=_digest(top, "parent") if "parent" in top.value else None,
        vmm=vmm.string("name", required=True) or "",
        vmm_version=vmm.string("version", required=True) or "",
        state_format=vmm.string("state_format", required=True) or "",
        machine_type=machine.string("type", required=True) or "",
        arch=machine.string("arch", required=True) or "",
        accel=machine.string("accel", required=True) or "",
        cpu_model=cpu.string("model", required=True) or "",
        cpu_flags=cpu.strings("flags", limits.RAM_LIST_MAX, required=True, rule="RAM-25"),
        vcpus=cpu.integer("count", 1, limits.VCPUS_MAX, required=True, rule="RAM-23") or 0,
        memory=memory.integer("size", limits.RAM_MIN, limits.RAM_MAX, required=True, rule="RAM-22") or 0,
        devices=_read_devices(top),
        kernel=_digest(top, "kernel", null=True),
        initrd=_digest(top, "initrd", null=True),
        kernel_args=top.string("kernel_args", required=True, empty=True) or "",
        disks=top.strings("disks", limits.DISK_LAYERS_MAX, _check_digest, required=True, rule="RAM-21"),
        clock_rtc=_one_of(clock, "rtc", ("utc", "local")),
        clock_source=_one_of(clock, "source", ("host", "guest")),
        encryption=_read_encryption(top) if "encryption" in top.value else None,
    )


def _read_encryption(top: Reader) -> Encryption | None:
    item = top.child("encryption", required=True, rule="RAM-58")
    if item is None:
        return None
    kind = item.string("type", required=True, rule="RAM-58")
    if kind not in (None, ENCRYPTION):
        item.problem("type", f"must be {ENCRYPTION}, not {shown(kind)}", "RAM-58")
    recipients = item.strings("recipients", limits.RAM_RECIPIENTS_MAX, check_recipient, required=True, rule="RAM-59")
    text = item.string("key", required=True, rule="RAM-58") or ""
    key = from_base64(text)
    if key is None:
        item.problem("key", "must be base64", "RAM-58")
    return Encryption(recipients, key or b"")


def check_recipient(value: str) -> str | None:
    """What is wrong with a recipient of an encrypted snapshot, where something is."""
    if _RECIPIENT.fullmatch(value):
        return None
    if value.upper().startswith("AGE-SECRET-KEY"):  # never shown
        return "must be a recipient ('age1…'), and is an identity: a secret"
    return f"must be an X25519 recipient of age ('age1' and 58 characters), not {shown(value)}"


def _digest(item: Reader, key: str, *, null: bool = False) -> str | None:
    if null and key in item.value and item.value[key] is None:
        return None
    return item.string(key, required=True, check=_check_digest, rule="RAM-21")


def _check_digest(value: str) -> str | None:
    return None if is_digest(value) else f"must be 'sha256:' and 64 hexadecimal digits, not {shown(value)}"


def _one_of(item: Reader, key: str, choices: tuple[str, ...]) -> str:
    def check(value: str) -> str | None:
        return None if value in choices else f"must be {' or '.join(choices)}, not {shown(value)}"

    return item.string(key, required=True, check=check) or ""


def _read_devices(top: Reader) -> tuple[Device, ...]:
    # Of a type that this version does not know, nothing is known: RAM-24 is asked when a host is looked for.
    devices = []
    for item in top.children("devices", limits.RAM_LIST_MAX, required=True, rule="RAM-25"):
        kind = item.string("type", required=True, rule="RAM-20") or ""
        sized = kind in ("virtio-blk", "ivshmem")
        size = item.integer("size", *_SIZES.get(kind, (1, 2**63 - 1)), required=sized, rule="RAM-23")
        mac = item.string("mac", required=kind == "virtio-net", check=_check_mac, rule="RAM-23")
        backend = item.string("backend", required=kind == "virtio-net", rule="RAM-20")
        named = kind in ("virtio-serial", "ivshmem")
        devices.append(Device(kind, item.string("name", required=named, rule="RAM-20"), size, mac, backend))
    return tuple(devices)


def _check_mac(value: str) -> str | None:
    return None if _MAC.fullmatch(value) else f"must be a MAC address such as 52:54:00:12:34:56, not {shown(value)}"


def check_belongs(header: Header, manifest: Manifest, disk_size: int | None) -> None:
    """Whether a snapshot was taken of the very VM that the manifest around it describes; *disk_size* in bytes.

    Raises:
        SnapshotInvalid: it was not; no host could restore it.
    """
    disk = header.device("virtio-blk")
    wanted = {
        "kernel": (manifest.kernel.ref if manifest.kernel else None, header.kernel),
        "initrd": (manifest.initrd.ref if manifest.initrd else None, header.initrd),
        "kernel arguments": (manifest.kernel.args if manifest.kernel else "", header.kernel_args),
        "disk layers": (tuple(layer.ref for layer in manifest.disk_layers), header.disks),
        "disk size": (disk_size, None if disk is None else disk.size),
        "shared memory": (
            [(device.name, device.region_size) for device in manifest.devices if device.type == "ivshmem"],
            [(device.name, device.size) for device in header.devices if device.type == "ivshmem"],
        ),
    }
    wrong = [name for name, (here, there) in wanted.items() if here != there]
    if wrong:
        raise SnapshotInvalid(
            f"the RAM snapshot is not one of this artifact: another {' and another '.join(wrong)}",
            hint="start it with --cold to boot from the disk instead",
            rule="RAM-30",
        )


def check_chain(chain: Sequence[tuple[str, Header]]) -> None:
    """Whether the snapshots of an artifact, base first, each with its blob's digest, are one another's parents.

    Raises:
        SnapshotInvalid: they are not.
    """
    for i, (_, header) in enumerate(chain):
        parent = chain[i - 1] if i else None
        if header.parent != (parent[0] if parent else None):
            wrong = f"the parent of RAM snapshot {i} is {header.parent}, not {parent[0] if parent else 'none'}"
            raise SnapshotInvalid(wrong, rule="RAM-40")
        if parent is None:
            continue
        old = parent[1]
        same = (old.memory, old.kernel, old.initrd, old.kernel_args)
        if same != (header.memory, header.kernel, header.initrd, header.kernel_args):
            raise SnapshotInvalid(f"RAM snapshot {i} is of another VM than its parent", rule="RAM-42")
        if header.disks[: len(old.disks)] != old.disks:
            raise SnapshotInvalid(f"RAM snapshot {i} has other disk layers than its parent", rule="RAM-42")
