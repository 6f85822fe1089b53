"""A start from a registry: what the snapshot needs of the host is known before the bulk of it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli import Ovm
from support.faulty import Server
from support.guests import MEMORY, Console

from ovms.artifact import model
from ovms.artifact.resolve import Found, PullPolicy, find, resolve
from ovms.errors import BlobNotFound, SnapshotIncompatible, SnapshotInvalid
from ovms.oci.descriptor import Descriptor
from ovms.oci.fsck import Uses, check
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime import snapshots, starting
from ovms.runtime.local import Local
from ovms.runtime.runtime import RunOptions, Runtime, Started
from ovms.spec import ramsnap
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest, hex_of
from ovms.spec.manifest import PartKind
from ovms.spec.ramheader import Header

TCG = RunOptions(accel=Accel.TCG)
REQUIRE = replace(TCG, restore=RestorePolicy.REQUIRE)
NEVER = replace(TCG, restore=RestorePolicy.NEVER, memory=MEMORY)

Change = Callable[[Header], Header]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[RegistryClient]:
    with RegistryClient(server.host) as client:
        yield client


@pytest.fixture
def taken(runtime: Runtime, echo: Found) -> model.Artifact:
    """A snapshot of a guest that has counted to 1."""
    record = runtime.start(echo, replace(TCG, memory=MEMORY)).record
    console = Console(runtime.instances.directory(record.id))
    console.wait_for("READY")
    assert console.ping() == 1
    artifact = snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse("echo:snap")).artifact
    runtime.remove(runtime.instances.find(record.id), force=True)
    return artifact


def ram_of(artifact: model.Artifact) -> Digest:
    assert artifact.manifest.ram_snapshot is not None
    return Digest(artifact.manifest.ram_snapshot.ref)


def changed(runtime: Runtime, artifact: model.Artifact, change: Change) -> model.Artifact:
    """The same artifact with another header in its RAM snapshot."""
    layout = runtime.layout
    old = layout.path(ram_of(artifact)).read_bytes()
    control = ramsnap.parse_control(old)
    raw = ramsnap.build_control(
        change(control.header), control.state, control.chunks, chunk_pages=control.prefix.chunk_pages
    )
    new = raw + old[control.prefix.data_offset :]
    parts: dict[PartKind, list[Descriptor]] = {kind: [] for kind in PartKind}
    for part in artifact.manifest.parts():
        if part.kind is not PartKind.RAM:
            parts[part.kind].append(model.reused(artifact, part))
    digest = layout.add_bytes(new)
    document = {**artifact.manifest.document, "ramSnapshot": {"ref": digest}}
    return model.compose(
        layout,
        document,
        model.Parts(
            kernel=parts[PartKind.KERNEL][0],
            disks=tuple(parts[PartKind.DISK]),
            ram_snapshots=(model.part_descriptor(PartKind.RAM, digest, len(new)),),
        ),
    )


def newer(header: Header) -> Header:
    return replace(header, vmm_version="99.0")


def serve(server: Server, runtime: Runtime, artifact: model.Artifact) -> str:
    server.manifests["1"] = server.manifests[artifact.digest] = artifact.image.raw
    for blob in artifact.image.blobs:
        server.blobs[blob.digest] = runtime.layout.path(blob.digest).read_bytes()
    return f"{server.host}/x:1"


def start(
    runtime: Runtime, client: RegistryClient, ref: str, options: RunOptions, policy: PullPolicy = "missing"
) -> Started:
    """As ``ovm run`` does it."""
    with runtime.layout.using():
        found = resolve(runtime.layout, lambda _host: client, ref, policy=policy, gate=runtime.gate(options))
        return runtime.start(found, options)


def asked(server: Server, artifact: model.Artifact) -> list[str | None]:
    """The ranges of the RAM snapshot that were asked for; None is all of it."""
    return server.asked("GET", hex_of(ram_of(artifact)))


def control_only(server: Server, artifact: model.Artifact) -> bool:
    size = ramsnap.parse_prefix(server.blobs[ram_of(artifact)]).data_offset
    return asked(server, artifact) == ["bytes=0-127", f"bytes=128-{size - 1}"]


@pytest.mark.spec("RAM-50", "RAM-55", "RAM-33")
def test_require_is_refused_with_nothing_but_the_control_part(
    runtime: Runtime, away: Runtime, taken: model.Artifact, server: Server, client: RegistryClient
) -> None:
    artifact = changed(runtime, taken, newer)
    ref = serve(server, runtime, artifact)
    with pytest.raises(SnapshotIncompatible, match=r"99\.0"):
        start(away, client, ref, REQUIRE)
    assert control_only(server, artifact)
    for layer in artifact.image.layers:
        if layer.digest != ram_of(artifact):
            assert server.asked("GET", hex_of(layer.digest)) == []
    assert away.layout.entries() == []
    with pytest.raises(SnapshotIncompatible, match="32 MiB"):
        start(away, client, ref, replace(TCG, memory=64 << 20))
    with pytest.raises(SnapshotInvalid, match="not one of this artifact"):
        start(
            away,
            client,
            serve(server, runtime, changed(runtime, taken, lambda header: replace(header, kernel_args="single"))),
            TCG,
        )
    assert away.layout.entries() == []


@pytest.mark.spec("RAM-52", "RAM-46", "RAM-50")
def test_an_unfit_host_boots_without_the_data_region(
    runtime: Runtime, away: Runtime, taken: model.Artifact, server: Server, client: RegistryClient
) -> None:
    artifact = changed(runtime, taken, newer)
    started = start(away, client, serve(server, runtime, artifact), replace(TCG, memory=None))
    assert "99.0" in str(started.not_restored)
    assert control_only(server, artifact)
    assert check(away.layout, Uses).findings == []
    # the reason is told again, though the control part has no digest to vouch for it and is not kept
    again = start(away, client, f"{server.host}/x:1", TCG)
    assert again.not_restored == started.not_restored
    with pytest.raises(BlobNotFound, match="left out"):
        away.start(find(away.layout, f"{server.host}/x:1"), TCG)


@pytest.mark.spec("RAM-52")
def test_never_asks_for_nothing_of_it_and_a_restore_later_fetches_it(
    runtime: Runtime, away: Runtime, taken: model.Artifact, server: Server, client: RegistryClient
) -> None:
    ref = serve(server, runtime, taken)
    started = start(away, client, ref, NEVER)
    assert started.not_restored is None
    Console(away.instances.directory(started.record.id)).wait_for("READY")
    assert asked(server, taken) == []
    with pytest.raises(BlobNotFound, match="left out") as error:
        start(away, client, ref, TCG, "never")
    assert "--cold" in str(error.value.hint)
    sent = server.sent
    restored = start(away, client, ref, REQUIRE).record
    assert restored.restored
    assert Console(away.instances.directory(restored.id)).ping() == 2
    assert server.sent - sent < 2 * len(server.blobs[ram_of(taken)]), "nothing but the snapshot"
    assert start(away, client, ref, NEVER).not_restored is None
    assert list(away.layout.absent_dir.iterdir()) == []


def test_a_fit_one_is_restored_at_once(
    runtime: Runtime, away: Runtime, taken: model.Artifact, server: Server, client: RegistryClient
) -> None:
    record = start(away, client, serve(server, runtime, taken), TCG).record
    assert record.restored
    assert Console(away.instances.directory(record.id)).ping() == 2


@pytest.mark.spec("RAM-50", "RAM-52")
def test_a_start_by_the_contract_asks_the_same(
    runtime: Runtime, away: Runtime, taken: model.Artifact, server: Server, client: RegistryClient
) -> None:
    artifact = changed(runtime, taken, newer)
    ref = serve(server, runtime, artifact)
    begun = starting.begin(away, ref, REQUIRE)
    assert isinstance(begun, starting.Start)
    with pytest.raises(SnapshotIncompatible):
        begun.run(lambda _host: client)
    for _ in range(2):
        begun = starting.begin(away, ref, TCG)
        assert isinstance(begun, starting.Start)
        assert "99.0" in str(begun.run(lambda _host: client).not_restored)
    size = ramsnap.parse_prefix(server.blobs[ram_of(artifact)]).data_offset
    assert {int(str(found).rpartition("-")[2]) for found in asked(server, artifact)} == {127, size - 1}


@pytest.mark.spec("RAM-50")
def test_require_needs_one(
    runtime: Runtime, away: Runtime, echo: Found, server: Server, client: RegistryClient
) -> None:
    ref = serve(server, runtime, echo.artifact)
    with pytest.raises(SnapshotIncompatible, match="no RAM snapshot"):
        start(away, client, ref, REQUIRE)
    assert len(server.seen) == 2, "both manifests, and no more"


@pytest.mark.spec("RAM-52", "RAM-55")
def test_the_command_line_and_the_client_ask_too(
    runtime: Runtime, away: Runtime, taken: model.Artifact, server: Server, client: RegistryClient, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    ovm = Ovm(away.root.path, tmp_path / "home")
    artifact = changed(runtime, taken, newer)
    ref = serve(server, runtime, artifact)
    refused = ovm("run", "-d", "--accel", "tcg", "--restore", "require", ref, "--json")
    assert (refused.code, refused.error["code"]) == (11, "snapshot-incompatible")
    assert ovm.ok("ls", "-q").out == ""
    started = ovm.ok("run", "-d", "-m", "32m", "--accel", "tcg", "--cold", ref, "--json").json
    assert started["not_restored"] is None
    assert "left out" in ovm.ok("ls").out
    booted = Local(away, lambda _host: client).start(ref, TCG)
    assert "99.0" in booted["not_restored"]
    size = ramsnap.parse_prefix(server.blobs[ram_of(artifact)]).data_offset
    assert {int(str(found).rpartition("-")[2]) for found in asked(server, artifact)} == {127, size - 1}
