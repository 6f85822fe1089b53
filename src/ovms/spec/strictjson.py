"""JSON from strangers: bounded size and depth, no duplicate keys, no NaN, valid UTF-8."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

from ovms.errors import JsonInvalid
from ovms.lazy import regex
from ovms.spec import limits

# Strings are skipped as a whole, so that brackets inside them do not count. One without an end is skipped too: looked
# through again from every quotation mark in it, it would cost the square of its length.
_TOKENS: Final = regex(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse(data: bytes, what: str, *, max_size: int, max_depth: int = limits.JSON_DEPTH_MAX) -> Any:
    """Parses *data*; *what* names the document in errors.

    Raises:
        JsonInvalid: not JSON, too large, too deep, a key twice in one object, NaN or Infinity, a number that
            Python cannot hold, a lone surrogate.
    """
    if len(data) > max_size:
        raise JsonInvalid(f"{what} has {len(data)} bytes; at most {max_size} are allowed", limit=max_size, rule="DOC-5")
    _check_depth(data, what, max_depth)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise JsonInvalid(f"{what} is not UTF-8, at offset {exc.start}", offset=exc.start, rule="DOC-1") from None
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        answer = dict(pairs)
        if len(answer) != len(pairs):
            seen: set[str] = set()
            duplicates.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return answer

    def constant(name: str) -> NoReturn:
        raise JsonInvalid(f"{what} holds {name}, which JSON does not know", rule="DOC-3")

    def real(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):  # such as 1e999, which we could not write again
            raise JsonInvalid(f"{what} holds a number that is too large", rule="DOC-3")
        return value

    def whole(digits: str) -> int:
        if beyond_double(digits):
            raise JsonInvalid(f"{what} holds a number that is too large", rule="DOC-3")
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=real, parse_int=whole)
    except json.JSONDecodeError as exc:
        raise JsonInvalid(
            f"{what} is not JSON: {exc.msg} in line {exc.lineno}, column {exc.colno}",
            line=exc.lineno,
            column=exc.colno,
            rule="DOC-1",
        ) from None
    if rb"\ud" in data.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise JsonInvalid(f"{what} holds half of a surrogate pair, which is no character", rule="DOC-3") from None
    if duplicates:
        key = duplicates[0][:80]
        raise JsonInvalid(f"{what} has a key twice in one object: {key!a}", key=key, rule="DOC-2")
    return value


def beyond_double(digits: str) -> bool:
    """Whether an integer is larger than any number of IEEE 754's double precision."""
    return math.isinf(float(digits))


def _check_depth(data: bytes, what: str, max_depth: int) -> None:
    # Before the real parser sees it: that one recurses.
    depth = 0
    for match in _TOKENS.finditer(data):
        token = data[match.start()]
        if token in b"[{":
            depth += 1
            if depth > max_depth:
                raise JsonInvalid(
                    f"{what} is nested deeper than {max_depth} levels, at offset {match.start()}",
                    offset=match.start(),
                    limit=max_depth,
                    rule="DOC-4",
                )
        elif token in b"]}":
            depth -= 1


def canonical(value: Any) -> bytes:
    """The bytes that we write for *value*: two-space indent, keys as they stand, one newline at the end.

    The same value always gives the same bytes, on every machine; people can read them.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
