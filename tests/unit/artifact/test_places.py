"""Artifacts into directories and archives and out of them, and what others can put there to harm us."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.artifacts import write_inputs, write_manifest
from support.layouts import MARKER, archive, entry, files, index, member, write_archive, write_directory

from ovms.artifact import model, resolve
from ovms.artifact.build import Builder
from ovms.artifact.model import Artifact
from ovms.errors import (
    BlobNotFound,
    Conflict,
    DigestMismatch,
    DiskFull,
    FileProblem,
    InputError,
    OvmsError,
    ReferenceInvalid,
    ReferenceNotFound,
    StoreCorrupt,
    Unsupported,
)
from ovms.oci import collector, exporting
from ovms.oci.collector import Needs
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.platform import Platform
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of, of_bytes

ARM64 = Platform("linux", "arm64")
KINDS = ["oci", "oci-archive"]


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


def make(layout: Layout, directory: Path, name: str | None = "web:1", **changes: Any) -> Artifact:
    directory.mkdir(exist_ok=True)
    write_inputs(directory)
    return Builder(layout, no_registry).build(write_manifest(directory, ramSnapshot=None, **changes), name=name)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A store with the artifact ``web:1`` in it."""
    path = tmp_path_factory.mktemp("template")
    return path / "store", make(Layout(path / "store"), path / "inputs")


@pytest.fixture
def layout(tmp_path: Path, template: tuple[Path, Artifact]) -> Layout:
    shutil.copytree(template[0], tmp_path / "store")
    return Layout(tmp_path / "store")


@pytest.fixture
def built(template: tuple[Path, Artifact]) -> Artifact:
    return template[1]


@pytest.fixture
def other(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "other")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def push(layout: Layout, name: str, place: str) -> None:
    resolve.push(layout, no_registry, name, destination=place)


def pull(layout: Layout, place: str, **options: Any) -> resolve.Found:
    return resolve.pull(layout, no_registry, place, **options)


def blobs(layout: Layout) -> set[str]:
    return {path.name for path in layout.blob_dir.iterdir()}


def nothing_of_it(layout: Layout) -> None:
    """No name, no blob, nothing half done."""
    assert layout.entries() == []
    assert blobs(layout) == set()
    assert [*layout.staging_root.iterdir(), *layout.partial_dir.iterdir()] == []


def index_of(path: Path) -> list[Any]:
    return json.loads((path / "index.json").read_text())["manifests"]  # type: ignore[no-any-return]


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(layout: Layout, other: Layout, built: Artifact, kind: str) -> None:
    push(layout, "web:1", f"{kind}:x")
    found = pull(other, f"{kind}:x")
    assert found == resolve.Found("web:1", built)
    assert blobs(other) == blobs(layout)
    for blob in built.image.blobs:
        assert other.path(blob.digest).read_bytes() == layout.path(blob.digest).read_bytes()
        assert other.path(blob.digest).stat().st_mode & 0o777 == 0o444
    assert list(other.staging_root.iterdir()) == []
    assert pull(other, f"{kind}:x:web:1", name="mine:2").name == "mine:2"
    assert pull(other, f"{kind}:x:@{built.digest}").name == "web:1"


def test_the_same_artifact_gives_the_same_archive(layout: Layout, other: Layout, built: Artifact, here: Path) -> None:
    push(layout, "web:1", "oci-archive:a")
    pull(other, "oci-archive:a")
    time.sleep(0.01)
    os.umask(os.umask(0o077))
    push(other, built.digest[7:19], f"oci-archive:{here}/b")
    assert Path("a").read_bytes() == Path("b").read_bytes()
    with tarfile.open("a") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {m.mode for m in members if m.isreg()} == {0o644}
    push(layout, "web:1", "oci-archive:a:other")
    assert Path("a").read_bytes() != Path("b").read_bytes()
    assert sorted(os.listdir()) == ["a", "b"]


def test_holes_stay_holes(layout: Layout, other: Layout, tmp_path: Path) -> None:
    directory = tmp_path / "inputs"
    directory.mkdir()
    write_inputs(directory)
    with (directory / "base.img").open("r+b") as file:
        file.truncate(64 << 20)
    disk = [{"ref": "base.img", "format": "raw"}]
    Builder(layout, no_registry).build(
        write_manifest(directory, ramSnapshot=None, diskLayers=disk, bootstrap=None), name="web:1"
    )
    for place in ("oci:d", "oci-archive:a"):
        push(layout, "web:1", place)
    pull(other, "oci-archive:a")
    digest = next(d.digest for d in other.manifest(other.entries()[0].descriptor.digest).blobs if d.size == 64 << 20)  # type: ignore[union-attr]
    copies = [Path("a"), Path("d/blobs/sha256") / hex_of(digest), other.path(digest)]
    assert [path.stat().st_size >> 20 for path in copies] == [64, 64, 64]
    assert all(path.stat().st_blocks * 512 < 2 << 20 for path in copies)


def test_what_is_here_is_not_copied(layout: Layout, other: Layout, built: Artifact, here: Path) -> None:
    push(layout, "web:1", "oci:d")
    kernel = built.manifest.kernel
    assert kernel is not None
    other.add_bytes(layout.path(Digest(kernel.ref)).read_bytes())
    before = other.path(Digest(kernel.ref)).stat()
    (here / "d/blobs/sha256" / kernel.ref[7:]).unlink()
    pull(other, "oci:d")
    assert other.path(Digest(kernel.ref)).stat() == before


# --- export ----------------------------------------------------------------------------------------------------------


def test_a_directory_keeps_what_else_is_in_it(layout: Layout, built: Artifact, tmp_path: Path, here: Path) -> None:
    second = make(layout, tmp_path / "inputs", "db:1", version="2")
    foreign = {"mediaType": "application/x", "digest": of_bytes(b"?"), "size": 1, "data": "Pw==", "urls": ["x:y"]}
    value = {"schemaVersion": 2, "manifests": [foreign], "annotations": {"a": "b"}, "x": 1}
    write_directory(here / "d", {"oci-layout": MARKER, "index.json": json.dumps(value).encode(), "README": b"mine"})
    push(layout, "web:1", "oci:d")
    push(layout, "db:1", "oci:d")
    push(layout, "db:1", "oci:d:web:1")
    written = json.loads((here / "d/index.json").read_text())
    assert written["manifests"][0] == foreign
    assert (written["annotations"], written["x"]) == ({"a": "b"}, 1)
    names = [(e["annotations"][mediatypes.REF_NAME_ANNOTATION], e["digest"]) for e in written["manifests"][1:]]
    assert names == [("db:1", second.digest), ("web:1", second.digest)]
    assert (here / "d/README").read_bytes() == b"mine"
    assert (here / "d/oci-layout").read_bytes() == MARKER
    assert sorted(os.listdir(here / "d")) == ["README", "blobs", "index.json", "oci-layout"]


def test_an_artifact_without_a_name_is_written_without_one(layout: Layout, built: Artifact, here: Path) -> None:
    layout.remove_name("web:1")
    for _ in range(2):
        push(layout, built.digest, "oci:d")
    assert [e.get("annotations") for e in index_of(here / "d")] == [None]


def test_what_is_no_layout_is_left_alone(layout: Layout, built: Artifact, here: Path) -> None:
    write_directory(here / "d", {"precious": b"1"})
    Path("file").write_bytes(b"precious" * 1000)
    Path("tar").write_bytes(archive([member("precious", b"1")]))
    os.mkfifo("fifo")
    wrong: list[tuple[str, type[OvmsError]]] = [
        ("oci:d", Conflict), ("oci:file", FileProblem), (f"oci:{layout.root}", InputError), ("oci:file/x", FileProblem),
        ("oci-archive:file", Conflict), ("oci-archive:tar", Conflict), ("oci-archive:d", FileProblem),
        ("oci-archive:fifo", FileProblem), ("oci-archive:none/x", FileProblem), (f"oci:x:@{built.digest}", InputError),
        ("oci:", ReferenceInvalid),
    ]  # fmt: skip
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    for place, kind in wrong:
        with pytest.raises(kind) as caught:
            push(layout, "web:1", place)
        assert "\n" not in caught.value.message
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before
    assert sorted(os.listdir()) == ["d", "fifo", "file", "tar"]


def test_links_in_a_layout_lead_nowhere(layout: Layout, built: Artifact, here: Path) -> None:
    write_directory(here / "d", {"oci-layout": MARKER, "index.json": index()})
    (here / "elsewhere").mkdir()
    (here / "d/blobs").symlink_to(here / "elsewhere")
    with pytest.raises(FileProblem, match="link"):
        push(layout, "web:1", "oci:d")
    (here / "d/blobs").unlink()
    (here / "d/blobs/sha256").mkdir(parents=True)
    blob = here / "d/blobs/sha256" / hex_of(built.digest)
    blob.symlink_to(here / "elsewhere/x")
    (here / "d/index.json").unlink()
    (here / "d/index.json").symlink_to(here / "elsewhere/y")
    with pytest.raises(FileProblem, match="link"):
        push(layout, "web:1", "oci:d")
    (here / "d/index.json").unlink()
    push(layout, "web:1", "oci:d")
    assert list((here / "elsewhere").iterdir()) == []
    assert not blob.is_symlink()
    # what the user named may be a link
    Path("l").symlink_to("a")
    push(layout, "web:1", "oci-archive:a")
    push(layout, "web:1", "oci-archive:l:again")
    assert Path("l").is_symlink()


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_blob_does_not_get_out(layout: Layout, built: Artifact, kind: str, here: Path) -> None:
    path = layout.path(built.image.blobs[-1].digest)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(StoreCorrupt, match="is not what its name says") as caught:
        push(layout, "web:1", f"{kind}:x")
    assert "ovm fsck --repair" in (caught.value.hint or "")
    assert os.listdir() == []
    path.write_bytes(data[:-1])
    with pytest.raises(DigestMismatch):
        push(layout, "web:1", f"{kind}:x")
    path.unlink()
    with pytest.raises(BlobNotFound):
        push(layout, "web:1", f"{kind}:x")
    assert os.listdir() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(layout: Layout, built: Artifact, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ovms.fsutil.pwrite_all", full)
        patch.setattr("ovms.fsutil.reflink", lambda source, target: False)
        with pytest.raises(DiskFull):
            push(layout, "web:1", f"{kind}:x")
    assert os.listdir() == []
    with monkeypatch.context() as patch:
        patch.setattr("ovms.fsutil.SPACE_RESERVE", 1 << 60)
        with pytest.raises(DiskFull, match="needs"):
            push(layout, "web:1", f"{kind}:x")
    assert os.listdir() == []


def test_an_archive_is_replaced_whole_or_not_at_all(
    layout: Layout, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(layout, "web:1", "oci-archive:a")
    before = Path("a").read_bytes()

    def broken(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", broken)
        with pytest.raises(KeyboardInterrupt):
            push(layout, "web:1", "oci-archive:a:other")
    assert Path("a").read_bytes() == before
    assert os.listdir() == ["a"]


def test_orphans_of_killed_exports_are_swept(layout: Layout, built: Artifact, here: Path) -> None:
    push(layout, "web:1", "oci:d")
    names = [".ovms-a.0123.tmp", ".ovms-a.4567.tmp", ".ovms-a.89ab.tmp", ".ovms-other.0123.tmp"]
    for name in (*names, "d/.ovms-01.tmp", "d/blobs/sha256/.ovms-01.tmp"):
        Path(name).write_bytes(b"x")
    for name in (names[0], names[1], names[3]):
        os.utime(name, (1, 1))
    with Path(names[1]).open("rb") as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        push(layout, "web:1", "oci-archive:a")
    push(layout, "web:1", "oci:d")
    assert sorted(os.listdir()) == sorted([*names[1:], "a", "d"])
    assert list((here / "d").rglob(".*")) == []


def test_many_exports_to_one_directory(layout: Layout, tmp_path: Path, here: Path) -> None:
    names = [f"web:{i}" for i in range(6)]
    for name in names:
        make(layout, tmp_path / "inputs", name, version=name[4:])
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            push(layout, name, "oci:deep/er/d")
        except BaseException as exc:  # noqa: BLE001
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    said = [e["annotations"][mediatypes.REF_NAME_ANNOTATION] for e in index_of(here / "deep/er/d")]
    assert sorted(said) == names


def test_a_directory_that_failed_while_another_waited(
    layout: Layout, built: Artifact, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    """The first makes the directory, fails, and takes it away again; the second waited for its lock."""
    second: list[threading.Thread] = []

    def fail_once(self: Any, *args: Any) -> None:
        if second:
            return copy(self, *args)
        second.append(threading.Thread(target=push, args=(layout, "web:1", "oci:d")))
        second[0].start()
        time.sleep(0.1)
        raise StoreCorrupt("x")

    copy = exporting.Parts.copy
    monkeypatch.setattr("ovms.oci.exporting.Parts.copy", fail_once)
    with pytest.raises(StoreCorrupt):
        push(layout, "web:1", "oci:d")
    second[0].join(30)
    assert len(index_of(here / "d")) == 1


@pytest.mark.parametrize("place", ["oci:d", "oci-archive:a"])
def test_killed_at_any_time(layout: Layout, other: Layout, built: Artifact, place: str, here: Path) -> None:
    script = (
        "import sys, pathlib; from ovms.artifact import resolve; from ovms.oci.layout import Layout\n"
        "layout = Layout(pathlib.Path(sys.argv[1])); print(flush=True)\n"
        "for i in range(1000): resolve.push(layout, None, 'web:1', destination=f'{sys.argv[2]}:{i}')"
    )
    for delay in (0.001, 0.004, 0.02):
        process = subprocess.Popen([sys.executable, "-c", script, str(layout.root), place], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        push(layout, "web:1", f"{place}:web:1")
        assert pull(other, f"{place}:web:1").artifact.digest == built.digest


@pytest.mark.parametrize("place", ["oci:d", "oci-archive:a"])
def test_an_import_that_is_killed_at_any_time(layout: Layout, built: Artifact, place: str, tmp_path: Path) -> None:
    push(layout, "web:1", place)
    script = (
        "import sys, pathlib; from ovms.artifact import resolve; from ovms.oci.layout import Layout\n"
        "print(flush=True)\n"
        "for i in range(1000): resolve.pull(Layout(pathlib.Path(f'{sys.argv[1]}{i}')), None, sys.argv[2])"
    )
    for run, delay in enumerate((0.005, 0.02, 0.05)):
        root = tmp_path / f"run{run}-"
        process = subprocess.Popen([sys.executable, "-c", script, str(root), place], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        for path in tmp_path.glob(f"{root.name}*"):
            store = Layout(path)
            if store.entries():
                assert resolve.find(store, "web:1").artifact == built
                assert all(store.has(blob) for blob in built.image.blobs)
            assert all(of_bytes(blob.read_bytes())[7:] == blob.name for blob in store.blob_dir.iterdir())
            assert pull(store, place).artifact == built
            collector.collect(store, Needs)
            assert list(store.staging_root.iterdir()) == []


# --- names -----------------------------------------------------------------------------------------------------------


def test_which_artifact_of_several(layout: Layout, other: Layout, built: Artifact, tmp_path: Path, here: Path) -> None:
    second = make(layout, tmp_path / "inputs", None, version="2")
    one, two = entry(layout, built.digest, "web:1"), entry(layout, second.digest, "x")
    write_directory(here / "d", files(layout, one, two, entry(layout, built.digest)))
    with pytest.raises(InputError, match="may be one of several artifacts: 'web:1', 'x', '@sha256:") as caught:
        pull(other, "oci:d")
    assert caught.value.hint == "name one, as in oci:d:web:1"
    with pytest.raises(ReferenceNotFound, match=r"no artifact 'oci:d:y'") as missing:
        pull(other, "oci:d:y")
    assert (missing.value.hint or "").startswith("it holds 'web:1', 'x'")
    with pytest.raises(InputError, match="is called 'x', which is no whole name"):
        pull(other, "oci:d:x")
    nothing_of_it(other)
    assert pull(other, "oci:d:x", name="mine").name == "mine:latest"
    assert pull(other, f"oci:d:@{built.digest}").name == "web:1"
    write_directory(here / "e", files(layout))
    with pytest.raises(ReferenceNotFound) as missing:
        pull(other, "oci:e")
    assert missing.value.hint == "the layout is empty"
    write_directory(here / "f", files(layout, entry(layout, built.digest)))
    with pytest.raises(InputError, match="has no name"):
        pull(other, "oci:f")


def test_a_name_in_a_file_takes_no_other_artifacts_name(
    layout: Layout, other: Layout, built: Artifact, tmp_path: Path
) -> None:
    push(layout, "web:1", "oci-archive:a")
    mine = make(other, tmp_path / "inputs", version="2")
    with pytest.raises(Conflict, match="another artifact here") as caught:
        pull(other, "oci-archive:a")
    assert "-t web:1" in (caught.value.hint or "")
    assert resolve.find(other, "web:1").artifact == mine
    found = resolve.resolve(other, no_registry, "oci-archive:a")
    assert found == resolve.Found(built.digest, built)
    assert resolve.find(other, "web:1").artifact == mine
    assert pull(other, "oci-archive:a", name="web:1").artifact == built
    assert resolve.find(other, "web:1").artifact == built
    for name in ("oci:1", "W", f"web@{built.digest}"):
        with pytest.raises(InputError):
            pull(other, "oci-archive:a", name=name)


def test_resolve(layout: Layout, other: Layout, built: Artifact) -> None:
    push(layout, "web:1", "oci:d:x")
    with pytest.raises(ReferenceNotFound, match="not in the local store"):
        resolve.resolve(other, no_registry, "oci:d:x", policy="never")
    nothing_of_it(other)
    with other.using():
        assert resolve.resolve(other, no_registry, "oci:d:x") == resolve.Found(built.digest, built)
        assert resolve.resolve(other, no_registry, "oci:d", policy="never").artifact == built
    assert other.entries() == []
    push(layout, "web:1", "oci:d")
    assert resolve.resolve(other, no_registry, "oci:d:web:1", policy="always").name == "web:1"
    assert resolve.resolve(other, no_registry, "oci:d:x").name == "web:1"


def test_an_artifact_on_disk_as_a_base(
    layout: Layout, other: Layout, built: Artifact, tmp_path: Path, here: Path
) -> None:
    write_inputs(tmp_path / "inputs")
    push(layout, "web:1", "oci:../inputs/base")
    disks = [{"ref": "oci:base:web:1", "format": "raw"}]
    path = write_manifest(tmp_path / "inputs", name="new.json", ramSnapshot=None, diskLayers=disks)
    new = Builder(other, no_registry).build(path)
    assert [d.ref for d in new.manifest.disk_layers] == [d.ref for d in built.manifest.disk_layers]


# --- platforms -------------------------------------------------------------------------------------------------------


@pytest.fixture
def multi(layout: Layout, built: Artifact, tmp_path: Path) -> tuple[Artifact, Digest]:
    """An index named ``multi:1`` of an arm64 and an amd64 artifact: the first of them, and the index."""
    arm = make(layout, tmp_path / "inputs", None, metadata={"platform": {"arch": "aarch64"}})
    entries = [
        entry(layout, a.digest, artifactType=mediatypes.MANIFEST, platform={"os": "linux", "architecture": name})
        for a, name in ((arm, "arm64"), (built, "amd64"))
    ]
    value = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": entries}
    raw = json.dumps(value).encode()
    digest = layout.add_bytes(raw)
    layout.set_name("multi:1", Descriptor(mediatypes.OCI_INDEX, digest, len(raw)))
    return arm, digest


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_keeps_its_digest_and_one_platform_is_taken(
    layout: Layout, other: Layout, built: Artifact, multi: tuple[Artifact, Digest], kind: str
) -> None:
    arm, digest = multi
    place = f"{kind}:x"
    push(layout, "multi:1", place)
    assert pull(other, place, platform=ARM64).artifact == arm
    assert other.find("multi:1").digest == digest  # type: ignore[union-attr]
    assert other.size(built.digest) is None
    assert model.load_any(other, digest) == arm
    with pytest.raises(ReferenceNotFound, match="has for linux/amd64 is not in the local store"):
        resolve.resolve(other, no_registry, "multi:1")
    assert resolve.resolve(other, no_registry, "multi:1", platform=ARM64).artifact == arm
    # the other one under the same name: both are there, and each is found
    assert resolve.resolve(other, no_registry, place).artifact == built
    assert resolve.resolve(other, no_registry, "multi:1").artifact == built
    assert resolve.resolve(other, no_registry, "multi:1", platform=ARM64).artifact == arm
    assert len(other.entries()) == 1
    with pytest.raises(Unsupported, match="nothing for linux/riscv64, but for linux/amd64, linux/arm64"):
        pull(other, place, platform=Platform.parse("linux/riscv64"))
    # what only one platform is here of goes on with that
    third = Layout(other.root.parent / "third")
    pull(third, place, platform=ARM64)
    push(third, "multi:1", f"{kind}:y")
    assert pull(Layout(other.root.parent / "fourth"), f"{kind}:y", platform=ARM64).artifact == arm


@pytest.mark.spec("OCI-26")
def test_what_stands_alone_must_be_of_the_platform(layout: Layout, other: Layout, built: Artifact, here: Path) -> None:
    push(layout, "web:1", "oci:d")
    with pytest.raises(Unsupported, match="web is for linux/amd64, not for linux/arm64"):
        pull(other, "oci:d", platform=ARM64)
    assert other.entries() == []
    assert len(blobs(other)) == 1, "no more than the manifest was copied"
    assert pull(other, "oci:d", platform=Platform.parse("linux/x86_64")).artifact == built
    with pytest.raises(Unsupported, match="web is for linux/amd64"):
        resolve.find(other, "web:1", ARM64)
    # an index may say what is not so
    lie = entry(
        layout, built.digest, artifactType=mediatypes.MANIFEST, platform={"os": "linux", "architecture": "arm64"}
    )
    raw = index(lie)
    top = {"mediaType": mediatypes.OCI_INDEX, "digest": layout.add_bytes(raw), "size": len(raw)}
    write_directory(here / "e", files(layout, top))
    with pytest.raises(Unsupported, match="web is for linux/amd64, not for linux/arm64"):
        pull(other, "oci:e", name="lie:1", platform=ARM64)


# --- layouts of strangers --------------------------------------------------------------------------------------------

Break = Callable[[dict[str, bytes], Artifact], object]


def _name(digest: str) -> str:
    return f"blobs/sha256/{digest[7:]}"


def _set(name: str, data: bytes) -> Break:
    return lambda content, _: content.__setitem__(name, data)


def _blob(change: Callable[[bytes], bytes | None], which: int = -1) -> Break:
    def apply(content: dict[str, bytes], built: Artifact) -> None:
        name = _name(built.image.blobs[which].digest)
        new = change(content.pop(name))
        if new is not None:
            content[name] = new

    return apply


def _entry(**changes: Any) -> Break:
    def apply(content: dict[str, bytes], built: Artifact) -> None:
        value = json.loads(content["index.json"])
        value["manifests"][0].update(changes)
        content["index.json"] = json.dumps(value).encode()

    return apply


def _other_image(**changes: Any) -> Break:
    """With another OCI manifest."""

    def apply(content: dict[str, bytes], built: Artifact) -> None:
        raw = json.dumps({**json.loads(built.image.raw), **changes}).encode()
        content[_name(of_bytes(raw))] = raw
        _entry(digest=of_bytes(raw), size=len(raw))(content, built)

    return apply


def _large(content: dict[str, bytes], built: Artifact) -> None:
    content[_name(of_bytes(b"x"))] = bytes(5 << 20)
    _entry(digest=of_bytes(b"x"), size=5 << 20)(content, built)


BROKEN: dict[str, tuple[Break, str, str]] = {
    "no marker": (lambda c, _: c.pop("oci-layout"), "invalid-input", "no oci-layout"),
    "another version": (_set("oci-layout", b'{"imageLayoutVersion":"2.0.0"}'), "invalid-input", "another version"),
    "a marker without end": (_set("oci-layout", b" " * 5000), "file-too-large", "4096"),
    "a marker that is no JSON": (_set("oci-layout", b"{"), "json-invalid", "oci-layout"),
    "no index": (lambda c, _: c.pop("index.json"), "invalid-input", "no index.json"),
    "an index that is no JSON": (_set("index.json", b"["), "json-invalid", "index.json"),
    "an index that is deep": (_set("index.json", b"[" * 100000), "json-invalid", "nested"),
    "an index of nothing": (_set("index.json", b"[]"), "invalid-input", "list of manifests"),
    "a name as the list": (_set("index.json", b'{"manifests":"x"}'), "invalid-input", "list of manifests"),
    "an entry that is none": (_set("index.json", b'{"manifests":[1]}'), "registry-protocol", "manifests[0]"),
    "a digest that is a path": (_entry(digest="sha256:../../x"), "registry-protocol", "no sha256 digest"),
    "a size that is none": (_entry(size=-1), "registry-protocol", "size"),
    "annotations that are none": (_entry(annotations=[1]), "registry-protocol", "annotations"),
    "the manifest is missing": (_entry(digest=of_bytes(b"x")), "blob-not-found", "lacks the blob"),
    "the manifest is of another size": (_entry(size=7), "digest-mismatch", "not 7"),
    "a manifest too large": (_large, "file-too-large", "4194304"),
    "the manifest is another": (lambda c, b: c.__setitem__(_name(b.digest), b.image.raw.replace(b"web", b"wub")),
                                "digest-mismatch", "another digest"),
    "Docker's manifest": (_other_image(mediaType="application/vnd.docker.distribution.manifest.v2+json"),
                          "registry-protocol", "docker"),
    "a container image": (_other_image(artifactType="application/x", config={"mediaType": mediatypes.OCI_EMPTY, "size": 2,
                          "digest": of_bytes(b"{}")}), "unsupported", "no OVMS artifact"),
    "a layer that is no part": (_other_image(layers=[]), "manifest-invalid", "does not fit"),
    "a blob is missing": (_blob(lambda data: None), "blob-not-found", "lacks the blob"),
    "a blob is short": (_blob(lambda data: data[:-1]), "digest-mismatch", "bytes, not"),
    "a blob is long": (_blob(lambda data: data + b"x"), "digest-mismatch", "bytes, not"),
    "a blob is another": (_blob(lambda data: data[:-1] + b"!"), "digest-mismatch", "was expected"),
    "the OVMS manifest is another": (_blob(lambda data: data.replace(b"web", b"wub"), 0), "digest-mismatch", "expected"),
}  # fmt: skip


@pytest.mark.spec("OCI-21", "OCI-22", "OCI-28")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("broken", "code", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_layouts_that_are_wrong(
    layout: Layout, other: Layout, built: Artifact, here: Path, kind: str, broken: Break, code: str, text: str
) -> None:
    content = files(layout, entry(layout, built.digest, "web:1"))
    broken(content, built)
    (write_directory if kind == "oci" else write_archive)(here / "x", content)
    with pytest.raises(OvmsError) as caught:
        pull(other, f"{kind}:x")
    assert caught.value.code == code, caught.value
    assert text in caught.value.message
    assert other.entries() == []
    assert not any(path.name in (hex_of(of_bytes(b"x")), hex_of(built.digest)) for path in other.blob_dir.iterdir())
    assert all(of_bytes(path.read_bytes())[7:] == path.name for path in other.blob_dir.iterdir())
    assert [*other.staging_root.iterdir(), *other.partial_dir.iterdir()] == []


@pytest.mark.spec("OCI-18")
def test_an_index_of_indexes_is_not_followed(layout: Layout, other: Layout, built: Artifact, here: Path) -> None:
    inner = layout.add_bytes(index(entry(layout, built.digest)))
    raw = index(entry(layout, inner))
    top = {"mediaType": mediatypes.OCI_INDEX, "digest": layout.add_bytes(raw), "size": len(raw)}
    write_directory(here / "d", files(layout, top))
    with pytest.raises(OvmsError) as caught:
        pull(other, "oci:d", name="x:1")
    assert caught.value.code == "registry-protocol"
    nothing_of_it(other)


def _link(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(path.parent)
        sock.bind(path.name)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.spec("OCI-28")
@pytest.mark.parametrize("name", ["oci-layout", "index.json", "manifest", "kernel", "blobs", "blobs/sha256"])
@pytest.mark.parametrize("change", ["link", "fifo", "socket", "directory"])
def test_only_regular_files_of_the_directory_itself_count(
    layout: Layout, other: Layout, built: Artifact, here: Path, name: str, change: str
) -> None:
    path = write_directory(here / "d", files(layout, entry(layout, built.digest, "web:1")))
    assert built.manifest.kernel is not None
    blob = {"manifest": built.digest, "kernel": built.manifest.kernel.ref}.get(name)
    victim = path / (name if blob is None else _name(blob))
    if victim.is_dir() and change != "link":
        victim.rename(here / "away")
        victim.touch()
    if change == "link":
        _link(victim, here / "away")
    else:
        {"fifo": _fifo, "socket": _socket, "directory": _directory}[change](victim)
    with pytest.raises((FileProblem, BlobNotFound)) as caught:
        pull(other, f"oci:{path}")
    if not (change == "directory" and name.startswith("blobs")):
        assert caught.value.code == "file-not-regular"
    nothing_of_it(other)


@pytest.mark.parametrize(
    ("place", "code"),
    [("oci:none", "file-missing"), ("oci:file", "file-not-regular"), ("oci-archive:none", "file-missing"),
     ("oci-archive:dir", "file-not-regular"), ("oci-archive:fifo", "file-not-regular"),
     ("oci-archive:empty", "file-empty"), ("oci-archive:file", "invalid-input"), ("oci:dir", "invalid-input")],
)  # fmt: skip
def test_what_is_no_layout(other: Layout, here: Path, place: str, code: str) -> None:
    Path("file").write_bytes(b"x" * 2000)
    Path("empty").touch()
    Path("dir").mkdir()
    os.mkfifo("fifo")
    with pytest.raises(OvmsError) as caught:
        pull(other, place)
    assert caught.value.code == code
    nothing_of_it(other)


def test_the_need_for_space_is_said_before_anything_is_copied(
    layout: Layout, other: Layout, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(layout, "web:1", "oci-archive:a")
    with monkeypatch.context() as patch:
        patch.setattr("ovms.fsutil.SPACE_RESERVE", 1 << 60)
        with pytest.raises(DiskFull, match=r"importing oci-archive:a needs \d+ bytes"):
            pull(other, "oci-archive:a")
    nothing_of_it(other)
