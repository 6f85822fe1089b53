"""Places on disk between us, skopeo and a real registry, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import tools
from support.artifacts import write_inputs, write_manifest
from support.cli import OVM, Ovm
from support.registry import Registry

from ovms.artifact import resolve
from ovms.artifact.build import Builder
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes

skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed: run 'make setup'")


def run_skopeo(*arguments: object) -> bytes:
    return subprocess.run(["skopeo", *map(str, arguments)], check=True, capture_output=True, timeout=60).stdout


@pytest.fixture
def ovm(tmp_path: Path) -> Ovm:
    return Ovm(tmp_path / "root", tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Ovm:
    return Ovm(tmp_path / "other", tmp_path)


@pytest.fixture
def digest(ovm: Ovm, tmp_path: Path) -> str:
    """The artifact ``web:1`` in the store of *ovm*."""
    write_inputs(tmp_path)
    return str(
        ovm.ok("build", write_manifest(tmp_path, ramSnapshot=None), "-t", "web:1", "--no-provenance", "--json").json[
            "digest"
        ]
    )


def same_blobs(one: Path, two: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


@skopeo
def test_skopeo_reads_our_archives_and_directories(ovm: Ovm, digest: str, tmp_path: Path) -> None:
    archive, directory = f"oci-archive:{tmp_path / 'web.tar'}", f"oci:{tmp_path / 'layout'}"
    assert ovm.ok("push", "web:1", archive).out.strip() == f"{archive}:@{digest}"
    ovm.ok("push", "web:1", f"{directory}:registry.example/web:2")
    raw = ovm.ok("inspect", "--raw", "web:1").out.encode()
    for source in (archive, f"{archive}:web:1", f"{directory}:registry.example/web:2"):
        assert run_skopeo("inspect", "--raw", source) == raw
    run_skopeo("copy", "--preserve-digests", archive, f"{directory}:copy:1")
    run_skopeo("copy", "--preserve-digests", archive, f"oci:{tmp_path / 'fresh'}:x")
    store = ovm.root / "store/blobs/sha256"
    assert same_blobs(store, tmp_path / "layout/blobs/sha256")
    assert same_blobs(store, tmp_path / "fresh/blobs/sha256")
    # what skopeo has added stands beside what we have
    ovm.ok("push", "web:1", directory)
    index = json.loads((tmp_path / "layout/index.json").read_text())
    names = [entry["annotations"][mediatypes.REF_NAME_ANNOTATION] for entry in index["manifests"]]
    assert names == ["registry.example/web:2", "copy:1", "web:1"]


@skopeo
def test_we_read_what_skopeo_writes(ovm: Ovm, other: Ovm, digest: str, registry: Registry, tmp_path: Path) -> None:
    name = f"{registry.host}/places/web:1"
    answer = ovm.ok("push", "web:1", name, "--json").json
    assert answer == {"name": "web:1", "destination": name, "digest": digest, "signatures": []}
    assert ovm.ok("push", "web:1", name).out.strip() == f"{name}@{digest}"
    assert ovm.ok("push", "web:1", f"{name}@{digest}").out.strip() == f"{name}@{digest}"
    archive, directory = f"oci-archive:{tmp_path / 'web.tar'}", f"oci:{tmp_path / 'layout'}"
    for place in (f"{archive}:{name}", f"{directory}:{name}"):
        run_skopeo("copy", "--preserve-digests", "--src-tls-verify=false", f"docker://{name}", place)
    assert other.ok("pull", archive).out.strip() == f"{name}@{digest}"
    assert other.ok("pull", f"{directory}:{name}", "-t", "web:2", "--json").json["digest"] == digest
    assert same_blobs(ovm.root / "store/blobs/sha256", other.root / "store/blobs/sha256")
    assert {e["name"] for e in other.ok("ls", "--json").json} == {name, "web:2"}
    assert other.ok("validate", f"{directory}:{name}").out == f"{name}: artifact: valid\n"


def run_oras(home: Path, *arguments: object) -> bytes:
    return tools.run("oras", *arguments, home=home)


def test_oras_and_we_read_each_other(ovm: Ovm, other: Ovm, digest: str, registry: Registry, tmp_path: Path) -> None:
    layout, archive, name = tmp_path / "layout", tmp_path / "web.tar", f"{registry.host}/places/oras:1"
    ovm.ok("push", "web:1", f"oci-archive:{archive}:v1")
    ovm.ok("push", "web:1", f"oci:{layout}:v1")
    ovm.ok("push", "web:1", name)
    raw = ovm.ok("inspect", "--raw", "web:1").out.encode()
    for path in (layout, archive):
        assert run_oras(tmp_path, "manifest", "fetch", "--oci-layout", f"{path}:v1") == raw
    copy, backup = tmp_path / "copy", tmp_path / "backup.tar"
    run_oras(tmp_path, "cp", "--from-oci-layout", f"{archive}:v1", "--to-oci-layout", f"{copy}:v2")
    run_oras(tmp_path, "backup", "--plain-http", "--output", backup, name)
    for place, tag in ((f"oci:{copy}:v2", "a:1"), (f"oci-archive:{backup}", "b:1")):
        assert other.ok("pull", place, "-t", tag).out.strip() == f"{tag}@{digest}"
    assert same_blobs(ovm.root / "store/blobs/sha256", other.root / "store/blobs/sha256")


def test_the_command_line_says_what_is_wrong(ovm: Ovm, digest: str, tmp_path: Path) -> None:
    directory = f"oci:{tmp_path / 'layout'}"
    ovm.ok("push", "web:1", f"{directory}:a")
    ovm.ok("push", "web:1", f"{directory}:b")
    for arguments, code, said in (
        (("pull", f"{directory}:c"), 4, "it holds 'a', 'b'"),
        (("pull", directory), 3, "-t NAME:TAG"),
        (("inspect", f"{directory}:a"), 3, "copies what is there"),
        (("push", f"{directory}:a", "oci:x"), 3, "where a name is needed"),
        (("rmi", f"{directory}:a"), 3, "where a name is needed"),
        (("pull", "oci:none"), 3, "check the path"),
        (("pull", directory, "-t", "oci:1"), 3, "place on disk"),
        (("tag", "web:1", "oci:1"), 3, "place on disk"),
        (("pull", directory, "--platform", "amd64"), 2, "OS/ARCH"),
        (("run", "--platform", "linux/arm64", f"{directory}:a"), 3, "cannot be run here"),
        (("push", "web:1", "web:2"), 3, "names no registry"),
        (("push", "web:1", f"localhost:1/web@sha256:{'0' * 64}"), 3, "is not what is pushed"),
    ):
        done = ovm(*arguments)
        assert (done.code, done.out) == (code, ""), done.err
        assert said in done.err


def test_one_platform_of_an_index_after_the_other(registry: Registry, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    one, two = Layout(tmp_path / "one"), Layout(tmp_path / "two")
    entries = []
    for arch, name in (("aarch64", "arm64"), ("x86_64", "amd64")):
        artifact = Builder(one, None).build(  # type: ignore[arg-type]
            write_manifest(tmp_path, ramSnapshot=None, metadata={"platform": {"arch": arch}})
        )
        where = {"os": "linux", "architecture": name}
        entries.append({**artifact.image.descriptor().to_json(), "platform": where})
    raw = json.dumps({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": entries}).encode()
    top = Descriptor(mediatypes.OCI_INDEX, one.add_bytes(raw), len(raw))
    name = f"{registry.host}/places/multi:1"
    one.set_name(name, top)
    arm64 = Platform.parse("linux/arm64")
    with RegistryClient(registry.host) as client:
        resolve.push(one, lambda _: client, name)
        for platform, arch in ((arm64, "aarch64"), (None, "x86_64"), (arm64, "aarch64")):
            found = resolve.resolve(two, lambda _: client, name, platform=platform)
            assert found.artifact.manifest.metadata.platform.arch == arch
            assert two.find(name) == two.entries()[0].descriptor
            assert two.entries()[0].descriptor.digest == top.digest
    assert len(two.entries()) == 1


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, timeout=110)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.long
def test_memory_stays_flat(ovm: Ovm, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with (tmp_path / "base.img").open("r+b") as file:
        file.truncate(192 << 20)
    disks = [{"ref": "base.img", "format": "raw"}]
    ovm.ok("build", write_manifest(tmp_path, ramSnapshot=None, diskLayers=disks), "-t", "web:1")
    places = ("oci:layout", "oci-archive:web.tar")
    pushes: list[tuple[Ovm, tuple[str, ...]]] = [(ovm, ("push", "web:1", place)) for place in places]
    pulls = [(Ovm(tmp_path / f"root{i}", tmp_path), ("pull", place)) for i, place in enumerate(places)]
    for who, command in [*pushes, *pulls]:
        # From a small process in between: what a process counts begins with the size of the one that started it.
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, OVM, *command],
            cwd=tmp_path, env=who.env(), capture_output=True, check=True, timeout=120,
        )  # fmt: skip
        assert int(done.stdout) < 100 * 1024, "KiB"


def test_archives_of_tar_itself(ovm: Ovm, other: Ovm, digest: str, tmp_path: Path) -> None:
    ovm.ok("push", "web:1", f"oci:{tmp_path / 'layout'}")
    for format in ("ustar", "gnu", "pax"):
        file = tmp_path / f"{format}.tar"
        subprocess.run(
            ["tar", "-C", tmp_path / "layout", f"--format={format}", "-cf", file, "."], check=True, timeout=60
        )
        assert other.ok("pull", f"oci-archive:{file}").out.strip() == f"web:1@{digest}"
        other.ok("rmi", "web:1")
    subprocess.run([sys.executable, "-m", "gzip", tmp_path / "pax.tar"], check=True, timeout=60)
    done = other("pull", f"oci-archive:{tmp_path / 'pax.tar.gz'}")
    assert done.code == 3
    assert "gunzip" in done.err
