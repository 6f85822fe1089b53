"""Writes the test vectors in ``spec/vectors`` and the worked example of ``spec/rfc/ramsnap-v1.md`` ('make vectors').

The files are checked in: another implementation uses them without Python. A test makes them anew and compares.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ovms.spec import limits, mediatypes, ramcrypt, ramsnap, strictjson
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Device, Encryption, Header

REPOSITORY: Final = Path(__file__).parent.parent
PAGE: Final = ramsnap.PAGE

#: Path below ``spec/`` → content.
Files = dict[str, bytes]


def digest(text: str) -> str:
    """The digest that stands for a blob called *text*."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Case:
    """One vector. ``problems`` are (path, rule); ``schema`` says what the JSON schema alone makes of it."""

    name: str
    data: bytes
    rules: tuple[str, ...]
    note: str = ""
    code: str | None = None
    problems: tuple[tuple[str, str], ...] = ()
    schema: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)
    #: What the file's name ends with, where it is not what those of all cases end with.
    suffix: str = ""


def write_cases(files: Files, kind: str, suffix: str, cases: list[Case]) -> None:
    """The files of *cases*, and their index."""
    entries = []
    for case in cases:
        name = re.sub(r"[^a-z0-9]+", "-", case.name.lower()).strip("-")
        path = f"{'invalid' if case.code else 'valid'}/{name}{case.suffix or suffix}"
        assert f"vectors/{kind}/{path}" not in files, path
        files[f"vectors/{kind}/{path}"] = case.data
        entry: dict[str, Any] = {"name": case.name, "file": path, "valid": case.code is None, "rules": list(case.rules)}
        if case.code:
            entry["code"] = case.code
        if case.problems:
            entry["problems"] = [{"path": path, "rule": rule} for path, rule in case.problems]
        if case.schema is not None:
            entry["schema"] = case.schema
        entry.update(case.more)
        if case.note:
            entry["note"] = case.note
        entries.append(entry)
    write_index(files, kind, entries)


def write_index(files: Files, kind: str, entries: list[dict[str, Any]]) -> None:
    """An index of cases."""
    files[f"vectors/{kind}/index.json"] = strictjson.canonical({"kind": kind, "cases": entries})


# --- JSON documents --------------------------------------------------------------------------------------------------

MINIMAL: Final[dict[str, Any]] = {
    "schemaVersion": 1,
    "mediaType": mediatypes.MANIFEST,
    "name": "web",
    "version": "1",
}


def plain(value: Any) -> bytes:
    """Readable JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def nested(depth: int) -> bytes:
    """A manifest that is nested *depth* levels deep."""
    return plain(MINIMAL)[:-3] + b',\n  "x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"\n}\n"


def document_cases() -> list[Case]:
    """Section 4: what is no JSON document of ours, in the form of manifests."""
    text = plain(MINIMAL)
    head = text[:-3]

    def bad(name: str, data: bytes, rule: str, note: str = "") -> Case:
        return Case(name, data, (rule,), note, code="json-invalid")

    padding = b" " * (limits.MANIFEST_MAX - len(text))
    return [
        Case("as deep as allowed", nested(limits.JSON_DEPTH_MAX), ("DOC-4", "LIM-1"), "JSON_DEPTH_MAX"),
        bad("one level too deep", nested(limits.JSON_DEPTH_MAX + 1), "DOC-4"),
        bad("a hundred thousand levels", b"[" * 100_000, "DOC-4", "a recursive parser overflows its stack"),
        Case("brackets in a string", head + b',\n  "x": "' + b"[" * 100 + b'"\n}\n', ("DOC-4",)),
        Case("as large as allowed", text + padding, ("DOC-5", "LIM-1"), "MANIFEST_MAX"),
        bad("one byte too large", text + padding + b" ", "DOC-5"),
        bad("empty object cut short", b"{", "DOC-1"),
        bad("trailing comma", head + b",\n}\n", "DOC-1"),
        bad("single quotes", text.replace(b'"', b"'"), "DOC-1"),
        bad("two documents", text + text, "DOC-1"),
        bad("a comment", b"// no\n" + text, "DOC-1"),
        bad("not UTF-8", head + b',\n  "x": "\xff"\n}\n', "DOC-1"),
        bad("UTF-16", text.decode().encode("utf-16"), "DOC-1"),
        bad("a byte order mark", b"\xef\xbb\xbf" + text, "DOC-1"),
        bad("a key twice", head + b',\n  "name": "other"\n}\n', "DOC-2", "parsers differ in which one they take"),
        bad("a key twice further in", head + b',\n  "kernel": {"ref": "a", "ref": "b"}\n}\n', "DOC-2"),
        bad("a key twice, once escaped", head + b',\n  "n\\u0061me": "other"\n}\n', "DOC-2"),
        bad("NaN", head + b',\n  "x": NaN\n}\n', "DOC-3"),
        bad("minus infinity", head + b',\n  "x": -Infinity\n}\n', "DOC-3"),
        bad("a number beyond double precision", head + b',\n  "x": 1e999\n}\n', "DOC-3"),
        bad("an integer beyond double precision", head + b',\n  "x": 1' + b"0" * 400 + b"\n}\n", "DOC-3"),
        Case("an integer of 309 digits", head + b',\n  "x": 1' + b"0" * 308 + b"\n}\n", ("DOC-3",)),
        bad("half a surrogate pair", head + b',\n  "x": "\\ud800"\n}\n', "DOC-3"),
        Case("a whole surrogate pair", head + b',\n  "x": "\\ud83d\\ude00"\n}\n', ("DOC-3",)),
        Case("unknown fields", plain({**MINIMAL, "x-note": {"deep": [None, 1.5]}}), ("DOC-7", "VER-2")),
    ]


def manifest_cases() -> Iterator[Case]:
    """Section 5."""
    kernel = {"ref": digest("kernel")}
    base = {"ref": digest("base"), "format": "qcow2"}
    device = {"type": "ivshmem", "name": "a", "size": 4096}
    ram = {"ref": digest("ram")}

    def good(label: str, rules: str, note: str = "", /, **fields: Any) -> Case:
        return Case(label, plain({**MINIMAL, **fields}), tuple(rules.split()), note, schema=True)

    def bad(label: str, path: str, rule: str, note: str = "", /, *, beyond: bool = False, **fields: Any) -> Case:
        document = {k: v for k, v in {**MINIMAL, **fields}.items() if v != "ABSENT"}
        rules = (rule, "LIM-1") if "MAX" in note else (rule,)
        return Case(
            label, plain(document), rules, note, code="manifest-invalid", problems=((path, rule),), schema=beyond
        )

    for example in sorted((REPOSITORY / "spec" / "examples").glob("*-manifest.json")):
        name = example.name.removesuffix("-manifest.json")
        yield Case(f"example {name}", example.read_bytes(), ("MAN-1",), schema=True)
    yield good("minimal", "MAN-1 MAN-2 MAN-3 MAN-4 MAN-5")
    yield good("longest name", "MAN-4 LIM-1", "NAME_MAX", name="x" * limits.NAME_MAX)
    yield good("a name of parts", "MAN-4", name="example.org/Team_1/web-2.x")
    yield good("longest kernel arguments", "MAN-9 LIM-1", kernel={**kernel, "args": "x" * limits.KERNEL_ARGS_MAX})
    args = "\u00e9" * (limits.KERNEL_ARGS_MAX // 2) + "x"
    yield good(
        "longest kernel arguments in two bytes each", "MAN-9 LIM-1", "KERNEL_ARGS_MAX", kernel={**kernel, "args": args}
    )
    yield good("longest ref", "MAN-7 MAN-6 LIM-1", kernel={"ref": "x" * limits.STRING_MAX})
    yield good("refs of every kind", "MAN-7", kernel={"ref": "./vmlinuz"}, initrd={"ref": "https://example/initrd"})
    yield good("most disk layers", "MAN-11 LIM-1", diskLayers=[base] * limits.DISK_LAYERS_MAX)
    yield good("a raw base", "MAN-13", diskLayers=[{**base, "format": "raw"}, base])
    yield good("ovfms is a name", "MAN-12", "a runtime refuses it: LAY-7", diskLayers=[{**base, "format": "ovfms"}])
    yield good("largest disk layer", "MAN-14 LIM-1", diskLayers=[{**base, "size": limits.DISK_LAYER_MAX}])
    yield good("zstd", "MAN-15", ramSnapshot={**ram, "compression": "zstd"})
    parents = [digest(f"parent {i}") for i in range(limits.RAM_PARENTS_MAX)]
    yield good("most parents", "MAN-16 LIM-1", ramSnapshot={**ram, "parents": parents})
    devices = [{**device, "name": f"d{i}"} for i in range(limits.DEVICES_MAX)]
    yield good("most devices", "MAN-17 LIM-1", devices=devices)
    yield good("largest region", "DEV-2 LIM-1", devices=[{**device, "size": limits.IVSHMEM_MAX}])
    yield good("smallest region", "DEV-2 LIM-1", devices=[{**device, "size": limits.IVSHMEM_MIN}])
    yield good("a region without a size", "DEV-2", devices=[{"type": "ivshmem", "name": "a"}])
    yield good("an unknown device", "VER-3", "a runtime refuses it: DEV-1", devices=[{"type": "gpu", "name": "g"}])
    yield good("a leap second", "MAN-19", metadata={"created": "2016-12-31T23:59:60Z"})
    yield good("an offset", "MAN-19", metadata={"created": "2026-01-31t12:00:00.123+05:30"})
    yield good(
        "another architecture", "MAN-20", "a runtime refuses it: BIN-4", metadata={"platform": {"arch": "riscv64"}}
    )
    yield good(
        "hints",
        "MAN-21",
        runtimeHints={"preferredRuntime": ["x"] * limits.RUNTIMES_MAX, "coldStartTargetMs": limits.COLD_START_MAX},
    )
    yield good("a leap second at noon", "MAN-19", metadata={"created": "2026-01-31T12:00:60Z"})
    yield good("the first year and the last", "MAN-19", metadata={"created": "0001-01-01T00:00:00Z"})
    yield good("the last year", "MAN-19", metadata={"created": "9999-12-31T23:59:59Z"})
    yield good("bootstrap", "MAN-22", bootstrap={"ref": digest("bootstrap")})

    for key in ("schemaVersion", "mediaType", "name", "version"):
        rule = {"schemaVersion": "MAN-2", "mediaType": "MAN-3", "name": "MAN-4", "version": "MAN-5"}[key]
        yield bad(f"without {key}", f"$.{key}", rule, **{key: "ABSENT"})  # type: ignore[arg-type]
    for name, value in (("null", None), ("a list", []), ("a string", "x"), ("a number", 1)):
        rule = "DOC-8" if value is None else "MAN-1"
        problems = (("$", rule),)
        yield Case(
            f"no object but {name}", plain(value), (rule,), code="manifest-invalid", problems=problems, schema=False
        )
    yield bad("version 2 of the form", "$.schemaVersion", "MAN-2", "VER-1", schemaVersion=2)
    yield Case(
        "version 2 hides the rest",
        plain({"schemaVersion": 2, "kernel": 7}),
        ("VER-1",),
        "of a version that it does not know a reader looks at nothing else",
        code="manifest-invalid",
        problems=(("$.schemaVersion", "MAN-2"),),
        schema=False,
    )
    yield bad("version as text", "$.schemaVersion", "MAN-2", schemaVersion="1")
    yield bad("version as true", "$.schemaVersion", "MAN-2", schemaVersion=True)
    yield bad("version with a fraction", "$.schemaVersion", "DOC-6", beyond=True, schemaVersion=1.0)
    yield bad("another media type", "$.mediaType", "MAN-3", mediaType=mediatypes.OCI_MANIFEST)
    yield bad("an empty name", "$.name", "MAN-4", name="")
    yield bad("a name with blanks", "$.name", "MAN-4", name="my vm")
    yield bad("a name that climbs", "$.name", "MAN-4", name="../../etc/passwd")
    yield bad("a name that begins with a slash", "$.name", "MAN-4", name="/web")
    yield bad("a name that ends with a slash", "$.name", "MAN-4", name="web/")
    yield bad("a name with a line end", "$.name", "MAN-6", name="web\n")
    yield bad("a name too long", "$.name", "MAN-4", "NAME_MAX", name="x" * (limits.NAME_MAX + 1))
    yield bad("a name that is null", "$.name", "DOC-8", name=None)
    yield bad("an empty version", "$.version", "MAN-5", version="")
    yield bad("a version that clears the screen", "$.version", "MAN-6", version="1\x1b[2J")
    yield bad("a version too long", "$.version", "MAN-5", "NAME_MAX", version="x" * (limits.NAME_MAX + 1))
    yield bad("a version that is a number", "$.version", "MAN-5", version=1)
    yield bad("a ref too long", "$.kernel.ref", "MAN-6", "STRING_MAX", kernel={"ref": "x" * (limits.STRING_MAX + 1)})
    yield bad("an empty ref", "$.kernel.ref", "MAN-7", kernel={"ref": ""})
    yield bad("a ref that is a number", "$.kernel.ref", "MAN-7", kernel={"ref": 1})
    yield bad("a digest too short", "$.kernel.ref", "MAN-8", kernel={"ref": "sha256:abc"})
    yield bad("a digest in upper case", "$.kernel.ref", "MAN-8", kernel={"ref": "sha256:" + "A" * 64})
    yield bad("a digest of SHA-512", "$.kernel.ref", "MAN-8", kernel={"ref": "sha512:" + "a" * 128})
    yield bad(
        "the draft's placeholder digest", "$.initrd.ref", "MAN-8", kernel=kernel, initrd={"ref": "sha256:initrd-digest"}
    )
    yield bad("a kernel without ref", "$.kernel.ref", "MAN-9", kernel={})
    yield bad("a kernel that is a string", "$.kernel", "MAN-9", kernel=digest("kernel"))
    yield bad("kernel arguments too long", "$.kernel.args", "MAN-9", "KERNEL_ARGS_MAX",
              kernel={**kernel, "args": "x" * (limits.KERNEL_ARGS_MAX + 1)})  # fmt: skip
    yield bad(
        "kernel arguments with too many bytes",
        "$.kernel.args",
        "MAN-9",
        "KERNEL_ARGS_MAX counts bytes, a schema characters",
        beyond=True,
        kernel={**kernel, "args": args + "x"},
    )
    yield bad("kernel arguments of two lines", "$.kernel.args", "MAN-6", kernel={**kernel, "args": "quiet\nsingle"})
    yield bad("an initrd without ref", "$.initrd.ref", "MAN-10", kernel=kernel, initrd={})
    yield bad("an initrd without a kernel", "$.initrd", "MAN-10", initrd={"ref": digest("initrd")})
    yield bad("layers that are an object", "$.diskLayers", "MAN-11", diskLayers=base)
    yield bad(
        "too many layers", "$.diskLayers", "MAN-11", "DISK_LAYERS_MAX", diskLayers=[base] * (limits.DISK_LAYERS_MAX + 1)
    )
    yield bad("a layer without ref", "$.diskLayers[0].ref", "MAN-11", diskLayers=[{"format": "qcow2"}])
    yield bad("a layer without format", "$.diskLayers[0].format", "MAN-12", diskLayers=[{"ref": digest("base")}])
    yield bad("an unknown format", "$.diskLayers[0].format", "MAN-12", diskLayers=[{**base, "format": "vmdk"}])
    yield bad("a raw diff", "$.diskLayers[1].format", "MAN-13", diskLayers=[base, {**base, "format": "raw"}])
    yield bad("a layer of no bytes", "$.diskLayers[0].size", "MAN-14", diskLayers=[{**base, "size": 0}])
    yield bad("a layer too large", "$.diskLayers[0].size", "MAN-14", "DISK_LAYER_MAX",
              diskLayers=[{**base, "size": limits.DISK_LAYER_MAX + 1}])  # fmt: skip
    yield bad(
        "a size with an exponent", "$.diskLayers[0].size", "DOC-6", beyond=True, diskLayers=[{**base, "size": 1e3}]
    )
    yield bad("a snapshot without ref", "$.ramSnapshot.ref", "MAN-15", ramSnapshot={})
    yield bad("an unknown compression", "$.ramSnapshot.compression", "MAN-15", ramSnapshot={**ram, "compression": "xz"})
    yield bad("a hint that is a number", "$.ramSnapshot.preload_hint", "MAN-15", ramSnapshot={**ram, "preload_hint": 1})
    yield bad("mlock as text", "$.ramSnapshot.mlock_required", "MAN-15", ramSnapshot={**ram, "mlock_required": "yes"})
    yield bad("too many parents", "$.ramSnapshot.parents", "MAN-16", "RAM_PARENTS_MAX",
              ramSnapshot={**ram, "parents": [*parents, digest("one more")]})  # fmt: skip
    yield bad("a parent twice", "$.ramSnapshot.parents[1]", "MAN-16", ramSnapshot={**ram, "parents": parents[:1] * 2})
    yield bad("its own parent", "$.ramSnapshot.parents[0]", "MAN-16", beyond=True,
              ramSnapshot={**ram, "parents": [ram["ref"]]})  # fmt: skip
    yield bad("too many devices", "$.devices", "MAN-17", "DEVICES_MAX", devices=[*devices, {**device, "name": "more"}])
    yield bad("a device without type", "$.devices[0].type", "MAN-17", devices=[{"name": "a"}])
    yield bad("a device without name", "$.devices[0].name", "MAN-17", devices=[{"type": "gpu"}])
    yield bad("a device called like a path", "$.devices[0].name", "MAN-17", devices=[{**device, "name": "../shm"}])
    yield bad("two devices of one name", "$.devices[1].name", "MAN-17", beyond=True, devices=[device, device])
    yield bad(
        "an address in decimal", "$.devices[0].mmio_addr", "MAN-18", devices=[{**device, "mmio_addr": "268435456"}]
    )
    yield bad(
        "an address of 17 digits",
        "$.devices[0].mmio_addr",
        "MAN-18",
        devices=[{**device, "mmio_addr": "0x" + "1" * 17}],
    )
    yield bad(
        "a region too large",
        "$.devices[0].size",
        "MAN-18",
        "IVSHMEM_MAX",
        devices=[{**device, "size": limits.IVSHMEM_MAX * 2}],
    )
    yield bad("a region of three pages", "$.devices[0].size", "DEV-2", devices=[{**device, "size": 12288}])
    yield bad(
        "a region smaller than a page", "$.devices[0].size", "DEV-2", "IVSHMEM_MIN", devices=[{**device, "size": 2048}]
    )
    yield bad("a time without a zone", "$.metadata.created", "MAN-19", metadata={"created": "2026-01-31T12:00:00"})
    yield bad("the 30th of February", "$.metadata.created", "MAN-19", "a validator that asserts formats refuses it",
              beyond=True, metadata={"created": "2026-02-30T12:00:00Z"})  # fmt: skip
    yield bad("the year 0", "$.metadata.created", "MAN-19", beyond=True, metadata={"created": "0000-01-01T00:00:00Z"})
    yield bad("a date in words", "$.metadata.created", "MAN-19", metadata={"created": "yesterday"})
    yield bad("an author that is a list", "$.metadata.author", "MAN-19", metadata={"author": ["me"]})
    yield bad(
        "an architecture with a blank", "$.metadata.platform.arch", "MAN-20", metadata={"platform": {"arch": "x86 64"}}
    )
    yield bad("uefi as text", "$.metadata.platform.uefi", "MAN-20", metadata={"platform": {"uefi": "false"}})
    yield bad(
        "a target below zero", "$.runtimeHints.coldStartTargetMs", "MAN-21", runtimeHints={"coldStartTargetMs": -1}
    )
    yield bad(
        "a target of 25 days",
        "$.runtimeHints.coldStartTargetMs",
        "MAN-21",
        "COLD_START_MAX",
        runtimeHints={"coldStartTargetMs": limits.COLD_START_MAX + 1},
    )
    yield bad("a runtime that is a number", "$.runtimeHints.preferredRuntime[1]", "MAN-21",
              runtimeHints={"preferredRuntime": ["x", 1]})  # fmt: skip
    yield bad(
        "33 runtimes",
        "$.runtimeHints.preferredRuntime",
        "MAN-21",
        "RUNTIMES_MAX",
        runtimeHints={"preferredRuntime": ["x"] * (limits.RUNTIMES_MAX + 1)},
    )
    yield bad("a bootstrap without ref", "$.bootstrap.ref", "MAN-22", bootstrap={})


# --- OCI -------------------------------------------------------------------------------------------------------------


def write_oci_cases(files: Files) -> None:
    """Both manifests of each case as files: a digest is that of bytes, not of what somebody's JSON library writes."""
    entries = []
    for case in oci_cases():
        image, document = plain(case.pop("image")), plain(case.pop("manifest"))
        name = re.sub(r"[^a-z0-9]+", "-", case["name"].lower()).strip("-")
        file = f"{'valid' if case['valid'] else 'invalid'}/{name}.json"
        manifest = f"manifests/{hashlib.sha256(document).hexdigest()[:16]}.json"
        files[f"vectors/oci/{file}"], files[f"vectors/oci/{manifest}"] = image, document
        note = {"note": case.pop("note")} if "note" in case else {}
        entries.append({"name": case.pop("name"), "file": file, "manifest": manifest, **case, **note})
    write_index(files, "oci", entries)


def oci_cases() -> Iterator[dict[str, Any]]:
    """Section 6: an OCI manifest, and the OVMS manifest in it."""
    ovms: dict[str, Any] = {
        **MINIMAL,
        "kernel": {"ref": digest("kernel")},
        "initrd": {"ref": digest("initrd")},
        "diskLayers": [
            {"ref": digest("base"), "format": "raw", "size": 4096},
            {"ref": digest("diff"), "format": "qcow2"},
        ],
        "ramSnapshot": {"ref": digest("ram")},
        "bootstrap": {"ref": digest("bootstrap")},
    }
    types = [
        ("kernel", mediatypes.KERNEL, {}),
        ("initrd", mediatypes.INITRD, {}),
        ("base", mediatypes.DISK_LAYER, {"ovms.format": "raw"}),
        ("diff", mediatypes.DISK_LAYER, {"ovms.format": "qcow2"}),
        ("ram", mediatypes.RAM_SNAPSHOT_LZ4, {}),
        ("bootstrap", mediatypes.BOOTSTRAP, {}),
    ]
    layers = [
        {
            "mediaType": media_type,
            "digest": digest(name),
            "size": 4096,
            **({"annotations": annotations} if annotations else {}),
        }
        for name, media_type, annotations in types
    ]

    def case(name: str, rules: str, *, code: str | None = None, path: str | None = None, note: str = "",
             change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None, attached: bool = False
             ) -> dict[str, Any]:  # fmt: skip
        document, image_layers = copy.deepcopy(ovms), copy.deepcopy(layers)
        image: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_MANIFEST,
            "artifactType": mediatypes.MANIFEST,
            "config": {"mediaType": mediatypes.MANIFEST, "digest": "OVMS-MANIFEST", "size": -1},
            "layers": image_layers,
        }
        if attached:
            empty = hashlib.sha256(b"{}").hexdigest()
            image_layers.append(image["config"])
            image["config"] = {"mediaType": mediatypes.OCI_EMPTY, "digest": f"sha256:{empty}", "size": 2}
        if change is not None:
            change(image, document)
        # the descriptor of the OVMS manifest, whatever the change made of it
        raw = plain(document)
        for descriptor in (image.get("config"), *(image.get("layers") or [])):
            if isinstance(descriptor, dict) and descriptor.get("digest") == "OVMS-MANIFEST":
                descriptor["digest"] = "sha256:" + hashlib.sha256(raw).hexdigest()
                if descriptor.get("size") == -1:
                    descriptor["size"] = len(raw)
        return {
            "name": name,
            "rules": rules.split(),
            "valid": code is None,
            **({} if code is None else {"code": code}),
            **({} if path is None else {"problems": [{"path": path, "rule": rules.split(maxsplit=1)[0]}]}),
            "image": image,
            "manifest": document,
            **({"note": note} if note else {}),
        }

    def layer(i: int, **fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        return lambda image, _: image["layers"][i].update(fields)

    def shuffle(image: dict[str, Any], _: Any) -> None:
        image["layers"].reverse()

    def untyped(image: dict[str, Any], _: Any) -> None:
        for item in image["layers"][:4]:
            item["mediaType"] = "application/octet-stream"
            item.pop("annotations", None)

    def extra(image: dict[str, Any], _: Any) -> None:
        image["layers"].append({"mediaType": "text/plain", "digest": digest("readme"), "size": 10})

    def drop_kernel(image: dict[str, Any], _: Any) -> None:
        del image["layers"][0]

    def without(*keys: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        def change(image: dict[str, Any], _: Any) -> None:
            for key in keys:
                del image[key]

        return change

    def config_of(media_type: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        return lambda image, _: image["config"].update(mediaType=media_type, digest=digest("config"), size=100)

    def null(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        return lambda image, _: image.update({key: None})

    def mixed(image: dict[str, Any], document: dict[str, Any]) -> None:
        chain(1)(image, document)
        image["layers"][4]["mediaType"] = mediatypes.RAM_SNAPSHOT_ZSTD

    def chain(count: int, missing: int | None = None) -> Callable[[dict[str, Any], dict[str, Any]], None]:
        def change(image: dict[str, Any], document: dict[str, Any]) -> None:
            parents = [digest(f"parent {i}") for i in range(count)]
            document["ramSnapshot"]["parents"] = parents
            for i, parent in enumerate(parents):
                if i != missing:
                    image["layers"].insert(4 + i, {**image["layers"][-2], "digest": parent})

        return change

    def twice(image: dict[str, Any], _: Any) -> None:
        # one blob that is kernel and base: a layer for each
        image["layers"].insert(0, {"mediaType": "text/plain", "digest": digest("kernel"), "size": 4096})
        image["layers"].append({**image["layers"][3], "annotations": {"ovms.format": "qcow2"}})

    yield case("canonical", "OCI-1 OCI-2 OCI-3 OCI-10")
    yield case(
        "without artifactType", "OCI-1", change=without("artifactType"), note="the config's media type stands for it"
    )
    yield case(
        "attached, without artifactType", "OCI-1", code="unsupported", attached=True, change=without("artifactType")
    )
    yield case(
        "another artifactType",
        "OCI-1",
        code="unsupported",
        change=lambda image, _: image.update(artifactType="application/vnd.cncf.helm.chart"),
    )
    yield case("without mediaType", "OCI-1", code="registry-protocol", change=without("mediaType"))
    yield case(
        "schemaVersion with a fraction",
        "DOC-6 DOC-10 OCI-1",
        code="registry-protocol",
        change=lambda image, _: image.update(schemaVersion=2.0),
    )
    for key in ("mediaType", "artifactType", "annotations", "subject"):
        yield case(
            f"{key} that is null",
            "DOC-8 DOC-10 OCI-9",
            code="registry-protocol",
            change=null(key),
        )
    yield case(
        "a foreign config and one layer",
        "OCI-4",
        attached=True,
        change=config_of("application/vnd.oci.image.config.v1+json"),
    )
    yield case(
        "the config wins",
        "OCI-4",
        change=lambda image, _: image["layers"].append(
            {"mediaType": mediatypes.MANIFEST, "digest": digest("another"), "size": 100}
        ),
    )
    yield case("a chain of snapshots", "RAM-40 MAN-16 OCI-3", change=chain(3))
    yield case("the longest chain", "RAM-41 MAN-16", note="RAM_PARENTS_MAX", change=chain(limits.RAM_PARENTS_MAX))
    yield case(
        "a chain with a gap",
        "OCI-6 RAM-40",
        code="manifest-invalid",
        path="$.ramSnapshot.parents[1]",
        change=chain(3, missing=1),
    )
    yield case(
        "a chain of two compressions",
        "OCI-11 RAM-45",
        code="manifest-invalid",
        path="$.ramSnapshot.parents[0]",
        change=mixed,
    )
    yield case("a digest in several layers", "OCI-11 OCI-12", change=twice)
    yield case("attached", "OCI-4", attached=True)
    yield case("attached, layers without types", "OCI-11 OCI-5", attached=True, change=untyped)
    yield case("layers in another order", "OCI-5", change=shuffle)
    yield case("a layer that nobody names", "OCI-8", change=extra)
    yield case("the other media type of a disk layer", "OCI-10", change=layer(2, mediaType=mediatypes.DISK_LAYER_OVMS))
    yield case("a disk layer without annotation", "OCI-12", change=layer(2, annotations={}))
    yield case("neither config nor layer", "OCI-4", code="unsupported",
               change=lambda image, _: image["config"].update(mediaType="application/vnd.oci.image.config.v1+json"))  # fmt: skip
    yield case("two layers that claim to be the manifest", "OCI-4", code="unsupported", attached=True,
               change=lambda image, _: image["layers"].append(image["layers"][-1]))  # fmt: skip
    yield case("a ref that no layer has", "OCI-6", code="manifest-invalid", path="$.kernel.ref", change=drop_kernel)
    yield case("a ref that is a URL", "OCI-6", code="manifest-invalid", path="$.kernel.ref",
               note="a reader must not fetch it",
               change=lambda _, document: document["kernel"].update(ref="http://169.254.169.254/latest"))  # fmt: skip
    yield case("a ref that is a path", "OCI-6", code="manifest-invalid", path="$.initrd.ref",
               change=lambda _, document: document["initrd"].update(ref="/etc/shadow"))  # fmt: skip
    yield case("another size than the layer's", "OCI-7", code="manifest-invalid", path="$.diskLayers[0].size",
               change=layer(2, size=8192))  # fmt: skip
    yield case("a kernel of another type", "OCI-11", code="manifest-invalid", path="$.kernel.ref",
               change=layer(0, mediaType="application/octet-stream"))  # fmt: skip
    yield case("a zstd snapshot that is said to be lz4", "OCI-11 RAM-45", code="manifest-invalid",
               path="$.ramSnapshot.ref", change=layer(4, mediaType=mediatypes.RAM_SNAPSHOT_ZSTD))  # fmt: skip
    yield case("attached, with an untyped snapshot", "OCI-11 RAM-45", code="manifest-invalid", attached=True,
               path="$.ramSnapshot.ref", change=layer(4, mediaType="application/octet-stream"))  # fmt: skip
    yield case("a format that differs from the annotation", "OCI-12", code="manifest-invalid",
               path="$.diskLayers[1].format", change=layer(3, annotations={"ovms.format": "raw"}))  # fmt: skip
    yield case("a compressed disk layer", "OCI-13", code="unsupported",
               note="or valid, for a reader that decompresses",
               change=layer(2, mediaType=mediatypes.DISK_LAYER + "+gzip"))  # fmt: skip
    yield case("a parent that is no layer", "OCI-6 RAM-40", code="manifest-invalid", path="$.ramSnapshot.parents[0]",
               change=lambda _, document: document["ramSnapshot"].update(parents=[digest("gone")]))  # fmt: skip
    for name, fields in (
        ("a digest of SHA-512", {"digest": "sha512:" + "a" * 128}),
        ("a digest in upper case", {"digest": "sha256:" + "A" * 64}),
        ("a size below zero", {"size": -5}),
        ("a size beyond 63 bits", {"size": 2**63}),
        ("a size with a fraction", {"size": 4096.0}),
        ("a size as text", {"size": "4096"}),
        ("no media type", {"mediaType": ""}),
        ("annotations that are numbers", {"annotations": {"x": 1}}),
    ):
        yield case(
            f"descriptor: {name}",
            "OCI-9 DOC-9" if "digest" in name else "OCI-9",
            code="registry-protocol",
            change=layer(1, **fields),
        )
    yield case(
        "schemaVersion 1", "OCI-1", code="registry-protocol", change=lambda image, _: image.update(schemaVersion=1)
    )
    yield case("a Docker manifest", "OCI-1", code="registry-protocol",
               change=lambda image, _: image.update(mediaType="application/vnd.docker.distribution.manifest.v2+json"))  # fmt: skip
    yield case("too many layers", "OCI-1 LIM-1", code="registry-protocol", note="OCI_LAYERS_MAX",
               change=lambda image, _: image.update(layers=[image["layers"][0]] * (limits.OCI_LAYERS_MAX + 1)))  # fmt: skip


def platform_cases() -> list[dict[str, Any]]:
    """Section 6.3: which manifest of an index is chosen on linux/amd64; null: ``unsupported``."""
    amd64 = {"os": "linux", "architecture": "amd64"}
    arm64 = {"os": "linux", "architecture": "arm64"}
    windows = {"os": "windows", "architecture": "amd64"}
    cases: list[tuple[str, list[Any], int | None, str]] = [
        ("the second fits", [arm64, amd64], 1, "OCI-16 OCI-17"),
        ("the first of two", [amd64, amd64], 0, "OCI-16"),
        ("without a platform", [arm64, None], 1, "OCI-17"),
        ("another system", [windows, amd64], 1, "OCI-17"),
        ("with a variant", [{**amd64, "variant": "v3"}], 0, "OCI-17"),
        ("none fits", [arm64, windows], None, "OCI-16"),
        ("none at all", [], None, "OCI-16"),
        ("an index", ["index"], None, "OCI-18"),
    ]
    return [
        {"name": name, "rules": rules.split(), "platforms": platforms, "chosen": chosen}
        for name, platforms, chosen, rules in cases
    ]


def reference_cases() -> list[dict[str, Any]]:
    """Section 6.7."""
    d = digest("x")
    good = [
        ("web", (None, "web", "latest", None), "REF-2 REF-3"),
        ("team/web:1", (None, "team/web", "1", None), "REF-2"),
        ("registry.example/web:1", ("registry.example", "web", "1", None), "REF-1 REF-2"),
        ("localhost/web", ("localhost", "web", "latest", None), "REF-2"),
        ("host:5000/a/b__c/d-e:v1.0_x", ("host:5000", "a/b__c/d-e", "v1.0_x", None), "REF-1"),
        ("[::1]:5000/web", ("[::1]:5000", "web", "latest", None), "REF-1"),
        (f"registry.example/web@{d}", ("registry.example", "web", None, d), "REF-3"),
        (f"registry.example/web:1@{d}", ("registry.example", "web", "1", d), "REF-3"),
        ("[fe80::1:2]/web", ("[fe80::1:2]", "web", "latest", None), "REF-1"),
        ("192.0.2.1:65535/web", ("192.0.2.1:65535", "web", "latest", None), "REF-1"),
        ("a---b/c_d", (None, "a---b/c_d", "latest", None), "REF-1"),
        ("web:" + "x" * limits.TAG_MAX, (None, "web", "x" * limits.TAG_MAX, None), "REF-1 LIM-1"),
        ("x" * limits.REFERENCE_MAX, (None, "x" * limits.REFERENCE_MAX, "latest", None), "REF-1 LIM-1"),
    ]
    bad = ["", "x" * (limits.REFERENCE_MAX + 1), "Web", "web:", "web:-x", "web:.x", "web:" + "x" * (limits.TAG_MAX + 1),
           "host:0/web", "host:65536/web", "[:::]/web", "[1:2]:5000/web", "[::1/web", "-host.example/web", "a..example/web",
           "a..b", "a___b", "a_.b", "-a", "a-", "w\u0435b", "web@sha256:abc", f"web@sha512:{'a' * 128}",
           "/web", "web/", "a//b", "a__-b", "../web", "host:99999/web", "host.example:x/web", "web:1:2", "we b", "web\n",
           "http://registry.example/web"]  # fmt: skip
    return [
        *(
            {
                "reference": text,
                "valid": True,
                "rules": rules.split(),
                "registry": parts[0],
                "repository": parts[1],
                "tag": parts[2],
                "digest": parts[3],
            }
            for text, parts, rules in good
        ),
        *({"reference": text, "valid": False, "rules": ["REF-1"], "code": "reference-invalid"} for text in bad),
    ]


# --- disks and kernels -----------------------------------------------------------------------------------------------

_QCOW2: Final = {"version": (4, ">I"), "backing_offset": (8, ">Q"), "backing_size": (16, ">I"),
                 "cluster_bits": (20, ">I"), "size": (24, ">Q"), "encryption": (32, ">I"), "l1_entries": (36, ">I"),
                 "l1_offset": (40, ">Q"), "refcount_offset": (48, ">Q"), "refcount_clusters": (56, ">I"),
                 "snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"), "incompatible": (72, ">Q"),
                 "refcount_order": (96, ">I"), "header_length": (100, ">I")}  # fmt: skip


def qcow2(
    *,
    cluster: int = 512,
    extensions: tuple[tuple[int, bytes], ...] = (),
    text: tuple[int, bytes] = (0, b""),
    **fields: int,
) -> bytes:
    """An empty image of 1 MiB in clusters of *cluster* bytes: header, refcount table, refcount block, L1 table."""
    values = {"version": 3, "cluster_bits": cluster.bit_length() - 1, "size": 1 << 20, "l1_entries": 32,
              "l1_offset": 3 * cluster, "refcount_offset": cluster, "refcount_clusters": 1, "refcount_order": 4,
              "header_length": 104, **fields}  # fmt: skip
    data = bytearray(4 * cluster)
    data[:4] = b"QFI\xfb"
    for name, value in values.items():
        at, form = _QCOW2[name]
        if values["version"] == 3 or at < 72:
            struct.pack_into(form, data, at, value)
    at = values["header_length"] if values["version"] == 3 else 72
    for kind, content in extensions:
        data[at : at + 8 + len(content)] = struct.pack(">II", kind, len(content)) + content
        at += 8 + -(-len(content) // 8) * 8
    data[text[0] : text[0] + len(text[1])] = text[1]
    struct.pack_into(">Q", data, cluster, 2 * cluster)
    struct.pack_into(">4H", data, 2 * cluster, 1, 1, 1, 1)
    return bytes(data)


def disk_cases() -> Iterator[Case]:
    """Section 7.2."""
    secret = b"/etc/shadow"
    data_file = ((0x44415441, secret),)

    def good(name: str, data: bytes, rules: str, size: int, format: str = "qcow2") -> Case:
        return Case(name, data, tuple(rules.split()), more={"format": format, "virtual_size": size})

    def bad(name: str, data: bytes, rule: str, note: str = "", format: str = "qcow2") -> Case:
        return Case(name, data, (rule,), note, code="disk-invalid", more={"format": format})

    yield good("version 3", qcow2(), "LAY-8 LAY-14 LAY-15", 1 << 20)
    yield good("version 2", qcow2(version=2), "LAY-8", 1 << 20)
    yield good("zstd clusters", qcow2(incompatible=8, header_length=112, text=(104, b"\x01")), "LAY-13", 1 << 20)
    yield good("extended L2 entries", qcow2(incompatible=16, l1_entries=64), "LAY-13 LAY-15", 1 << 20)
    yield good("unknown extensions", qcow2(extensions=((0x6803F857, bytes(48)), (0x12345678, b"x"))), "LAY-16", 1 << 20)
    many = tuple((0x12345678, b"") for _ in range(limits.QCOW2_EXTENSIONS_MAX))
    yield good("as many extensions as allowed", qcow2(cluster=1024, extensions=many[1:]), "LAY-16 LIM-1", 1 << 20)
    yield good("the longest header", qcow2(cluster=4096, header_length=4096), "LAY-14 LIM-1", 1 << 20)
    yield Case("ovfms", qcow2(), ("LAY-7",), code="unsupported", more={"format": "ovfms"})
    yield good("raw", b"base" * 256, "LAY-6", 1024, "raw")
    yield bad("raw of an odd size", b"x" * 1000, "LAY-6", format="raw")
    yield bad("raw with the magic of qcow2", qcow2(), "LAY-6", "would be read as qcow2 where formats are probed", "raw")
    yield bad("no magic", b"\0" * 2048, "LAY-8")
    yield bad("version 1", qcow2(version=1), "LAY-8")
    yield bad("version 4", qcow2(version=4), "LAY-8")
    yield bad("cut short", qcow2()[:100], "LAY-8")
    yield bad(
        "backing file",
        qcow2(backing_offset=256, backing_size=11, text=(256, secret)),
        "LAY-9",
        "reads a file of the host",
    )
    yield bad(
        "backing file on the network",
        qcow2(backing_offset=256, backing_size=21, text=(256, b"nbd://169.254.169.254")),
        "LAY-9",
    )
    yield bad(
        "backing file in version 2", qcow2(version=2, backing_offset=256, backing_size=11, text=(256, secret)), "LAY-9"
    )
    yield bad("backing file without a name", qcow2(backing_offset=256), "LAY-9")
    yield bad("data file", qcow2(incompatible=4, extensions=data_file), "LAY-10", "reads and writes a file of the host")
    yield bad("data file without its bit", qcow2(extensions=data_file), "LAY-10")
    yield bad("data file behind another extension", qcow2(extensions=((1, b"x"), *data_file)), "LAY-10")
    yield bad("data file in version 2", qcow2(version=2, extensions=data_file), "LAY-10")
    yield bad("AES", qcow2(encryption=1), "LAY-11")
    yield bad("LUKS", qcow2(encryption=2), "LAY-11")
    yield bad("encryption header alone", qcow2(extensions=((0x0537BE77, bytes(16)),)), "LAY-11")
    yield bad("internal snapshots", qcow2(snapshots=1, snapshots_offset=512), "LAY-12")
    yield bad("bitmaps", qcow2(extensions=((0x23852875, bytes(24)),)), "LAY-12")
    yield bad("dirty", qcow2(incompatible=1), "LAY-13")
    yield bad("corrupt", qcow2(incompatible=2), "LAY-13")
    yield bad("an unknown feature", qcow2(incompatible=32), "LAY-13")
    yield bad("clusters of 256 bytes", qcow2(cluster_bits=8), "LAY-14")
    yield bad("clusters of 4 GiB", qcow2(cluster_bits=32), "LAY-14")
    yield bad("refcounts of 128 bits", qcow2(refcount_order=7), "LAY-14")
    yield bad("a header of 72 bytes", qcow2(header_length=72), "LAY-14")
    yield bad("a header of 108 bytes", qcow2(header_length=108), "LAY-14", "no multiple of 8")
    yield bad("a header of 4104 bytes", qcow2(cluster=8192, header_length=4104), "LAY-14", "QCOW2_HEADER_MAX")
    yield bad("clusters of 4 MiB", qcow2(cluster_bits=22), "LAY-14")
    yield bad("a header longer than a cluster", qcow2(header_length=1024), "LAY-14")
    yield bad("compression type 7", qcow2(incompatible=8, header_length=112, text=(104, b"\x07")), "LAY-14")
    yield bad("a compression type without its bit", qcow2(header_length=112, text=(104, b"\x01")), "LAY-14")
    yield bad("an L1 table of 16 GiB", qcow2(l1_entries=2**31), "LAY-15", "takes memory")
    yield bad(
        "an L1 table of a byte more than 32 MiB",
        qcow2(l1_entries=limits.QCOW2_L1_MAX // 8 + 1),
        "LAY-15",
        "QCOW2_L1_MAX",
    )
    yield bad("an L1 table that reaches beyond the end", qcow2(l1_entries=65), "LAY-15")
    yield bad("no refcount table", qcow2(refcount_clusters=0), "LAY-15")
    yield bad("a refcount table in the header", qcow2(refcount_offset=0), "LAY-15")
    yield bad("an L1 table too short", qcow2(l1_entries=1), "LAY-15")
    yield bad("an L1 table in the header", qcow2(l1_offset=0), "LAY-15")
    yield bad("an L1 table beyond the end", qcow2(l1_offset=4096), "LAY-15")
    yield bad("an L1 table across clusters", qcow2(l1_offset=1544), "LAY-15")
    yield bad("a refcount table of 2 TiB", qcow2(refcount_clusters=2**32 - 1), "LAY-15")
    yield bad("an endless extension", qcow2(text=(104, struct.pack(">II", 1, 2**32 - 1))), "LAY-16")
    yield bad("one extension too many", qcow2(cluster=1024, extensions=many), "LAY-16", "QCOW2_EXTENSIONS_MAX")
    yield bad("a disk of no size", qcow2(size=0), "LAY-5")
    yield bad("a disk of 8 EiB", qcow2(size=2**63, l1_entries=2**22), "LAY-5", "DISK_VIRTUAL_MAX")


def kernel_cases() -> Iterator[Case]:
    """Section 7.1."""

    def bzimage(version: int = 0x020F, loadflags: int = 1) -> bytes:
        data = bytearray(1024)
        data[0x1FE:0x200], data[0x202:0x206] = b"\x55\xaa", b"HdrS"
        struct.pack_into("<H", data, 0x206, version)
        data[0x211] = loadflags
        return bytes(data)

    def elf(kind: int = 18, machine: int = 62, *, owner: bytes = b"Xen\0", type: int = 2, headers: int = 1, before: int = 0,
            order: int = 1) -> bytes:  # fmt: skip
        """*headers* in all, *before* bytes of other notes in front of the one that counts."""
        filler = struct.pack("<III", 4, before - 16, 3) + b"GNU\0" + bytes(before - 16) if before else b""
        note = filler + struct.pack("<III", len(owner), 4, kind) + owner + b"\0\0\x10\0"
        head = struct.pack("<HHIQQQIHHHHHH", type, machine, 1, 0, 64, 0, 0, 64, 56, headers, 0, 0, 0)
        load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0) * (headers - 1)
        segment = struct.pack("<IIQQQQQQ", 4, 4, 64 + 56 * headers, 0, 0, len(note), len(note), 4)
        return b"\x7fELF" + bytes([2, order, 1]) + bytes(9) + head + load + segment + note

    def bad(name: str, data: bytes, note: str = "") -> Case:
        rule = "BIN-6" if data.startswith(b"\x7fELF") else "BIN-5"
        return Case(
            name, data, ("BIN-1", rule, "LIM-1") if "MAX" in note else ("BIN-1", rule), note, code="kernel-invalid"
        )

    yield Case("bzImage", bzimage(), ("BIN-1", "BIN-5"))
    yield Case("bzImage of boot protocol 2.00", bzimage(version=0x0200), ("BIN-1", "BIN-5"))
    yield Case("the shortest bzImage", bzimage()[:0x264], ("BIN-1", "BIN-5"))
    yield Case("ELF with a PVH note", elf(), ("BIN-1", "BIN-6"))
    yield Case("ELF for i386", elf(machine=3), ("BIN-1", "BIN-6"))
    yield Case("ELF that can be moved", elf(type=3), ("BIN-1", "BIN-6"))
    most = limits.ELF_NOTES_MAX - 20
    yield Case("ELF with as many notes as allowed", elf(before=most), ("BIN-6", "LIM-1"), "ELF_NOTES_MAX")
    yield Case(
        "ELF with as many headers as allowed",
        elf(headers=limits.ELF_HEADERS_MAX),
        ("BIN-6", "LIM-1"),
        "ELF_HEADERS_MAX",
    )
    yield bad("ELF with too many notes", elf(before=most + 4), "ELF_NOTES_MAX")
    yield bad("ELF with too many headers", elf(headers=limits.ELF_HEADERS_MAX + 1), "ELF_HEADERS_MAX")
    yield bad("ELF with a note of Xenx", elf(owner=b"Xenx"))
    yield bad("ELF with a note of Xen without its end", elf(owner=b"Xen"))
    yield bad("ELF with big-endian numbers", elf(order=2))
    yield bad("ELF that is no executable", elf(type=1))
    yield bad("a bzImage cut short", bzimage()[:0x263])
    yield bad("a bzImage without the boot mark", bzimage()[:0x1FE] + b"\0\0" + bzimage()[0x200:])
    yield bad("zImage", bzimage(loadflags=0), "loaded low")
    yield bad("boot protocol 1", bzimage(version=0x0103))
    yield bad("ELF without a PVH note", elf(kind=17))
    yield bad("ELF for ARM", elf(machine=183))
    yield bad("ELF cut short", elf()[:80])
    yield bad("a script", b"#!/bin/sh\nreboot\n")


# --- RAM snapshots ---------------------------------------------------------------------------------------------------

HEADER: Final = Header(
    created="2026-11-24T10:00:00Z",
    source=digest("artifact"),
    vmm="qemu",
    vmm_version="7.2.22",
    state_format="qemu-migration-3",
    machine_type="pc-i440fx-7.2",
    accel="tcg",
    cpu_model="max",
    cpu_flags=(),
    vcpus=1,
    memory=limits.RAM_MIN,
    devices=(
        Device("serial"),
        Device("vmgenid"),
        Device("virtio-rng"),
        Device("virtio-net", mac="52:54:00:12:34:56", backend="user"),
        Device("virtio-blk", size=1 << 30),
    ),
    kernel=digest("kernel"),
    initrd=None,
    kernel_args="console=ttyS0",
    disks=(digest("base"),),
)
STATE: Final = b"S" * 32
#: Keys of the encrypted vectors, known to all: an identity, its recipient, a key, and what age made of that for the recipient.
IDENTITY: Final = "AGE-SECRET-KEY-1AZZ2VG4XCGHJUNX2R5LX84P64877JMGXYZJ5EYXC9RUPST47QS9SA2C245"
OTHER_IDENTITY: Final = "AGE-SECRET-KEY-1NHR939TKCPG4GAJT7JQESQ7NYSUXVURHGLAFU0XC0HA0V542UJ5SRSN936"
RECIPIENT: Final = "age1ydsp00qday7e3el7ltr0flzx3sw4gjrl6yvdr6k49zjmhshv3q9qwkqgqd"
KEY: Final = hashlib.shake_128(b"ovms encrypted").digest(32)
WRAPPED: Final = base64.b64decode(
    "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IFgyNTUxOSA4QVllOE4rRXErS1dCTkc0VHBaZFZ6cVErTlFnTFV0L3UvZGd4S3lIVkhRCk5HUExjQkptSFFBLzZh"
    "MVc5TEMxUXk0WHV5aTdiQ2dGMWtSeUtlRVE0M1EKLT4gUi1ncmVhc2UgeDlPClVrWQotLS0gMzhZdVFTMXVrNXJ0QzhESVZ2NHNIUDhSdWtjU2VEWXJvak5Q"
    "bDZPUURGcwq5/prxLIb5fdojg5nyA0fyCsw/RFIt131AWFIUxtH4Ig3HQ38pEJg06yWh4Ivsw1nwLyfG6a8kjMBs+kklRCNl"
)
#: The same of its first 16 bytes.
WRAPPED_SHORT: Final = base64.b64decode(
    "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IFgyNTUxOSBBWXdDcFNqMTg5NitoR05HTkR6bThmMFJKWDJscXR3YkxXdDU2a0E4NjJZCm8yd05sUzFvVHU0UGdh"
    "dTZ1ZTV4NFRVRjcvYi9GY0xFdmpaNHcvVTl1MUkKLT4gRTQtZ3JlYXNlClUwMVoKLS0tIDNoMnh4RVNwMHVBS0tOTFFHTzVtRU4reVNsaHRza0ZiUU9hTnpX"
    "aXhTUmcKbtnUJEUEnWZYOxmZtexMJKhEcBxbD5ilYwmvIzfIEXmxOZoUG/lCUzF8mnAtbB/3"
)
ENCRYPTED: Final = replace(HEADER, encryption=Encryption((RECIPIENT,), WRAPPED))
NOISE: Final = hashlib.shake_128(b"ovms").digest(2 * PAGE)
BASE_PAGES: Final = {3: b"A" * PAGE, 5: NOISE}


@dataclass(frozen=True)
class Blob:
    """A snapshot in its regions."""

    header: Header
    chunks: tuple[ramsnap.Chunk, ...]
    data: bytes

    @property
    def whole(self) -> bytes:
        cipher = None if self.header.encryption is None else Cipher(KEY)
        pages = limits.RAM_CHUNK_PAGES
        return ramsnap.build_control(self.header, STATE, self.chunks, chunk_pages=pages, cipher=cipher) + self.data


def snapshot(pages: dict[int, bytes], header: Header = HEADER, compression: Compression = Compression.LZ4) -> Blob:
    """A snapshot of *pages* (``b""``: one page that is zero now), by the number of the first; encrypted where *header* says so."""
    chunks: list[ramsnap.Chunk] = []
    data = b""
    for page, content in sorted(pages.items()):
        codec, stored, sha = _stored(page, content, header, compression)
        chunks.append(ramsnap.Chunk(page, len(content) // PAGE or 1, len(data), len(stored), codec, sha))
        data += bytes(stored)
    return Blob(header, tuple(chunks), data)


def _stored(
    page: int, content: bytes, header: Header, compression: Compression
) -> tuple[int, bytes | memoryview, bytes]:
    if not content:
        return ramsnap.CODEC_ZERO, b"", bytes(32)
    if header.encryption is None:
        return ramsnap.compress(content, compression)
    return ramsnap.encrypt(page, content, compression, Cipher(KEY))


def memory_of(pages: dict[int, bytes], below: bytes = bytes(limits.RAM_MIN)) -> bytes:
    """The guest's memory."""
    memory = bytearray(below)
    for page, content in pages.items():
        memory[page * PAGE : page * PAGE + (len(content) or PAGE)] = content or bytes(PAGE)
    return bytes(memory)


def sealed(whole: bytes) -> bytes:
    """*whole* with the right digest at offset 96, as an attacker would have it."""
    index, entries = struct.unpack_from("<QQ", whole, 64)
    end = min(index + entries * 64, len(whole))
    return whole[:96] + hashlib.sha256(whole[128:end]).digest() + whole[128:]


def poke(whole: bytes, at: int, form: str, value: int) -> bytes:
    """*whole* with the number at an offset changed, and sealed again."""
    changed = bytearray(whole)
    struct.pack_into(form, changed, at, value)
    return sealed(bytes(changed)) if at < 96 or at >= 128 else bytes(changed)


def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The base snapshot with its header's document changed."""
    base = snapshot(BASE_PAGES)
    document = base.header.to_json()
    change(document)
    return with_header_bytes(strictjson.canonical(document))


def with_header_bytes(header: bytes, whole: bytes | None = None) -> bytes:
    """A snapshot, the base without another, with other bytes as its header."""
    whole = whole or snapshot(BASE_PAGES).whole
    fields = list(struct.unpack("<8sIIQIIQQQQQQQQ32s", whole[:128]))
    state_and_index = whole[fields[8] : fields[10] + fields[11] * 64]
    shift = len(header) - fields[7]
    fields[7] = len(header)
    fields[8] += shift
    fields[10] += shift
    data = whole[fields[12] :]
    fields[12] = -(-(fields[10] + fields[11] * 64) // PAGE) * PAGE
    fields[14] = hashlib.sha256(header + state_and_index).digest()
    return (struct.pack("<8sIIQIIQQQQQQQQ32s", *fields) + header + state_and_index).ljust(fields[12], b"\0") + data


def ram_cases() -> Iterator[Case]:
    """The RAM snapshot format."""
    base = snapshot(BASE_PAGES)
    whole = base.whole
    base_memory = memory_of(BASE_PAGES)
    base_digest = "sha256:" + hashlib.sha256(whole).hexdigest()
    diff_pages = {3: b"", 4: b"B" * PAGE, 7: b"C" * (2 * PAGE)}
    diff = snapshot(diff_pages, replace(HEADER, parent=base_digest, disks=(*HEADER.disks, digest("overlay"))))
    index = struct.unpack_from("<Q", whole, 64)[0]
    data = struct.unpack_from("<Q", whole, 80)[0]
    diff_index = struct.unpack_from("<Q", diff.whole, 64)[0]

    def good(name: str, data: bytes, rules: str, memory: bytes, compression: str = "lz4", **more: Any) -> Case:
        sha = hashlib.sha256(memory).hexdigest()
        facts = {"compression": compression, **more, "memory": {"size": len(memory), "sha256": sha}}
        return Case(name, data, tuple(rules.split()), more=facts)

    def bad(name: str, data: bytes, rule: str, note: str = "", code: str = "snapshot-invalid", compression: str = "lz4",
            path: str | None = None) -> Case:  # fmt: skip
        problems = () if path is None else ((path, rule),)
        return Case(name, data, (rule,), note, code=code, problems=problems, more={"compression": compression})

    yield good(
        "base", whole, "RAM-1 RAM-4 RAM-5 RAM-6 RAM-7 RAM-8 RAM-9 RAM-11 RAM-12 RAM-13 RAM-16 RAM-18", base_memory
    )
    yield good("nothing but zeroes", snapshot({}).whole, "RAM-18", bytes(limits.RAM_MIN))
    yield good("zstd", snapshot(BASE_PAGES, compression=Compression.ZSTD).whole, "RAM-16 RAM-17", base_memory, "zstd")
    yield good(
        "diff", diff.whole, "RAM-14 RAM-18 RAM-43", memory_of(diff_pages, base_memory), parents=["valid/base.ovmr"]
    )
    yield good(
        "a device that nobody knows",
        with_header(lambda document: document["devices"].append({"type": "sound"})),
        "RAM-24",
        base_memory,
    )
    yield good(
        "the most of everything in the header", with_header(fill_header), "RAM-23 RAM-25 RAM-21 LIM-1", base_memory
    )
    unknown = with_header(lambda document: document.update({"com.example.note": {"x": 1}}))
    yield good("unknown header fields", unknown, "DOC-7 RAM-20", base_memory)

    yield bad("empty prefix", whole[:100], "RAM-1")
    yield bad("cut in the header", whole[:300], "RAM-1")
    yield bad("cut in the data", whole[:-1], "RAM-1")
    yield bad("bytes behind the end", whole + b"\0", "RAM-1")
    yield bad("no zeroes before the data", whole[: data - 1] + b"\1" + whole[data:], "RAM-1")
    yield bad("an lz4 frame", b"\x04\x22\x4d\x18" + bytes(200), "RAM-4", "the draft's opaque stream")
    yield bad("a magic with its top bit lost", b"\x09" + whole[1:], "RAM-4")
    yield bad("version 2", poke(whole, 8, "<I", 2), "RAM-5")
    prefix = (
        ("a prefix of 64 bytes", 12, "<I", 64),
        ("memory of an odd size", 16, "<Q", limits.RAM_MIN + 1),
        ("memory too small", 16, "<Q", limits.RAM_MIN - PAGE),
        ("memory of 16 EiB", 16, "<Q", 2**64 - PAGE),
        ("pages of 2 MiB", 24, "<I", 2 << 20),
        ("no pages a chunk", 28, "<I", 0),
        ("chunks too large", 28, "<I", limits.RAM_CHUNK_PAGES_MAX + 1),
        ("a header at 0", 32, "<Q", 0),
        ("a header of no bytes", 40, "<Q", 0),
        ("a header too large", 40, "<Q", limits.RAM_HEADER_MAX + 1),
        ("a state over the header", 48, "<Q", 128),
        ("a state too large", 56, "<Q", limits.RAM_STATE_MAX + 1),
        ("an index far away", 64, "<Q", 2**63),
        ("more entries than pages", 72, "<Q", 257),
        ("2 to the 64 entries", 72, "<Q", 2**64 - 1),
        ("data over the index", 80, "<Q", 0),
        ("more data than memory", 88, "<Q", limits.RAM_MIN + 2 * ramcrypt.TAG_SIZE + 1),
    )
    for name, at, form, value in prefix:
        changed = bytearray(whole)
        struct.pack_into(form, changed, at, value)
        yield bad(name, bytes(changed), "RAM-6")
    yield bad("a changed header", whole[:200] + b"\x7e" + whole[201:], "RAM-7")
    yield bad("a changed index", whole[: index + 32] + b"\0\0\0\0" + whole[index + 36 :], "RAM-7")
    yield bad("a header that is no JSON", with_header_bytes(b"not json"), "DOC-1", code="json-invalid")
    yield bad(
        "a header with a key twice",
        with_header_bytes(b'{"schemaVersion": 1, "schemaVersion": 1}'),
        "DOC-2",
        code="json-invalid",
    )
    state_at = struct.unpack_from("<Q", whole, 48)[0]
    yield bad("a state that claims 4 GiB", poke(whole, state_at, "<I", 2**32 - 1), "RAM-9")
    yield bad("a state that claims a byte more", poke(whole, state_at, "<I", len(STATE) + 1), "RAM-9")
    yield bad("a state that is not lz4", poke(whole, state_at + 4, "<B", 255), "RAM-9")
    yield bad("entries out of order", poke(whole, index + 64, "<Q", 2), "RAM-11")
    yield bad("entries that overlap", poke(whole, index, "<Q", 5), "RAM-11")
    yield bad("an entry beyond the memory", poke(whole, index + 64, "<Q", 255), "RAM-11")
    yield bad("a page number of 64 bits", poke(whole, index + 64, "<Q", 2**64 - 1), "RAM-11")
    yield bad("a gap in the data", poke(whole, index + 64 + 16, "<Q", len(base.data)), "RAM-12")
    yield bad("data that no entry holds", poke(whole, 88, "<Q", len(base.data) + 1) + b"\0", "RAM-12")
    yield bad("an entry of no pages", poke(whole, index + 8, "<I", 0), "RAM-13")
    yield bad("an entry of 17 pages", poke(whole, index + 64 + 8, "<I", 17), "RAM-13")
    yield bad("more stored than there is", poke(whole, index + 12, "<I", PAGE + 1), "RAM-13")
    yield bad("stored in part", poke(whole, index + 64 + 8, "<I", 3), "RAM-13", "codec 0, two pages' bytes for three")
    yield bad("stored, and compressed", poke(whole, index + 24, "<B", 0), "RAM-13", "codec 0, 26 bytes for a page")
    fields = list(struct.unpack("<8sIIQIIQQQQQQQQ32s", whole[:128]))
    fields[3], fields[11] = limits.RAM_MAX, limits.RAM_CHUNKS_MAX + 1
    fields[12] = -(-(fields[10] + fields[11] * 64) // PAGE) * PAGE
    yield bad("too many entries", struct.pack("<8sIIQIIQQQQQQQQ32s", *fields) + whole[128:], "RAM-6", "RAM_CHUNKS_MAX")
    yield bad("a zero chunk without a parent", _zero_in_base(), "RAM-14")
    yield bad("a zero chunk with a digest", poke(diff.whole, diff_index + 32, "<B", 1), "RAM-14")
    yield bad("an unknown codec", poke(whole, index + 24, "<B", 9), "RAM-15")
    yield bad("reserved bytes in use", poke(whole, index + 31, "<B", 1), "RAM-15")
    yield bad("a changed chunk", whole[:-10] + b"\0" + whole[-9:], "RAM-16")
    yield bad("a chunk that unpacks to less", _other_chunk(b"A" * (PAGE - 1)), "RAM-16")
    yield bad("a chunk that unpacks to 15 MiB", _other_chunk(bytes(15 << 20)), "RAM-16", "a bomb: 60 KiB of lz4")
    yield bad("another chunk's bytes", _other_chunk(b"Z" * PAGE), "RAM-16")
    yield bad("lz4 in a zstd blob", whole, "RAM-17", compression="zstd")
    yield bad("zstd in an lz4 blob", snapshot(BASE_PAGES, compression=Compression.ZSTD).whole, "RAM-17")
    yield bad("no vmm", with_header(lambda document: document.pop("vmm")), "RAM-20", path="$.vmm")
    yield bad(
        "a version that is a number",
        with_header(lambda document: document["vmm"].update(version=7)),
        "RAM-20",
        path="$.vmm.version",
    )
    yield bad(
        "version 2 of the header",
        with_header(lambda document: document.update(schemaVersion=2)),
        "RAM-20",
        path="$.schemaVersion",
    )
    yield bad(
        "a clock of the moon",
        with_header(lambda document: document["clock"].update(rtc="lunar")),
        "RAM-20",
        path="$.clock.rtc",
    )
    yield bad(
        "a kernel that is a path",
        with_header(lambda document: document.update(kernel="/boot/vmlinuz")),
        "RAM-21",
        path="$.kernel",
    )
    yield bad(
        "a parent that is null", with_header(lambda document: document.update(parent=None)), "DOC-8", path="$.parent"
    )
    yield bad("another memory size", with_header(lambda document: document["memory"].update(size=2 << 20)), "RAM-22")
    yield bad("no CPU", with_header(lambda document: document["cpu"].update(count=0)), "RAM-23", path="$.cpu.count")
    yield bad("256 CPUs", with_header(lambda document: document["cpu"].update(count=256)), "RAM-23", path="$.cpu.count")
    yield bad(
        "a MAC in upper case",
        with_header(lambda document: document["devices"][3].update(mac="52:54:00:AA:BB:CC")),
        "RAM-23",
        path="$.devices[3].mac",
    )
    yield bad(
        "a network without a backend",
        with_header(lambda document: document["devices"][3].pop("backend")),
        "RAM-20",
        path="$.devices[3].backend",
    )
    for name, change, rule, path in header_mistakes():
        yield bad(name, with_header(change), rule, path=path)
    yield bad(
        "a name that clears the screen",
        with_header(lambda document: document["vmm"].update(name="\x1b[2J")),
        "RAM-25",
        path="$.vmm.name",
    )
    yield bad(
        "too many disks",
        with_header(lambda document: document.update(disks=[digest("x")] * 65)),
        "RAM-21",
        path="$.disks",
    )
    yield from encrypted_cases(good, bad)


def encrypted_cases(good: Callable[..., Case], bad: Callable[..., Case]) -> Iterator[Case]:
    """Encrypted RAM snapshots: section 11."""
    base = snapshot(BASE_PAGES, ENCRYPTED)
    whole = base.whole
    memory = memory_of(BASE_PAGES)
    rules = "RAM-57 RAM-58 RAM-59 RAM-61 RAM-62 RAM-63"
    plain_digest = "sha256:" + hashlib.sha256(snapshot(BASE_PAGES).whole).hexdigest()
    diff_pages = {3: b"", 4: b"B" * PAGE}
    diff_header = replace(ENCRYPTED, parent=plain_digest, disks=(*HEADER.disks, digest("overlay")))
    diff = snapshot(diff_pages, diff_header)
    index = struct.unpack_from("<Q", whole, 64)[0]
    state_at = struct.unpack_from("<Q", whole, 48)[0]
    first, second = base.chunks

    def keyed(case: Case, identity: str = IDENTITY) -> Case:
        return replace(case, more={**case.more, "identity": identity})

    def hostile(name: str, data: bytes, rule: str, note: str = "") -> Case:
        return keyed(bad(name, data, rule, note))

    yield keyed(good("encrypted", whole, rules, memory))
    zstd = snapshot(BASE_PAGES, ENCRYPTED, Compression.ZSTD)
    yield keyed(good("encrypted with zstd", zstd.whole, "RAM-17 RAM-61", memory, "zstd"))
    yield keyed(
        good(
            "an encrypted diff of a base that is not",
            diff.whole,
            "RAM-43 RAM-61",
            memory_of(diff_pages, memory),
            parents=["valid/base.ovmr"],
        )
    )
    yield keyed(bad("encrypted for somebody else", whole, "RAM-60", code="identity-missing"), OTHER_IDENTITY)
    yield hostile("zstd in an encrypted lz4 blob", zstd.whole, "RAM-17")
    yield hostile("an encrypted chunk changed", whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:], "RAM-16")
    state = bytearray(whole)
    state[state_at] ^= 1
    yield hostile(
        "an encrypted state changed", sealed(bytes(state)), "RAM-62", "with the digest of the control part made right"
    )
    swapped = bytearray(whole)
    swapped[index + 32 : index + 64], swapped[index + 96 : index + 128] = second.digest, first.digest
    yield hostile("the digests of encrypted chunks swapped", sealed(bytes(swapped)), "RAM-62")
    yield hostile(
        "an encrypted entry moved to another page", poke(whole, index, "<Q", 2), "RAM-62", "page 3 is found at page 2"
    )
    yield hostile("an encrypted entry made zero", _made_zero(diff.whole), "RAM-62", "the child's page is zero then")
    yield hostile("an encrypted blob without its last chunk", _without_last(base), "RAM-62")
    moved = Cipher(KEY).encrypt_chunk(9, 1, ramsnap.CODEC_LZ4, ramsnap.compress(BASE_PAGES[3])[1])
    chunk = first._replace(stored_size=len(moved), digest=hashlib.sha256(moved).digest())
    other = Blob(ENCRYPTED, (chunk, second._replace(offset=len(moved))), moved + base.data[second.offset :])
    yield hostile("an encrypted chunk of another page", other.whole, "RAM-63", "by somebody who has the key")
    yield hostile("a chunk in plain in an encrypted blob", poke(whole, index + 24, "<B", ramsnap.CODEC_LZ4), "RAM-61")
    plain = snapshot(BASE_PAGES).whole
    at = struct.unpack_from("<Q", plain, 64)[0] + 24
    yield hostile(
        "an encrypted chunk in a plain blob", poke(plain, at, "<B", ramsnap.CODEC_LZ4 + ramsnap.ENCRYPTED), "RAM-61"
    )
    for name, wrapped in (("a wrapped key of 16 bytes", WRAPPED_SHORT), ("a wrapped key that is no age file", b"key")):
        encryption = Encryption((RECIPIENT,), wrapped)
        yield hostile(name, snapshot(BASE_PAGES, replace(HEADER, encryption=encryption)).whole, "RAM-58")
    for name, change, rule, path in (
        ("a recipient added later", {"recipients": [RECIPIENT] * 2}, "RAM-62", None),
        ("too many recipients", {"recipients": [RECIPIENT] * (limits.RAM_RECIPIENTS_MAX + 1)}, "RAM-59", "recipients"),
        ("a recipient that is a password", {"recipients": ["password"]}, "RAM-59", "recipients[0]"),
        ("another type of encryption", {"type": "rot13"}, "RAM-58", "type"),
        ("a wrapped key that is no base64", {"key": "%%%%"}, "RAM-58", "key"),
    ):
        document = ENCRYPTED.to_json()
        document["encryption"].update(change)
        data = with_header_bytes(strictjson.canonical(document), whole)
        yield keyed(bad(name, data, rule, path=path and f"$.encryption.{path}"))


def _made_zero(whole: bytes) -> bytes:
    # the second entry of the diff, which is the last and holds page 4, says that the page is zero
    index = struct.unpack_from("<Q", whole, 64)[0]
    data = struct.unpack_from("<Q", whole, 80)[0]
    entry = struct.pack("<QIIQB7s32s", 4, 1, 0, 0, ramsnap.CODEC_ZERO, bytes(7), bytes(32))
    changed = whole[: index + 64] + entry + whole[index + 128 : data]
    return sealed(changed[:88] + struct.pack("<Q", 0) + changed[96:])


def _without_last(base: Blob) -> bytes:
    # The entry becomes zeroes before the data; the prefix knows of one chunk less.
    changed = bytearray(base.whole)
    index, chunks, data = struct.unpack_from("<QQQ", changed, 64)
    changed[index + 64 * (chunks - 1) : index + 64 * chunks] = bytes(64)
    struct.pack_into("<Q", changed, 72, chunks - 1)
    size = base.chunks[-1].offset
    struct.pack_into("<Q", changed, 88, size)
    return sealed(bytes(changed[: data + size]))


def fill_header(document: dict[str, Any]) -> None:
    """Every list and number of a header at its limit."""
    document["cpu"].update(count=limits.VCPUS_MAX, flags=["x"] * limits.RAM_LIST_MAX)
    document["devices"][4]["size"] = limits.DISK_VIRTUAL_MAX
    shared = {"type": "ivshmem", "name": "a", "size": limits.IVSHMEM_MAX}
    document["devices"] += [shared, {**shared, "size": limits.IVSHMEM_MIN}, {"type": "sound", "size": 2**63 - 1}]
    document["devices"] += [{"type": "serial"}] * (limits.RAM_LIST_MAX - len(document["devices"]))
    document["disks"] = [digest(str(i)) for i in range(limits.DISK_LAYERS_MAX)]
    document["vmm"]["version"] = "7" * limits.STRING_MAX


def header_mistakes() -> Iterator[tuple[str, Callable[[dict[str, Any]], None], str, str]]:
    """(name, change, rule, JSON path) of what a header must not say."""
    yield "a flag too many", lambda d: d["cpu"].update(flags=["x"] * (limits.RAM_LIST_MAX + 1)), "RAM-25", "$.cpu.flags"
    yield (
        "a device too many",
        lambda d: d.update(devices=[{"type": "serial"}] * (limits.RAM_LIST_MAX + 1)),
        "RAM-25",
        "$.devices",
    )
    yield (
        "a version too long",
        lambda d: d["vmm"].update(version="7" * (limits.STRING_MAX + 1)),
        "RAM-25",
        "$.vmm.version",
    )
    yield (
        "a disk too large",
        lambda d: d["devices"][4].update(size=limits.DISK_VIRTUAL_MAX + 1),
        "RAM-23",
        "$.devices[4].size",
    )
    for size in (limits.IVSHMEM_MIN - 1, limits.IVSHMEM_MAX + 1):
        yield (
            f"a region of {size} bytes",
            lambda d: d["devices"].append({"type": "ivshmem", "name": "a", "size": size}),  # noqa: B023 - called at once
            "RAM-23",
            "$.devices[5].size",
        )
    for where, key in (("vmm", "name"), ("vmm", "state_format"), ("machine", "type"), ("cpu", "model")):
        yield (
            f"an empty {where}.{key}",
            lambda d: d[where].update({key: ""}),  # noqa: B023 - called at once
            "RAM-20",
            f"$.{where}.{key}",
        )
    yield "memory with a fraction", lambda d: d["memory"].update(size=1048576.0), "DOC-6", "$.memory.size"
    yield "a source of SHA-512", lambda d: d.update(source="sha512:" + "a" * 128), "RAM-21", "$.source"
    yield "no devices", lambda d: d.pop("devices"), "RAM-20", "$.devices"


def restore_cases() -> Iterator[dict[str, Any]]:
    """Sections 7 and 9: headers, the OVMS manifest around them, and whether they belong together."""
    vm: dict[str, Any] = {
        **MINIMAL,
        "kernel": {"ref": digest("kernel"), "args": "console=ttyS0"},
        "diskLayers": [{"ref": digest("base"), "format": "qcow2"}],
    }
    base = HEADER.to_json()
    diff = {**base, "parent": digest("first"), "disks": [digest("base"), digest("overlay")]}
    child = {**vm, "diskLayers": [*vm["diskLayers"], {"ref": digest("overlay"), "format": "qcow2"}]}

    def case(name: str, rule: str, manifest: dict[str, Any], headers: list[dict[str, Any]], *, valid: bool = False,
             disk: int | None = 1 << 30) -> dict[str, Any]:  # fmt: skip
        names = ["first", "second", "third"][: len(headers)]
        chain = [{"digest": digest(label), "header": header} for label, header in zip(names, headers, strict=True)]
        code = {} if valid else {"code": "snapshot-invalid"}
        return {
            "name": name,
            "rules": rule.split(),
            "valid": valid,
            **code,
            "manifest": manifest,
            "disk_size": disk,
            "chain": chain,
        }

    def changed(header: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {**copy.deepcopy(header), **fields}

    yield case("one of the artifact", "RAM-30", vm, [base], valid=True)
    yield case("another kernel", "RAM-30", vm, [changed(base, kernel=digest("other"))])
    yield case("no kernel", "RAM-30", vm, [changed(base, kernel=None)])
    yield case("an initrd", "RAM-30", vm, [changed(base, initrd=digest("initrd"))])
    yield case("other kernel arguments", "RAM-30", vm, [changed(base, kernel_args="single")])
    plain_vm = {key: value for key, value in vm.items() if key != "kernel"}
    yield case("without a kernel", "RAM-30", plain_vm, [changed(base, kernel=None, kernel_args="")], valid=True)
    yield case("kernel arguments without a kernel", "RAM-30", plain_vm, [changed(base, kernel=None)])
    yield case("another disk layer", "RAM-30", vm, [changed(base, disks=[digest("other")])])
    yield case("a layer more", "RAM-30", vm, [changed(base, disks=[digest("base"), digest("more")])])
    yield case("a disk of another size", "RAM-30", vm, [base], disk=1 << 29)
    first = {"type": "virtio-blk", "size": 1 << 30}
    two = [*base["devices"][:4], first, {**first, "size": 512}]
    yield case("the first disk counts", "RAM-30", vm, [changed(base, devices=two)], valid=True)
    yield case("the second does not", "RAM-30", vm, [changed(base, devices=two[:4] + two[:3:-1])])
    none = {key: value for key, value in vm.items() if key != "diskLayers"}
    yield case("no disk", "RAM-30", none, [changed(base, disks=[], devices=base["devices"][:4])], valid=True, disk=None)
    yield case("a disk that there is not", "RAM-30", none, [changed(base, disks=[])], disk=None)
    shared = {"type": "ivshmem", "name": "shm", "size": 1 << 20}
    device = {"type": "ivshmem", "name": "shm"}
    with_region = changed(base, devices=[*base["devices"], shared])
    yield case("shared memory", "RAM-30 DEV-2", {**vm, "devices": [device]}, [with_region], valid=True)
    yield case("shared memory that the manifest lacks", "RAM-30", vm, [with_region])
    yield case("shared memory that the snapshot lacks", "RAM-30", {**vm, "devices": [device]}, [base])
    yield case("shared memory of another size", "RAM-30", {**vm, "devices": [{**device, "size": 4096}]}, [with_region])
    yield case("shared memory of another name", "RAM-30", {**vm, "devices": [{**device, "name": "x"}]}, [with_region])

    yield case("a diff", "RAM-40 RAM-42 RAM-44", child, [base, diff], valid=True)
    other = changed(base, vmm={**base["vmm"], "version": "6.0"}, created="2026-11-23T10:00:00Z")
    yield case("a diff of another version of the VMM", "RAM-44", child, [other, diff], valid=True)
    third = changed(diff, parent=digest("second"))
    yield case("a diff of a diff", "RAM-40 RAM-42", child, [base, diff, third], valid=True)
    yield case("a diff alone", "RAM-40", child, [diff])
    yield case("another parent", "RAM-40", child, [base, changed(diff, parent=digest("other"))])
    yield case("a grandchild of the base", "RAM-40", child, [base, diff, diff])
    yield case("two bases", "RAM-40", child, [base, changed(base, disks=diff["disks"])])
    yield case("a diff of another memory", "RAM-42", child, [base, changed(diff, memory={"size": 2 << 20})])
    yield case("a diff of another kernel", "RAM-42", child, [changed(base, kernel=digest("other")), diff])
    yield case("a diff of other kernel arguments", "RAM-42", child, [changed(base, kernel_args="quiet"), diff])
    yield case("a diff of other disks", "RAM-42", child, [changed(base, disks=[digest("other")]), diff])
    yield case("a diff of fewer disks", "RAM-42", child, [changed(base, disks=[*diff["disks"], digest("more")]), diff])


def _zero_in_base() -> bytes:
    diff = snapshot({3: b"", 4: b"B" * PAGE}, replace(HEADER, parent=digest("parent"))).whole
    # the same without a parent: the header gets shorter by a field, padded with blanks
    text = f'  "parent": "{digest("parent")}",\n'.encode()
    assert diff.count(text) == 1
    return sealed(diff.replace(text, b" " * len(text)))


def _other_chunk(content: bytes) -> bytes:
    import lz4.block

    base = snapshot(BASE_PAGES)
    packed = bytes(lz4.block.compress(content, store_size=False))
    first, second = base.chunks
    if len(packed) > PAGE:  # more stored bytes than one page may have: give the entry more pages
        chunks = (
            first._replace(pages=16, page=32, stored_size=len(packed), offset=0),
            second._replace(page=100, offset=len(packed)),
        )
        return Blob(HEADER, chunks, packed + NOISE).whole
    chunks = (first._replace(stored_size=len(packed)), second._replace(offset=len(packed)))
    return Blob(HEADER, chunks, packed + NOISE).whole


# --- the worked example ----------------------------------------------------------------------------------------------

_BEGIN: Final = "<!-- example: written by scripts/make_vectors.py -->\n"
_END: Final = "<!-- end of example -->"


def hex_dump(data: bytes, start: int = 0) -> str:
    """Like ``hexdump -C``: lines that repeat are a star."""
    lines = []
    last = b""
    starred = False
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if row == last and len(row) == 16:
            if not starred:
                lines.append("*")
            starred = True
            continue
        starred, last = False, row
        words = " ".join(f"{byte:02x}" for byte in row[:8]) + "  " + " ".join(f"{byte:02x}" for byte in row[8:])
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start + at:08x}  {words:<48}  |{text}|")
    return "\n".join([*lines, f"{start + len(data):08x}"])


def worked_example() -> str:
    """The text between the markers of the RFC."""
    whole = snapshot(BASE_PAGES).whole
    state_at, state, index, entries, data, size = struct.unpack_from("<QQQQQQ", whole, 48)
    parts = (
        ("The prefix", 0, 128),
        ("The header", 128, state_at),
        (f"The device state, {state} bytes as stored", state_at, index),
        (f"The index, {entries} entries, and the zeroes up to the data region", index, data),
        (
            f"The data, {size} bytes: the lz4 block of page 3, and the beginning of pages 5 and 6 as they are",
            data,
            data + 64,
        ),
    )
    text = "".join(
        f"{title} (offsets {start} to {end - 1}):\n\n```\n{hex_dump(whole[start:end], start)}\n```\n\n"
        for title, start, end in parts
    )
    return f"{text}The blob has {len(whole)} bytes and the digest `sha256:{hashlib.sha256(whole).hexdigest()}`.\n"


# --- all of it -------------------------------------------------------------------------------------------------------


def generate() -> Files:
    """Every file, by its path below ``spec/``."""
    files: Files = {}
    write_cases(files, "json", ".json", document_cases())
    write_cases(files, "manifest", ".json", list(manifest_cases()))
    write_oci_cases(files)
    write_index(files, "platform", platform_cases())
    write_index(files, "reference", reference_cases())
    write_cases(files, "disk", ".img", list(disk_cases()))
    write_cases(files, "kernel", ".bin", list(kernel_cases()))
    write_cases(files, "ramsnap", ".ovmr", list(ram_cases()))
    write_index(files, "restore", list(restore_cases()))
    rfc = (REPOSITORY / "spec" / "rfc" / "ramsnap-v1.md").read_text(encoding="utf-8")
    head, _, rest = rfc.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    files["rfc/ramsnap-v1.md"] = f"{head}{_BEGIN}\n{worked_example()}\n{_END}{tail}".encode()
    return files


def write(files: Files) -> None:
    """Puts the files in their places, and takes away what else is there."""
    root = REPOSITORY / "spec"
    for kind in {path.split("/")[1] for path in files if path.startswith("vectors/")}:
        for old in (root / "vectors" / kind).rglob("*"):
            if old.is_file() and str(old.relative_to(root)) not in files:
                old.unlink()
    for path, content in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    print(f"{len(files)} files written")


def main() -> int:
    write(generate())
    return 0


if __name__ == "__main__":
    sys.exit(main())
