"""Classes and regular expressions that are made when they are first used."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest

from ovms.lazy import asdict, dataclass, field, regex, replace


@dataclass(frozen=True)
class Base:
    a: int
    b: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Derived(Base):
    c: str = "c"

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a")


@dataclasses.dataclass(frozen=True)
class Plain:
    a: int
    b: list[int] = dataclasses.field(default_factory=list)


def test_it_is_what_the_standard_library_makes() -> None:
    assert Derived(1) == Derived(1, [], "c") != Derived(1, [], "d")
    assert repr(Derived(1, c="x")) == "Derived(a=1, b=[], c='x')"
    assert dataclasses.replace(Derived(1), c="d") == Derived(1, [], "d")
    assert dataclasses.asdict(Base(1)) == {"a": 1, "b": []}
    assert Base(1).b is not Base(1).b
    assert pickle.loads(pickle.dumps(Derived(1))) == copy.deepcopy(Derived(1)) == Derived(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Base(1).a = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="a"):
        Derived(-1)


class Both(NamedTuple):
    """The same class, made by the standard library and by us."""

    theirs: Any
    ours: Any


def both(make: Callable[[Any, Any], type]) -> Both:
    return Both(make(dataclasses.dataclass, dataclasses.field), make(dataclass, field))


def frozen(decorate: Any, field: Any) -> type:
    @decorate(frozen=True)
    class Thing:
        a: int
        b: str = field(default="b", repr=False)
        c: dict[str, int] = field(default_factory=dict, compare=False)
        kind: ClassVar[str] = "thing"

    return Thing


def changing(decorate: Any, field: Any) -> type:
    @decorate()
    class Thing:
        a: int
        b: list[int] = field(default_factory=list)

    return Thing


def nothing(decorate: Any, field: Any) -> type:
    @decorate(frozen=True)
    class Thing:
        pass

    return Thing


def with_its_own(decorate: Any, field: Any) -> type:
    @decorate(frozen=True)
    class Thing:
        a: int

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 7

        def __repr__(self) -> str:
            return "mine"

    return Thing


def result(action: Callable[..., object], *args: object, **kwargs: object) -> object:
    try:
        return action(*args, **kwargs)
    except (TypeError, AttributeError) as exc:
        return type(exc), str(exc)


@pytest.mark.parametrize("make", [frozen, changing, nothing, with_its_own])
def test_whatever_is_done_comes_out_as_with_the_standard_library(make: Callable[[Any, Any], type]) -> None:
    theirs, ours = both(make)
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = [
        ((), {}), ((1,), {}), ((1, "x"), {}), ((1, "x", {"k": 1}), {}), ((1, 2, 3, 4), {}), ((), {"a": 1}), ((1,), {"a": 1}),
        ((1,), {"d": 1}), ((1,), {"b": "y"}),
    ]  # fmt: skip
    pairs = []
    for args, kwargs in calls:
        one, our_one = result(theirs, *args, **kwargs), result(ours, *args, **kwargs)
        assert repr(one) == repr(our_one)
        if type(one) is theirs:
            pairs.append((one, our_one))
    assert pairs
    for one, our_one in pairs:
        for other, our_other in pairs:
            assert (one == other, one != other) == (our_one == our_other, our_one != our_other)
        assert one != our_one or make is with_its_own
        assert result(hash, one) == result(hash, our_one)
        assert result(setattr, one, "a", 2) == result(setattr, our_one, "a", 2)
        assert result(vars, one) == result(vars, our_one)
    for one, our_one in pairs:
        assert result(delattr, one, "a") == result(delattr, our_one, "a")
    assert [f.name for f in dataclasses.fields(theirs)] == [f.name for f in dataclasses.fields(ours)]
    assert theirs.__match_args__ == ours.__match_args__
    assert result(getattr, theirs, "b") == result(getattr, ours, "b")


def test_copies_with_changes_and_plain_forms() -> None:
    one = Derived(1, [2], "c")
    assert replace(one, a=3) == dataclasses.replace(one, a=3) == Derived(3, [2], "c")
    with pytest.raises(TypeError, match="unexpected"):
        replace(one, x=1)  # type: ignore[call-arg]

    @dataclass(frozen=True)
    class Outer:
        inner: Derived
        more: tuple[Derived, ...]
        named: dict[str, Base]

    outer = Outer(one, (one,), {"x": Base(1)})
    assert asdict(outer) == dataclasses.asdict(outer)
    assert asdict(outer)["more"] == ({"a": 1, "b": [2], "c": "c"},)


def test_fields_in_a_wrong_order_are_told() -> None:
    @dataclass(frozen=True)
    class Wrong:
        a: int = 1
        b: int  # type: ignore[misc]

    with pytest.raises(TypeError, match="non-default argument 'b' follows default argument"):
        Wrong(1, 2)


def test_a_field_of_the_standard_library_s_is_refused() -> None:
    with pytest.raises(TypeError, match=r"ovms\.lazy"):

        @dataclass(frozen=True)
        class Mixed:
            a: list[int] = dataclasses.field(default_factory=list)


def test_every_dataclass_of_ours_can_be_made() -> None:
    """What shows at the first use alone (the order of fields) is right in all of them."""
    import importlib
    import pkgutil

    import ovms

    seen = 0
    for module in pkgutil.walk_packages(ovms.__path__, "ovms."):
        if module.name.endswith(("__main__", ".freeze.freeze")):
            continue
        for value in list(vars(importlib.import_module(module.name)).values()):
            if isinstance(value, type) and "__ovms_fields__" in vars(value):
                dataclasses.fields(value)
                with pytest.raises(Exception):  # noqa: B017 - most need arguments; making the methods is what counts
                    value(**{"no such": 1})
                assert "__init__" in vars(value)
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("arguments", [(), (1, [], "c", 4), (1, [], 3)])
def test_wrong_arguments_are_a_type_error(arguments: tuple[object, ...]) -> None:
    for cls in (Base, Plain):
        with pytest.raises(TypeError) as caught:
            cls(*arguments)  # type: ignore[arg-type]
        assert "__init__() " in str(caught.value)


def test_the_fields_are_known_before_there_is_an_instance() -> None:
    @dataclass(frozen=True)
    class One:
        a: int
        b: int = 2

    @dataclass(frozen=True)
    class Two(One):
        c: int = 3

    assert [one.name for one in dataclasses.fields(Two)] == ["a", "b", "c"]
    assert (One.b, Two(1).b) == (2, 2)
    assert dataclasses.is_dataclass(One)


def test_a_class_derived_without_the_decorator_is_one_of_its_base() -> None:
    @dataclass(frozen=True)
    class One:
        a: int

    class Two(One):
        pass

    assert Two(1).a == 1
    assert One(2).a == 2


def test_threads_that_make_the_first_instances_at_once() -> None:
    for _ in range(100):

        @dataclass(frozen=True)
        class One:
            a: int
            b: int = 2

        go = threading.Barrier(4)
        made: list[One] = []

        def make(cls: type[One] = One, go: threading.Barrier = go, made: list[One] = made) -> None:
            go.wait(10)
            made.append(cls(1))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert made == [One(1)] * 4


def test_a_regular_expression_is_compiled_at_its_first_use_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = re.compile

    def compile_(pattern: str, flags: int = 0) -> re.Pattern[str]:
        compiled.append(pattern)
        return real(pattern, flags)

    monkeypatch.setattr(re, "compile", compile_)
    word = regex("[A-Z]+", re.IGNORECASE)
    assert word.pattern == "[A-Z]+"
    assert compiled == []
    for _ in range(3):
        assert word.fullmatch("abc")
        assert not word.fullmatch("ab1")
    assert compiled == ["[A-Z]+"]
    assert regex(rb"[0-9]").sub(b"x", b"a1") == b"ax"
    with pytest.raises(AttributeError):
        word.nonsense  # type: ignore[attr-defined]  # noqa: B018
