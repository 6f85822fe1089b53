"""The OVMS manifest: checked once at the edge, handed inwards as typed values.

Source: the OVMS v0.1 draft, section "manifest". Every problem is reported, each with its JSON path; unknown fields are
kept (they live on in ``document``), because what is hashed and signed is the original bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from ovms.errors import ManifestInvalid
from ovms.spec import limits, mediatypes, strictjson

SCHEMA_VERSION: Final = 1

#: (JSON path, what is wrong there)
Problem = tuple[str, str]

_HEX_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{1,16}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME: Final = re.compile(
    r"[0-9]{4}(-[0-9]{2}){2}[Tt][0-9]{2}(:[0-9]{2}){2}(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_ENV: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_PORT: Final = re.compile(r"([0-9]{1,5})/(tcp|udp)")


class DiskFormat(StrEnum):
    """How a disk layer is stored. ``ovfms`` is a name that the draft never defines: no runtime takes it."""

    QCOW2 = "qcow2"
    RAW = "raw"
    OVFMS = "ovfms"


class Compression(StrEnum):
    """How the chunks of a RAM snapshot are compressed."""

    LZ4 = "lz4"
    ZSTD = "zstd"


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
    """A RAM snapshot to restore from."""

    ref: str
    compression: Compression = Compression.LZ4
    preload_hint: bool = False
    mlock_required: bool = False


@dataclass(frozen=True)
class Device:
    """A device beside disk, network and console; ``size`` in bytes."""

    type: str
    name: str
    size: int | None = None
    mmio_addr: int | None = None


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

    def refs(self) -> list[tuple[str, str]]:
        """Every ``ref`` with the JSON path at which it stands, in the order of the OCI layers."""
        answer: list[tuple[str, str]] = []
        if self.kernel is not None:
            answer.append(("$.kernel.ref", self.kernel.ref))
        if self.initrd is not None:
            answer.append(("$.initrd.ref", self.initrd.ref))
        answer.extend((f"$.diskLayers[{i}].ref", layer.ref) for i, layer in enumerate(self.disk_layers))
        if self.ram_snapshot is not None:
            answer.append(("$.ramSnapshot.ref", self.ram_snapshot.ref))
        if self.bootstrap is not None:
            answer.append(("$.bootstrap.ref", self.bootstrap.ref))
        return answer


class _Reader:
    """Takes typed fields out of one object, and notes each one that is missing or wrong."""

    def __init__(self, value: Any, path: str, problems: list[Problem]) -> None:
        self.path = path
        self.problems = problems
        self.ok = isinstance(value, dict)
        self.value: dict[str, Any] = value if self.ok else {}
        if not self.ok:
            problems.append((path, f"must be an object, not {_kind(value)}"))

    def problem(self, key: str, text: str) -> None:
        self.problems.append((f"{self.path}.{key}", text))

    def _typed(self, key: str, kind: type, wanted: str, required: bool) -> Any:
        if key not in self.value:
            if required and self.ok:
                self.problem(key, "is required")
            return None
        value = self.value[key]
        # bool is a subclass of int, and 1 is no boolean
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.problem(key, f"must be {wanted}, not {_kind(value)}")
            return None
        return value

    def string(
        self,
        key: str,
        *,
        required: bool = False,
        empty: bool = False,
        max_length: int = limits.STRING_MAX,
        check: Callable[[str], str | None] | None = None,
    ) -> str | None:
        value: str | None = self._typed(key, str, "a string", required)
        if value is None:
            return None
        wrong = _text_problem(value, empty=empty, max_length=max_length) or (check(value) if check else None)
        if wrong:
            self.problem(key, wrong)
            return None
        return value

    def integer(self, key: str, low: int, high: int, *, required: bool = False) -> int | None:
        value: int | None = self._typed(key, int, "an integer", required)
        if value is not None and not low <= value <= high:
            self.problem(key, f"must be from {low} to {high}, not {_shown_number(value)}")
            return None
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value: bool | None = self._typed(key, bool, "true or false", False)
        return default if value is None else value

    def choice(self, key: str, choices: type[StrEnum], *, required: bool = False) -> Any:
        value = self.string(key, required=required)
        if value is None:
            return None
        try:
            return choices(value)
        except ValueError:
            self.problem(key, f"must be one of {', '.join(choices)}, not {_shown(value)}")
            return None

    def items(self, key: str, max_items: int) -> list[Any]:
        value: list[Any] | None = self._typed(key, list, "a list", False)
        if value is not None and len(value) > max_items:
            self.problem(key, f"has {len(value)} entries; at most {max_items} are allowed")
            return []
        return value or []

    def strings(
        self, key: str, max_items: int, check: Callable[[str], str | None] | None = None, *, lines: bool = False
    ) -> tuple[str, ...]:
        """A list of strings; with *lines* they may hold any character but NUL, as arguments of a program may."""
        answer = []
        for i, item in enumerate(self.items(key, max_items)):
            if not isinstance(item, str):
                self.problem(f"{key}[{i}]", f"must be a string, not {_kind(item)}")
                continue
            wrong = _text_problem(item, empty=True, max_length=limits.STRING_MAX, lines=lines)
            if wrong := wrong or (check(item) if check else None):
                self.problem(f"{key}[{i}]", wrong)
            answer.append(item)
        return tuple(answer)

    def child(self, key: str) -> _Reader | None:
        if key not in self.value:
            return None
        child = _Reader(self.value[key], f"{self.path}.{key}", self.problems)
        return child if child.ok else None

    def children(self, key: str, max_items: int) -> list[_Reader]:
        readers = [
            _Reader(item, f"{self.path}.{key}[{i}]", self.problems) for i, item in enumerate(self.items(key, max_items))
        ]
        return [reader for reader in readers if reader.ok]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "…")


def _shown_number(value: int) -> str:
    return str(value) if value.bit_length() <= 64 else "a number of more than 64 bits"


def _text_problem(value: str, *, empty: bool, max_length: int, lines: bool = False) -> str | None:
    if not value and not empty:
        return "must not be empty"
    if len(value) > max_length:
        return f"has {len(value)} characters; at most {max_length} are allowed"
    if lines:
        return "holds a NUL character" if "\0" in value else None
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in value):
        return "holds control characters"
    return None


def _check_name(value: str) -> str | None:
    if _NAME.fullmatch(value) is None:
        return f"must begin with a letter or digit and hold letters, digits, '.', '_' and '-' only, not {_shown(value)}"
    return None


def _check_time(value: str) -> str | None:
    # fromisoformat takes far more than RFC 3339 does (week dates, no seconds), but no leap second
    if _TIME.fullmatch(value):
        with contextlib.suppress(ValueError):
            seconds = "59" if value[17:19] == "60" else value[17:19]
            datetime.fromisoformat(f"{value[:17]}{seconds}{value[19:]}".upper())
            return None
    return f"must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z, not {_shown(value)}"


def parse(data: bytes, what: str = "the manifest") -> Manifest:
    """Reads and checks a manifest from its bytes.

    Raises:
        JsonInvalid: not strict JSON.
        ManifestInvalid: breaks the specification; names every problem.
    """
    return check(strictjson.parse(data, what, max_size=limits.MANIFEST_MAX), what)


def check(document: Any, what: str = "the manifest") -> Manifest:
    """Checks a parsed manifest.

    Raises:
        ManifestInvalid: breaks the specification; names every problem.
    """
    problems: list[Problem] = []
    manifest = _read(_Reader(document, "$", problems), document)
    if problems:
        raise invalid(problems, what)
    return manifest


def invalid(problems: list[Problem], what: str) -> ManifestInvalid:
    """The error that names every problem of a manifest."""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ManifestInvalid(
        f"{what} has {count}", problems=problems, hint="each is named by its JSON path; README.md shows a manifest"
    )


def _read(top: _Reader, document: Any) -> Manifest:
    version = top.integer("schemaVersion", 0, 2**31, required=True)
    if version is not None and version != SCHEMA_VERSION:
        top.problem("schemaVersion", f"must be {SCHEMA_VERSION}, not {version}")
    media_type = top.string("mediaType", required=True)
    if media_type is not None and media_type != mediatypes.MANIFEST:
        top.problem("mediaType", f"must be {mediatypes.MANIFEST}, not {_shown(media_type)}")
    kernel, initrd = top.child("kernel"), top.child("initrd")
    ram, bootstrap = top.child("ramSnapshot"), top.child("bootstrap")
    return Manifest(
        name=top.string("name", required=True, max_length=limits.NAME_MAX, check=_check_name) or "",
        version=top.string("version", required=True, max_length=limits.NAME_MAX) or "",
        kernel=None
        if kernel is None
        else Kernel(
            kernel.string("ref", required=True) or "",
            kernel.string("args", empty=True, max_length=limits.KERNEL_ARGS_MAX) or "",
        ),
        initrd=None if initrd is None else Initrd(initrd.string("ref", required=True) or ""),
        disk_layers=_read_disks(top),
        ram_snapshot=None
        if ram is None
        else RamSnapshot(
            ram.string("ref", required=True) or "",
            ram.choice("compression", Compression) or Compression.LZ4,
            ram.boolean("preload_hint", False),
            ram.boolean("mlock_required", False),
        ),
        devices=_read_devices(top),
        metadata=_read_metadata(top.child("metadata")),
        runtime_hints=_read_hints(top.child("runtimeHints")),
        bootstrap=None if bootstrap is None else Bootstrap(bootstrap.string("ref", required=True) or ""),
        document=document if top.ok else {},
    )


def _read_disks(top: _Reader) -> tuple[DiskLayer, ...]:
    layers = []
    for i, item in enumerate(top.children("diskLayers", limits.DISK_LAYERS_MAX)):
        layer = DiskLayer(
            item.string("ref", required=True) or "",
            item.choice("format", DiskFormat, required=True) or DiskFormat.QCOW2,
            item.integer("size", 1, limits.DISK_LAYER_MAX),
        )
        if i > 0 and layer.format is DiskFormat.RAW:
            item.problem("format", "only the base layer can be raw: a raw image cannot be a diff on another layer")
        layers.append(layer)
    return tuple(layers)


def _read_devices(top: _Reader) -> tuple[Device, ...]:
    devices: list[Device] = []
    for item in top.children("devices", limits.DEVICES_MAX):
        address = item.string("mmio_addr")
        if address is not None and not _HEX_ADDRESS.fullmatch(address):
            item.problem("mmio_addr", f"must be a hexadecimal address such as 0xfe000000, not {_shown(address)}")
            address = None
        device = Device(
            item.string("type", required=True, max_length=limits.NAME_MAX, check=_check_name) or "",
            item.string("name", required=True, max_length=limits.NAME_MAX, check=_check_name) or "",
            item.integer("size", 1, limits.IVSHMEM_MAX),
            None if address is None else int(address, 16),
        )
        size = device.size
        if device.name and any(other.name == device.name for other in devices):
            item.problem("name", f"another device is named {_shown(device.name)}")
        missing = size is None and "size" not in item.value  # any other size of None has its problem already
        if device.type == "ivshmem" and (missing or (size is not None and size & (size - 1))):
            item.problem("size", "an ivshmem device needs a size that is a power of two")
        devices.append(device)
    return tuple(devices)


def _read_metadata(item: _Reader | None) -> Metadata:
    if item is None:
        return Metadata()
    platform = item.child("platform")
    return Metadata(
        item.string("author", empty=True),
        item.string("created", check=_check_time),
        Platform()
        if platform is None
        else Platform(platform.string("arch", check=_check_name) or "x86_64", platform.boolean("uefi", False)),
    )


def _read_hints(item: _Reader | None) -> RuntimeHints:
    if item is None:
        return RuntimeHints()
    return RuntimeHints(item.strings("preferredRuntime", 32), item.integer("coldStartTargetMs", 0, 2**31))


@dataclass(frozen=True)
class BootstrapConfig:
    """A container's configuration, for the guest's bootstrap to follow."""

    env: tuple[str, ...]
    workdir: str | None
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    exposed_ports: tuple[str, ...]


def parse_bootstrap(data: bytes, what: str = "the bootstrap config") -> BootstrapConfig:
    """Reads and checks a bootstrap config.

    Raises:
        JsonInvalid, ManifestInvalid: as for :func:`parse`.
    """
    problems: list[Problem] = []
    top = _Reader(strictjson.parse(data, what, max_size=limits.BOOTSTRAP_MAX), "$", problems)

    def env(value: str) -> str | None:
        return None if _ENV.fullmatch(value) else f"must be of the form NAME=value, not {_shown(value)}"

    def port(value: str) -> str | None:
        match = _PORT.fullmatch(value)
        if match is not None and 1 <= int(match[1]) <= 65535:
            return None
        return f"must be a port such as 80/tcp, not {_shown(value)}"

    config = BootstrapConfig(
        top.strings("env", 4096, env, lines=True),
        top.string("workdir"),
        top.strings("entrypoint", 1024, lines=True),
        top.strings("cmd", 1024, lines=True),
        top.strings("exposedPorts", 1024, port),
    )
    if problems:
        raise invalid(problems, what)
    return config
