"""Pull and push against Debian's docker-registry, with skopeo as the witness."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import artifacts
from support.cli import Ovm
from support.registry import Registry
from support.stores import damage

from ovms import fsutil
from ovms.artifact import model, resolve
from ovms.artifact.resolve import find
from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    DiskFull,
    ManifestInvalid,
    OvmsError,
    ReferenceNotFound,
    RegistryDenied,
    RegistryProtocol,
    RegistryUnreachable,
    StoreCorrupt,
    Unsupported,
)
from ovms.oci import transfer
from ovms.oci.collector import Needs, collect
from ovms.oci.credentials import Credential
from ovms.oci.descriptor import Descriptor, build_manifest
from ovms.oci.fsck import Uses, check
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.oci.repair import repair
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of, of_bytes

# user "ovms", password "secret"
HTPASSWD = "ovms:$2b$05$uwDRgmYX/c2utnTNTYEi0eUV4XvBC8y3JWDrQkQ.n5xI0H0ZNunAS\n"
KERNEL = b"\x7fKERNEL" * 1000
DISK = os.urandom(300_000) + bytes(1 << 20) + os.urandom(5)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "store")


@pytest.fixture
def other(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "other")


@pytest.fixture
def client(registry: Registry) -> Iterator[RegistryClient]:
    with RegistryClient(registry.host) as client:
        yield client


def make(layout: Layout, name: str, disk: bytes = DISK, *, subject: Descriptor | None = None) -> model.Artifact:
    """An artifact without a real kernel: transfer does not look into blobs."""
    return artifacts.of(layout, name, KERNEL, disk, subject=subject)


def reference(registry: Registry, request: pytest.FixtureRequest, tag: str = "1") -> Reference:
    repository = f"t/{abs(hash(request.node.name)) % 10**9}"
    return Reference(registry.host, repository, tag)


@pytest.fixture
def ref(registry: Registry, request: pytest.FixtureRequest) -> Reference:
    return reference(registry, request)


@pytest.mark.spec("OCI-21")
def test_there_and_back(layout: Layout, other: Layout, client: RegistryClient, ref: Reference) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, ref, artifact.digest)
    transfer.pull(other, client, ref)
    found = find(other, str(ref)).artifact
    assert found.digest == artifact.digest
    disk = other.path(of_bytes(DISK))
    assert disk.read_bytes() == DISK
    assert disk.stat().st_blocks * 512 < len(DISK) - (512 << 10)  # the zeroes are a hole
    transfer.pull(other, client, ref)
    transfer.push(layout, client, ref, artifact.digest)


@pytest.mark.spec("REF-3")
def test_by_digest(layout: Layout, other: Layout, client: RegistryClient, ref: Reference) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, ref, artifact.digest)
    pinned = replace(ref, tag=None, digest=artifact.digest)
    transfer.pull(other, client, pinned)
    assert find(other, str(pinned)).artifact.digest == artifact.digest


def test_what_is_here_is_not_fetched_again(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(layout, str(ref))
    transfer.push(layout, client, ref, first.digest)
    transfer.pull(other, client, ref)
    second = make(layout, str(ref), DISK + b"more")
    transfer.push(layout, client, replace(ref, tag="2"), second.digest)
    fetched: list[Digest] = []
    original = client.read_blob

    def noted(repository: str, descriptor: Descriptor, offset: int = 0) -> Iterator[memoryview]:
        fetched.append(descriptor.digest)
        return original(repository, descriptor, offset)

    monkeypatch.setattr(client, "read_blob", noted)
    transfer.pull(other, client, replace(ref, tag="2"))
    assert of_bytes(KERNEL) not in fetched
    assert len(fetched) == 2  # the manifest and the disk


@pytest.mark.spec("OCI-16", "OCI-17")
def test_an_index_is_followed_to_the_artifact_for_this_machine(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference
) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, replace(ref, tag="image"), artifact.digest)
    entry = artifact.image.descriptor().to_json()
    arm = {**entry, "digest": of_bytes(b"arm"), "platform": {"os": "linux", "architecture": "arm64"}}
    mine = {**entry, "platform": {"os": "linux", "architecture": "amd64"}}
    index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [arm, mine]}
    # the registry refuses an index that names a manifest which it does not have
    index["manifests"] = [mine]
    client.put_manifest(ref.repository, "1", strictjson.canonical(index), mediatypes.OCI_INDEX)
    transfer.pull(other, client, ref)
    assert find(other, str(ref)).artifact.digest == artifact.digest
    descriptor = other.find(str(ref))
    assert descriptor is not None
    assert descriptor.media_type == mediatypes.OCI_INDEX
    transfer.push(other, client, replace(ref, tag="again"), descriptor.digest)


def test_an_index_that_is_not_whole_here(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {arch: make(layout, f"{arch}:1", arch.encode()) for arch in ("amd64", "arm64")}
    for arch, artifact in made.items():
        transfer.push(layout, client, replace(ref, tag=arch), artifact.digest)
    index = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_INDEX,
        "manifests": [
            {**artifact.image.descriptor().to_json(), "platform": {"os": "linux", "architecture": arch}}
            for arch, artifact in made.items()
        ],
    }
    client.put_manifest(ref.repository, "1", strictjson.canonical(index), mediatypes.OCI_INDEX)
    transfer.pull(other, client, ref)
    descriptor = other.find(str(ref))
    assert descriptor is not None
    transfer.push(other, client, replace(ref, tag="again"), descriptor.digest)  # the other platform's is there
    monkeypatch.setattr(client, "_backoff", 60)  # nobody waits for what will not come
    elsewhere = Reference(ref.registry, f"{ref.repository}/elsewhere", "1")
    with pytest.raises(BlobNotFound, match=made["arm64"].digest) as caught:
        transfer.push(other, client, elsewhere, descriptor.digest)
    assert caught.value.hint == f"push what is here by itself: 'ovm push {made['amd64'].digest} {elsewhere}'"
    transfer.push(other, client, elsewhere, made["amd64"].digest)


@pytest.mark.parametrize("kind", ["manifest", "manifest.list"])
def test_what_docker_pushes_is_called_by_its_name(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, kind: str
) -> None:
    artifact = make(layout, "x:1")
    transfer.push(layout, client, ref, artifact.digest)
    docker = "application/vnd.docker.distribution"
    config = {**artifact.image.config.to_json(), "mediaType": "application/vnd.docker.container.image.v1+json"}
    image = strictjson.canonical(
        {"schemaVersion": 2, "mediaType": f"{docker}.manifest.v2+json", "config": config, "layers": []}
    )
    client.put_manifest(ref.repository, "1", image, f"{docker}.manifest.v2+json")
    if kind == "manifest.list":
        platform = {"os": "linux", "architecture": "amd64"}
        child = {
            "mediaType": f"{docker}.manifest.v2+json",
            "digest": of_bytes(image),
            "size": len(image),
            "platform": platform,
        }
        listing = {"schemaVersion": 2, "mediaType": f"{docker}.manifest.list.v2+json", "manifests": [child]}
        client.put_manifest(ref.repository, "1", strictjson.canonical(listing), f"{docker}.manifest.list.v2+json")
    with pytest.raises(RegistryProtocol, match=f"of the type '{docker}.{kind}.v2.json'"):
        transfer.pull(other, client, ref)


@pytest.mark.spec("OCI-4", "GEN-3")
def test_a_container_image_is_refused(layout: Layout, other: Layout, client: RegistryClient, ref: Reference) -> None:
    config = layout.add_bytes(b"{}")
    image = build_manifest(
        artifact_type="application/vnd.oci.image.config.v1+json",
        config=Descriptor("application/vnd.oci.image.config.v1+json", config, 2),
        layers=(),
    )
    layout.add_bytes(image.raw)
    transfer.push(layout, client, ref, image.digest)
    with pytest.raises(Unsupported, match="no OVMS artifact"):
        transfer.pull(other, client, ref)
    assert other.entries() == []


def test_an_unknown_name(other: Layout, client: RegistryClient, ref: Reference) -> None:
    with pytest.raises(ReferenceNotFound):
        transfer.pull(other, client, ref)


def test_a_registry_that_is_down(other: Layout) -> None:
    with RegistryClient("127.0.0.1:1", backoff=0.01) as client, pytest.raises(RegistryUnreachable, match="refused"):
        transfer.pull(other, client, Reference.parse("127.0.0.1:1/x:1"))


def test_too_little_disk_is_said_before_the_first_blob(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.push(layout, client, ref, make(layout, str(ref)).digest)
    monkeypatch.setattr(fsutil, "free_space", lambda path: 1 << 20)
    monkeypatch.setattr(client, "read_blob", None)
    with pytest.raises(DiskFull):
        transfer.pull(other, client, ref)


@pytest.mark.spec("OCI-21", "OCI-22", "GEN-3")
def test_a_blob_that_the_registry_has_changed(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, registry: Registry
) -> None:
    disk = b"\x01" + os.urandom(1000)
    artifact = make(layout, str(ref), disk)
    transfer.push(layout, client, ref, artifact.digest)
    digits = hex_of(of_bytes(disk))
    stored = registry.directory / "data/docker/registry/v2/blobs/sha256" / digits[:2] / digits / "data"
    stored.write_bytes(b"\x02" + disk[1:])
    with pytest.raises(DigestMismatch):
        transfer.pull(other, client, ref)
    assert other.entries() == []
    assert other.size(of_bytes(disk)) is None
    assert list(other.staging_root.iterdir()) == []


def test_a_store_that_has_lost_a_blob(layout: Layout, client: RegistryClient, ref: Reference) -> None:
    disk = os.urandom(100)
    artifact = make(layout, str(ref), disk)
    layout.path(of_bytes(disk)).unlink()
    with pytest.raises(BlobNotFound):
        transfer.push(layout, client, ref, artifact.digest)
    with pytest.raises(ReferenceNotFound):
        client.get_manifest(ref)


@pytest.mark.spec("OCI-20")
def test_a_snapshot_is_found_by_its_base(
    layout: Layout, client: RegistryClient, ref: Reference, registry: Registry
) -> None:
    base = make(layout, str(ref))
    transfer.push(layout, client, ref, base.digest)
    for i in range(2):
        child = make(layout, "snap", DISK + bytes([i]), subject=base.image.descriptor())
        for _ in range(2):  # pushing again adds nothing
            transfer.push(layout, client, replace(ref, tag=f"snap{i}"), child.digest)
    path = f"{ref.repository}/manifests/sha256-{hex_of(base.digest)}"
    index = json.loads(registry.get(path, mediatypes.OCI_INDEX))
    assert [entry["artifactType"] for entry in index["manifests"]] == [mediatypes.MANIFEST] * 2


class Given:
    def __init__(self, credential: Credential | None) -> None:
        self.credential = credential

    def get(self, host: str, repository: str) -> Credential | None:
        return self.credential


def test_a_registry_that_asks_for_a_password(layout: Layout, other: Layout, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry", htpasswd=HTPASSWD)
    try:
        name = Reference(registry.host, "t/x", "1")
        artifact = make(layout, str(name))
        for wrong in (None, Credential("ovms", "wrong")):
            with RegistryClient(registry.host, credentials=Given(wrong)) as client, pytest.raises(RegistryDenied):
                transfer.push(layout, client, name, artifact.digest)
        with RegistryClient(registry.host, credentials=Given(Credential("ovms", "secret"))) as client:
            transfer.push(layout, client, name, artifact.digest)
            transfer.pull(other, client, name)
    finally:
        registry.close()


skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed: run 'make setup'")


def run_skopeo(*arguments: object) -> bytes:
    return subprocess.run(
        ["skopeo", *map(str, arguments)], check=True, capture_output=True, timeout=60
    ).stdout  # fmt: skip


@skopeo
def test_skopeo_reads_what_we_push(layout: Layout, client: RegistryClient, ref: Reference, tmp_path: Path) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, ref, artifact.digest)
    assert run_skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{ref}") == artifact.image.raw
    run_skopeo("copy", "--preserve-digests", "--src-tls-verify=false", f"docker://{ref}", f"dir:{tmp_path / 'copy'}")
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == artifact.image.raw


@pytest.mark.spec("OCI-23")
@skopeo
def test_skopeo_copies_from_the_local_store_and_we_pull_it(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference
) -> None:
    artifact = make(layout, str(ref))
    source = f"oci:{layout.root}:{ref}"
    assert run_skopeo("inspect", "--raw", source) == artifact.image.raw
    run_skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", source, f"docker://{ref}")
    transfer.pull(other, client, ref)
    assert find(other, str(ref)).artifact.digest == artifact.digest


@pytest.mark.spec("OCI-23")
@skopeo
def test_skopeo_reads_the_store_after_a_clean_up_and_a_repair(layout: Layout, ref: Reference) -> None:
    artifact = make(layout, str(ref))
    make(layout, "other:1", DISK + b"other")
    make(layout, "gone:1", DISK + b"more")
    damage(layout, make(layout, "lost:1", DISK + b"lost").digest)
    source = f"oci:{layout.root}:{ref}"

    def readable() -> bool:
        return run_skopeo("inspect", "--raw", source) == artifact.image.raw

    layout.remove_name("gone:1")
    assert collect(layout, Needs).broken
    assert readable()
    assert not repair(layout, Uses).sound
    assert readable()
    layout.remove_name("lost:1")
    assert collect(layout, Needs).items
    layout.index.write_bytes(b"damaged")
    assert repair(layout, Uses).sound
    assert readable()
    layout.index.write_bytes(b"damaged")
    layout.index_copy.unlink()
    assert repair(layout, Uses).sound  # now there are entries without a name
    layout.set_name(str(ref), artifact.image.descriptor())
    assert [entry.name for entry in layout.entries()] in (["", str(ref)], [str(ref), ""])
    assert readable()


@pytest.mark.spec("OCI-21", "OCI-22")
def test_after_a_repair_a_pull_fetches_what_is_missing_and_nothing_else(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, ref, artifact.digest)
    transfer.pull(other, client, ref)
    fetched: list[Digest] = []
    original = client.read_blob

    def noted(repository: str, descriptor: Descriptor, offset: int = 0) -> Iterator[memoryview]:
        fetched.append(descriptor.digest)
        return original(repository, descriptor, offset)

    monkeypatch.setattr(client, "read_blob", noted)
    for digest in (of_bytes(DISK), artifact.image.config.digest, artifact.digest):
        damage(other, digest)
        report = repair(other, Uses)
        assert f"ovm pull {ref}" in str([finding.hint for finding in report.findings])
        transfer.pull(other, client, ref)
        assert check(other, Uses).findings == []
        assert find(other, str(ref)).artifact.digest == artifact.digest
    assert fetched == [of_bytes(DISK), artifact.image.config.digest], "a manifest is no blob for a registry"


def spoil(layout: Layout, digest: Digest, how: str) -> None:
    """Puts something under a blob's name that is not of its size."""
    path = layout.path(digest)
    path.unlink()
    match how:
        case "cut":
            path.write_bytes(b"x" * 100)
        case "link":
            path.symlink_to("/dev/zero")
        case _:
            path.mkdir()


@pytest.mark.spec("OCI-21", "OCI-22")
@pytest.mark.parametrize("how", ["cut", "link", "directory"])
def test_a_blob_of_a_wrong_size_is_set_aside_and_fetched_anew(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, how: str
) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, ref, artifact.digest)
    resolve.pull(other, lambda _: client, str(ref))
    spoilt = (of_bytes(DISK), of_bytes(KERNEL), artifact.image.config.digest)
    for digest in spoilt:
        spoil(other, digest, how)
    assert resolve.pull(other, lambda _: client, str(ref)).artifact.digest == artifact.digest
    assert check(other, Uses).findings == []
    kept = sorted(path.name.partition(".")[0] for path in other.quarantine_dir.iterdir())
    assert kept == sorted(hex_of(digest) for digest in spoilt)


@pytest.mark.spec("OCI-21")
def test_a_manifest_that_lies_of_a_size_moves_nothing(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference
) -> None:
    artifact = make(layout, str(ref))
    transfer.push(layout, client, ref, artifact.digest)
    transfer.pull(other, client, ref)
    before = {path.name: path.stat().st_ino for path in other.blob_dir.iterdir()}
    layers = tuple(replace(layer, size=layer.size + 1) for layer in artifact.image.layers)
    liar = build_manifest(artifact_type=mediatypes.MANIFEST, config=artifact.image.config, layers=layers)
    lie = replace(ref, tag="lie")
    client.put_manifest(lie.repository, "lie", liar.raw, mediatypes.OCI_MANIFEST)
    with pytest.raises(DigestMismatch, match="its manifest says") as caught:
        transfer.pull(other, client, lie)
    assert "the manifest is wrong" in (caught.value.hint or "")
    assert {path.name: path.stat().st_ino for path in other.blob_dir.iterdir()} == before
    assert not other.quarantine_dir.exists()


@pytest.mark.spec("OCI-21", "OCI-22")
def test_a_damaged_blob_is_not_pushed(layout: Layout, client: RegistryClient, ref: Reference) -> None:
    disk = os.urandom(1000)
    artifact = make(layout, str(ref), disk)
    damage(layout, of_bytes(disk))
    with pytest.raises(StoreCorrupt, match="is damaged"):
        transfer.push(layout, client, ref, artifact.digest)
    with pytest.raises(ReferenceNotFound):
        client.get_manifest(ref)


def test_no_error_of_others_comes_out_of_a_pull_into_a_store_that_breaks(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.push(layout, client, ref, make(layout, str(ref)).digest)

    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ovms.fsutil.pwrite_all", full)
    with pytest.raises(OvmsError) as caught:
        transfer.pull(other, client, ref)
    assert caught.value.code == "disk-full"


@pytest.mark.spec("GEN-3", "OCI-6")
def test_manifests_that_disagree_cost_no_bulk_and_get_no_name(
    layout: Layout, other: Layout, client: RegistryClient, ref: Reference
) -> None:
    artifact = make(layout, str(ref))
    document = json.loads(layout.read(artifact.image.config.digest, "x", max_size=1 << 20))
    document["kernel"]["ref"] = "http://127.0.0.1:1/kernel"
    raw = json.dumps(document).encode()
    layout.add_bytes(raw)
    image = build_manifest(
        artifact_type=mediatypes.MANIFEST, config=Descriptor.of(mediatypes.MANIFEST, raw), layers=artifact.image.layers
    )
    layout.add_bytes(image.raw)
    transfer.push(layout, client, ref, image.digest)
    with pytest.raises(ManifestInvalid, match="does not fit"):
        resolve.pull(other, lambda _: client, str(ref))
    assert list(other.entries()) == []
    assert other.size(of_bytes(DISK)) is None


def test_one_command_pulls_several(registry: Registry, tmp_path: Path) -> None:
    mine, theirs = Ovm(tmp_path / "mine", tmp_path), Ovm(tmp_path / "theirs", tmp_path)
    names = [f"{registry.host}/several/{name}:1" for name in ("a", "b")]
    digests = [artifacts.small(Layout(tmp_path / "mine" / "store"), name).digest for name in names]
    for name in names:
        mine.ok("push", name)
    pulled = theirs.ok("pull", "--json", *names).json
    assert [(one["name"], one["digest"]) for one in pulled] == list(zip(names, digests, strict=True))
    lines = theirs.ok("pull", *names).out.split()
    assert lines == [f"{name}@{digest}" for name, digest in zip(names, digests, strict=True)]
    assert theirs.ok("pull", "--json", names[0]).json["name"] == names[0]

    refused = theirs("pull", *names, "-t", "c:1", "--json")
    assert (refused.code, refused.error["code"]) == (2, "usage")

    other = Ovm(tmp_path / "other", tmp_path)
    failed = other("pull", names[0], f"{registry.host}/several/none:1", names[1], "--json")
    assert (failed.code, failed.error["code"]) == (4, "reference-not-found")
    # what came before the one that failed stays
    assert names[0] in [one["name"] for one in other.ok("ls", "--json").json]


@pytest.mark.parametrize("command", ["pull", "push"])
def test_what_registries_answer_needs_no_library(
    registry: Registry, tmp_path: Path, ref: Reference, command: str
) -> None:
    """The standard library's HTTP takes a fifth of a pull's start to import: it is for answers that are not plain."""
    root = tmp_path / "root"
    artifact = artifacts.of_layers(Layout(root / "store"), str(ref), [b"disk %d" % i for i in range(20)])
    if command == "pull":
        Ovm(root, tmp_path).ok("push", str(ref))
        root = tmp_path / "other"
    script = (
        "import sys; from ovms.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'http.client', 'email', 'ssl', 'urllib3', 'asyncio'} & set(sys.modules); "
        "sys.exit(code or (f'imports {sorted(heavy)}' if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--root", root, command, str(ref)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert artifact.digest in done.stdout


@pytest.mark.parametrize("quiet", ["-q", "--quiet"])
def test_progress_can_be_left_out(registry: Registry, tmp_path: Path, ref: Reference, quiet: str) -> None:
    """As of ``docker pull``; also where it was asked for."""
    ovm, other = Ovm(tmp_path / "root", tmp_path), Ovm(tmp_path / "other", tmp_path)
    make(Layout(tmp_path / "root/store"), str(ref))
    assert "label" not in ovm.ok("--progress=json", "push", quiet, str(ref)).err
    assert other.ok("--progress=json", "pull", quiet, str(ref)).err == ""
    shutil.rmtree(tmp_path / "other")
    assert other.ok("--progress=json", "pull", str(ref)).err != ""
