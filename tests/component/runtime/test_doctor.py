"""What the doctor says: of this host as it is, and of lacks that are made, faked only where no real one can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.guests import qemu_children
from support.registry import HTPASSWD, Registry

from ovms import process
from ovms.oci.connect import Connector
from ovms.oci.credentials import Credentials
from ovms.oci.session import Session
from ovms.runtime import doctor, hostkernel
from ovms.runtime import jail as jails
from ovms.runtime.doctor import Finding, Host, Verdict, examine
from ovms.runtime.root import Root
from ovms.vmm import virtiofs
from ovms.vmm.qemu import features, versions
from ovms.vmm.watch import Watched


def sessions(host: str) -> Session:
    return Connector.from_environment({}).session(host)


@pytest.fixture
def host(tmp_path: Path, qemu_cache: Path) -> Host:
    root = Root(tmp_path / "root")
    root.prepare()
    root.cache.symlink_to(qemu_cache)
    return Host(root, Credentials((), {}))


def say(check: str, host: Host) -> Finding:
    return next(finding for finding in doctor._CHECKS[check](host))


def fake_proc(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        path = tmp_path / "proc" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "proc"


def test_this_host_is_looked_at_and_nothing_stays(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Watched] = []
    run = jails.run

    def noted(*args: Any) -> Watched:
        started.append(run(*args))
        return started[-1]

    monkeypatch.setattr(jails, "run", noted)
    found = list(examine(host, sessions))
    assert started
    assert [watched for watched in started if watched.vmm.alive() or watched.watcher.alive()] == []
    assert {
        "root",
        "qemu",
        "kvm",
        "kernel",
        "jail",
        "directories",
        "cgroups",
        "ptrace",
        "memlock",
        "passt",
        "credentials",
        "clock",
    } <= {finding.check for finding in found}
    assert [f for f in found if f.verdict is Verdict.FAIL] == []  # the tests run VMs here
    for finding in found:
        assert (finding.lost is None) == (finding.verdict is Verdict.OK), finding
    assert sorted(path.name for path in host.root.path.iterdir()) == ["cache", "instances"]
    assert qemu_children(host.root.path) == []
    groups = list(Path("/sys/fs/cgroup").rglob(f"doctor-{os.getpid()}"))
    assert groups == []


def test_no_qemu_is_no_vm(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovms.vmm.qemu.binary.BINARY", "qemu-of-nobody")
    finding = say("qemu", host)
    assert finding.verdict is Verdict.FAIL
    assert "apt-get install" in str(finding.remedy)


def test_an_older_qemu_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "OLDEST", (99, 0))
    assert say("qemu", host).verdict is Verdict.WARN


def test_a_root_that_can_not_be_made(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = say("root", Host(Root(tmp_path / "file" / "root"), host.credentials))
    assert finding.verdict is Verdict.FAIL
    assert "OVMS_ROOT" in str(finding.remedy)


def test_little_room_and_a_network_disk(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_LOW", 2**62)
    mounts = f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {tmp_path} rw shared:1 - nfs4 server:/ rw\n"
    finding = say("root", Host(host.root, host.credentials, fake_proc(tmp_path, self__mountinfo=mounts)))
    assert finding.verdict is Verdict.WARN
    assert "(nfs4)" in finding.found
    assert finding.lost is not None
    assert finding.lost.startswith("room; speed")


@pytest.mark.parametrize(
    ("sysctl", "value", "remedy"),
    [
        ("sys__kernel__apparmor_restrict_unprivileged_userns", "1", "apparmor_restrict_unprivileged_userns=0"),
        ("sys__kernel__unprivileged_userns_clone", "0\n", "kernel.unprivileged_userns_clone=1"),
        ("sys__user__max_user_namespaces", "0", "user.max_user_namespaces=15000"),
        ("sys__user__max_user_namespaces", "100", "in a container"),
    ],
)
def test_a_host_without_user_namespaces(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sysctl: str, value: str, remedy: str
) -> None:
    monkeypatch.setattr(jails, "probe", lambda jail: "clone: not permitted" if jail.namespaces else None)
    faked = Host(Root(tmp_path / "other"), host.credentials, fake_proc(tmp_path, **{sysctl: value}))
    finding = say("jail", faked)
    assert (finding.verdict, "clone: not permitted" in finding.found) == (Verdict.WARN, True)
    assert remedy in str(finding.remedy)


def test_a_file_system_that_guests_cannot_write_to(host: Host, tmp_path: Path) -> None:
    assert say("directories", host).verdict is Verdict.OK
    if os.geteuid() != 0:
        pytest.skip("only root has VMs with another user")
    place = tmp_path / "other"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "ramfs", "ramfs", place], timeout=20, capture_output=True, check=False
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        finding = say("directories", Host(Root(place), host.credentials))
        assert finding.verdict is Verdict.WARN
        assert "on ramfs" in finding.found
        assert "idmap" in finding.found
        assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
    finally:
        subprocess.run(["umount", place], timeout=20, check=True)


def test_a_watcher_that_does_not_run_is_no_vm(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovms.vmm.watch.PROGRAM", tmp_path / "watch")
    (tmp_path / "watch").write_text("")
    finding = say("jail", Host(Root(tmp_path / "other"), host.credentials))
    assert finding.verdict is Verdict.FAIL


def test_a_host_without_cgroups(host: Host, tmp_path: Path) -> None:
    finding = say(
        "cgroups", Host(host.root, host.credentials, fake_proc(tmp_path, self__cgroup="", self__mountinfo=""))
    )
    assert finding.verdict is Verdict.WARN
    assert "memory: this host has no such cgroup controller" in finding.found


def test_memory_that_can_not_be_read(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_why_unreadable", lambda jail: "Permission denied")
    proc = fake_proc(tmp_path, sys__kernel__yama__ptrace_scope="1\n")
    finding = say("ptrace", Host(host.root, host.credentials, proc))
    assert finding.verdict is Verdict.WARN
    assert "kernel.yama.ptrace_scope=0 (it is 1)" in str(finding.remedy)


def test_features_of_the_kernel_that_are_not_there(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise OSError(38, "Function not implemented")

    made = (hostkernel.Feature("a", absent, "x", needed=True), hostkernel.Feature("b", absent, "y", needed=False))
    monkeypatch.setattr(hostkernel.missing, "__defaults__", (made,))
    found = doctor._CHECKS["kernel"](host)
    assert [(f.verdict, f.found, f.lost) for f in found] == [
        (Verdict.FAIL, "a: Function not implemented", "x"),
        (Verdict.WARN, "b: Function not implemented", "y"),
    ]


def test_programs_that_are_not_installed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtiofs, "_PLACES", ())
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(process, "CLEAN_ENV", {"PATH": "/nowhere"})
    monkeypatch.setattr(doctor, "_which", lambda name: None)
    for finding in doctor._CHECKS["programs"](host):
        assert finding.verdict is Verdict.WARN
        assert "apt-get install" in str(finding.remedy)


def test_a_qemu_that_was_built_with_less(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho 'name \"virtio-blk-pci\", bus PCI' memory-backend-memfd rng-builtin user\n")
    program.chmod(0o755)
    lacking = {item.name: item.needed for item in features.lacking(program)}
    assert lacking.items() >= {"vmgenid": True, "memory-backend-file": True, "stream": False}.items()
    assert not lacking.keys() & {"virtio-blk-pci", "memory-backend-memfd", "user"}


def test_credentials_that_can_not_be_read(host: Host, tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_text("{")
    finding = say("credentials", Host(host.root, Credentials((tmp_path / "auth.json",), {})))
    assert finding.verdict is Verdict.WARN
    assert "auth.json" in finding.found
    (tmp_path / "auth.json").write_text('{"auths": {}}')
    assert say("credentials", Host(host.root, Credentials((tmp_path / "auth.json",), {}))).verdict is Verdict.OK


def test_a_clock_that_stands_in_the_past(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert say("clock", host).found.startswith("1970-01-01")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry")
    yield registry
    registry.close()


def test_registries(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (answer,) = doctor._registry(sessions, registry.host)
    assert answer == Finding("registry", Verdict.OK, f"{registry.host} answers")
    monkeypatch.setattr(doctor, "CLOCK_SKEW", -1.0)
    assert [finding.check for finding in doctor._registry(sessions, registry.host)] == ["registry", "clock"]
    protected = Registry(tmp_path / "protected", htpasswd=HTPASSWD)
    try:
        (answer,) = doctor._registry(sessions, protected.host)
        assert (answer.verdict, answer.remedy) == (Verdict.WARN, f"log in: ovm login {protected.host}")
    finally:
        protected.close()
    (answer,) = doctor._registry(sessions, protected.host)
    assert "refused" in answer.found


@pytest.mark.parametrize("name", ["[2J", "[1::2::3]", "\x1b[2J"])
def test_what_is_no_address_is_said(name: str) -> None:
    (answer,) = doctor._registry(sessions, name)
    assert (answer.verdict, "is no address" in answer.found) == (Verdict.WARN, True)


def test_the_command(host: Host) -> None:
    def ovm(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ovms.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    said = ovm("--root", str(host.root.path), "doctor", "127.0.0.1:1")
    assert said.returncode == 0
    assert "ok    qemu" in said.stdout
    assert "warn  registry" in said.stdout
    assert "do: " in said.stdout
    said = ovm("--root", "/dev/null/root", "doctor", "--json")
    assert said.returncode == 9
    answer = json.loads(said.stdout)
    assert answer["able"] is False
    assert answer["findings"][0]["check"] == "root"
    assert answer["findings"][0]["verdict"] == "fail"
