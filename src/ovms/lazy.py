"""What modules make as they are imported, made when it is first used: a command pays for what it needs (ADR 0019).

A frozen dataclass of the standard library takes half a millisecond to make, its module ten to import, a regular expression a
fifth of one: that was two thirds of a command's start. So a dataclass here is made of closures, with one compiled method.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, AnyStr, NamedTuple, NoReturn, TypeVar, cast

__all__ = ["asdict", "dataclass", "field", "regex", "replace"]


def regex(pattern: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """``re.compile(pattern, flags)``, compiled when it is first used. An error in *pattern* comes up then, too."""
    return cast("re.Pattern[AnyStr]", _Regex(pattern, flags))


class _Regex:
    def __init__(self, pattern: str | bytes, flags: int) -> None:
        self.pattern = pattern
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        # kept at the instance: the next use finds it there, and does not come here
        value = self.__dict__[name] = getattr(re.compile(self.pattern, self._flags), name)
        return value


if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, replace
else:
    _T = TypeVar("_T", bound=type)
    _lock = threading.RLock()
    _NOTHING = object()

    class _Field(NamedTuple):
        name: str
        default: Any = _NOTHING
        default_factory: Any = _NOTHING
        repr: bool = True
        compare: bool = True

    def field(
        *, default: Any = _NOTHING, default_factory: Any = _NOTHING, repr: bool = True, compare: bool = True
    ) -> Any:
        """As ``dataclasses.field``, with what is used of it."""
        return _Field("", default, default_factory, repr, compare)

    def dataclass(*, frozen: bool = False) -> Callable[[_T], _T]:
        """``dataclasses.dataclass(frozen=frozen)``, with methods that are made when the first instance is.

        The standard library's functions for dataclasses take the class for one of theirs.
        """

        def decorate(cls: _T) -> _T:
            _Pending(cls, frozen=frozen)
            return cls

        return decorate

    def replace(instance: Any, /, **changes: Any) -> Any:
        """As ``dataclasses.replace``."""
        cls = type(instance)
        given = {one.name: getattr(instance, one.name) for one in cls.__ovms_fields__ if one.name not in changes}
        return cls(**given, **changes)

    def asdict(instance: Any) -> dict[str, Any]:
        """As ``dataclasses.asdict``; what is no dataclass, dict, list or tuple is taken as it is."""
        return {one.name: _plain(getattr(instance, one.name)) for one in type(instance).__ovms_fields__}

    def _plain(value: Any) -> Any:
        if hasattr(type(value), "__ovms_fields__"):
            return asdict(value)
        if isinstance(value, dict):
            return {_plain(key): _plain(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(_plain, value))
        return value

    def _new(cls: type, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def _own_fields(cls: type) -> dict[str, _Field]:
        # As they stand in the class; its attributes become what they are in a dataclass.
        found = {}
        for name, kind in cls.__annotations__.items():
            if "ClassVar[" in str(kind):
                continue
            default = cls.__dict__.get(name, _NOTHING)
            if type(default).__module__ == "dataclasses":
                raise TypeError(f"{cls.__qualname__}.{name}: take 'field' from ovms.lazy, too")
            found[name] = default._replace(name=name) if isinstance(default, _Field) else _Field(name, default)
            if isinstance(default, _Field):
                if default.default is _NOTHING:
                    delattr(cls, name)
                else:
                    setattr(cls, name, default.default)
        return found

    class _Pending:
        """Stands in *cls* for what ``dataclass`` would put there."""

        def __init__(self, cls: type, *, frozen: bool) -> None:
            self._cls = cls
            self._frozen = frozen
            self._done = False
            fields = {}
            for base in reversed(cls.__mro__[1:]):
                fields.update({one.name: one for one in base.__dict__.get("__ovms_fields__", ())})
            fields.update(_own_fields(cls))
            cls.__ovms_fields__ = tuple(fields.values())
            cls.__dataclass_fields__ = self
            if "__match_args__" not in cls.__dict__:
                cls.__match_args__ = tuple(fields)

            # __new__, for it runs before __init__ is looked up: a thread that comes meanwhile waits here for the lock
            def __new__(of: type, *_: Any, **__: Any) -> Any:  # noqa: N807
                self._finish()
                return object.__new__(of)

            cls.__new__ = __new__

        def __get__(self, instance: object, owner: type) -> Any:
            # for the standard library's functions: what it would have made itself
            import dataclasses

            def theirs(one: _Field) -> Any:
                given = {key: value for key, value in one._asdict().items() if value is not _NOTHING and key != "name"}
                return dataclasses.field(**given)

            namespace = {one.name: theirs(one) for one in self._cls.__ovms_fields__}
            shadow = type(self._cls.__name__, (), {**namespace, "__annotations__": dict.fromkeys(namespace, "Any")})
            fields = dataclasses.dataclass(shadow).__dataclass_fields__
            self._cls.__dataclass_fields__ = fields
            return fields

        def _finish(self) -> None:
            with _lock:
                if not self._done:
                    self._done = True
                    _add_methods(self._cls, frozen=self._frozen)
                    # (a deleted __new__ would leave object.__new__ refusing arguments)
                    self._cls.__new__ = _new

    def _add_methods(cls: type, *, frozen: bool) -> None:
        fields: tuple[_Field, ...] = cls.__ovms_fields__
        compared = _values_of([one.name for one in fields if one.compare])
        shown = [one.name for one in fields if one.repr]

        def __repr__(self: Any) -> str:  # noqa: N807
            return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

        def __eq__(self: Any, other: object) -> bool:  # noqa: N807
            return compared(self) == compared(other) if type(other) is type(self) else NotImplemented

        def __hash__(self: Any) -> int:  # noqa: N807
            return hash(compared(self))

        methods: dict[str, Any] = {
            "__init__": _init(cls, fields, frozen=frozen),
            "__repr__": __repr__,
            "__eq__": __eq__,
        }
        methods["__hash__"] = __hash__ if frozen else None
        if frozen:
            methods |= _frozen(cls, frozenset(one.name for one in fields))
        for name, method in methods.items():
            # a class that has one keeps it; Python itself puts __hash__ = None beside an __eq__
            if name not in cls.__dict__ or (name == "__hash__" and frozen and cls.__dict__[name] is None):
                if method is not None:
                    method.__qualname__ = f"{cls.__qualname__}.{name}"
                setattr(cls, name, method)

    def _values_of(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
        if len(names) > 1:
            return operator.attrgetter(*names)
        return lambda instance: tuple(getattr(instance, name) for name in names)

    def _init(cls: type, fields: tuple[_Field, ...], *, frozen: bool) -> Any:
        # The one method that is compiled: it is called for each instance, and Python checks its arguments best.
        known: dict[str, Any] = {"_nothing": _NOTHING, "_set": object.__setattr__}
        arguments, lines, last = [], [], None
        for one in fields:
            value = one.name
            if one.default is not _NOTHING:
                known[f"_default_{one.name}"] = one.default
                arguments.append(f"{one.name}=_default_{one.name}")
            elif one.default_factory is not _NOTHING:
                known[f"_make_{one.name}"] = one.default_factory
                arguments.append(f"{one.name}=_nothing")
                value = f"_make_{one.name}() if {one.name} is _nothing else {one.name}"
            elif last is not None:
                raise TypeError(f"non-default argument {one.name!r} follows default argument {last!r}")
            else:
                arguments.append(one.name)
            if one.default is not _NOTHING or one.default_factory is not _NOTHING:
                last = one.name
            lines.append(f" _set(self, {one.name!r}, {value})" if frozen else f" self.{one.name} = {value}")
        if hasattr(cls, "__post_init__"):
            lines.append(" self.__post_init__()")
        source = "\n".join([f"def __init__({', '.join(['self', *arguments])}):", *(lines or [" pass"])])
        exec(source, known)  # noqa: S102 - of names in a class statement, as the standard library has it
        return known["__init__"]

    def _frozen(cls: type, names: frozenset[str]) -> dict[str, Any]:
        def refuse(what: str, name: str) -> NoReturn:
            from dataclasses import FrozenInstanceError

            raise FrozenInstanceError(f"cannot {what} field {name!r}")

        def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
            if type(self) is cls or name in names:
                refuse("assign to", name)
            super(cls, self).__setattr__(name, value)

        def __delattr__(self: Any, name: str) -> None:  # noqa: N807
            if type(self) is cls or name in names:
                refuse("delete", name)
            super(cls, self).__delattr__(name)

        return {"__setattr__": __setattr__, "__delattr__": __delattr__}
