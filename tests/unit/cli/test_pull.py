"""Several artifacts pulled by one command."""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ovms.cli.commands import pull
from ovms.errors import OvmsError, ReferenceNotFound
from ovms.oci.small import Pool


class Stub:
    """A context without a registry behind it."""

    layout = guard = progress = connector = None

    @contextlib.contextmanager
    def pulling(self) -> Iterator[None]:
        yield


def run(
    monkeypatch: pytest.MonkeyPatch, one: Callable[[str], dict[str, Any]], *references: str, json: bool = True
) -> int:
    monkeypatch.setattr(pull, "_pull", lambda reference, _args, _context, parallel: one(reference))
    args = argparse.Namespace(tag=None, references=list(references), json=json)
    return pull.run(args, Stub())  # type: ignore[arg-type]


def answer(reference: str) -> dict[str, Any]:
    return {"name": reference, "digest": f"digest-of-{reference}"}


def test_four_are_pulled_at_once_and_told_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_of_them = threading.Barrier(4, timeout=20)
    most, now, lock = 0, 0, threading.Lock()

    def one(reference: str) -> dict[str, Any]:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        all_of_them.wait()
        if reference == "a":
            time.sleep(0.05)
        with lock:
            now -= 1
        return answer(reference)

    assert run(monkeypatch, one, *"abcdefgh") == 0
    assert [value["name"] for value in json.loads(capsys.readouterr().out)] == [*"abcdefgh"]
    assert most == 4


@pytest.mark.parametrize(("count", "each"), [(1, None), (2, 4), (3, 2), (4, 2), (20, 2)])
def test_they_share_the_connections(monkeypatch: pytest.MonkeyPatch, count: int, each: int | None) -> None:
    asked: list[Pool | None] = []

    def one(reference: str, _args: object, _context: object, pool: Pool | None = None) -> dict[str, Any]:
        asked.append(pool)
        return answer(reference)

    monkeypatch.setattr(pull, "_pull", one)
    args = argparse.Namespace(tag=None, references=[str(i) for i in range(count)], json=True)
    pull.run(args, Stub())  # type: ignore[arg-type]
    assert [pool and pool.each for pool in asked] == [each] * count
    assert len(set(asked)) == 1, "one pool"


def test_after_one_that_failed_none_is_begun_and_those_at_work_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []
    failed = threading.Event()
    all_of_them = threading.Barrier(4, timeout=20)

    def one(reference: str) -> dict[str, Any]:
        begun.append(reference)
        all_of_them.wait()
        if reference == "b":
            failed.set()
            raise ReferenceNotFound("b")
        assert failed.wait(20)
        time.sleep(0.05)
        return answer(reference)

    with pytest.raises(ReferenceNotFound):
        run(monkeypatch, one, *"abcdefgh", json=False)
    assert sorted(begun) == [*"abcd"]
    assert capsys.readouterr().out.splitlines() == [f"{name}@digest-of-{name}" for name in "acd"]


def test_the_first_error_in_their_order_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)

    def one(reference: str) -> dict[str, Any]:
        both.wait()
        if reference == "a":
            time.sleep(0.05)
        raise OvmsError(f"not {reference}")

    with pytest.raises(OvmsError, match="not a"):
        run(monkeypatch, one, "a", "b")
