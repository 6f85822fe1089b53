"""``ovm validate``: every problem, with its place and its rule."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support import ram
from support.artifacts import write_inputs, write_manifest

from ovms.artifact import model
from ovms.artifact.build import Builder
from ovms.artifact.parts import check_content, ram_annotations
from ovms.artifact.validate import Kind, Problem, Report, validate_artifact, validate_path
from ovms.errors import FileProblem, SnapshotInvalid, UsageError
from ovms.oci.layout import Layout
from ovms.spec import limits, ramheader, ramsnap
from ovms.spec.digest import Digest, of_bytes
from ovms.spec.manifest import Compression, Part, PartKind


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_inputs(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def built(layout: Layout, project: Path) -> model.Artifact:
    """A whole artifact whose RAM snapshot is one of its own VM."""
    plain = Builder(layout, no_registry).build(write_manifest(project, ramSnapshot=None))
    write_snapshot(project, plain)
    return Builder(layout, no_registry).build(write_manifest(project))


def write_snapshot(project: Path, artifact: model.Artifact, **changes: Any) -> None:
    manifest = artifact.manifest
    assert manifest.kernel is not None
    assert manifest.initrd is not None
    disk = ramheader.Device("virtio-blk", size=1 << 30)
    header = ram.header(
        kernel=manifest.kernel.ref,
        initrd=manifest.initrd.ref,
        kernel_args=manifest.kernel.args,
        disks=tuple(layer.ref for layer in manifest.disk_layers),
        devices=(*ram.HEADER.devices[:4], disk),
    )
    (project / "ram.ovmr").write_bytes(ram.blob({0: b"a" * ramsnap.PAGE * 2}, replace(header, **changes)))


def rules(report: Report) -> list[tuple[str | None, str | None]]:
    return [(problem.part, problem.rule) for problem in report.problems]


def test_a_sound_artifact(layout: Layout, built: model.Artifact) -> None:
    report = validate_artifact(layout, "web:1", built.digest)
    assert report.problems == []
    assert report.to_json() == {
        "name": "web:1", "kind": "artifact", "digest": built.digest, "valid": True, "problems": [],
    }  # fmt: skip


@pytest.mark.spec("OCI-21", "GEN-2")
def test_every_damaged_blob_is_named(layout: Layout, built: model.Artifact) -> None:
    for layer in built.image.layers:
        path = layout.path(layer.digest)
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    report = validate_artifact(layout, "web:1", built.digest)
    assert rules(report) == [
        ("the kernel", "OCI-21"),
        ("the initrd", "OCI-21"),
        ("disk layer 0", "OCI-21"),
        ("disk layer 1", "OCI-21"),
        ("the RAM snapshot", "OCI-21"),
        ("the bootstrap config", "OCI-21"),
    ]
    assert all(problem.code == "digest-mismatch" for problem in report.problems)


def test_a_missing_blob(layout: Layout, built: model.Artifact) -> None:
    layout.path(built.image.layers[0].digest).unlink()
    report = validate_artifact(layout, "web:1", built.digest)
    assert [(p.part, p.code) for p in report.problems] == [("the kernel", "file-missing")]
    report = validate_artifact(layout, "web:1", of_bytes(b"nothing"))
    assert [(p.part, p.code) for p in report.problems] == [("the OCI manifest", "blob-not-found")]


@pytest.mark.spec("RAM-30")
def test_a_snapshot_of_another_vm(layout: Layout, project: Path) -> None:
    plain = Builder(layout, no_registry).build(write_manifest(project, ramSnapshot=None))
    write_snapshot(project, plain, kernel_args="single", disks=())
    other = Builder(layout, no_registry).build(write_manifest(project))
    report = validate_artifact(layout, "web:1", other.digest)
    assert rules(report) == [("the RAM snapshot", "RAM-30")]
    assert "another kernel arguments and another disk layers" in report.problems[0].message


def test_manifests_that_disagree(layout: Layout, built: model.Artifact) -> None:
    image = json.loads(built.image.raw)
    image["artifactType"] = "application/x"
    image["layers"][0]["mediaType"] = "text/plain"
    image["layers"][2]["annotations"]["ovms.format"] = "qcow2"
    digest = layout.add_bytes(json.dumps(image).encode())
    report = validate_artifact(layout, "web:1", digest)
    assert rules(report) == [
        ("the OCI manifest", "OCI-1"),
        ("the OVMS manifest", "OCI-12"),
        ("the OVMS manifest", "OCI-11"),
    ]


def unpack(layout: Layout, artifact: model.Artifact, directory: Path) -> Path:
    (directory / "blobs").mkdir(parents=True)
    shutil.copy(layout.path(artifact.image.config.digest), directory / "manifest.json")
    for part in artifact.manifest.parts():
        shutil.copy(layout.path(Digest(part.ref)), directory / "blobs" / part.ref.replace(":", "-"))
    return directory


@pytest.mark.spec("OCI-24")
def test_an_unpacked_artifact(layout: Layout, built: model.Artifact, tmp_path: Path) -> None:
    directory = unpack(layout, built, tmp_path / "unpacked")
    assert validate_path(directory).problems == []
    blob = directory / "blobs" / built.image.layers[2].digest.replace(":", "-")
    blob.chmod(0o600)
    blob.write_bytes(b"x" * 512)
    assert rules(validate_path(directory)) == [("disk layer 0", "OCI-21")]
    blob.unlink()
    assert [p.code for p in validate_path(directory).problems] == ["file-missing"]
    document = json.loads((directory / "manifest.json").read_bytes())
    document["kernel"]["ref"] = "../../vmlinuz"
    (directory / "manifest.json").chmod(0o600)
    (directory / "manifest.json").write_text(json.dumps(document))
    assert (
        Problem(
            "manifest-invalid",
            "must be a digest in an unpacked artifact, not '../../vmlinuz'",
            "OCI-6",
            "manifest.json",
            "$.kernel.ref",
        )
        in validate_path(directory).problems
    )
    (directory / "manifest.json").unlink()
    assert [p.code for p in validate_path(directory).problems] == ["file-missing"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vmlinuz", "kernel"),
        ("diff.qcow2", "qcow2"),
        ("ram.ovmr", "ramsnap"),
        ("bootstrap.json", "bootstrap"),
        ("ovms.json", "manifest"),
    ],
)
def test_what_a_file_is_follows_from_its_content(project: Path, name: str, kind: str) -> None:
    write_manifest(project)
    report = validate_path(project / name)
    assert (report.kind, report.problems) == (kind, [])


def test_what_it_is_can_be_said(project: Path) -> None:
    assert validate_path(project / "base.img", Kind.RAW).valid
    with pytest.raises(UsageError, match="can't be told"):
        validate_path(project / "base.img")
    assert rules(validate_path(project / "diff.qcow2", Kind.RAW)) == [(None, "LAY-6")]
    assert rules(validate_path(project / "base.img", Kind.QCOW2)) == [(None, "LAY-8")]
    with pytest.raises(FileProblem):
        validate_path(project / "gone.json")


def test_every_damaged_chunk_is_named_with_its_offset(tmp_path: Path) -> None:
    pages = {i * 4: bytes([i + 1]) * ramsnap.PAGE for i in range(4)}
    blob = bytearray(ram.blob(pages))
    data = ramsnap.parse_prefix(bytes(blob)).data_offset
    chunks = ramsnap.parse_control(bytes(blob[:data])).chunks
    for i in (1, 3):
        blob[data + chunks[i].offset + 1] ^= 0xFF
    path = tmp_path / "x.ovmr"
    path.write_bytes(bytes(blob) + b"more")
    report = validate_path(path)
    assert [(p.rule, p.offset) for p in report.problems] == [
        ("RAM-1", None),
        ("RAM-16", data + chunks[1].offset),
        ("RAM-16", data + chunks[3].offset),
    ]


def test_a_file_of_rubbish_does_not_make_a_book(tmp_path: Path) -> None:
    blob = bytearray(ram.blob({i: bytes([i % 250 + 1]) * ramsnap.PAGE for i in range(250)}))
    at = ramsnap.parse_prefix(bytes(blob)).data_offset
    blob[at:] = b"\xff" * (len(blob) - at)
    (tmp_path / "x.ovmr").write_bytes(blob)
    assert len(validate_path(tmp_path / "x.ovmr").problems) == limits.PROBLEMS_MAX
    (tmp_path / "b.json").write_text(json.dumps({"env": ["-"] * limits.ENV_MAX, "cmd": [1] * limits.ARGUMENTS_MAX}))
    assert len(validate_path(tmp_path / "b.json").problems) == limits.PROBLEMS_MAX


@pytest.mark.spec("RAM-3", "SEC-1")
@pytest.mark.parametrize("size", [ramsnap.PREFIX_SIZE, 4096, 1 << 20])
def test_a_small_file_takes_no_large_memory(tmp_path: Path, size: int) -> None:
    """A prefix that says the most of everything: 321 MiB before the data, none of which is there."""
    fields = list(struct.unpack("<8sIIQIIQQQQQQQQ32s", ram.blob({})[:128]))
    fields[3], fields[7], fields[9], fields[11] = limits.RAM_MAX, limits.RAM_HEADER_MAX, limits.RAM_STATE_MAX, 4 << 20
    fields[8] = 128 + fields[7]
    fields[10] = fields[8] + fields[9]
    fields[12] = -(-(fields[10] + fields[11] * 64) // 4096) * 4096
    path = tmp_path / "x.ovmr"
    path.write_bytes(struct.pack("<8sIIQIIQQQQQQQQ32s", *fields).ljust(size, b"\0"))
    with path.open("rb") as file:
        for read in (
            lambda: validate_path(path),
            lambda: check_content(Part(PartKind.RAM, "$", ""), file.fileno(), Compression.LZ4),
            lambda: ram_annotations(file.fileno()),
        ):
            tracemalloc.start()
            try:
                report = read()
                assert isinstance(report, Report)
                assert [(p.code, p.rule) for p in report.problems] == [("snapshot-invalid", "RAM-1")]
            except SnapshotInvalid as exc:
                assert exc.context["rule"] == "RAM-1"  # noqa: PT017
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < 8 << 20


@pytest.mark.spec("RAM-17")
def test_a_snapshot_with_two_codecs_is_of_no_media_type(tmp_path: Path) -> None:
    page = b"a" * ramsnap.PAGE
    parts = [ramsnap.compress(page, compression) for compression in Compression]
    chunks, data = [], b""
    for i, (codec, stored, digest) in enumerate(parts):
        chunks.append(ramsnap.Chunk(i, 1, len(data), len(stored), codec, digest))
        data += bytes(stored)
    for count in (1, 2):
        size = chunks[count - 1].offset + chunks[count - 1].stored_size
        control = ramsnap.build_control(ram.HEADER, b"s", chunks[:count], chunk_pages=1)
        (tmp_path / "x.ovmr").write_bytes(control + data[:size])
        report = validate_path(tmp_path / "x.ovmr")
        assert rules(report) == ([(None, "RAM-17")] if count == 2 else [])


@pytest.mark.spec("GEN-2", "DOC-1", "DOC-5")
@pytest.mark.parametrize(
    ("name", "data", "kind", "code", "rule"),
    [
        ("x.json", b"{}" + b" " * (limits.MANIFEST_MAX + 6), "manifest", "json-invalid", "DOC-5"),
        ("x.yaml", b"a: 1\na: 2\n", "manifest", "json-invalid", "DOC-2"),
        ("x.yaml", b"a: .nan\n", "manifest", "json-invalid", "DOC-3"),
        ("x.yaml", b"a: 0x" + b"f" * 400, "manifest", "json-invalid", "DOC-3"),
        ("x.yaml", b"a: 1" + b"0" * 1001, "manifest", "json-invalid", "DOC-3"),
        ("x.yaml", b"a: &x 1\nb: *x\n", "manifest", "json-invalid", "DOC-1"),
        ("x.yaml", b"[" * 40 + b"]" * 40, "manifest", "json-invalid", "DOC-4"),
        ("x.yaml", b"1: 2\n", "manifest", "json-invalid", "DOC-1"),
        ("x.yaml", b"a: !!set {}\n", "manifest", "json-invalid", "DOC-1"),
        ("x.yaml", b"{", "manifest", "json-invalid", "DOC-1"),
        ("x.yaml", b'"\\ud800": 1\n', "manifest", "json-invalid", "DOC-3"),
        ("x.json", b"", "manifest", "json-invalid", "DOC-1"),
        ("x.yml", b"", "manifest", "json-invalid", "DOC-1"),
        ("x.bin", b"", "file", "file-empty", None),
    ],
)
def test_every_problem_of_a_document_has_its_rule(
    tmp_path: Path, name: str, data: bytes, kind: str, code: str, rule: str | None
) -> None:
    (tmp_path / name).write_bytes(data)
    report = validate_path(tmp_path / name)
    assert (report.kind, [(p.code, p.rule) for p in report.problems]) == (kind, [(code, rule)])


@pytest.mark.parametrize("document", [{"user": "root"}, {"profile": "cloud-init"}, {"stopSignal": "SIGINT"}])
def test_any_field_of_a_bootstrap_config_tells_it(tmp_path: Path, document: dict[str, str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert (validate_path(tmp_path / "x.json").kind, validate_path(tmp_path / "x.json").problems) == ("bootstrap", [])


@pytest.mark.spec("OCI-21")
def test_a_descriptor_of_another_size(layout: Layout, built: model.Artifact) -> None:
    image = json.loads(built.image.raw)
    image["layers"][0]["size"] += 1
    report = validate_artifact(layout, "web:1", layout.add_bytes(json.dumps(image).encode()))
    assert [(p.part, p.code, p.rule) for p in report.problems] == [("the OCI manifest", "digest-mismatch", "OCI-21")]


# --- chains --------------------------------------------------------------------------------------------------------


@pytest.mark.spec("RAM-40", "RAM-42", "RAM-43")
def test_a_chain_of_snapshots(layout: Layout, built: model.Artifact, project: Path) -> None:
    assert built.manifest.ram_snapshot is not None
    base = built.manifest.ram_snapshot.ref
    write_snapshot(project, built, parent=base)
    (project / "diff.ovmr").write_bytes((project / "ram.ovmr").read_bytes())
    chained = Builder(layout, no_registry).build(
        write_manifest(project, ramSnapshot={"ref": "diff.ovmr", "parents": [base]})
    )
    assert [layer.annotations.get("org.opencontainers.image.title") for layer in chained.image.layers][4:6] == [
        "ram-0.ovmr",
        "ram-1.ovmr",
    ]
    assert validate_artifact(layout, "web:2", chained.digest).problems == []
    path = layout.path(Digest(base))
    sound = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert rules(validate_artifact(layout, "web:2", chained.digest)) == [("RAM snapshot 0", "OCI-21")]
    path.write_bytes(sound)
    # another artifact takes the whole chain over
    layout.set_name("web:2", chained.image.descriptor())
    again = Builder(layout, no_registry).build(write_manifest(project, ramSnapshot={"ref": "web:2"}, name="again.json"))
    assert again.manifest.ram_snapshot == chained.manifest.ram_snapshot


@pytest.mark.spec("RAM-40", "RAM-42")
@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"parent": ram.DIGEST}, "RAM-40"),
        ({"parent": None}, "RAM-40"),
        ({"memory": 2 << 20}, "RAM-42"),
        ({"kernel": None}, "RAM-42"),
        ({"initrd": ram.DIGEST}, "RAM-42"),
        ({"kernel_args": "other"}, "RAM-42"),
        ({"disks": ()}, "RAM-42"),
    ],
)
def test_a_chain_that_is_none(changes: dict[str, Any], rule: str) -> None:
    base = of_bytes(b"base")
    sound = ram.header(parent=base, disks=(*ram.HEADER.disks, ram.DIGEST))
    ramheader.check_chain([(base, ram.HEADER), (of_bytes(b"diff"), sound)])
    with pytest.raises(SnapshotInvalid) as info:
        ramheader.check_chain([(base, ram.HEADER), (of_bytes(b"diff"), replace(sound, **changes))])
    assert info.value.context["rule"] == rule
    with pytest.raises(SnapshotInvalid):
        ramheader.check_chain([(of_bytes(b"diff"), sound)])


def test_codecs_of_an_artifact(layout: Layout, built: model.Artifact, project: Path) -> None:
    (project / "ram.ovmr").write_bytes(ram.blob({0: b"a" * ramsnap.PAGE}, compression=Compression.ZSTD))
    with pytest.raises(SnapshotInvalid, match="codec 2, which is not of lz4"):
        Builder(layout, no_registry).build(write_manifest(project))
    made = Builder(layout, no_registry).build(
        write_manifest(project, ramSnapshot={"ref": "ram.ovmr", "compression": "zstd"})
    )
    assert made.image.layers[4].media_type == "application/vnd.ovms.ramsnap.v1+zstd"


@pytest.mark.spec("RAM-46")
@pytest.mark.parametrize("key", ["ovms.ramsnap.control", "ovms.ramsnap.control-size"])
def test_an_annotation_that_is_not_that_of_the_control_part(layout: Layout, built: model.Artifact, key: str) -> None:
    image = json.loads(built.image.raw)
    annotations = image["layers"][4]["annotations"]
    annotations[key] = {"ovms.ramsnap.control": of_bytes(b"x"), "ovms.ramsnap.control-size": "8192"}[key]
    report = validate_artifact(layout, "web:1", layout.add_bytes(json.dumps(image).encode()))
    assert [(p.part, p.code, p.rule) for p in report.problems] == [("the RAM snapshot", "digest-mismatch", "RAM-46")]


@pytest.mark.spec("LIM-1", "BIN-1", "BIN-2")
@pytest.mark.parametrize(
    ("kind", "limit"),
    [("kernel", limits.KERNEL_MAX), ("initrd", limits.INITRD_MAX), ("bootstrap", limits.BOOTSTRAP_MAX)],
)
def test_a_part_that_is_too_large(layout: Layout, built: model.Artifact, tmp_path: Path, kind: str, limit: int) -> None:
    directory = unpack(layout, built, tmp_path / "unpacked")
    part = next(part for part in built.manifest.parts() if part.kind == kind)
    path = directory / "blobs" / part.ref.replace(":", "-")
    path.chmod(0o600)
    os.truncate(path, limit + 1)  # not read: it would take seconds
    began = time.monotonic()
    report = validate_path(directory)
    assert [(p.code, p.rule) for p in report.problems] == [("file-too-large", "LIM-1")]
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("kind", "rule"), [("ramsnap", "RAM-1"), ("qcow2", "LAY-8"), ("raw", "LAY-6"), ("kernel", "BIN-1")]
)
def test_an_empty_part(tmp_path: Path, kind: str, rule: str) -> None:
    (tmp_path / "x").touch()
    report = validate_path(tmp_path / "x", Kind(kind))
    assert [(p.code, p.rule) for p in report.problems] == [("file-empty", rule)]


@pytest.mark.spec("RAM-40")
@pytest.mark.parametrize("parents", [[], ["other.ovmr"]])
def test_a_chain_that_is_none_is_not_built(
    layout: Layout, built: model.Artifact, project: Path, parents: list[str]
) -> None:
    assert built.manifest.ram_snapshot is not None
    write_snapshot(project, built, created="2026-01-01T00:00:00Z")
    (project / "other.ovmr").write_bytes((project / "ram.ovmr").read_bytes())
    write_snapshot(project, built, parent=built.manifest.ram_snapshot.ref)
    manifest = write_manifest(project, ramSnapshot={"ref": "ram.ovmr", "parents": parents})
    with pytest.raises(SnapshotInvalid) as info:
        Builder(layout, no_registry).build(manifest)
    assert info.value.context["rule"] == "RAM-40"
    assert "base first" in str(info.value.hint)


@pytest.mark.spec("RAM-45")
def test_the_compression_of_another_artifacts_snapshot_is_kept(
    layout: Layout, built: model.Artifact, project: Path
) -> None:
    (project / "ram.ovmr").write_bytes(ram.blob({0: b"a" * ramsnap.PAGE}, compression=Compression.ZSTD))
    zstd = write_manifest(project, ramSnapshot={"ref": "ram.ovmr", "compression": "zstd"})
    Builder(layout, no_registry).build(zstd, name="web:zstd")
    made = Builder(layout, no_registry).build(write_manifest(project, ramSnapshot={"ref": "web:zstd"}))
    assert made.manifest.ram_snapshot is not None
    assert made.manifest.ram_snapshot.compression is Compression.ZSTD
