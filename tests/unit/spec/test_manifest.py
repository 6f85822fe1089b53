"""The OVMS manifest: every field, every limit, every problem with its path."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import JsonInvalid, ManifestInvalid
from ovms.spec import limits, manifest
from ovms.spec.manifest import Compression, DiskFormat

D = "sha256:" + "0" * 64
MINIMAL: dict[str, Any] = {
    "schemaVersion": 1,
    "mediaType": "application/vnd.ovms.manifest.v1+json",
    "name": "web",
    "version": "1",
}
FULL: dict[str, Any] = {
    **MINIMAL,
    "kernel": {"ref": D, "args": "console=ttyS0"},
    "initrd": {"ref": "initrd.img"},
    "diskLayers": [
        {"ref": "base.img", "format": "raw", "size": 512},
        {"ref": "registry.example/a/b:1", "format": "qcow2"},
        {"ref": D, "format": "ovfms"},
    ],
    "ramSnapshot": {"ref": D, "compression": "zstd", "preload_hint": True, "mlock_required": True},
    "devices": [{"type": "ivshmem", "name": "shm0", "size": 4096, "mmio_addr": "0xfe000000"}],
    "metadata": {
        "author": "me",
        "created": "2026-01-31T12:00:00Z",
        "platform": {"arch": "x86_64", "uefi": True},
    },
    "runtimeHints": {"preferredRuntime": ["qemu", "firecracker"], "coldStartTargetMs": 10},
    "bootstrap": {"ref": D},
}


def problems(document: Any) -> dict[str, str]:
    with pytest.raises(ManifestInvalid) as info:
        manifest.check(document)
    found = {problem.path: problem.message for problem in info.value.problems}
    assert len(found) == len(info.value.problems), f"two problems at one place: {info.value.problems}"
    assert [p.path for p in info.value.problems] == sorted(found)
    return found


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with the field at *path* (``devices.0.name``) set to *value*."""
    document = copy.deepcopy(FULL)
    *way, last = path.split(".")
    item: Any = document
    for key in way:
        item = item[int(key)] if key.isdigit() else item[key]
    item[int(last) if last.isdigit() else last] = value
    return document


def json_path(path: str) -> str:
    return "$" + "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in path.split("."))


def test_the_least_manifest() -> None:
    found = manifest.check(MINIMAL)
    assert (found.name, found.version, found.kernel, found.initrd, found.disk_layers) == ("web", "1", None, None, ())
    assert found.metadata.platform.arch == "x86_64"
    assert found.parts() == []


def test_every_field() -> None:
    found = manifest.parse(json.dumps(FULL).encode())
    assert found.kernel == manifest.Kernel(D, "console=ttyS0")
    assert found.initrd == manifest.Initrd("initrd.img")
    assert [(layer.ref, layer.format, layer.size) for layer in found.disk_layers] == [
        ("base.img", DiskFormat.RAW, 512),
        ("registry.example/a/b:1", DiskFormat.QCOW2, None),
        (D, DiskFormat.OVFMS, None),
    ]
    assert found.ram_snapshot == manifest.RamSnapshot(D, Compression.ZSTD, True, True)
    assert found.devices == (manifest.Device("ivshmem", "shm0", 4096, 0xFE000000),)
    assert found.metadata == manifest.Metadata("me", "2026-01-31T12:00:00Z", manifest.Platform("x86_64", True))
    assert found.runtime_hints == manifest.RuntimeHints(("qemu", "firecracker"), 10)
    assert found.bootstrap == manifest.Bootstrap(D)
    assert [part.path for part in found.parts()] == [
        "$.kernel.ref",
        "$.initrd.ref",
        "$.diskLayers[0].ref",
        "$.diskLayers[1].ref",
        "$.diskLayers[2].ref",
        "$.ramSnapshot.ref",
        "$.bootstrap.ref",
    ]


def test_defaults() -> None:
    found = manifest.check({**MINIMAL, "kernel": {"ref": "k"}, "ramSnapshot": {"ref": "r"}, "metadata": {}})
    assert found.kernel == manifest.Kernel("k", "")
    assert found.ram_snapshot == manifest.RamSnapshot("r", Compression.LZ4, False, False)
    assert found.metadata == manifest.Metadata(None, None, manifest.Platform("x86_64", False))


def test_unknown_fields_are_kept() -> None:
    document = copy.deepcopy(FULL)
    document["x-ours"] = {"deep": [1, None]}
    document["kernel"]["signature"] = "kept"
    document["diskLayers"][0]["lazy"] = True
    found = manifest.check(document)
    assert found.document == document


def test_three_mistakes_are_three_problems() -> None:
    document = copy.deepcopy(FULL)
    del document["version"]
    document["kernel"]["ref"] = 7
    document["diskLayers"][1]["format"] = "vmdk"
    with pytest.raises(ManifestInvalid, match=r"ovms\.yaml has 3 problems") as info:
        manifest.check(document, "ovms.yaml")
    assert [p.path for p in info.value.problems] == ["$.diskLayers[1].format", "$.kernel.ref", "$.version"]
    assert "must be one of qcow2, raw, ovfms, not 'vmdk'" in info.value.problems[0][1]
    assert info.value.to_json()["problems"][1] == {
        "path": "$.kernel.ref",
        "rule": "MAN-7",
        "message": "must be a string, not an integer",
    }
    assert info.value.hint


@pytest.mark.parametrize("document", [None, [], "x", 1, 1.5, True])
def test_no_object_is_one_problem(document: Any) -> None:
    assert list(problems(document)) == ["$"]


def test_an_empty_object_lacks_what_is_required() -> None:
    assert set(problems({})) == {"$.schemaVersion", "$.mediaType", "$.name", "$.version"}


@pytest.mark.parametrize("path", ["kernel", "initrd", "ramSnapshot", "bootstrap"])
def test_a_part_needs_its_ref(path: str) -> None:
    assert problems(changed(path, {})) == {f"$.{path}.ref": "is required"}


HUGE = 10**4000  # Python makes text of up to 4300 digits

WRONG: list[tuple[str, Any]] = [
    ("schemaVersion", 2),
    ("schemaVersion", "1"),
    ("schemaVersion", True),
    ("schemaVersion", -1),
    ("schemaVersion", HUGE),
    ("mediaType", "application/json"),
    ("mediaType", None),
    ("name", ""),
    ("name", "../x"),
    ("name", "-x"),
    ("name", "a b"),
    ("name", "ä"),
    ("name", "a\n"),
    ("name", "x" * 256),
    ("name", False),
    ("version", ""),
    ("version", 1.0),
    ("version", "1\x1b[2J"),
    ("version", "x" * 256),
    ("kernel", None),
    ("kernel", "vmlinuz"),
    ("kernel.ref", ""),
    ("kernel.ref", "a\0b"),
    ("kernel.ref", "x" * 4097),
    ("kernel.args", "x" * 2048),
    ("kernel.args", "a\nb"),
    ("kernel.args", ["a"]),
    ("initrd", []),
    ("initrd.ref", 1),
    ("diskLayers", {}),
    ("diskLayers", None),
    ("diskLayers", [{"ref": "a", "format": "qcow2"}] * 65),
    ("diskLayers.0", "base.img"),
    ("diskLayers.0.ref", None),
    ("diskLayers.0.format", "RAW"),
    ("diskLayers.0.format", 1),
    ("diskLayers.0.size", 0),
    ("diskLayers.0.size", -HUGE),
    ("diskLayers.0.size", 512.0),
    ("diskLayers.0.size", "512"),
    ("diskLayers.0.size", limits.DISK_LAYER_MAX + 1),
    ("diskLayers.1.format", "raw"),
    ("ramSnapshot.compression", "gzip"),
    ("ramSnapshot.preload_hint", 1),
    ("ramSnapshot.mlock_required", "yes"),
    ("devices", "ivshmem"),
    ("devices", [{"type": "t", "name": f"n{i}"} for i in range(33)]),
    ("devices.0", None),
    ("devices.0.type", ""),
    ("devices.0.name", "a/b"),
    ("devices.0.size", 4097),
    ("devices.0.size", 0),
    ("devices.0.size", "4096"),
    ("devices.0.size", None),
    ("devices.0.size", limits.IVSHMEM_MAX * 2),
    ("devices.0.mmio_addr", "fe000000"),
    ("devices.0.mmio_addr", "0x"),
    ("devices.0.mmio_addr", "0x" + "f" * 17),
    ("devices.0.mmio_addr", 0xFE000000),
    ("metadata", []),
    ("metadata.author", 1),
    ("metadata.platform", "x86_64"),
    ("metadata.platform.arch", ""),
    ("metadata.platform.uefi", "no"),
    ("runtimeHints", True),
    ("runtimeHints.preferredRuntime", "qemu"),
    ("runtimeHints.preferredRuntime", ["x"] * 33),
    ("runtimeHints.preferredRuntime.1", 1),
    ("runtimeHints.coldStartTargetMs", -1),
    ("runtimeHints.coldStartTargetMs", 1.5),
    ("bootstrap", 1),
    ("bootstrap.ref", []),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_each_mistake_has_its_path(path: str, value: Any) -> None:
    found = problems(changed(path, value))
    assert list(found) == [json_path(path)]
    assert len(found[json_path(path)]) < 300
    assert found[json_path(path)].isprintable()


@pytest.mark.parametrize(
    "time",
    [
        "2026-01-31T12:00:00Z",
        "2026-01-31t12:00:00z",
        "2026-01-31T12:00:00.123456789+05:30",
        "2024-02-29T23:59:60Z",
        "1985-04-12T23:20:50.52-00:00",
    ],
)
def test_times_of_rfc_3339(time: str) -> None:
    assert manifest.check(changed("metadata.created", time)).metadata.created == time


@pytest.mark.parametrize(
    "time",
    [
        "",
        "yesterday",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-01-31T12:00Z",
        "20260131T120000Z",
        "2026-W05-6T12:00:00Z",
        "2026-01-31 12:00:00Z",
        "2026-02-29T12:00:00Z",
        "2026-01-31T25:00:00Z",
        "2026-01-31T12:60:00Z",
        "2026-01-31T12:00:61Z",
        "2026-01-31T12:00:00+25:00",
        "2026-01-31T12:00:00+01:60",
        "2026-01-31T12:00:00+0530",
        "2026-01-31T12:00:00,5Z",
        "\u0662\u0660\u0662\u0666-01-31T12:00:00Z",
        "2026-01-31T12:00:00Z\n",
    ],
)
def test_times_of_another_form(time: str) -> None:
    assert list(problems(changed("metadata.created", time))) == ["$.metadata.created"]


def test_a_number_that_python_cannot_print() -> None:
    assert list(problems({**MINIMAL, "schemaVersion": 10**5000})) == ["$.schemaVersion"]


def test_two_devices_of_one_name() -> None:
    device = FULL["devices"][0]
    assert list(problems({**MINIMAL, "devices": [device, device]})) == ["$.devices[1].name"]


def test_other_devices_need_no_size() -> None:
    found = manifest.check({**MINIMAL, "devices": [{"type": "vsock", "name": "v"}]})
    assert found.devices == (manifest.Device("vsock", "v"),)


def test_an_ivshmem_device_without_a_size_has_the_default() -> None:
    found = manifest.check({**MINIMAL, "devices": [{"type": "ivshmem", "name": "v"}]})
    assert found.devices[0].region_size == limits.IVSHMEM_DEFAULT


def test_the_limits_themselves_pass() -> None:
    document = copy.deepcopy(FULL)
    document["name"] = "x" * 255
    document["kernel"]["args"] = "x" * 2047
    document["diskLayers"] = [{"ref": "a", "format": "qcow2", "size": limits.DISK_LAYER_MAX}] * 64
    document["devices"] = [{"type": "ivshmem", "name": f"n{i}", "size": limits.IVSHMEM_MAX} for i in range(32)]
    assert len(manifest.check(document).disk_layers) == 64


def test_parse_is_strict_json() -> None:
    with pytest.raises(JsonInvalid, match="the manifest has a key twice"):
        manifest.parse(b'{"name": "a", "name": "b"}')
    with pytest.raises(JsonInvalid, match="at most 1048576"):
        manifest.parse(b" " * (limits.MANIFEST_MAX + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([D, "qcow2", HUGE]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """FULL with up to four of its places set to anything at all."""
    document = copy.deepcopy(FULL)
    for _ in range(draw(st.integers(1, 4))):
        item: Any = document
        while True:
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(item[key], (dict, list)) and draw(st.integers(0, 3)):
                item = item[key]
                continue
            item[key] = draw(JSON)
            break
    return document


@given(mutated() | JSON)
def test_anything_else_raises_nothing_but_manifest_invalid(document: Any) -> None:
    error = None
    try:
        found = manifest.check(document)
        assert found.document == document
        assert all(part.ref for part in found.parts())
    except ManifestInvalid as exc:
        error = exc
    if error is not None:
        assert error.problems
        assert all(p.path.startswith("$") and p.rule for p in error.problems)
        assert json.dumps(error.to_json())


@given(st.binary(max_size=100))
def test_parse_of_any_bytes(data: bytes) -> None:
    with pytest.raises((JsonInvalid, ManifestInvalid)):
        manifest.parse(data)
