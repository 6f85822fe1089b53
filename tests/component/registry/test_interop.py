"""Stock skopeo, oras and crane on our artifacts, and we on theirs, against two real registries: byte for byte."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
from support import artifacts, tools
from support.cli import Ovm
from support.registry import ReferrersRegistry, Registry

from ovms.artifact import model
from ovms.oci import referrers, transfer
from ovms.oci import registry as registry_module
from ovms.oci.descriptor import Descriptor
from ovms.oci.http import Answer, Broken
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, hex_of, of_bytes

TOOLS = ("skopeo", "oras", "crane")
DISK = os.urandom(400 << 10) + bytes(1 << 20) + os.urandom(512)
CHUNK = 64 << 10

each_tool = pytest.mark.parametrize("tool", TOOLS)


@dataclass(frozen=True)
class Made:
    """A store with an artifact (``web:1``), and a snapshot of it (``web:snap``)."""

    ovm: Ovm
    base: model.Artifact
    snapshot: model.Artifact

    @property
    def layout(self) -> Layout:
        return Layout(self.ovm.root / "store")

    def push(self, artifact: model.Artifact, to: str) -> None:
        reference = Reference.parse(to)
        assert reference.registry is not None
        with RegistryClient(reference.registry) as client:
            transfer.push(self.layout, client, reference, artifact.digest)

    def is_in(self, blob_dir: Path, artifact: model.Artifact) -> None:
        """Every byte of an artifact is there."""
        for digest in self.layout.reachable(artifact.digest):
            assert (blob_dir / hex_of(digest)).read_bytes() == self.layout.path(digest).read_bytes()


def an_ovm(directory: Path) -> Ovm:
    for name in ("root", "home"):
        (directory / name).mkdir(parents=True)
    return Ovm(directory / "root", directory / "home")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("made")
    ovm = an_ovm(directory)
    project = directory / "project"
    artifacts.write_inputs(project)
    (project / "base.img").write_bytes(DISK)
    ovm.ok("build", artifacts.write_manifest(project, ramSnapshot=None), "-t", "web:1")
    ovm.ok("build", artifacts.write_manifest(project, version="snap"), "-t", "built:snap")
    layout = Layout(ovm.root / "store")
    base, built = (model.load(layout, ovm_digest(layout, name)) for name in ("web:1", "built:snap"))
    # what 'ovm snapshot' adds to it
    value = {**json.loads(built.image.raw), "subject": base.image.descriptor().to_json()}
    digest = layout.add_bytes(strictjson.canonical(value))
    snapshot = model.load(layout, digest)
    layout.set_name("web:snap", snapshot.image.descriptor())
    return Made(ovm, base, snapshot)


def ovm_digest(layout: Layout, name: str) -> Digest:
    found = layout.find(name)
    assert found is not None
    return found.digest


@pytest.fixture
def fresh(tmp_path: Path) -> Ovm:
    """Another user's ovm, with an empty store."""
    return an_ovm(tmp_path / "fresh")


@pytest.fixture
def client(each_registry: Registry) -> Iterator[RegistryClient]:
    with RegistryClient(each_registry.host, backoff=0.01) as client:
        yield client


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return f"t/{hex_of(of_bytes(request.node.name.encode()))[:12]}"


def pull(layout: Layout, name: str) -> None:
    reference = Reference.parse(name)
    assert reference.registry is not None
    with RegistryClient(reference.registry) as client:
        transfer.pull(layout, client, reference)


def copy(tool: str, source: str, target: str, home: Path) -> None:
    if tool == "skopeo":
        options = ("-q", "--all", "--src-tls-verify=false", "--dest-tls-verify=false")
        tools.run(tool, "copy", *options, f"docker://{source}", f"docker://{target}", home=home)
    elif tool == "oras":
        tools.run(tool, "copy", "--from-plain-http", "--to-plain-http", source, target, home=home)
    else:
        tools.run(tool, "copy", "--insecure", source, target, home=home)


# --- our artifacts in their hands ------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-21", "OCI-23")
@each_tool
def test_a_tool_copies_between_registries_and_we_pull_the_copies(
    tool: str, registry: Registry, each_registry: Registry, made: Made, fresh: Ovm, repository: str
) -> None:
    first = f"{registry.host}/{repository}-a:snap"
    there = f"{each_registry.host}/{repository}-b:snap"
    back = f"{registry.host}/{repository}-c:snap"
    # oras takes subjects along, and wants to find them
    for name, to in (("web:1", f"{registry.host}/{repository}-a:1"), ("web:snap", first)):
        made.ovm.ok("tag", name, to)
        made.ovm.ok("push", to)
    copy(tool, first, there, fresh.home)
    copy(tool, there, back, fresh.home)
    for name in (there, back):
        fresh.ok("pull", name)
        assert fresh.ok("inspect", "--raw", name).out.encode() == made.snapshot.image.raw
        made.is_in(fresh.root / "store" / "blobs" / "sha256", made.snapshot)


@each_tool
def test_a_tool_fetches_what_we_pushed_into_a_layout(
    tool: str, each_registry: Registry, made: Made, repository: str, tmp_path: Path
) -> None:
    source, target = f"{each_registry.host}/{repository}:1", tmp_path / "layout"
    made.push(made.base, source)
    if tool == "skopeo":
        tools.run(tool, "copy", "-q", "--src-tls-verify=false", f"docker://{source}", f"oci:{target}:1", home=tmp_path)
    elif tool == "oras":
        tools.run(tool, "copy", "--from-plain-http", "--to-oci-layout", source, f"{target}:1", home=tmp_path)
    else:
        tools.run(tool, "pull", "--insecure", "--format=oci", source, target, home=tmp_path)
    (entry,) = json.loads((target / "index.json").read_text())["manifests"]
    assert entry["digest"] == made.base.digest
    made.is_in(target / "blobs" / "sha256", made.base)


@pytest.mark.spec("OCI-23")
@each_tool
def test_a_tool_pushes_from_our_store_and_we_pull_it(
    tool: str, each_registry: Registry, made: Made, layout: Layout, repository: str, tmp_path: Path
) -> None:
    store, target = made.layout.root, f"{each_registry.host}/{repository}:1"
    if tool == "skopeo":
        where = f"oci:{store}:web:1"
        tools.run(tool, "copy", "-q", "--dest-tls-verify=false", where, f"docker://{target}", home=tmp_path)
    elif tool == "oras":
        where = f"{store}@{made.base.digest}"
        tools.run(tool, "copy", "--from-oci-layout", "--to-plain-http", where, target, home=tmp_path)
    else:
        # it pushes the one image of a layout, and takes no name
        single = Layout(tmp_path / "single")
        made.push(made.base, f"{each_registry.host}/{repository}-shelf:1")
        pull(single, f"{each_registry.host}/{repository}-shelf:1")
        tools.run(tool, "push", "--insecure", single.root, target, home=tmp_path)
    pull(layout, target)
    made.is_in(layout.blob_dir, made.base)
    assert ovm_digest(layout, target) == made.base.digest


@pytest.mark.spec("OCI-16", "OCI-17")
@each_tool
def test_an_index_with_platforms(
    tool: str,
    each_registry: Registry,
    client: RegistryClient,
    made: Made,
    layout: Layout,
    repository: str,
    tmp_path: Path,
) -> None:
    source, target = (f"{each_registry.host}/{repository}{suffix}:all" for suffix in ("", "-copy"))
    made.push(made.base, f"{each_registry.host}/{repository}:1")
    made.push(made.snapshot, f"{each_registry.host}/{repository}:2")
    entries = [
        {**artifact.image.descriptor().to_json(), "platform": {"os": "linux", "architecture": architecture}}
        for artifact, architecture in ((made.snapshot, "arm64"), (made.base, "amd64"))
    ]
    raw = strictjson.canonical({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": entries})
    client.put_manifest(repository, "all", raw, mediatypes.OCI_INDEX)
    copy(tool, source, target, tmp_path)
    copied, _ = client.get_manifest(Reference.parse(target))
    if tool != "skopeo":  # 1.9 writes an index anew, in its own words, and leaves out what it does not know
        assert copied == raw
    kept = [(e["digest"], e["size"], e["platform"]) for e in json.loads(copied)["manifests"]]
    assert kept == [(e["digest"], e["size"], e["platform"]) for e in entries]
    pull(layout, target)
    assert ovm_digest(layout, target) == of_bytes(copied)
    made.is_in(layout.blob_dir, made.base)
    assert layout.size(made.snapshot.digest) is None


# --- theirs in ours --------------------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-4", "OCI-5")
@pytest.mark.parametrize("typed", [True, False], ids=["with media types", "without"])
def test_what_oras_pushes_is_an_artifact(
    each_registry: Registry, typed: bool, fresh: Ovm, repository: str, tmp_path: Path
) -> None:
    artifacts.write_inputs(tmp_path)
    files = {"vmlinuz": mediatypes.KERNEL, "base.img": mediatypes.DISK_LAYER}
    digests = {name: of_bytes((tmp_path / name).read_bytes()) for name in files}
    artifacts.write_manifest(
        tmp_path,
        kernel={"ref": digests["vmlinuz"]},
        diskLayers=[{"ref": digests["base.img"], "format": "raw"}],
        initrd=None,
        ramSnapshot=None,
        bootstrap=None,
    )
    target = f"{each_registry.host}/{repository}:1"
    given = [f"{name}:{media_type}" if typed else name for name, media_type in files.items()]
    tools.run(
        "oras",
        "push",
        "--plain-http",
        f"--artifact-type={mediatypes.MANIFEST}",
        target,
        f"ovms.json:{mediatypes.MANIFEST}",
        *given,
        home=tmp_path,
    )
    assert "valid" in fresh.ok("validate", target).out
    fresh.ok("pull", target)
    layout = Layout(fresh.root / "store")
    for name, digest in digests.items():
        assert layout.path(digest).read_bytes() == (tmp_path / name).read_bytes()
    raw = tools.run("oras", "manifest", "fetch", "--plain-http", target, home=tmp_path)
    assert fresh.ok("inspect", "--raw", target).out.encode() == raw


# --- referrers -------------------------------------------------------------------------------------------------------


def discovered(ref: str, home: Path) -> list[str]:
    value = json.loads(tools.run("oras", "discover", "--plain-http", "--format=json", "--depth=1", ref, home=home))
    return [entry["digest"] for entry in value.get("referrers") or value.get("manifests") or []]


def fallback_tags(registry: Registry, repository: str, home: Path) -> list[str]:
    tags = tools.run("crane", "ls", "--insecure", f"{registry.host}/{repository}", home=home).decode().split()
    return [tag for tag in tags if tag.startswith("sha256-")]


@pytest.mark.spec("OCI-19", "OCI-20")
def test_what_oras_attaches_and_what_we_push_stand_side_by_side(
    each_registry: Registry, client: RegistryClient, made: Made, repository: str, tmp_path: Path
) -> None:
    name = f"{each_registry.host}/{repository}"
    made.push(made.base, f"{name}:1")
    (tmp_path / "note.txt").write_text("noted")
    argv = ("attach", "--plain-http", "--artifact-type=text/x-note", f"{name}:1", "note.txt:text/plain")
    tools.run("oras", *argv, home=tmp_path)
    (theirs,) = referrers.fetch(client, repository, made.base.digest).descriptors
    raw, _ = client.get_manifest(Reference(each_registry.host, repository, None, theirs.digest))
    assert json.loads(raw)["artifactType"] == "text/x-note"
    made.push(made.snapshot, f"{name}:snap")
    both = {theirs.digest, made.snapshot.digest}
    assert {d.digest for d in referrers.fetch(client, repository, made.base.digest).descriptors} == both
    assert set(discovered(f"{name}:1", tmp_path)) == both
    (tmp_path / "more.txt").write_text("more")
    tools.run("oras", *argv[:-1], "more.txt:text/plain", home=tmp_path)
    assert both < {d.digest for d in referrers.fetch(client, repository, made.base.digest).descriptors}
    tag = f"sha256-{hex_of(made.base.digest)}"
    assert fallback_tags(each_registry, repository, tmp_path) == ([] if each_registry.says_subject else [tag])
    if not each_registry.says_subject:
        index = json.loads(tools.run("crane", "manifest", "--insecure", f"{name}:{tag}", home=tmp_path))
        assert both < {entry["digest"] for entry in index["manifests"]}


@pytest.mark.spec("OCI-19", "OCI-20")
def test_a_registry_that_lists_referrers_and_does_not_say_so(made: Made, tmp_path: Path) -> None:
    registry = ReferrersRegistry(tmp_path / "registry", oci_subject=False)
    try:
        made.push(made.base, f"{registry.host}/web:1")
        made.push(made.snapshot, f"{registry.host}/web:snap")
        with RegistryClient(registry.host) as client:
            (found,) = referrers.fetch(client, "web", made.base.digest).descriptors  # by the API and by the tag: once
        assert found.digest == made.snapshot.digest
        assert fallback_tags(registry, "web", tmp_path) == [f"sha256-{hex_of(made.base.digest)}"]
        assert discovered(f"{registry.host}/web:1", tmp_path) == [made.snapshot.digest]
    finally:
        registry.close()


# --- how bytes go ----------------------------------------------------------------------------------------------------


def add(layout: Layout, seed: bytes) -> tuple[Descriptor, bytes]:
    data = seed + os.urandom(5 * CHUNK + 17)
    return Descriptor.of("application/octet-stream", data), data


class Body:
    """Opens content, and notes where; *breaks* once, at that offset."""

    def __init__(self, data: bytes, breaks: int | None = None) -> None:
        self.data = data
        self.breaks = breaks
        self.opened: list[tuple[int, int]] = []

    def __call__(self, offset: int, size: int) -> IO[bytes]:
        if offset == self.breaks:
            self.breaks = None
            raise Broken("the line is cut")
        self.opened.append((offset, size))
        return io.BytesIO(self.data[offset : offset + size])


def arrived(each_registry: Registry, repository: str, descriptor: Descriptor, home: Path) -> bytes:
    return tools.run("crane", "blob", "--insecure", f"{each_registry.host}/{repository}@{descriptor.digest}", home=home)


@pytest.fixture
def small_chunks(client: RegistryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "CHUNKED_FROM", CHUNK)
    monkeypatch.setattr(client, "_chunk_size", CHUNK)


def test_an_upload_in_one_piece(
    each_registry: Registry, client: RegistryClient, layout: Layout, repository: str, tmp_path: Path
) -> None:
    descriptor, data = add(layout, b"whole")
    body = Body(data)
    client.push_blob(repository, descriptor, body)
    assert body.opened == [(0, len(data))]
    assert arrived(each_registry, repository, descriptor, tmp_path) == data


@pytest.mark.usefixtures("small_chunks")
def test_an_upload_in_chunks(
    each_registry: Registry, client: RegistryClient, layout: Layout, repository: str, tmp_path: Path
) -> None:
    descriptor, data = add(layout, b"chunks")
    body = Body(data)
    client.push_blob(repository, descriptor, body)
    assert [offset for offset, _ in body.opened] == list(range(0, len(data), CHUNK))
    assert arrived(each_registry, repository, descriptor, tmp_path) == data


@pytest.mark.usefixtures("small_chunks")
def test_an_upload_in_chunks_goes_on_where_it_broke(
    each_registry: Registry, client: RegistryClient, layout: Layout, repository: str, tmp_path: Path
) -> None:
    descriptor, data = add(layout, b"broken")
    body = Body(data, breaks=3 * CHUNK)
    client.push_blob(repository, descriptor, body)
    offsets = list(range(0, len(data), CHUNK))
    # go-containerregistry's does not tell how far an upload is: it begins anew
    expected = offsets[:3] + offsets if each_registry.has_referrers else offsets
    assert [offset for offset, _ in body.opened] == expected
    assert arrived(each_registry, repository, descriptor, tmp_path) == data


def test_a_mount_from_another_repository(
    each_registry: Registry, client: RegistryClient, layout: Layout, repository: str, tmp_path: Path
) -> None:
    descriptor, data = add(layout, b"mount")
    client.push_blob(f"{repository}-a", descriptor, Body(data))
    mounted = client.mount_blob(f"{repository}-b", descriptor.digest, f"{repository}-a")
    assert mounted is not each_registry.has_referrers
    if not mounted:  # the registry has begun an upload instead
        client.push_blob(f"{repository}-b", descriptor, Body(data))
    assert arrived(each_registry, f"{repository}-b", descriptor, tmp_path) == data


@pytest.fixture
def statuses(client: RegistryClient, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The status of every answer."""
    seen: list[int] = []
    original: Callable[..., Answer] = client._request

    def noted(*args: Any, **kwargs: Any) -> Answer:
        answer = original(*args, **kwargs)
        seen.append(answer.status)
        return answer

    monkeypatch.setattr(client, "_request", noted)
    return seen


@pytest.mark.parametrize("left", [1, CHUNK, 5 * CHUNK])
def test_a_range_of_a_blob(
    client: RegistryClient, layout: Layout, repository: str, statuses: list[int], left: int
) -> None:
    descriptor, data = add(layout, b"range")
    client.push_blob(repository, descriptor, Body(data))
    statuses.clear()
    assert b"".join(map(bytes, client.read_blob(repository, descriptor, len(data) - left))) == data[-left:]
    assert statuses == [206]


def test_a_pull_goes_on_where_another_ended(
    each_registry: Registry, client: RegistryClient, made: Made, repository: str, layout: Layout, statuses: list[int]
) -> None:
    name = Reference(each_registry.host, repository, "1")
    made.push(made.base, str(name))
    (layout.partial_dir / hex_of(of_bytes(DISK))).write_bytes(DISK[:300_000])
    transfer.pull(layout, client, name)
    assert statuses.count(206) == 1
    made.is_in(layout.blob_dir, made.base)
    assert list(layout.partial_dir.iterdir()) == []


def test_pushing_again_sends_nothing(
    each_registry: Registry, client: RegistryClient, made: Made, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = Reference(each_registry.host, repository, "1")
    transfer.push(made.layout, client, name, made.snapshot.digest)
    monkeypatch.setattr(client, "push_blob", None)
    transfer.push(made.layout, client, replace(name, tag="2"), made.snapshot.digest)
    assert client.get_manifest(replace(name, tag="2"))[0] == made.snapshot.image.raw
