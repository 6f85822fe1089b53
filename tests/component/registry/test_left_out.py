"""RAM snapshots that are left out: decided by the control part, told as such, and fetched when they are needed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import artifacts, ram
from support.cli import Ovm
from support.counting import Counter
from support.faulty import Server
from support.registry import Registry
from support.stores import damage

from ovms import fsutil
from ovms.artifact import model, resolve
from ovms.artifact import ram as choosing
from ovms.artifact.ram import unwanted
from ovms.artifact.resolve import Found, find
from ovms.artifact.validate import validate_artifact
from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    DiskFull,
    RegistryUnreachable,
    SnapshotIncompatible,
    SnapshotInvalid,
)
from ovms.oci import absent, control, download, transfer
from ovms.oci.collector import Needs, Options, collect
from ovms.oci.descriptor import Descriptor
from ovms.oci.fsck import Uses, check
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.oci.repair import repair
from ovms.oci.whole import require_whole
from ovms.progress import NULL
from ovms.spec import mediatypes, ramsnap
from ovms.spec.digest import hex_of, of_bytes
from ovms.spec.manifest import Manifest

PAGES = 3 << 8
RAM = ram.blob(
    {at: random.Random(at).randbytes(16 * ramsnap.PAGE) for at in range(0, PAGES, 16)},
    ram.header(memory=PAGES * ramsnap.PAGE),
    chunk_pages=16,
)
CONTROL = ramsnap.parse_prefix(RAM).data_offset
DISK = random.Random("disk").randbytes(400_000)
#: What manifests, headers and the answers' heads come to, at most.
SLACK = 20_000

Control = Callable[[], ramsnap.Control]


@pytest.fixture
def source(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "source")


@pytest.fixture
def counter(registry: Registry) -> Iterator[Counter]:
    with Counter(registry.port) as counter:
        yield counter


@pytest.fixture
def client(counter: Counter) -> Iterator[RegistryClient]:
    with RegistryClient(counter.host) as client:
        yield client


@pytest.fixture
def ref(counter: Counter, source: Layout, client: RegistryClient, request: pytest.FixtureRequest) -> str:
    """The name of an artifact in the registry."""
    reference = Reference(counter.host, f"left/{abs(hash(request.node.name)) % 10**9}", "1")
    artifact = artifacts.with_ram(source, str(reference), RAM, disk=DISK)
    transfer.push(source, client, reference, artifact.digest)
    counter.since()
    return str(reference)


def unfit(manifest: Manifest, read: Control) -> str:
    """A gate that looks at the control part, and does not like it."""
    assert read().prefix.memory_size == PAGES * ramsnap.PAGE
    assert manifest.ram_snapshot is not None
    return "this host is unfit"


def fit(manifest: Manifest, read: Control) -> None:
    read()


def pull(layout: Layout, client: RegistryClient, ref: str, gate: choosing.Gate | None) -> Found:
    return resolve.pull(layout, lambda _host: client, ref, gate=gate)


def no_registry(host: str) -> RegistryClient:
    raise AssertionError(f"{host} is asked")


def is_sound(layout: Layout) -> bool:
    return check(layout, Uses).findings == []


@pytest.mark.spec("RAM-52", "OCI-29")
def test_what_is_not_wanted_is_not_fetched_and_the_store_is_whole_all_the_same(
    layout: Layout, client: RegistryClient, counter: Counter, ref: str
) -> None:
    found = pull(layout, client, ref, unwanted)
    assert counter.since() < len(DISK) + SLACK
    assert layout.size(of_bytes(RAM)) is None
    assert [blob.digest for blob in choosing.left_out(layout, found.artifact)] == [of_bytes(RAM)]
    require_whole(layout, ref, found.artifact.image.blobs)
    assert is_sound(layout)
    collect(layout, Needs, Options())
    assert is_sound(layout), "a clean-up knows of it"
    pull(layout, client, ref, None)
    assert layout.path(of_bytes(RAM)).read_bytes() == RAM
    assert counter.since() < len(RAM) + SLACK, "the rest is here"
    assert list(layout.absent_dir.iterdir()) == []
    assert is_sound(layout)


@pytest.mark.spec("RAM-46", "RAM-52", "RAM-55")
def test_the_control_part_is_all_that_a_gate_needs(
    layout: Layout, client: RegistryClient, counter: Counter, ref: str
) -> None:
    found = pull(layout, client, ref, unfit)
    assert counter.since() < len(DISK) + CONTROL + SLACK
    assert found.left_out == "this host is unfit"
    assert absent.control_part(layout, choosing.left_out(layout, found.artifact)[0]) == RAM[:CONTROL]
    # and is known here from now on
    again = resolve.resolve(layout, no_registry, ref, gate=unfit)
    assert again.left_out == "this host is unfit"
    assert is_sound(layout)


@pytest.mark.spec("RAM-55")
def test_a_refusal_comes_before_any_bulk(layout: Layout, client: RegistryClient, counter: Counter, ref: str) -> None:
    def refuse(manifest: Manifest, read: Control) -> str:
        raise SnapshotIncompatible(unfit(manifest, read))

    with pytest.raises(SnapshotIncompatible):
        pull(layout, client, ref, refuse)
    assert counter.since() < CONTROL + SLACK
    assert layout.entries() == []
    assert layout.size(of_bytes(DISK)) is None


def test_one_that_is_needed_comes_with_the_rest(layout: Layout, client: RegistryClient, ref: str) -> None:
    found = pull(layout, client, ref, fit)
    assert found.left_out is None
    assert layout.path(of_bytes(RAM)).read_bytes() == RAM
    assert not layout.absent_dir.exists()


def test_room_is_needed_for_what_is_fetched(
    layout: Layout, client: RegistryClient, counter: Counter, ref: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsutil, "free_space", lambda path: fsutil.SPACE_RESERVE + len(DISK) + len(RAM) // 2)
    for gate in (None, fit):
        with pytest.raises(DiskFull):
            pull(layout, client, ref, gate)
    assert counter.since() < CONTROL + SLACK, "said before the bulk comes"
    pull(layout, client, ref, unwanted)


def test_it_is_fetched_when_it_is_needed_and_nothing_else(
    layout: Layout, client: RegistryClient, counter: Counter, ref: str
) -> None:
    pull(layout, client, ref, unwanted)
    counter.since()
    image = find(layout, ref).artifact.image.descriptor()
    layout.set_name("mine:1", image)
    layout.remove_name(ref)
    with pytest.raises(BlobNotFound, match=r"mine:1 can't be restored.*left out") as error:
        resolve.resolve(layout, no_registry, "mine:1", gate=fit)
    assert "--cold" in str(error.value.hint)
    layout.set_name(f"{counter.host}/nowhere/of:that", image)
    layout.set_name(ref, image)
    with pytest.raises(BlobNotFound):
        resolve.resolve(layout, no_registry, "mine:1", gate=fit, policy="never")
    with pytest.raises(RegistryUnreachable) as unreachable:
        resolve.resolve(layout, lambda _host: RegistryClient("127.0.0.1:1", backoff=0.001), "mine:1", gate=fit)
    assert "--cold" in str(unreachable.value.hint)
    assert resolve.resolve(layout, no_registry, "mine:1").left_out is None, "who does not ask, does not need it"
    resolve.resolve(layout, lambda _host: client, "mine:1", gate=fit)
    assert layout.path(of_bytes(RAM)).read_bytes() == RAM
    assert counter.since() < len(RAM) + CONTROL + SLACK
    assert list(layout.absent_dir.iterdir()) == []


def test_what_was_left_out_can_not_be_passed_on(
    layout: Layout, client: RegistryClient, counter: Counter, ref: str, tmp_path: Path
) -> None:
    pull(layout, client, ref, unwanted)
    for target in (f"oci:{tmp_path / 'out'}", f"oci-archive:{tmp_path / 'out.tar'}", f"{counter.host}/an/other:1"):
        with pytest.raises(BlobNotFound, match="left out") as error:
            resolve.push(layout, lambda _host: client, ref, destination=target)
        assert error.value.hint == f"'ovm pull {ref}' fetches it"
    assert list(tmp_path.glob("out*")) == []
    # where it is already, nothing has to be passed on
    resolve.push(layout, lambda _host: client, ref)


def test_a_lost_one_was_not_left_out(layout: Layout, client: RegistryClient, ref: str) -> None:
    pull(layout, client, ref, unwanted)
    pull(layout, client, ref, None)
    absent.note(layout, find(layout, ref).artifact.blob(of_bytes(RAM)), None)
    assert not layout.absent_dir.joinpath(hex_of(of_bytes(RAM))).exists(), "it is here"
    # as if we had been killed before the note was taken away
    layout.absent_dir.joinpath(hex_of(of_bytes(RAM))).touch()
    damage(layout, of_bytes(RAM))
    report = repair(layout, Uses)
    assert [finding.digest for finding in report.findings if finding.fault == "artifact-incomplete"]
    pull(layout, client, ref, None)
    assert is_sound(layout)


def test_only_ram_snapshots_are_left_out(layout: Layout, client: RegistryClient, ref: str) -> None:
    pull(layout, client, ref, unwanted)
    layout.path(of_bytes(DISK)).unlink()
    (layout.absent_dir / hex_of(of_bytes(DISK))).touch()
    assert [finding.missing for finding in check(layout, Uses).findings] == [(of_bytes(DISK),)]
    with pytest.raises(BlobNotFound):
        require_whole(layout, ref, find(layout, ref).artifact.image.blobs)


def test_a_note_that_nobody_needs_is_swept(
    layout: Layout, client: RegistryClient, ref: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layout, "set_name", killed)
        pull(layout, client, ref, unwanted)
    assert list(layout.absent_dir.iterdir())
    (layout.absent_dir / ".0123.abc.tmp").touch()
    assert all(finding.fault.harmless for finding in check(layout, Uses).findings)
    collect(layout, Needs)
    assert list(layout.absent_dir.iterdir()) == []
    # a name keeps it, and its end does not
    pull(layout, client, ref, unwanted)
    (layout.absent_dir / hex_of(of_bytes(DISK))).touch()
    collect(layout, Needs)
    assert [path.name for path in layout.absent_dir.iterdir()] == [hex_of(of_bytes(RAM))]
    layout.remove_name(ref)
    collect(layout, Needs)
    assert list(layout.absent_dir.iterdir()) == []


def test_without_a_digest_that_vouches_for_it_nothing_is_believed_later(
    layout: Layout, source: Layout, client: RegistryClient, counter: Counter
) -> None:
    reference = Reference(counter.host, "left/plain", "1")
    artifact = artifacts.with_ram(source, str(reference), RAM, disk=DISK, annotated=False)
    transfer.push(source, client, reference, artifact.digest)
    counter.since()
    found = pull(layout, client, str(reference), unfit)
    assert counter.since() < len(DISK) + CONTROL + SLACK
    assert found.left_out == "this host is unfit"
    blob = choosing.left_out(layout, found.artifact)[0]
    assert absent.control_part(layout, blob) is None
    assert resolve.resolve(layout, lambda _host: client, str(reference), gate=unfit).left_out
    assert CONTROL <= counter.since() < CONTROL + SLACK, "asked for again"


@pytest.mark.parametrize("place", ["oci:{}", "oci-archive:{}"])
def test_places_on_disk_alike(place: str, layout: Layout, source: Layout, tmp_path: Path) -> None:
    artifacts.with_ram(source, "test:1", RAM, disk=DISK)
    where = place.format(tmp_path / "there")
    resolve.push(source, no_registry, "test:1", destination=where)
    found = resolve.pull(layout, no_registry, where, gate=unfit)
    assert found.left_out == "this host is unfit"
    assert layout.size(of_bytes(RAM)) is None
    assert absent.control_part(layout, choosing.left_out(layout, found.artifact)[0]) == RAM[:CONTROL]
    assert resolve.resolve(layout, no_registry, where, gate=unfit).left_out
    assert resolve.resolve(layout, no_registry, where, gate=fit).left_out is None
    assert layout.path(of_bytes(RAM)).read_bytes() == RAM
    assert is_sound(layout)


# --- registries that can't, or won't ---------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def serve(server: Server, source: Layout, artifact: model.Artifact) -> str:
    server.manifests["1"] = artifact.image.raw
    server.blobs = {blob.digest: source.path(blob.digest).read_bytes() for blob in artifact.image.blobs}
    return f"{server.host}/x:1"


def test_a_registry_without_ranges_is_hung_up_on(layout: Layout, source: Layout, server: Server) -> None:
    big = ram.blob(
        {at: random.Random(at).randbytes(16 * ramsnap.PAGE) for at in range(0, 4096, 16)},
        ram.header(memory=16 << 20),
        chunk_pages=16,
    )
    ref = serve(server, source, artifacts.with_ram(source, "test:1", big, disk=DISK))
    sent = 0

    def pace(amount: int) -> None:
        nonlocal sent
        sent += amount
        time.sleep(0.001)

    server.ranges, server.pace = False, pace
    with RegistryClient(server.host) as client:
        found = pull(layout, client, ref, lambda _manifest, read: f"it has {len(read().chunks)} chunks")
        assert found.left_out == "it has 256 chunks"
        assert sent < len(big) // 2, "no more than was on its way"
        server.pace = None
        pull(layout, client, ref, None)
    assert layout.path(of_bytes(big)).read_bytes() == big


@pytest.mark.spec("RAM-46")
@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (mediatypes.RAM_CONTROL_ANNOTATION, of_bytes(b"another")),
        (mediatypes.RAM_CONTROL_SIZE_ANNOTATION, str(CONTROL + 1)),
        (mediatypes.RAM_CONTROL_SIZE_ANNOTATION, "100"),
        (mediatypes.RAM_CONTROL_SIZE_ANNOTATION, str(len(RAM) + 1)),
        (mediatypes.RAM_CONTROL_SIZE_ANNOTATION, "9" * 40),
        (mediatypes.RAM_CONTROL_SIZE_ANNOTATION, "-1"),
    ],
)
def test_annotations_that_lie(annotation: str, value: str) -> None:
    annotations = {
        mediatypes.RAM_CONTROL_ANNOTATION: of_bytes(RAM[:CONTROL]),
        mediatypes.RAM_CONTROL_SIZE_ANNOTATION: str(CONTROL),
        annotation: value,
    }
    blob = Descriptor(mediatypes.RAM_SNAPSHOT_LZ4, of_bytes(RAM), len(RAM), annotations)
    with pytest.raises(DigestMismatch) as error:
        control.fetch(blob, lambda offset, size: RAM[offset : offset + size])
    assert error.value.context["rule"] == "RAM-46"


def test_a_control_part_of_a_blob_of_another_size() -> None:
    blob = Descriptor(mediatypes.RAM_SNAPSHOT_LZ4, of_bytes(RAM), len(RAM) - 1)
    with pytest.raises(SnapshotInvalid) as error:
        control.fetch(blob, lambda offset, size: RAM[offset : offset + size])
    assert error.value.context["rule"] == "RAM-1"


def test_a_registry_that_sends_another_control_part(layout: Layout, source: Layout, server: Server) -> None:
    artifact = artifacts.with_ram(source, "test:1", RAM, disk=DISK)
    ref = serve(server, source, artifact)
    other = ram.blob({0: b"b" * ramsnap.PAGE}, ram.header(memory=PAGES * ramsnap.PAGE))
    server.blobs[of_bytes(RAM)] = other.ljust(len(RAM), b"\0")
    with RegistryClient(server.host) as client:
        with pytest.raises((DigestMismatch, SnapshotInvalid)):
            pull(layout, client, ref, unfit)
        del server.blobs[of_bytes(RAM)]
        with pytest.raises(BlobNotFound):
            pull(layout, client, ref, unfit)
    assert layout.entries() == []
    assert layout.size(of_bytes(DISK)) is None, "before the bulk"


def test_nothing_of_the_data_region_is_asked_for(source: Layout, server: Server) -> None:
    artifact = artifacts.with_ram(source, "test:1", RAM, disk=DISK, annotated=False)
    serve(server, source, artifact)
    with RegistryClient(server.host) as client:
        raw = download.read_control(client, "x", artifact.blob(of_bytes(RAM)), NULL)
    assert raw == RAM[:CONTROL]
    asked = server.asked("GET", hex_of(of_bytes(RAM)))
    assert asked == ["bytes=0-127", f"bytes=128-{CONTROL - 1}"]


def test_the_command_line_says_so(tmp_path: Path, source: Layout, server: Server) -> None:
    (tmp_path / "home").mkdir()
    ovm = Ovm(tmp_path / "root", tmp_path / "home")
    ref = serve(server, source, artifacts.with_ram(source, "test:1", RAM, disk=DISK))
    pulled = ovm.ok("pull", "--no-ram", "--json", ref).json
    assert pulled["left_out"] == [of_bytes(RAM)]
    assert len(DISK) <= pulled["fetched"] < len(DISK) + SLACK
    assert "left out" in ovm.ok("ls").out
    listed = ovm.ok("ls", "--json").json
    assert [(entry["ram_snapshot"], entry["ram_left_out"]) for entry in listed] == [(True, True)]
    assert ovm.ok("inspect", ref).json["ram_snapshot"] == {"left_out": [of_bytes(RAM)]}
    refused = ovm("push", ref, f"oci:{tmp_path / 'out'}", "--json")
    assert (refused.code, refused.error["code"]) == (4, "blob-not-found")
    assert refused.error["hint"] == f"'ovm pull {ref}' fetches it"
    assert ovm.ok("fsck").out.endswith("sound\n")
    whole = ovm.ok("pull", "--json", ref).json
    assert (whole["left_out"], whole["reused"]) == ([], 0)
    assert ovm.ok("inspect", ref).json["ram_snapshot"]["chunks"] == PAGES // 16


def test_what_is_not_here_is_not_called_valid(layout: Layout, source: Layout, server: Server) -> None:
    ref = serve(server, source, artifacts.with_ram(source, "test:1", RAM, disk=DISK))
    with RegistryClient(server.host) as client:
        digest = pull(layout, client, ref, unwanted).artifact.digest
    report = validate_artifact(layout, ref, digest)
    assert [(p.part, p.code, p.hint) for p in report.problems if p.part == "the RAM snapshot"] == [
        ("the RAM snapshot", "blob-not-found", f"'ovm pull {ref}' fetches it")
    ]
