"""Progress that people and programs see: bars on a terminal, JSON lines for a program."""

from __future__ import annotations

import collections
import json
import sys
import threading
import time
from types import TracebackType
from typing import Any, Final, Self, TextIO

from ovms.cli import output
from ovms.progress import NULL, Progress, Task

MODES: Final = ("auto", "bar", "json", "none")
#: Seconds between two pictures.
_INTERVAL: Final = 0.1
_LABEL: Final = 24
_BAR: Final = 24
#: Seconds over which a rate is measured, and for which it has to be known before a time is foretold.
_WINDOW: Final = 5.0
_SETTLED: Final = 1.0
_LEFT_MAX: Final = 100 * 3600.0


def make(mode: str) -> Progress:
    """The progress of a mode; ``auto`` is bars on a terminal, and nothing elsewhere."""
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "none"
    if mode == "bar":
        return _Bars(sys.stderr)
    return _JsonLines(sys.stderr) if mode == "json" else NULL


def say_beside(progress: Progress, text: str) -> None:
    """A line of news on stderr, above the bars where there are some."""
    if isinstance(progress, _Bars):
        progress.say(text)
    else:
        output.say(text)


class _Task:
    """One piece of work, whatever draws it."""

    def __init__(self, owner: _Bars | _JsonLines, label: str, total: int | None) -> None:
        self.owner = owner
        self.label = label
        self.total = total
        self.done = 0
        self.text = ""
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
            self.text = self.text or "broken off"
        self.owner.end(self)

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


class _Bars:
    """A line for each task; those at work are redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._active: list[_Task] = []
        self._drawn = 0
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
            self._erase()
            self._active.remove(task)
            self._stream.write(self._line(task, finished=True) + "\n")
            self._draw()

    def say(self, text: str) -> None:
        with self._lock:
            self._erase()
            self._stream.write(f"ovm: {output.safe(text)}\n")
            self._draw()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0

    def _draw(self) -> None:
        self._erase()
        for task in self._active:
            self._stream.write(self._line(task, finished=False) + "\n")
        self._drawn = len(self._active)
        self._last = time.monotonic()
        self._stream.flush()

    def _line(self, task: _Task, *, finished: bool) -> str:
        label = output.safe(task.label)[:_LABEL].ljust(_LABEL)
        if finished:
            line = f"{label} {task.text or 'done'}  {output.size(task.total if task.total is not None else task.done)}"
        elif task.stands:
            line = f"{label} {output.safe(task.stands)} ({output.size(task.done)} done)"
        elif task.total:
            done = min(task.done, task.total)
            filled = _BAR * done // task.total
            bar = ("=" * filled + ">")[:_BAR].ljust(_BAR)
            line = f"{label} [{bar}] {output.size(done)} / {output.size(task.total)}{self._speed(task)}"
        else:
            line = f"{label} {output.size(task.done)}{self._speed(task)}"
        # a line that wraps could not be erased again
        import shutil

        return line[: max(20, shutil.get_terminal_size().columns - 1)]

    def _speed(self, task: _Task) -> str:
        rate = task.rate(time.monotonic())
        left = task.left(rate)
        speed = "" if rate is None else f"  {output.size(int(rate))}/s"
        return speed if left is None else f"{speed}  {output.duration(left)} left"


class _JsonLines:
    """A JSON object for each step: ``{"task", "done", "total", "state", "note"?, "waiting"?, "rate"?, "left_s"?}``.

    Bytes, bytes a second, seconds.
    """

    def __init__(self, stream: TextIO) -> None:
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
            self._stream.write(json.dumps(value) + "\n")
            self._stream.flush()
