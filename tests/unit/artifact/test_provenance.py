"""How an artifact was made: what is told of it, and what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.artifacts import write_inputs, write_manifest

from ovms import __version__
from ovms.artifact import kinds, model, provenance
from ovms.artifact.build import Builder
from ovms.artifact.provenance import Times
from ovms.errors import UsageError
from ovms.oci.collector import Needs, collect
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.referrers import local_lister
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, of_bytes

EPOCH = Times.of({"SOURCE_DATE_EPOCH": "1000000000"})


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "secret-project"
    write_inputs(directory)
    return directory


@pytest.fixture
def builder(layout: Layout) -> Builder:
    return Builder(layout, no_registry)


def referrers(layout: Layout, artifact: model.Artifact) -> list[Descriptor]:
    return list(local_lister(layout)(artifact.digest, None).descriptors)


def statement(layout: Layout, artifact: model.Artifact) -> Any:
    (referrer,) = referrers(layout, artifact)
    image = layout.manifest(referrer.digest)
    assert isinstance(image, ImageManifest)
    return json.loads(layout.read(image.layers[0].digest, "x", max_size=1 << 20))


def test_the_whole_statement(builder: Builder, layout: Layout, project: Path) -> None:
    path = write_manifest(project)
    built = builder.build(path, name="web:1", provenance=EPOCH)
    source = {
        "name": "ovms.json",
        "digest": {"sha256": of_bytes(path.read_bytes())[7:]},
        "mediaType": mediatypes.MANIFEST,
    }
    assert statement(layout, built) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "web", "digest": {"sha256": built.digest[7:]}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:ovms:build:v1",
                "externalParameters": {"source": source},
                "resolvedDependencies": [
                    source,
                    *(
                        {"name": name, "digest": {"sha256": layer.digest[7:]}, "mediaType": layer.media_type}
                        for name, layer in zip(
                            ("kernel", "initrd", "disk-0.raw", "disk-1.qcow2", "ram-0.ovmr", "bootstrap.json"),
                            built.image.layers,
                            strict=True,
                        )
                    ),
                ],
            },
            "runDetails": {"builder": {"id": "urn:ovms:builder:ovm", "version": {"ovms": __version__}}},
        },
    }
    (referrer,) = referrers(layout, built)
    assert referrer.artifact_type == "application/vnd.in-toto+json"
    assert referrer.annotations == {
        "in-toto.io/predicate-type": "https://slsa.dev/provenance/v1",
        "org.opencontainers.image.created": "2001-09-09T01:46:40Z",
    }
    # it is what it would be taken for, and about this artifact
    raw = strictjson.canonical(statement(layout, built))
    found = kinds.recognise(raw)
    assert found is not None
    assert (found.kind, found.subjects) == (kinds.Kind.PROVENANCE, frozenset({built.digest}))


def test_the_artifact_is_the_same_with_it(builder: Builder, layout: Layout, project: Path) -> None:
    plain = builder.build(write_manifest(project), name="web:1")
    assert referrers(layout, plain) == []
    assert builder.build(write_manifest(project), name="web:1", provenance=EPOCH).digest == plain.digest
    assert [entry.name for entry in layout.entries()] == ["", "web:1"]


def test_with_an_epoch_the_statement_is_the_same_elsewhere(
    builder: Builder, layout: Layout, project: Path, tmp_path: Path
) -> None:
    built = builder.build(write_manifest(project), name="web:1", provenance=EPOCH)
    other, elsewhere = Layout(tmp_path / "other"), tmp_path / "elsewhere"
    write_inputs(elsewhere)
    again = Builder(other, no_registry).build(write_manifest(elsewhere), provenance=EPOCH)
    assert referrers(other, again) == referrers(layout, built)


def test_without_one_it_tells_the_time_once(
    builder: Builder, layout: Layout, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "created_now", lambda: "2026-01-01T00:00:05Z")
    built = builder.build(write_manifest(project), provenance=Times("2026-01-01T00:00:00Z"))
    first = referrers(layout, built)
    assert statement(layout, built)["predicate"]["runDetails"]["metadata"] == {
        "startedOn": "2026-01-01T00:00:00Z",
        "finishedOn": "2026-01-01T00:00:05Z",
    }
    # built of the same again: nothing but the time would be another
    builder.build(write_manifest(project), provenance=Times("2027-01-01T00:00:00Z"))
    assert referrers(layout, built) == first
    # another manifest file that makes the same artifact is another source
    builder.build(write_manifest(project, name="other.json"), provenance=Times("2027-01-01T00:00:00Z"))
    assert len(referrers(layout, built)) == 2


def test_no_path_and_nothing_of_the_environment(
    builder: Builder, layout: Layout, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "t0ken-value")
    path = write_manifest(project, kernel={"ref": str(project / "vmlinuz"), "args": "password=hunter2"})
    built = builder.build(path, provenance=Times.of(os.environ))
    text = json.dumps(statement(layout, built))
    for word in ("secret-project", str(project), "t0ken", "hunter2"):
        assert word not in text


def test_an_artifact_whose_parts_are_taken_over(builder: Builder, layout: Layout, project: Path) -> None:
    name = "registry.example:5000/vms/Base".lower() + ":1"
    base = builder.build(write_manifest(project, ramSnapshot=None), name=name)
    local = builder.build(write_manifest(project, ramSnapshot=None, version="2"), name="local:2")
    changes: dict[str, Any] = {"kernel": {"ref": name}, "initrd": {"ref": name}, "bootstrap": {"ref": "local:2"}}
    built = builder.build(write_manifest(project, ramSnapshot=None, **changes), provenance=EPOCH)
    told = statement(layout, built)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [one for one in told if one["mediaType"] == mediatypes.OCI_MANIFEST] == [
        {
            "name": "web",
            "uri": f"pkg:oci/base@sha256%3A{base.digest[7:]}?repository_url=registry.example:5000/vms/base&tag=1",
            "digest": {"sha256": base.digest[7:]},
            "mediaType": mediatypes.OCI_MANIFEST,
        },
        {"name": "web", "digest": {"sha256": local.digest[7:]}, "mediaType": mediatypes.OCI_MANIFEST},
    ]


def test_it_goes_with_the_artifact(builder: Builder, layout: Layout, project: Path) -> None:
    builder.build(write_manifest(project), name="web:1", provenance=EPOCH)
    collect(layout, Needs)
    assert [entry.name for entry in layout.entries()] == ["", "web:1"]
    layout.remove_name("web:1")
    collect(layout, Needs)
    assert layout.entries() == []
    assert list(layout.blob_dir.iterdir()) == []


def test_a_file_name_that_is_not_utf8(builder: Builder, layout: Layout, project: Path) -> None:
    path = project / os.fsdecode(b"\xff.json")
    path.write_bytes(write_manifest(project).read_bytes())
    built = builder.build(path, provenance=EPOCH)
    assert statement(layout, built)["predicate"]["buildDefinition"]["externalParameters"]["source"]["name"] == "?.json"


def test_what_others_attached_is_no_obstacle(builder: Builder, layout: Layout, project: Path) -> None:
    built = builder.build(write_manifest(project))
    subject = built.image.descriptor()
    for number, (data, layers) in enumerate([(b"[]", 1), (b"\xff", 1), (b'{"predicate": 1}', 1), (b"", 0)]):
        layer = Descriptor.of(mediatypes.IN_TOTO, data)
        image = build_manifest(
            artifact_type=mediatypes.IN_TOTO,
            config=layer,
            layers=(layer,) * layers,
            subject=subject,
            annotations={"n": str(number)},
        )
        layout.add_bytes(data)
        layout.add_bytes(image.raw)
        layout.add_nameless(image.descriptor())
    builder.build(write_manifest(project), provenance=EPOCH)
    assert len(referrers(layout, built)) == 5


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "1e3", " 1", "253402300800", "٣", "9" * 30])
def test_an_epoch_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        Times.of({"SOURCE_DATE_EPOCH": text})


def test_a_package_url_of_a_reference_without_a_tag() -> None:
    digest = Digest(of_bytes(b"x"))
    assert provenance.purl(Reference.parse(f"registry.example/a/b@{digest}"), digest) == (
        f"pkg:oci/b@sha256%3A{digest[7:]}?repository_url=registry.example/a/b"
    )
