"""OCI descriptors and manifests: read strictly, whatever stands in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import JsonInvalid, RegistryProtocol
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, build_manifest, parse_manifest
from ovms.spec import limits, mediatypes
from ovms.spec.digest import Digest, of_bytes

D = Digest("sha256:" + "0" * 64)
BLOB: dict[str, Any] = {"mediaType": "application/x", "digest": D, "size": 3}
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": mediatypes.OCI_MANIFEST,
    "artifactType": mediatypes.MANIFEST,
    "config": {**BLOB, "annotations": {"a": "b"}},
    "layers": [BLOB, {**BLOB, "platform": {"os": "linux"}, "artifactType": "x/y", "urls": ["https://x"]}],
    "subject": BLOB,
    "annotations": {"org.opencontainers.image.title": "web"},
    "x-unknown": [1],
}
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": mediatypes.OCI_INDEX,
    "manifests": [{**BLOB, "platform": {"os": "linux", "architecture": "amd64"}}],
}


def parse(value: Any) -> ImageManifest | ImageIndex:
    return parse_manifest(json.dumps(value).encode(), "the manifest")


def test_a_manifest() -> None:
    found = parse(MANIFEST)
    assert isinstance(found, ImageManifest)
    assert found.raw == json.dumps(MANIFEST).encode()
    assert found.digest == of_bytes(found.raw)
    assert found.artifact_type == mediatypes.MANIFEST
    assert found.config == Descriptor("application/x", D, 3, {"a": "b"})
    assert found.layers[1].platform == {"os": "linux"}
    assert found.layers[1].artifact_type == "x/y"
    assert found.subject == Descriptor("application/x", D, 3)
    assert found.annotations == MANIFEST["annotations"]
    assert [d.digest for d in found.blobs] == [D]
    assert found.descriptor() == Descriptor(
        mediatypes.OCI_MANIFEST, found.digest, len(found.raw), artifact_type=mediatypes.MANIFEST
    )


def test_an_index() -> None:
    found = parse(INDEX)
    assert isinstance(found, ImageIndex)
    assert found.manifests[0].platform == {"os": "linux", "architecture": "amd64"}
    assert isinstance(parse({k: v for k, v in INDEX.items() if k != "mediaType"}), ImageIndex)


def test_the_media_type_may_be_missing() -> None:
    document = {k: v for k, v in MANIFEST.items() if k not in ("mediaType", "artifactType", "subject", "annotations")}
    found = parse(document)
    assert isinstance(found, ImageManifest)
    assert (found.artifact_type, found.subject, found.annotations) == (None, None, {})


@pytest.mark.spec("DOC-8")
@pytest.mark.parametrize("field", ["mediaType", "artifactType", "subject", "annotations"])
def test_null_is_not_as_good_as_missing(field: str) -> None:
    with pytest.raises(RegistryProtocol, match=field) as info:
        parse({**MANIFEST, field: None})
    assert info.value.context["rule"] in ("DOC-8", "OCI-9")


@pytest.mark.spec("DOC-6", "OCI-1")
def test_each_error_of_a_manifest_names_its_rule() -> None:
    for change, rule in (
        ({"schemaVersion": 2.0}, "DOC-6"),
        ({"schemaVersion": 1}, "OCI-1"),
        ({"mediaType": "text/plain"}, "OCI-1"),
        ({"layers": None}, "OCI-1"),
        ({"artifactType": 1}, "OCI-9"),
    ):
        with pytest.raises(RegistryProtocol) as info:
            parse({**MANIFEST, **change})
        assert info.value.context["rule"] == rule, change
    with pytest.raises(RegistryProtocol) as info:
        parse([])
    assert info.value.context["rule"] == "OCI-1"


WRONG: list[tuple[str, Any, str]] = [
    ("schemaVersion", 1, "schemaVersion"),
    ("schemaVersion", None, "schemaVersion"),
    ("mediaType", "application/vnd.docker.distribution.manifest.v2+json", "not an OCI image manifest"),
    ("mediaType", ["x"], "not an OCI image manifest"),
    ("mediaType", mediatypes.OCI_INDEX, "manifests is not a list"),
    ("manifests", [], "not an OCI image manifest"),
    ("artifactType", 1, "artifactType"),
    ("config", None, "config is not an object"),
    ("config.mediaType", "", "config.mediaType"),
    ("config.mediaType", "x" * 256, "config.mediaType"),
    ("config.digest", "sha256:../../x", "config.digest"),
    ("config.digest", "sha512:" + "0" * 128, "config.digest"),
    ("config.digest", 1, "config.digest"),
    ("config.size", -1, "config.size"),
    ("config.size", True, "config.size"),
    ("config.size", 1.0, "config.size"),
    ("config.size", 2**63, "config.size"),
    ("config.annotations", {"a": 1}, "config.annotations"),
    ("config.annotations", ["a"], "config.annotations"),
    ("layers", None, "layers is not a list"),
    ("layers", {}, "layers is not a list"),
    ("layers", [BLOB] * (limits.OCI_LAYERS_MAX + 1), "at most 128"),
    ("layers.1", "x", r"layers\[1\] is not an object"),
    ("layers.1.digest", None, r"layers\[1\].digest"),
    ("layers.1.platform", "linux", r"layers\[1\].platform"),
    ("layers.1.artifactType", [], r"layers\[1\].artifactType"),
    ("subject", [], "subject is not an object"),
    ("subject.size", "3", "subject.size"),
    ("annotations", {"a": None}, "annotations"),
]


@pytest.mark.spec("OCI-9")
@pytest.mark.parametrize(("path", "value", "words"), WRONG)
def test_each_mistake_is_named(path: str, value: Any, words: str) -> None:
    document = json.loads(json.dumps(MANIFEST))
    *way, last = path.split(".")
    item: Any = document
    for key in way:
        item = item[int(key)] if key.isdigit() else item[key]
    item[int(last) if last.isdigit() else last] = value
    with pytest.raises(RegistryProtocol, match=words):
        parse(document)


def test_a_docker_manifest_has_a_hint() -> None:
    with pytest.raises(RegistryProtocol) as info:
        parse({**MANIFEST, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"})
    assert "Docker" in (info.value.hint or "")


@pytest.mark.parametrize("value", [None, [], "x", 2, {}])
def test_no_manifest_at_all(value: Any) -> None:
    with pytest.raises(RegistryProtocol):
        parse(value)


@pytest.mark.spec("OCI-1", "LIM-1")
def test_the_size_is_limited() -> None:
    with pytest.raises(JsonInvalid, match="at most"):
        parse_manifest(b" " * (limits.OCI_MANIFEST_MAX + 1), "the manifest")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4) | st.just(D),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["schemaVersion", "mediaType", "artifactType", "config", "layers", "subject", "manifests"])


@given(st.sampled_from([MANIFEST, INDEX, {}]), st.dictionaries(FIELDS, JSON, max_size=3), JSON)
def test_anything_raises_nothing_else(base: dict[str, Any], changes: dict[str, Any], other: Any) -> None:
    for value in (
        {**base, **changes},
        {**base, "config": {**BLOB, **changes}},
        {**base, "manifests": [{**BLOB, **changes}]},
        other,
    ):
        try:
            found = parse(value)
        except (RegistryProtocol, JsonInvalid):
            continue
        for descriptor in found.blobs if isinstance(found, ImageManifest) else found.manifests:
            assert descriptor.size >= 0


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises((RegistryProtocol, JsonInvalid)):
        parse_manifest(data, "the manifest")


@pytest.mark.spec("OCI-1")
def test_what_is_built_is_read() -> None:
    config = Descriptor.of(mediatypes.MANIFEST, b"{}")
    layer = Descriptor("application/x", D, 3, {"k": "v"})
    subject = Descriptor("application/y", D, 4, {"not": "copied"})
    built = build_manifest(
        artifact_type=mediatypes.MANIFEST, config=config, layers=(layer,), subject=subject, annotations={"a": "b"}
    )
    found = parse_manifest(built.raw, "x")
    assert isinstance(found, ImageManifest)
    assert (found.config, found.layers, found.annotations) == (config, (layer,), {"a": "b"})
    assert found.subject == Descriptor("application/y", D, 4)
    assert found.digest == built.digest
    again = build_manifest(
        artifact_type=mediatypes.MANIFEST, config=config, layers=(layer,), subject=subject, annotations={"a": "b"}
    )
    assert again.raw == built.raw


@given(
    st.builds(
        Descriptor,
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        st.just(D),
        st.integers(0, 2**63 - 1),
        st.dictionaries(st.text(), st.text(), max_size=3),
        st.none() | st.text(max_size=5),
        st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    )
)
def test_a_descriptor_round_trip(descriptor: Descriptor) -> None:
    assert Descriptor.from_json(descriptor.to_json(), "x") == descriptor
