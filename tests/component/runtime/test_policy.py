"""Policies where VMs are started, restored and started again."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from support import guests, policies
from support.guests import MEMORY, Console
from support.policies import ACCEPT, REJECT, came_from, signed

from ovms.artifact.resolve import Found, find
from ovms.errors import PolicyRefused, SignatureMissing
from ovms.oci import origins
from ovms.oci.reference import Reference
from ovms.runtime import commit, snapshots, starting
from ovms.runtime.record import Record, Restart
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy
from ovms.trust import keys, signing
from ovms.trust.model import Format

TCG: Final = RunOptions(accel=Accel.TCG, memory=MEMORY)
RESTORE: Final = RunOptions(accel=Accel.TCG)
THERE: Final = "registry.example/team/web"
KEY: Final = keys.generate()


@pytest.fixture
def policy(runtime: Runtime, tmp_path: Path) -> Any:
    """Lets a policy hold from now on."""

    def hold(default: dict[str, Any], **scopes: Any) -> None:
        value = policies.document(default, {"us": KEY}, scopes={k.replace("_", "."): v for k, v in scopes.items()})
        runtime.guard = policies.guard(runtime.layout, tmp_path / "policy.json", value)

    return hold


def snapshot(runtime: Runtime, record: Record, name: str) -> Found:
    Console(runtime.instances.directory(record.id)).ping()
    snapshots.take(runtime, runtime.instances.find(record.id), Reference.parse(name))
    return find(runtime.layout, name)


def nothing_runs(runtime: Runtime) -> None:
    assert runtime.instances.records() == []
    assert guests.qemu_children(runtime.root.path) == []


@pytest.mark.spec("SEC-7", "BOOT-50")
def test_what_is_not_signed_is_not_started(runtime: Runtime, echo: Found, policy: Any) -> None:
    came_from(runtime.layout, echo.artifact.digest, THERE)
    policy(ACCEPT, registry_example=signed("us"))
    with pytest.raises(SignatureMissing, match=r"echo:1 is refused by the rule for registry.example"):
        runtime.start(echo, TCG)
    nothing_runs(runtime)
    signing.sign_local(runtime.layout, echo.artifact.digest, THERE, KEY, Format.CLASSIC)
    record = runtime.start(echo, TCG).record
    # the policy changes while it runs: it is not ended, and not started anew
    policy(REJECT)
    assert runtime.instances.status(record).state.alive
    runtime.kill(record)
    with pytest.raises(PolicyRefused):
        runtime.start_again(runtime.instances.find(record.id))
    assert not runtime.instances.status(runtime.instances.find(record.id)).state.alive


def test_what_was_checked_is_what_is_started(runtime: Runtime, echo: Found, policy: Any) -> None:
    policy(REJECT, local=ACCEPT)
    evil = find(runtime.layout, "echo:1")
    copy = replace(evil.artifact.image, annotations={})
    assert copy.digest == echo.artifact.digest
    # somebody lets the name stand for something else between the check and the start
    other = commit_of(runtime, echo)
    came_from(runtime.layout, other.artifact.digest, "evil.example/x")
    runtime.layout.set_name("echo:1", other.artifact.image.descriptor())
    record = runtime.start(echo, TCG).record
    assert record.digest == echo.artifact.digest
    with pytest.raises(PolicyRefused):
        runtime.start(find(runtime.layout, "echo:1"), TCG)


def commit_of(runtime: Runtime, echo: Found) -> Found:
    record = runtime.start(echo, TCG).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")
    found = snapshot(runtime, record, "other:1")
    runtime.remove(runtime.instances.find(record.id), force=True)
    return found


@pytest.mark.spec("SEC-7", "RAM-40")
def test_a_ram_snapshot_of_strangers_is_not_restored(runtime: Runtime, echo: Found, policy: Any) -> None:
    taken = commit_of(runtime, echo)
    came_from(runtime.layout, taken.artifact.digest, THERE)
    policy(ACCEPT, registry_example={**ACCEPT, "ramSnapshots": signed("us")})
    with pytest.raises(SignatureMissing, match="its RAM snapshot has to be signed by us") as caught:
        runtime.start(taken, RESTORE)
    assert caught.value.hint is not None
    assert "--cold" in caught.value.hint
    nothing_runs(runtime)
    assert list(runtime.layout.derived_dir.glob("*.ram")) == [], "it was unpacked"
    cold = runtime.start(taken, replace(TCG, restore=RestorePolicy.NEVER)).record
    Console(runtime.instances.directory(cold.id)).wait_for("READY")
    # a snapshot of that is ours alone; one of a clone is not
    ours = snapshot(runtime, cold, "ours:1")
    assert runtime.start(ours, RESTORE).record.restored
    policy(ACCEPT)
    clone = runtime.start(taken, RESTORE).record
    theirs = snapshot(runtime, clone, "theirs:1")
    policy(ACCEPT, registry_example={**ACCEPT, "ramSnapshots": signed("us")})
    with pytest.raises(SignatureMissing, match="from which theirs:1 was made"):
        runtime.start(theirs, RESTORE)
    signing.sign_local(runtime.layout, taken.artifact.digest, THERE, KEY, Format.BUNDLE)
    assert runtime.start(theirs, RESTORE).record.restored


def test_what_is_made_here_remembers_what_it_was_made_from(runtime: Runtime, echo: Found, policy: Any) -> None:
    assert origins.read(runtime.layout, echo.artifact.digest) == origins.Origin(made=True)
    record = runtime.start(echo, TCG).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")
    committed = commit.take(runtime, runtime.instances.find(record.id), Reference.parse("mine:1")).artifact
    assert origins.read(runtime.layout, committed.digest) == origins.Origin(
        made=True, sources=(origins.Source(echo.artifact.digest),)
    )
    came_from(runtime.layout, echo.artifact.digest, THERE)
    policy(ACCEPT, registry_example=REJECT)
    with pytest.raises(PolicyRefused, match="from which mine:1 was made"):
        runtime.start(find(runtime.layout, "mine:1"), TCG)


def test_a_start_that_is_refused_says_so(runtime: Runtime, echo: Found, policy: Any) -> None:
    policy(REJECT)
    begun = starting.begin(runtime, "echo:1", TCG)
    assert isinstance(begun, starting.Start)
    begun.answered()
    with pytest.raises(PolicyRefused):
        begun.run(lambda host: pytest.fail(host))
    (record,) = runtime.instances.records()
    assert record.problem is not None
    assert (record.problem["code"], record.problem["status"]) == ("policy-refused", 403)


def test_a_watcher_asks_the_policy_of_whoever_started_the_vm(runtime: Runtime, echo: Found, policy: Any) -> None:
    policy(ACCEPT)
    record = runtime.start(echo, replace(TCG, restart=Restart(3))).record
    Console(runtime.instances.directory(record.id)).wait_for("READY")
    policy(REJECT)
    assert record.process is not None
    os.kill(record.process.pid, signal.SIGKILL)
    assert record.watcher is not None
    assert record.watcher.wait(30)
    found = runtime.instances.find(record.id)
    assert not runtime.instances.status(found).state.alive
    assert found.restart == Restart(3, 0), "it was started again"
