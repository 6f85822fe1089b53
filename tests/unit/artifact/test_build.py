"""``ovm build``: good inputs become the same artifact every time, bad ones are all named."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest
from support import artifacts, kernels, qcow2_images
from support.artifacts import write_inputs, write_manifest

from ovms import fsutil
from ovms.artifact import model
from ovms.artifact.build import Builder
from ovms.artifact.resolve import find
from ovms.errors import (
    DiskFull,
    DiskInvalid,
    FileProblem,
    InputError,
    JsonInvalid,
    KernelInvalid,
    Locked,
    ManifestInvalid,
    NotFound,
    OvmsError,
    ReferenceInvalid,
    RegistryUnreachable,
    SnapshotInvalid,
    Unsupported,
)
from ovms.oci.collector import Needs, collect
from ovms.oci.layout import Layout
from ovms.spec import mediatypes
from ovms.spec.digest import hex_of, of_bytes
from ovms.spec.manifest import DiskFormat, PartKind

MIB = 1 << 20


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    write_inputs(directory)
    return directory


@pytest.fixture
def builder(layout: Layout) -> Builder:
    return Builder(layout, no_registry)


def stored(layout: Layout) -> set[str]:
    return {path.name for path in layout.blob_dir.iterdir()}


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-1", "OCI-2", "OCI-3", "OCI-10", "OCI-12")
def test_the_whole_artifact(builder: Builder, layout: Layout, project: Path) -> None:
    built = builder.build(write_manifest(project), name="web:1")
    assert [(blob.media_type, blob.digest, blob.size) for blob in built.image.layers] == [
        (media_type, of_bytes(data), len(data))
        for media_type, data in [
            (mediatypes.KERNEL, kernels.bzimage()),
            (mediatypes.INITRD, b"initrd"),
            (mediatypes.DISK_LAYER, b"base" * 1024),
            (mediatypes.DISK_LAYER, qcow2_images.image()),
            (mediatypes.RAM_SNAPSHOT_LZ4, artifacts.ram_blob()),
            (mediatypes.BOOTSTRAP, b'{"cmd": ["/bin/true"]}'),
        ]
    ]
    assert [blob.annotations.get("ovms.format") for blob in built.image.layers] == [
        None, None, "raw", "qcow2", None, None
    ]  # fmt: skip
    assert [blob.annotations["org.opencontainers.image.title"] for blob in built.image.layers] == [
        *("kernel", "initrd", "disk-0.raw", "disk-1.qcow2", "ram-0.ovmr", "bootstrap.json")
    ]
    assert built.image.artifact_type == built.image.config.media_type == mediatypes.MANIFEST
    assert built.image.annotations == {
        "org.opencontainers.image.title": "web",
        "org.opencontainers.image.version": "1.0",
    }
    document = json.loads(layout.read(built.image.config.digest, "x", max_size=MIB))
    assert document["kernel"] == {"ref": of_bytes(kernels.bzimage()), "args": "console=ttyS0"}
    assert document["diskLayers"][0] == {"ref": of_bytes(b"base" * 1024), "format": "raw", "size": 4096}
    assert find(layout, "web:1").artifact == built == model.load(layout, built.digest)
    assert built.size == len(built.image.raw) + sum(blob.size for blob in built.image.blobs)


@pytest.mark.spec("OCI-14")
def test_the_control_part_of_a_ram_snapshot_is_announced(builder: Builder, project: Path) -> None:
    ram = builder.build(write_manifest(project)).image.layers[4]
    size = int(ram.annotations["ovms.ramsnap.control-size"])
    assert size == 4096
    assert ram.annotations["ovms.ramsnap.control"] == of_bytes(artifacts.ram_blob()[:size])


def test_the_same_input_gives_the_same_digest(builder: Builder, layout: Layout, project: Path, tmp_path: Path) -> None:
    first = builder.build(write_manifest(project))
    before = {path.name: path.stat().st_ino for path in layout.blob_dir.iterdir()}
    os.utime(project / "base.img", (0, 0))
    assert builder.build(write_manifest(project)).digest == first.digest
    assert {path.name: path.stat().st_ino for path in layout.blob_dir.iterdir()} == before, "blobs are copied twice"

    other = tmp_path / "elsewhere"
    write_inputs(other)
    assert Builder(Layout(tmp_path / "other"), no_registry).build(write_manifest(other)).digest == first.digest


def test_json_and_yaml_give_the_same_digest(builder: Builder, project: Path) -> None:
    yaml = project / "ovms.yaml"
    yaml.write_text(
        """\
# the same as the JSON
schemaVersion: 1
mediaType: application/vnd.ovms.manifest.v1+json
name: web
version: "1.0"
kernel: {ref: vmlinuz, args: console=ttyS0}
initrd:
  ref: ./initrd.img
diskLayers:
- ref: file:base.img
  format: raw
- {ref: diff.qcow2, format: qcow2}
ramSnapshot: {ref: ram.ovmr}
bootstrap: {ref: bootstrap.json}
"""
    )
    assert builder.build(yaml).digest == builder.build(write_manifest(project)).digest


@pytest.mark.spec("DOC-7")
def test_unknown_fields_are_kept(builder: Builder, layout: Layout, project: Path) -> None:
    layers = [{"ref": "base.img", "format": "raw", "x-lazy": True}]
    built = builder.build(write_manifest(project, x_ours={"a": [1]}, diskLayers=layers))
    document = json.loads(layout.read(built.image.config.digest, "x", max_size=MIB))
    assert document["x_ours"] == {"a": [1]}
    assert document["diskLayers"][0]["x-lazy"] is True
    assert built.manifest.document == document


@pytest.mark.spec("OCI-15")
def test_created_goes_into_the_annotations(builder: Builder, project: Path) -> None:
    built = builder.build(write_manifest(project, metadata={"created": "2026-01-31T12:00:00Z"}))
    assert built.image.annotations["org.opencontainers.image.created"] == "2026-01-31T12:00:00Z"


def test_names(builder: Builder, layout: Layout, project: Path) -> None:
    path = write_manifest(project)
    builder.build(path, name="web")
    builder.build(path, name="registry.example:5000/vms/web:2")
    assert [entry.name for entry in layout.entries()] == ["web:latest", "registry.example:5000/vms/web:2"]
    builder.build(path)
    assert len(layout.entries()) == 2
    newer = builder.build(write_manifest(project, version="2"), name="web")
    assert find(layout, "web").artifact.digest == newer.digest


@pytest.mark.parametrize("name", ["Web", "web@sha256:" + "0" * 64, ""])
def test_a_bad_name_is_said_before_any_work(builder: Builder, layout: Layout, project: Path, name: str) -> None:
    with pytest.raises((ReferenceInvalid, InputError)):
        builder.build(write_manifest(project), name=name)
    assert stored(layout) == set()


def test_inputs_by_digest(builder: Builder, layout: Layout, project: Path) -> None:
    first = builder.build(write_manifest(project))
    refs = [blob.digest for blob in first.image.layers]
    by_digest = write_manifest(
        project,
        kernel={"ref": refs[0], "args": "console=ttyS0"},
        initrd={"ref": refs[1]},
        diskLayers=[{"ref": refs[2], "format": "raw"}, {"ref": refs[3], "format": "qcow2"}],
        ramSnapshot={"ref": refs[4]},
        bootstrap={"ref": refs[5]},
    )
    for name in ("vmlinuz", "base.img"):
        (project / name).unlink()
    assert builder.build(by_digest).digest == first.digest


def test_inputs_from_another_artifact(builder: Builder, layout: Layout, project: Path) -> None:
    base = builder.build(write_manifest(project, ramSnapshot=None), name="base:1")
    (project / "more.qcow2").write_bytes(qcow2_images.image(size=2 << 30, l1_entries=4))
    built = builder.build(
        write_manifest(
            project,
            kernel={"ref": "base:1"},
            initrd={"ref": "base:1"},
            diskLayers=[{"ref": "base:1", "format": "qcow2"}, {"ref": "more.qcow2", "format": "qcow2"}],
            ramSnapshot=None,
            bootstrap={"ref": base.digest[7:19]},
        )
    )
    assert [(layer.ref, str(layer.format)) for layer in built.manifest.disk_layers] == [
        (base.image.layers[2].digest, "raw"),
        (base.image.layers[3].digest, "qcow2"),
        (of_bytes((project / "more.qcow2").read_bytes()), "qcow2"),
    ]
    titles = [blob.annotations["org.opencontainers.image.title"] for blob in built.image.layers]
    assert titles == ["kernel", "initrd", "disk-0.raw", "disk-1.qcow2", "disk-2.qcow2", "bootstrap.json"]
    assert built.image.layers[0].digest == base.image.layers[0].digest
    assert built.image.layers[-1].digest == base.image.layers[-1].digest


def test_a_base_without_annotations_keeps_its_own_format(builder: Builder, layout: Layout, project: Path) -> None:
    """The form of plain ``oras push`` says the format in the OVMS manifest alone."""
    base = builder.build(write_manifest(project, ramSnapshot=None))
    layers = [{k: v for k, v in blob.to_json().items() if k != "annotations"} for blob in base.image.layers]
    raw = json.dumps(
        {"schemaVersion": 2, "mediaType": mediatypes.OCI_MANIFEST, "artifactType": mediatypes.MANIFEST,
         "config": base.image.config.to_json(), "layers": layers}
    ).encode()  # fmt: skip
    image = model.load(layout, layout.add_bytes(raw)).image
    layout.set_name("plain:1", image.descriptor())
    built = builder.build(
        write_manifest(
            project, diskLayers=[{"ref": "plain:1", "format": "qcow2"}], ramSnapshot=None, initrd=None, bootstrap=None
        )
    )
    assert [str(layer.format) for layer in built.manifest.disk_layers] == ["raw", "qcow2"]
    assert [blob.annotations["ovms.format"] for blob in built.image.layers[1:]] == ["raw", "qcow2"]


def test_a_hostile_base_artifact_is_checked(builder: Builder, layout: Layout, project: Path) -> None:
    """Whoever made it did not ask ``ovm build``."""
    hostile = qcow2_images.HOSTILE["data file"].data
    digest = layout.add_bytes(hostile)
    document = {**artifacts.MANIFEST, "diskLayers": [{"ref": digest, "format": "qcow2"}]}
    for key in ("kernel", "initrd", "ramSnapshot", "bootstrap"):
        del document[key]
    parts = model.Parts(disks=(model.part_descriptor(PartKind.DISK, digest, len(hostile), format=DiskFormat.QCOW2),))
    layout.set_name("evil:1", model.compose(layout, document, parts).image.descriptor())
    path = write_manifest(project, diskLayers=[{"ref": "evil:1", "format": "qcow2"}])
    with pytest.raises(DiskInvalid, match=r"\$\.diskLayers\[0\]\.ref: disk layer 0 uses an external data file"):
        builder.build(path)


# --- bad input -----------------------------------------------------------------------------------------------------


def change(path: Path, data: bytes | None) -> None:
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HOSTILE = qcow2_images.HOSTILE

BAD: list[tuple[str, Any, type[OvmsError], str]] = [
    ("vmlinuz", lambda p: p.unlink(), NotFound, r"\$\.kernel\.ref: the kernel: there is neither a file .*/vmlinuz nor"),
    ("vmlinuz", lambda p: change(p, b""), FileProblem, r"\$\.kernel\.ref: the kernel: .* is empty"),
    ("vmlinuz", make_directory, FileProblem, r"the kernel: .* is a directory"),
    ("vmlinuz", make_fifo, FileProblem, "not a regular file"),
    ("vmlinuz", lambda p: change(p, b"#!/bin/sh\n" * 99), KernelInvalid, "neither a bzImage nor an ELF kernel"),
    ("initrd.img", lambda p: change(p, b""), FileProblem, r"\$\.initrd\.ref: the initrd: .* is empty"),
    ("base.img", lambda p: change(p, b"x" * 513), DiskInvalid, r"\$\.diskLayers\[0\]\.ref: disk layer 0: a raw disk"),
    ("base.img", lambda p: change(p, qcow2_images.image()), DiskInvalid, "is a qcow2 image, but is said to be raw"),
    ("diff.qcow2", lambda p: change(p, b"x" * 512), DiskInvalid, "disk layer 1 is not a qcow2 image"),
    ("diff.qcow2", lambda p: change(p, HOSTILE["backing file"].data), DiskInvalid, "backing file"),
    ("diff.qcow2", lambda p: change(p, HOSTILE["data file"].data), DiskInvalid, "data file"),
    ("diff.qcow2", make_directory, FileProblem, r"\$\.diskLayers\[1\]\.ref: disk layer 1: .* is a directory"),
    ("ram.ovmr", lambda p: change(p, b"x" * 5000), SnapshotInvalid, r"\$\.ramSnapshot\.ref: RAM snapshot: the magic"),
    ("ram.ovmr", lambda p: os.truncate(p, 100), SnapshotInvalid, "only 100 of the 128"),
    ("ram.ovmr", lambda p: os.truncate(p, 4097), SnapshotInvalid, "has 4097 bytes, and its prefix says"),
    ("bootstrap.json", lambda p: change(p, b"{"), JsonInvalid, r"\$\.bootstrap\.ref: the bootstrap config is not JSON"),
    ("bootstrap.json", lambda p: change(p, b'{"cmd": 1}'), ManifestInvalid, "the bootstrap config has one problem"),
]


@pytest.mark.parametrize(("file", "damage", "kind", "words"), BAD)
def test_a_bad_file(
    builder: Builder, layout: Layout, project: Path, file: str, damage: Any, kind: type[OvmsError], words: str
) -> None:
    damage(project / file)
    with pytest.raises(kind, match=words) as info:
        builder.build(write_manifest(project), name="web:1")
    assert str(info.value) == info.value.message
    assert info.value.context["json_path"].startswith("$.")
    assert stored(layout) == set(), "something was copied before all was checked"
    assert layout.entries() == []


@pytest.mark.parametrize(
    ("ref", "kind", "words"),
    [
        ("./gone", FileProblem, "there is no file .*/gone"),
        ("/gone/for/ever", FileProblem, "there is no file /gone/for/ever"),
        ("file:gone", FileProblem, "there is no file .*/gone"),
        ("../project", FileProblem, "is a directory"),
        ("Not A Reference", FileProblem, "there is no file .*, and 'Not A Reference' is no reference"),
        ("gone:1", NotFound, "neither a file .*/gone:1 nor an artifact gone:1"),
        ("sha256:" + "0" * 64, NotFound, "the store has no blob sha256:0000"),
        ("x" * 300, NotFound, "neither a file"),
    ],
)
def test_a_ref_that_leads_nowhere(builder: Builder, project: Path, ref: str, kind: type[OvmsError], words: str) -> None:
    with pytest.raises(kind, match=words):
        builder.build(write_manifest(project, kernel={"ref": ref}))


def test_a_path_that_reads_as_a_registry(layout: Layout, project: Path) -> None:
    def down(host: str) -> NoReturn:
        raise RegistryUnreachable(f"cannot reach {host}")

    with pytest.raises(
        RegistryUnreachable, match=r"the kernel: there is no file .*/v1\.0/vmlinuz, .*cannot reach v1\.0"
    ):
        Builder(layout, down).build(write_manifest(project, kernel={"ref": "v1.0/vmlinuz"}))


def test_a_digest_of_another_kind_of_blob(builder: Builder, layout: Layout, project: Path) -> None:
    digest = layout.add_bytes(b"no kernel at all")
    with pytest.raises(KernelInvalid, match="the kernel is neither"):
        builder.build(write_manifest(project, kernel={"ref": digest}))


def test_a_part_that_the_other_artifact_lacks(builder: Builder, project: Path) -> None:
    builder.build(write_manifest(project, initrd=None), name="base:1")
    with pytest.raises(InputError, match="the artifact base:1 has none"):
        builder.build(write_manifest(project, initrd={"ref": "base:1"}))
    with pytest.raises(InputError, match="can only be the base"):
        layers = [{"ref": "base.img", "format": "raw"}, {"ref": "base:1", "format": "qcow2"}]
        builder.build(write_manifest(project, diskLayers=layers))


def test_three_bad_files_are_three_problems(builder: Builder, layout: Layout, project: Path) -> None:
    (project / "vmlinuz").write_bytes(b"no kernel")
    (project / "diff.qcow2").write_bytes(HOSTILE["backing file"].data)
    (project / "bootstrap.json").write_bytes(b'{"cmd": [1], "workdir": 2}')
    with pytest.raises(ManifestInvalid, match="3 of the manifest's inputs cannot be used") as info:
        builder.build(write_manifest(project))
    problems = {problem.path: problem.message for problem in info.value.problems}
    assert list(problems) == ["$.bootstrap.ref", "$.diskLayers[1].ref", "$.kernel.ref"]
    assert "$.cmd[0] must be a string" in problems["$.bootstrap.ref"]
    assert "$.workdir must be a string" in problems["$.bootstrap.ref"]
    assert "'/etc/shadow'" in problems["$.diskLayers[1].ref"]
    assert stored(layout) == set()


@pytest.mark.spec("GEN-2")
def test_three_mistakes_in_the_manifest(builder: Builder, project: Path) -> None:
    path = write_manifest(project, version=1, kernel={}, diskLayers=[{"ref": "base.img", "format": "vmdk"}])
    with pytest.raises(ManifestInvalid) as info:
        builder.build(path)
    assert [p.path for p in info.value.problems] == ["$.diskLayers[0].format", "$.kernel.ref", "$.version"]
    assert str(path) in info.value.message


@pytest.mark.spec("MAN-14")
def test_wrong_sizes_are_all_named(builder: Builder, project: Path) -> None:
    layers = [
        {"ref": "base.img", "format": "raw", "size": 1},
        {"ref": "diff.qcow2", "format": "qcow2", "size": 2},
    ]
    with pytest.raises(ManifestInvalid) as info:
        builder.build(write_manifest(project, diskLayers=layers))
    assert [p[:2] for p in info.value.problems] == [
        ("$.diskLayers[0].size", "says 1 bytes, but the layer has 4096"),
        ("$.diskLayers[1].size", f"says 2 bytes, but the layer has {4 * 65536}"),
    ]
    layers[0]["size"], layers[1]["size"] = 4096, 4 * 65536
    builder.build(write_manifest(project, diskLayers=layers))


def test_nothing_to_boot(builder: Builder, project: Path) -> None:
    with pytest.raises(ManifestInvalid) as info:
        builder.build(write_manifest(project, kernel=None, initrd=None, diskLayers=None))
    assert [p.path for p in info.value.problems] == ["$"]


@pytest.mark.spec("LAY-7")
def test_ovfms_is_refused(builder: Builder, project: Path) -> None:
    with pytest.raises(Unsupported, match="ovfms"):
        builder.build(write_manifest(project, diskLayers=[{"ref": "base.img", "format": "ovfms"}]))


# --- space, sizes, races -------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_the_copy(
    builder: Builder, layout: Layout, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "base.img").write_bytes(b"x" * MIB)
    monkeypatch.setattr(fsutil, "free_space", lambda path: fsutil.SPACE_RESERVE + MIB)
    with pytest.raises(DiskFull, match="building the artifact needs"):
        builder.build(write_manifest(project))
    assert stored(layout) == set()


def test_a_build_of_what_is_there_needs_no_disk(
    builder: Builder, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = builder.build(write_manifest(project))
    monkeypatch.setattr(fsutil, "free_space", lambda path: 0)
    assert builder.build(write_manifest(project)).digest == first.digest
    (project / "base.img").write_bytes(b"y" * 4096)  # of the same size as the one that is there
    with pytest.raises(DiskFull, match="adding disk layer 0"):
        builder.build(write_manifest(project))


def test_a_large_sparse_disk_costs_neither_memory_nor_space(builder: Builder, layout: Layout, project: Path) -> None:
    with (project / "base.img").open("wb") as file:
        file.write(b"boot")
        file.seek(1 << 30)
        file.write(b"end")
        file.truncate(2 << 30)
    tracemalloc.start()
    built = builder.build(write_manifest(project))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MIB
    blob = layout.path(built.image.layers[2].digest)
    assert blob.stat().st_size == 2 << 30
    assert blob.stat().st_blocks * 512 < MIB


class Meddler:
    """A progress that changes a file while it is copied."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data

    def task(self, label: str, total: int | None = None) -> Any:
        if label == "disk layer 0":
            self.path.write_bytes(self.data)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    waiting = note


def test_a_file_that_changes_meanwhile_is_stored_as_it_is_hashed(layout: Layout, project: Path) -> None:
    changed = b"new!" * 2048
    builder = Builder(layout, no_registry, Meddler(project / "base.img", changed))
    built = builder.build(write_manifest(project))
    assert built.manifest.disk_layers[0].ref == of_bytes(changed)
    assert built.manifest.disk_layers[0].size == len(changed)
    assert layout.read(built.image.layers[2].digest, "x", max_size=MIB) == changed


@pytest.mark.parametrize(
    ("data", "kind"), [(b"", FileProblem), (b"x" * 100, DiskInvalid), (HOSTILE["backing file"].data, DiskInvalid)]
)
def test_a_file_that_turns_bad_after_its_check(
    layout: Layout, project: Path, data: bytes, kind: type[OvmsError]
) -> None:
    builder = Builder(layout, no_registry, Meddler(project / "base.img", data))
    with pytest.raises(kind):
        builder.build(write_manifest(project), name="web:1")
    assert layout.entries() == []


@pytest.mark.spec("GEN-3")
def test_what_a_failed_build_left_is_collected(layout: Layout, project: Path) -> None:
    with pytest.raises(OvmsError):
        Builder(layout, no_registry, Meddler(project / "base.img", b"")).build(write_manifest(project))
    assert stored(layout)
    collect(layout, Needs)
    assert stored(layout) == set()


def test_the_collector_waits_for_a_build(layout: Layout, project: Path) -> None:
    asked = []

    class Collects(Meddler):
        def advance(self, amount: int) -> None:
            with pytest.raises(Locked):
                collect(layout, Needs, wait=0)
            asked.append(amount)

    built = Builder(layout, no_registry, Collects(project / "x", b"")).build(write_manifest(project), name="web:1")
    assert asked
    assert collect(layout, Needs).items == ()
    assert {hex_of(blob.digest) for blob in built.image.blobs} <= stored(layout)


def test_no_file_stays_open(builder: Builder, project: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    builder.build(write_manifest(project))
    (project / "vmlinuz").write_bytes(b"no kernel")
    with pytest.raises(KernelInvalid):
        builder.build(write_manifest(project))
    assert len(os.listdir("/proc/self/fd")) == before
