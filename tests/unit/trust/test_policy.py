"""The policy file: read strictly, and as its schema says."""

from __future__ import annotations

import copy
import json
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schemas import SPEC, validator

from ovms.errors import InputError, JsonInvalid
from ovms.trust import keys, policy
from ovms.trust.policy import Kind, Requirement, canonical

SCHEMA: Final = json.loads((SPEC / "schemas" / "policy.v1.json").read_bytes())
PEM: Final = keys.generate().public.pem.decode()
FULL: Final[dict[str, Any]] = {
    "version": 1,
    "enforced": True,
    "registries": ["registry.example", "other.example:5000/vms"],
    "signers": {
        "a": {"keyPath": "a.pub"},
        "b": {"key": PEM},
        "c": {"identity": "x@example.com", "issuer": "https://issuer.example", "trustRoot": "root.json"},
    },
    "default": {"type": "reject"},
    "scopes": {
        "local": {"type": "accept"},
        "oci-archive": {"type": "signed", "allOf": ["a", "b"]},
        "registry.example": {"type": "accept", "ramSnapshots": {"type": "signed", "anyOf": ["a"]}, "maxAge": "12h"},
        "registry.example/team": {
            "type": "signed",
            "atLeast": 2,
            "of": ["a", "b", "c"],
            "attestations": [{"predicateType": "https://slsa.dev/provenance/", "anyOf": ["a", "b"]}],
        },
    },
}
#: What the schema can't say.
BEYOND: Final = ("which is not in $.signers", "must be from 1 to", "written in two ways", "is no HOST")
VALUES: Final = st.sampled_from(
    [None, True, 0, 1, 2, 65, 1.5, "", "x", "a\n", "accept", "signed", "90d", "0d", "1m", "x" * 5000, [], ["a"], ["a", "a"],
     ["nobody"], ["a"] * 70, [1], {}, {"type": "accept"}, {"type": "signed"}, {"type": "signed", "anyOf": ["a"]},
     {"type": "reject", "anyOf": ["a"]}, {"type": "signed", "of": ["a"]}, {"keyPath": "x"}, {"key": ""},
     {"key": "x", "keyPath": "y"}, {"identity": "x"}, ["registry.example"], ["Registry.Example"], ["local"], "https://x/",
     "https://sigstore.dev/cosign/sign/v1", [{"predicateType": "https://x", "anyOf": ["a"]}], [{"predicateType": "x", "of": ["a"]}]]
)  # fmt: skip
KEYS: Final = st.sampled_from(
    ["x", "type", "anyOf", "allOf", "atLeast", "of", "ramSnapshots", "maxAge", "attestations", "predicateType", "key", "issuer", "local", "host.example/X",
     "host.example/x", "oci", "a b", "enforced", ""]
)  # fmt: skip


def read(document: Any) -> policy.Policy:
    return policy.parse(json.dumps(document).encode(), "policy.json")


def problems(document: Any) -> list[str]:
    try:
        read(document)
    except InputError as exc:
        return [f"{p['path']} {p['message']}" for p in exc.context["problems"]]
    return []


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    document = copy.deepcopy(FULL)
    for _ in range(draw(st.integers(1, 3))):
        item: Any = document
        while isinstance(item, (dict, list)) and item:
            key = draw(st.sampled_from(sorted(item) if isinstance(item, dict) else list(range(len(item)))))
            if isinstance(item[key], (dict, list)) and draw(st.booleans()):
                item = item[key]
                continue
            how = draw(st.integers(0, 2))
            if how == 0:
                del item[key]
            elif how == 1 and isinstance(item, dict):
                item[draw(KEYS)] = copy.deepcopy(draw(VALUES))
            else:
                item[key] = copy.deepcopy(draw(VALUES))
            break
    return document


@given(mutated())
def test_the_schema_and_the_reader_say_the_same(document: Any) -> None:
    found = problems(document)
    if validator("policy").is_valid(document):
        assert all(any(text in problem for text in BEYOND) for problem in found), found
    else:
        assert found, [error.message for error in validator("policy").iter_errors(document)][:3]


def test_the_schema_is_sound_and_has_our_limits() -> None:
    assert SCHEMA["$id"] == "urn:ovms:schema:policy.v1"
    assert "(?" not in json.dumps(SCHEMA)
    for example in [*SCHEMA["examples"], FULL]:
        validator("policy").validate(example)
        assert problems(example) == []
    properties, defs = SCHEMA["properties"], SCHEMA["$defs"]
    assert properties["signers"]["maxProperties"] == policy.SIGNERS_MAX
    assert properties["scopes"]["maxProperties"] == properties["registries"]["maxItems"] == policy.SCOPES_MAX
    assert defs["names"]["maxItems"] == defs["requirement"]["properties"]["atLeast"]["maximum"] == policy.NEEDED_MAX
    assert defs["signer"]["properties"]["key"]["maxLength"] == keys.KEY_MAX
    assert defs["requirement"]["properties"]["type"]["enum"] == list(Kind)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "$.version must be from 1 to 1, not 2"),
        ({"defaults": {}}, "$ has the key 'defaults', which is not known"),
        ({"default": None}, "$.default must be an object"),
        ({"scopes": {"registry.example:x": {"type": "accept"}}}, "'registry.example:x' is no HOST[:PORT][/PATH]"),
        ({"scopes": {"team/web": {"type": "accept"}}}, "'team/web' is no HOST"),
        ({"scopes": {"a.example/x:1": {"type": "accept"}}}, "'a.example/x:1' is no HOST"),
        ({"scopes": {"A.example": {"type": "accept"}, "a.example:443": {"type": "reject"}}}, "written in two ways"),
        ({"scopes": {"local": {"type": "signed"}}}, "'signed' needs one of"),
        ({"scopes": {"local": {"type": "signed", "anyOf": ["x"]}}}, "names the signer 'x', which is not in $.signers"),
        ({"scopes": {"local": {"type": "signed", "anyOf": []}}}, "must name a signer"),
        ({"scopes": {"local": {"type": "signed", "allOf": ["a", "a"]}}}, "names a signer twice"),
        ({"scopes": {"local": {"type": "signed", "atLeast": 3, "of": ["a", "b"]}}}, "must be from 1 to 2"),
        ({"scopes": {"local": {"type": "accept", "anyOf": ["a"]}}}, "goes with the type 'signed'"),
        ({"scopes": {"local": {"type": "accept", "maxAge": "3w"}}}, "such as 12h or 90d"),
        ({"scopes": {"local": {"type": "accept", "ramSnapshots": {"type": "signed"}}}}, "ramSnapshots.type"),
        ({"signers": {"a": {}}}, "one of 'key', 'keyPath' and 'identity'"),
        ({"signers": {"a": {"keyPath": "x", "issuer": "y"}}}, "goes with 'identity'"),
        ({"registries": ["web"]}, "$.registries[0] is no HOST"),
    ],
)
def test_what_is_refused(change: dict[str, Any], told: str) -> None:
    assert told in "\n".join(problems({**FULL, **change}))
    with pytest.raises(InputError, match="is no policy"):
        read({**FULL, **change})


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"version": 1, "version": 1}', b"[" * 20 + b"]" * 20, b" " * (policy.SIZE_MAX + 1), b"\xff"]
)
def test_what_is_no_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(JsonInvalid):
        policy.parse(data, "policy.json")


@pytest.mark.parametrize(
    ("place", "scope"),
    [
        ("registry.example/team/web", "registry.example/team"),
        ("registry.example/team", "registry.example/team"),
        ("REGISTRY.example:443/team/web", "registry.example/team"),
        ("registry.example:0443/team/web", "registry.example/team"),
        ("registry.example/teams", "registry.example"),
        ("registry.example/other/team", "registry.example"),
        ("registry.example:5000/team/web", "default"),
        ("evil.example/registry.example/team", "default"),
        ("registry.example.evil.example/team", "default"),
        ("local", "local"),
        ("oci", "default"),
        ("oci-archive", "oci-archive"),
        ("", "default"),
    ],
)
def test_the_longest_scope_counts(place: str, scope: str) -> None:
    assert read(FULL).rule(place).scope == scope


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("registry.example/x", True),
        ("Registry.Example/x", True),
        ("other.example:5000/vms/x", True),
        ("other.example:5000/vmsx", False),
        ("other.example/vms/x", False),
        ("registry.example.evil/x", False),
        ("", False),
        ("local", True),
        ("oci", True),
    ],
)
def test_allowed_registries(place: str, allowed: bool) -> None:
    assert read(FULL).allows_registry(place) is allowed
    assert read({**FULL, "registries": []}).allows_registry("registry.example/x") is False
    assert read({k: v for k, v in FULL.items() if k != "registries"}).allows_registry(place)


def test_hosts_are_compared_as_what_they_name() -> None:
    assert canonical("[0:0::1]:5000/x") == canonical("[::1]:05000/x") == "[::1]:5000/x"
    assert canonical("localhost:443/x") == "localhost/x"


def test_requirements_in_words() -> None:
    rules = read(FULL).scopes
    assert str(rules["oci-archive"].requirement) == "signed by all of a, b"
    assert str(rules["registry.example/team"].requirement) == "signed by 2 of a, b, c"
    assert str(Requirement(Kind.SIGNED, ("a",), 1)) == "signed by a"
    assert str(Requirement(Kind.SIGNED, ("a", "b"), 1)) == "signed by one of a, b"
    assert rules["registry.example"].age == "12 hours"
