"""Several transfers at once: the first error ends them all, and so does Ctrl-C."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Final

from ovms.errors import OvmsError

#: Transfers at once. More does not help on one link, and registries count connections.
PARALLEL: Final = 4
#: Seconds that a broken-off transfer gets to notice.
_GRACE: Final = 1.0

Job = Callable[[Callable[[], bool]], None]


class Stopped(OvmsError):
    """Another transfer of the same artifact has failed; its error is the one to show."""


def run_all(jobs: Iterable[Job], *, parallel: int = PARALLEL) -> None:
    """Runs every job; each gets a function that says whether it should stop.

    Raises whatever the first job that failed raised. What still runs then is told to stop, and not waited for long: a
    thread that hangs in a read ends with the process, and what it has done so far is kept in files that stand alone.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    count = 0
    for job in jobs:
        waiting.put(job)
        count += 1
    stop = threading.Event()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job(stop.is_set)
                done.put(None)
            except BaseException as exc:  # noqa: BLE001 - raised again where the jobs came from
                done.put(exc)  # before the others hear of it, and fail because of it
                stop.set()

    threads = [threading.Thread(target=work, name=f"transfer-{i}", daemon=True) for i in range(min(parallel, count))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(count):
            if (error := done.get()) is not None:
                raise error
    finally:
        stop.set()
        for thread in threads:
            thread.join(_GRACE)
