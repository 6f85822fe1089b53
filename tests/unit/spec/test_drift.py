"""Every number of the normative documents is the code's: one that is changed on one side alone is noticed.

``scripts/spec_mutations.py`` changes each of them once, and looks whether a test here fails.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from support import ram, rfc
from support.rfc import BOOTSTRAP, MAIN, RAMSNAP
from support.schemas import SPEC

from ovms.artifact import kernels
from ovms.disk import qcow2
from ovms.errors import SnapshotInvalid
from ovms.oci import platform
from ovms.spec import api, bootstrap, limits, manifest, mediatypes, ramcrypt, ramheader, ramsnap
from ovms.spec.manifest import Compression, DiskFormat

# --- limits ----------------------------------------------------------------------------------------------------------

UNITS: Final = {"KIB", "MIB", "GIB", "TIB"}


def value(text: str) -> int:
    number, _, unit = text.partition(" ")
    return int(number) * {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]


@pytest.mark.spec("LIM-1")
def test_limits() -> None:
    rows = [*rfc.table(MAIN, "name", "value"), *rfc.table(MAIN, "default", "value")]
    stated = {name: value(number) for name, number, _ in rows}
    assert len(stated) == len(rows)
    assert stated == {name: number for name, number in vars(limits).items() if name.isupper() and name not in UNITS}


@pytest.mark.spec("LIM-1")
def test_every_limit_that_a_document_names_is_in_the_table() -> None:
    known = {row[0] for head in ("name", "default") for row in rfc.table(MAIN, head, "value")}
    for path in (MAIN, RAMSNAP, BOOTSTRAP):
        assert rfc.limit_names(path) <= known, path.name


def test_every_limit_is_tried() -> None:
    """By a test, or by a vector."""
    more = [SPEC.parent / "scripts" / "make_vectors.py", SPEC / "vectors" / "api" / "index.json"]
    files = [path for path in (SPEC.parent / "tests").rglob("*.py") if path.name != Path(__file__).name]
    text = "".join(path.read_text(encoding="utf-8") for path in [*files, *more])
    names = {row[0] for head in ("name", "default") for row in rfc.table(MAIN, head, "value")}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


# --- the rules' figures ----------------------------------------------------------------------------------------------


def hexadecimal(number: int, digits: int = 0) -> str:
    return f"0x{number:0{digits}x}"


def _bytes(data: bytes) -> str:
    return f"`{data.hex(' ').upper()}`"


CONTROL: Final = ["U+0000", "U+001F", "U+007F"]
EXTENSIONS: Final = {rule: kind for kind, (_, rule) in qcow2.REFUSED_EXTENSIONS.items()}
PORTS: Final = ["1", "65535"]

#: What stands in the text of each rule that has figures, as the code has it where it has it.
FIGURES: Final[dict[str, list[str]]] = {
    "DOC-3": ["754"],
    "DOC-6": ["1", "1.0"],
    "DOC-9": ["64"],
    "MAN-2": [str(manifest.SCHEMA_VERSION)],
    "MAN-4": ["1"],
    "MAN-5": ["1"],
    "MAN-6": CONTROL,
    "MAN-7": ["1"],
    "MAN-14": ["1"],
    "MAN-17": ["1"],
    "MAN-18": ["1", "1", "16"],
    "MAN-19": ["60", "0001", "9999"],
    "MAN-21": ["0"],
    "OCI-1": ["2"],
    "OCI-9": ["0", "2⁶³", "1"],
    "OCI-20": ["404"],
    "REF-1": [*PORTS, "1"],
    "BIN-1": ["2.00"],
    "BIN-4": ["0.1"],
    "BIN-5": [f"0x{kernels.SETUP_SIZE:x} bytes", "`55 AA`", "0x1FE", "0x202", "0x0200", "0x206", "16 bits", "0", "0x211"],
    "BIN-6": [
        *("32", "64 bits", "2", "3", "3", "62", "1", "32", "56 bytes"),
        str(kernels.NOTE_PVH_ENTRY),
        _bytes(kernels.NOTE_OWNER),
    ],
    "LAY-5": ["1"],
    "LAY-6": ["512 bytes"],
    "LAY-8": [_bytes(qcow2.MAGIC), "2", "3"],
    "LAY-10": ["2", hexadecimal(EXTENSIONS["LAY-10"])],
    "LAY-11": [hexadecimal(EXTENSIONS["LAY-11"], 8)],
    "LAY-12": [hexadecimal(EXTENSIONS["LAY-12"])],
    "LAY-13": [str(bit) for bit, reason in qcow2.INCOMPATIBLE.items() if reason is None],
    "LAY-14": [
        f"{1 << qcow2.CLUSTER_BITS_MIN} bytes",
        f"{(1 << qcow2.CLUSTER_BITS_MAX) >> 20} MiB",
        *("64 bits", "8", "104 bytes", "0", "1", "3"),
    ],
    "DEV-1": ["0.1"],
    "DEV-2": ["1af4:1110", "1", "2"],
    "RUN-1": ["401"],
    "RUN-2": ["415", "413"],
    "RUN-5": ["404", "405"],
    "RUN-9": ["1", "20", "1024", "1"],
    "RUN-11": ["1", "24 hours"],
    "RUN-12": ["0"],
    "RUN-16": ["U+FFFD"],
    "RUN-21": ["0", "0", "0"],
    "STA-2": ["409"],
    "STA-4": ["409"],
    "STA-5": ["404"],
    "VER-3": ["0.1"],
    "VER-4": ["0.2", "0.1"],
    "RAM-1": [str(ramsnap.PAGE)],
    "RAM-7": ["96"],
    "RAM-9": ["4 bytes"],
    "RAM-11": ["0", "1 MiB"],
    "RAM-12": ["0"],
    "RAM-13": [str(ramsnap.CODEC_STORED), str(ramsnap.CODEC_ZSTD), "1", str(ramsnap.CODEC_STORED)],
    "RAM-14": [str(ramsnap.CODEC_ZERO), "0", "32"],
    "RAM-15": ["25"],
    "RAM-17": [str(ramsnap.CODEC_LZ4), str(ramsnap.CODEC_ZSTD)],
    "RAM-20": [str(ramheader.SCHEMA_VERSION)],
    "RAM-23": ["1", "1", "1", "2⁶³", "1"],
    "RAM-58": [str(ramcrypt.KEY_SIZE)],
    # what is encrypted, and how, is held by the vectors: they were made with these
    "RAM-61": [str(ramsnap.ENCRYPTED), f"{ramcrypt.TAG_SIZE} bytes", "1", "4 bytes", "8 bytes", "4 bytes", "1 byte"],
    "RAM-62": ["12", "96 bytes"],
    "BOOT-1": CONTROL,
    "BOOT-2": ["U+0000"],
    "BOOT-4": ["U+0000"],
    "BOOT-5": PORTS,
    "BOOT-6": ["0"],
    "BOOT-7": ["0", "30"],
    "BOOT-8": ["1"],
    "BOOT-16": ["0755"],
    "BOOT-17": ["0", "0", "0"],
    "BOOT-21": ["0", "255", "128", "127", "126", "125"],
    "BOOT-23": ["0", "255"],
    "BOOT-24": ["20 s"],
    "BOOT-36": ["1", "5 s"],
    "BOOT-38": ["125"],
    "BOOT-43": ["9660"],
    "BOOT-44": ["64 characters"],
    "BOOT-46": ["0700", "0644"],
}  # fmt: skip

NAMES: Final[dict[str, list[str]]] = {
    "MAN-3": [mediatypes.MANIFEST],
    "OCI-1": [mediatypes.OCI_MANIFEST, mediatypes.MANIFEST],
    "OCI-4": [mediatypes.OCI_EMPTY],
    "OCI-12": [mediatypes.DISK_FORMAT_ANNOTATION],
    "OCI-14": [mediatypes.RAM_CONTROL_ANNOTATION, mediatypes.RAM_CONTROL_SIZE_ANNOTATION],
    "OCI-15": [mediatypes.TITLE_ANNOTATION],
    "OCI-23": [mediatypes.REF_NAME_ANNOTATION, "ovms.blobs/"],
    "RUN-2": [api.JSON],
    "REF-4": [mediatypes.REF_NAME_ANNOTATION],
    "ERR-1": [api.PROBLEM],
    "RAM-17": [mediatypes.RAM_SNAPSHOT_ZSTD],
    "RAM-45": [mediatypes.RAM_SNAPSHOT_LZ4],
    "RAM-46": [
        mediatypes.RAM_CONTROL_SIZE_ANNOTATION,
        mediatypes.RAM_CONTROL_ANNOTATION,
    ],
}


#: The figures of the other tables, in their order.
TABLES: Final[dict[str, list[str]]] = {
    "ovms-v0.1.md:  | ": ["0.1"],
    "ovms-v0.1.md: call | body": ["0.1"],
    "ovms-v0.1.md: name | value": ["2048"],
    "ramsnap-v1.md: field | content": ["1"],
    "ovms-bootstrap.md:  | ": ["0.1"],
}


def rules() -> dict[str, str]:
    return {**rfc.rules(MAIN), **rfc.rules(RAMSNAP), **rfc.rules(BOOTSTRAP)}


def test_the_figures_of_each_rule() -> None:
    stated = {rule: figures for rule, text in rules().items() if (figures := rfc.figures(text))}
    assert stated == {rule: figures for rule, figures in FIGURES.items() if figures}


def test_the_media_types_and_annotations_of_each_rule() -> None:
    assert {rule: names for rule, text in rules().items() if (names := rfc.names(text))} == NAMES


def test_what_is_taken_where_nothing_is_said() -> None:
    texts = rules()
    assert f"`PATH={bootstrap.DEFAULT_PATH}`" in texts["BOOT-14"]
    assert f"(default `{bootstrap.DEFAULT_STOP_SIGNAL}`)" in texts["BOOT-24"]
    assert f"`{bootstrap.OVMS_INIT}`, which an absent field means" in texts["BOOT-8"]
    assert "`x86_64`" in texts["MAN-20"]
    assert manifest.Platform() == manifest.Platform("x86_64", uefi=False)
    assert f"`compression` is `{manifest.RamSnapshot('').compression}` (the default)" in texts["MAN-15"]
    assert [f"`{format}`" for format in DiskFormat] == ["`qcow2`", "`raw`", "`ovfms`"]
    assert "MUST be `qcow2`, `raw` or `ovfms`" in texts["MAN-12"]
    assert str(platform.HOST) == "linux/amd64"
    assert platform.Platform.of_guest("x86_64") == platform.HOST
    assert "`os` is `linux`" in texts["OCI-17"]
    assert "(`amd64` for `x86_64`)" in texts["OCI-17"]


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-10")
def test_media_types() -> None:
    rows = {row[0]: (row[1], row[2]) for row in rfc.table(MAIN, "part", "write")}
    assert rows == {
        "OVMS manifest": (mediatypes.MANIFEST, ""),
        "kernel": (mediatypes.KERNEL, ""),
        "initrd": (mediatypes.INITRD, ""),
        "disk layer": (mediatypes.DISK_LAYER, mediatypes.DISK_LAYER_OVMS),
        "RAM snapshot, lz4": (mediatypes.RAM_SNAPSHOT_LZ4, ""),
        "RAM snapshot, zstd": (mediatypes.RAM_SNAPSHOT_ZSTD, ""),
        "RAM snapshot, lz4, encrypted": (mediatypes.RAM_SNAPSHOT_LZ4 + mediatypes.RAM_ENCRYPTED_SUFFIX, ""),
        "RAM snapshot, zstd, encrypted": (mediatypes.RAM_SNAPSHOT_ZSTD + mediatypes.RAM_ENCRYPTED_SUFFIX, ""),
        "bootstrap config": (mediatypes.BOOTSTRAP, ""),
    }


#: Field of the prefix → its value in :data:`SAMPLE`, by the table's name.
SAMPLE: Final = ram.blob({0: b"a" * ramsnap.PAGE, 2: b"b" * ramsnap.PAGE})


@pytest.mark.spec("RAM-6")
def test_the_prefix() -> None:
    prefix = ramsnap.parse_prefix(SAMPLE)
    header = len(json.dumps(ram.HEADER.to_json(), indent=2)) + 1
    stated = {
        "magic": (ramsnap.MAGIC, ramsnap.MAGIC.hex(" ").upper()),
        "version": (ramsnap.VERSION, str(ramsnap.VERSION)),
        "prefix size": (ramsnap.PREFIX_SIZE, str(ramsnap.PREFIX_SIZE)),
        "memory size in bytes": (ram.HEADER.memory, f"RAM_MIN to RAM_MAX, a multiple of {ramsnap.PAGE}"),
        "page size": (ramsnap.PAGE, str(ramsnap.PAGE)),
        "chunk pages: the most pages that a chunk with data holds": (2, "1 to RAM_CHUNK_PAGES_MAX"),
        "header offset": (ramsnap.PREFIX_SIZE, str(ramsnap.PREFIX_SIZE)),
        "header size": (header, "2 to RAM_HEADER_MAX"),
        "device state offset": (prefix.state_offset, "header offset + header size"),
        "device state size, as stored": (prefix.state_size, "5 to RAM_STATE_MAX"),
        "index offset": (prefix.index_offset, "device state offset + device state size"),
        "number of index entries": (2, "0 to RAM_CHUNKS_MAX, and to the number of pages"),
        "data offset": (len(SAMPLE) - prefix.data_size, f"end of the index, rounded up to {ramsnap.PAGE}"),
        "data size": (prefix.data_size, "see RAM-12"),
        "SHA-256 of header, device state and index, as stored": (prefix.control_digest, ""),
    }
    at = 0
    rows = rfc.table(RAMSNAP, "offset", "size", "field", "must be")
    for offset, size, field, must in rows:
        assert int(offset) == at
        at += int(size)
        found, cell = stated[field]
        assert must == cell, field
        data = SAMPLE[int(offset) : at]
        assert (data if isinstance(found, bytes) else int.from_bytes(data, "little")) == found, field
    assert [row[2] for row in rows] == list(stated)
    assert at == ramsnap.PREFIX_SIZE


@pytest.mark.spec("RAM-6")
@pytest.mark.parametrize(
    ("offset", "form", "low", "high"),
    [
        (28, "<I", 1, limits.RAM_CHUNK_PAGES_MAX),
        (40, "<Q", 2, limits.RAM_HEADER_MAX),
        (56, "<Q", 5, limits.RAM_STATE_MAX),
        (16, "<Q", limits.RAM_MIN, limits.RAM_MAX),
    ],
)
def test_the_prefix_s_limits(offset: int, form: str, low: int, high: int) -> None:
    """The least and the most are taken, and one less and one more are not."""
    fields = list(struct.unpack("<8sIIQIIQQQQQQQQ32s", SAMPLE[:128]))
    index = {28: 5, 40: 7, 56: 9, 16: 3}[offset]
    step = ramsnap.PAGE if offset == 16 else 1
    for number, good in ((low, True), (high, True), (low - step, False), (high + step, False)):
        changed = list(fields)
        changed[index] = number
        changed[8] = changed[6] + changed[7]
        changed[10] = changed[8] + changed[9]
        changed[12] = -(-(changed[10] + changed[11] * 64) // ramsnap.PAGE) * ramsnap.PAGE
        raw = struct.pack("<8sIIQIIQQQQQQQQ32s", *changed)
        if good:
            ramsnap.parse_prefix(raw)
        else:
            with pytest.raises(SnapshotInvalid) as info:
                ramsnap.parse_prefix(raw)
            assert (info.value.context["rule"], info.value.context["offset"]) == ("RAM-6", offset)


def test_the_index() -> None:
    prefix = ramsnap.parse_prefix(SAMPLE)
    second = SAMPLE[prefix.index_offset + ramsnap.ENTRY_SIZE :][: ramsnap.ENTRY_SIZE]
    chunk = ramsnap.parse_control(SAMPLE).chunks[1]
    stated = {
        "number of the first page": 2,
        "number of pages": 1,
        "stored size in bytes": chunk.stored_size,
        "offset of the stored bytes, from the start of the data region": chunk.offset,
        "codec": chunk.codec,
        "zero": 0,
        "SHA-256 of the uncompressed pages; of the stored bytes where they are encrypted (RAM-61)": int.from_bytes(
            chunk.digest, "little"
        ),
    }
    (rows,) = [rows for head, rows in rfc.tables(RAMSNAP) if head == ("offset", "size", "field")]
    assert [row[2] for row in rows] == list(stated)
    at = 0
    for offset, size, field in rows:
        assert int(offset) == at
        at += int(size)
        assert int.from_bytes(second[int(offset) : at], "little") == stated[field], field
    assert at == ramsnap.ENTRY_SIZE
    text = RAMSNAP.read_text(encoding="utf-8")
    assert f"(section 11) {ramsnap.ENCRYPTED} is added to the codec" in text
    assert f"Each index entry has {ramsnap.ENTRY_SIZE} bytes:" in text
    assert f"The first {ramsnap.PREFIX_SIZE} bytes:" in text
    codecs = {name: int(number) for number, name, _ in rfc.table(RAMSNAP, "codec", "name")}
    assert codecs == {
        "stored": ramsnap.CODEC_STORED,
        "lz4": ramsnap.CODEC_LZ4,
        "zstd": ramsnap.CODEC_ZSTD,
        "zero": ramsnap.CODEC_ZERO,
    }
    assert set(ramsnap.CODECS) == set(Compression)


def test_the_header_s_fields() -> None:
    schema = json.loads((SPEC / "schemas" / "ramsnap.v1.json").read_bytes())
    stated: set[str] = set()
    rows = rfc.table(RAMSNAP, "field", "content")
    for names, _ in rows:
        stated.update(name.strip().removesuffix("[]") for name in names.split(","))
    ours = set()
    for name, field in schema["properties"].items():
        inner = field.get("properties", {})
        ours.update({f"{name}.{key}" for key in inner} or {name})
    assert stated == ours
    content = {row[0]: row[1] for row in rows}
    assert content["schemaVersion"] == str(ramheader.SCHEMA_VERSION)
    assert content["machine.arch"] == "x86_64" == ram.HEADER.arch


def test_the_header_s_devices() -> None:
    needed: dict[str, list[str]] = {}
    for types, text in rfc.table(RAMSNAP, "type", "further fields"):
        words = re.split(r"[^a-z]+", re.sub(r"\(.*?\)|:[^;]*", "", text))
        fields = [name for name in ("name", "size", "mac", "backend") if name in words]
        needed.update({type.strip(): fields for type in types.split(",")})
    assert set(needed) == set(ramheader.DEVICE_TYPES)
    values = {"name": "a", "size": 4096, "mac": "52:54:00:12:34:56", "backend": "user"}
    for type, fields in needed.items():
        whole = {"type": type, **{field: values[field] for field in fields}}
        ramheader.check({**ram.HEADER.to_json(), "devices": [whole]})
        for missing in fields:
            device = {key: value for key, value in whole.items() if key != missing}
            with pytest.raises(SnapshotInvalid) as info:
                ramheader.check({**ram.HEADER.to_json(), "devices": [device]})
            problem = {"path": f"$.devices[0].{missing}", "rule": "RAM-20", "message": "is required"}
            assert info.value.context["problems"] == [problem]
    assert [type for type, fields in needed.items() if not fields] == ["virtio-rng", "vmgenid", "serial"]


def test_the_other_tables() -> None:
    """Cells that hold a number and are not compared with a constant: a change of one has to be meant."""
    spoken: dict[str, list[str]] = {}
    for path in (MAIN, RAMSNAP, BOOTSTRAP):
        for head, rows in rfc.tables(path):
            if head[0] in ("offset", "codec", "code", "state"):
                continue  # these are compared cell by cell
            compared = 2 if head[0] in ("name", "default") else 0
            found = [figure for row in rows for cell in row[compared:] for figure in rfc.figures(cell)]
            if found:
                spoken[f"{path.name}: {' | '.join(head[:2])}"] = found
    assert spoken == TABLES


# --- schemas and the OpenAPI document --------------------------------------------------------------------------------

_KEYWORDS: Final = {
    *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "const", "default", "pattern"),
    *("enum", "uniqueItems", "required"),
}


def keywords(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of all that a schema limits."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _KEYWORDS and not path.endswith("/properties"):
                yield f"{path}/{key}", item
            elif key not in ("examples", "example"):
                yield from keywords(item, f"{path}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from keywords(item, f"{path}/{i}")


def document(name: str) -> Any:
    path = SPEC / name
    data = path.read_text(encoding="utf-8")
    return yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)


SCHEMAS: Final = ("schemas/manifest.v1.json", "schemas/bootstrap.config.v1.json", "schemas/ramsnap.v1.json")
OPENAPI: Final = "api/ovms-runtime.openapi.yaml"
_DEVICE: Final = "/properties/devices/items"
_SCHEMA: Final = "/components/schemas"
_REGIONS: Final = [1 << bit for bit in range(limits.IVSHMEM_MAX.bit_length()) if 1 << bit >= limits.IVSHMEM_MIN]

#: Document → place → the constant that stands there.
LIMITS: Final[dict[str, dict[str, Any]]] = {
    "schemas/manifest.v1.json": {
        "/properties/name/maxLength": limits.NAME_MAX,
        "/properties/version/maxLength": limits.NAME_MAX,
        "/properties/kernel/properties/args/maxLength": limits.KERNEL_ARGS_MAX,
        "/properties/diskLayers/maxItems": limits.DISK_LAYERS_MAX,
        "/properties/ramSnapshot/properties/parents/maxItems": limits.RAM_PARENTS_MAX,
        "/properties/devices/maxItems": limits.DEVICES_MAX,
        f"{_DEVICE}/properties/size/maximum": limits.IVSHMEM_MAX,
        f"{_DEVICE}/then/properties/size/default": limits.IVSHMEM_DEFAULT,
        f"{_DEVICE}/then/properties/size/enum": _REGIONS,
        "/properties/metadata/properties/created/maxLength": limits.STRING_MAX,
        "/properties/runtimeHints/properties/preferredRuntime/maxItems": limits.RUNTIMES_MAX,
        "/properties/runtimeHints/properties/coldStartTargetMs/maximum": limits.COLD_START_MAX,
        "/$defs/ref/maxLength": limits.STRING_MAX,
        "/$defs/text/maxLength": limits.STRING_MAX,
        "/$defs/word/maxLength": limits.NAME_MAX,
        "/$defs/platformWord/maxLength": limits.STRING_MAX,
        "/$defs/diskLayer/properties/size/maximum": limits.DISK_LAYER_MAX,
    },
    "schemas/bootstrap.config.v1.json": {
        "/properties/profile/maxLength": limits.NAME_MAX,
        "/properties/env/maxItems": limits.ENV_MAX,
        "/properties/entrypoint/maxItems": limits.ARGUMENTS_MAX,
        "/properties/cmd/maxItems": limits.ARGUMENTS_MAX,
        "/properties/exposedPorts/maxItems": limits.PORTS_MAX,
        "/properties/user/maxLength": limits.NAME_MAX,
        "/properties/stopSignal/maxLength": limits.NAME_MAX,
        "/$defs/plain/maxLength": limits.STRING_MAX,
        "/$defs/argument/maxLength": limits.ARGUMENT_MAX,
    },
    "schemas/ramsnap.v1.json": {
        "/properties/created/maxLength": limits.STRING_MAX,
        "/properties/cpu/properties/flags/maxItems": limits.RAM_LIST_MAX,
        "/properties/cpu/properties/count/maximum": limits.VCPUS_MAX,
        "/properties/memory/properties/size/minimum": limits.RAM_MIN,
        "/properties/memory/properties/size/maximum": limits.RAM_MAX,
        "/properties/devices/maxItems": limits.RAM_LIST_MAX,
        "/properties/encryption/properties/recipients/maxItems": limits.RAM_RECIPIENTS_MAX,
        "/properties/encryption/properties/key/maxLength": limits.STRING_MAX,
        f"{_DEVICE}/properties/size/maximum": 2**63 - 1,
        f"{_DEVICE}/allOf/0/then/properties/size/maximum": limits.DISK_VIRTUAL_MAX,
        f"{_DEVICE}/allOf/2/then/properties/size/minimum": limits.IVSHMEM_MIN,
        f"{_DEVICE}/allOf/2/then/properties/size/maximum": limits.IVSHMEM_MAX,
        "/properties/disks/maxItems": limits.DISK_LAYERS_MAX,
        "/$defs/text/maxLength": limits.STRING_MAX,
        "/$defs/anyText/maxLength": limits.STRING_MAX,
    },
    OPENAPI: {
        "/paths//start/post/parameters/0/schema/maxLength": limits.KEY_MAX,
        f"{_SCHEMA}/InstanceId/maxLength": limits.NAME_MAX,
        f"{_SCHEMA}/Size/oneOf/0/minimum": limits.MEMORY_MIN,
        f"{_SCHEMA}/Size/oneOf/0/maximum": limits.RAM_MAX,
        f"{_SCHEMA}/Size/oneOf/1/maxLength": api.SIZE_TEXT_MAX,
        f"{_SCHEMA}/Port/properties/guest_port/maximum": 65535,
        f"{_SCHEMA}/Port/properties/host_port/maximum": 65535,
        f"{_SCHEMA}/Port/properties/host_ip/maxLength": api.ADDRESS_MAX,
        f"{_SCHEMA}/Overrides/properties/cpus/maximum": limits.VCPUS_MAX,
        f"{_SCHEMA}/Overrides/properties/ports/maxItems": limits.PORTS_MAX,
        f"{_SCHEMA}/StartRequest/properties/manifest/maxLength": limits.STRING_MAX,
        f"{_SCHEMA}/WarmRequest/properties/manifest/maxLength": limits.STRING_MAX,
        f"{_SCHEMA}/WarmRequest/properties/size/maximum": limits.WARM_MAX,
        f"{_SCHEMA}/StopRequest/properties/timeout_s/maximum": limits.STOP_TIMEOUT_MAX,
        f"{_SCHEMA}/StopRequest/properties/timeout_s/default": limits.STOP_TIMEOUT_DEFAULT,
        f"{_SCHEMA}/SnapshotRequest/properties/tag/maxLength": limits.STRING_MAX,
        f"{_SCHEMA}/SnapshotRequest/properties/encrypt/maxItems": limits.RAM_RECIPIENTS_MAX,
        f"{_SCHEMA}/InjectRequest/properties/content/properties/mmio/properties/device/maxLength": limits.NAME_MAX,
        f"{_SCHEMA}/InjectRequest/properties/content/properties/mmio/properties/offset/maximum": 2**63 - 1,
        f"{_SCHEMA}/Instance/properties/exit_status/maximum": 255,
        f"{_SCHEMA}/LogRecord/properties/text/maxLength": limits.LOG_TEXT_MAX,
        f"{_SCHEMA}/Problem/properties/status/minimum": 400,
        f"{_SCHEMA}/Problem/properties/status/maximum": 599,
        f"{_SCHEMA}/Problem/properties/problems/maxItems": limits.PROBLEMS_MAX,
    },
}


def _is_number(item: Any) -> bool:
    numbers = item if isinstance(item, list) else [item]
    return any(isinstance(number, int) and not isinstance(number, bool) and number > 1 for number in numbers)


@pytest.mark.spec("LIM-1", "RAM-25", "RUN-9", "RUN-12")
@pytest.mark.parametrize("name", [*SCHEMAS, OPENAPI])
def test_the_limits_of_a_document(name: str) -> None:
    assert {place: item for place, item in keywords(document(name)) if _is_number(item)} == LIMITS[name]


def keyword_lines() -> str:
    """Everything that the schemas limit: bounds of 0 and 1, patterns, required fields, choices and defaults too."""
    return "".join(
        f"{name}{place}: {json.dumps(item)}\n"
        for name in (*SCHEMAS, OPENAPI)
        for place, item in keywords(document(name))
    )


def test_what_the_schemas_ask_for_changes_on_purpose_only(golden: Any) -> None:
    """``pytest --regenerate`` writes the list anew; the difference is what to look at."""
    golden("schema-keywords.txt", keyword_lines())


def test_the_choices_of_the_contract_are_the_code_s() -> None:
    from ovms.spec.choices import Accel, Leave, RestorePolicy
    from ovms.spec.states import State

    found = dict(keywords(document(OPENAPI)))
    assert found[f"{_SCHEMA}/Overrides/properties/accel/enum"] == list(Accel)
    assert found[f"{_SCHEMA}/Overrides/properties/restore/enum"] == list(RestorePolicy)
    assert found[f"{_SCHEMA}/Overrides/properties/restore/default"] == api.Overrides().restore
    assert found[f"{_SCHEMA}/SnapshotRequest/properties/leave/enum"] == list(Leave)
    assert found[f"{_SCHEMA}/SnapshotRequest/properties/leave/default"] == api.SnapshotRequest("x").leave
    assert found[f"{_SCHEMA}/State/enum"] == list(State)
    assert found[f"{_SCHEMA}/Port/properties/protocol/enum"] == list(api.Protocol)
    port = api.Port(1)
    assert found[f"{_SCHEMA}/Port/properties/host_ip/default"] == port.host_ip
    assert found[f"{_SCHEMA}/Port/properties/host_port/default"] == port.host_port
