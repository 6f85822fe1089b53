"""Progress that people and programs see: bars on a terminal, JSON lines for a program."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, Self, TextIO

from ovms.cli import output
from ovms.progress import NULL, Progress, Task

MODES: Final = ("auto", "bar", "json", "none")
#: Seconds between two pictures.
_INTERVAL: Final = 0.1
#: Columns, and what is left of them where there are few: first the bar shrinks, then the label.
_LABEL: Final = 24
_LABEL_MIN: Final = 12
_BAR: Final = 24
_BAR_MIN: Final = 8
#: Columns of a terminal that tells none of its own.
_COLUMNS: Final = 80
_COLUMNS_MIN: Final = 20
#: Seconds over which a rate is measured, and for which it has to be known before a time is foretold.
_WINDOW: Final = 5.0
_SETTLED: Final = 1.0
_LEFT_MAX: Final = 100 * 3600.0


def make(mode: str) -> Progress:
    """The progress of a mode; ``auto`` is bars on a terminal, and nothing elsewhere."""
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "none"
    if mode == "bar":
        return _Bars(_Stderr())
    return _JsonLines(_Stderr()) if mode == "json" else NULL


def say_beside(progress: Progress, text: str) -> None:
    """A line of news on stderr, above the bars where there are some."""
    if isinstance(progress, _Bars):
        progress.say(text)
    else:
        output.say(text)


def give_up(progress: Progress) -> None:
    """No more is drawn: the work was broken off, also where a thread of it does not know that yet."""
    if isinstance(progress, _Bars):
        progress.give_up()


class _Task:
    """One piece of work, whatever draws it."""

    def __init__(self, owner: _Bars | _JsonLines, label: str, total: int | None) -> None:
        self.owner = owner
        self.label = label
        self.total = total
        self.done = 0
        self.text = ""
        self.broken = False
        self.stands = ""
        self._samples: collections.deque[tuple[float, int]] = collections.deque()

    def rate(self, now: float) -> float | None:
        """Bytes a second of late; None while that can't be told. To be asked now and then: it takes a sample."""
        samples = self._samples
        samples.append((now, self.done))
        while now - samples[0][0] > _WINDOW and len(samples) > 2:
            samples.popleft()
        seconds = now - samples[0][0]
        return (self.done - samples[0][1]) / seconds if seconds >= _SETTLED else None

    def left(self, rate: float | None) -> float | None:
        """Seconds to go at this rate; None where that can't be told, or is days."""
        seconds = max(0, self.total - self.done) / rate if rate and self.total else None
        return None if seconds is None or seconds > _LEFT_MAX else seconds

    def __enter__(self) -> Self:
        self.owner.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.break_off()
        self.owner.end(self)

    def break_off(self) -> None:
        self.broken = True
        self.text = "broken off"

    def advance(self, amount: int) -> None:
        self.done += amount
        self.owner.changed(self)

    def note(self, text: str) -> None:
        self.text = text
        self._samples.clear()  # what "resumed" stands for did not come just now

    def waiting(self, text: str) -> None:
        self.stands = text
        self._samples.clear()
        self.owner.stands(self)


class _Stderr:
    """Where progress goes. That nobody reads it any more is no reason to break the work off."""

    def write(self, text: str) -> None:
        with self._noticing():
            sys.stderr.write(text)

    def flush(self) -> None:
        with self._noticing():
            sys.stderr.flush()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    @staticmethod
    @contextlib.contextmanager
    def _noticing() -> Iterator[None]:
        try:
            yield
        except OSError:
            output.hush(sys.stderr)


class _Bars:
    """A line for each task; those at work are redrawn in place."""

    def __init__(self, stream: _Stderr | TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._active: list[_Task] = []
        #: How long each line is that stands there to be erased.
        self._drawn: list[int] = []
        self._last = 0.0

    def task(self, label: str, total: int | None = None) -> Task:
        return _Task(self, label, total)

    def begin(self, task: _Task) -> None:
        with self._lock:
            self._active.append(task)
            self._draw()

    def changed(self, task: _Task) -> None:
        if time.monotonic() - self._last >= _INTERVAL:
            with self._lock:
                self._draw()

    def stands(self, task: _Task) -> None:
        with self._lock:
            self._draw()

    def end(self, task: _Task) -> None:
        with self._lock:
            if task in self._active:  # else it was given up
                self._erase()
                self._active.remove(task)
                self._write_ended(task)
                self._draw()

    def give_up(self) -> None:
        with self._lock:
            self._erase()
            for task in self._active:
                task.break_off()
                self._write_ended(task)
            self._active = []
            self._stream.flush()

    def say(self, text: str) -> None:
        with self._lock:
            self._erase()
            self._stream.write(f"ovm: {output.safe(text)}\n")
            self._draw()

    def _write_ended(self, task: _Task) -> None:
        self._stream.write(_ended(task)[: self._columns() - 1] + "\n")

    def _erase(self) -> None:
        if self._drawn:
            # a window that has become narrower since has wrapped them
            columns = self._columns()
            rows = sum(max(1, math.ceil(length / columns)) for length in self._drawn)
            self._stream.write(f"\x1b[{rows}A\x1b[J")
            self._drawn = []

    def _draw(self) -> None:
        self._erase()
        columns = self._columns() - 1
        now = time.monotonic()
        for task in self._active:
            line = _going(task, now, columns)
            self._stream.write(line + "\n")
            self._drawn.append(len(line))
        self._last = now
        self._stream.flush()

    def _columns(self) -> int:
        # COLUMNS is of the time when the shell began: it counts only where the terminal itself says nothing
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        if not columns:
            import shutil

            columns = shutil.get_terminal_size((_COLUMNS, 24)).columns
        return max(_COLUMNS_MIN, columns)


def _ended(task: _Task) -> str:
    total = None if task.total is None else output.size(task.total)
    if task.broken:
        size = output.size(task.done) + (f" of {total}" if total else "")
    else:
        size = total or output.size(task.done)
    return f"{_label(task, _LABEL)} {task.text or 'done'}  {size}"


def _going(task: _Task, now: float, columns: int) -> str:
    # A line that wrapped would be two rows; so what fits is shown, the most telling last to go.
    done, total = task.done, task.total
    if task.stands:
        return f"{_label(task, _LABEL)} {output.safe(task.stands)} ({output.size(done)} done)"[:columns]
    rate = task.rate(now)
    left = task.left(rate)
    speed = "" if rate is None else f"  {output.size(int(rate))}/s"
    time_left = "" if left is None else f"  {output.duration(left)} left"
    if not total:
        return f"{_label(task, _LABEL)} {output.size(done)}{speed}"[:columns]
    done = min(done, total)
    amounts = f"{output.size(done)} / {output.size(total)}"
    tail = amounts + speed + time_left
    bar = min(_BAR, max(_BAR_MIN, columns - _LABEL - len(tail) - 4))
    label = min(_LABEL, columns - bar - len(tail) - 4)
    if label >= _LABEL_MIN:
        filled = bar * done // total
        drawn = ("=" * filled + ">")[:bar].ljust(bar)
        return f"{_label(task, label)} [{drawn}] {tail}"
    percent = f"{100 * done // total} %"
    for fitting in (tail, amounts + (time_left or speed), percent + (time_left or speed), percent):
        label = min(_LABEL, columns - len(fitting) - 1)
        if label >= _LABEL_MIN:
            break
    return f"{_label(task, label)} {fitting}"[:columns]


def _label(task: _Task, width: int) -> str:
    return output.safe(task.label)[:width].ljust(width)


class _JsonLines:
    """A JSON object for each step: ``{"task", "done", "total", "state", "note"?, "waiting"?, "rate"?, "left_s"?}``.

    Bytes, bytes a second, seconds.
    """

    def __init__(self, stream: _Stderr | TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._last: dict[int, float] = {}

    def task(self, label: str, total: int | None = None) -> Task:
        return _Task(self, label, total)

    def begin(self, task: _Task) -> None:
        self._write(task, "begin")

    def changed(self, task: _Task) -> None:
        if time.monotonic() - self._last.get(id(task), 0.0) >= _INTERVAL:
            self._write(task, "going")

    def stands(self, task: _Task) -> None:
        self._write(task, "going")

    def end(self, task: _Task) -> None:
        self._write(task, "end")
        self._last.pop(id(task), None)

    def _write(self, task: _Task, state: str) -> None:
        value: dict[str, Any] = {"task": task.label, "done": task.done, "total": task.total, "state": state}
        if task.text:
            value["note"] = task.text
        if task.stands and state == "going":
            value["waiting"] = task.stands
        with self._lock:
            if (rate := task.rate(time.monotonic())) is not None and state == "going":
                value["rate"] = round(rate)
                if (left := task.left(rate)) is not None:
                    value["left_s"] = round(left, 1)
            self._last[id(task)] = time.monotonic()
            self._stream.write(output.dumps(value) + "\n")
            self._stream.flush()
