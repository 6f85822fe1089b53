"""The schemas and the models say the same, and round trips lose nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ram
from support.schemas import SPEC, validator

from ovms.errors import ManifestInvalid, OvmsError, SnapshotInvalid
from ovms.spec import manifest, ramheader, strictjson

#: What a schema can't say: an integer's spelling, two fields that differ, a calendar.
BEYOND: Final = {"DOC-6"}

D: Final = "sha256:" + "0" * 64
EXAMPLES: Final = [json.loads(path.read_bytes()) for path in sorted(SPEC.glob("examples/*-manifest.json"))]
HEADERS: Final = [
    ram.HEADER.to_json(),
    ram.header(
        parent=D,
        initrd=D,
        kernel=None,
        cpu_flags=("sse2",),
        devices=(ramheader.Device("ivshmem", "shm", 4096), ramheader.Device("virtio-serial", "org.example.0")),
    ).to_json(),
]
VALUES: Final = st.sampled_from(
    [None, True, False, 0, 1, 2, -1, 255, 256, 4096, 2**31, 2**31 + 1, 2**44 + 1, 2**63, 1.0, 1.5, "", "x", "x\n", "a/b",
     "/a", "A-1", "x" * 256, "x" * 4097, "qcow2", "raw", "zstd", "ivshmem", "virtio-net", "virtio-serial", D, D.upper(), "sha256:x",
     "sha512:" + "0" * 128, "0x1", "0xg", "2026-01-31T12:00:00Z", "2026-01-31", "\x7f", "\ud7ff", [], [D], ["x", 1],
     [D] * 65, {}, {"ref": D}, {"ref": ""}, [{"ref": D, "format": "raw"}] * 2, "52:54:00:12:34:5g", "utc", "host"]
)  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn, documents: list[Any]) -> Any:
    """A document with up to three of its places removed, added or set to something else."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        item: Any = document
        while isinstance(item, (dict, list)) and item:
            key = draw(st.sampled_from(sorted(item) if isinstance(item, dict) else list(range(len(item)))))
            if isinstance(item[key], (dict, list)) and draw(st.booleans()):
                item = item[key]
                continue
            if draw(st.booleans()):
                del item[key]
            else:
                item[key] = copy.deepcopy(draw(VALUES))
            break
    return document


def problems(check: Callable[[Any], object], document: Any) -> list[Any]:
    try:
        check(document)
    except (ManifestInvalid, SnapshotInvalid) as exc:
        return list(exc.context["problems"])
    return []


def beyond_the_schema(problem: dict[str, Any]) -> bool:
    text = problem["message"]
    return (
        problem["rule"] in BEYOND
        or "another device is named" in text
        or "is named twice" in text
        or "as in RFC 3339" in text
    )


@pytest.mark.spec("MAN-1", "VER-2")
@given(mutations(EXAMPLES))
def test_manifest(document: Any) -> None:
    agree(document, problems(manifest.check, document), "manifest")


@pytest.mark.spec("RAM-20")
@given(mutations(HEADERS))
def test_ramsnap(document: Any) -> None:
    agree(document, problems(ramheader.check, document), "ramsnap")


def agree(document: Any, found: list[Any], schema: str) -> None:
    accepted = validator(schema).is_valid(document)
    if accepted:
        assert all(beyond_the_schema(problem) for problem in found), "the schema accepts what the model refuses"
    else:
        assert found, "the schema refuses what the model accepts: " + str(
            [error.message for error in validator(schema).iter_errors(document)][:3]
        )


@pytest.mark.parametrize("name", ["manifest", "bootstrap.config", "ramsnap"])
def test_schemas_are_sound(name: str) -> None:
    schema = json.loads((SPEC / "schemas" / f"{name}.v1.json").read_bytes())
    text = json.dumps(schema)
    assert "(?" not in text, "lookarounds do not exist in RE2, which Go's validators use"
    assert schema["$id"] == f"urn:ovms:schema:{name}.v1"
    for example in schema.get("examples", []):
        validator(name).validate(example)
    undescribed = [
        key
        for key, value in schema["properties"].items()
        if "description" not in value and value.get("type") != "object"
    ]
    assert not undescribed


@pytest.mark.parametrize("document", EXAMPLES)
def test_a_manifest_survives_the_round_trip_to_the_byte(document: Any) -> None:
    raw = strictjson.canonical(document)
    assert strictjson.canonical(manifest.parse(raw).document) == raw


@pytest.mark.spec("DOC-7")
@given(mutations(EXAMPLES), st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers() | st.none()))
def test_any_valid_manifest_survives_the_round_trip(document: Any, unknown: dict[str, Any]) -> None:
    try:
        raw = strictjson.canonical({**unknown, **document})
        found = manifest.parse(raw)
    except (OvmsError, UnicodeEncodeError):
        return
    assert strictjson.canonical(found.document) == raw


@pytest.mark.parametrize("document", HEADERS)
def test_a_header_survives_the_round_trip(document: Any) -> None:
    assert ramheader.parse(strictjson.canonical(document)).to_json() == document
    for device in ramheader.DEVICE_TYPES:
        assert device in (SPEC / "rfc" / "ramsnap-v1.md").read_text(), device


#: The draft's schema, as far as it limits anything: what it accepts for a good reason, ours accepts too.
DRAFT: Final[list[dict[str, Any]]] = [
    {"schemaVersion": 1, "mediaType": "application/vnd.ovms.manifest.v1+json", "name": "n", "version": "1"},
    {"name": "hypr/ubuntu-base"},
    {"kernel": {"ref": "https://example.org/vmlinuz"}},
    {"kernel": {"ref": "myregistry.example/ovms/ubuntu:24.04/kernel", "args": ""}},
    {"diskLayers": []},
    {"diskLayers": [{"ref": D, "format": "ovfms"}]},
    {"ramSnapshot": {"ref": D}},
    {"devices": [{"type": "ivshmem", "name": "mmio0"}]},
    {"devices": [{"type": "vsock", "name": "v0", "mmio_addr": "0x0"}]},
    {"devices": []},
    {"metadata": {}},
    {"metadata": {"platform": {}}},
    {"metadata": {"author": "", "created": "2025-09-09T00:00:00Z", "platform": {"arch": "aarch64", "uefi": True}}},
    {"runtimeHints": {}},
    {"runtimeHints": {"preferredRuntime": [], "coldStartTargetMs": 0}},
    {"containerMode": True},
]


@pytest.mark.parametrize("change", DRAFT)
def test_what_the_draft_accepts(change: Any) -> None:
    document = {**DRAFT[0], **change}
    manifest.check(document)
    validator("manifest", formats=True).validate(document)
