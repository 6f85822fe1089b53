"""Many clones of one guest: of a running instance, as it is in this moment, or of an artifact's RAM snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Final

from ovms.errors import InstanceNotFound, OvmsError
from ovms.lazy import replace
from ovms.progress import NULL, Progress
from ovms.runtime.client import Client, Document
from ovms.runtime.runtime import RunOptions

#: Clones that are started at once: a spawn waits for its process, and for the kernel, half of its time.
WORKERS: Final = 8


def fork(
    client: Client, text: str, count: int, options: RunOptions, tag: str | None = None, progress: Progress = NULL
) -> list[Document]:
    """Starts *count* clones of what *text* names, all of them or none; each is an instance of its own.

    An instance is snapshot first, by the name *tag* where there is one, and goes on. *options* are those of each start;
    ``options.name`` gets ``-1``, ``-2``, … where there are several.

    Raises:
        OvmsError: as a snapshot and a start do. Nothing is left of the clones then; the snapshot stays.
    """
    reference = text
    with contextlib.suppress(InstanceNotFound):
        instance_id = str(client.instance(text)["instance_id"])
        reference = str(client.snapshot(instance_id, tag, progress)["snapshot_ref"])
    names: Iterator[str | None] = iter(
        [options.name] if count == 1 else [options.name and f"{options.name}-{i}" for i in range(1, count + 1)]
    )
    with ThreadPoolExecutor(min(WORKERS, count), thread_name_prefix="ovms-fork") as pool:
        starts: list[Future[Document]] = []
        try:
            for name in names:
                starts.append(pool.submit(client.start, reference, replace(options, name=name)))  # noqa: PERF401 - see below
            with progress.task("clones", count) as task:
                for start in starts:
                    start.add_done_callback(lambda _: task.advance(1))
                wait(starts, return_when=FIRST_EXCEPTION)
                return [start.result() for start in starts if not start.cancelled()]
        except BaseException:  # Ctrl-C, too, when some are on their way and others are not
            _undo(client, starts)
            raise


def _undo(client: Client, starts: list[Future[Document]]) -> None:
    for start in starts:
        start.cancel()
    for start in starts:
        with contextlib.suppress(OvmsError, OSError):
            if not start.cancelled():
                client.remove(str(start.result()["instance_id"]), force=True)
