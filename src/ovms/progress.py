"""How long work reports that it goes on: a protocol, and the implementation that says nothing.

The library reports to a :class:`Progress`; what becomes of it (bars on a terminal, JSON lines, nothing) is the
caller's choice. Implementations that print live in ``ovms.cli.progress``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

__all__ = ["NULL", "NullProgress", "Progress", "Task"]


class Task(Protocol):
    """One piece of work: a blob that is copied, a snapshot that is written. Used as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def advance(self, amount: int, /) -> None:
        """*amount* bytes more are done."""

    def note(self, text: str, /) -> None:
        """A word on how it ended, such as ``exists already``."""

    def waiting(self, text: str, /) -> None:
        """It stands still, and for what; ``""``: it goes on."""


class Progress(Protocol):
    """Where pieces of work are announced."""

    def task(self, label: str, total: int | None = None) -> Task:
        """Announces a piece of work of *total* bytes (None: not known)."""


class _NullTask:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None

    def advance(self, amount: int, /) -> None:
        return None

    def note(self, text: str, /) -> None:
        return None

    def waiting(self, text: str, /) -> None:
        return None


class NullProgress:
    """Says nothing."""

    def task(self, label: str, total: int | None = None) -> Task:
        """A task that says nothing."""
        return _NullTask()


NULL: Progress = NullProgress()
