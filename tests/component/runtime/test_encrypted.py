"""Encrypted snapshots: real QEMU, and a guest with a secret in its memory that no file may ever have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyrage import x25519
from support.guests import MEMORY, Console
from support.registry import Registry

from ovms.artifact import model
from ovms.artifact.resolve import Found, find, push, resolve
from ovms.artifact.validate import validate_artifact
from ovms.errors import BlobNotFound, IdentityMissing, InputError, SnapshotInvalid, Unsupported
from ovms.memory import locking
from ovms.memory.flatten import flatten
from ovms.oci import absent
from ovms.oci.collector import collect
from ovms.oci.fsck import Uses, check
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime import snapshots
from ovms.runtime.fork import fork
from ovms.runtime.local import Local
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import ramsnap
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.vmm import maps

TCG = RunOptions(accel=Accel.TCG)
BOOT = replace(TCG, memory=MEMORY)
#: Random, so that no compression hides it: it stands in every copy of the page that has it, but for encrypted ones.
SECRET = os.urandom(64)
#: Where it is in the guest's memory: nothing of the guest's is there.
SECRET_AT = 24 << 20


class Pair:
    """A recipient, and the file of its identity."""

    def __init__(self, path: Path) -> None:
        identity = x25519.Identity.generate()
        self.recipient = str(identity.to_public())
        self.path = path
        path.write_text(f"# created by a test\n# public key: {self.recipient}\n{identity}\n")

    @property
    def options(self) -> RunOptions:
        return replace(TCG, identities=(self.path,))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "identity.txt")


@pytest.fixture(autouse=True)
def _no_identities_of_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry")
    yield registry
    registry.close()


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


def with_secret(runtime: Runtime, found: Found, options: RunOptions = BOOT) -> Record:
    """A guest that has counted to 1, and has the secret in its memory."""
    record = runtime.start(found, options).record
    if not record.restored:
        console(runtime, record).wait_for("READY")
    assert console(runtime, record).ping() >= 1
    write_secret(runtime, record)
    return record


def write_secret(runtime: Runtime, record: Record) -> None:
    with runtime.instances.control(runtime.instances.find(record.id)) as control:
        guest = control.ram()
        if guest.private:  # a page of its own
            path, at = Path(f"/proc/{guest.pid}/mem"), maps.find(guest.pid, guest.file, guest.size).address
        else:
            path, at = guest.file, 0
        fd = os.open(path, os.O_RDWR)
        try:
            os.pwrite(fd, SECRET, at + SECRET_AT)
        finally:
            os.close(fd)


def has_secret(runtime: Runtime, record: Record) -> bool:
    with runtime.instances.control(runtime.instances.find(record.id)) as control:
        fd = os.open(control.ram().file, os.O_RDONLY)
        try:
            return os.pread(fd, len(SECRET), SECRET_AT) == SECRET
        finally:
            os.close(fd)


def files_with_secret(*roots: Path) -> list[Path]:
    """The files below *roots* that have it."""
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if SECRET in path.read_bytes()]


def open_files_with_secret(root: Path) -> list[str]:
    """What this process has open below *root*, under a name or without one, and has it."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            name = str(entry.readlink())
            if name.startswith(str(root)) and entry.is_file() and SECRET in entry.read_bytes():
                found.append(name)
    return found


def take(runtime: Runtime, record: Record, name: str, *to: Pair) -> model.Artifact:
    taken = snapshots.take(
        runtime,
        runtime.instances.find(record.id),
        Reference.parse(name),
        encrypt=[pair.recipient for pair in to],
    )
    assert taken.encrypted == bool(to)
    assert taken.to_json()["encrypted"] == bool(to)
    return taken.artifact


def gone(runtime: Runtime, record: Record) -> None:
    """Its memory would do for its clones."""
    runtime.remove(runtime.instances.find(record.id), force=True)


@pytest.mark.spec("RAM-57", "RAM-60", "RAM-64")
def test_memory_is_in_no_file(runtime: Runtime, echo: Found, pair: Pair) -> None:
    record = with_secret(runtime, echo)
    artifact = take(runtime, record, "echo:snap", pair)
    assert artifact.encrypted
    assert files_with_secret(runtime.root.path) == []
    gone(runtime, record)
    clones = [runtime.start(find(runtime.layout, "echo:snap"), pair.options).record for _ in range(2)]
    for clone in clones:
        assert clone.restored
        assert has_secret(runtime, clone)
        assert console(runtime, clone).ping() == 2
        assert clone.memory_locked == (locking.why_not(MEMORY) is None)
    assert files_with_secret(runtime.root.path) == []
    assert list(runtime.layout.derived_dir.glob("*.ram")) == []
    # the same, not encrypted: this test would see it
    other = with_secret(runtime, echo)
    take(runtime, other, "echo:plain")
    assert files_with_secret(runtime.root.path) != []


@pytest.mark.long
@pytest.mark.spec("RAM-64")
@pytest.mark.parametrize("encrypt", [True, False])
def test_nothing_without_a_name_has_it_either(
    runtime: Runtime, echo: Found, pair: Pair, monkeypatch: pytest.MonkeyPatch, *, encrypt: bool
) -> None:
    """The pages that a clone wrote are copied while it stands still; their encoded form waits for the control part."""
    record = runtime.start(echo, BOOT).record
    console(runtime, record).wait_for("READY")
    take(runtime, record, "echo:base")
    gone(runtime, record)
    clone = with_secret(runtime, find(runtime.layout, "echo:base"), TCG)
    seen: list[str] = []
    original = ramsnap.build_control

    def build(*args: Any, **options: Any) -> bytes:
        seen.extend(open_files_with_secret(runtime.root.path))
        return original(*args, **options)

    monkeypatch.setattr(ramsnap, "build_control", build)
    take(runtime, clone, "echo:diff", *([pair] if encrypt else []))
    assert bool(seen) != encrypt, seen
    assert bool(files_with_secret(runtime.root.path)) != encrypt


@pytest.mark.spec("RAM-60", "RAM-50", "RAM-55")
def test_a_clone_on_another_host(
    runtime: Runtime, away: Runtime, echo: Found, pair: Pair, registry: Registry, tmp_path: Path
) -> None:
    record = with_secret(runtime, echo)
    name = f"{registry.host}/echo:snap"
    artifact = take(runtime, record, name, pair)
    assert artifact.manifest.ram_snapshot is not None
    ram = Digest(artifact.manifest.ram_snapshot.ref)
    other = Pair(tmp_path / "other.txt")
    with RegistryClient(registry.host) as client:
        push(runtime.layout, lambda _: client, name)
        for options, why in ((TCG, "is not there"), (other.options, "fits")):
            with pytest.raises(IdentityMissing, match=why) as info:
                resolve(away.layout, lambda _: client, name, gate=away.gate(options))
            assert info.value.context["recipients"] == [pair.recipient]
            assert info.value.context["rule"] == "RAM-60"
            assert pair.recipient in info.value.message
            assert "AGE-SECRET" not in str(info.value.to_json())
            assert away.layout.size(ram) is None
        found = resolve(away.layout, lambda _: client, name, gate=away.gate(pair.options))
    clone = away.start(found, pair.options).record
    assert clone.restored
    assert has_secret(away, clone)
    assert console(away, clone).ping() == 2
    cold = away.start(found, replace(BOOT, restore=RestorePolicy.NEVER)).record
    assert not cold.restored
    assert files_with_secret(away.root.path, runtime.root.path, registry.directory) == []
    assert validate_artifact(away.layout, name, artifact.digest).problems == []
    assert check(away.layout, lambda: Uses(away.instances.needs())).findings == []


@pytest.mark.spec("RAM-65", "RAM-40")
def test_what_came_from_an_encrypted_snapshot_is_encrypted_again(
    runtime: Runtime, echo: Found, pair: Pair, tmp_path: Path
) -> None:
    record = with_secret(runtime, echo)
    take(runtime, record, "echo:a", pair)
    with pytest.raises(InputError, match="encrypted") as info:
        take(runtime, record, "echo:b")  # goes on from it
    assert info.value.context["rule"] == "RAM-65"
    runtime.layout.remove_name("echo:a")  # and outlives it
    collect(runtime.layout, runtime.instances.needs)
    with pytest.raises(InputError, match="encrypted"):
        take(runtime, record, "echo:b")
    take(runtime, record, "echo:a", pair)
    gone(runtime, record)
    clone = runtime.start(find(runtime.layout, "echo:a"), pair.options).record
    assert console(runtime, clone).ping() == 2
    with pytest.raises(InputError, match="encrypted"):
        take(runtime, clone, "echo:b")
    with pytest.raises(InputError, match="encrypted"):
        fork(Local(runtime, lambda _: pytest.fail("a registry")), clone.name, 2, TCG)
    other = Pair(tmp_path / "other.txt")
    diff = take(runtime, clone, "echo:b", other)
    assert diff.manifest.ram_snapshot is not None
    assert len(diff.manifest.ram_snapshot.parents) == 1
    gone(runtime, clone)
    found = find(runtime.layout, "echo:b")
    with pytest.raises(IdentityMissing):  # for the diff alone
        runtime.start(found, other.options)
    both = replace(TCG, identities=(pair.path, other.path))
    again = runtime.start(found, both).record
    assert has_secret(runtime, again)
    assert console(runtime, again).ping() == 3
    assert files_with_secret(runtime.root.path) == []
    # a boot begins anew
    cold = runtime.start(find(runtime.layout, "echo:a"), replace(BOOT, restore=RestorePolicy.NEVER)).record
    console(runtime, cold).wait_for("READY")
    assert not take(runtime, cold, "echo:c").encrypted


@pytest.mark.long
@pytest.mark.spec("RAM-64")
def test_an_encrypted_diff_of_a_base_that_everyone_can_read(runtime: Runtime, echo: Found, pair: Pair) -> None:
    record = runtime.start(echo, BOOT).record
    console(runtime, record).wait_for("READY")
    take(runtime, record, "echo:base")
    gone(runtime, record)
    clone = runtime.start(find(runtime.layout, "echo:base"), TCG).record
    assert console(runtime, clone).ping() == 1
    diff = take(runtime, clone, "echo:diff", pair)
    assert [layer.media_type.endswith("+age") for layer in diff.image.layers if "ramsnap" in layer.media_type] == [
        False,
        True,
    ]
    gone(runtime, clone)
    collect(runtime.layout, runtime.instances.needs)
    again = runtime.start(find(runtime.layout, "echo:diff"), pair.options).record
    assert console(runtime, again).ping() == 2
    with pytest.raises(Unsupported, match="only unpacked into memory"):
        flatten(runtime.layout, find(runtime.layout, "echo:diff"))


@pytest.mark.long
@pytest.mark.spec("RAM-62", "RAM-63", "RAM-50")
@pytest.mark.parametrize("at", [-100, 300])
def test_a_damaged_one_leaves_nothing(runtime: Runtime, echo: Found, pair: Pair, at: int) -> None:
    record = with_secret(runtime, echo)
    artifact = take(runtime, record, "echo:snap", pair)
    gone(runtime, record)
    assert artifact.manifest.ram_snapshot is not None
    blob = runtime.layout.path(Digest(artifact.manifest.ram_snapshot.ref))
    data = bytearray(blob.read_bytes())
    data[at] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    with pytest.raises(SnapshotInvalid):
        runtime.start(find(runtime.layout, "echo:snap"), pair.options)
    assert runtime.instances.records() == []
    assert files_with_secret(runtime.root.path) == []


@pytest.mark.long
def test_an_identity_of_the_environment(
    runtime: Runtime, echo: Found, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = with_secret(runtime, echo)
    take(runtime, record, "echo:snap", pair)
    found = find(runtime.layout, "echo:snap")
    monkeypatch.setenv("OVMS_IDENTITY", str(pair.path))
    assert runtime.start(found, TCG).record.restored
    monkeypatch.delenv("OVMS_IDENTITY")
    with pytest.raises(IdentityMissing):  # its memory is here: that is not enough
        runtime.start(found, TCG)
    (tmp_path / "config" / "ovms").mkdir(parents=True)
    (tmp_path / "config" / "ovms" / "identities.txt").write_bytes(pair.path.read_bytes())
    assert runtime.start(found, TCG).record.restored


@pytest.mark.long
def test_a_clone_that_left_its_snapshot_out(runtime: Runtime, away: Runtime, echo: Found, pair: Pair) -> None:
    """An artifact whose encrypted snapshot was not fetched is told from one that lost it."""
    record = with_secret(runtime, echo)
    artifact = take(runtime, record, "echo:snap", pair)
    assert absent.left_out(runtime.layout, artifact.image.layers) == []
    assert artifact.manifest.ram_snapshot is not None
    ram = artifact.blob(artifact.manifest.ram_snapshot.ref)
    path = runtime.layout.path(ram.digest)
    control = path.read_bytes()
    path.unlink()
    absent.note(runtime.layout, ram, control[: int(ram.annotations["ovms.ramsnap.control-size"])])
    assert absent.left_out(runtime.layout, artifact.image.layers) == [ram]
    with pytest.raises(BlobNotFound):
        runtime.start(find(runtime.layout, "echo:snap"), pair.options)
