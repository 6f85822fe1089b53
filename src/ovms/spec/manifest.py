"""The OVMS manifest: checked once at the edge, handed inwards as typed values.

Source: ``spec/rfc/ovms-v0.1.md``, section 5. Every problem is reported, each with its JSON path and the rule that it
breaks; unknown fields are kept (they live on in ``document``), because what is hashed and signed is the original bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from ovms.errors import OvmsError, Problem
from ovms.lazy import dataclass, field, regex
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import is_digest
from ovms.spec.document import Reader, check_time, invalid, shown

SCHEMA_VERSION: Final = 1
#: Bytes of a manifest that is worth being remembered, and whose like cannot fill a server's memory.
_REMEMBERED_MAX: Final = 64 * limits.KIB

_HEX_ADDRESS: Final = regex(r"0x[0-9a-fA-F]{1,16}")
_WORD: Final = regex(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME: Final = regex(rf"{_WORD.pattern}(/{_WORD.pattern})*")


class DiskFormat(StrEnum):
    """How a disk layer is stored. ``ovfms`` is a name that the draft never defines: no runtime takes it."""

    QCOW2 = "qcow2"
    RAW = "raw"
    OVFMS = "ovfms"


class Compression(StrEnum):
    """How the chunks of a RAM snapshot are compressed."""

    LZ4 = "lz4"
    ZSTD = "zstd"


class PartKind(StrEnum):
    """What a blob of an artifact is."""

    KERNEL = "kernel"
    INITRD = "initrd"
    DISK = "disk"
    RAM = "ram"
    BOOTSTRAP = "bootstrap"


@dataclass(frozen=True)
class Part:
    """One ``ref`` of a manifest, and where it stands.

    ``number`` counts the parts of a kind; ``format`` and ``size`` (bytes) are those of a disk layer.
    """

    kind: PartKind
    path: str
    ref: str
    number: int = 0
    format: DiskFormat | None = None
    size: int | None = None


@dataclass(frozen=True)
class Kernel:
    """The kernel and its command line."""

    ref: str
    args: str = ""


@dataclass(frozen=True)
class Initrd:
    """The initial RAM disk."""

    ref: str


@dataclass(frozen=True)
class DiskLayer:
    """One layer of the disk; ``size`` is the blob's size in bytes where the manifest says it."""

    ref: str
    format: DiskFormat
    size: int | None = None


@dataclass(frozen=True)
class RamSnapshot:
    """A RAM snapshot to restore from; ``parents`` are the ancestors of a diff, base first."""

    ref: str
    compression: Compression = Compression.LZ4
    preload_hint: bool = False
    mlock_required: bool = False
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A device beside disk, network and console; ``size`` in bytes."""

    type: str
    name: str
    size: int | None = None
    mmio_addr: int | None = None

    @property
    def region_size(self) -> int:
        """The size of an ivshmem device's region in bytes."""
        return limits.IVSHMEM_DEFAULT if self.size is None else self.size


@dataclass(frozen=True)
class Platform:
    """What the guest needs of the machine."""

    arch: str = "x86_64"
    uefi: bool = False


@dataclass(frozen=True)
class Metadata:
    """Who made the artifact, when (RFC 3339), and for what machine."""

    author: str | None = None
    created: str | None = None
    platform: Platform = field(default_factory=Platform)


@dataclass(frozen=True)
class RuntimeHints:
    """Advice that a runtime may ignore."""

    preferred_runtime: tuple[str, ...] = ()
    cold_start_target_ms: int | None = None


@dataclass(frozen=True)
class Bootstrap:
    """The container configuration that the guest's bootstrap follows."""

    ref: str


@dataclass(frozen=True)
class Manifest:
    """A checked OVMS manifest; ``document`` is the parsed JSON with every unknown field in it."""

    name: str
    version: str
    kernel: Kernel | None
    initrd: Initrd | None
    disk_layers: tuple[DiskLayer, ...]
    ram_snapshot: RamSnapshot | None
    devices: tuple[Device, ...]
    metadata: Metadata
    runtime_hints: RuntimeHints
    bootstrap: Bootstrap | None
    document: Mapping[str, Any]

    def parts(self) -> list[Part]:
        """Every part, in the order of the OCI layers."""
        answer: list[Part] = []
        if self.kernel is not None:
            answer.append(Part(PartKind.KERNEL, "$.kernel.ref", self.kernel.ref))
        if self.initrd is not None:
            answer.append(Part(PartKind.INITRD, "$.initrd.ref", self.initrd.ref))
        answer.extend(
            Part(PartKind.DISK, f"$.diskLayers[{i}].ref", layer.ref, i, layer.format, layer.size)
            for i, layer in enumerate(self.disk_layers)
        )
        if (ram := self.ram_snapshot) is not None:
            parents = enumerate(ram.parents)
            answer.extend(Part(PartKind.RAM, f"$.ramSnapshot.parents[{i}]", ref, i) for i, ref in parents)
            answer.append(Part(PartKind.RAM, "$.ramSnapshot.ref", ram.ref, len(ram.parents)))
        if self.bootstrap is not None:
            answer.append(Part(PartKind.BOOTSTRAP, "$.bootstrap.ref", self.bootstrap.ref))
        return answer


def _check_name(value: str) -> str | None:
    if _NAME.fullmatch(value) is None:
        return (
            "must be letters, digits, '.', '_' and '-', with '/' between parts that each begin with a letter or digit,"
            f" not {shown(value)}"
        )
    return None


def _check_args(value: str) -> str | None:
    size = len(value.encode("utf-8", "replace"))
    if size > limits.KERNEL_ARGS_MAX:
        return f"has {size} bytes in UTF-8; at most {limits.KERNEL_ARGS_MAX} are allowed"
    return None


def _check_word(value: str) -> str | None:
    if _WORD.fullmatch(value) is None:
        return f"must begin with a letter or digit and hold letters, digits, '.', '_' and '-' only, not {shown(value)}"
    return None


def _check_address(value: str) -> str | None:
    if _HEX_ADDRESS.fullmatch(value) is None:
        return f"must be a hexadecimal address such as 0xfe000000, not {shown(value)}"
    return None


def parse(data: bytes, what: str = "the manifest") -> Manifest:
    """Reads and checks a manifest from its bytes.

    Raises:
        JsonInvalid: not strict JSON.
        ManifestInvalid: breaks the specification; names every problem.
    """
    if len(data) <= _REMEMBERED_MAX:
        with contextlib.suppress(OvmsError):  # which is to tell of what
            return _remembered(data)
    return _parse(data, what)


@functools.lru_cache(maxsize=16)
def _remembered(data: bytes) -> Manifest:
    # checked as it comes, and looked up as it is used: the same bytes, in the same command
    return _parse(data, "the manifest")


def _parse(data: bytes, what: str) -> Manifest:
    return check(strictjson.parse(data, what, max_size=limits.MANIFEST_MAX), what)


def check(document: Any, what: str = "the manifest") -> Manifest:
    """Checks a parsed manifest.

    Raises:
        ManifestInvalid: breaks the specification; names every problem.
    """
    problems: list[Problem] = []
    top = Reader(document, "$", problems, rule="MAN-1", text_rule="MAN-6")
    if (version := top.integer("schemaVersion", 0, 2**31, required=True, rule="MAN-2")) not in (None, SCHEMA_VERSION):
        # VER-1: of another version nothing else is looked at
        top.problem("schemaVersion", f"must be {SCHEMA_VERSION}, not {version}", "MAN-2")
        raise invalid(problems, what)
    manifest = _read(top, document)
    if problems:
        raise invalid(problems, what)
    return manifest


def _read(top: Reader, document: Any) -> Manifest:
    media_type = top.string("mediaType", required=True, rule="MAN-3")
    if media_type is not None and media_type != mediatypes.MANIFEST:
        top.problem("mediaType", f"must be {mediatypes.MANIFEST}, not {shown(media_type)}", "MAN-3")
    name = top.string("name", required=True, max_length=limits.NAME_MAX, check=_check_name, rule="MAN-4")
    version = top.string("version", required=True, max_length=limits.NAME_MAX, rule="MAN-5")
    kernel, initrd = top.child("kernel", rule="MAN-9"), top.child("initrd", rule="MAN-10")
    if "initrd" in top.value and "kernel" not in top.value:
        top.problem("initrd", "needs a kernel that loads it", "MAN-10")
    bootstrap = top.child("bootstrap", rule="MAN-22")
    return Manifest(
        name=name or "",
        version=version or "",
        kernel=None
        if kernel is None
        else Kernel(
            _ref(kernel), kernel.string("args", empty=True, max_length=limits.KERNEL_ARGS_MAX, check=_check_args) or ""
        ),
        initrd=None if initrd is None else Initrd(_ref(initrd)),
        disk_layers=_read_disks(top),
        ram_snapshot=_read_ram(top.child("ramSnapshot", rule="MAN-15")),
        devices=_read_devices(top),
        metadata=_read_metadata(top.child("metadata", rule="MAN-19")),
        runtime_hints=_read_hints(top.child("runtimeHints", rule="MAN-21")),
        bootstrap=None if bootstrap is None else Bootstrap(_ref(bootstrap)),
        document=document if top.ok else {},
    )


def _ref(item: Reader) -> str:
    if "ref" not in item.value:
        item.problem("ref", "is required")
        return ""
    return item.string("ref", rule="MAN-7", check=lambda value: _check_ref(item, "ref", value)) or ""


def _check_ref(item: Reader, key: str, value: str) -> str | None:
    if value.startswith(("sha256:", "sha512:")) and not is_digest(value):
        item.problem(key, f"must be 'sha256:' and 64 hexadecimal digits, not {shown(value)}", "MAN-8")
    return None


def _read_disks(top: Reader) -> tuple[DiskLayer, ...]:
    layers = []
    for i, item in enumerate(top.children("diskLayers", limits.DISK_LAYERS_MAX, rule="MAN-11")):
        layer = DiskLayer(
            _ref(item),
            item.choice("format", DiskFormat, required=True, rule="MAN-12") or DiskFormat.QCOW2,
            item.integer("size", 1, limits.DISK_LAYER_MAX, rule="MAN-14"),
        )
        if i > 0 and layer.format is DiskFormat.RAW:
            item.problem(
                "format", "only the base layer can be raw: a raw image cannot be a diff on another layer", "MAN-13"
            )
        layers.append(layer)
    return tuple(layers)


def _read_ram(item: Reader | None) -> RamSnapshot | None:
    if item is None:
        return None
    ref = _ref(item)
    parents = item.strings("parents", limits.RAM_PARENTS_MAX, rule="MAN-16")
    for i, parent in enumerate(parents):
        if not parent:
            item.problem(f"parents[{i}]", "must not be empty", "MAN-7")
        _check_ref(item, f"parents[{i}]", parent)
        if parent == ref or parent in parents[:i]:
            item.problem(f"parents[{i}]", "is named twice", "MAN-16")
    return RamSnapshot(
        ref,
        item.choice("compression", Compression) or Compression.LZ4,
        item.boolean("preload_hint", False),
        item.boolean("mlock_required", False),
        parents,
    )


def _read_devices(top: Reader) -> tuple[Device, ...]:
    devices: list[Device] = []
    for item in top.children("devices", limits.DEVICES_MAX, rule="MAN-17"):
        address = item.string("mmio_addr", check=_check_address, rule="MAN-18")
        size = item.integer("size", 1, limits.IVSHMEM_MAX, rule="MAN-18")
        device = Device(
            item.string("type", required=True, max_length=limits.NAME_MAX, check=_check_word) or "",
            item.string("name", required=True, max_length=limits.NAME_MAX, check=_check_word) or "",
            size,
            None if address is None else int(address, 16),
        )
        if device.name and any(other.name == device.name for other in devices):
            item.problem("name", f"another device is named {shown(device.name)}")
        if device.type == "ivshmem" and size is not None and (size & (size - 1) or size < limits.IVSHMEM_MIN):
            item.problem("size", f"an ivshmem device has a power of two from {limits.IVSHMEM_MIN}, not {size}", "DEV-2")
        devices.append(device)
    return tuple(devices)


def _read_metadata(item: Reader | None) -> Metadata:
    if item is None:
        return Metadata()
    platform = item.child("platform", rule="MAN-20")
    return Metadata(
        item.string("author", empty=True),
        item.string("created", check=check_time),
        Platform()
        if platform is None
        else Platform(platform.string("arch", check=_check_word) or "x86_64", platform.boolean("uefi", False)),
    )


def _read_hints(item: Reader | None) -> RuntimeHints:
    if item is None:
        return RuntimeHints()
    return RuntimeHints(
        item.strings("preferredRuntime", limits.RUNTIMES_MAX),
        item.integer("coldStartTargetMs", 0, limits.COLD_START_MAX),
    )
