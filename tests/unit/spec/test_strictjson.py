"""JSON from strangers."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import JsonInvalid
from ovms.spec import limits, strictjson

MAX = 1 << 20

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(st.characters(codec="utf-8")), v), max_leaves=20
)


def parse(data: bytes) -> Any:
    return strictjson.parse(data, "the thing", max_size=MAX)


@given(VALUES)
def test_what_we_write_we_read(value: Any) -> None:
    data = strictjson.canonical(value)
    assert parse(data) == value
    assert strictjson.canonical(parse(data)) == data
    assert parse(json.dumps(value).encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0d8f1e9-.tn ', max_size=80).map(str.encode))
def test_nothing_but_json_invalid_is_raised(data: bytes) -> None:
    message = None
    try:
        strictjson.canonical(parse(data))
    except JsonInvalid as exc:
        message = exc.message
    assert message is None or message.startswith("the thing")


@pytest.mark.spec("DOC-1", "DOC-2", "DOC-3")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b"{'a': 1}", "line 1, column 2"),
        (b"[1,]", "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'"\xff"', "is not UTF-8, at offset 1"),
        (b'"\xed\xa0\x80"', "is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "key twice in one object: 'a'"),
        (b'{"x": [{"a": 1, "\\u0061": 3}]}', "key twice"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e999", "number that is too"),
        (b"[-1e999]", "number that is too"),
        (b"1" * 5000, "number that is too"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\uDC00x": 1}', "surrogate"),
        (b'"\x01"', "is not JSON"),
        (b"[" * 33 + b"]" * 33, "deeper than 32 levels, at offset 32"),
        (b'{"a":' * 100_000, "deeper"),
        (b"]" * 1000 + b"[" * 1000, "is not JSON"),
    ],
)
def test_refused(data: bytes, words: str) -> None:
    with pytest.raises(JsonInvalid, match=words) as info:
        parse(data)
    assert len(info.value.message) < 300


def test_a_long_key_does_not_make_a_long_message() -> None:
    key = json.dumps("k" * 10_000).encode()
    with pytest.raises(JsonInvalid) as info:
        parse(b"{" + key + b":1," + key + b":2}")
    assert len(info.value.message) < 300


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["', "[" * 44),
        (b'["\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", {"\\\\": "]"}]', ['"' + "[" * 37, {"\\": "]"}]),
        (b" [1e2, -0, 1.5]\n", [100.0, 0, 1.5]),
        (b"[" * 32 + b"]" * 32, None),
        (b"[" + b",".join([b"[]"] * 1000) + b"]", [[]] * 1000),
    ],
)
def test_accepted(data: bytes, value: Any) -> None:
    found = parse(data)
    assert value is None or found == value


@pytest.mark.spec("DOC-5")
def test_the_size_is_limited() -> None:
    data = b'"' + b"x" * 98 + b'"'
    assert strictjson.parse(data, "x", max_size=100)
    with pytest.raises(JsonInvalid, match="has 100 bytes; at most 99"):
        strictjson.parse(data, "x", max_size=99)


@pytest.mark.spec("DOC-4")
@pytest.mark.parametrize(
    "data",
    [
        b'"' + b'\\"' * 500_000,  # a string without an end, in which each escape looks like a beginning
        b'"' * 1_000_000,
        b'"\\' * 300_000,
        b"\\" * 1_000_000,
        b'"' + b"\\" * 999_999,
    ],
)
def test_a_hostile_document_takes_no_time(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(JsonInvalid):
        parse(data)
    assert time.process_time() - begin < 2


@given(VALUES, st.integers(1, 5))
def test_the_depth_is_counted_as_it_is(value: Any, limit: int) -> None:
    def depth(item: Any) -> int:
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        return 0 if children is None else 1 + max(map(depth, children), default=0)

    data = json.dumps(value).encode()
    if depth(value) <= limit:
        strictjson.parse(data, "x", max_size=MAX, max_depth=limit)
    else:
        with pytest.raises(JsonInvalid, match="deeper"):
            strictjson.parse(data, "x", max_size=MAX, max_depth=limit)


def test_canonical_bytes() -> None:
    assert strictjson.canonical({"b": ["é"], "a": 1}) == '{\n  "b": [\n    "é"\n  ],\n  "a": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="float"):
        strictjson.canonical(float("nan"))


@pytest.mark.spec("DOC-4")
def test_the_limits_are_what_the_interpreter_stands() -> None:
    assert limits.JSON_DEPTH_MAX <= 100


@pytest.mark.spec("DOC-3")
@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("digits", [308, 309, 400, 5000])
def test_an_integer_beyond_double_precision(sign: str, digits: int) -> None:
    """With a fraction or without: it is the same number."""
    for text in (f"{sign}1{'0' * digits}", f"{sign}1{'0' * digits}.0"):
        if digits == 308:
            assert float(strictjson.parse(text.encode(), "x", max_size=9999)) == float(text)
        else:
            with pytest.raises(JsonInvalid, match="too large") as info:
                strictjson.parse(text.encode(), "x", max_size=9999)
            assert info.value.context["rule"] == "DOC-3"
