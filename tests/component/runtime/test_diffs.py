"""Snapshots of what was restored from one: real QEMU, and the bare guest, whose counter lives in its memory alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import ram
from support.guests import MEMORY, Console, hmp
from support.registry import Registry

from ovms.artifact import model
from ovms.artifact.resolve import Found, find
from ovms.artifact.validate import validate_artifact
from ovms.cli.main import main
from ovms.errors import BlobNotFound, InputError, OvmsError, SnapshotInvalid, VmmError
from ovms.memory import capture, chain, snapshot
from ovms.memory.flatten import flatten
from ovms.oci import transfer
from ovms.oci.collector import collect
from ovms.oci.fsck import Uses, check
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime import commit, snapshots
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import ramsnap
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.spec.manifest import Compression, PartKind, RamSnapshot

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG, restore=RestorePolicy.REQUIRE)


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def take(runtime: Runtime, record: Record, name: str) -> snapshots.Taken:
    return snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse(name))


def clone(runtime: Runtime, name: str) -> Record:
    return runtime.start(find(runtime.layout, name), RESTORE).record


def ram_of(artifact: model.Artifact) -> RamSnapshot:
    assert artifact.manifest.ram_snapshot is not None
    return artifact.manifest.ram_snapshot


def forget_images(runtime: Runtime) -> None:
    for image in runtime.layout.derived_dir.glob("*.ram"):
        image.unlink()


@pytest.fixture
def base(runtime: Runtime, echo: Found) -> snapshots.Taken:
    """The snapshot "echo:a" of a guest that has counted to 1, and is no more."""
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    assert console(runtime, record).ping() == 1
    taken = take(runtime, record, "echo:a")
    runtime.remove(record, force=True)
    return taken


@pytest.mark.spec("RAM-40", "RAM-42", "RAM-43", "RAM-44", "RAM-45", "RUN-13", "OCI-3")
def test_a_snapshot_of_a_clone_is_a_diff(runtime: Runtime, base: snapshots.Taken) -> None:
    first = clone(runtime, "echo:a")
    assert console(runtime, first).ping() == 2
    taken = take(runtime, first, "echo:b")
    assert taken.parents == 1
    assert ram_of(taken.artifact).parents == (ram_of(base.artifact).ref,)
    assert taken.ram_size < min(base.ram_size, 1 << 20)
    control = snapshot.read_control(runtime.layout, Digest(ram_of(taken.artifact).ref))
    assert control.header.parent == ram_of(base.artifact).ref
    assert [layer.annotations["org.opencontainers.image.title"] for layer in taken.artifact.image.layers[-2:]] == [
        "ram-0.ovmr",
        "ram-1.ovmr",
    ]
    assert console(runtime, first).ping() == 3, "the clone goes on"
    for without in (False, True):  # over the parent's image, and without it
        if without:
            forget_images(runtime)
        again = clone(runtime, "echo:b")
        assert console(runtime, again).ping() == 3
        runtime.remove(again, force=True)


@pytest.mark.spec("RAM-40", "RAM-43")
def test_clones_of_clones_and_second_snapshots(runtime: Runtime, base: snapshots.Taken) -> None:
    first = clone(runtime, "echo:a")
    console(runtime, first).ping()
    b = take(runtime, first, "echo:b")
    console(runtime, first).ping()
    c = take(runtime, first, "echo:c")  # a second one of the same clone: on the same parent
    assert ram_of(c.artifact).parents == ram_of(b.artifact).parents
    second = clone(runtime, "echo:b")
    assert console(runtime, second).ping() == 3
    d = take(runtime, second, "echo:d")
    assert ram_of(d.artifact).parents == (ram_of(base.artifact).ref, ram_of(b.artifact).ref)
    third = clone(runtime, "echo:d")
    assert console(runtime, third).ping() == 4
    e = take(runtime, third, "echo:e")
    assert len(ram_of(e.artifact).parents) == 3
    forget_images(runtime)
    for name, count in (("echo:c", 4), ("echo:e", 5), ("echo:a", 2)):
        record = clone(runtime, name)
        assert console(runtime, record).ping() == count
        runtime.remove(record, force=True)
    for name in ("echo:b", "echo:c", "echo:d", "echo:e"):
        assert validate_artifact(runtime.layout, name, find(runtime.layout, name).artifact.digest).problems == []
    assert not check(runtime.layout, Uses).findings


def test_a_diff_is_the_very_memory(runtime: Runtime, base: snapshots.Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one paused VM: what a diff gives, and what a base does; also after a reset, which writes all over."""
    record = clone(runtime, "echo:a")
    console(runtime, record).send("r")
    console(runtime, record).wait_for("READY")
    runtime.pause(record)
    diff = take(runtime, record, "echo:diff")
    monkeypatch.setattr(chain, "PARENTS", 0)
    whole = take(runtime, record, "echo:whole")
    assert (diff.parents, whole.parents) == (1, 0)
    images = [snapshot.materialise(runtime.layout, Digest(ram_of(taken.artifact).ref)) for taken in (diff, whole)]
    assert images[0].read_bytes() == images[1].read_bytes()
    assert diff.ram_size < whole.ram_size


@pytest.mark.parametrize("broken", ["room", "at once"])
def test_the_slower_ways_copy_the_same(
    runtime: Runtime, base: snapshots.Taken, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    record = clone(runtime, "echo:a")
    assert console(runtime, record).ping() == 2
    if broken == "room":
        monkeypatch.setattr(capture, "_POPULATE_WRITE", 12345)  # as a kernel has it that does not know this one
    else:
        monkeypatch.setattr(capture, "_read_at_once", lambda *_: False)
    assert take(runtime, record, "echo:b").parents == 1
    assert console(runtime, clone(runtime, "echo:b")).ping() == 3


@pytest.mark.spec("RAM-41")
def test_a_chain_that_grows_too_long_begins_anew(
    runtime: Runtime, base: snapshots.Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "PARENTS", 2)
    name, found = "echo:a", []
    for i in range(4):
        record = clone(runtime, name)
        assert console(runtime, record).ping() == 2 + i
        name = f"echo:{i}"
        found.append(take(runtime, record, name).parents)
        runtime.remove(record, force=True)
    assert found == [1, 2, 0, 1]
    assert console(runtime, clone(runtime, name)).ping() == 6


def test_without_its_parent_it_is_a_base(runtime: Runtime, base: snapshots.Taken) -> None:
    record = clone(runtime, "echo:a")
    console(runtime, record).ping()
    runtime.layout.path(Digest(ram_of(base.artifact).ref)).unlink()
    taken = take(runtime, record, "echo:b")
    assert taken.parents == 0
    assert console(runtime, clone(runtime, "echo:b")).ping() == 3


# --- of what was booted ----------------------------------------------------------------------------------------------


@pytest.fixture
def booted(runtime: Runtime, echo: Found) -> Record:
    """A guest that was booted, and whose memory stands still in its first snapshot, "echo:first"."""
    record = runtime.start(echo, TCG).record
    console(runtime, record).wait_for("READY")
    assert take(runtime, record, "echo:first").parents == 0
    if runtime.instances.find(record.id).still is None:
        pytest.skip("memory does not stand still in place here")
    return record


@pytest.mark.spec("RAM-40", "RAM-42")
def test_later_snapshots_of_a_booted_vm_are_diffs_on_its_first(runtime: Runtime, booted: Record) -> None:
    first = ram_of(find(runtime.layout, "echo:first").artifact).ref
    for count in (1, 2):
        assert console(runtime, booted).ping() == count
        taken = take(runtime, booted, f"echo:{count}-pings")
        assert ram_of(taken.artifact).parents == (first,)
        assert taken.ram_size < 1 << 18
    assert console(runtime, booted).ping() == 3
    for name, count in (("echo:first", 1), ("echo:1-pings", 2), ("echo:2-pings", 3)):
        assert console(runtime, clone(runtime, name)).ping() == count
        assert validate_artifact(runtime.layout, name, find(runtime.layout, name).artifact.digest).problems == []


def test_without_the_first_it_is_a_base(runtime: Runtime, booted: Record) -> None:
    runtime.layout.remove_name("echo:first")
    collect(runtime.layout, runtime.instances.needs)
    assert console(runtime, booted).ping() == 1
    assert take(runtime, booted, "echo:b").parents == 0
    assert console(runtime, clone(runtime, "echo:b")).ping() == 2


def test_a_vm_that_is_started_again_has_another_memory(runtime: Runtime, booted: Record) -> None:
    runtime.kill(booted)
    again = runtime.start_again(runtime.instances.find(booted.id))
    console(runtime, again).wait_for("READY")
    assert console(runtime, again).ping() == 1
    assert again.still is None, "it was of the one before"
    # also where its memory stands still, and nobody could note in which snapshot
    patch = pytest.MonkeyPatch()
    patch.setattr(snapshot, "store", lambda *_, **__: (_ for _ in ()).throw(VmmError("no")))
    with pytest.raises(VmmError):
        take(runtime, again, "echo:b")
    patch.undo()
    assert take(runtime, again, "echo:b").parents == 0
    assert console(runtime, clone(runtime, "echo:b")).ping() == 2


@pytest.mark.spec("RAM-17", "RAM-45")
def test_zstd_is_kept_by_the_whole_chain(runtime: Runtime, base: snapshots.Taken) -> None:
    packed = zstd(runtime, base.artifact)
    runtime.layout.set_name("echo:z", packed.image.descriptor())
    record = clone(runtime, "echo:z")
    assert console(runtime, record).ping() == 2
    taken = take(runtime, record, "echo:zz")
    assert ram_of(taken.artifact) == RamSnapshot(
        ram_of(taken.artifact).ref, Compression.ZSTD, parents=(ram_of(packed).ref,)
    )
    assert validate_artifact(runtime.layout, "echo:zz", taken.artifact.digest).problems == []
    forget_images(runtime)
    assert console(runtime, clone(runtime, "echo:zz")).ping() == 3


def zstd(runtime: Runtime, artifact: model.Artifact) -> model.Artifact:
    """The same artifact, its RAM snapshot compressed otherwise."""
    layout, digest = runtime.layout, Digest(ram_of(artifact).ref)
    control = snapshot.read_control(layout, digest)
    with snapshot.materialise(layout, digest).open("rb") as image:
        memory = capture.Capture(image.fileno(), None, [], MEMORY)
        ref, size = snapshot.store(layout, memory, control.state, control.header, compression=Compression.ZSTD)
    document = json.loads(json.dumps(artifact.manifest.document))
    document["ramSnapshot"] = {"ref": ref, "compression": "zstd"}
    parts = {part.kind: model.reused(artifact, part) for part in artifact.manifest.parts()}
    disks = [model.reused(artifact, part) for part in artifact.manifest.parts() if part.kind is PartKind.DISK]
    made = model.part_descriptor(PartKind.RAM, ref, size, compression=Compression.ZSTD)
    return model.compose(
        layout, document, model.Parts(kernel=parts[PartKind.KERNEL], disks=tuple(disks), ram_snapshots=(made,))
    )


# --- flattening ------------------------------------------------------------------------------------------------------


def diff_of(runtime: Runtime, name: str) -> snapshots.Taken:
    """A diff called *name* on "echo:a", whose guest has counted to 2."""
    record = clone(runtime, "echo:a")
    assert console(runtime, record).ping() == 2
    taken = take(runtime, record, name)
    runtime.remove(record, force=True)
    return taken


@pytest.mark.spec("RAM-18", "RAM-40")
def test_flattened(runtime: Runtime, base: snapshots.Taken) -> None:
    diff = diff_of(runtime, "echo:b")
    made = flatten(runtime.layout, find(runtime.layout, "echo:b"))
    assert made.parents == 1
    assert flatten(runtime.layout, find(runtime.layout, "echo:b")).artifact.digest == made.artifact.digest
    before, after = dict(diff.artifact.manifest.document), dict(made.artifact.manifest.document)
    old, new = before.pop("ramSnapshot"), after.pop("ramSnapshot")
    assert before == after
    assert new == {**{key: value for key, value in old.items() if key != "parents"}, "ref": new["ref"]}
    assert made.artifact.image.subject is not None
    assert diff.artifact.image.subject is not None
    assert made.artifact.image.subject.digest == diff.artifact.image.subject.digest
    assert len(made.artifact.image.layers) == len(diff.artifact.image.layers) - 1
    headers = [snapshot.read_control(runtime.layout, Digest(ref)).header for ref in (old["ref"], new["ref"])]
    assert headers[1] == replace(headers[0], parent=None)
    runtime.layout.set_name("echo:flat", made.artifact.image.descriptor())
    for name in ("echo:a", "echo:b"):
        runtime.layout.remove_name(name)
    collect(runtime.layout, runtime.instances.needs)
    assert runtime.layout.size(Digest(old["ref"])) is None
    assert validate_artifact(runtime.layout, "echo:flat", made.artifact.digest).problems == []
    assert console(runtime, clone(runtime, "echo:flat")).ping() == 3


def test_what_cannot_be_flattened(runtime: Runtime, base: snapshots.Taken) -> None:
    again = flatten(runtime.layout, find(runtime.layout, "echo:a"))
    assert (again.parents, again.artifact.digest) == (0, base.artifact.digest)
    with pytest.raises(InputError, match="no RAM snapshot"):
        flatten(runtime.layout, find(runtime.layout, "echo:1"))
    diff_of(runtime, "echo:b")
    blob = runtime.layout.path(Digest(ram_of(base.artifact).ref))
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    forget_images(runtime)
    with pytest.raises(SnapshotInvalid):
        flatten(runtime.layout, find(runtime.layout, "echo:b"))
    blob.unlink()
    with pytest.raises(BlobNotFound):
        flatten(runtime.layout, find(runtime.layout, "echo:b"))


def ovm(runtime: Runtime, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["--root", str(runtime.root.path), "--host", "local", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_the_command_line(runtime: Runtime, base: snapshots.Taken, capsys: pytest.CaptureFixture[str]) -> None:
    diff = diff_of(runtime, "echo:b")
    shown = ovm(runtime, capsys, "inspect", "echo:b")["ram_snapshot"]
    assert shown["parents"] == [{"digest": ram_of(base.artifact).ref, "size": base.ram_size}]
    assert (shown["parent"], shown["size"]) == (ram_of(base.artifact).ref, diff.ram_size)
    flat = ovm(runtime, capsys, "snapshot", "flatten", "-t", "echo:flat", "echo:b")
    assert (flat["flattened"], flat["name"], flat["pushed"]) == (1, "echo:flat", False)
    assert ovm(runtime, capsys, "inspect", "echo:flat")["ram_snapshot"]["parents"] == []
    nameless = ovm(runtime, capsys, "snapshot", "flatten", "echo:b")
    assert nameless["snapshot_ref"] == flat["snapshot_ref"]
    # an instance may be called so
    record = runtime.start(find(runtime.layout, "echo:a"), replace(RESTORE, name="flatten")).record
    taken = ovm(runtime, capsys, "snapshot", "flatten", "-t", "echo:of-flatten")
    assert taken["parents"] == 1
    runtime.remove(record, force=True)
    root = ["--root", str(runtime.root.path), "--host", "local"]
    assert main([*root, "snapshot", "other", "echo:b"]) == 2
    assert "flatten REF" in capsys.readouterr().err
    assert main([*root, "snapshot", "flatten"]) == 4  # with one word it is an instance, and there is none of that name
    assert "no instance 'flatten'" in capsys.readouterr().err


# --- what else is done with artifacts --------------------------------------------------------------------------------


def test_prune_keeps_what_a_chain_needs(runtime: Runtime, base: snapshots.Taken) -> None:
    diff_of(runtime, "echo:b")
    runtime.layout.remove_name("echo:a")
    collect(runtime.layout, runtime.instances.needs)
    assert console(runtime, clone(runtime, "echo:b")).ping() == 3


def test_a_commit_of_a_clone_of_a_diff(runtime: Runtime, base: snapshots.Taken) -> None:
    diff_of(runtime, "echo:b")
    record = clone(runtime, "echo:b")
    made = commit.take(runtime, record, Reference.parse("echo:disk")).artifact
    assert made.manifest.ram_snapshot is None
    assert {layer.media_type for layer in made.image.layers}.isdisjoint(model.RAM_TYPES.values())
    started = runtime.start(find(runtime.layout, "echo:disk"), TCG)
    console(runtime, started.record).wait_for("READY")


def test_a_pull_of_a_diff_fetches_the_diff_alone(
    runtime: Runtime, base: snapshots.Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = diff_of(runtime, "echo:b")
    registry = Registry(tmp_path / "registry")
    try:
        with RegistryClient(registry.host) as client:
            names = [Reference(registry.host, "t/echo", tag) for tag in ("a", "b")]
            for name, artifact in zip(names, (base.artifact, taken.artifact), strict=True):
                transfer.push(runtime.layout, client, name, artifact.digest)
            other = Layout(tmp_path / "other")
            transfer.pull(other, client, names[0])
            had = {path.name for path in other.blob_dir.iterdir()}
            transfer.pull(other, client, names[1])
    finally:
        registry.close()
    new = {f"sha256:{path.name}" for path in other.blob_dir.iterdir() if path.name not in had}
    overlay = taken.artifact.manifest.disk_layers[-1].ref
    digests = {taken.artifact.digest, taken.artifact.image.config.digest, overlay, ram_of(taken.artifact).ref}
    assert new | {overlay} == digests  # an empty overlay is like any other
    assert sum(other.size(Digest(digest)) or 0 for digest in new) < 2 << 20
    assert find(other, str(names[1])).artifact.digest == taken.artifact.digest


# --- what is refused -------------------------------------------------------------------------------------------------


def _chain_of(runtime: Runtime, taken: snapshots.Taken, change: Callable[[dict[str, Any]], object]) -> Found:
    """The artifact *taken*, whose OVMS manifest was changed."""
    image = json.loads(taken.artifact.image.raw)
    document = json.loads(json.dumps(taken.artifact.manifest.document))
    change(document)
    raw = json.dumps(document).encode()
    image["config"].update(digest=runtime.layout.add_bytes(raw), size=len(raw))
    return Found("x", model.load(runtime.layout, runtime.layout.add_bytes(json.dumps(image).encode())))


def _sealed(layout: Layout, ref: str, **changes: Any) -> Digest:
    """The RAM snapshot *ref* with another header: sealed anew, as an attacker would do it."""
    blob = layout.path(Digest(ref)).read_bytes()
    old = ramsnap.parse_control(blob)
    header = replace(old.header, **changes)
    control = ramsnap.build_control(header, old.state, old.chunks, chunk_pages=old.prefix.chunk_pages)
    return layout.add_bytes(control + blob[old.prefix.data_offset :])


def _other_parent(runtime: Runtime, taken: snapshots.Taken, **changes: Any) -> Found:
    """The artifact *taken*, on a parent with another header."""
    layout, manifest = runtime.layout, ram_of(taken.artifact)
    parent = _sealed(layout, manifest.parents[0], **changes)
    diff = _sealed(layout, manifest.ref, parent=parent)
    image = json.loads(taken.artifact.image.raw)
    swap = {manifest.parents[0]: parent, manifest.ref: diff}
    for layer in image["layers"]:
        if layer["digest"] in swap:
            digest = swap[layer["digest"]]
            layer.update(digest=digest, size=layout.size(digest), annotations={})
    document = json.loads(json.dumps(taken.artifact.manifest.document))
    document["ramSnapshot"].update(ref=diff, parents=[parent])
    raw = json.dumps(document).encode()
    image["config"].update(digest=layout.add_bytes(raw), size=len(raw))
    return Found("x", model.load(layout, layout.add_bytes(json.dumps(image).encode())))


#: What is wrong → (how it comes to be, the rule that is broken)
BAD: dict[str, tuple[Callable[[Runtime, snapshots.Taken], Found], str]] = {
    "no parents in the manifest": (
        lambda runtime, taken: _chain_of(runtime, taken, lambda d: d["ramSnapshot"].pop("parents")), "RAM-40",
    ),
    "another memory size": (lambda runtime, taken: _other_parent(runtime, taken, memory=MEMORY * 2), "RAM-42"),
    "another kernel": (lambda runtime, taken: _other_parent(runtime, taken, kernel=ram.DIGEST), "RAM-42"),
    "other disks": (lambda runtime, taken: _other_parent(runtime, taken, disks=(ram.DIGEST,)), "RAM-42"),
    "a parent with a parent": (lambda runtime, taken: _other_parent(runtime, taken, parent=ram.DIGEST), "RAM-40"),
}  # fmt: skip


@pytest.mark.spec("RAM-40", "RAM-42", "RAM-50", "GEN-3")
@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_chain_starts_nothing(
    runtime: Runtime, base: snapshots.Taken, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    make, rule = BAD[what]
    found = make(runtime, diff_of(runtime, "echo:b"))

    def started(*_: object) -> None:
        raise AssertionError("a VMM was started")

    monkeypatch.setattr(runtime.vmm("qemu"), "start", started)
    with pytest.raises(OvmsError) as info:
        runtime.start(found, RunOptions(accel=Accel.TCG))
    assert (info.value.code, info.value.context["rule"]) == ("snapshot-invalid", rule)
    assert runtime.instances.records() == []


@pytest.mark.spec("RAM-44")
def test_a_chain_whose_base_this_host_could_not_restore(runtime: Runtime, base: snapshots.Taken) -> None:
    changes = {"vmm": "firecracker", "vmm_version": "99.0", "accel": "kvm", "cpu_flags": ("no-such-flag",)}
    found = _other_parent(runtime, diff_of(runtime, "echo:b"), **changes)
    assert runtime.start(found, RESTORE).record.restored


def test_a_clones_pages_are_copied_while_it_is_paused_and_its_disk_is_a_layer(
    runtime: Runtime, base: snapshots.Taken
) -> None:
    record = clone(runtime, "echo:a")
    before = len(base.artifact.manifest.disk_layers)
    assert hmp(runtime, record, "info status").strip().endswith("running")
    taken = take(runtime, record, "echo:b")
    assert len(taken.artifact.manifest.disk_layers) == before + 1
    assert hmp(runtime, record, "info status").strip().endswith("running")


def test_clones_of_a_vm_that_lives_share_its_memory_and_unpack_nothing(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = runtime.start(echo, RunOptions(memory=MEMORY, accel=Accel.TCG)).record
    console(runtime, running).wait_for("READY")
    assert console(runtime, running).ping() == 1
    take(runtime, running, "echo:snap")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing has to be unpacked")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "materialise", fail)
        clones = [runtime.start(find(runtime.layout, "echo:snap"), RESTORE).record for _ in range(2)]
    assert console(runtime, running).ping() == 2
    assert [console(runtime, clone).ping() for clone in clones] == [2, 2]
    files = []
    for record in (running, *clones):
        with runtime.instances.control(runtime.instances.find(record.id)) as control:
            files.append(control.ram().file.stat().st_ino)
    assert len(set(files)) == 1
    # a clone's snapshot is a diff on what it came from, and is restored when its parent's VM is gone
    taken = take(runtime, clones[0], "echo:again")
    assert taken.parents == 1
    for record in (running, *clones):
        runtime.remove(runtime.instances.find(record.id), force=True)
    again = runtime.start(find(runtime.layout, "echo:again"), RESTORE).record
    assert console(runtime, again).ping() == 3
