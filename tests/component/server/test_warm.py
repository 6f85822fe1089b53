"""Warm pools over HTTP, and by 'ovm warm'."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli import Ovm
from support.guests import Console
from support.server import Server, prepare, with_snapshot


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory, echo_kernel: Path, qemu_cache: Path) -> Iterator[Server]:
    """A server with the snapshot echo:snap."""
    with with_snapshot(prepare(tmp_path_factory.mktemp("warm"), echo_kernel, qemu_cache)) as running:
        yield running


def ready(server: Server, count: int) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        pools = server.get("/warm")["pools"]  # a server that has just begun makes them one after the other
        if pools and pools[0]["ready"] == count:
            return dict(pools[0])
        assert time.monotonic() < deadline, pools
        time.sleep(0.02)


@pytest.mark.spec("RUN-21", "RUN-8")
def test_a_start_is_answered_by_an_instance_that_runs(pooled: Server) -> None:
    pool = pooled.post("/warm", {"manifest": "echo:snap", "size": 2})
    assert (pool["manifest"], pool["size"], pool["problem"]) == ("echo:snap", 2, None)
    ready(pooled, 2)
    started = pooled.post("/start", {"manifest": "echo:snap", "overrides": {"name": "first"}})
    assert (started["state"], started["status"], started["name"]) == ("running", "starting", "first")
    assert Console(pooled.root / "instances" / started["instance_id"]).ping() == 1
    status = pooled.get(f"/status/{started['instance_id']}")
    assert (status["state"], status["restored"]) == ("running", True)
    ready(pooled, 2)  # another has taken its place
    types = [
        event["type"] for event in pooled.call("GET", "/events?since=0").lines
        if event.get("instance_id") == started["instance_id"]
    ]  # fmt: skip
    assert "created" in types
    pooled.post("/snapshot", {"instance_id": started["instance_id"]})
    pooled.post("/pause", {"instance_id": started["instance_id"]})
    pooled.post("/remove", {"instance_id": started["instance_id"], "force": True})
    pooled.post("/warm", {"manifest": "echo:snap", "size": 0})
    assert pooled.get("/warm") == {"pools": []}


@pytest.mark.spec("RUN-19", "RUN-21")
def test_a_killed_server_loses_what_waits_and_nothing_else(pooled: Server) -> None:
    pooled.post("/warm", {"manifest": "echo:snap", "size": 2})
    ready(pooled, 2)
    started = pooled.post("/start", {"manifest": "echo:snap"})["instance_id"]
    ready(pooled, 2)
    os.kill(pooled.process.pid, signal.SIGKILL)
    pooled.process.wait(20)
    assert len([path for path in (pooled.root / "parked").iterdir() if not path.name.startswith(".")]) == 2
    pooled.start()
    ready(pooled, 2)
    assert Console(pooled.root / "instances" / started).ping() == 1
    assert pooled.state(started) == "running"
    pooled.post("/remove", {"instance_id": started, "force": True})
    pooled.post("/warm", {"manifest": "echo:snap", "size": 0})


def test_a_second_server_leaves_the_pools_to_the_first(pooled: Server, tmp_path: Path) -> None:
    second = Server.__new__(Server)
    second.root, second.socket = pooled.root, tmp_path / "second.sock"
    second.log, second.arguments, second._env = tmp_path / "log", ("--socket", str(second.socket)), {}
    second.start()
    try:
        reply = second.call("POST", "/warm", {"manifest": "echo:snap", "size": 1})
        assert (reply.status, reply.json["code"]) == (422, "unsupported")
        assert second.get("/warm") == {"pools": []}
    finally:
        assert second.close() == 0


def test_the_command(pooled: Server, tmp_path: Path) -> None:
    ovm = Ovm(pooled.root, tmp_path)
    done = ovm("warm", "echo:snap", "--size", "1")
    assert (done.code, done.out) == (0, "")
    assert "1 of echo:snap" in done.err
    ready(pooled, 1)
    head, row = ovm("warm").out.splitlines()
    assert head.split() == ["ARTIFACT", "DIGEST", "SIZE", "READY", "HANDED", "OUT", "PROBLEM"]
    assert row.split()[0] == "echo:snap"
    assert row.split()[2:] == ["1", "1", "0"]
    (pool,) = json.loads(ovm("warm", "--json").out)["pools"]
    assert (pool["ready"], pool["size"]) == (1, 1)
    run = ovm("run", "-d", "echo:snap")
    assert run.code == 0, run.err
    assert json.loads(ovm("inspect", run.out.strip()).out)["restored"] is True
    assert ovm("rm", "-f", run.out.strip()).code == 0
    assert ovm("warm", "echo:snap", "--size", "0").code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("warm", "echo:snap"), 2, "how many"),
        (("warm", "--size", "1"), 2, "needs an artifact"),
        (("warm", "echo:1", "--size", "1"), None, "no RAM snapshot"),
        (("warm", "echo:snap", "--size", "-1"), 2, "out of range"),
        (("--host", "local", "warm"), None, "none runs here"),
    ],
)
def test_the_command_s_mistakes(
    words: tuple[str, ...], code: int | None, said: str, pooled: Server, tmp_path: Path
) -> None:
    done = Ovm(pooled.root, tmp_path)(*words)
    assert done.code == code if code is not None else done.code not in (0, 1)
    assert said in done.err
    assert "hint: " in done.err
