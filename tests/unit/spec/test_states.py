"""The state machine: the specification's tables, the vectors and the code say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import rfc
from support.schemas import SPEC

from ovms.errors import StateConflict
from ovms.spec.states import CALLS, HAPPENINGS, Call, Happening, State, after, allowed

CASES = json.loads((SPEC / "vectors" / "api" / "states.json").read_bytes())["cases"]


@pytest.mark.spec("STA-1")
def test_the_states_are_those_of_the_specification() -> None:
    assert [row[0] for row in rfc.table(rfc.MAIN, "state", "meaning")] == list(State)


@pytest.mark.spec("STA-2")
def test_calls_are_those_of_the_specification() -> None:
    head, rows = next(t for t in rfc.tables(rfc.MAIN) if t[0][:2] == ("state", "stop"))
    assert list(head[1:]) == list(Call)
    for state, *cells in rows:
        for call, cell in zip(Call, cells, strict=True):
            expected = {"409": "no"}.get(cell, cell)
            found = CALLS[State(state)].get(call, "no")
            assert ("removed" if found is None else found) == expected, (state, call)


@pytest.mark.spec("STA-3")
def test_happenings_are_those_of_the_specification() -> None:
    head, rows = next(t for t in rfc.tables(rfc.MAIN) if t[0][:2] == ("state", "the guest's CPUs run"))
    assert list(head[1:]) == list(Happening)
    stated = {state: dict(zip(Happening, cells, strict=True)) for state, *cells in rows}
    for state in State:
        for happening in Happening:
            assert HAPPENINGS[state].get(happening, "") == stated.get(state, {}).get(happening, "")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    state = State(case["state"])
    if "happening" in case:
        assert HAPPENINGS[state][Happening(case["happening"])] == case["expect"]["state"]
        return
    call = Call.REMOVE_FORCE if case["force"] else Call(case["call"])
    if case["expect"]["status"] == 200:
        assert after(state, call, "web") == case["expect"]["state"]
        return
    with pytest.raises(StateConflict) as info:
        after(state, call, "web")
    assert info.value.code == case["expect"]["code"]
    assert info.value.context["state"] == case["expect"]["state"]
    assert info.value.context["allowed"] == allowed(state)


def test_the_vectors_are_all_cells() -> None:
    calls = {(case["state"], case["call"], case["force"]) for case in CASES if "call" in case}
    assert len(calls) == len(State) * len(Call)
    assert len([case for case in CASES if "happening" in case]) == sum(len(row) for row in HAPPENINGS.values())


def test_what_is_alive() -> None:
    assert [state for state in State if not state.alive] == [State.STOPPED, State.ERROR]
