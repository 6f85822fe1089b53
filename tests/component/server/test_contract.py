"""The OpenAPI document and the vectors against a living server: paths, methods, parameters, codes, bodies."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from support.schemas import SPEC
from support.server import Reply, Server

from ovms.runtime.server.app import QUERIES
from ovms.spec import api
from ovms.spec.states import CALLS, Call, State

DOCUMENT: Final = yaml.safe_load((SPEC / "api" / "ovms-runtime.openapi.yaml").read_text())
CASES: Final = json.loads((SPEC / "vectors" / "api" / "index.json").read_bytes())["cases"]
_REGISTRY: Final = Registry().with_resource("urn:openapi", DRAFT202012.create_resource(DOCUMENT))
LEAST: Final = {"memory": "32M", "accel": "tcg"}
NOBODY: Final = "7f0c3f6e-7d3b-4f1c-9a53-0d9c2f0e8a11"


def schema(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"urn:openapi#/components/schemas/{name}"}, registry=_REGISTRY)


def operations() -> list[Any]:
    return [
        pytest.param(method.upper(), path, operation, id=operation["operationId"])
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
    ]


def conforms(operation: dict[str, Any], reply: Reply) -> None:
    """Whether the document has such an answer: its status, its media type, its body, its code."""
    stated = operation["responses"].get(str(reply.status))
    assert stated is not None, (reply.status, reply.body)
    if "$ref" in stated:
        stated = DOCUMENT["components"]["responses"][stated["$ref"].rpartition("/")[2]]
    media_type = reply.headers["content-type"].replace("; charset=utf-8", "")
    assert media_type in stated["content"], media_type
    if media_type == api.PROBLEM:
        schema("Problem").validate(reply.json)
        assert reply.json["status"] == reply.status
        common = {"invalid-input", "not-found"}
        assert reply.json["code"] in {*operation["x-ovms-codes"], *common}, reply.json
        return
    reference = stated["content"][media_type]["schema"].get("$ref", "")
    if reference:
        for document in reply.lines if media_type == api.NDJSON else [reply.json]:
            schema(reference.rpartition("/")[2]).validate(document)


@pytest.mark.spec("RUN-5", "RUN-4", "ERR-1")
@pytest.mark.parametrize(("method", "path", "operation"), operations())
def test_each_path_has_its_methods_and_no_others(
    server: Server, method: str, path: str, operation: dict[str, Any]
) -> None:
    target = path.replace("{instance_id}", NOBODY)
    reply = server.call(method, target, {} if method == "POST" else None)
    assert reply.status != 405
    if (method, path) not in [
        ("GET", f"/{name}") for name in ("instances", "events", "healthz", "metrics", "version", "warm")
    ]:
        assert 400 <= reply.status < 500
    conforms(operation, reply)
    methods = {one.upper() for one in DOCUMENT["paths"][path]}
    for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"} - methods:
        reply = server.call(other, target)
        assert reply.status == 405, other
        assert reply.headers["allow"] == ", ".join(sorted(methods))
        if other != "HEAD":
            conforms(operation, reply)
            assert reply.json["code"] == "invalid-input"


@pytest.mark.parametrize(("method", "path", "operation"), operations())
def test_each_query_parameter_is_the_document_s(
    server: Server, method: str, path: str, operation: dict[str, Any]
) -> None:
    stated = {p["name"] for p in operation.get("parameters", []) if p["in"] == "query"}
    assert stated == QUERIES.get(operation["operationId"], frozenset())
    target = path.replace("{instance_id}", NOBODY)
    for name in stated:
        reply = server.call(method, f"{target}?{name}=%00nonsense")
        assert (reply.status, reply.json["code"]) == (400, "usage")
        conforms(operation, reply)
    if stated:
        assert server.call(method, f"{target}?novelty=1").json["code"] == "usage"


@pytest.mark.spec("RUN-2", "RUN-3", "RUN-9", "RUN-10", "ERR-2", "DOC-7")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_vectors(server: Server, request: pytest.FixtureRequest, case: dict[str, Any]) -> None:
    if case.get("given", {}).get("transport") == "tcp":
        pytest.skip("in test_life.py, over TCP")
    if case["expect"]["status"] == 200 and NOBODY in json.dumps(case["request"]):
        case = {**case, "given": {"state": "running", **case.get("given", {})}}
    fixture = "shared" if "regions" in case.get("given", {}) else "running"
    running = request.getfixturevalue(fixture) if case.get("given", {}).get("state") not in (None, "none") else ""
    call_vector(server, running, case)


def call_vector(server: Server, running: str, case: dict[str, Any]) -> None:
    given, request, expected = case.get("given", {}), case["request"], case["expect"]
    if "registry" in str(request.get("body")) and request["path"] == "/snapshot":
        request = {**request, "body": {**request["body"], "tag": "web:warm"}}
    if case["name"] == "start with every override":
        # forwarding for IPv6 needs passt; and no 255 CPUs in one test
        overrides = request["body"]["overrides"]
        overrides |= {
            "cpus": 2,
            "memory": "0.03125 GiB",
            "ports": [p for p in overrides["ports"] if "host_ip" not in p],
        }
    elif expected["status"] == 200 and request["path"] == "/start":
        request = json.loads(json.dumps(request))
        request["body"].setdefault("overrides", {})["accel"] = "tcg"
    headers = {"Content-Type": api.JSON, **request.get("headers", {})} if request["method"] == "POST" else {}
    state = given.get("state")
    if state == "paused":
        server.post("/pause", {"instance_id": running})
    elif state == "stopped":
        server.post("/stop", {"instance_id": running, "force": True})
        server.wait(running, "stopped")
    elif state == "error":
        import os
        import signal

        os.kill(server.get(f"/status/{running}")["pid"], signal.SIGKILL)
        server.wait(running, "error")
    first: dict[str, Any] | None = None
    if "idempotency_key" in given:
        headers["Idempotency-Key"] = given["idempotency_key"]
        first = server.post("/start", given["body"], headers=headers)
    there = state not in (None, "none", "removed")
    path = request["path"].replace(NOBODY, running) if there else request["path"]
    raw = request.get("raw_body")
    if isinstance(raw, dict):
        raw = raw["repeat"] * raw["times"]
    if raw is None and "body" in request:
        raw = json.dumps(request["body"])
        raw = raw.replace(NOBODY, running) if there else raw
    reply = server.call(request["method"], path, raw=None if raw is None else raw.encode(), headers=headers)
    if first is not None:
        server.call("POST", "/remove", {"instance_id": first["instance_id"], "force": True})
    assert reply.status == expected["status"], reply.body
    if "code" in expected:
        assert reply.json["code"] == expected["code"]
        assert reply.headers["content-type"] == api.PROBLEM
        schema("Problem").validate(reply.json)
    if "problems" in expected:
        assert [{"path": p["path"], "rule": p["rule"]} for p in reply.json["problems"]] == expected["problems"]
    if expected.get("schema") and reply.headers["content-type"] != api.NDJSON:
        schema(expected["schema"]).validate(reply.json)
    if reply.status == 200 and request["path"] == "/start":
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", reply.json["instance_id"])
        server.post("/remove", {"instance_id": reply.json["instance_id"], "force": True})


@pytest.mark.spec("STA-2", "STA-4", "STA-6")
@pytest.mark.parametrize("state", ["running", "paused", "stopping", "stopped", "error"])
def test_every_call_in_every_state(server: Server, state: str) -> None:
    """The table, except the calls that it allows and that have tests of their own."""
    import os
    import signal

    started = server.post("/start", {"manifest": "echo:1", "overrides": LEAST})
    instance_id = started["instance_id"]
    server.wait(instance_id, "running")
    if state == "paused":
        server.post("/pause", {"instance_id": instance_id})
    elif state == "stopping":
        # a guest that has not said READY does not know the button
        server.post("/pause", {"instance_id": instance_id})
        from ovms.runtime.root import Root
        from ovms.runtime.runtime import Runtime

        runtime = Runtime(Root(server.root))
        runtime.instances.ask_to_stop(runtime.instances.find(instance_id), 1e6)
    elif state == "stopped":
        server.post("/stop", {"instance_id": instance_id, "timeout_s": 0})
        server.wait(instance_id, "stopped")
    elif state == "error":
        os.kill(server.get(f"/status/{instance_id}")["pid"], signal.SIGKILL)
    server.wait(instance_id, state)
    calls = {
        Call.PAUSE: ("/pause", {}),
        Call.RESUME: ("/resume", {}),
        Call.SNAPSHOT: ("/snapshot", {}),
        Call.INJECT: ("/inject", {"content": {"mmio": {"device": "x", "offset": 0, "data": ""}}}),
        Call.REMOVE: ("/remove", {}),
    }
    for call, (path, body) in calls.items():
        if call in CALLS[State(state)]:
            continue
        reply = server.call("POST", path, {"instance_id": instance_id, **body})
        assert (reply.status, reply.json["code"]) == (409, "state-conflict"), call
        assert reply.json["state"] == state
        assert reply.json["allowed"] == [str(one) for one in CALLS[State(state)]]
        assert server.state(instance_id) == state
    server.post("/remove", {"instance_id": instance_id, "force": True})
    assert server.call("GET", f"/status/{instance_id}").json["code"] == "instance-not-found"
