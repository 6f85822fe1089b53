"""Both manifests of an artifact, and the forms in which others write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.artifacts import write_inputs, write_manifest

from ovms.artifact import model
from ovms.artifact.build import Builder
from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    JsonInvalid,
    ManifestInvalid,
    OvmsError,
    ReferenceNotFound,
    RegistryProtocol,
    StoreCorrupt,
    Unsupported,
)
from ovms.oci.layout import Layout
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, of_bytes


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


@pytest.fixture
def built(layout: Layout, tmp_path: Path) -> model.Artifact:
    write_inputs(tmp_path)
    return Builder(layout, no_registry).build(write_manifest(tmp_path))


EMPTY = {"mediaType": mediatypes.OCI_EMPTY, "digest": of_bytes(b"{}"), "size": 2}


def document(built: model.Artifact, **changes: Any) -> dict[str, Any]:
    return {**json.loads(built.image.raw), **changes}


def add(layout: Layout, value: Any) -> Digest:
    return layout.add_bytes(json.dumps(value).encode())


@pytest.mark.spec("OCI-4", "OCI-5")
def test_the_form_of_oras_push(layout: Layout, built: model.Artifact) -> None:
    """An empty config, the OVMS manifest among the layers, in any order, and no annotations."""
    layout.add_bytes(b"{}")
    layers = [{k: v for k, v in blob.to_json().items() if k != "annotations"} for blob in built.image.layers]
    manifest = built.image.config.to_json()
    for at in (0, 3, len(layers)):
        value = document(built, config=EMPTY, layers=[*layers[:at], manifest, *layers[at:]], annotations={})
        loaded = model.load(layout, add(layout, value))
        assert loaded.manifest == built.manifest
        assert loaded.blob(built.manifest.disk_layers[0].ref).size == 4096


@pytest.mark.spec("OCI-4")
def test_unsupported_kinds(layout: Layout, built: model.Artifact) -> None:
    layout.add_bytes(b"{}")
    manifest = built.image.config.to_json()
    twice = document(built, config=EMPTY, layers=[manifest, manifest])
    with pytest.raises(Unsupported, match="several layers claim"):
        model.load(layout, add(layout, twice))
    container = document(built, config={**EMPTY, "mediaType": "application/vnd.oci.image.config.v1+json"}, layers=[])
    with pytest.raises(Unsupported, match="is no OVMS artifact") as info:
        model.load(layout, add(layout, container))
    assert "ovm build" in (info.value.hint or "")


@pytest.mark.spec("OCI-6")
def test_refs_that_are_not_among_the_layers(layout: Layout, built: model.Artifact) -> None:
    value = document(built)
    value["layers"] = [layer for layer in value["layers"] if layer["mediaType"] != mediatypes.DISK_LAYER]
    with pytest.raises(ManifestInvalid, match="does not fit the OCI manifest") as info:
        model.load(layout, add(layout, value))
    assert [p.path for p in info.value.problems] == ["$.diskLayers[0].ref", "$.diskLayers[1].ref"]
    assert all("is not among the layers" in p.message for p in info.value.problems)


@pytest.mark.spec("OCI-6")
@pytest.mark.parametrize("ref", ["vmlinuz", "/etc/shadow", "../x", "file:///etc/shadow", "registry.example/x:1"])
def test_refs_of_a_finished_artifact_are_digests(layout: Layout, built: model.Artifact, ref: str) -> None:
    ovms = json.loads(layout.read(built.image.config.digest, "x", max_size=1 << 20))
    ovms["kernel"]["ref"] = ref
    raw = json.dumps(ovms).encode()
    layout.add_bytes(raw)
    config = {"mediaType": mediatypes.MANIFEST, "digest": of_bytes(raw), "size": len(raw)}
    with pytest.raises(ManifestInvalid) as info:
        model.load(layout, add(layout, document(built, config=config)))
    assert [p.path for p in info.value.problems] == ["$.kernel.ref"]
    with pytest.raises(ManifestInvalid):
        model.compose(layout, ovms, model.Parts())


@pytest.mark.spec("DOC-7")
def test_the_original_bytes_count(layout: Layout, built: model.Artifact) -> None:
    raw = json.dumps({**json.loads(built.image.raw), "x-unknown": 1.0}, indent=7).encode()
    loaded = model.load(layout, layout.add_bytes(raw))
    assert loaded.digest == of_bytes(raw)
    assert loaded.image.raw == raw


def test_damage(layout: Layout, built: model.Artifact) -> None:
    with pytest.raises(BlobNotFound):
        model.load(layout, of_bytes(b"nowhere"))
    with pytest.raises((JsonInvalid, RegistryProtocol)):
        model.load(layout, built.image.layers[0].digest)
    path = layout.path(built.image.config.digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"web", b"WEB"))
    with pytest.raises(StoreCorrupt):
        model.load(layout, built.digest)
    path.unlink()
    with pytest.raises(BlobNotFound):
        model.load(layout, built.digest)


@pytest.mark.spec("OCI-21")
def test_a_descriptor_that_says_another_size(layout: Layout, built: model.Artifact) -> None:
    """The digest is right, and a reader that trusts it alone would show a byte that is not there."""
    for place in ("config", 0, 1, 2):
        image = document(built)
        item = image["config"] if place == "config" else image["layers"][place]
        item["size"] += 1
        with pytest.raises(DigestMismatch, match="its descriptor says") as info:
            model.load(layout, add(layout, image))
        assert info.value.context["rule"] == "OCI-21"


@pytest.mark.spec("OCI-1")
def test_what_is_no_manifest_of_an_artifact(layout: Layout, built: model.Artifact) -> None:
    image = document(built)
    del image["mediaType"]
    with pytest.raises(RegistryProtocol, match="has no mediaType"):
        model.load(layout, add(layout, image))
    for change in ({"artifactType": "application/x"}, {"artifactType": ""}):
        with pytest.raises(Unsupported, match="artifactType") as info:
            model.load(layout, add(layout, document(built, **change)))
        assert info.value.context["rule"] == "OCI-1"
    # without one the config's media type stands for it: in the canonical form that is ours
    image = document(built)
    del image["artifactType"]
    assert model.load(layout, add(layout, image)).manifest == built.manifest
    layout.add_bytes(b"{}")
    image.update(config=EMPTY, layers=[image["config"], *image["layers"]])
    with pytest.raises(Unsupported, match="artifactType"):
        model.load(layout, add(layout, image))


@pytest.mark.spec("OCI-4")
def test_the_config_wins(layout: Layout, built: model.Artifact) -> None:
    image = document(built)
    other = layout.add_bytes(b"{}")
    image["layers"].append({"mediaType": mediatypes.MANIFEST, "digest": other, "size": 2})
    assert model.load(layout, add(layout, image)).manifest == built.manifest


# --- indexes -------------------------------------------------------------------------------------------------------

AMD64 = {"os": "linux", "architecture": "amd64"}
ARM64 = {"os": "linux", "architecture": "arm64"}


def index(*manifests: dict[str, Any]) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": list(manifests)}


@pytest.mark.spec("OCI-16", "OCI-17")
def test_an_index_is_chosen_from_by_platform(layout: Layout, built: model.Artifact) -> None:
    ours = built.image.descriptor().to_json()
    raw = json.dumps(document(built, annotations={"for": "arm64"})).encode()
    arm = {**ours, "digest": layout.add_bytes(raw), "size": len(raw), "platform": ARM64}
    missing = {**ours, "digest": of_bytes(b"missing"), "platform": AMD64}
    for manifests in ((arm, missing, {**ours, "platform": AMD64}), (arm, ours)):
        assert model.load(layout, add(layout, index(*manifests))).digest == built.digest
    with pytest.raises(ReferenceNotFound, match="linux/amd64 is not in the local store"):
        model.load(layout, add(layout, index(arm, missing)))
    with pytest.raises(Unsupported, match="holds nothing for linux/amd64, but for linux/arm64"):
        model.load(layout, add(layout, index(arm)))


def test_an_index_with_other_things_in_it(layout: Layout, built: model.Artifact) -> None:
    layout.add_bytes(b"{}")
    other = add(layout, document(built, artifactType="application/x", config=EMPTY, layers=[]))
    inner = add(layout, index())
    ours = built.image.descriptor().to_json()
    manifests = ({**ours, "digest": other}, {**ours, "digest": inner}, ours)
    assert model.load(layout, add(layout, index(*manifests))).digest == built.digest
    # one that does not say so in its artifactType, which the first draft did not ask for
    value = document(built)
    del value["artifactType"]
    plain = {**ours, "digest": add(layout, value)}
    assert model.load(layout, add(layout, index(plain))).digest == plain["digest"]
    with pytest.raises(Unsupported):
        model.load(layout, add(layout, index()))


def test_whatever_the_store_holds_the_error_is_ours(layout: Layout, built: model.Artifact) -> None:
    values: list[Any] = [None, 1, [], {}, index({}), document(built, config=None), document(built, layers=[{}])]
    for value in values:
        with pytest.raises(OvmsError):
            model.load(layout, add(layout, value))


def test_compose_is_deterministic(layout: Layout, built: model.Artifact) -> None:
    by_type = {blob.media_type: blob for blob in built.image.layers}
    parts = model.Parts(
        kernel=by_type[mediatypes.KERNEL],
        initrd=by_type[mediatypes.INITRD],
        disks=tuple(blob for blob in built.image.layers if blob.media_type == mediatypes.DISK_LAYER),
        ram_snapshots=(by_type[mediatypes.RAM_SNAPSHOT_LZ4],),
        bootstrap=by_type[mediatypes.BOOTSTRAP],
    )
    again = model.compose(layout, built.manifest.document, parts)
    assert again == built
    child = model.compose(layout, built.manifest.document, parts, subject=built.image.descriptor())
    assert child.digest != built.digest
    assert child.image.subject is not None
    assert child.image.subject.digest == built.digest
