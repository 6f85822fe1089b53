"""Transfers that are broken off: gone on with, shared, never wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import faulty
from support.cli import Ovm
from support.faulty import Server

from ovms.cli.exitcodes import Exit
from ovms.errors import DigestMismatch, OvmsError, RegistryError, RegistryProtocol
from ovms.oci import appending, partial, patience, registry, transfer, upload
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.progress import NULL
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of, of_bytes

BIG = hashlib.shake_128(b"big").digest(3 << 20) + bytes(1 << 20) + hashlib.shake_128(b"end").digest((1 << 20) - 77)
LAST = len(BIG) - 1
SMALL = b"small" * 1000
MANIFEST = b"{}"
DISK = mediatypes.DISK_LAYER


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.serve_artifact(
            {"disk": (DISK, BIG), "kernel": (mediatypes.KERNEL, SMALL)}, (mediatypes.MANIFEST, MANIFEST)
        )
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[RegistryClient]:
    with RegistryClient(server.host, backoff=0.01, read_timeout=2) as client:
        yield client


@pytest.fixture(params=["through the page cache", "past it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which a blob is written."""
    if request.param == "past it":
        monkeypatch.setattr(appending, "_DIRECT_FROM", 1 << 20)


BOTH = pytest.mark.usefixtures("way")


def ref(server: Server) -> Reference:
    return Reference(server.host, "x", "1")


def blob(data: bytes) -> str:
    return f"/blobs/{of_bytes(data)}$"


def is_whole(layout: Layout, server: Server) -> None:
    for data in (BIG, SMALL, MANIFEST):
        assert layout.path(of_bytes(data)).read_bytes() == data
    assert [entry.name for entry in layout.entries()] == [str(ref(server))]
    assert list(layout.partial_dir.iterdir()) == []


@BOTH
def test_a_blob_is_all_there_when_it_gets_its_name(
    layout: Layout, server: Server, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is written afterwards a power failure would take, and leave the name
    sizes: dict[str, int] = {}
    publish = layout.publish

    def noted(fd: int, path: Path, digest: Digest, *, durable: bool = True) -> None:
        sizes[digest] = os.fstat(fd).st_size
        publish(fd, path, digest, durable=durable)

    monkeypatch.setattr(layout, "publish", noted)
    transfer.pull(layout, client, ref(server))
    assert sizes[of_bytes(BIG)] == len(BIG)
    is_whole(layout, server)


@BOTH
def test_a_cut_is_gone_on_with(layout: Layout, server: Server, client: RegistryClient) -> None:
    server.faults = [("GET", blob(BIG), faulty.cut(2_000_000)), ("GET", blob(BIG), faulty.cut(1_500_000))]
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)
    ranges = server.asked("GET", blob(BIG))
    assert ranges == [None, f"bytes=2000000-{LAST}", f"bytes=3500000-{LAST}"]
    assert server.sent == len(BIG) + len(SMALL) + len(MANIFEST), "nothing came twice"


@BOTH
def test_many_cuts_are_no_failure_while_there_is_progress(
    layout: Layout, server: Server, client: RegistryClient
) -> None:
    small_steps = 1_100_000
    server.faults = [("GET", blob(BIG), faulty.cut(small_steps)) for _ in range(4)]
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


def test_a_registry_that_is_restarted_is_waited_for(layout: Layout, server: Server, client: RegistryClient) -> None:
    server.faults = [("GET", blob(BIG), faulty.hang_up if n % 2 else faulty.status(503)) for n in range(8)]
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


@BOTH
@pytest.mark.long
def test_a_registry_that_never_gets_on_is_given_up_and_the_rest_kept(
    layout: Layout, server: Server, client: RegistryClient
) -> None:
    server.faults = [("GET", blob(BIG), faulty.cut(2_000_000))]
    server.faults += [("GET", blob(BIG), faulty.hang_up) for _ in range(patience.ATTEMPTS_MAX)]
    with pytest.raises(RegistryError):
        transfer.pull(layout, client, ref(server))
    assert layout.entries() == []
    assert (layout.partial_dir / hex_of(of_bytes(BIG))).stat().st_size == 2_000_000
    server.seen.clear()
    server.faults.clear()
    transfer.pull(layout, client, ref(server))
    assert server.asked("GET", blob(BIG)) == [f"bytes=2000000-{LAST}"]
    is_whole(layout, server)


@BOTH
def test_a_registry_without_ranges(layout: Layout, server: Server, client: RegistryClient) -> None:
    server.faults = [("GET", blob(BIG), faulty.cut(2_000_000)), ("GET", blob(BIG), faulty.no_ranges)]
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


def test_another_range_than_asked_for(layout: Layout, server: Server, client: RegistryClient) -> None:
    server.faults = [("GET", blob(BIG), faulty.cut(2_000_000)), ("GET", blob(BIG), faulty.other_range)]
    with pytest.raises(RegistryProtocol, match="another part"):
        transfer.pull(layout, client, ref(server))
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


@BOTH
@pytest.mark.spec("OCI-21", "OCI-22")
def test_a_damaged_partial_file_is_found_and_fetched_anew(
    layout: Layout, server: Server, client: RegistryClient
) -> None:
    path = layout.partial_dir / hex_of(of_bytes(BIG))
    path.write_bytes(b"x" * 2_000_000)
    transfer.pull(layout, client, ref(server))
    assert server.asked("GET", blob(BIG)) == [f"bytes=2000000-{LAST}", None]
    is_whole(layout, server)


@BOTH
@pytest.mark.parametrize("size", [len(BIG), len(BIG) + 10])
def test_a_partial_file_that_is_whole_or_too_long(
    layout: Layout, server: Server, client: RegistryClient, size: int
) -> None:
    (layout.partial_dir / hex_of(of_bytes(BIG))).write_bytes((BIG + bytes(10))[:size])
    transfer.pull(layout, client, ref(server))
    assert len(server.asked("GET", blob(BIG))) == (0 if size == len(BIG) else 1)
    is_whole(layout, server)


@pytest.mark.parametrize(
    "fault",
    [
        faulty.status(500),
        faulty.status(503),
        faulty.status(429, Retry_After="0"),
        faulty.status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        faulty.hang_up,
        faulty.cut(0),
        faulty.cut(100),
        faulty.stall(3),
    ],
)
def test_faults_that_another_try_cures(
    layout: Layout, server: Server, client: RegistryClient, fault: faulty.Fault
) -> None:
    server.faults = [("GET", blob(SMALL), fault), ("GET", "/manifests/", faulty.status(502))]
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


@pytest.mark.spec("OCI-21", "OCI-22", "GEN-3")
@pytest.mark.parametrize(
    "fault",
    [faulty.wrong_bytes, faulty.longer, faulty.endless, faulty.gzip_bomb, faulty.status(404), faulty.status(403),
     faulty.redirect("file:///etc/passwd"), faulty.redirect("http://["), faulty.status(200), faulty.status(206)],
)  # fmt: skip
def test_faults_that_are_one_clear_error(
    layout: Layout, server: Server, client: RegistryClient, fault: faulty.Fault
) -> None:
    server.faults = [("GET", blob(BIG), fault)] * 8
    with pytest.raises(OvmsError) as info:
        transfer.pull(layout, client, ref(server))
    assert info.value.code in (
        "digest-mismatch", "blob-not-found", "registry-denied", "registry-protocol", "registry-unreachable",
    )  # fmt: skip
    assert layout.entries() == []
    assert layout.size(of_bytes(BIG)) is None
    server.faults = []
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


@BOTH
def test_one_blob_s_failure_ends_the_others_and_keeps_them(
    layout: Layout, server: Server, client: RegistryClient
) -> None:
    server.faults = [("GET", blob(SMALL), faulty.wrong_bytes)]
    with pytest.raises(DigestMismatch):
        transfer.pull(layout, client, ref(server))
    transfer.pull(layout, client, ref(server))
    is_whole(layout, server)


def test_two_pulls_at_once_fetch_each_blob_once(tmp_path: Path, server: Server) -> None:
    errors: list[BaseException] = []

    def slow(handler: faulty.Handler, body: bytes) -> bool:
        time.sleep(0.5)
        return False

    server.faults = [("GET", blob(BIG), slow)]

    def one() -> None:
        try:
            with RegistryClient(server.host) as client:
                transfer.pull(Layout(tmp_path / "store"), client, ref(server))
        except BaseException as exc:  # noqa: BLE001 - shown by the test
            errors.append(exc)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(server.asked("GET", blob(BIG))) == 1
    is_whole(Layout(tmp_path / "store"), server)


def test_whoever_waits_for_another_pull_is_told_so(layout: Layout, server: Server, client: RegistryClient) -> None:
    told: list[str] = []
    descriptor = Descriptor(DISK, of_bytes(BIG), len(BIG))
    go_on = threading.Event()

    def other() -> None:
        with partial.receiving(layout, descriptor, lambda: False) as receiver:
            assert receiver is not None
            go_on.wait(10)
            receiver.write(BIG)
            receiver.commit()

    def tell(text: str) -> None:
        told.append(text)
        go_on.set()

    thread = threading.Thread(target=other)
    with layout.using():
        thread.start()
        faulty.wait_until((layout.partial_dir / hex_of(descriptor.digest)).exists)  # which is made under the lock
        with partial.receiving(layout, descriptor, lambda: False, tell) as receiver:
            assert receiver is None
    thread.join(10)
    assert told == ["another ovm fetches it", ""]


PULL = """
import sys, pathlib
from ovms.oci import transfer
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.progress import NULL
with RegistryClient(sys.argv[2]) as client:
    transfer.pull(Layout(pathlib.Path(sys.argv[1])), client, Reference(sys.argv[2], "x", "1"))
"""


def test_a_killed_pull_is_gone_on_with(layout: Layout, server: Server, client: RegistryClient) -> None:
    def half(handler: faulty.Handler, body: bytes) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BIG)))
        handler.end_headers()
        handler.wfile.write(BIG[:2_500_000])
        handler.wfile.flush()
        time.sleep(20)
        return True

    server.faults = [("GET", blob(BIG), half)]
    child = subprocess.Popen([sys.executable, "-c", PULL, layout.root, server.host])
    path = layout.partial_dir / hex_of(of_bytes(BIG))
    deadline = time.monotonic() + 20
    # what is read comes in pieces of 256 KiB: 9 of them
    while not path.exists() or path.stat().st_size < 9 << 18:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = path.stat().st_size
    assert layout.entries() == []
    transfer.pull(layout, client, ref(server))
    assert server.asked("GET", blob(BIG))[-1] == f"bytes={had}-{LAST}"
    is_whole(layout, server)


def serve_disk(server: Server) -> str:
    """Lets the server have an artifact that a command takes. Returns its digest."""
    document = {
        "schemaVersion": 1,
        "mediaType": mediatypes.MANIFEST,
        "name": "x",
        "version": "1",
        "diskLayers": [{"ref": of_bytes(BIG), "format": "raw"}],
    }
    return server.serve_artifact({"disk": (DISK, BIG)}, (mediatypes.MANIFEST, json.dumps(document).encode()))


@pytest.mark.long
def test_whoever_breaks_a_pull_off_learns_that_it_goes_on(server: Server, tmp_path: Path) -> None:
    serve_disk(server)
    server.faults = [("GET", blob(BIG), faulty.stall(20))]
    ovm = Ovm(tmp_path / "root", tmp_path)
    pull = ovm.popen("--progress", "bar", "pull", f"{server.host}/x:1", stderr=subprocess.PIPE)
    path = tmp_path / "root/store/ovms.partial" / hex_of(of_bytes(BIG))
    faulty.wait_until(lambda: path.exists() and path.stat().st_size >= 9 << 18, 20)
    pull.send_signal(signal.SIGINT)
    said = pull.communicate(timeout=20)[1].decode()
    assert pull.returncode == Exit.INTERRUPTED
    assert re.search(r"broken off  2\.[2-5] MiB of 5\.0 MiB", said)
    assert "ovm: what came is kept: the next pull goes on from there\novm: interrupted\n" in said
    assert ovm("pull", "no-such.invalid/x:1").err.count("goes on from there") == 0
    ovm.ok("pull", f"{server.host}/x:1")
    assert str(server.asked("GET", blob(BIG))[-1]).startswith("bytes=2")


@pytest.mark.parametrize("progress", ["json", "bar"])
@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_pull_does_not_need_whoever_reads_of_its_progress(
    server: Server, tmp_path: Path, reader: str, progress: str
) -> None:
    manifest = serve_disk(server)
    ovm = Ovm(tmp_path / "root", tmp_path)
    theirs, ours = os.pipe()
    os.close(theirs)
    stderr = ours if reader == "gone" else os.open("/dev/full", os.O_WRONLY)
    process = ovm.popen(
        f"--progress={progress}", "pull", "--json", f"{server.host}/x:1", stdout=subprocess.PIPE, stderr=stderr
    )
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, json.loads(out)["digest"]) == (0, manifest)
    process = ovm.popen("pull", f"{server.host}/x:no", stderr=stderr)
    assert process.wait(30) == Exit.NOT_FOUND
    os.close(stderr)


# --- uploads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch, client: RegistryClient) -> RegistryClient:
    monkeypatch.setattr(registry, "CHUNKED_FROM", 1 << 20)
    monkeypatch.setattr(client, "_chunk_size", 1 << 20)
    return client


def push(layout: Layout, client: RegistryClient, data: bytes) -> Digest:
    digest = layout.add_bytes(data)
    body = upload._Body(layout.path(digest), NULL.task("x"), lambda: False)
    client.push_blob("x", Descriptor("a/b", digest, len(data)), body.open)
    return digest


def pass_on(handler: faulty.Handler, body: bytes) -> bool:
    return False


def test_a_large_blob_goes_in_chunks(layout: Layout, server: Server, chunked: RegistryClient) -> None:
    server.blobs.clear()
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("PATCH", "/uploads/")) == 5
    assert len(server.asked("POST", "/uploads/")) == 1


@pytest.mark.parametrize(
    "fault", [faulty.status(500), faulty.status(429, Retry_After="0"), faulty.hang_up], ids=["500", "429", "hang-up"]
)
def test_a_failed_chunk_is_sent_again_alone(
    layout: Layout, server: Server, chunked: RegistryClient, fault: faulty.Fault
) -> None:
    server.blobs.clear()
    server.faults = [("PATCH", "/uploads/", pass_on), ("PATCH", "/uploads/", fault)]
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("PATCH", "/uploads/")) == 6
    assert len(server.asked("POST", "/uploads/")) == 1


def test_an_upload_that_the_registry_forgot_begins_anew(
    layout: Layout, server: Server, chunked: RegistryClient
) -> None:
    def forget(handler: faulty.Handler, body: bytes) -> bool:
        handler.server.uploads.clear()
        return faulty.hang_up(handler, body)

    server.blobs.clear()
    server.faults = [("PATCH", "/uploads/", forget)]
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("POST", "/uploads/")) == 2


@pytest.mark.parametrize("code", [404, 405, 413, 416])
def test_a_registry_that_takes_no_chunks(layout: Layout, server: Server, chunked: RegistryClient, code: int) -> None:
    server.blobs.clear()
    server.faults = [("PATCH", "/uploads/", faulty.status(code))] * 3
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("PATCH", "/uploads/")) == 1
    push(layout, chunked, BIG[:-1])
    assert len(server.asked("PATCH", "/uploads/")) == 1, "it is not asked again"


def test_a_chunk_that_arrived_although_its_answer_was_lost(
    layout: Layout, server: Server, chunked: RegistryClient
) -> None:
    def swallow(handler: faulty.Handler, body: bytes) -> bool:
        session = handler.path.rpartition("/")[2]
        handler.server.uploads[session] += body
        return faulty.hang_up(handler, body)

    server.blobs.clear()
    server.faults = [("PATCH", "/uploads/", swallow)]
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("PATCH", "/uploads/")) == 5


@pytest.mark.parametrize("fault", [faulty.status(503), faulty.hang_up], ids=["503", "hang-up"])
def test_an_upload_outlasts_a_registry_that_can_t_tell_how_far_it_is(
    layout: Layout, server: Server, chunked: RegistryClient, fault: faulty.Fault
) -> None:
    server.blobs.clear()
    on, off = ("PATCH", "/uploads/", pass_on), ("PATCH", "/uploads/", faulty.hang_up)
    server.faults = [on, on, on, off, *[("GET", "/uploads/", fault)] * 2]
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("PATCH", "/uploads/")) == 6, "what had arrived is not sent again"
    assert len(server.asked("POST", "/uploads/")) == 1


@pytest.mark.parametrize("fault", [faulty.status(503), faulty.hang_up], ids=["503", "hang-up"])
def test_an_upload_whose_end_fails_is_ended_again(
    layout: Layout, server: Server, chunked: RegistryClient, fault: faulty.Fault
) -> None:
    server.blobs.clear()
    server.faults = [("PUT", "/uploads/", fault)] * 2
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("PATCH", "/uploads/")) == 5


@pytest.mark.parametrize("size", [len(BIG), len(SMALL)], ids=["in chunks", "in one piece"])
def test_an_upload_that_has_ended_although_the_answer_was_lost(
    layout: Layout, server: Server, chunked: RegistryClient, size: int
) -> None:
    def swallow(handler: faulty.Handler, body: bytes) -> bool:
        session = handler.path.partition("?")[0].rpartition("/")[2]
        data = handler.server.uploads.pop(session) + body
        handler.server.blobs[faulty.digest_of(data)] = data
        return faulty.hang_up(handler, body)

    server.blobs.clear()
    server.faults = [("PUT", "/uploads/", swallow)]
    digest = push(layout, chunked, BIG[:size])
    assert server.blobs[digest] == BIG[:size]
    assert len(server.asked("PUT", "/uploads/")) == 1
    assert len(server.asked("POST", "/uploads/")) == 1


def test_a_registry_that_is_at_another_place_is_asked_for_it(
    layout: Layout, server: Server, chunked: RegistryClient
) -> None:
    def half(handler: faulty.Handler, body: bytes) -> bool:
        session = handler.path.rpartition("/")[2]
        handler.server.uploads[session] += body[: len(body) // 2]
        handler.reply(202, Location=handler.path)
        return True

    server.blobs.clear()
    server.faults = [("PATCH", "/uploads/", pass_on), ("PATCH", "/uploads/", half)]
    digest = push(layout, chunked, BIG)
    assert server.blobs[digest] == BIG
    assert len(server.asked("POST", "/uploads/")) == 1


def test_a_registry_that_forgets_every_upload_is_given_up(
    layout: Layout, server: Server, chunked: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(handler: faulty.Handler, body: bytes) -> bool:
        handler.server.uploads.clear()
        return False

    monkeypatch.setattr(chunked, "_backoff", 0.001)
    server.faults = [("PATCH", "/uploads/", pass_on), ("PATCH", "/uploads/", forget)] * 20
    with pytest.raises(RegistryError, match="has lost count"):
        push(layout, chunked, BIG)
    assert len(server.asked("POST", "/uploads/")) == patience.ATTEMPTS_MAX


def test_a_chunk_goes_into_a_socket_and_not_a_byte_more(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"0123456789")
    told: list[int] = []
    with contextlib.closing(upload._Reader(path, 3, 4, told.append)) as reader:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            reader.send_to(ours)
            ours.shutdown(socket.SHUT_WR)
            assert theirs.recv(100) == b"3456"
    assert sum(told) == 4
