"""Every vector of ``spec/vectors``, run against the implementation and against the schemas."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.schemas import SPEC, validator

from ovms.artifact import model
from ovms.artifact.kernels import check_kernel
from ovms.disk.layers import check_layer
from ovms.errors import OvmsError, ReferenceInvalid, SnapshotInvalid, Unsupported
from ovms.oci.descriptor import ImageManifest, parse_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.spec import manifest, mediatypes, ramheader, ramsnap
from ovms.spec.manifest import Compression, DiskFormat
from ovms.trust.age import Identities

VECTORS = SPEC / "vectors"
ROOT = SPEC.parent


def cases(kind: str) -> list[Any]:
    document = json.loads((VECTORS / kind / "index.json").read_bytes())
    assert document["kind"] == kind
    return [pytest.param(case, id=case.get("name") or case["reference"][:40]) for case in document["cases"]]


def content(kind: str, case: dict[str, Any]) -> bytes:
    return (VECTORS / kind / str(case["file"])).read_bytes()


def agrees(case: dict[str, Any], error: OvmsError) -> None:
    """Whether *error* says what the vector expects: code, rules, places."""
    assert not case["valid"], error
    assert error.code == case["code"], error
    problems = error.context.get("problems") or []
    if "problems" in case:
        assert [{"path": p["path"], "rule": p.get("rule")} for p in problems] == case["problems"]
    else:
        assert error.context["rule"] in case["rules"], error.context


@contextmanager
def opened(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("vector")
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("case", cases("json"))
def test_json(case: dict[str, Any]) -> None:
    try:
        manifest.parse(content("json", case))
        assert case["valid"]
    except OvmsError as exc:
        agrees(case, exc)


@pytest.mark.parametrize("case", cases("manifest"))
def test_manifest(case: dict[str, Any]) -> None:
    data = content("manifest", case)
    assert validator("manifest").is_valid(json.loads(data)) == case["schema"]
    try:
        manifest.parse(data)
        assert case["valid"]
    except OvmsError as exc:
        agrees(case, exc)


@pytest.mark.parametrize("case", cases("oci"))
def test_oci(case: dict[str, Any]) -> None:
    raw = (VECTORS / "oci" / str(case["manifest"])).read_bytes()
    try:
        image = parse_manifest(content("oci", case), "the manifest")
        assert isinstance(image, ImageManifest)
        model.check_image(image)
        assert model.ovms_descriptor(image).digest == "sha256:" + hashlib.sha256(raw).hexdigest()
        model.check_parts(manifest.parse(raw), image)
        assert case["valid"]
    except OvmsError as exc:
        agrees(case, exc)


@pytest.mark.parametrize("case", cases("platform"))
def test_platform(case: dict[str, Any], layout: Layout) -> None:
    def image(number: int) -> dict[str, Any]:
        config = {"mediaType": mediatypes.MANIFEST, "digest": "sha256:" + f"{number:064x}", "size": 1}
        return {"schemaVersion": 2, "mediaType": mediatypes.OCI_MANIFEST, "config": config, "layers": []}

    manifests = []
    for number, platform in enumerate(case["platforms"]):
        value = image(number) if platform != "index" else {"schemaVersion": 2, "manifests": []}
        raw = json.dumps(value).encode()
        media_type = mediatypes.OCI_INDEX if platform == "index" else mediatypes.OCI_MANIFEST
        descriptor = {"mediaType": media_type, "digest": layout.add_bytes(raw), "size": len(raw)}
        manifests.append(descriptor | ({"platform": platform} if isinstance(platform, dict) else {}))
    raw = json.dumps({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": manifests}).encode()
    index = parse_manifest(raw, "the index")
    assert not isinstance(index, ImageManifest)
    if case["chosen"] is None:
        with pytest.raises(Unsupported):
            model.choose(layout, index)
    else:
        assert model.choose(layout, index).digest == manifests[case["chosen"]]["digest"]


@pytest.mark.parametrize("case", cases("reference"))
def test_reference(case: dict[str, Any]) -> None:
    if not case["valid"]:
        with pytest.raises(ReferenceInvalid) as info:
            Reference.parse(case["reference"])
        assert info.value.code == case["code"]
        assert info.value.context["rule"] == "REF-1"
        return
    found = Reference.parse(case["reference"])
    parts = {"registry": found.registry, "repository": found.repository, "tag": found.tag, "digest": found.digest}
    assert parts == {key: case[key] for key in parts}


@pytest.mark.parametrize("case", cases("restore"))
def test_restore(case: dict[str, Any]) -> None:
    chain = [(str(member["digest"]), ramheader.check(member["header"])) for member in case["chain"]]
    for member in case["chain"]:
        validator("ramsnap").validate(member["header"])
    checked = manifest.check(case["manifest"])
    try:
        ramheader.check_chain(chain)
        ramheader.check_belongs(chain[-1][1], checked, case["disk_size"])
        assert case["valid"]
    except OvmsError as exc:
        agrees(case, exc)


@pytest.mark.parametrize("case", cases("disk"))
def test_disk(case: dict[str, Any]) -> None:
    with opened(content("disk", case)) as fd:
        try:
            assert check_layer(fd, DiskFormat(case["format"]), "disk layer 0") == case["virtual_size"]
            assert case["valid"]
        except OvmsError as exc:
            agrees(case, exc)


@pytest.mark.parametrize("case", cases("kernel"))
def test_kernel(case: dict[str, Any]) -> None:
    with opened(content("kernel", case)) as fd:
        try:
            check_kernel(fd)
            assert case["valid"]
        except OvmsError as exc:
            agrees(case, exc)


def read_snapshot(data: bytes, compression: Compression, identity: Path) -> dict[int, bytes | None]:
    """Page → its bytes; None is a page that is zero now. *identity* decrypts what is encrypted."""
    control = ramsnap.parse_control(data)
    cipher = None
    ramsnap.check_codecs(control, compression)
    if control.prefix.blob_size != len(data):
        raise SnapshotInvalid("the blob has another size", rule="RAM-1")
    if control.encrypted is not None:
        cipher = Identities([identity], {}).cipher(control.header)
        assert ramsnap.decrypt_state(control, cipher) == b"S" * 32
    pages: dict[int, bytes | None] = {}
    for chunk in control.chunks:
        at = control.prefix.data_offset + chunk.offset
        if chunk.codec == ramsnap.CODEC_ZERO:
            pages.update(dict.fromkeys(range(chunk.page, chunk.page + chunk.pages)))
            continue
        content = ramsnap.unpack_chunk(chunk, data[at : at + chunk.stored_size], control.prefix.data_offset, cipher)
        for i in range(chunk.pages):
            pages[chunk.page + i] = content[i * ramsnap.PAGE : (i + 1) * ramsnap.PAGE]
    return pages


@pytest.mark.parametrize("case", cases("ramsnap"))
def test_ramsnap(case: dict[str, Any], tmp_path: Path) -> None:
    data = content("ramsnap", case)
    compression = Compression(case["compression"])
    identity = tmp_path / "identity.txt"
    identity.write_text(case.get("identity", ""))
    try:
        pages = read_snapshot(data, compression, identity)
        assert case["valid"]
    except OvmsError as exc:
        agrees(case, exc)
        return
    header = ramsnap.parse_control(data).header
    assert validator("ramsnap").is_valid(header.to_json())
    memory = bytearray(case["memory"]["size"])
    for parent in case.get("parents", []):
        blob = (VECTORS / "ramsnap" / parent).read_bytes()
        assert header.parent == "sha256:" + hashlib.sha256(blob).hexdigest()
        fill(memory, read_snapshot(blob, compression, identity))
    fill(memory, pages)
    assert hashlib.sha256(memory).hexdigest() == case["memory"]["sha256"]


def fill(memory: bytearray, pages: dict[int, bytes | None]) -> None:
    for page, data in pages.items():
        memory[page * ramsnap.PAGE : (page + 1) * ramsnap.PAGE] = data or bytes(ramsnap.PAGE)


def test_the_files_are_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_vectors", ROOT / "scripts" / "make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_vectors"] = module  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
        files: dict[str, bytes] = module.generate()
    finally:
        del sys.modules["make_vectors"]
    for path, data in files.items():
        assert (SPEC / path).read_bytes() == data, f"{path} is out of date: run 'make vectors'"


def test_no_file_is_without_a_case() -> None:
    for index in VECTORS.glob("*/index.json"):
        named = {case["file"] for case in json.loads(index.read_bytes())["cases"] if "file" in case}
        there = {str(p.relative_to(index.parent)) for d in ("valid", "invalid") for p in (index.parent / d).glob("*")}
        assert named == there, index


@pytest.mark.parametrize(
    "path", [*sorted(SPEC.glob("examples/*.json")), SPEC / "examples" / "ovms.yaml"], ids=lambda p: Path(p).name
)
def test_examples(path: Path) -> None:
    from ovms.artifact.document import read_document
    from ovms.artifact.validate import validate_path

    report = validate_path(path)
    assert report.valid, report.problems
    validator(report.kind if report.kind == "manifest" else "bootstrap.config", formats=True).validate(
        read_document(path)
    )
