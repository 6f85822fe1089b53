"""The calls of the contract, one after the other, on real VMs."""

from __future__ import annotations

import base64
import http.client
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.guests import Console, qemu_children
from support.registry import Registry
from support.server import Server

from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.oci.transfer import push
from ovms.runtime.root import Root
from ovms.runtime.runtime import Runtime
from ovms.spec import limits

LEAST = {"memory": "32M", "accel": "tcg"}
START = {"manifest": "echo:1", "overrides": LEAST}


def console(server: Server, instance_id: str) -> Console:
    return Console(server.root / "instances" / instance_id)


def post(server: Server, path: str, instance_id: str, **body: Any) -> Any:
    return server.post(path, {"instance_id": instance_id, **body})


def ids(server: Server) -> list[str]:
    return [str(one["instance_id"]) for one in server.get("/instances")["instances"]]


@pytest.mark.spec("RUN-8", "STA-3", "RUN-6", "STA-5")
def test_a_start_is_answered_before_the_vm_runs(server: Server) -> None:
    started = server.post("/start", START)
    assert (started["status"], started["state"]) == ("starting", "starting")
    document = server.wait(started["instance_id"], "running")
    console(server, document["instance_id"]).wait_for("READY")
    assert set(document["timings_ms"]) >= {"resolve", "disks", "spawn"}
    document = server.get(f"/status/{document['instance_id']}")
    assert document["timings_ms"]["first_output"] > 0
    assert document["pid"] > 0
    assert document["uptime_ms"] >= 0
    assert document["metrics"]["memory_bytes"] > 1 << 20
    deadline = time.monotonic() + 10  # the VMM is asked when nobody else talks to it
    while not set(document["metrics"]) >= {"cpu_ms", "disk_read_bytes", "disk_written_bytes"}:
        assert time.monotonic() < deadline, document["metrics"]
        time.sleep(0.1)
        document = server.get(f"/status/{document['instance_id']}")
    by_name = server.get(f"/status/{document['name']}")
    assert by_name["instance_id"] == document["instance_id"]
    assert post(server, "/remove", document["instance_id"], force=True) == {"status": "ok"}
    assert server.call("GET", f"/logs/{document['instance_id']}").status == 404


@pytest.mark.spec("RUN-8", "GEN-3")
def test_a_start_that_fails_at_once_leaves_nothing(server: Server) -> None:
    before = ids(server)
    reply = server.call("POST", "/start", {"manifest": "nowhere:1"})
    assert (reply.status, reply.json["code"]) == (404, "reference-not-found")
    reply = server.call("POST", "/start", {"manifest": f"oci-archive:{server.root}/none.tar"})
    assert (reply.status, reply.json["code"]) == (422, "file-missing")
    reply = server.call("POST", "/start", {"manifest": "oci:relative/dir"})
    assert reply.json["code"] == "invalid-input"
    reply = server.call("POST", "/start", {"manifest": "Not A Reference"})
    assert (reply.status, reply.json["code"]) == (400, "reference-invalid")
    assert ids(server) == before


@pytest.mark.spec("RUN-7", "SEC-2")
def test_a_hostile_archive_is_refused(server: Server, tmp_path: Path) -> None:
    import io
    import tarfile

    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("../../escaped")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("blobs")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    reply = server.call("POST", "/start", {"manifest": f"oci-archive:{path}"})
    assert 400 <= reply.status < 500
    assert not (server.root.parent / "escaped").exists()


def slow(server: Server, registry: Registry, name: str) -> str:
    """An artifact in the registry alone, with one blob that its storage serves no more. Returns its reference."""
    layout = Root(server.root).layout()
    reference = Reference.parse(f"{registry.host}/{name}:1")
    digest = next(entry.descriptor.digest for entry in layout.entries() if entry.name == "echo:1")
    push(layout, RegistryClient(registry.host), reference, digest)
    return str(reference)


@pytest.mark.spec("RUN-8", "STA-3")
def test_a_start_from_a_registry(server: Server, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    try:
        reference = slow(server, registry, "pulled")
        started = server.post("/start", {"manifest": reference, "overrides": LEAST})
        document = server.wait(started["instance_id"], "running")
        assert document["timings_ms"]["pull"] > 0
        post(server, "/remove", document["instance_id"], force=True)
    finally:
        registry.close()
    # a registry that takes its time
    import socket as sockets

    with sockets.create_server(("127.0.0.1", 0)) as silent:
        reference = f"127.0.0.1:{silent.getsockname()[1]}/web:1"
        began = time.monotonic()
        started = server.post("/start", {"manifest": reference, "overrides": LEAST})
        assert time.monotonic() - began < 1.5
        instance_id = started["instance_id"]
        assert server.state(instance_id) == "starting"
        reply = server.call("POST", "/pause", {"instance_id": instance_id})
        assert (reply.status, reply.json["state"]) == (409, "starting")
        assert server.call("POST", "/remove", {"instance_id": instance_id}).json["code"] == "state-conflict"
        assert post(server, "/stop", instance_id) == {"status": "stopping"}
        assert server.state(instance_id) in ("stopping", "stopped")
        # by force it is gone at once, though the registry still says nothing
        other = server.post("/start", {"manifest": reference, "overrides": LEAST})["instance_id"]
        assert post(server, "/remove", other, force=True) == {"status": "ok"}
        assert server.call("GET", f"/status/{other}").status == 404
    server.wait(instance_id, "stopped", timeout=60)
    post(server, "/remove", instance_id)


@pytest.mark.spec("RUN-8", "STA-3")
@pytest.mark.long
def test_a_start_that_fails_later_leaves_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket as sockets

    silent = sockets.create_server(("127.0.0.1", 0))
    reference = f"127.0.0.1:{silent.getsockname()[1]}/web:1"
    started = server.post("/start", {"manifest": reference, "overrides": LEAST | {"remove_on_exit": True}})
    silent.close()  # what waited in its queue is reset
    document = server.wait(started["instance_id"], "error", timeout=60)
    assert document["error"]["code"] == "registry-unreachable"
    assert document["error"]["status"] == 502
    assert "digest" not in document
    assert post(server, "/stop", document["instance_id"]) == {"status": "stopping"}
    assert server.state(document["instance_id"]) == "error"
    post(server, "/remove", document["instance_id"])


@pytest.mark.spec("RUN-11")
def test_one_key_makes_one_instance(server: Server) -> None:
    headers = {"Idempotency-Key": "a key of the test's own"}
    answers: list[Any] = []

    def start() -> None:
        answers.append(server.post("/start", START, headers=headers))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["instance_id"] for answer in answers}) == 1
    assert {answer["status"] for answer in answers} == {"starting"}
    instance_id = answers[0]["instance_id"]
    server.wait(instance_id, "running")
    other = server.call("POST", "/start", {"manifest": "echo:1"}, headers=headers)
    assert (other.status, other.json["code"]) == (409, "conflict")
    os.kill(server.process.pid, signal.SIGKILL)  # a key is not forgotten with the server
    server.process.wait(10)
    server.start()
    assert server.post("/start", START, headers=headers)["instance_id"] == instance_id
    assert server.state(instance_id) == "running"
    post(server, "/remove", instance_id, force=True)
    again = server.post("/start", START, headers=headers)
    assert again["instance_id"] != instance_id
    post(server, "/remove", again["instance_id"], force=True)
    for key in ("", "x" * (limits.KEY_MAX + 1)):
        assert server.call("POST", "/start", START, headers={"Idempotency-Key": key}).json["code"] == "invalid-input"


@pytest.mark.spec("RUN-12")
def test_stop_answers_at_once_and_ends_what_does_not_listen(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    console(server, running).send("i")  # ignores the button
    pid = server.get(f"/status/{running}")["pid"]
    began = time.monotonic()
    assert post(server, "/stop", running, timeout_s=1) == {"status": "stopping"}
    assert time.monotonic() - began < 0.9
    assert server.state(running) == "stopping"
    assert post(server, "/stop", running) == {"status": "stopping"}
    document = server.wait(running, "stopped")
    assert 0.9 < time.monotonic() - began < 8
    assert document["ending"] == "stopped"
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.spec("RUN-12", "STA-3")
def test_stop_lets_the_guest_power_down(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    post(server, "/pause", running)
    post(server, "/stop", running)  # a paused guest is resumed first
    assert server.wait(running, "stopped")["ending"] == "powered-off"


@pytest.mark.spec("RUN-12", "RUN-19")
def test_a_stop_is_finished_by_the_next_server(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    console(server, running).send("i")
    post(server, "/stop", running, timeout_s=2)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(10)
    server.start()
    assert server.state(running) == "stopping"
    server.wait(running, "stopped", timeout=15)


@pytest.mark.spec("STA-2", "STA-6")
def test_a_pause_stays_until_resume(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    for _ in range(2):
        post(server, "/pause", running)
        assert server.state(running) == "paused"
    runtime = Runtime(Root(server.root))
    runtime.instances.recover()  # what every command does first
    with runtime.instances.locked(runtime.instances.find(running)) as record, runtime.instances.control(record) as vm:
        assert vm.state() == "paused"
    taken = post(server, "/snapshot", running, tag="echo:paused")
    assert taken["snapshot_ref"].startswith("sha256:")
    assert server.state(running) == "paused"
    for _ in range(2):
        post(server, "/resume", running)
        assert server.state(running) == "running"
    assert console(server, running).ping() == 1


@pytest.mark.spec("RUN-13", "RUN-14")
def test_a_snapshot_is_restored(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    console(server, running).ping()
    taken = post(server, "/snapshot", running, tag="echo:warm")
    assert (taken["reference"], taken["pushed"]) == ("echo:warm", False)
    assert server.state(running) == "running"
    clone = server.post("/start", {"manifest": "echo:warm", "overrides": {"restore": "require", "accel": "tcg"}})
    document = server.wait(clone["instance_id"], "running")
    assert document["restored"]
    assert set(document["timings_ms"]) >= {"resolve", "disks", "spawn", "load", "resume"}
    assert console(server, clone["instance_id"]).ping() == 2
    post(server, "/remove", clone["instance_id"], force=True)


@pytest.mark.spec("RUN-3", "RUN-13")
def test_what_a_snapshot_leaves(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    taken = post(server, "/snapshot", running, tag="echo:left", leave="paused")
    assert (taken["reseeds"], taken["scrubbed"]) == (None, None)  # the echo guest is no Linux
    assert server.state(running) == "paused"
    refused = server.call("POST", "/snapshot", {"instance_id": running, "leave": "gone"})
    assert (refused.status, refused.json["code"]) == (400, "invalid-input")
    post(server, "/resume", running)
    refused = server.call("POST", "/snapshot", {"instance_id": running, "scrub": True})
    assert (refused.status, refused.json["code"]) == (503, "agent-unavailable")
    assert refused.json["hint"]
    assert server.state(running) == "running"
    post(server, "/snapshot", running, leave="stopped")
    assert server.state(running) == "stopped"
    clone = server.post("/start", {"manifest": "echo:left", "overrides": {"keep_identity": True, "accel": "tcg"}})
    document = server.wait(clone["instance_id"], "running")
    assert (document["restored"], document["identity"], document["memory_locked"]) == (True, None, False)
    post(server, "/remove", clone["instance_id"], force=True)


@pytest.mark.spec("RUN-16")
def test_logs(server: Server, running: str) -> None:
    console(server, running).wait_for("READY")
    stream = server.stream(f"/logs/{running}?follow=true")
    first = next(stream)
    assert (first["stream"], first["text"]) == ("console", "READY")
    console(server, running).ping()
    assert next(stream)["text"].startswith("PONG ")
    post(server, "/stop", running, force=True)
    rest = list(stream)  # and it ends
    assert all(record["stream"] in ("console", "vmm") for record in rest)
    whole = server.call("GET", f"/logs/{running}").lines
    assert [r["text"] for r in whole if r["stream"] == "console"][:1] == ["READY"]
    assert server.call("GET", f"/logs/{running}?tail=1").lines == whole[-1:]
    assert server.call("GET", f"/logs/{running}?tail=0").lines == []
    assert server.call("GET", f"/logs/{running}?since=2999-01-01T00:00:00Z").lines == []
    after = server.call("GET", f"/logs/{running}?since={first['time']}").lines
    assert len(after) <= len(whole)


@pytest.mark.spec("RUN-17", "RUN-18", "RUN-19")
def test_events_tell_what_others_do(server: Server) -> None:
    last = server.call("GET", "/events").lines[-1]["seq"]
    stream = server.stream(f"/events?follow=true&since={last}")
    started = server.post("/start", START)
    instance_id = started["instance_id"]
    seen: list[Any] = []

    def until(kind: str, state: str | None = None) -> None:
        for event in stream:
            seen.append(event)
            if event["type"] == kind and event.get("instance_id") == instance_id and event.get("state") == state:
                return

    until("state", "running")
    console(server, instance_id).wait_for("READY")
    console(server, instance_id).send("q")  # the guest powers off by itself
    until("state", "stopped")
    runtime = Runtime(Root(server.root))
    runtime.remove(runtime.instances.find(instance_id))  # another process would do it so
    until("removed")
    assert [event["seq"] for event in seen] == list(range(last + 1, last + 1 + len(seen)))
    assert next(event for event in seen if event["instance_id"] == instance_id)["type"] == "created"
    again = server.call("GET", f"/events?since={seen[1]['seq']}").lines
    assert again[: len(seen) - 2] == seen[2:]
    (lost, *_) = server.call("GET", "/events?since=1").lines
    assert lost["type"] == "lost"
    assert lost["seq"] + 1 == server.call("GET", "/events").lines[0]["seq"]


@pytest.mark.spec("VER-5", "GEN-1")
def test_version(server: Server) -> None:
    document = server.get("/version")
    assert (document["name"], document["spec"]) == ("ovms", ["0.1"])
    assert document["vmms"][0]["name"] == "qemu"
    assert document["vmms"][0]["accel"] in ("kvm", "tcg")


def test_instances_by_state(server: Server, running: str) -> None:
    listed = server.get("/instances?state=running")["instances"]
    assert running in [one["instance_id"] for one in listed]
    assert running not in [
        one["instance_id"] for one in server.get("/instances?state=stopped&state=error")["instances"]
    ]
    assert 'ovms_instances{state="running"}' in server.call("GET", "/metrics").body.decode()


@pytest.mark.spec("RUN-20", "RUN-19")
def test_kill_at_any_moment_loses_nothing(server: Server) -> None:
    """A few rounds; every VM that lives belongs to an instance afterwards, and can be removed."""
    import random

    chance = random.Random(1)
    for _ in range(6):
        ids = []
        for _ in range(2):
            threading.Thread(target=_quietly, args=(server, "/start", START), daemon=True).start()
        time.sleep(chance.random() * 0.15)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        server.start()
        deadline = time.monotonic() + 20
        while any(one["state"] == "starting" for one in server.get("/instances")["instances"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for one in server.get("/instances")["instances"]:
            ids.append(one["instance_id"])
            assert one["state"] in ("running", "error"), one
            if one["state"] == "running":
                assert Path(f"/proc/{one['pid']}").exists()
            post(server, "/remove", one["instance_id"], force=True)
    deadline = time.monotonic() + 5
    while holders := [pid for pid in qemu_children(server.root, timeout=0) if pid != server.process.pid]:
        assert time.monotonic() < deadline, holders
        time.sleep(0.05)
    assert [p.name for p in (server.root / "instances").iterdir() if not p.name.startswith(".")] == []


def _quietly(server: Server, path: str, body: Any) -> None:
    try:
        server.call("POST", path, body)
    except (OSError, http.client.HTTPException):
        return  # the server was killed meanwhile


@pytest.mark.spec("RUN-15", "DEV-4")
def test_what_is_injected_is_what_the_guest_reads(server: Server, shared: str) -> None:
    console = Console(server.root / "instances" / shared)
    console.wait_for("READY")
    assert console.ask("n", "REGION ") != 0
    data = base64.b64encode((0x12345678).to_bytes(4, "little")).decode()
    content = {"mmio": {"device": "mmio0", "offset": 0, "data": data}}
    assert server.post("/inject", {"instance_id": shared, "content": content}) == {"status": "ok"}
    assert console.ask("g", "GOT ") == 0x12345678
