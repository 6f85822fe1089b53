"""Pieces of work in threads, answers in order: for what runs outside of the interpreter's lock (codecs, digests, files)."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Final, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: More gain nothing: what is unpacked has to go through one memory.
_THREADS_MAX: Final = 8


class _Slot(Generic[T, R]):
    """A piece of work, and what became of it once *done* can be acquired."""

    def __init__(self, item: T) -> None:
        self.item = item
        self.answers: list[R] = []
        self.error: BaseException | None = None
        self.done = threading.Semaphore(0)

    def answer(self) -> R:
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return self.answers[0]


def processors() -> int:
    """How many threads are of use here."""
    return min(len(os.sched_getaffinity(0)), _THREADS_MAX)


def ordered(work: Callable[[T], R], items: Iterable[T], *, threads: int | None = None) -> Generator[R, None, None]:
    """``work(item)`` of each item, in their order; a few are worked on at once, and no more than that are held.

    What *work* raises is raised here, in its turn. Nothing runs any more when the iterator has ended or was closed: whoever may
    leave it early closes it (:func:`contextlib.closing`) before what *work* uses.
    """
    count = processors() if threads is None else threads
    todo: queue.SimpleQueue[_Slot[T, R] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while (slot := todo.get()) is not None:
            try:
                if not stop.is_set():
                    slot.answers.append(work(slot.item))
            except BaseException as exc:  # noqa: BLE001 - raised again where the answer is asked for
                slot.error = exc
            slot.done.release()

    running: list[threading.Thread] = []
    pending: deque[_Slot[T, R]] = deque()
    try:
        for item in items:
            slot: _Slot[T, R] = _Slot(item)
            pending.append(slot)
            todo.put(slot)
            if len(running) < count:
                running.append(threading.Thread(target=run, name=f"memory-{len(running)}", daemon=True))
                running[-1].start()
            if len(pending) > 2 * count:
                yield pending.popleft().answer()
        while pending:
            yield pending.popleft().answer()
    finally:
        stop.set()
        for _ in running:
            todo.put(None)
        for thread in running:
            thread.join()
