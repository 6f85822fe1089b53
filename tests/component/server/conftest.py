"""One server for the tests of a file, with the bare echo guest in its store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests
from support.server import LEAST, Server, prepare


def clear(server: Server) -> None:
    for one in server.get("/instances")["instances"]:
        with contextlib.suppress(AssertionError):
            server.post("/remove", {"instance_id": one["instance_id"], "force": True})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, echo_kernel: Path, qemu_cache: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    running = Server(prepare(directory, echo_kernel, qemu_cache))
    try:
        yield running
        clear(running)
    finally:
        assert running.close() == 0
    assert guests.qemu_children(running.root) == []


@pytest.fixture
def running(server: Server) -> Iterator[str]:
    """The ID of a running instance."""
    yield from started(server, "echo:1")


@pytest.fixture
def shared(server: Server) -> Iterator[str]:
    """The same of one that shares the region ``mmio0``, of 4096 bytes, with its host."""
    yield from started(server, "shared:1")


def started(server: Server, reference: str) -> Iterator[str]:
    started = server.post("/start", {"manifest": reference, "overrides": LEAST})
    server.wait(started["instance_id"], "running")
    yield started["instance_id"]
    server.call("POST", "/remove", {"instance_id": started["instance_id"], "force": True})
