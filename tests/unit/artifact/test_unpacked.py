"""An artifact as files in a directory, and the artifact of that directory again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
from support.artifacts import MANIFEST, with_ram, write_inputs, write_manifest
from support.ram import blob
from support.stores import damage

from ovms import fsutil
from ovms.artifact import model, unpacked
from ovms.artifact.build import Builder
from ovms.artifact.provenance import Times
from ovms.artifact.resolve import find
from ovms.artifact.validate import validate_path
from ovms.errors import BlobNotFound, DigestMismatch, DiskFull, FileProblem, NotFound, StoreCorrupt
from ovms.oci import absent
from ovms.oci.descriptor import Descriptor, build_file_manifest, parse_manifest
from ovms.oci.layout import Layout
from ovms.spec import mediatypes
from ovms.spec.digest import Digest

EPOCH = Times.of({"SOURCE_DATE_EPOCH": "0"})


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


@pytest.fixture
def built(layout: Layout, tmp_path: Path) -> model.Artifact:
    project = tmp_path / "project"
    write_inputs(project)
    # twice the same blob: it is one file
    layers = [*MANIFEST["diskLayers"], *MANIFEST["diskLayers"][1:]]
    path = write_manifest(project, ramSnapshot=None, diskLayers=layers)
    return Builder(layout, no_registry).build(path, name="web:1", provenance=EPOCH)


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.spec("OCI-24")
def test_unpacked_and_built_again(layout: Layout, built: model.Artifact, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    directory.mkdir()  # an empty one is taken
    unpacked.unpack(layout, find(layout, "web:1"), directory)
    parts = {layer.digest for layer in built.image.layers}
    assert len(parts) == len(built.image.layers) - 1
    assert files(directory) == sorted(
        [*(f"blobs/sha256-{digest[7:]}" for digest in parts), "manifest.json", "metadata/provenance.json"]
    )
    assert (directory / "manifest.json").read_bytes() == layout.path(built.image.config.digest).read_bytes()
    told = json.loads((directory / "metadata/provenance.json").read_bytes())
    assert (told["digest"], told["reference"]) == (built.digest, "web:1")
    assert [one["subject"][0]["digest"]["sha256"] for one in told["statements"]] == [built.digest[7:]]
    assert validate_path(directory).problems == []
    for path in (directory, directory / "manifest.json"):
        again = Builder(Layout(tmp_path / path.name), no_registry).build(path)
        assert again.image.raw == built.image.raw
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_by_digest_nobody_knows_where_it_comes_from(layout: Layout, built: model.Artifact, tmp_path: Path) -> None:
    layout.remove_name("web:1")
    unpacked.unpack(layout, find(layout, built.digest), tmp_path / "out")
    assert not (tmp_path / "out" / "metadata").exists()


def test_statements_of_others_are_told_as_far_as_they_can_be_read(
    layout: Layout, built: model.Artifact, tmp_path: Path
) -> None:
    layer = Descriptor.of(mediatypes.IN_TOTO, b"[")
    layout.add_bytes(b"[")
    image = build_file_manifest(mediatypes.IN_TOTO, layer, built.image.descriptor(), {})
    index = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_INDEX,
        "artifactType": mediatypes.IN_TOTO,
        "manifests": [],
        "subject": built.image.descriptor().to_json(),
    }
    for raw in (image.raw, json.dumps(index).encode()):
        layout.add_bytes(raw)
        layout.add_nameless(parse_manifest(raw, "x").descriptor())
    unpacked.unpack(layout, find(layout, "web:1"), tmp_path / "out")
    told = json.loads((tmp_path / "out/metadata/provenance.json").read_bytes())
    assert len(told["statements"]) == 1


def test_nothing_is_overwritten(layout: Layout, built: model.Artifact, tmp_path: Path) -> None:
    found = find(layout, "web:1")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    for name in ("full", "file", "link", "to-empty", "no/directory", "\0"):
        with pytest.raises(FileProblem):
            unpacked.unpack(layout, found, tmp_path / name)
    with pytest.raises(FileProblem, match="is not empty"):  # said before anything is copied
        unpacked.unpack(layout, found, full)
    assert files(full) == ["mine"]
    assert list((tmp_path / "empty").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_comes_meanwhile_is_not_overwritten_either(
    layout: Layout, built: model.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "out"
    write = unpacked._write

    def slow(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        directory.mkdir()
        (directory / "mine").write_text("x")

    monkeypatch.setattr(unpacked, "_write", slow)
    with pytest.raises(FileProblem, match="by now"):
        unpacked.unpack(layout, find(layout, "web:1"), directory)
    assert files(directory) == ["mine"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damaged", [True, False])
def test_a_part_that_is_damaged_or_lost(layout: Layout, built: model.Artifact, tmp_path: Path, damaged: bool) -> None:
    digest = Digest(built.image.layers[-1].digest)
    if damaged:
        damage(layout, digest)
    else:
        layout.path(digest).unlink()
    with pytest.raises(StoreCorrupt if damaged else BlobNotFound):
        unpacked.unpack(layout, find(layout, "web:1"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.spec("OCI-29")
def test_a_ram_snapshot_that_was_left_out(layout: Layout, tmp_path: Path) -> None:
    artifact = with_ram(layout, "warm:1", blob({0: b"a" * 4096}))
    ram = artifact.image.layers[-1]
    layout.path(ram.digest).unlink()
    absent.note(layout, ram, None)
    with pytest.raises(BlobNotFound, match="left out"):
        unpacked.unpack(layout, find(layout, "warm:1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_is_told_before_anything_is_copied(
    layout: Layout, built: model.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path, needed: int, what: str) -> None:
        raise DiskFull(f"{what} {needed}")

    monkeypatch.setattr(fsutil, "require_space", full)
    with pytest.raises(DiskFull, match="unpacking"):
        unpacked.unpack(layout, find(layout, "web:1"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_file_that_was_changed_is_not_built(layout: Layout, built: model.Artifact, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    unpacked.unpack(layout, find(layout, "web:1"), directory)
    initrd = directory / f"blobs/sha256-{built.image.layers[1].digest[7:]}"
    initrd.write_bytes(b"another")
    with pytest.raises(DigestMismatch, match="another content"):
        Builder(layout, no_registry).build(directory)
    # without the file it is the store's
    initrd.unlink()
    assert Builder(layout, no_registry).build(directory).digest == built.digest
    with pytest.raises(NotFound, match="no blob"):
        Builder(Layout(tmp_path / "empty"), no_registry).build(directory)
