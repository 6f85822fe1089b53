"""One contract, two clients: this process, and a server. What the command line asks is answered alike."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import Console
from support.server import Server

from ovms.errors import (
    HostError,
    InstanceNotFound,
    NameTaken,
    PortInUse,
    ReferenceNotFound,
    SnapshotIncompatible,
    StateConflict,
    UsageError,
)
from ovms.runtime import client as clients
from ovms.runtime import ports
from ovms.runtime.client import Client
from ovms.runtime.local import Local
from ovms.runtime.remote import Remote, from_problem
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import api
from ovms.spec.choices import Accel, RestorePolicy

OPTIONS = RunOptions(memory=32 << 20, accel=Accel.TCG)


def no_registry(host: str) -> object:
    raise AssertionError(f"a test asks for the registry {host}")


@pytest.fixture(params=["local", "remote"])
def client(server: Server, request: pytest.FixtureRequest) -> Client:
    if request.param == "remote":
        return Remote(server.socket)
    return Local(Runtime(Root(server.root)), no_registry)  # type: ignore[arg-type]


@pytest.fixture
def vm(client: Client, server: Server) -> Iterator[str]:
    instance = client.start("echo:1", OPTIONS)
    assert instance["state"] == "running"
    Console(server.root / "instances" / instance["instance_id"]).wait_for("READY")
    yield instance["instance_id"]
    try:
        client.remove(instance["instance_id"], force=True)
    except InstanceNotFound:
        pass


@pytest.mark.parametrize("heard", [True, False], ids=["the server has begun", "the server has not heard of it"])
def test_one_that_is_interrupted_before_it_knows_what_it_began(
    server: Server, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    real, calls = http.client.HTTPConnection.getresponse, []

    def getresponse(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        calls.append(connection)
        if len(calls) > 1:
            return real(connection)
        if heard:
            real(connection).read()
        raise KeyboardInterrupt

    before = {one["instance_id"] for one in Remote(server.socket).instances()}
    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", getresponse)
    with pytest.raises(KeyboardInterrupt):
        Remote(server.socket).start("echo:1", OPTIONS)
    monkeypatch.undo()
    assert {one["instance_id"] for one in Remote(server.socket).instances()} == before


def test_a_life(client: Client, vm: str) -> None:
    document = client.instance(vm)
    assert document["instance_id"] == vm
    assert vm in [one["instance_id"] for one in client.instances()]
    assert client.instance(document["name"])["instance_id"] == vm
    assert client.instance(vm[:10])["instance_id"] == vm
    assert client.pause(vm)["state"] == "paused"
    assert client.resume(vm)["state"] == "running"
    ended = client.stop(vm, 20)
    assert (ended["state"], ended["ending"]) == ("stopped", "powered-off")
    with pytest.raises(StateConflict) as caught:
        client.pause(vm)
    assert caught.value.context["state"] == "stopped"
    assert next(record["text"] for record in client.logs(vm) if record["stream"] == "console") == "READY"
    assert list(client.logs(vm, tail=0)) == []
    client.remove(vm)
    with pytest.raises(InstanceNotFound):
        client.instance(vm)
    with pytest.raises(InstanceNotFound):
        client.remove(vm)


def test_stop_at_once(client: Client, vm: str) -> None:
    assert client.stop(vm, 0)["state"] == "stopped"
    assert client.stop(vm, 0)["state"] == "stopped"


def test_snapshots(client: Client, vm: str) -> None:
    taken = client.snapshot(vm, "echo:snap")
    assert taken["snapshot_ref"].startswith("sha256:")
    assert (taken["reference"], taken["pushed"]) == ("echo:snap", False)
    clone = client.start("echo:snap", RunOptions(accel=Accel.TCG, restore=RestorePolicy.REQUIRE))
    assert clone["restored"]
    client.remove(clone["instance_id"], force=True)


def test_followed_logs_end(client: Client, vm: str, server: Server) -> None:
    stream = client.logs(vm, follow=True)
    assert next(stream)["text"] == "READY"
    threading.Timer(0.1, lambda: client.stop(vm, 0)).start()
    list(stream)


def test_events(client: Client, server: Server) -> None:
    seen = []
    instances: list[str] = []

    def run() -> None:
        instances.append(client.start("echo:1", OPTIONS)["instance_id"])

    timer = threading.Timer(0.5, run)
    timer.start()
    for event in client.events(follow=True):
        seen.append(event)
        if event["type"] == "state" and event["state"] == "running" and event["instance_id"] in instances:
            break
        if event["type"] == "state" and event["state"] == "running":
            timer.join()
            if event["instance_id"] in instances:
                break
    assert [event["seq"] for event in seen] == list(range(seen[0]["seq"], seen[0]["seq"] + len(seen)))
    client.remove(instances[0], force=True)


def test_errors_are_the_same(client: Client, vm: str) -> None:
    with pytest.raises(ReferenceNotFound):
        client.start("nowhere:1", OPTIONS)
    name = client.instance(vm)["name"]
    with pytest.raises(NameTaken):
        client.start("echo:1", RunOptions(name=name, memory=32 << 20, accel=Accel.TCG))
    with pytest.raises(StateConflict):
        client.remove(vm)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUse):
        port = ports.parse(f"{taken.getsockname()[1]}:80")
        client.start("echo:1", RunOptions(memory=32 << 20, accel=Accel.TCG, ports=(port,)))
    assert len(client.instances()) == 1


def test_a_start_that_fails_leaves_nothing(client: Client, server: Server) -> None:
    before = client.instances()
    with pytest.raises(SnapshotIncompatible, match="no RAM snapshot"):
        client.start("echo:1", RunOptions(memory=32 << 20, accel=Accel.TCG, restore=RestorePolicy.REQUIRE))
    assert client.instances() == before


def test_which_one_is_chosen(server: Server, tmp_path: Path) -> None:
    here = Root(server.root)
    assert clients.choose(here, None, {}) == server.socket
    assert clients.choose(here, "local", {}) is None
    assert clients.choose(here, None, {"OVMS_SOCKET": "local"}) is None
    nowhere = Root(tmp_path)
    assert clients.choose(nowhere, None, {}) is None
    assert clients.choose(nowhere, f"unix:{server.socket}", {"OVMS_SOCKET": "/nowhere"}) == server.socket
    assert clients.choose(nowhere, None, {"OVMS_SOCKET": str(server.socket)}) == server.socket
    with pytest.raises(HostError, match="no server listens"):
        clients.choose(nowhere, f"unix:{tmp_path}/none.sock", {})
    with pytest.raises(UsageError):
        clients.choose(nowhere, "example:80", {})
    (tmp_path / "ovms.sock").touch()  # what a dead server left
    assert clients.choose(nowhere, None, {}) is None


@pytest.mark.spec("ERR-4", "VER-4")
def test_every_problem_becomes_its_error() -> None:
    for code in api.CODES:
        document = {"type": f"urn:ovms:problem:{code}", "title": "t", "status": 400, "detail": "what", "code": code}
        error = from_problem(document | {"hint": "do", "state": "x", "instance_name": "web", "message": 1, "self": 2})
        assert (error.code, error.message, error.hint) == (code, "what", "do")
    # a code that is not known: by the class of its status
    for status, code in ((404, "not-found"), (409, "conflict"), (418, "invalid-input"), (599, "host")):
        error = from_problem({"code": "x-of-another", "detail": "d", "status": status})
        assert (error.code, error.message) == (code, "d")
    assert from_problem([]).code == "host"
