"""One blob over several connections at once, where that is faster than one.

On a fast link it is not: a connection alone fills it, and every further one costs (15 to 25 % when measured on loopback). On a long
one, or where a registry holds each connection to a rate, it is. So one connection begins; when it has shown to be slow and
connections are to spare, the rest is fetched in segments; and when that has not shown to be faster, one goes on alone.

Segments are handed on in order, so that what has come is always one piece from the start, which any later pull goes on with. At
most :data:`WINDOW` of them for each connection are in memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Final

from ovms.spec import limits

#: Bytes of a segment: large enough that a round trip of 100 ms costs little.
SEGMENT: Final = 8 * limits.MIB
#: Segments in memory for each connection: 4 connections hold 64 MiB.
WINDOW: Final = 2
#: Seconds after which a connection is judged.
JUDGE_AFTER: Final = 1.0
#: Bytes a second from which one connection is fast enough: hashing and writing take the rest of a core.
FAST: Final = 150_000_000
#: Fetches so many bytes from an offset on, again where that may help. Raises :class:`NoRanges`, or what stays wrong.
FetchRange = Callable[[int, int], bytes]
#: How much faster several connections have to be to be worth it.
GAIN: Final = 1.2


class Slow(Exception):
    """One connection alone is slow, and others are to spare."""


class NoRanges(Exception):
    """The registry sends whole blobs only."""


class NoGain(Exception):
    """Several connections are not faster than one."""


class Judge:
    """Watches one connection: whether the rest of the blob should come over several."""

    def __init__(self, *, spare: Callable[[], int]) -> None:
        self._spare = spare
        self._began = time.monotonic()
        self._bytes = 0
        self.rate = 0.0

    def received(self, amount: int, left: int) -> None:
        """*amount* bytes have come, *left* are to come.

        Raises:
            Slow: it is time to change; ``rate`` is what this connection made, in bytes a second.
        """
        self._bytes += amount
        elapsed = time.monotonic() - self._began
        if elapsed < JUDGE_AFTER:
            return
        self.rate = self._bytes / elapsed
        if self.rate < FAST and left >= 4 * SEGMENT and self._spare() > 0:
            raise Slow
        self._began, self._bytes = time.monotonic(), 0


def fetch(start: int, end: int, lanes: int, fetch_range: FetchRange, *, rate: float) -> Iterator[bytes]:
    """The bytes from *start* to *end*, in order, over *lanes* connections.

    *rate* is what one connection made, in bytes a second.

    Raises:
        NoGain: several are not faster; what had been asked for by then was handed on.
        whatever *fetch_range* raises.
    """
    spans = [(offset, min(SEGMENT, end - offset)) for offset in range(start, end, SEGMENT)]
    segments = _Segments(spans, lanes, fetch_range)
    began, measured = time.monotonic(), 0
    gain = True
    try:
        for data in segments.in_order():
            yield data
            measured += len(data)
            elapsed = time.monotonic() - began
            # the first of all connections come together: no measure
            if gain and measured >= 2 * lanes * SEGMENT and elapsed >= JUDGE_AFTER:
                if measured / elapsed < GAIN * rate:
                    gain = False
                    segments.no_more()
                began, measured = time.monotonic(), 0
    finally:
        segments.stop()
    if not gain:
        raise NoGain


def fetch_spans(spans: Sequence[tuple[int, int]], lanes: int, fetch_range: FetchRange) -> Generator[bytes, None, None]:
    """The bytes of each span (offset, size of at most :data:`SEGMENT`), one after the other, over *lanes* connections.

    Raises:
        whatever *fetch_range* raises.
    """
    segments = _Segments(spans, lanes, fetch_range)
    try:
        yield from segments.in_order()
    finally:
        segments.stop()


class _Segments:
    def __init__(self, spans: Sequence[tuple[int, int]], lanes: int, fetch_range: FetchRange) -> None:
        self._spans = spans
        self._end = len(spans)
        self._fetch_range = fetch_range
        # spans are counted: the next to be asked for, and the next to be handed on
        self._next = self._wanted = 0
        self._ready: dict[int, bytes] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._ahead = lanes * WINDOW
        self._changed = threading.Condition()
        # daemons: one that hangs in a read must not keep a process that was interrupted
        for number in range(lanes):
            threading.Thread(target=self._work, name=f"range-{number}", daemon=True).start()

    def _work(self) -> None:
        while (number := self._take()) is not None:
            try:
                data = self._fetch_range(*self._spans[number])
            except BaseException as exc:  # noqa: BLE001 - raised again where the bytes are wanted
                with self._changed:
                    self._error = self._error or exc
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready[number] = data
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The number of the next segment to fetch; waits while enough is in memory."""
        with self._changed:
            self._changed.wait_for(lambda: self._over() or self._next < self._wanted + self._ahead)
            if self._over():
                return None
            number, self._next = self._next, self._next + 1
            return number

    def _over(self) -> bool:
        return self._stopped or self._error is not None or self._next >= self._end

    def in_order(self) -> Iterator[bytes]:
        """The segments, one after the other; raises what went wrong when it is the turn of one that does not come."""
        while self._wanted < self._end:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted in self._ready or self._error is not None)
                data = self._ready.pop(self._wanted, None)
                if data is None:
                    assert self._error is not None
                    raise self._error
            yield data
            with self._changed:
                self._wanted += 1
                self._changed.notify_all()

    def no_more(self) -> None:
        """Asks for nothing further; what was asked for still comes."""
        with self._changed:
            self._end = min(self._end, self._next)
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends the threads, those that read as soon as they have."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
