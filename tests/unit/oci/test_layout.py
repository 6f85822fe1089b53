"""The local store: what is in it is whole, and what is in use stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.stores import damage

from ovms import fsutil
from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    DiskFull,
    Locked,
    StoreCorrupt,
)
from ovms.oci.collector import Needs, collect
from ovms.oci.descriptor import Descriptor, ImageManifest, build_manifest
from ovms.oci.layout import Entry, Layout
from ovms.oci.whole import require_whole
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of, of_bytes

MIB = 1 << 20
ABSENT = of_bytes(b"not there")


def blobs(layout: Layout) -> set[str]:
    return {path.name for path in layout.blob_dir.iterdir()}


def staged(layout: Layout) -> list[Path]:
    return list(layout.staging_root.iterdir())


def add(layout: Layout, *contents: bytes, subject: Descriptor | None = None) -> ImageManifest:
    """Adds an artifact of these layers."""
    for content in contents:
        layout.add_bytes(content)
    image = build_manifest(
        artifact_type=mediatypes.MANIFEST,
        config=Descriptor.of("application/x", contents[0]),
        layers=tuple(Descriptor.of("application/x", content) for content in contents[1:]),
        subject=subject,
    )
    layout.add_bytes(image.raw)
    return image


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-23")
def test_a_new_store_is_an_oci_image_layout(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "deep" / "store")
    assert json.loads((layout.root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout.root / "index.json").read_bytes())
    assert index == {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": []}
    assert (layout.root / "blobs" / "sha256").is_dir()
    assert layout.entries() == []


def test_opening_again_changes_nothing(layout: Layout) -> None:
    layout.set_name("a", add(layout, b"x").descriptor())
    before = (layout.root / "index.json").read_bytes()
    assert Layout(layout.root).find("a") == layout.find("a")
    (layout.root / "oci-layout").unlink()  # killed between index.json and oci-layout
    Layout(layout.root)
    assert (layout.root / "index.json").read_bytes() == before


@pytest.mark.parametrize(
    "marker", [b"", b"{}", b"[]", b"nonsense", b'{"imageLayoutVersion": "2.0.0"}', b"\xff", b"[" * 100_000]
)
def test_another_layout_is_left_alone(tmp_path: Path, marker: bytes) -> None:
    (tmp_path / "oci-layout").write_bytes(marker)
    with pytest.raises(StoreCorrupt, match=r"no OCI image layout of version 1\.0\.0"):
        Layout(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "oci-layout"]


def test_a_layout_that_another_tool_made(tmp_path: Path) -> None:
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (tmp_path / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')
    layout = Layout(tmp_path)
    image = add(layout, b"x")
    with (tmp_path / "index.json").open("rb") as file:
        layout.add_file(file.fileno(), "a file")
    layout.set_name("a", image.descriptor())
    collect(layout, Needs)
    assert blobs(layout) == {hex_of(of_bytes(b"x")), hex_of(image.digest)}


# --- blobs ---------------------------------------------------------------------------------------------------------


def test_a_blob_comes_back(layout: Layout) -> None:
    digest = layout.add_bytes(b"content")
    assert layout.read(digest, "x", max_size=7) == b"content"
    assert (layout.size(digest), layout.size(ABSENT)) == (7, None)
    assert stat.S_IMODE(layout.path(digest).stat().st_mode) == 0o444
    assert staged(layout) == []
    inode = layout.path(digest).stat().st_ino
    layout.add_bytes(b"content")
    assert layout.path(digest).stat().st_ino == inode


def test_what_is_not_there(layout: Layout) -> None:
    with pytest.raises(BlobNotFound) as info:
        layout.read(ABSENT, "the manifest", max_size=10)
    assert info.value.context["digest"] == ABSENT


@pytest.mark.spec("OCI-21")
def test_a_damaged_blob_is_noticed(layout: Layout) -> None:
    digest = layout.add_bytes(b"content")
    layout.path(digest).chmod(0o644)
    layout.path(digest).write_bytes(b"CONTENT")
    with pytest.raises(StoreCorrupt, match="not what its name says"):
        layout.read(digest, "x", max_size=10)


def test_a_cut_blob_is_made_whole_again(layout: Layout) -> None:
    digest = layout.add_bytes(b"content")
    layout.path(digest).chmod(0o644)
    layout.path(digest).write_bytes(b"con")
    assert layout.add_bytes(b"content") == digest
    assert layout.read(digest, "x", max_size=10) == b"content"


def test_has_tells_a_descriptor_that_lies(layout: Layout) -> None:
    digest = layout.add_bytes(b"content")
    assert layout.has(Descriptor("x", digest, 7))
    assert not layout.has(Descriptor("x", ABSENT, 7))
    with pytest.raises(DigestMismatch, match="has 7 bytes, but its descriptor says 8"):
        layout.has(Descriptor("x", digest, 8))


def test_a_writer(layout: Layout) -> None:
    content = b"a" * 5000 + bytes(3 * MIB) + b"z" * 5000
    with layout.writer() as writer:
        for at in range(0, len(content), 70_001):
            writer.write(content[at : at + 70_001])
        assert blobs(layout) == set()
        digest = writer.commit(expected=Descriptor.of("x", content))
    assert layout.path(digest).read_bytes() == content
    assert layout.path(digest).stat().st_blocks * 512 < MIB
    assert staged(layout) == []


def test_a_blob_that_ends_in_zeroes_has_its_size(layout: Layout) -> None:
    with layout.writer() as writer:
        writer.write(bytes(MIB))
        digest = writer.commit()
    assert layout.path(digest).read_bytes() == bytes(MIB)
    with layout.writer() as writer:
        assert writer.commit() == of_bytes(b"")


@pytest.mark.spec("OCI-22")
@pytest.mark.parametrize("expected", [Descriptor("x", ABSENT, 3), Descriptor("x", of_bytes(b"abc"), 4)])
def test_a_wrong_blob_leaves_nothing(layout: Layout, expected: Descriptor) -> None:
    with pytest.raises(DigestMismatch) as info, layout.writer() as writer:
        writer.write(b"abc")
        writer.commit(expected=expected)
    assert info.value.context == {"expected": expected.digest, "got": of_bytes(b"abc")}
    assert blobs(layout) == set()
    assert staged(layout) == []


def test_what_is_not_committed_is_gone(layout: Layout) -> None:
    with layout.writer() as writer:
        writer.write(b"abc")
    assert blobs(layout) == set()
    assert staged(layout) == []


@pytest.mark.parametrize("number", [28, 122])
def test_a_full_disk_while_writing(layout: Layout, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*args: object) -> int:
        raise OSError(number, "no room")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DiskFull), layout.writer() as writer:
        writer.write(b"abc")
    with (layout.root / "oci-layout").open("rb") as file, pytest.raises(DiskFull):
        layout.add_file(file.fileno(), "a file")
    assert staged(layout) == []


def test_a_disk_that_is_full_only_when_it_is_synced(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFull):
        layout.add_bytes(b"abc")
    assert blobs(layout) == set()
    assert staged(layout) == []


def test_all_of_several_are_durable_before_any_has_a_name(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        did.append(f"fsync {fd}")
        fsync(fd)

    def noted_rename(old: Path, new: Path) -> None:
        did.append("name")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    contents = [b"x" * 5000, bytes(5000), b""]
    with contextlib.ExitStack() as held:
        writers = [held.enter_context(layout.loose(of_bytes(data))) for data in contents]
        for writer, data in zip(writers, contents, strict=True):
            writer.write(data)
            writer.finish(Descriptor("a/b", of_bytes(data), len(data)))
        writers[0].wait()
        assert blobs(layout) == set()
        layout.commit_all(writers)
        assert [what.split()[0] for what in did] == ["fsync"] * 3 + ["name"] * 3
        assert len(set(did)) == 4, "each is waited for once"
    assert [layout.path(of_bytes(data)).read_bytes() for data in contents] == contents
    assert stat.S_IMODE(layout.path(of_bytes(contents[0])).stat().st_mode) == 0o444
    assert list(layout.partial_dir.iterdir()) == []


def test_what_is_not_committed_with_the_others_is_gone(layout: Layout) -> None:
    with pytest.raises(DigestMismatch), layout.loose(of_bytes(b"a")) as writer:
        writer.write(b"b")
        writer.finish(Descriptor("a/b", of_bytes(b"a"), 1))
    assert list(layout.partial_dir.iterdir()) == []
    assert blobs(layout) == set()


def test_a_killed_writer_s_work_is_swept(layout: Layout) -> None:
    code = """if True:
        import sys, pathlib
        from ovms.oci.layout import Layout
        layout = Layout(pathlib.Path(sys.argv[1]))
        with layout.using(), layout.writer() as writer:
            writer.write(b"x" * 100_000)
            print("ready", flush=True)
            sys.stdin.read()
        """
    child = subprocess.Popen([sys.executable, "-c", code, layout.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert len(staged(layout)) == 1
    with pytest.raises(Locked, match=rf"another ovm process \(PID {child.pid}\) adds or uses blobs"):
        collect(layout, Needs, wait=0)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(staged(layout)) == 1
    (layout.root / ".index.json.0123456789ab.tmp").write_bytes(b"half an index")
    collect(layout, Needs)
    assert staged(layout) == []
    assert blobs(layout) == set()
    assert sorted(path.name for path in layout.root.iterdir()) == [
        "blobs",
        "index.json",
        "index.lock",
        "oci-layout",
        "ovms.blobs",
        "ovms.index.json",
        "ovms.lock",
        "ovms.partial",
        "ovms.tmp",
    ]


# --- files ---------------------------------------------------------------------------------------------------------


def add_file(layout: Layout, path: Path, **options: Any) -> tuple[Digest, int, bool]:
    with path.open("rb") as file:
        return layout.add_file(file.fileno(), "a file", **options)


def test_a_sparse_file_stays_sparse(layout: Layout, tmp_path: Path) -> None:
    source = tmp_path / "disk"
    with source.open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(50 * MIB)
        file.write(b"y")
        file.truncate(100 * MIB)
    progress: list[int] = []
    digest, size, new = add_file(layout, source, advance=progress.append)
    assert (size, new, sum(progress)) == (100 * MIB, True, 100 * MIB)
    assert layout.path(digest).stat().st_blocks * 512 < MIB
    with layout.path(digest).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hex_of(digest)
    assert staged(layout) == []


def test_a_file_is_not_copied_twice(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    (tmp_path / "b").write_bytes(b"x" * 10_000)
    digest, _, _ = add_file(layout, tmp_path / "a")
    inode = layout.path(digest).stat().st_ino

    def refuse(*args: object, **more: object) -> int:
        raise AssertionError("it is copied again")

    monkeypatch.setattr(fsutil, "copy_sparse", refuse)
    assert add_file(layout, tmp_path / "b") == (digest, 10_000, False)
    assert layout.path(digest).stat().st_ino == inode


@pytest.mark.parametrize("how", ["bytes", "link"])
def test_a_damaged_blob_is_mended_by_adding_its_file(layout: Layout, tmp_path: Path, how: str) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    digest, _, _ = add_file(layout, tmp_path / "a")
    if how == "bytes":
        damage(layout, digest)
    else:
        layout.path(digest).unlink()
        layout.path(digest).symlink_to(tmp_path / "a")
    assert add_file(layout, tmp_path / "a") == (digest, 10_000, True)
    assert layout.read(digest, "it", max_size=10_000) == b"x" * 10_000
    assert stat.S_IMODE(layout.path(digest).lstat().st_mode) == 0o444
    assert add_file(layout, tmp_path / "a") == (digest, 10_000, False)


def test_another_file_of_the_same_size(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    (tmp_path / "b").write_bytes(b"y" * 10_000)
    assert add_file(layout, tmp_path / "a")[0] != add_file(layout, tmp_path / "b")[0]
    assert len(blobs(layout)) == 2


def test_what_is_stored_is_what_is_hashed(layout: Layout, tmp_path: Path) -> None:
    """Somebody writes to the file all the while."""
    source = tmp_path / "disk"
    source.write_bytes(b"a" * (4 * MIB))

    def scribble(_: int) -> None:
        with source.open("r+b") as file:
            file.seek(2 * MIB)
            file.write(os.urandom(1 * MIB))
            file.seek(0)
            file.write(os.urandom(4096))

    digest, size, _ = add_file(layout, source, advance=scribble)
    assert size == 4 * MIB
    assert of_bytes(layout.path(digest).read_bytes()) == digest


def test_a_clone_is_hashed_itself(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system can reflink, the clone is hashed and not the file, which may change meanwhile."""
    source = tmp_path / "disk"
    source.write_bytes(b"a" * 10_000)

    def reflink(source_fd: int, target_fd: int) -> bool:
        os.pwrite(target_fd, os.pread(source_fd, 10_000, 0), 0)
        source.write_bytes(b"changed")
        return True

    monkeypatch.setattr(fsutil, "reflink", reflink)
    assert add_file(layout, source) == (of_bytes(b"a" * 10_000), 10_000, True)
    source.write_bytes(b"a" * 10_000)
    assert add_file(layout, source)[2] is False


def test_too_little_disk_is_said_before_the_copy(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(b"x" * MIB)
    monkeypatch.setattr(fsutil, "free_space", lambda path: fsutil.SPACE_RESERVE)
    monkeypatch.setattr(fsutil, "copy_sparse", lambda *a, **k: pytest.fail("copied"))
    monkeypatch.setattr(fsutil, "reflink", lambda *a: False)
    with pytest.raises(DiskFull, match="adding a file to the store needs"):
        add_file(layout, tmp_path / "disk")
    assert staged(layout) == []


# --- names ---------------------------------------------------------------------------------------------------------


def test_names(layout: Layout) -> None:
    one, two = add(layout, b"1").descriptor(), add(layout, b"2").descriptor()
    layout.set_name("a:1", one)
    layout.set_name("b:1", one)
    assert [entry.name for entry in layout.entries()] == ["a:1", "b:1"]
    layout.set_name("a:1", two)
    found = layout.find("a:1")
    assert found is not None
    assert found.digest == two.digest
    assert found.artifact_type == mediatypes.MANIFEST
    assert [entry.name for entry in layout.entries()] == ["b:1", "a:1"]
    assert layout.remove_name("b:1")
    assert not layout.remove_name("b:1")
    assert layout.find("b:1") is None
    assert layout.size(one.digest) is not None


def test_what_others_wrote_into_the_index_stays(layout: Layout) -> None:
    image = add(layout, b"1")
    index: dict[str, Any] = {
        "schemaVersion": 2,
        "manifests": [{**image.descriptor().to_json(), "urls": ["x"], "annotations": {"other": "tool"}}],
        "annotations": {"kept": "yes"},
    }
    (layout.root / "index.json").write_text(json.dumps(index))
    assert layout.entries() == [Entry("", Descriptor.from_json(index["manifests"][0], "x"))]
    layout.set_name("a", image.descriptor())
    layout.remove_name("a")
    assert json.loads((layout.root / "index.json").read_bytes()) == index


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"manifests": {}}',
        b'{"manifests": [1]}',
        b'{"manifests": [{"mediaType": "x", "digest": "sha256:../../../etc/passwd", "size": 1}]}',
        b'{"manifests": [], "manifests": []}',
        b'{"manifests": ' + b"[" * 100 + b"]" * 100 + b"}",
        b"\xff\xfe",
        None,
    ],
)
def test_a_hostile_index(layout: Layout, content: bytes | None) -> None:
    digest = layout.add_bytes(b"dear")
    path = layout.root / "index.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreCorrupt):
        layout.entries()
    with pytest.raises(StoreCorrupt):
        collect(layout, Needs)
    assert blobs(layout) == {hex_of(digest)}, "an index that cannot be read is no reason to remove everything"


def test_a_copy_of_the_index_is_kept(layout: Layout) -> None:
    layout.set_name("a", add(layout, b"x").descriptor())
    assert (layout.root / "ovms.index.json").read_bytes() == (layout.root / "index.json").read_bytes()


def test_an_entry_without_a_name_goes_when_its_artifact_gets_one(layout: Layout) -> None:
    one, two = add(layout, b"1"), add(layout, b"2")
    nameless = [{k: v for k, v in image.descriptor().to_json().items() if k != "artifactType"} for image in (one, two)]
    (layout.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": nameless}))
    layout.set_name("a", one.descriptor())
    assert [(e.name, e.descriptor.digest) for e in layout.entries()] == [("", two.digest), ("a", one.digest)]
    layout.remove_entries([Entry("", one.descriptor()), Entry("a", two.descriptor())])
    assert len(layout.entries()) == 2, "what stands for something else now is not what was meant"
    layout.remove_entries([Entry("", two.descriptor())])
    assert [e.name for e in layout.entries()] == ["a"]


def test_a_damaged_blob_is_mended_by_adding_it(layout: Layout) -> None:
    digest = layout.add_bytes(b"content")
    layout.path(digest).chmod(0o644)
    layout.path(digest).write_bytes(b"CONTENT")
    layout.add_bytes(b"content")
    assert layout.read(digest, "x", max_size=10) == b"content"


@pytest.mark.parametrize("kind", ["directory", "fifo", "huge", "loop"])
def test_an_index_that_is_no_file(layout: Layout, kind: str) -> None:
    path = layout.root / "index.json"
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to(path)
    with pytest.raises(StoreCorrupt):
        layout.entries()


def test_a_linked_index_is_replaced_and_not_written_through(layout: Layout, tmp_path: Path) -> None:
    path = layout.root / "index.json"
    outside = tmp_path / "outside.json"
    path.rename(outside)
    before = outside.read_bytes()
    path.symlink_to(outside)
    layout.set_name("a", add(layout, b"1").descriptor())
    assert outside.read_bytes() == before
    assert layout.find("a") is not None


def test_two_processes_set_names_and_lose_none(layout: Layout) -> None:
    layout.set_name("start", add(layout, b"1").descriptor())
    code = """if True:
        import sys, pathlib
        from ovms.oci.layout import Layout
        layout = Layout(pathlib.Path(sys.argv[1]))
        descriptor = layout.find("start")
        for i in range(25):
            layout.set_name(f"{sys.argv[2]}:{i}", descriptor)
            if i % 5 == 0:
                layout.remove_name(f"{sys.argv[2]}:{i}")
        """
    children = [subprocess.Popen([sys.executable, "-c", code, layout.root, name]) for name in ("a", "b", "c")]
    assert [child.wait() for child in children] == [0, 0, 0]
    expected = {f"{name}:{i}" for name in "abc" for i in range(25) if i % 5} | {"start"}
    assert {entry.name for entry in layout.entries()} == expected


def test_many_processes_open_a_new_store(tmp_path: Path) -> None:
    code = """if True:
        import sys, pathlib
        from ovms.oci.layout import Layout
        from ovms.oci.descriptor import Descriptor
        layout = Layout(pathlib.Path(sys.argv[1]))
        layout.add_bytes(b"x")
        layout.set_name(sys.argv[2], Descriptor.of("application/x", b"x"))
        """
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "s", str(i)]) for i in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert len(Layout(tmp_path / "s").entries()) == 4


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_is_no_file_is_no_blob(layout: Layout, tmp_path: Path, kind: str) -> None:
    descriptor = Descriptor.of("application/x", b"content")
    path = layout.path(layout.add_bytes(b"content"))
    if kind == "link":
        path.rename(tmp_path / "content")
        path.symlink_to(tmp_path / "content")
    else:
        path.unlink()
        path.mkdir()
    for ask in (lambda: layout.has(descriptor), lambda: require_whole(layout, "web:1", [descriptor])):
        with pytest.raises(StoreCorrupt, match="where a blob belongs") as caught:
            ask()
        assert "ovm fsck --repair" in (caught.value.hint or "")
