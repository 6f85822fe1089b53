"""What a clone has of its own on the host: no file, socket or port that the VM has which the snapshot was taken of."""

from __future__ import annotations

import itertools
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import MEMORY, Console

from ovms.artifact.resolve import Found, find
from ovms.errors import AgentUnavailable, SnapshotIncompatible, UsageError
from ovms.oci.reference import Reference
from ovms.runtime import identity, quiesce, snapshots
from ovms.runtime.network import Wanted
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.runtime.seeds import Seed
from ovms.spec.choices import Accel
from ovms.spec.states import State
from ovms.vmm.model import PortForward
from ovms.vmm.qemu.control import QemuControl

TCG = RunOptions(memory=MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG)
PORTS = (PortForward("127.0.0.1", 0, 80),)


@pytest.fixture
def running(runtime: Runtime, echo: Found) -> Record:
    record = runtime.start(echo, replace(TCG, ports=PORTS)).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")
    return record


@pytest.fixture
def snap(runtime: Runtime, running: Record) -> Found:
    snapshots.take(runtime, runtime.instances.find(running.id), Reference.parse("echo:snap"))
    return find(runtime.layout, "echo:snap")


def opened(pid: int) -> dict[tuple[int, int], tuple[str, bool]]:
    """What a process has open that is not everybody's: (device, inode) → what it is, and whether it can be written to."""
    found: dict[tuple[int, int], tuple[str, bool]] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        info, target = entry.stat(), str(entry.readlink())
        if target.startswith("anon_inode:") or stat.S_ISCHR(info.st_mode):
            continue  # one inode for all of a kind; /dev/null and such
        flags = next(
            int(line.split()[1], 8)
            for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
            if line.startswith("flags:")
        )
        key = (info.st_dev, info.st_ino)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        found[key] = (target, writable or found.get(key, ("", False))[1])
    return found


def vmm(record: Record) -> int:
    assert record.process is not None
    return record.process.pid


@pytest.mark.spec("RUN-20", "RAM-35", "RAM-36", "SEC-9")
def test_a_clone_opens_nothing_of_the_template(runtime: Runtime, running: Record, snap: Found) -> None:
    clones = [runtime.start(snap, replace(RESTORE, ports=PORTS)).record for _ in range(2)]
    running = runtime.instances.find(running.id)
    of_template, *of_clones = [opened(vmm(record)) for record in (running, *clones)]
    assert any("overlay-1" in what for what, _ in of_template.values())
    for one, other in itertools.combinations((of_template, *of_clones), 2):
        for key in one.keys() & other.keys():
            what, writable = one[key]
            if "memfd:ovms-template" in what:
                continue  # sealed: nobody can write to it
            assert (writable, other[key][1]) == (False, False), what
            assert "blobs/" in what or what.endswith("/freeze.so"), what
    # and by name, what is another's is not open at all
    directory = str(runtime.instances.directory(running.id))
    for one in of_clones:
        assert [what for what, _ in one.values() if what.startswith(directory)] == []
    ports = [record.ports[0].host_port for record in (running, *clones)]
    assert len(set(ports)) == 3


@pytest.mark.spec("SEC-9")
def test_what_a_guest_without_an_agent_has_of_its_own_is_said(runtime: Runtime, snap: Found) -> None:
    clone = runtime.start(snap, RESTORE).record
    assert clone.identity == identity.Identity(note="no agent runs in the guest")
    assert clone.timings["identity"] < 1000
    assert runtime.start(snap, replace(RESTORE, keep_identity=True)).record.identity is None
    # and one that boots is itself
    assert runtime.start(find(runtime.layout, "echo:1"), TCG).record.identity is None


@pytest.mark.spec("RAM-31", "RAM-50")
def test_a_host_name_needs_an_agent_and_leaves_nothing_without_one(runtime: Runtime, snap: Found) -> None:
    before = len(runtime.instances.records())
    with pytest.raises(AgentUnavailable, match="did not take the host name web") as caught:
        runtime.start(snap, replace(RESTORE, seed=Seed(hostname="web")))
    assert "--cold" in str(caught.value.hint)
    with pytest.raises(UsageError, match="keeps its identity"):
        runtime.start(snap, replace(RESTORE, seed=Seed(hostname="web"), keep_identity=True))
    with pytest.raises(SnapshotIncompatible, match="user data"):
        runtime.start(snap, replace(RESTORE, seed=Seed(b"#cloud-config\n", hostname="web")))
    assert len(runtime.instances.records()) == before


@pytest.mark.spec("RUN-19")
def test_a_link_that_was_taken_by_one_who_was_killed_comes_back(
    runtime: Runtime, snap: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = runtime.start(snap, RESTORE).record
    with runtime.instances.locked(clone), runtime.instances.control(clone) as control:
        control.set_link(False)
        runtime.instances.save(replace(clone, link_down=True))
    links: list[bool] = []
    original = QemuControl.set_link

    def noted(self: QemuControl, up: bool) -> None:
        links.append(up)
        original(self, up)

    monkeypatch.setattr(QemuControl, "set_link", noted)
    runtime.instances.recover()
    newest = runtime.instances.find(clone.id)
    assert (links, newest.link_down) == ([True], False)
    assert runtime.instances.status(newest).state is State.RUNNING


def test_a_guest_that_was_frozen_by_one_who_was_killed_is_thawed(
    runtime: Runtime, running: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed: list[float] = []
    monkeypatch.setattr(quiesce, "thaw", lambda files, control, wait: thawed.append(wait))

    def recovered(*, listens: bool, paused: bool = False) -> bool:
        monkeypatch.setattr(QemuControl, "agent_listens", lambda self: listens)
        with runtime.instances.locked(running) as newest:
            runtime.instances.save(replace(newest, fs_frozen=True, paused=paused))
        runtime.instances.recover()
        return not runtime.instances.find(running.id).fs_frozen

    # nobody there who could: perhaps there will be
    assert (recovered(listens=False), recovered(listens=True, paused=True), thawed) == (False, False, [])
    assert (recovered(listens=True), thawed) == (True, [quiesce.THAW_FOUND])
    runtime.kill(running)
    assert (recovered(listens=True), thawed) == (True, [quiesce.THAW_FOUND])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes tap devices")
def test_where_others_give_addresses_the_link_goes_and_comes(
    runtime: Runtime, snap: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[bool, bool]] = []
    original = QemuControl.set_link

    def note(self: QemuControl, up: bool) -> None:
        # by then it is written down, for the case that we are killed
        noted.append((up, max(runtime.instances.records(), key=lambda record: record.created).link_down))
        original(self, up)

    monkeypatch.setattr(QemuControl, "set_link", note)
    clone = runtime.start(snap, replace(RESTORE, network=Wanted.parse("tap"))).record
    assert noted == [(False, True), (True, True)]
    assert clone.identity is not None
    assert (clone.identity.link, clone.link_down) == (True, False)
    # a user network gives everybody the same address
    noted.clear()
    again = runtime.start(snap, RESTORE).record
    assert (noted, again.identity is not None and again.identity.link) == ([], False)
