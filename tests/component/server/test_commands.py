"""The command line with a server and without one: the same tool."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.cli import Ovm
from support.guests import Console
from support.server import Server

from ovms.runtime.root import Root
from ovms.runtime.runtime import Runtime

MEMORY = ("-m", "32m", "--accel", "tcg")


@pytest.fixture(params=["server", "local"])
def ovm(server: Server, request: pytest.FixtureRequest, tmp_path: Path) -> Ovm:
    command = Ovm(server.root, tmp_path)
    if request.param == "local":
        return Ovm(server.root, tmp_path, extra={"OVMS_SOCKET": "local"})
    return command


def calls(server: Server, call: str) -> float:
    """How often the server was called so."""
    for line in server.call("GET", "/metrics").body.decode().splitlines():
        if line.startswith(f'ovms_requests_total{{call="{call}",status="200"}}'):
            return float(line.rpartition(" ")[2])
    return 0.0


def test_a_life(ovm: Ovm, server: Server) -> None:
    before = calls(server, "start")
    started = ovm.ok("run", "-d", "--name", "life", *MEMORY, "--json", "echo:1").json
    assert started["state"] == "running"
    assert calls(server, "start") - before == (0 if ovm.extra else 1)
    instance_id = started["instance_id"]
    Console(server.root / "instances" / instance_id).wait_for("READY")
    assert "life" in ovm.ok("ps").out
    assert [one["instance_id"] for one in ovm.ok("ps", "--json").json] == [instance_id]
    assert ovm.ok("pause", "life").out == "life\n"
    assert "(paused)" in ovm.ok("ps").out
    assert ovm.ok("resume", "life", "--json").json[0]["state"] == "running"
    assert ovm.ok("logs", "life").out == "READY\n"
    said = ovm.ok("logs", "--json", "life").json
    assert (said["stream"], said["text"]) == ("console", "READY")
    assert ovm("rm", "life").code == 5
    stopped = ovm.ok("stop", "-t", "20", "--json", "life").json
    assert stopped[0]["ending"] == "powered-off"
    assert ovm("pause", "life").code == 5
    assert "Exited (powered off)" in ovm.ok("ps", "-a").out
    assert ovm.ok("rm", "life").out == "life\n"
    assert ovm("inspect", "life").code == 4


@pytest.mark.long
def test_guests_that_do_not_listen_are_waited_for_together(ovm: Ovm, server: Server) -> None:
    names = ("deaf-1", "deaf-2", "deaf-3", "listens")
    for name in names:
        instance_id = ovm.ok("run", "-d", *MEMORY, "--name", name, "echo:1").out.strip()
        console = Console(server.root / "instances" / instance_id)
        console.wait_for("READY")
        if name != "listens":
            console.send("i")
    began = time.monotonic()
    stopped = ovm.ok("stop", "-t", "4", "--json", *names).json
    assert time.monotonic() - began < 9, "one after the other they take 12 s"
    assert [one["name"] for one in stopped] == list(names)
    assert [one["state"] for one in stopped] == ["stopped"] * 4
    assert [one["ending"] == "powered-off" for one in stopped] == [False, False, False, True]
    ovm.ok("rm", *names)


def test_errors_have_the_same_exit_codes(ovm: Ovm) -> None:
    assert ovm("run", "-d", "nowhere:1").code == 4
    assert ovm("run", "-d", "Not A Name").code == 3
    assert ovm("run", "-d", "--name", "a b", "echo:1").code == 2
    assert ovm("stop", "nobody").code == 4
    assert ovm("logs", "nobody").code == 4
    assert ovm("run", "-d", *MEMORY, "--restore", "require", "echo:1").code == 11
    assert ovm.ok("ps", "-aq").out == ""


def test_what_the_contract_cannot_say_is_done_beside_the_server(server: Server, tmp_path: Path) -> None:
    ovm = Ovm(server.root, tmp_path)
    before = calls(server, "start")
    instance_id = ovm.ok("run", "-d", *MEMORY, "--restart", "on-failure:1", "echo:1").out.strip()
    assert calls(server, "start") == before
    assert server.state(instance_id) == "running"
    ovm.ok("rm", "-f", instance_id)


def test_a_stop_ends_the_wait_for_the_next_start(server: Server, tmp_path: Path) -> None:
    ovm = Ovm(server.root, tmp_path)
    instance_id = ovm.ok("run", "-d", *MEMORY, "--restart", "on-failure", "echo:1").out.strip()
    mark = server.root / "instances" / instance_id / "stop"
    process = Runtime(Root(server.root)).instances.find(instance_id).process
    assert process is not None
    process.signal(signal.SIGKILL)
    assert process.wait(20)
    # before its watcher has come so far, or after: whichever VM there is goes, and none comes
    assert server.post("/stop", {"instance_id": instance_id, "timeout_s": 0}) == {"status": "stopping"}
    assert mark.exists()
    time.sleep(1.5)
    assert server.state(instance_id) in ("stopped", "error")
    ovm.ok("rm", instance_id)


def test_events(ovm: Ovm, server: Server) -> None:
    follower = ovm.popen("events", "-f", "--json", stdout=subprocess.PIPE)
    try:
        time.sleep(1.0)
        instance_id = ovm.ok("run", "-d", *MEMORY, "echo:1").out.strip()
        assert follower.stdout is not None
        for line in follower.stdout:
            event = json.loads(line)
            if event.get("instance_id") == instance_id and event.get("state") == "running":
                break
    finally:
        follower.terminate()
        follower.wait(10)
        assert follower.stdout is not None
        follower.stdout.close()
    ovm.ok("rm", "-f", instance_id)
    said = ovm.ok("events")
    if ovm.extra:
        assert "nobody remembers" in said.err
    else:
        assert f"removed {instance_id}" in said.out


def test_a_server_that_is_named_and_not_there(server: Server, tmp_path: Path) -> None:
    ovm = Ovm(server.root, tmp_path)
    done = ovm("--host", "unix:/nowhere/x.sock", "ps")
    assert (done.code, "ovm serve" in done.err) == (9, True)
    assert ovm("--host", "tcp:example", "ps").code == 2
    assert ovm.ok("--host", f"unix:{server.socket}", "ps").out.startswith("INSTANCE")
