"""Classes and regular expressions that are made when they are first used."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading
from dataclasses import field

import pytest

from ovms.lazy import dataclass, regex


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
    b: list[int] = field(default_factory=list)


def test_it_is_the_standard_library_s_own() -> None:
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
