"""The error tree: what its docstring draws is what there is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

from ovms import errors
from ovms.errors import OvmsError

_LINE = re.compile(r"^    (?P<bars>[│ ├└─]*)(?P<name>[A-Z]\w+) +(?P<codes>[a-z· -]+?)(?: {2,}\(.*)?$", re.MULTILINE)


def classes() -> list[type[OvmsError]]:
    return [
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, OvmsError) and value.__module__ == "ovms.errors"
    ]


def drawn() -> Iterator[tuple[str, str | None, set[str]]]:
    """(class, parent, codes) for each line of the tree."""
    above: dict[int, str] = {}
    assert errors.__doc__ is not None
    for match in _LINE.finditer(errors.__doc__):
        depth = len(match["bars"]) // 4
        above[depth] = match["name"]
        yield match["name"], above[depth - 1] if depth else None, {c.strip() for c in match["codes"].split("·")}


def test_the_docstring_draws_the_tree() -> None:
    tree = {name: (parent, codes) for name, parent, codes in drawn()}
    assert set(tree) == {cls.__name__ for cls in classes()}
    for cls in classes():
        parent, codes = tree[cls.__name__]
        if cls is OvmsError:
            continue
        assert [base.__name__ for base in cls.__bases__] == [parent]
        assert codes == {cls.code, *cls.more_codes}, cls


def test_the_list_of_exports_is_the_tree() -> None:
    assert sorted(errors.__all__) == errors.__all__ == sorted(["Problem", *(cls.__name__ for cls in classes())])


def test_every_code_belongs_to_one_class() -> None:
    codes = [code for cls in classes() for code in (cls.code, *cls.more_codes)]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_each_class_sets_its_own_code_and_says_what_it_is() -> None:
    for cls in classes():
        assert "code" in vars(cls), f"{cls.__name__} inherits its code"
        assert cls.__doc__


def test_a_more_exact_code() -> None:
    error = errors.FileProblem("x", code="file-empty")
    assert error.code == "file-empty"
    assert errors.FileProblem.code == "file-unreadable"
    assert errors.FileProblem("x", code="file-unreadable").code == "file-unreadable"


def test_a_foreign_code_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="has no code 'file-empty'"):
        errors.DiskInvalid("x", code="file-empty")


def test_to_json_has_context_and_leaves_out_what_is_not_known() -> None:
    error = errors.DigestMismatch("wrong bytes", hint="pull it again", expected="a", got=None)
    assert error.to_json() == {
        "code": "digest-mismatch",
        "message": "wrong bytes",
        "hint": "pull it again",
        "expected": "a",
    }
    assert errors.Interrupted("stop").to_json() == {"code": "interrupted", "message": "stop"}


def test_problems_are_sorted_by_path() -> None:
    error = errors.ManifestInvalid(
        "two", problems=[errors.Problem("$.b", "second", "MAN-1"), errors.Problem("$.a", "first")]
    )
    assert [p.path for p in error.problems] == ["$.a", "$.b"]
    assert error.to_json()["problems"] == [
        {"path": "$.a", "message": "first"},
        {"path": "$.b", "rule": "MAN-1", "message": "second"},
    ]
    assert str(error) == "two"
