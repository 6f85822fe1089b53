"""Volumes, shared directories and seeds: real QEMU, bare guest, whose disks are written to through QEMU's monitor."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import MEMORY, Console, hmp, qemu_io

from ovms import fsutil
from ovms.artifact.resolve import Found, find
from ovms.disk import qcow2, seed
from ovms.errors import FileProblem, InputError, Locked, SnapshotIncompatible, Unsupported
from ovms.memory import snapshot
from ovms.oci.reference import Reference
from ovms.runtime import attachments, security, snapshots, volumes
from ovms.runtime.jail import SecurityOptions
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.runtime.seeds import Seed
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.spec.ramheader import Device
from ovms.vmm.model import VmConfig

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
TOLD = Seed(b"#cloud-config\npassword: s3cret\n", (), "seedling")


def options(*texts: object) -> RunOptions:
    return replace(TCG, volumes=volumes.parse([str(text) for text in texts]))


def console(runtime: Runtime, record: Record) -> Console:
    return Console(runtime.instances.directory(record.id))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").write_bytes(b"host".ljust(1 << 20, b"\0"))
    return tmp_path / "raw"


def test_a_guest_reads_and_writes_its_volumes(runtime: Runtime, echo: Found, raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qcow2.create_overlay(image, 4 << 20)
    record = runtime.start(echo, options(raw, f"{image},format=qcow2")).record
    assert qemu_io(runtime, record, "volume0", "write -P 0x61 512 512") == ""
    assert qemu_io(runtime, record, "volume1", "write -P 0x62 0 512") == ""
    tree = hmp(runtime, record, "info qtree")
    assert [line.split('"')[1] for line in tree.splitlines() if "serial = " in line and '""' not in line] == [
        "vol1",
        "vol0",
    ]
    runtime.kill(record)
    assert raw.read_bytes() == b"host".ljust(512, b"\0") + b"a" * 512 + bytes((1 << 20) - 1024)
    told = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, timeout=30)
    assert "No errors" in told.stdout, told
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, flat], check=True, timeout=30)
    assert flat.read_bytes() == b"b" * 512 + bytes((4 << 20) - 512)
    again = runtime.start(echo, options(f"{image},format=qcow2,ro")).record
    assert runtime.instances.find(again.id).volumes == again.volumes


def test_a_read_only_volume_is_read_only(runtime: Runtime, echo: Found, raw: Path) -> None:
    raw.chmod(0o400)
    record = runtime.start(echo, options(f"{raw},ro")).record
    said = qemu_io(runtime, record, "volume0", "write -P 0x61 0 512")
    assert "read-only" in said or "not permitted" in said, said
    assert raw.read_bytes().startswith(b"host\0")


def test_one_vm_writes_to_a_volume_until_it_dies(runtime: Runtime, echo: Found, raw: Path) -> None:
    first = runtime.start(echo, options(raw)).record
    for text in (raw, f"{raw},ro"):
        with pytest.raises(Locked, match="in use by another VM"):
            runtime.start(echo, options(text))
    assert [record.id for record in runtime.instances.records()] == [first.id], "nothing is left of those"
    assert first.process is not None
    first.process.kill()
    second = runtime.start(echo, options(f"{raw},ro")).record
    runtime.start(echo, options(f"{raw},ro"))
    runtime.kill(second)


def test_another_program_s_lock_is_told(runtime: Runtime, echo: Found, raw: Path) -> None:
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", raw], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as other:
        try:
            deadline = time.monotonic() + 10
            locks = ""
            while f":{raw.stat().st_ino} " not in locks and time.monotonic() < deadline:
                locks = Path("/proc/locks").read_text()
                time.sleep(0.01)
            with pytest.raises(Locked, match="volume0 is in use by another program"):
                runtime.start(echo, options(raw))
        finally:
            other.communicate(timeout=10)
    assert runtime.instances.records() == []


@pytest.mark.spec("RAM-24")
def test_a_vm_with_volumes_has_no_ram_snapshot(runtime: Runtime, echo: Found, raw: Path) -> None:
    record = runtime.start(echo, options(raw)).record
    with pytest.raises(Unsupported, match=r"has volumes \(vol0\)"):
        snapshots.take(runtime, record, Reference.parse("echo:snap"))
    console(runtime, record).wait_for("READY")
    assert console(runtime, record).ping() == 1


def test_a_shared_directory_is_all_that_qemu_sees_and_it_cannot_write(
    runtime: Runtime, echo: Found, tmp_path: Path
) -> None:
    (tmp_path / "dir,a").mkdir()
    (tmp_path / "dir,a" / "file").write_text("hello")
    if os.geteuid() == 0:
        (tmp_path / "dir,a").chmod(0o700)
        tmp_path.chmod(0o700)
        with pytest.raises(FileProblem, match="own user cannot get to"):
            runtime.start(echo, options(f"{tmp_path}/dir,,a,tag=src"))
        (tmp_path / "dir,a").chmod(0o755)
    # the VM has a user of its own, that must get there
    for path in (tmp_path, *list(tmp_path.parents)[:-1]):
        if path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o011)
    record = runtime.start(echo, options(f"{tmp_path}/dir,,a,tag=src")).record
    if not record.jail.own_root:
        pytest.fail("a VM without a root of its own got a directory")
    assert record.process is not None
    inside = Path(f"/proc/{record.process.pid}") / "root" / "shared"
    assert [path.name for path in inside.iterdir()] == ["0"]
    assert (inside / "0" / "file").read_text() == "hello"
    mounts = Path(f"/proc/{record.process.pid}/mountinfo").read_text()
    (line,) = [line for line in mounts.splitlines() if " /shared/0 " in line]
    assert {"ro", "nosuid", "nodev"} <= set(line.split()[5].split(","))
    (shown,) = security.in_force(record)["directories"]
    assert (shown["name"], shown["path"], shown["writable"]) == ("src", f"{tmp_path}/dir,a", False)
    assert 'mount_tag = "src"' in hmp(runtime, record, "info qtree")


def test_directories_that_a_guest_writes_to(runtime: Runtime, echo: Found, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(share, 4321, 4322)
        tmp_path.chmod(0o700)  # nobody but root gets there
    first = runtime.start(echo, options(f"{share},rw,tag=work")).record
    second = runtime.start(echo, options(f"{share},rw")).record  # as many as like may write
    for record in (first, runtime.start_again(_killed(runtime, second))):
        (written,) = security.in_force(record)["directories"]
        assert (written["path"], written["writable"]) == (str(share), True)
        idmapped = {"idmapped"} if os.geteuid() == 0 else set[str]()
        assert set(written["mount"]) >= {"rw", "nosuid", "nodev", "noexec", "nosymfollow"} | idmapped
        assert record.process is not None
        (share / "mark").touch()
        inside = Path(f"/proc/{record.process.pid}") / "root" / "shared" / "0"
        assert [path.name for path in inside.iterdir()] == ["mark"]
    assert runtime.instances.find(first.id).volumes == first.volumes
    assert [volume.read_only for volume in first.volumes] == [False]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("source", ["root", "above", "etc"])
def test_other_names_of_what_is_not_written_to(
    runtime: Runtime, echo: Found, tmp_path: Path, inside: bool, source: str
) -> None:
    share = tmp_path / "the share"
    place = share / "with a blank" if inside else share
    place.mkdir(parents=True)
    root = runtime.root.path
    bound = {"root": root, "above": root.parent, "etc": Path("/etc")}[source]
    if subprocess.run(["mount", "--bind", bound, place], timeout=20, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises((InputError, Unsupported), match=r"files of ovms|runs, or believes"):
            runtime.start(echo, options(f"{share},rw"))
    finally:
        subprocess.run(["umount", place], timeout=20, check=True)
    runtime.start(echo, options(f"{share},rw"))


@pytest.mark.parametrize("part", ["seccomp", "root", "namespaces"])
def test_a_directory_is_not_written_to_with_half_a_jail(
    runtime: Runtime, echo: Found, tmp_path: Path, part: str
) -> None:
    (tmp_path / "share").mkdir()
    loose = SecurityOptions.parse([f"{part}=off"])
    with pytest.raises(Unsupported, match=r"seccomp is left out|sees nothing else"):
        runtime.start(echo, replace(options(f"{tmp_path}/share,rw"), security=loose))
    assert runtime.instances.records() == []


def test_a_directory_is_written_to_by_root_where_it_is_who_the_vm_runs_as(
    runtime: Runtime, echo: Found, tmp_path: Path
) -> None:
    (tmp_path / "share").mkdir()
    loose = SecurityOptions.parse(["user=off"])
    try:
        record = runtime.start(echo, replace(options(f"{tmp_path}/share,rw"), security=loose)).record
    except Unsupported:
        assert os.geteuid() != 0, "a user has no other namespaces without that of users"
        return
    assert [one["writable"] for one in security.in_force(record)["directories"]] == [True]


def _killed(runtime: Runtime, record: Record) -> Record:
    runtime.kill(record)
    return runtime.instances.find(record.id)


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_system_without_idmapped_mounts_is_told(
    runtime: Runtime, echo: Found, tmp_path: Path, inside: bool
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has a VM with another user")
    share = tmp_path / "share"
    place = share / "deeper" if inside else share
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "ramfs", "ramfs", place], capture_output=True, timeout=20, check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(Unsupported, match="idmapped mount: Invalid argument") as caught:
            runtime.start(echo, options(f"{share},rw"))
        assert "',ro'" in str(caught.value.hint)
        assert runtime.instances.records() == []
    finally:
        subprocess.run(["umount", place], timeout=20, check=True)
    runtime.start(echo, options(f"{share},rw"))


@pytest.mark.spec("BOOT-33", "BOOT-52")
def test_user_data_is_on_the_seed_and_nowhere_else(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, name="web", seed=TOLD)).record
    directory = runtime.instances.directory(record.id)
    told = [path.name for path in directory.iterdir() if path.is_file() and b"s3cret" in path.read_bytes()]
    assert told == ["seed.img"]
    assert record.process is not None
    assert b"s3cret" not in Path(f"/proc/{record.process.pid}/cmdline").read_bytes()
    assert runtime.instances.find(record.id).user_data
    assert "(raw, read-only)" in hmp(runtime, record, "info block").partition("seed")[2]
    said = qemu_io(runtime, record, "seed", "write 0 512")
    assert "read-only" in said or "not permitted" in said, said
    runtime.remove(record, force=True)
    assert not directory.exists()


@pytest.mark.spec("RAM-24")
def test_a_seed_is_known_of_before_there_is_a_vm(
    runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Record] = []

    def launch(vmm: object, config: VmConfig, record: Record, become: object) -> Record:
        noted.append(runtime.instances.find(record.id))
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "_launch", launch)
    with pytest.raises(KeyboardInterrupt):
        runtime.start(echo, replace(TCG, seed=TOLD))
    assert [record.machine.seed_size for record in noted] == [seed.STEP]


def test_the_seed_of_an_earlier_start_stays(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, seed=TOLD)).record
    runtime.kill(record)
    directory = runtime.instances.directory(record.id)
    before = (directory / "seed.img").read_bytes()
    with attachments.seeded(directory, record, None) as (again, disk):
        assert again == record
        assert disk is not None
        assert os.pread(disk.fd, len(before) + 1, 0) == before


@pytest.mark.spec("RAM-24", "RAM-30", "RAM-32", "RAM-36")
def test_a_restored_vm_has_an_empty_seed_of_the_same_size(runtime: Runtime, echo: Found) -> None:
    record = runtime.start(echo, replace(TCG, seed=TOLD)).record
    console(runtime, record).wait_for("READY")
    console(runtime, record).ping()
    taken = snapshots.take(runtime, record, Reference.parse("echo:snap"))
    assert taken.user_data
    size = record.machine.seed_size
    ram = taken.artifact.manifest.ram_snapshot
    assert ram is not None
    header = snapshot.read_control(runtime.layout, Digest(ram.ref)).header
    assert header.devices[-1] == Device("virtio-blk", name="seed", size=size)
    found = find(runtime.layout, "echo:snap")
    clone = runtime.start(found, RunOptions(accel=Accel.TCG, restore=RestorePolicy.REQUIRE)).record
    assert console(runtime, clone).ping() == 2
    assert clone.user_data, "the guest's memory is that of one that knows them"
    image = runtime.instances.directory(clone.id) / "seed.img"
    assert image.read_bytes() == bytes(size or 0)
    again = snapshots.take(runtime, clone, Reference.parse("echo:again"))
    assert again.user_data
    cold = runtime.start(found, replace(TCG, restore=RestorePolicy.NEVER)).record
    assert cold.machine.seed_size is None


@pytest.mark.spec("RAM-31")
def test_nothing_can_be_attached_to_a_restored_vm(runtime: Runtime, echo: Found, raw: Path) -> None:
    record = runtime.start(echo, TCG).record
    snapshots.take(runtime, record, Reference.parse("echo:snap"))
    found = find(runtime.layout, "echo:snap")
    restore = RunOptions(accel=Accel.TCG)
    with pytest.raises(SnapshotIncompatible, match="no volumes"):
        runtime.start(found, replace(restore, volumes=volumes.parse([str(raw)])))
    with pytest.raises(SnapshotIncompatible, match="user data"):
        runtime.start(found, replace(restore, seed=TOLD))
    assert not runtime.start(found, replace(options(raw), restore=RestorePolicy.NEVER)).record.restored


def test_a_vm_that_is_started_again_has_all_of_it_again(runtime: Runtime, echo: Found, raw: Path) -> None:
    record = runtime.start(echo, replace(options(raw), seed=TOLD)).record
    runtime.kill(record)
    again = runtime.start_again(record)
    assert again.machine == record.machine
    assert [volume.to_json() for volume in again.volumes] == [volume.to_json() for volume in record.volumes]
    assert qemu_io(runtime, again, "volume0", "write -P 0x63 0 512") == ""
    assert "(raw, read-only)" in hmp(runtime, again, "info block").partition("seed")[2]
    with pytest.raises(Locked):
        runtime.start(echo, options(raw))
    runtime.kill(again)
    assert raw.read_bytes().startswith(b"c" * 512)
    with fsutil.open_input(raw, "the volume") as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        with pytest.raises(Locked):
            runtime.start_again(record)
