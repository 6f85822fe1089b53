"""Freezing a guest's file systems: with an agent that is played."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from support.played import Answer, Played, Refusal

from ovms.errors import AgentUnavailable
from ovms.runtime import agent as agents
from ovms.runtime import quiesce
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record
from ovms.spec.choices import Accel
from ovms.vmm.model import Machine, VmFiles
from ovms.vmm.protocol import Control

MACHINE = Machine("pc", Accel.TCG, "max", (), 1 << 25, 1, "", 1 << 20, agent=True)
RECORD = Record(
    id="00000000-0000-4000-8000-000000000000", name="vm", created="", reference="x:1", digest=None, vmm="qemu", vmm_version="", machine=MACHINE,
    accel_reason=None, ports=(), overlays=(),
)  # fmt: skip


class Kept:
    """Instances, of which there is one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record = RECORD
        self.saved: list[bool] = []

    def files(self, record: Record) -> VmFiles:
        return VmFiles(self.directory)

    def save(self, record: Record) -> Record:
        self.record = record
        self.saved.append(record.fs_frozen)
        return record

    def newest(self, record: Record) -> Record:
        return self.record


class Listening:
    def agent_listens(self) -> bool:
        return True


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], tuple[Played, Kept]]]:
    monkeypatch.setattr(agents, "_LEAST", 0.2)
    monkeypatch.setattr(quiesce, "FREEZE", 0.3)
    monkeypatch.setattr(quiesce, "THAW", 0.5)
    with contextlib.ExitStack() as held:

        def start(answer: Answer) -> tuple[Played, Kept]:
            played = Played(tmp_path, answer)
            held.callback(played.close)
            return played, Kept(tmp_path)

        yield start


def held(kept: Kept, record: Record = RECORD) -> contextlib.AbstractContextManager[tuple[Record, str | None]]:
    return quiesce.file_systems(cast(Instances, kept), record, cast(Control, Listening()))


def obedient(name: str, arguments: dict[str, Any]) -> Any:
    return 2


BOTH = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_frozen_in_between_and_the_record_says_so_first(play: Callable[[Answer], tuple[Played, Kept]]) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        assert kept.record.fs_frozen
        return 2

    played, kept = play(answer)
    with held(kept) as (record, why):
        assert (record.fs_frozen, why, played.names()) == (True, None, BOTH[:1])
        # what is noted meanwhile stays
        kept.save(replace(record, overlays=("overlay-0.qcow2",)))
    assert played.names() == BOTH
    assert (kept.record.fs_frozen, kept.record.overlays) == (False, ("overlay-0.qcow2",))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_thawed_whatever_happens(play: Callable[[Answer], tuple[Played, Kept]], error: type[BaseException]) -> None:
    played, kept = play(obedient)
    with pytest.raises(error), held(kept):
        raise error
    assert (played.names(), kept.record.fs_frozen) == (BOTH, False)


def test_a_guest_that_refuses_is_thawed_and_taken_as_it_is(play: Callable[[Answer], tuple[Played, Kept]]) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == BOTH[0]:
            raise Refusal("Command guest-fsfreeze-freeze has been disabled\x1b[0m")
        return 0

    played, kept = play(answer)
    with held(kept) as (record, why):
        assert (record.fs_frozen, kept.record.fs_frozen) == (False, False)
        assert why is not None
        assert "disabled?[0m" in why
        assert played.names() == BOTH


@pytest.mark.parametrize("count", [0, -1, "x", None])
def test_a_guest_that_freezes_nothing(play: Callable[[Answer], tuple[Played, Kept]], count: Any) -> None:
    played, kept = play(lambda name, arguments: count if name == BOTH[0] else 0)
    with held(kept) as (_, why):
        assert why == "the guest has no file system that can be frozen"
    assert (played.names(), kept.record.fs_frozen) == (BOTH, False)


def test_a_guest_that_takes_too_long_is_thawed(play: Callable[[Answer], tuple[Played, Kept]]) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == BOTH[0]:
            time.sleep(0.5)
        return 1

    played, kept = play(answer)
    with held(kept) as (_, why):
        assert why is not None
        assert "in time" in why
    assert (played.names(), kept.record.fs_frozen) == (BOTH, False)


def test_a_guest_that_does_not_thaw_stays_noted(play: Callable[[Answer], tuple[Played, Kept]]) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> Any:
        if name == BOTH[1]:
            raise Refusal("no")
        return 1

    _, kept = play(answer)
    with pytest.raises(AgentUnavailable, match="may stand frozen still"), held(kept):
        pass
    assert kept.record.fs_frozen


def test_nothing_is_asked_where_there_is_nobody(play: Callable[[Answer], tuple[Played, Kept]]) -> None:
    played, kept = play(obedient)
    without = replace(RECORD, machine=replace(MACHINE, agent=False))
    with held(kept, without) as (_, why):
        assert why == "its VM has no port for an agent"
    Listening.agent_listens = lambda self: False  # type: ignore[method-assign]
    try:
        with held(kept) as (_, why):
            assert why == "no agent runs in the guest"
    finally:
        Listening.agent_listens = lambda self: True  # type: ignore[method-assign]
    assert (played.names(), kept.saved) == ([], [])
