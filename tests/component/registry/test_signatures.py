"""Signatures in registries and in the local store: found, bounded, kept, pushed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.registry import Registry

from ovms.artifact import attach, model
from ovms.errors import RegistryError, RegistryProtocol
from ovms.oci import collector, cosign, referrers, transfer
from ovms.oci.collector import Needs
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, of_bytes
from ovms.trust import keys, payload, signing, sources
from ovms.trust.model import Bad, Format, Found, Good, Unreadable
from ovms.trust.signers import KeySigner
from ovms.trust.sources import LocalSource, RegistrySource

KEY = keys.generate()
SIGNER = KeySigner("us", KEY.public)
pytestmark = pytest.mark.usefixtures("hurried")
FORMATS = pytest.mark.parametrize("kind", Format)
ONE = pytest.mark.parametrize("each_registry", ["docker-registry"], indirect=True)


@pytest.fixture
def client(each_registry: Registry) -> Iterator[RegistryClient]:
    with RegistryClient(each_registry.host) as client:
        yield client


@pytest.fixture
def ref(client: RegistryClient, tmp_path: Path) -> Reference:
    return Reference(client.host, f"t/{tmp_path.name.replace('_', '-').strip('-').lower()}", "1")


@pytest.fixture
def other(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "other")


@pytest.fixture
def image(layout: Layout, client: RegistryClient, ref: Reference) -> ImageManifest:
    """An artifact in the store and in the registry."""
    document = {"schemaVersion": 1, "mediaType": mediatypes.MANIFEST, "name": "test", "version": ref.repository}
    image = model.compose(layout, document, model.Parts()).image
    layout.set_name(str(ref), image.descriptor())
    transfer.push(layout, client, ref, image.digest)
    return image


def good(found: Any, subject: Digest) -> list[Format]:
    assert not [one for one in found if isinstance(one, Unreadable)]
    checked = [SIGNER.check(one, subject) for one in found]
    assert all(isinstance(one, Good) for one in checked)
    return [one.format for one in found]


def details(found: Any) -> str:
    return "\n".join(one.detail for one in found if isinstance(one, Unreadable))


def put(client: RegistryClient, repository: str, raw: bytes, tag: str) -> None:
    client.put_manifest(repository, tag, raw, mediatypes.OCI_MANIFEST)


@FORMATS
def test_what_is_signed_is_found(client: RegistryClient, ref: Reference, image: ImageManifest, kind: Format) -> None:
    source = RegistrySource(client, ref.repository)
    assert source.signatures(image.digest) == []
    signed = signing.sign_remote(client, ref, KEY, kind)
    assert signed.subject == image.digest
    found = source.signatures(image.digest)
    assert good(found, image.digest) == [kind]
    assert [one.manifest for one in found] == [signed.manifest]
    # what was found for one is no signature of another
    assert all(isinstance(SIGNER.check(one, of_bytes(b"x")), Bad) for one in found if isinstance(one, Found))


def test_all_formats_side_by_side_and_several_keys(
    client: RegistryClient, ref: Reference, image: ImageManifest
) -> None:
    for kind in Format:
        signing.sign_remote(client, ref, KEY, kind)
        signing.sign_remote(client, ref, keys.generate(), kind)
    found = RegistrySource(client, ref.repository).signatures(image.digest)
    results = [SIGNER.check(one, image.digest) for one in found if isinstance(one, Found)]
    assert len(found) == len(results) == 6
    assert sorted(r.found.format for r in results if isinstance(r, Good)) == sorted(Format)


@FORMATS
def test_what_is_kept_is_found_without_the_registry(
    client: RegistryClient, ref: Reference, image: ImageManifest, other: Layout, kind: Format
) -> None:
    signing.sign_remote(client, ref, KEY, kind)
    transfer.pull(other, client, ref)
    for _ in range(2):
        assert sources.keep(other, client, ref.repository, image.descriptor()) == 1
    assert good(LocalSource(other).signatures(image.digest), image.digest) == [kind]
    assert [entry.name for entry in other.entries() if entry.name] == [str(ref)]
    # they live as long as the artifact
    collector.collect(other, Needs)
    assert len(LocalSource(other).signatures(image.digest)) == 1
    other.remove_name(str(ref))
    collector.collect(other, Needs)
    assert other.entries() == []
    assert list(other.blob_dir.iterdir()) == []


@FORMATS
def test_what_is_signed_here_is_pushed(
    client: RegistryClient, ref: Reference, layout: Layout, image: ImageManifest, kind: Format
) -> None:
    signing.sign_local(layout, image.digest, ref.name, KEY, kind)
    assert good(LocalSource(layout).signatures(image.digest), image.digest) == [kind]
    there = RegistrySource(client, ref.repository)
    assert there.signatures(image.digest) == []
    for _ in range(2):
        attach.push_referrers(layout, client, ref.repository, image.digest)
        assert good(there.signatures(image.digest), image.digest) == [kind]


@ONE
def test_two_kept_classic_signatures_go_under_one_tag(
    client: RegistryClient, ref: Reference, layout: Layout, image: ImageManifest
) -> None:
    for key in (KEY, keys.generate()):
        signing.sign_local(layout, image.digest, ref.name, key, Format.CLASSIC)
    attach.push_referrers(layout, client, ref.repository, image.digest)
    raw, _ = client.get_manifest(Reference(client.host, ref.repository, cosign.classic_tag(image.digest)))
    assert len(json.loads(raw)["layers"]) == 2


# --- what strangers may put there ------------------------------------------------------------------------------------


def simple_layer(client: RegistryClient, repository: str, data: bytes, **annotations: str) -> dict[str, Any]:
    descriptor = Descriptor.of(cosign.SIMPLE_SIGNING, data, annotations)
    if not client.has_blob(repository, descriptor.digest):
        client.push_blob(repository, descriptor, lambda offset, size: io.BytesIO(data[offset:]))
    return descriptor.to_json()


def classic(client: RegistryClient, repository: str, layers: list[Any]) -> bytes:
    config = simple_layer(client, repository, b"{}")
    config["mediaType"] = mediatypes.OCI_EMPTY
    return strictjson.canonical(
        {"schemaVersion": 2, "mediaType": mediatypes.OCI_MANIFEST, "config": config, "layers": layers}
    )


@ONE
@pytest.mark.parametrize(
    ("layers", "detail"),
    [
        (lambda layer: [], "no layers"),
        (lambda layer: [layer] * 5000, "not a list of at most"),
        (lambda layer: [{**layer, "mediaType": "text/plain\x1b[31m"}], "no signature"),
        (lambda layer: [{**layer, "annotations": {f"k{i}": "v" for i in range(1000)}}], "more annotations"),
        (lambda layer: [{**layer, "annotations": {"k": "v" * 1_000_000}}], "more annotations"),
    ],
)
def test_hostile_classic_signatures(
    client: RegistryClient, ref: Reference, image: ImageManifest, layers: Any, detail: str
) -> None:
    layer = simple_layer(client, ref.repository, b"rubbish")
    raw = classic(client, ref.repository, layers(layer))
    put(client, ref.repository, raw, cosign.classic_tag(image.digest))
    signing.sign_remote(client, ref, KEY, Format.BUNDLE)
    found = RegistrySource(client, ref.repository).signatures(image.digest)
    assert detail in details(found)
    assert details(found).replace("\n", "").isprintable()
    # and a good one beside it is found all the same
    results = [SIGNER.check(one, image.digest) for one in found if isinstance(one, Found)]
    assert [type(one) for one in results] == [Good]


@ONE
def test_a_layer_that_lies_about_its_size(client: RegistryClient, ref: Reference, image: ImageManifest) -> None:
    layer = simple_layer(client, ref.repository, b"rubbish" * 20_000)
    for size in (1, 7, len(b"rubbish" * 20_000), 2**62):
        raw = classic(client, ref.repository, [{**layer, "size": size}])
        try:
            put(client, ref.repository, raw, cosign.classic_tag(image.digest))
        except RegistryError:
            continue  # some registries look
        found = RegistrySource(client, ref.repository).signatures(image.digest)
        assert [type(one) for one in found] == [Unreadable]


@ONE
def test_many_referrers_are_bounded(
    client: RegistryClient, ref: Reference, image: ImageManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MANIFESTS_MAX", 3)
    for _ in range(5):
        signing.sign_remote(client, ref, keys.generate(), Format.REFERRER)
    found = RegistrySource(client, ref.repository).signatures(image.digest)
    assert len([one for one in found if isinstance(one, Found)]) == 3
    assert "more referrers than are looked at" in details(found)


@ONE
def test_many_signatures_are_bounded(client: RegistryClient, ref: Reference, image: ImageManifest) -> None:
    layer = simple_layer(client, ref.repository, b"rubbish")
    layers = [{**layer, "annotations": {cosign.SIGNATURE_ANNOTATION: f"{number:08}"}} for number in range(128)]
    put(client, ref.repository, classic(client, ref.repository, layers), cosign.classic_tag(image.digest))
    # the same ones over and over are read once
    config = Descriptor.from_json(simple_layer(client, ref.repository, b"{}"), "c")
    for number in range(3):
        body = build_manifest(
            artifact_type=cosign.SIGNATURE_TYPE,
            config=config,
            layers=tuple(
                Descriptor.from_json({**one, "annotations": {cosign.SIGNATURE_ANNOTATION: f"{number}{i:07}"}}, "l")
                for i, one in enumerate(layers)
            ),
            subject=image.descriptor(),
        )
        cosign.push(client, ref.repository, body, ())
    found = RegistrySource(client, ref.repository).signatures(image.digest)
    assert len([one for one in found if isinstance(one, Found)]) == sources.SIGNATURES_MAX
    assert "more signatures than are looked at" in details(found)


@ONE
def test_a_referrer_that_names_another_subject(client: RegistryClient, ref: Reference, image: ImageManifest) -> None:
    signed = signing.sign_remote(client, ref, KEY, Format.BUNDLE)
    elsewhere = of_bytes(b"elsewhere")
    entry = Descriptor(
        mediatypes.OCI_MANIFEST, signed.manifest, _size(client, ref, signed.manifest), artifact_type=cosign.BUNDLE_TYPE
    )
    referrers.add(client, ref.repository, entry, elsewhere)
    found = RegistrySource(client, ref.repository).signatures(elsewhere)
    assert [type(one) for one in found] == [Unreadable]
    assert "names another subject" in details(found)


def _size(client: RegistryClient, ref: Reference, digest: Digest) -> int:
    return len(client.get_manifest(Reference(client.host, ref.repository, None, digest))[0])


@ONE
def test_what_stands_under_the_tag_and_is_none_is_not_written_over(
    client: RegistryClient, ref: Reference, image: ImageManifest, layout: Layout
) -> None:
    index = strictjson.canonical({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": []})
    client.put_manifest(ref.repository, cosign.classic_tag(image.digest), index, mediatypes.OCI_INDEX)
    with pytest.raises(RegistryProtocol, match="holds no signatures"):
        signing.sign_remote(client, ref, KEY, Format.CLASSIC)
    assert "holds an index" in details(RegistrySource(client, ref.repository).signatures(image.digest))


def test_attestations_are_no_signatures(client: RegistryClient, ref: Reference, image: ImageManifest) -> None:
    statement = payload.statement(image.digest).replace(
        cosign.SIGN_PREDICATE.encode(), b"https://slsa.dev/provenance/v1"
    )
    signature = KEY.sign(payload.pae(payload.IN_TOTO, statement))
    data = payload.bundle(KEY.public.hint, statement, signature)
    made = cosign.bundle_manifest(data, image.descriptor(), "2026-01-01T00:00:00Z")
    honest = build_manifest(
        artifact_type=cosign.BUNDLE_TYPE,
        config=made.config,
        layers=made.layers,
        subject=made.subject,
        annotations={**made.annotations, cosign.BUNDLE_PREDICATE: "https://slsa.dev/provenance/v1"},
    )
    for one in (honest, made):  # the other lies, and is looked into
        cosign.push(client, ref.repository, one, (cosign.EMPTY, data))
    found = RegistrySource(client, ref.repository).signatures(image.digest)
    results = [SIGNER.check(one, image.digest) for one in found if isinstance(one, Found)]
    assert results
    assert all(isinstance(one, Bad) and "no signature of an artifact" in one.detail for one in results)
