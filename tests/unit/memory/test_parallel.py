"""Work in threads, answers in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ovms.memory.parallel import ordered


def slowly(item: int) -> int:
    time.sleep(0.02 if item % 3 == 0 else 0)
    return item * 2


@pytest.mark.parametrize("threads", [1, 2, 5, 50])
def test_answers_come_in_order(threads: int) -> None:
    assert list(ordered(slowly, range(20), threads=threads)) == [item * 2 for item in range(20)]
    assert list(ordered(slowly, [], threads=threads)) == []


def test_no_more_than_a_few_are_held() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(100):
            taken += 1
            yield item

    answers = ordered(slowly, items(), threads=2)
    next(answers)
    assert taken <= 5
    answers.close()
    assert taken <= 5


def test_an_error_comes_in_its_turn_and_ends_it() -> None:
    began: list[int] = []

    def work(item: int) -> int:
        began.append(item)
        if item == 3:
            raise ValueError(item)
        return item

    answers = ordered(work, range(1000), threads=2)
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(answers)
    assert max(began) < 20


def test_nothing_runs_any_more_when_it_was_closed() -> None:
    running = threading.Event()
    ended: list[int] = []

    def work(item: int) -> int:
        if item:
            running.set()
            time.sleep(0.1)
            ended.append(item)
        return item

    answers = ordered(work, range(10), threads=2)
    next(answers)
    running.wait(5)
    answers.close()
    assert ended, "what was worked on is not abandoned half-way"
    before = list(ended)
    time.sleep(0.15)
    assert ended == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memory-")]
