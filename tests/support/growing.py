"""A server in this process, counted from inside: what it has more of after many starts than before.

``python -m support.growing ROOT CYCLES`` prints what the cycles (start, events, status, remove) leave, as a JSON object: entries of all
containers, blocks of memory that Python has allocated, descriptors, threads, tasks. What is remembered of events is told by itself.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ovms.runtime.root import Root
from ovms.runtime.runtime import Runtime
from ovms.runtime.server import serve
from ovms.runtime.watching import EventLog
from support.server import LEAST, Server

WARM = 20


class _Here(Server):
    def start(self) -> None:
        """It runs already."""


def cycle(server: Server) -> None:
    started = server.post("/start", {"manifest": "echo:1", "overrides": LEAST})
    instance_id = started["instance_id"]
    events = server.stream(f"/events?follow=true&since={started['event_seq']}")
    assert any(event.get("instance_id") == instance_id and event.get("state") == "running" for event in events)
    server.get(f"/status/{instance_id}")
    server.post("/remove", {"instance_id": instance_id, "force": True})


def count() -> dict[str, int]:
    """What there is now."""
    time.sleep(0.5)  # of the last cycle a task or two may be at work
    gc.unfreeze()  # the server has frozen what it began with, its own containers among it
    gc.collect()
    blocks = sys.getallocatedblocks()
    objects = gc.get_objects()
    log = next(one for one in objects if type(one) is EventLog)
    containers = (dict, list, set, collections.deque)
    return {
        "blocks": blocks,
        "entries": sum(len(one) for one in objects if isinstance(one, containers) and one is not objects),
        "events": len(log._lengths),
        "event_bytes": log._size,
        "tasks": sum(isinstance(one, asyncio.Task) for one in objects),
        "threads": threading.active_count(),
        "fds": len(os.listdir("/proc/self/fd")),
    }


def measure(server: Server, cycles: int) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        while server.call("GET", "/healthz").status != 200:
            time.sleep(0.05)
    for _ in range(WARM):
        cycle(server)
    before = count()
    for _ in range(cycles):
        cycle(server)
    after = count()
    return {key: after[key] - before[key] for key in before}


def main() -> None:
    """Serves until it has been counted."""
    root, cycles = Path(sys.argv[1]), int(sys.argv[2])
    failed: list[BaseException] = []

    def work() -> None:
        try:
            print(json.dumps(measure(_Here(root), cycles)), flush=True)
        except BaseException as exc:
            failed.append(exc)
            raise
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    runtime, options = Runtime(Root(root)), serve.Options(root / "ovms.sock")
    begin = threading.Thread(target=work, daemon=True)
    serve.serve(runtime, options, ready=lambda _: begin.start())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
