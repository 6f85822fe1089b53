"""Moving processes into control groups without a wait."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovms.runtime import cgroups


def groups(directory: Path, version: int, mine: str) -> tuple[Path, Path]:
    """A ``/proc/self`` that says where we are, and the place where groups are mounted."""
    proc, point = directory / "proc", directory / "groups"
    proc.mkdir(exist_ok=True)
    (point / mine).mkdir(parents=True, exist_ok=True)
    (point / mine / "cgroup.procs").touch()
    kind, line = (
        ("cgroup2 cgroup rw", f"0::/{mine}") if version == 2 else ("cgroup cgroup rw,memory", f"4:memory:/{mine}")
    )
    (proc / "cgroup").write_text(line + "\n")
    (proc / "mountinfo").write_text(f"30 25 0:26 / {point} rw - {kind}\n")
    return proc, point


def written(path: Path) -> Callable[[], bool]:
    return lambda: path.read_text() != ""


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("version", [1, 2])
def test_we_are_moved_to_where_we_are_until_it_is_done(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_MOVES", 10_000_000)
    proc, point = groups(tmp_path, version, "a/b")
    procs = point / "a/b/cgroup.procs"
    with cgroups.at_hand(proc=proc):
        wait(lambda: len(procs.read_text()) > 2)
    time.sleep(0.05)
    before = procs.read_text()
    time.sleep(0.05)
    assert procs.read_text() == before
    assert set(before) == {"0"}


def test_who_was_moved_meanwhile_is_not_moved_back(tmp_path: Path) -> None:
    proc, point = groups(tmp_path, 2, "before")
    with cgroups.at_hand(proc=proc):
        wait(written(point / "before/cgroup.procs"))
    time.sleep(0.05)
    (point / "before/cgroup.procs").write_text("")
    groups(tmp_path, 2, "after")
    with cgroups.at_hand(proc=proc):
        wait(written(point / "after/cgroup.procs"))
    assert not written(point / "before/cgroup.procs")()


def test_one_within_another_does_nothing_until_that_has_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, point = groups(tmp_path, 2, "a")
    procs = point / "a/cgroup.procs"
    monkeypatch.setattr(cgroups, "_MOVES", 10_000_000)
    with cgroups.at_hand(proc=proc):
        wait(written(procs))
        mover = cgroups._mover.thread
        with cgroups.at_hand(proc=proc):
            assert cgroups._mover.thread is mover
        before = procs.read_text()
        wait(lambda: procs.read_text() != before)
    mover.join(10)
    monkeypatch.setattr(cgroups, "_MOVES", 1)
    with cgroups.at_hand(proc=proc):
        (given_up := cgroups._mover.thread).join(10)
        with cgroups.at_hand(proc=proc):
            assert cgroups._mover.thread is not given_up


def test_the_next_one_is_not_within_the_last(tmp_path: Path) -> None:
    """Whose thread may take a moment to end."""
    proc, _ = groups(tmp_path, 2, "a")
    for _ in range(2):
        with cgroups.at_hand(proc=proc):
            assert cgroups._mover.thread is not None
        assert cgroups._mover.thread is None


def test_each_thread_has_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts in a server: the end of one is no matter of another."""
    proc, point = groups(tmp_path, 2, "a")
    monkeypatch.setattr(cgroups, "_MOVES", 10_000_000)
    with cgroups.at_hand(proc=proc):

        def start() -> None:
            with cgroups.at_hand(proc=proc):
                pass

        thread = threading.Thread(target=start)
        thread.start()
        thread.join(10)
        procs = point / "a/cgroup.procs"
        wait(written(procs))
        before = procs.read_text()
        wait(lambda: procs.read_text() != before)


def test_what_is_left_in_a_group_is_ended_and_never_we_ourselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: ended.append(pid))
    (tmp_path / "cgroup.procs").write_text("0\n4321\n0\n4322\n")
    cgroups._end_all(tmp_path)
    assert ended == [4321, 4322]


@pytest.mark.parametrize("missing", ["cgroup", "mountinfo"])
def test_a_host_without_groups_is_none_the_wiser(tmp_path: Path, missing: str) -> None:
    proc, _ = groups(tmp_path, 2, "a")
    (proc / missing).unlink()
    with cgroups.at_hand(proc=proc):
        pass
