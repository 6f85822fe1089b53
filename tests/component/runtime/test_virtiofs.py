"""A virtiofsd beside each VM that is to have one: in its jail, and at its end. Real ones; where this host has none that can run
without privileges, that is what is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import tools
from support.guests import MEMORY, hmp

from ovms.artifact.resolve import Found
from ovms.errors import OvmsError, ToolMissing, Unsupported, VmmError
from ovms.oci.reference import Reference
from ovms.process import ProcessId
from ovms.runtime import document, jail, security, snapshots, volumes
from ovms.runtime.jail import SecurityOptions
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.vmm import virtiofs, watch
from ovms.vmm.jail import Namespace
from ovms.vmm.qemu.binary import Cache

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)


def why_not() -> OvmsError | None:
    try:
        virtiofs.find()
    except (ToolMissing, Unsupported) as exc:
        return exc
    return None


@pytest.fixture(autouse=True)
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    tools.lend_virtiofsd(monkeypatch)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    directory = tmp_path / "share"
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(directory, 4321, 4322)
    return directory


@pytest.fixture
def options(share: Path) -> RunOptions:
    return replace(TCG, volumes=volumes.parse([f"{share},rw,tag=work,via=virtiofs"]))


@pytest.fixture
def record(runtime: Runtime, echo: Found, options: RunOptions) -> Record:
    if (missing := why_not()) is not None:
        pytest.skip(missing.message)
    return runtime.start(echo, options).record


def serving(runtime: Runtime, record: Record) -> watch.Watched:
    found = watch.find(virtiofs.files_of(runtime.instances.directory(record.id), 0))
    assert found is not None
    return found


def problem(runtime: Runtime, record: Record) -> str | None:
    status = runtime.instances.status(runtime.instances.find(record.id))
    shown = document.instance(status, details=True, files=runtime.instances.files(record))
    return shown["volumes"][0].get("problem")  # type: ignore[no-any-return]


def test_a_host_without_one_is_told(
    runtime: Runtime, echo: Found, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])  # without the one that is lent
    missing = why_not()
    if missing is None:
        pytest.skip("this host has one")
    with pytest.raises(type(missing), match="virtiofsd") as caught:
        runtime.start(echo, options)
    assert "via=virtiofs" in str(caught.value.hint)
    assert runtime.instances.records() == []


def test_one_that_needs_privileges_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho '-o sandbox=namespace|chroot'\n")
    program.chmod(0o755)
    monkeypatch.setattr(virtiofs, "_PLACES", (str(program),))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="privileges alone"):
        virtiofs.find()
    program.write_text("#!/bin/sh\necho --translate-uid squash-guest\n")
    assert virtiofs.find() == program
    program.unlink()
    with pytest.raises(ToolMissing):
        virtiofs.find()


def test_it_is_confined_as_its_vmm_is(runtime: Runtime, record: Record) -> None:
    files = runtime.instances.files(record)
    (shown,) = security.in_force(record, files)["directories"]
    assert shown["writable"]
    idmapped = {"idmapped"} if os.geteuid() == 0 else set[str]()
    assert set(shown["mount"]) >= {"rw", "nosuid", "nodev", "noexec", "nosymfollow"} | idmapped
    daemon, vmm = serving(runtime, record).vmm.pid, record.process
    assert vmm is not None
    lines = Path(f"/proc/{daemon}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert record.jail.user is not None
    assert status["Uid"].split() == [str(record.jail.user.uid)] * 4
    for namespace in Namespace:
        names = [Path(f"/proc/{pid}/ns/{namespace.proc_name}").readlink() for pid in (daemon, "self", vmm.pid)]
        assert names[0] not in names[1:], namespace
    groups = Path(f"/proc/{daemon}/cgroup").read_text()
    for procs in record.jail.cgroups:
        assert f"/{procs.parent.parent.name}/{procs.parent.name}" in groups
    root = Path(f"/proc/{daemon}") / "root"
    assert [path.name for path in (root / "shared").iterdir()] == ["0"]
    # the VMM has nothing of the directory
    assert not (Path(f"/proc/{vmm.pid}") / "root" / "shared").exists()
    opened = [os.readlink(fd) for fd in Path(f"/proc/{daemon}/fd").iterdir()]  # noqa: PTH115
    assert not [path for path in opened if "memfd" not in path and path.startswith(str(runtime.root.path))]
    assert "vhost-user-fs-pci" in hmp(runtime, record, "info qtree")


def test_it_is_no_root(runtime: Runtime, echo: Found, options: RunOptions) -> None:
    loose = SecurityOptions.parse(["user=off"])
    with pytest.raises(Unsupported, match=r"runs as root|sees nothing else"):
        runtime.start(echo, replace(options, security=loose))
    assert runtime.instances.records() == []


def test_a_host_without_user_namespaces(
    runtime: Runtime, echo: Found, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing.message)
    if os.geteuid() != 0:
        pytest.skip("a user has no other namespaces without those")
    whole, _ = jail.able(Cache(runtime.root.cache / "host.json"), True)
    less = replace(whole, namespaces=whole.namespaces - {Namespace.USER})
    monkeypatch.setattr(jail, "able", lambda cache, is_root: (less, {"user": "not here"}))
    record = runtime.start(echo, options).record
    daemon = serving(runtime, record).vmm
    assert record.jail.user is not None
    assert Path(f"/proc/{daemon.pid}").stat().st_uid == record.jail.user.uid
    assert f":{record.jail.user.uid}:4294967295" in Path(f"/proc/{daemon.pid}/cmdline").read_text()
    (shown,) = security.in_force(record, runtime.instances.files(record))["directories"]
    assert "idmapped" in shown["mount"]


def end_vmm(vmm: ProcessId, vmm_watcher: ProcessId, daemon: watch.Watched) -> None:
    vmm.kill()


def end_both(vmm: ProcessId, vmm_watcher: ProcessId, daemon: watch.Watched) -> None:
    vmm_watcher.kill()
    vmm.kill()


def end_all_that_watch(vmm: ProcessId, vmm_watcher: ProcessId, daemon: watch.Watched) -> None:
    vmm_watcher.kill()
    daemon.watcher.kill()
    vmm.kill()


def stop_and_end_vmm(vmm: ProcessId, vmm_watcher: ProcessId, daemon: watch.Watched) -> None:
    daemon.vmm.signal(signal.SIGSTOP)  # one that no longer does what it should
    vmm.kill()


@pytest.mark.parametrize("how", [end_vmm, end_both, end_all_that_watch, stop_and_end_vmm])
def test_it_ends_with_its_vm(
    runtime: Runtime, record: Record, how: Callable[[ProcessId, ProcessId, watch.Watched], None]
) -> None:
    daemon = serving(runtime, record)
    assert record.process is not None
    assert record.watcher is not None
    how(record.process, record.watcher, daemon)
    assert daemon.vmm.wait(10)
    assert daemon.watcher.wait(10)
    runtime.instances.recover()
    assert [procs.parent for procs in record.jail.cgroups if procs.parent.exists()] == []


def test_a_stop_and_a_removal_end_it(runtime: Runtime, record: Record) -> None:
    daemon = serving(runtime, record)
    assert problem(runtime, record) is None
    runtime.stop(record, grace=0)
    assert not daemon.vmm.alive()
    assert not daemon.watcher.alive()
    assert problem(runtime, record) is None, "nothing is missed where nothing runs"
    again = runtime.start_again(runtime.instances.find(record.id))
    daemon = serving(runtime, again)
    assert problem(runtime, again) is None
    runtime.remove(again, force=True)
    assert not daemon.vmm.alive()
    assert not runtime.instances.directory(record.id).exists()


@pytest.mark.parametrize("watcher", [False, True])
def test_its_death_is_told(runtime: Runtime, record: Record, watcher: bool) -> None:
    daemon = serving(runtime, record)
    (daemon.watcher if watcher else daemon.vmm).kill()
    assert daemon.vmm.wait(10)
    assert daemon.watcher.wait(10)
    said = problem(runtime, record) or ""
    assert said.startswith("virtiofsd has ended (nobody saw" if watcher else "virtiofsd has ended (signal SIGKILL)")
    assert record.process is not None
    assert record.process.alive()
    assert security.in_force(record, runtime.instances.files(record))["directories"][0]["mount"] == []


def test_one_that_does_not_start_is_told_and_nothing_is_left(
    runtime: Runtime, echo: Found, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing.message)
    monkeypatch.setattr(virtiofs, "_NOFILE_MAX", 32)
    with pytest.raises(VmmError, match="cannot be shared: virtiofsd has ended"):
        runtime.start(echo, options)
    assert runtime.instances.records() == []


def test_a_vm_is_not_left_where_its_virtiofsd_cannot_be_started(
    runtime: Runtime, echo: Found, options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing.message)
    started: list[ProcessId] = []

    def broken(*words: object) -> None:
        assert isinstance(words[-1], ProcessId)
        started.append(words[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(virtiofs, "start", broken)
    with pytest.raises(KeyboardInterrupt):
        runtime.start(echo, options)
    (vmm,) = started
    assert vmm.wait(10)
    assert runtime.instances.records() == []


KILLED = """
import os, sys
from pathlib import Path
from ovms.artifact.resolve import find
from ovms.runtime import volumes
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.vmm import virtiofs

virtiofs.start = lambda *words: os._exit(9)
runtime = Runtime(Root(Path(sys.argv[1])))
options = RunOptions(memory=32 << 20, accel=Accel.TCG, volumes=volumes.parse([f"{sys.argv[2]},rw,via=virtiofs"]))
runtime.start(find(runtime.layout, "echo:1"), options)
"""


def test_a_start_that_is_killed_before_it_leaves_no_vm(runtime: Runtime, echo: Found, share: Path) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing.message)
    done = subprocess.run([sys.executable, "-c", KILLED, runtime.root.path, share], timeout=60, check=False)
    assert done.returncode == 9
    (record,) = runtime.instances.records()
    deadline = time.monotonic() + 20
    while watch.find(runtime.instances.files(record)) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert watch.find(runtime.instances.files(record)) is None
    runtime.instances.recover()
    assert not runtime.instances.status(runtime.instances.find(record.id)).state.alive


def test_what_a_vm_that_was_ended_leaves_in_its_group_is_ended(runtime: Runtime, record: Record) -> None:
    if not record.jail.cgroups:
        pytest.skip("no cgroups here")
    with left_in(record) as pid:
        runtime.kill(record)
        runtime.remove(runtime.instances.find(record.id), force=True)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not record.jail.cgroups[0].parent.exists()


@contextlib.contextmanager
def left_in(record: Record) -> Iterator[int]:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    try:
        record.jail.cgroups[0].write_text(str(pid))
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.spec("RAM-24")
def test_it_is_no_part_of_a_snapshot(runtime: Runtime, record: Record) -> None:
    with pytest.raises(Unsupported, match=r"has volumes \(work\)"):
        snapshots.take(runtime, record, Reference.parse("echo:snap"))
