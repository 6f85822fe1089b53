"""What modules make as they are imported, made when it is first used: a command pays for what it needs (ADR 0019).

A frozen dataclass takes half a millisecond to make, a regular expression a fifth: that was two thirds of a command's start.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, AnyStr, TypeVar, cast

__all__ = ["dataclass", "regex"]


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
    from dataclasses import dataclass
else:
    _T = TypeVar("_T", bound=type)
    _lock = threading.RLock()

    def dataclass(**params: bool) -> Callable[[_T], _T]:
        """``dataclasses.dataclass(**params)``, without *slots* and *weakref_slot*, which need another class object.

        What comes out, once an instance is made or the fields are asked for, is the standard library's own dataclass.
        """

        def decorate(cls: _T) -> _T:
            _Pending(cls, params)
            return cls

        return decorate

    def _new(cls: type, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    class _Pending:
        """Stands in *cls* for what ``dataclass`` will put there. ``dataclass`` asks each base for its fields: bases come first."""

        def __init__(self, cls: type, params: dict[str, bool]) -> None:
            self._cls = cls
            self._params = params
            self._done = False
            cls.__dataclass_fields__ = self

            # __new__, for it runs before __init__ is looked up: a thread that comes meanwhile waits here for the lock
            def __new__(of: type, *_: Any, **__: Any) -> Any:  # noqa: N807
                self._finish()
                return object.__new__(of)

            cls.__new__ = __new__

        def __get__(self, instance: object, owner: type) -> Any:
            self._finish()
            return self._cls.__dataclass_fields__

        def _finish(self) -> None:
            with _lock:
                if not self._done:
                    import dataclasses  # and with it inspect, ast and tokenize

                    self._done = True
                    dataclasses.dataclass(**self._params)(self._cls)
                    # (a deleted __new__ would leave object.__new__ refusing arguments)
                    self._cls.__new__ = _new
