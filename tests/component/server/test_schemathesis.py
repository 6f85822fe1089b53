"""Requests that schemathesis makes of the OpenAPI document, sound ones and broken ones, against a living server.

Nothing that is made up leads anywhere: whatever names an artifact or a registry is replaced by what the store of the test has.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.schemas import SPEC
from support.server import Server

from ovms.spec import api, limits

DOCUMENT: Final = schemathesis.openapi.from_path(str(SPEC / "api" / "ovms-runtime.openapi.yaml"))
OPERATIONS: Final = {
    f"{one.method.upper()} {one.path}": one for one in (DOCUMENT.find_operation_by_id(o.name) for o in api.OPERATIONS)
}
CHECKS: Final = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
#: Of what takes nothing there is nothing to get wrong.
ALL: Final = [
    pytest.param(name, mode, id=f"{name} {mode.value}")
    for name, one in OPERATIONS.items()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if mode is GenerationMode.POSITIVE or one.body or one.query or one.path_parameters
]
#: Of a 5xx: reasons of the host that the tests run on, such as a KVM that does not run.
HOST_CODES: Final = {"accel-unavailable"}
BASE: Final = "http://unix"
#: Of the store, of nobody, of no kind.
MANIFESTS: Final = ("echo:1", "shared:1", "nowhere:1", "oci:/nowhere", "", "../../etc", "a b")
NOBODY: Final = "7f0c3f6e-7d3b-4f1c-9a53-0d9c2f0e8a11"


def cases(name: str, mode: GenerationMode) -> st.SearchStrategy[Case[Any]]:
    strategy: st.SearchStrategy[Case[Any]] = OPERATIONS[name].as_strategy(generation_mode=mode)
    return strategy


def send(server: Server, case: Case[Any]) -> Response:
    kwargs = case.as_transport_kwargs(base_url=BASE)
    request = requests.Request(**kwargs).prepare()
    body = request.body.encode() if isinstance(request.body, str) else request.body
    assert body is None or isinstance(body, bytes)
    headers = {k: v if isinstance(v, str) else v.decode("latin-1") for k, v in request.headers.items()}
    reply = server.call(str(request.method), request.path_url, raw=body, headers=headers)
    answered = {key: [value] for key, value in reply.headers.items()}
    return Response(reply.status, answered, reply.body, request, 0.0, verify=False)


def harmless(case: Case[Any], instance_id: str, pick: int) -> bool:
    """Lets a case ask for what is here, and for no stream without an end. Returns whether it had to be changed for that."""
    before = copy.deepcopy((case.body, case.query, case.path_parameters))
    body = case.body
    if isinstance(body, dict):
        for key, values in (("manifest", MANIFESTS), ("tag", ("made:1", "", "A/B", "x@y")), ("size", (0,))):
            if isinstance(body.get(key), int if key == "size" else str):
                body[key] = values[pick % len(values)]
        if isinstance(body.get("instance_id"), str):
            body["instance_id"] = (instance_id, body["instance_id"], NOBODY)[pick % 3]
    case.query.pop("follow", None)
    if "instance_id" in case.path_parameters and pick % 2:
        case.path_parameters["instance_id"] = instance_id
    return (case.body, case.query, case.path_parameters) != before


def sound(server: Server, case: Case[Any], *more: Any) -> Response:
    response = send(server, case)
    case.validate_response(response, checks=[*CHECKS, *more])
    assert response.status_code < 500 or response.json()["code"] in HOST_CODES, (case, response.content)
    if case.operation.path == "/start" and response.status_code == 200:
        instance_id = response.json()["instance_id"]
        server.wait(instance_id, "running", "error", "stopped")
        server.post("/remove", {"instance_id": instance_id, "force": True})
    return response


def fuzz(server: Server, name: str, mode: GenerationMode, instance_id: str, examples: int) -> set[int]:
    """Sends so many cases of an operation; returns the statuses of the answers."""
    seen: set[int] = set()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases(name, mode), st.integers(0, 20))
    def run(case: Case[Any], pick: int) -> None:
        changed = harmless(case, instance_id, pick)
        seen.add(sound(server, case, *(() if changed else (negative_data_rejection,))).status_code)

    run()
    assert server.get("/healthz") == {"status": "ok"}
    return seen


@pytest.mark.spec("RUN-3", "RUN-4", "ERR-5")
@pytest.mark.parametrize("name", ["POST /stop", "GET /logs/{instance_id}"])
def test_some_requests_of_the_document(server: Server, name: str) -> None:
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        assert fuzz(server, name, mode, NOBODY, 8) & {200, 400, 404}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.spec("RUN-2", "RUN-3", "RUN-4", "ERR-1", "ERR-5")
@pytest.mark.parametrize(("name", "mode"), ALL)
def test_requests_of_the_document(server: Server, shared: str, name: str, mode: GenerationMode) -> None:
    before = server.rss()
    assert fuzz(server, name, mode, shared, 100)
    assert server.rss() - before < 48 * limits.MIB
