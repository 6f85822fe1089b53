"""A pull onto a file system that is too small, or becomes so: one clear error, nothing lost, nothing half-done."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import artifacts, disks, faulty
from support.cli import Done, Ovm
from support.disks import Disk
from support.faulty import Server

from ovms.errors import DiskFull
from ovms.fsutil import SPACE_RESERVE
from ovms.oci import transfer
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime.root import Root
from ovms.spec import mediatypes
from ovms.spec.digest import hex_of, of_bytes

MIB = 1 << 20
# the end is a hole in the file, and takes no room
DISK = hashlib.shake_128(b"disk").digest(6 * MIB) + bytes(MIB)
WHERE = 4 * MIB
KERNEL = hashlib.shake_128(b"kernel").digest(3 * MIB)
DOCUMENT = {
    "schemaVersion": 1,
    "mediaType": mediatypes.MANIFEST,
    "name": "full",
    "version": "1",
    "kernel": {"ref": of_bytes(KERNEL)},
    "diskLayers": [{"ref": of_bytes(DISK), "format": "raw"}],
}
CONFIG = json.dumps(DOCUMENT).encode()
BULK = rf"/blobs/({of_bytes(DISK)}|{of_bytes(KERNEL)})$"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        files = {"disk": (mediatypes.DISK_LAYER, DISK), "kernel": (mediatypes.KERNEL, KERNEL)}
        server.serve_artifact(files, (mediatypes.MANIFEST, CONFIG))
        yield server


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with disks.small(tmp_path / "disk", size=SPACE_RESERVE + 14 * MIB) as disk:
        yield disk


@pytest.fixture
def ovm(tmp_path: Path, disk: Disk) -> Ovm:
    (tmp_path / "home").mkdir()
    return Ovm(disk.path / "root", tmp_path / "home")


@pytest.fixture
def store(ovm: Ovm) -> Layout:
    ovm.ok("ls")
    return Layout(ovm.root / "store")


def pull(ovm: Ovm, server: Server) -> Done:
    return ovm("pull", "--json", f"{server.host}/x:1")


def is_refused(done: Done, store: Layout) -> None:
    assert done.code == 8, done.err
    assert done.error["code"] == "disk-full"
    assert done.error["hint"]
    assert len([line for line in done.err.splitlines() if "error" in line]) == 1
    is_sound(store)
    assert store.entries() == []


def is_sound(store: Layout) -> None:
    """Whatever has a blob's name is that blob; nobody's work lies about."""
    for path in store.blob_dir.iterdir():
        assert hex_of(of_bytes(path.read_bytes())) == path.name
    assert list(store.staging_root.iterdir()) == []


def works_now(ovm: Ovm, server: Server, store: Layout, disk: Disk) -> None:
    disk.free()
    server.faults.clear()
    server.seen.clear()
    done = pull(ovm, server)
    assert done.code == 0, done.err
    for data in (DISK, KERNEL, CONFIG):
        assert store.path(of_bytes(data)).read_bytes() == data
    is_sound(store)
    assert list(store.partial_dir.iterdir()) == []


def stopping_at(offset: int, then: Callable[[], None]) -> faulty.Fault:
    """A blob, with something that happens when *offset* bytes of it have been sent."""

    def fault(handler: faulty.Handler, body: bytes) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DISK)))
        handler.end_headers()
        handler.wfile.write(DISK[:offset])
        handler.wfile.flush()
        then()
        handler.wfile.write(DISK[offset:])
        return True

    return fault


@pytest.mark.spec("OCI-22")
def test_what_cannot_fit_is_said_before_the_first_byte(ovm: Ovm, server: Server, store: Layout, disk: Disk) -> None:
    disk.take(8 * MIB)
    done = pull(ovm, server)
    is_refused(done, store)
    assert "free" in done.error["message"]
    assert server.asked("GET", "/blobs/") == []
    assert list(store.partial_dir.iterdir()) == []
    works_now(ovm, server, store, disk)


@pytest.mark.spec("OCI-22")
def test_somebody_else_fills_the_disk_half_way(ovm: Ovm, server: Server, store: Layout, disk: Disk) -> None:
    path = store.partial_dir / hex_of(of_bytes(DISK))

    def fill() -> None:
        faulty.wait_until(lambda: path.exists() and path.stat().st_size >= WHERE - MIB)
        disk.fill()

    server.faults = [("GET", f"/blobs/{of_bytes(DISK)}$", stopping_at(WHERE, fill))]
    is_refused(pull(ovm, server), store)
    kept = path.stat().st_size
    assert WHERE - MIB <= kept < 6 * MIB
    assert path.read_bytes() == DISK[:kept]
    # and again, while it is still full
    server.faults.clear()
    server.seen.clear()
    is_refused(pull(ovm, server), store)
    assert server.asked("GET", BULK) == []
    assert path.stat().st_size == kept
    works_now(ovm, server, store, disk)
    assert server.asked("GET", f"/blobs/{of_bytes(DISK)}$") == [f"bytes={kept}-{len(DISK) - 1}"]


@pytest.mark.spec("OCI-22")
def test_the_disk_is_full_when_all_blobs_are_here(ovm: Ovm, server: Server, store: Layout, disk: Disk) -> None:
    path, kernel = store.partial_dir / hex_of(of_bytes(DISK)), store.path(of_bytes(KERNEL))

    def fill() -> None:
        faulty.wait_until(lambda: path.stat().st_size == 6 * MIB and kernel.exists())
        disk.fill()

    server.faults = [("GET", f"/blobs/{of_bytes(DISK)}$", stopping_at(6 * MIB, fill))]
    is_refused(pull(ovm, server), store)
    works_now(ovm, server, store, disk)
    assert server.asked("GET", BULK) == [], "what had come was kept"


@pytest.mark.spec("OCI-22")
def test_what_a_download_gives_back_is_files_enough_for_its_end(
    ovm: Ovm, server: Server, store: Layout, disk: Disk
) -> None:
    path, kernel = store.partial_dir / hex_of(of_bytes(DISK)), store.path(of_bytes(KERNEL))

    def fill() -> None:
        faulty.wait_until(lambda: path.stat().st_size == 6 * MIB and kernel.exists())
        disk.fill_inodes()

    server.faults = [("GET", f"/blobs/{of_bytes(DISK)}$", stopping_at(6 * MIB, fill))]
    done = pull(ovm, server)
    assert done.code == 0, done.err
    is_sound(store)
    assert [entry.name for entry in store.entries()] == [f"{server.host}/x:1"]
    works_now(ovm, server, store, disk)


@pytest.mark.spec("OCI-22")
@pytest.mark.parametrize("when", ["before", "/manifests/", f"/blobs/{of_bytes(CONFIG)}$"])
@pytest.mark.long
def test_no_more_files_can_be_made(ovm: Ovm, server: Server, store: Layout, disk: Disk, when: str) -> None:
    def fill(handler: faulty.Handler, body: bytes) -> bool:
        disk.fill_inodes()
        return False

    if when == "before":
        disk.fill_inodes()
    server.faults = [("GET", when, fill)]
    done = pull(ovm, server)
    is_refused(done, store)
    assert "no more files" in done.error["message"]
    works_now(ovm, server, store, disk)


def test_the_library_says_it_in_its_own_words(server: Server, store: Layout, disk: Disk) -> None:
    disk.fill_inodes()
    with RegistryClient(server.host) as client, pytest.raises(DiskFull, match="pulling"):
        transfer.pull(store, client, Reference(server.host, "x", "1"))


def test_other_commands_say_it_too(ovm: Ovm, disk: Disk, tmp_path: Path) -> None:
    artifacts.write_inputs(tmp_path / "project")
    build = ("build", "--json", artifacts.write_manifest(tmp_path / "project"), "-t", "web:1")
    disk.fill_inodes()
    for arguments in (("run", "-d", "--json", "web:1"), build):  # there is no store yet
        done = ovm(*arguments)
        assert (done.code, done.error["code"]) == (8, "disk-full"), done.err
    disk.free()
    Root(ovm.root).prepare()
    Root(ovm.root).layout()
    disk.fill_inodes()
    done = ovm(*build)
    assert (done.code, done.error["code"]) == (8, "disk-full"), done.err
    assert list((ovm.root / "store" / "ovms.tmp").iterdir()) == []
    disk.free()
    ovm.ok(*build)


def is_full(disk: Disk) -> bool:
    return os.statvfs(disk.path).f_bavail == 0


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_what_frees_room_works_without_any(ovm: Ovm, disk: Disk, tmp_path: Path, what: str) -> None:
    artifacts.write_inputs(tmp_path / "project")
    manifest = artifacts.write_manifest(tmp_path / "project")
    for name in ("web:1", "web:2", "web:3"):
        ovm.ok("build", manifest, "-t", name)
    ovm.ok("ps")
    store = Layout(ovm.root / "store")
    for removed in ("web:2", "web:3"):  # which free nothing but a name
        fill(disk, what)
        ovm.ok("rmi", removed)
        assert store.index.read_bytes() == store.index_copy.read_bytes()
    fill(disk, what)
    ovm.ok("prune", "-a")
    assert store.entries() == []
    assert list(store.blob_dir.iterdir()) == []
    assert not [path for path in store.root.iterdir() if store.is_temporary(path.name)]


def fill(disk: Disk, what: str) -> None:
    disk.fill() if what == "bytes" else disk.fill_inodes()


def test_an_index_that_grows_too_much_is_left_as_it_was(ovm: Ovm, store: Layout, disk: Disk) -> None:
    descriptor = Descriptor(mediatypes.OCI_MANIFEST, of_bytes(b"x"), 1)
    store.set_name("a", descriptor)
    before = store.index.read_bytes()
    disk.fill()
    assert is_full(disk)
    with pytest.raises(DiskFull, match="index"):
        store.set_name("b" * 9000, descriptor)
    assert store.index.read_bytes() == before == store.index_copy.read_bytes()
    assert not [path for path in store.root.iterdir() if store.is_temporary(path.name)]
    store.set_name("c", descriptor)


@pytest.mark.parametrize("arguments", [("ls",), ("ls", "--json"), ("version",)])
def test_an_answer_that_cannot_be_written(ovm: Ovm, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        process = ovm.popen(*arguments, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 8, err
    assert b"stdout" in err
    assert err.count(b"rror") == 1, err
