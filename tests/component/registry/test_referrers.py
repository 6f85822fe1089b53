"""Referrers in registries with the API and without it, under many writers, and from servers that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import faulty
from support.cli import Ovm
from support.faulty import Handler, Server
from support.registry import Registry
from support.tools import find as find_tool

from ovms.artifact import attach, model
from ovms.artifact.attach import Attachment
from ovms.errors import ReferenceNotFound, RegistryError, RegistryProtocol, RegistryUnreachable, UsageError
from ovms.oci import collector, patience, referrers, transfer
from ovms.oci.collector import Needs
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.referrers import fallback_tag, fetch, lister, tree
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, of_bytes

SBOM = "application/spdx+json"
SIGNATURE = "application/vnd.example.signature"
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
WRITERS = 8
# nobody else writes while this process does; those that write at once in a test are other processes
pytestmark = pytest.mark.usefixtures("hurried")
#: Where the registry makes no difference.
ONE = pytest.mark.parametrize("each_registry", ["docker-registry"], indirect=True)
#: What a stranger's entry may look like.
STRANGE = {"mediaType": "application/x", "digest": "sha512:abc", "size": -1, "weird": {"kept": [1, 2.5, None]}}


@pytest.fixture
def host(each_registry: Registry) -> str:
    return each_registry.host


@pytest.fixture
def client(host: str) -> Iterator[RegistryClient]:
    with RegistryClient(host) as client:
        yield client


@pytest.fixture
def ref(host: str, tmp_path: Path) -> Reference:
    return Reference(host, f"t/{tmp_path.name.replace('_', '-').strip('-').lower()}", "1")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "store")


@pytest.fixture
def other(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "other")


@pytest.fixture
def sbom(tmp_path: Path) -> Path:
    path = tmp_path / "web.spdx.json"
    path.write_bytes(b'{"spdxVersion": "SPDX-2.3"}' + os.urandom(8))
    return path


def add(layout: Layout, name: object, version: str = "1", *, subject: Descriptor | None = None) -> ImageManifest:
    """An artifact without parts."""
    document = {"schemaVersion": 1, "mediaType": mediatypes.MANIFEST, "name": "test", "version": version}
    image = model.compose(layout, document, model.Parts(), subject=subject).image
    layout.set_name(str(name), image.descriptor())
    return image


@pytest.fixture
def base(layout: Layout, client: RegistryClient, ref: Reference) -> ImageManifest:
    """An artifact in the registry."""
    image = add(layout, ref)
    transfer.push(layout, client, ref, image.digest)
    return image


def attach_to(
    layout: Layout, client: RegistryClient, ref: Reference, path: Path, artifact_type: str = SBOM, **annotations: str
) -> Descriptor:
    added, _ = attach.attach_remote(layout, client, ref, Attachment(path, SBOM, artifact_type, annotations))
    return added


def digests(listing: referrers.Listing) -> list[Digest]:
    return [descriptor.digest for descriptor in listing.descriptors]


# --- any registry ----------------------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-19", "OCI-20")
def test_what_is_attached_is_found(
    layout: Layout, client: RegistryClient, ref: Reference, base: ImageManifest, sbom: Path
) -> None:
    before = sorted(layout.root.rglob("*"))
    first = attach_to(layout, client, ref, sbom, n="1")
    second = attach_to(layout, client, ref, sbom, SIGNATURE)
    deeper = attach_to(layout, client, ref.with_digest(first.digest), sbom, SIGNATURE, about="the sbom")
    assert sorted(layout.root.rglob("*")) == before  # nothing of it is kept here
    nodes, complete = tree([base.digest], lister(client, ref.repository))
    assert complete
    assert {node.descriptor.digest for node in nodes} == {first.digest, second.digest}
    (sbom_node,) = [node for node in nodes if node.descriptor.digest == first.digest]
    assert [child.descriptor.digest for child in sbom_node.children] == [deeper.digest]
    assert sbom_node.descriptor.artifact_type == SBOM
    assert sbom_node.descriptor.annotations["n"] == "1"
    assert digests(fetch(client, ref.repository, base.digest, SIGNATURE)) == [second.digest]
    assert digests(fetch(client, ref.repository, deeper.digest)) == []
    raw, _ = client.get_manifest(replace(ref, tag=None, digest=first.digest))
    layer = strictjson.parse(raw, "x", max_size=len(raw))["layers"][0]
    blob = Descriptor(layer["mediaType"], layer["digest"], layer["size"])
    assert b"".join(map(bytes, client.read_blob(ref.repository, blob))) == sbom.read_bytes()


def test_attaching_to_nothing(layout: Layout, client: RegistryClient, ref: Reference, sbom: Path) -> None:
    with pytest.raises(ReferenceNotFound):
        attach_to(layout, client, ref, sbom)
    assert list(layout.staging_root.iterdir()) == []


@pytest.mark.long
@pytest.mark.spec("OCI-20")
def test_many_writers_at_once_are_all_listed(
    client: RegistryClient, ref: Reference, base: ImageManifest, sbom: Path, tmp_path: Path
) -> None:
    ovms = [Ovm(tmp_path / f"root{i}", tmp_path) for i in range(WRITERS)]
    writers = [
        ovm.popen("attach", "--type", SBOM, "--annotation", f"n={i}", sbom, ref, stdout=subprocess.PIPE)
        for i, ovm in enumerate(ovms)
    ]
    added = set()
    for writer in writers:
        out, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        added.add(out.decode().strip())
    assert len(added) == WRITERS
    assert set(digests(fetch(client, ref.repository, base.digest))) == added


def test_referrers_go_and_come_with_the_artifact(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, sbom: Path
) -> None:
    image = add(layout, ref)
    first, _ = attach.attach_local(layout, str(ref), Attachment(sbom, SBOM, SBOM, {}))
    deeper, _ = attach.attach_local(layout, first.digest, Attachment(sbom, SBOM, SIGNATURE, {}))
    snapshot = add(layout, replace(ref, tag="warm"), "warm", subject=image.descriptor())
    transfer.push(layout, client, ref, image.digest)
    sent = attach.push_referrers(layout, client, ref.repository, image.digest)
    assert {d.digest for d in sent} == {first.digest, deeper.digest}  # a snapshot has a name of its own
    transfer.push(layout, client, replace(ref, tag="warm"), snapshot.digest)
    assert set(digests(fetch(client, ref.repository, image.digest))) == {first.digest, snapshot.digest}

    transfer.pull(other, client, ref)
    fetched, left_out = attach.pull_referrers(other, client, ref.repository, image.digest)
    assert ({d.digest for d in fetched}, left_out) == ({first.digest, deeper.digest}, 0)
    assert other.size(snapshot.digest) is None
    collector.collect(other, Needs)
    nodes, _ = tree([image.digest], referrers.local_lister(other))
    assert [n.descriptor.digest for n in nodes] == [first.digest]
    assert [n.descriptor.digest for n in nodes[0].children] == [deeper.digest]
    blob = other.manifest(first.digest)
    assert isinstance(blob, ImageManifest)
    assert other.path(blob.layers[0].digest).read_bytes() == sbom.read_bytes()


@ONE
def test_referrers_that_come_are_listed_together_and_kept_where_another_fails(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, base: ImageManifest, sbom: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    added = {attach_to(layout, client, ref, sbom, n=str(n)).digest for n in range(5)}
    transfer.pull(other, client, ref)
    pull, write = transfer.fetch, Layout.write_index
    written: list[dict[str, Any]] = []
    came: list[Digest] = []

    def until_the_fourth(
        layout: Layout, client: RegistryClient, repository: str, image: ImageManifest, *rest: Any
    ) -> None:
        if len(came) == 3:
            raise RegistryUnreachable("gone")
        pull(layout, client, repository, image, *rest)
        came.append(image.digest)

    def count(layout: Layout, index: dict[str, Any]) -> None:
        written.append(index)
        write(layout, index)

    monkeypatch.setattr(Layout, "write_index", count)
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "fetch", until_the_fourth)
        with pytest.raises(RegistryUnreachable):
            attach.pull_referrers(other, client, ref.repository, base.digest)
    assert len(written) == 1, "the index is as long as what it lists"
    collector.collect(other, Needs)
    assert set(digests(referrers.local_lister(other)(base.digest, None))) == set(came)
    attach.pull_referrers(other, client, ref.repository, base.digest)
    assert set(digests(referrers.local_lister(other)(base.digest, None))) == added


def test_an_index_can_refer_to_an_artifact(
    layout: Layout, client: RegistryClient, ref: Reference, base: ImageManifest
) -> None:
    value = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_INDEX,
        "artifactType": SIGNATURE,
        "manifests": [],
        "subject": base.descriptor().to_json(),
    }
    digest = layout.add_bytes(strictjson.canonical(value))
    transfer.push(layout, client, replace(ref, tag="index"), digest)
    (found,) = fetch(client, ref.repository, base.digest).descriptors
    assert (found.digest, found.media_type, found.artifact_type) == (digest, mediatypes.OCI_INDEX, SIGNATURE)


def test_what_refers_to_a_manifest_of_an_index(
    ovm: Ovm, client: RegistryClient, ref: Reference, base: ImageManifest, sbom: Path
) -> None:
    whole = replace(ref, tag="whole")
    raw = strictjson.canonical(
        {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [base.descriptor().to_json()]}
    )
    client.put_manifest(ref.repository, "whole", raw, mediatypes.OCI_INDEX)
    inner = ovm.ok("attach", sbom, ref, "--type", SBOM).out.strip()
    outer = ovm.ok("attach", sbom, whole, "--type", SBOM).out.strip()
    found = {node["digest"]: node["subject"] for node in ovm.ok("referrers", whole, "--json").json["referrers"]}
    assert found == {outer: of_bytes(raw), inner: base.digest}
    assert f"(of {base.digest} in the index)" in ovm.ok("referrers", whole).out
    pulled = ovm.ok("pull", whole, "--referrers", "--json").json
    assert set(pulled["referrers"]) == {inner, outer}
    assert len(ovm.ok("referrers", whole, "--local", "--json").json["referrers"]) == 2


@pytest.mark.spec("OCI-19", "OCI-20")
def test_push_with_a_subject(layout: Layout, client: RegistryClient, ref: Reference, base: ImageManifest) -> None:
    mine = replace(ref, tag="mine")
    for i, subject in enumerate((base.digest, str(ref), f"{ref.name}@{base.digest}")):
        old = add(layout, mine, f"mine{i}")
        pushed = attach.push_with_subject(layout, lambda _: client, str(mine), subject)
        assert pushed.digest != old.digest
        assert layout.find(str(mine)).digest == pushed.digest  # type: ignore[union-attr]
        assert pushed.digest in digests(fetch(client, ref.repository, base.digest, mediatypes.MANIFEST))
        value = json.loads(client.get_manifest(mine)[0])
        assert value.pop("subject")["digest"] == base.digest
        assert value == json.loads(old.raw)


def test_a_subject_has_to_be_there(layout: Layout, client: RegistryClient, ref: Reference, base: ImageManifest) -> None:
    mine = replace(ref, tag="mine")
    old = add(layout, mine, "mine")
    with pytest.raises(ReferenceNotFound):
        attach.push_with_subject(layout, lambda _: client, str(mine), of_bytes(b"nothing"))
    with pytest.raises(UsageError, match="is not in"):
        attach.push_with_subject(layout, lambda _: client, str(mine), f"{ref.registry}/elsewhere:1")
    with pytest.raises(UsageError, match="another digest"):
        attach.push_with_subject(layout, lambda _: client, f"{mine}@{old.digest}", base.digest)
    assert layout.find(str(mine)).digest == old.digest  # type: ignore[union-attr]
    with pytest.raises(ReferenceNotFound):
        client.get_manifest(mine)


def oras(*arguments: object) -> bytes:
    tool = find_tool("oras")
    return subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True, timeout=60).stdout


def test_oras_and_we_find_each_others_referrers(
    layout: Layout, client: RegistryClient, ref: Reference, base: ImageManifest, sbom: Path
) -> None:
    ours = attach_to(layout, client, ref, sbom)
    oras("attach", "--plain-http", "--disable-path-validation", "--artifact-type", SIGNATURE, ref, f"{sbom}:text/plain")
    found = fetch(client, ref.repository, base.digest)
    assert {d.artifact_type for d in found.descriptors} == {SBOM, SIGNATURE}
    assert len(found.descriptors) == 2
    theirs = json.loads(oras("discover", "--plain-http", "--format", "json", ref))
    assert {r["digest"] for r in theirs.get("referrers") or theirs["manifests"]} == set(digests(found))
    assert ours.digest in digests(found)


@ONE
def test_oras_finds_what_is_attached_in_the_store(layout: Layout, ref: Reference, sbom: Path) -> None:
    add(layout, ref)
    added, _ = attach.attach_local(layout, str(ref), Attachment(sbom, SBOM, SBOM, {}))
    digest = layout.find(str(ref)).digest  # type: ignore[union-attr]
    theirs = json.loads(oras("discover", "--oci-layout", "--format", "json", f"{layout.root}@{digest}"))
    assert [r["digest"] for r in theirs.get("referrers") or theirs["manifests"]] == [added.digest]


def test_skopeo_reads_a_store_with_nameless_entries(layout: Layout, sbom: Path) -> None:
    image = add(layout, "web:1")
    attach.attach_local(layout, "web:1", Attachment(sbom, SBOM, SBOM, {}))
    command = [str(find_tool("skopeo")), "inspect", "--raw", f"oci:{layout.root}:web:1"]
    assert subprocess.run(command, check=True, capture_output=True, timeout=60).stdout == image.raw


# --- the fallback tag ------------------------------------------------------------------------------------------------


def tag_of(registry: Registry, ref: Reference, digest: Digest) -> Any:
    accept = f"{mediatypes.OCI_INDEX}, {mediatypes.OCI_MANIFEST}, {DOCKER}"
    return json.loads(registry.get(f"{ref.repository}/manifests/{fallback_tag(digest)}", accept))


@pytest.fixture
def plain(registry: Registry, layout: Layout) -> Iterator[tuple[RegistryClient, Reference, ImageManifest]]:
    """docker-registry, which has no API, and an artifact in it."""
    with RegistryClient(registry.host) as client:
        ref = Reference(registry.host, f"t/{layout.root.parent.name.replace('_', '-').strip('-').lower()}", "1")
        image = add(layout, ref)
        transfer.push(layout, client, ref, image.digest)
        yield client, ref, image


@pytest.mark.spec("OCI-20")
def test_the_fallback_index_says_what_the_api_would(
    layout: Layout, registry: Registry, plain: tuple[RegistryClient, Reference, ImageManifest], sbom: Path
) -> None:
    client, ref, base = plain
    added = attach_to(layout, client, ref, sbom)
    image = build_manifest(
        artifact_type="", config=Descriptor.of("application/x", b"x"), layers=(), subject=base.descriptor()
    )
    value = json.loads(image.raw)
    del value["artifactType"]
    layout.add_bytes(b"x")
    digest = layout.add_bytes(strictjson.canonical(value))
    transfer.push(layout, client, replace(ref, tag="old"), digest)
    first, second = tag_of(registry, ref, base.digest)["manifests"]
    assert first == added.to_json()
    assert first["annotations"].keys() == {mediatypes.CREATED_ANNOTATION}
    assert second["artifactType"] == "application/x"  # that of the config, where the manifest has none
    name = f"docker://{ref.name}:{fallback_tag(base.digest)}"
    done = subprocess.run(
        [str(find_tool("skopeo")), "inspect", "--raw", "--tls-verify=false", name],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["manifests"] == [first, second]


@pytest.mark.spec("OCI-25")
@pytest.mark.parametrize("media_type", [mediatypes.OCI_MANIFEST, DOCKER])
def test_a_tag_that_holds_something_else_is_left_alone(
    layout: Layout,
    registry: Registry,
    plain: tuple[RegistryClient, Reference, ImageManifest],
    sbom: Path,
    media_type: str,
) -> None:
    client, ref, base = plain
    theirs = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {**base.config.to_json(), "mediaType": "application/vnd.docker.container.image.v1+json"},
        "layers": [],
    }
    client.put_manifest(ref.repository, fallback_tag(base.digest), json.dumps(theirs).encode(), media_type)
    with pytest.raises(RegistryProtocol, match="holds no OCI image index") as caught:
        attach_to(layout, client, ref, sbom)
    assert "delete the tag" in (caught.value.hint or "")
    assert tag_of(registry, ref, base.digest) == theirs
    with pytest.raises(RegistryProtocol, match="holds no OCI image index"):
        fetch(client, ref.repository, base.digest)


# --- servers that misbehave ------------------------------------------------------------------------------------------

SUBJECT = of_bytes(b"the subject")
TAG = fallback_tag(SUBJECT)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def weak(server: Server) -> Iterator[RegistryClient]:
    """A client for the misbehaving server, which loses no time."""
    with RegistryClient(server.host, read_timeout=2, backoff=0.001) as client:
        yield client


def entry(number: int, artifact_type: str | None = SBOM, **more: Any) -> dict[str, Any]:
    digest = of_bytes(f"referrer {number}".encode())
    value = {"mediaType": mediatypes.OCI_MANIFEST, "digest": digest, "size": 100, **more}
    return value if artifact_type is None else {**value, "artifactType": artifact_type}


def index(*entries: Any, **more: Any) -> bytes:
    value = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": list(entries), **more}
    return json.dumps(value).encode()


def page(body: bytes, link: str | None = None, **headers: str) -> faulty.Fault:
    def fault(handler: Handler, _: bytes) -> bool:
        extra = {} if link is None else {"Link": link.replace("HOST", handler.server.host)}
        handler.reply(200, body, Content_Type=mediatypes.OCI_INDEX, **extra, **headers)
        return True

    return fault


def mine(number: int = 0) -> Descriptor:
    return Descriptor.from_json(entry(number), "mine")


@pytest.mark.spec("OCI-25")
def test_entries_of_others_stay_as_they_are(server: Server, weak: RegistryClient) -> None:
    theirs = [STRANGE, "no object", entry(1, platform={"os": "linux"}, urls=["https://x.example"])]
    server.manifests[TAG] = index(*theirs, annotations={"kept": "yes"}, unknown=[1])
    referrers.add(weak, "x", mine(), SUBJECT)
    value = json.loads(server.manifests[TAG])
    assert value["manifests"] == [*theirs, mine().to_json()]
    assert (value["annotations"], value["unknown"]) == ({"kept": "yes"}, [1])
    before = server.manifests[TAG]
    referrers.add(weak, "x", mine(), SUBJECT)
    assert server.manifests[TAG] == before
    assert digests(fetch(weak, "x", SUBJECT)) == [entry(1)["digest"], mine().digest]


@pytest.mark.parametrize("body", [b"nonsense", b"[]", b'{"manifests": 5}', index(mediaType="application/x"), b"\xff"])
def test_a_damaged_index_is_not_written_over(server: Server, weak: RegistryClient, body: bytes) -> None:
    def damaged(handler: Handler, _: bytes) -> bool:
        handler.reply(200, body)
        return True

    server.faults = [("GET", TAG, damaged)] * 2
    with pytest.raises(RegistryProtocol, match="no OCI image index"):
        referrers.add(weak, "x", mine(), SUBJECT)
    assert server.asked("PUT", TAG) == []
    with pytest.raises(RegistryProtocol, match="no OCI image index"):
        fetch(weak, "x", SUBJECT)


def taken_away(handler: Handler, body: bytes) -> bool:
    """The upload works, and another client that had read before it writes over it."""
    handler.server.manifests[TAG] = index(entry(7))
    handler.reply(201)
    return True


@pytest.mark.spec("OCI-25")
def test_an_entry_that_another_client_takes_away_is_added_again(server: Server, weak: RegistryClient) -> None:
    server.faults = [("PUT", TAG, taken_away)] * 3
    referrers.add(weak, "x", mine(), SUBJECT)
    assert [e["digest"] for e in json.loads(server.manifests[TAG])["manifests"]] == [entry(7)["digest"], mine().digest]
    assert len(server.asked("GET", TAG)) == 3 + 1 + 3  # where others write, it has to be seen several times


@pytest.mark.spec("OCI-25")
def test_a_failed_upload_is_not_repeated_over_what_others_wrote(server: Server, weak: RegistryClient) -> None:
    def late(handler: Handler, body: bytes) -> bool:
        handler.server.manifests[TAG] = index(entry(7))
        handler.reply(503)
        return True

    server.faults = [("PUT", TAG, late)]
    referrers.add(weak, "x", mine(), SUBJECT)
    assert [e["digest"] for e in json.loads(server.manifests[TAG])["manifests"]] == [entry(7)["digest"], mine().digest]


def test_a_tag_that_is_gone_for_a_moment_is_not_begun_anew(server: Server, weak: RegistryClient) -> None:
    # docker-registry, while another client writes the tag
    server.manifests[TAG] = index(entry(7))
    server.faults = [("PUT", TAG, taken_away), ("GET", TAG, page(index(entry(7)))), ("GET", TAG, faulty.status(404))]
    referrers.add(weak, "x", mine(), SUBJECT)
    assert [e["digest"] for e in json.loads(server.manifests[TAG])["manifests"]] == [entry(7)["digest"], mine().digest]


def test_a_tag_that_is_really_gone_is_begun_anew(server: Server, weak: RegistryClient) -> None:
    def deleted(handler: Handler, _: bytes) -> bool:
        del handler.server.manifests[TAG]
        handler.reply(201)
        return True

    server.manifests[TAG] = index(entry(7))
    server.faults = [("PUT", TAG, deleted)]
    referrers.add(weak, "x", mine(), SUBJECT)
    assert [e["digest"] for e in json.loads(server.manifests[TAG])["manifests"]] == [mine().digest]


def test_a_blob_that_is_not_known_for_a_moment(server: Server, weak: RegistryClient) -> None:
    # docker-registry, while another client uploads the same blob
    def unknown(handler: Handler, _: bytes) -> bool:
        said = {"errors": [{"code": "MANIFEST_BLOB_UNKNOWN", "message": "blob unknown to registry"}]}
        handler.reply(400, json.dumps(said).encode())
        return True

    server.faults = [("PUT", "/manifests/", unknown)] * 2
    weak.put_manifest("x", "1", b"{}", mediatypes.OCI_MANIFEST)
    assert server.manifests["1"] == b"{}"
    server.faults = [("PUT", "/manifests/", unknown)] * 10
    with pytest.raises(RegistryError, match="blob unknown"):
        weak.put_manifest("x", "1", b"{}", mediatypes.OCI_MANIFEST)


def test_a_registry_that_keeps_nothing_ends_in_an_error(server: Server, weak: RegistryClient) -> None:
    server.faults = [("PUT", TAG, faulty.status(201))] * 1000
    with pytest.raises(RegistryProtocol, match="does not keep") as caught:
        referrers.add(weak, "x", mine(), SUBJECT)
    assert "push it again" in (caught.value.hint or "")
    assert len(server.asked("PUT", TAG)) <= 60


def test_others_without_end_end_in_time(server: Server, weak: RegistryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "_TIME_MAX", 0.0)
    server.faults = [("PUT", TAG, faulty.status(201))] * 1000
    with pytest.raises(RegistryProtocol, match="does not keep"):
        referrers.add(weak, "x", mine(), SUBJECT)
    assert len(server.asked("PUT", TAG)) == 1


def test_a_registry_that_fails_ends_in_its_error(server: Server, weak: RegistryClient) -> None:
    server.faults = [("PUT", TAG, faulty.status(503))] * 1000
    with pytest.raises(RegistryError, match="503"):
        referrers.add(weak, "x", mine(), SUBJECT)
    assert len(server.asked("PUT", TAG)) == patience.ATTEMPTS_MAX


def test_an_index_that_is_full(server: Server, weak: RegistryClient) -> None:
    server.manifests[TAG] = index(*({"filler": "x" * 1000} for _ in range(4090)))
    with pytest.raises(RegistryProtocol, match="is full"):
        referrers.add(weak, "x", mine(), SUBJECT)
    assert server.asked("PUT", TAG) == []


NEXT = '</v2/x/referrers/{}?page={}>; rel="next"'


def link(number: int) -> str:
    return NEXT.format(SUBJECT, number)


@pytest.mark.parametrize(
    "first",
    [
        link(2),
        f'<http://HOST/v2/x/referrers/{SUBJECT}?page=2>; title="y"; rel="next"',
        '<http://127.0.0.1:1/>; rel="prev", <?page=2>; rel=next',
    ],
)
def test_pages_are_followed(server: Server, weak: RegistryClient, first: str) -> None:
    server.faults = [
        ("GET", r"/referrers/[^?]*$", page(index(entry(1), entry(2)), first)),
        ("GET", "page=2$", page(index(entry(2), "nonsense", entry(3)), link(3))),
        ("GET", "page=3$", page(index(entry(4)))),
    ]
    found = fetch(weak, "x", SUBJECT)
    assert found.complete
    assert digests(found) == [entry(n)["digest"] for n in (1, 2, 3, 4)]


def test_pages_of_another_server_are_not_asked_for(server: Server, weak: RegistryClient) -> None:
    with Server() as elsewhere:
        server.faults = [("GET", "/referrers/", page(index(entry(1)), f'<http://{elsewhere.host}/v2/>; rel="next"'))]
        with pytest.raises(RegistryProtocol, match="another server"):
            fetch(weak, "x", SUBJECT)
        assert elsewhere.seen == []


def test_pages_without_end(server: Server, weak: RegistryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "PAGES_MAX", 8)
    server.faults = [("GET", "/referrers/", page(index(entry(1)), link(1)))] * 3
    found = fetch(weak, "x", SUBJECT)  # page 1 leads to page 1
    assert (digests(found), found.complete) == ([entry(1)["digest"]], False)
    server.faults = [("GET", "/referrers/", page(index(entry(n)), link(n))) for n in range(1000)]
    server.seen.clear()
    found = fetch(weak, "x", SUBJECT)
    assert len(server.asked("GET", "/referrers/")) == referrers.PAGES_MAX == len(found.descriptors)
    assert not found.complete


def test_more_referrers_than_are_listed(server: Server, weak: RegistryClient) -> None:
    server.faults = [("GET", "/referrers/", page(index(*map(entry, range(1500))), link(2)))]
    found = fetch(weak, "x", SUBJECT)
    assert (len(found.descriptors), found.complete) == (referrers.REFERRERS_MAX, False)
    assert len(server.asked("GET", "/referrers/")) == 1


def test_a_list_that_breaks_off(server: Server, weak: RegistryClient) -> None:
    server.faults = [("GET", "/referrers/", page(index(entry(1)), link(2)))]
    with pytest.raises(RegistryProtocol, match="breaks its list"):
        fetch(weak, "x", SUBJECT)


@pytest.mark.spec("OCI-20")
@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_a_registry_without_the_api(server: Server, weak: RegistryClient, status: int) -> None:
    server.manifests[TAG] = index(entry(1))
    server.faults = [("GET", "/referrers/", faulty.status(status))]
    assert digests(fetch(weak, "x", SUBJECT)) == [entry(1)["digest"]]


def test_a_page_for_people_is_no_list(server: Server, weak: RegistryClient) -> None:
    server.manifests[TAG] = index(entry(1))
    server.faults = [("GET", "/referrers/", page(b"<html>Welcome</html>"))]
    assert digests(fetch(weak, "x", SUBJECT)) == [entry(1)["digest"]]


def test_api_and_tag_are_merged(server: Server, weak: RegistryClient) -> None:
    server.manifests[TAG] = index(entry(2), entry(3))
    server.faults = [("GET", "/referrers/", page(index(entry(1), entry(2))))]
    assert digests(fetch(weak, "x", SUBJECT)) == [entry(n)["digest"] for n in (1, 2, 3)]
    server.manifests[TAG] = b'{"schemaVersion": 2}'  # whatever it is, the API has answered
    server.faults = [("GET", "/referrers/", page(index(entry(1))))]
    assert digests(fetch(weak, "x", SUBJECT)) == [entry(1)["digest"]]


@pytest.mark.parametrize("headers", [{}, {"OCI_Filters_Applied": "artifactType"}])
def test_a_filter_is_asked_for_and_applied_here(server: Server, weak: RegistryClient, headers: dict[str, str]) -> None:
    answer = index(entry(1), entry(2, SIGNATURE), entry(3, "application/x"))
    server.faults = [("GET", r"\?artifactType=application%2Fvnd.example.signature$", page(answer, **headers))]
    assert digests(fetch(weak, "x", SUBJECT, SIGNATURE)) == [entry(2)["digest"]]


@pytest.mark.parametrize("said", [None, mediatypes.OCI_EMPTY])
def test_a_type_that_the_list_does_not_say_is_looked_up(server: Server, weak: RegistryClient, said: str | None) -> None:
    image = build_manifest(
        artifact_type=SIGNATURE,
        config=Descriptor.of(mediatypes.OCI_EMPTY, b"{}"),
        layers=(),
        annotations={"note": "found"},
    )
    server.manifests[image.digest] = image.raw
    listed = {**Descriptor(mediatypes.OCI_MANIFEST, image.digest, len(image.raw)).to_json(), "artifactType": said}
    if said is None:
        del listed["artifactType"]
    server.manifests[TAG] = index(listed, entry(1, None))
    (found,) = fetch(weak, "x", SUBJECT, SIGNATURE).descriptors
    assert (found.digest, found.annotations) == (image.digest, {"note": "found"})
    server.manifests[TAG] = index(*(entry(n, None) for n in range(200)))
    server.seen.clear()
    listing = fetch(weak, "x", SUBJECT, SIGNATURE)
    assert (listing.descriptors, listing.complete) == ((), False)
    assert len(server.asked("GET", "/manifests/sha256:")) == referrers.LOOKUPS_MAX


def test_what_does_not_name_its_subject_is_not_fetched(server: Server, weak: RegistryClient, layout: Layout) -> None:
    base = add(layout, "web:1")
    subject = base.descriptor()
    stranger = build_manifest(artifact_type=SBOM, config=Descriptor.of(mediatypes.OCI_EMPTY, b"{}"), layers=())
    another = build_manifest(
        artifact_type=SBOM,
        config=Descriptor.of(mediatypes.OCI_EMPTY, b"{}"),
        layers=(),
        subject=Descriptor(mediatypes.OCI_MANIFEST, of_bytes(b"another"), 1),
    )
    server.blobs[another.config.digest] = b"{}"
    gone = build_manifest(
        artifact_type=SBOM,
        config=Descriptor("application/x", of_bytes(b"gone"), 4),
        layers=(),
        subject=subject,
    )
    huge = build_manifest(
        artifact_type=SBOM,
        config=Descriptor("application/x", of_bytes(b"huge"), attach.PULLED_BYTES_MAX + 1),
        layers=(),
        subject=subject,
    )
    for image in (stranger, another, gone, huge):
        server.manifests[image.digest] = image.raw
    listed = [image.as_referrer().to_json() for image in (stranger, another, gone, huge)]
    server.manifests[fallback_tag(base.digest)] = index(*listed, entry(1))
    assert attach.pull_referrers(layout, weak, "x", base.digest) == ([], 5)
    assert [e.name for e in layout.entries()] == ["web:1"]
    assert server.asked("GET", f"/blobs/{of_bytes(b'huge')}") == []


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def ovm(tmp_path: Path) -> Ovm:
    (tmp_path / "home").mkdir()
    return Ovm(tmp_path / "root", tmp_path / "home")


@ONE
def test_the_tree_of_a_registry(
    ovm: Ovm, layout: Layout, client: RegistryClient, ref: Reference, base: ImageManifest, sbom: Path
) -> None:
    attached = ovm.ok("attach", sbom, ref, "--type", SBOM, "--annotation", "note=hello", "--json").json
    assert (attached["subject"], attached["artifact_type"], attached["pushed"]) == (base.digest, SBOM, True)
    first = attached["digest"]
    pinned = f"{ref.name}@{first}"
    second = ovm.ok("attach", sbom, pinned, "--type", "text/plain", "--artifact-type", SIGNATURE).out.strip()
    value = ovm.ok("referrers", ref, "--json").json
    assert (value["digest"], value["complete"]) == (base.digest, True)
    (node,) = value["referrers"]
    assert (node["digest"], node["artifact_type"], node["annotations"]["note"]) == (first, SBOM, "hello")
    assert node["created"].endswith("Z")
    assert [child["digest"] for child in node["referrers"]] == [second]
    assert ovm.ok("referrers", ref, "--json", "--type", SIGNATURE).json["referrers"] == []
    assert ovm.ok("referrers", ref, "--json", "--depth", "1").json["referrers"][0]["referrers"] == []
    lines = ovm.ok("referrers", ref).out.splitlines()
    assert lines[0] == f"{ref}@{base.digest}"
    assert lines[1].startswith(f"└── {SBOM}  {first}  ")
    assert lines[2] == "    │   note: hello"
    assert lines[3].startswith(f"    └── {SIGNATURE}  {second}  ")
    assert ovm("referrers", ref, "--local").code == 4
    assert ovm("referrers", replace(ref, tag="none")).code == 4
    assert ovm("referrers", ref, "--depth", "9").code == 2


def test_hostile_words_do_not_reach_the_terminal(ovm: Ovm, server: Server, tmp_path: Path) -> None:
    top = server.serve_artifact({}, (mediatypes.MANIFEST, b"{}"))
    words = "\x1b]0;owned\x07\u202e\n" + "x" * 5000
    listed = entry(1, words, annotations={words: words, mediatypes.CREATED_ANNOTATION: words})
    server.manifests[fallback_tag(Digest(top))] = index(listed)
    out = ovm.ok("referrers", f"{server.host}/x:1").out
    assert "owned" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert len(out.splitlines()) == 3
    assert len(out) < 2000
    assert "\x1b" not in ovm.ok("referrers", f"{server.host}/x:1", "--json").out


@ONE
def test_attach_and_push_what_is_local(ovm: Ovm, client: RegistryClient, ref: Reference, sbom: Path) -> None:
    store = Layout(ovm.root / "store")
    image = add(store, ref)
    added = ovm.ok("attach", sbom, ref, "--local", "--type", SBOM, "--json").json
    assert not added["pushed"]
    assert [e["name"] for e in ovm.ok("ls", "--json").json] == [str(ref)]
    assert [r["digest"] for r in ovm.ok("referrers", ref, "--local", "--json").json["referrers"]] == [added["digest"]]
    assert ovm.ok("push", ref, "--referrers", "--json").json["referrers"] == [added["digest"]]
    assert digests(fetch(client, ref.repository, image.digest)) == [added["digest"]]
    ovm.ok("attach", sbom, ref, "--local", "--type", SBOM, "--annotation", "n=2")
    assert ovm.ok("rmi", added["digest"]).out == f"removed {added['digest']}\n"
    assert len(ovm.ok("referrers", ref, "--local", "--json").json["referrers"]) == 1
    ovm.ok("rmi", ref)
    assert list(store.blob_dir.iterdir()) == []


@pytest.mark.parametrize("annotation", ["x", "=x", ""])
def test_an_annotation_that_is_none(ovm: Ovm, sbom: Path, annotation: str) -> None:
    done = ovm("attach", sbom, "web:1", "--type", SBOM, "--annotation", annotation)
    assert done.code == 2
    assert "KEY=VALUE" in done.err
