"""The runtime contract: specification, OpenAPI document, vectors and code say the same."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from support import rfc
from support.schemas import SPEC, Validator

from ovms import errors
from ovms.errors import InputError, JsonInvalid, OvmsError, StateConflict
from ovms.spec import api, limits
from ovms.spec.states import State

DOCUMENT: Final = yaml.safe_load((SPEC / "api" / "ovms-runtime.openapi.yaml").read_text())
SCHEMAS: Final = DOCUMENT["components"]["schemas"]
INSTANCE: Final = "7f0c3f6e-7d3b-4f1c-9a53-0d9c2f0e8a11"
CASES: Final = json.loads((SPEC / "vectors" / "api" / "index.json").read_bytes())["cases"]
BY_PATH: Final = {(operation.method, operation.path): operation for operation in api.OPERATIONS}
#: Of any request with a body: one that is too large or of another type (RUN-2).
ANY_BODY: Final = {413, 415}

_RESOURCE: Final = DRAFT202012.create_resource(DOCUMENT)
_REGISTRY: Final = Registry().with_resource("urn:openapi", _RESOURCE)


def schema(name: str) -> Any:
    return Validator({"$ref": f"urn:openapi#/components/schemas/{name}"}, registry=_REGISTRY)


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    assert value["$ref"].startswith("#/")
    found: Any = DOCUMENT
    for key in value["$ref"][2:].split("/"):
        found = found[key]
    assert isinstance(found, dict)
    return found


# --- the OpenAPI document --------------------------------------------------------------------------------------------


def test_the_document_is_openapi() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    for name, value in SCHEMAS.items():
        Draft202012Validator.check_schema(value)
        assert "description" in value or "type" in value or "allOf" in value, name

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                resolved(value)
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(DOCUMENT)
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))
    for _, path, operation in operations():
        declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert declared == ({"instance_id"} if "{instance_id}" in path else set())
        assert all(p.get("required") for p in operation.get("parameters", []) if p["in"] == "path")


def test_every_example_is_valid() -> None:
    seen = 0
    for _, path, operation in operations():
        contents = [operation["requestBody"]["content"]] if "requestBody" in operation else []
        contents.extend(resolved(response)["content"] for response in operation["responses"].values())
        for content in contents:
            for media in content.values():
                assert media["examples"], path
                for example in media["examples"].values():
                    validator = Draft202012Validator(
                        media["schema"]
                        if "$ref" not in media["schema"]
                        else {"$ref": "urn:openapi" + media["schema"]["$ref"]},
                        registry=_REGISTRY,
                    )
                    validator.validate(example["value"])
                    seen += 1
    assert seen > 50


def test_the_operations_are_those_of_the_specification() -> None:
    stated = [tuple(row[0].split(" ")) for row in rfc.table(rfc.MAIN, "call", "body", "answer")]
    assert sorted(stated) == sorted((method, path) for method, path, _ in operations()) == sorted(BY_PATH)


@pytest.mark.parametrize("operation", api.OPERATIONS, ids=lambda operation: operation.name)
def test_each_operation_is_the_code_s(operation: api.Operation) -> None:
    stated = DOCUMENT["paths"][operation.path][operation.method.lower()]
    assert stated["operationId"] == operation.name
    if operation.request is None:
        assert "requestBody" not in stated
    else:
        content = stated["requestBody"]["content"]
        assert content[api.JSON]["schema"] == {"$ref": f"#/components/schemas/{operation.request}"}
        assert operation.request in api.REQUESTS
    answer = stated["responses"]["200"]["content"]
    assert list(answer) == [operation.media_type]
    if operation.response is not None:
        assert answer[operation.media_type]["schema"] == {"$ref": f"#/components/schemas/{operation.response}"}
    assert stated["x-ovms-codes"] == list(operation.codes)
    statuses = {api.CODES[code][0] for code in operation.codes} | {200, 401, 405}
    assert {int(status) for status in stated["responses"]} == statuses | (ANY_BODY if operation.request else set())


def test_the_draft_s_bodies_still_fit() -> None:
    """Paths, bodies and answers of the public draft."""
    schema("StartRequest").validate({"manifest": "example/ubuntu-base:24.04", "overrides": {"anything": {"at": "all"}}})
    schema("StopRequest").validate({"instance_id": "uuid"})
    schema("SnapshotRequest").validate({"instance_id": "uuid", "tag": "fastboot"})
    schema("SnapshotResult").validate({"snapshot_ref": "sha256:" + "0" * 64})
    schema("OperationResult").validate({"status": "stopping", "message": "soon"})
    for state in ("starting", "running", "stopping", "stopped", "error"):
        schema("Instance").validate(
            {"instance_id": "uuid", "state": state, "pid": 1, "uptime_ms": 0, "metrics": {"x": [1]}}
        )
    schema("StartResult").validate({"instance_id": "uuid", "state": "starting", "status": "starting"})


def test_states_are_the_code_s() -> None:
    assert SCHEMAS["State"]["enum"] == list(State)


# --- errors ----------------------------------------------------------------------------------------------------------


def all_codes() -> set[str]:
    classes: list[type[OvmsError]] = [OvmsError]
    for kind in classes:
        classes.extend(kind.__subclasses__())
    return {code for kind in classes for code in (kind.code, *kind.more_codes)}


@pytest.mark.spec("ERR-5")
def test_the_codes_are_those_of_the_specification() -> None:
    stated = {
        code: (int(status), meaning) for code, status, meaning in rfc.table(rfc.MAIN, "code", "status", "meaning")
    }
    assert stated == dict(api.CODES)
    assert set(stated) == all_codes()
    assert SCHEMAS["Problem"]["properties"]["code"]["anyOf"][0]["enum"] == list(api.CODES)


@pytest.mark.spec("ERR-1", "ERR-2", "STA-4")
def test_a_problem_document() -> None:
    error = StateConflict(
        "web is stopped", hint="start it", instance="web", state="stopped", allowed=["remove"], x=None
    )
    document = api.problem(error)
    schema("Problem").validate(document)
    assert document == {
        "type": "urn:ovms:problem:state-conflict",
        "title": "the instance's state does not allow the call",
        "status": 409,
        "detail": "web is stopped",
        "code": "state-conflict",
        "hint": "start it",
        "instance_name": "web",
        "state": "stopped",
        "allowed": ["remove"],
    }
    assert api.problem(InputError("too large"), status=413)["status"] == 413


def test_context_does_not_hide_what_the_document_says() -> None:
    document = api.problem(InputError("bad", type="x", status=1, detail="y", title="z"))
    assert (document["status"], document["detail"], document["code"]) == (400, "bad", "invalid-input")


# --- requests --------------------------------------------------------------------------------------------------------


def body_of(case: dict[str, Any]) -> bytes | None:
    request = case["request"]
    raw = request.get("raw_body")
    if isinstance(raw, dict):
        raw = raw["repeat"] * raw["times"]
    if raw is not None:
        return str(raw).encode()
    return json.dumps(request["body"]).encode() if "body" in request else None


_OF_BODIES: Final = runpy.run_path(str(SPEC.parent / "scripts" / "spec_coverage.py"))["judged_by_body"]
#: Statuses that a requirement names beside a code's own (ERR-5).
OTHER_STATUSES: Final = {"invalid-input": {405, 413, 415}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_answers(case: dict[str, Any]) -> None:
    """What a server answers: of the operation's own, and with the code's status."""
    expected = case["expect"]
    if "schema" in expected:
        assert expected["schema"] in SCHEMAS
    if "code" in expected:
        own, _ = api.CODES[expected["code"]]
        assert expected["status"] in {own} | OTHER_STATUSES.get(expected["code"], set())
    operation = BY_PATH.get((case["request"]["method"], case["request"]["path"].replace(INSTANCE, "{instance_id}")))
    assert (operation is None) == (expected["status"] == 405 or case["request"]["path"] == "/nothing")
    if operation is not None:
        stated = DOCUMENT["paths"][operation.path][operation.method.lower()]["responses"]
        assert str(expected["status"]) in stated
    if operation is not None and expected["status"] == 200 and operation.response is not None:
        assert expected.get("schema", operation.response) == operation.response


@pytest.mark.spec("ERR-5")
@pytest.mark.parametrize("case", [c for c in CASES if _OF_BODIES(c)], ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    """What is expected of a body alone: ``spec_coverage`` counts these, and not the others, as vectors that run."""
    expected = case["expect"]
    operation = BY_PATH[case["request"]["method"], case["request"]["path"]]
    body = body_of(case)
    assert operation.request is not None
    assert body is not None
    error = None
    try:
        request = api.parse_body(operation, body)
        if isinstance(request, api.InjectRequest) and "regions" in case.get("given", {}):
            request.check_bounds(case["given"]["regions"])
    except OvmsError as exc:
        error = exc
    assert (error is None) == (expected["status"] == 200), error
    if error is None:
        schema(operation.request).validate(json.loads(body))
        return
    assert (error.code, api.problem(error)["status"]) == (expected["code"], expected["status"])
    schema("Problem").validate(api.problem(error))
    if "problems" in expected:
        assert [{"path": p["path"], "rule": p["rule"]} for p in error.context["problems"]] == expected["problems"]
    if error.code != "json-invalid":
        assert schema(operation.request).is_valid(json.loads(body)) == bool(case.get("beyond_schema"))


def test_the_vectors_name_operations() -> None:
    reached = {(case["request"]["method"], case["request"]["path"]) for case in CASES}
    for operation in api.OPERATIONS:
        path = operation.path.replace("{instance_id}", INSTANCE)
        assert (operation.method, path) in reached or operation.name in ("resume", "metrics"), operation.path


@pytest.mark.spec("LIM-1", "RUN-21")
@pytest.mark.parametrize(("size", "valid"), [(0, True), (limits.WARM_MAX, True), (limits.WARM_MAX + 1, False)])
def test_the_size_of_a_warm_pool(size: int, valid: bool) -> None:
    document = {"manifest": "web", "size": size}
    assert schema("WarmRequest").is_valid(document) == valid
    if valid:
        assert api.WarmRequest.from_json(document) == api.WarmRequest("web", size)
    else:
        with pytest.raises(InputError):
            api.WarmRequest.from_json(document)


@pytest.mark.spec("LIM-1", "RUN-3")
def test_as_many_ports_as_allowed() -> None:
    for count, valid in ((limits.PORTS_MAX, True), (limits.PORTS_MAX + 1, False)):
        document = {"manifest": "web", "overrides": {"ports": [{"guest_port": 80}] * count}}
        assert schema("StartRequest").is_valid(document) == valid
        if valid:
            api.StartRequest.from_json(document)
        else:
            with pytest.raises(InputError):
                api.StartRequest.from_json(document)


@pytest.mark.spec("RUN-2", "LIM-1")
def test_a_body_that_is_too_large() -> None:
    operation = BY_PATH["POST", "/stop"]
    body = b'{"instance_id": "web"}'
    api.parse_body(operation, body.ljust(limits.API_BODY_MAX))
    with pytest.raises(JsonInvalid) as info:
        api.parse_body(operation, body.ljust(limits.API_BODY_MAX + 1))
    assert info.value.context["rule"] == "DOC-5"


@pytest.mark.spec("ERR-2")
def test_an_error_lists_so_many_problems_and_no_more() -> None:
    with pytest.raises(InputError) as info:
        api.StartRequest.from_json({"overrides": {"ports": [{}] * limits.PORTS_MAX}})
    assert len(info.value.context["problems"]) == limits.PROBLEMS_MAX
    schema("Problem").validate(api.problem(info.value))


def test_memory() -> None:
    def memory(value: Any) -> int | None:
        return api.StartRequest.from_json({"manifest": "web", "overrides": {"memory": value}}).overrides.memory

    assert [memory(text) for text in ("512m", "0.5 GiB", "524288KB", 512 << 20)] == [512 << 20] * 4
    assert memory("1t") == limits.RAM_MAX


@pytest.mark.spec("RUN-9")
@pytest.mark.parametrize(
    "text",
    [
        " 512M",
        "512M ",
        "524288\u212a",
        "512\u00a0M",
        "512\tM",
        "512  M",
        "0" * 19 + "512M",
        "0." + "5" * 21 + "G",
        "\u0665M",
    ],
)
def test_what_is_no_size_for_the_schema_is_none_for_the_code(text: str) -> None:
    document = {"manifest": "web", "overrides": {"memory": text}}
    assert not schema("StartRequest").is_valid(document)
    with pytest.raises(InputError):
        api.StartRequest.from_json(document)


@pytest.mark.spec("RUN-15")
@pytest.mark.parametrize("data", ["YR==", "YWJ=", "YQ", "YQ=", "Y Q=", "YQ==\n", "_-==", "===="])
def test_what_is_no_base64(data: str) -> None:
    document = {"instance_id": "web", "content": {"mmio": {"device": "a", "offset": 0, "data": data}}}
    assert not schema("InjectRequest").is_valid(document)
    with pytest.raises(InputError):
        api.InjectRequest.from_json(document)


def test_defaults() -> None:
    assert api.StartRequest.from_json({"manifest": "web"}).overrides == api.Overrides()
    stop = api.StopRequest.from_json({"instance_id": "web"})
    assert (stop.timeout_s, stop.force) == (limits.STOP_TIMEOUT_DEFAULT, False)
    assert api.StopRequest.from_json({"instance_id": "web", "timeout_s": 0}).timeout_s == 0


JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["web", "512M", "a/"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
    max_leaves=6,
)
FIELDS: Final = st.fixed_dictionaries(
    {},
    optional={
        "manifest": JSON,
        "instance_id": JSON,
        "timeout_s": JSON,
        "force": JSON,
        "tag": JSON,
        "overrides": JSON
        | st.dictionaries(st.sampled_from([*api.Overrides.__dataclass_fields__, "x"]), JSON, max_size=4)
        | st.fixed_dictionaries({"ports": st.lists(st.dictionaries(st.sampled_from(["guest_port", "host_ip"]), JSON))}),
        "content": JSON
        | st.fixed_dictionaries({"mmio": st.dictionaries(st.sampled_from(["device", "offset", "data"]), JSON)}),
    },
)


@pytest.mark.spec("RUN-3")
@given(FIELDS | JSON, st.sampled_from(sorted(api.REQUESTS)))
def test_anything_is_a_request_or_an_error(document: Any, name: str) -> None:
    try:
        api.REQUESTS[name].from_json(document)
    except OvmsError as exc:
        assert exc.code in ("invalid-input", "unsupported")  # noqa: PT017 - most documents are one of the two
        assert exc.context["problems"]  # noqa: PT017
        schema("Problem").validate(api.problem(exc))
    else:
        schema(name).validate(document)


def test_every_error_has_a_problem_document() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, OvmsError):
            error = kind("x", problems=[]) if kind is errors.ManifestInvalid else kind("x")
            schema("Problem").validate(api.problem(error))
