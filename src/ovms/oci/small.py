"""Many small blobs, of all artifacts that are pulled together: several requests under way, and one thread that takes the answers.

A thread for each request would be simpler, and so would one for each artifact. But Python's threads take turns, and what a blob of
4 KiB needs is so little that most of it was the taking of turns.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from ovms.errors import OvmsError
from ovms.oci import workers
from ovms.oci.connections import NoneIdle
from ovms.oci.descriptor import Descriptor
from ovms.oci.http import RATE_MIN, READ_TIMEOUT, Asked
from ovms.oci.plain import Unlike
from ovms.oci.registry import Busy, Elsewhere, RegistryClient

#: Connections for small blobs. What these wait for is each answer, and not the link, so that more of them are faster: sixteen
#: than eight by a twentieth on loopback, thirty-two by half as much again. But registries count them.
CONNECTIONS: Final = 16
#: Answers that are kept before a registry has to wait.
_READY_MAX: Final = 32
#: Seconds between two looks for what comes too slowly.
_LOOK: Final = 1.0


#: Takes a blob, not yet checked. What it raises ends the fetch. Called by the pool's thread, and to be done soon.
Keep = Callable[[Descriptor, bytes], object]


class _Lost(Exception):
    """What was asked for does not come."""


class _Wanted(NamedTuple):
    """A blob, and how it is asked for: of the registry, or of where that sends us. None: that can't be done so."""

    fetch: Fetch
    blob: Descriptor
    send: Callable[[], Asked | None]


class Fetch:
    """Blobs that are asked for, in their order, as long as the registry simply sends them.

    Where it sends us elsewhere, they are asked for there. At the first that does not simply come (a challenge, an error, a
    connection that breaks) no more are asked for, and nothing is raised: what was not given to *keep* is to be fetched in the
    usual way, which knows what to do about all that. A registry that is busy is left alone for a while, all the same.
    """

    def __init__(
        self,
        client: RegistryClient,
        repository: str,
        blobs: Iterable[Descriptor],
        keep: Keep,
        ended: Callable[[BaseException | None], object],
    ) -> None:
        """*ended* is called once, when no more will come: with what *keep* raised, or with Busy where nobody waits so long."""
        self._client = client
        self._repository = repository
        self._left = collections.deque(blobs)
        self._keep = keep
        self._ended = ended
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._cancelled = False
        self._waited = False
        #: Asked for, and not kept yet.
        self.under_way = 0

    @property
    def asks(self) -> bool:
        """Whether there is more to ask for."""
        return bool(self._left)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants any more of it."""
        return self._cancelled

    def cancel(self) -> None:
        """From here on nothing is given to *keep*."""
        with self._lock:
            self._cancelled = True
            self.stop()

    def stop(self) -> None:
        """Asks for no more."""
        self._left.clear()

    def next(self) -> _Wanted | None:
        """The next blob to be asked for."""
        try:
            blob = self._left.popleft()
        except IndexError:  # cancelled in this moment
            return None
        self.under_way += 1
        return _Wanted(self, blob, lambda: self._client.send_blob(self._repository, blob))

    def receive(self, asked: Asked, blob: Descriptor) -> bytes | _Wanted | None:
        """Something has come: all of a blob, or where to ask for it. None: there is more to come.

        Raises:
            _Lost: it is anything else.
        """
        try:
            return asked.take(blob.size)
        except Unlike:
            pass
        except OvmsError:
            raise _Lost from None
        try:
            data = self._client.receive_blob(asked, blob)
        except Elsewhere as exc:
            return _Wanted(self, blob, exc.send)
        except Busy as exc:
            self._wait(exc)
            raise _Lost from None
        except OvmsError:
            raise _Lost from None
        if data is None:
            raise _Lost
        return data

    def _wait(self, busy: Busy) -> None:
        # of several that are told so, the first has waited for all of them
        if not self._waited:
            self._waited = True
            try:
                self._client.patience().bear(busy)
            except Busy as enough:
                self.fail(enough)

    def lost(self) -> None:
        """What was asked for does not come."""
        self.under_way -= 1
        self.stop()

    def keep(self, blob: Descriptor, data: bytes) -> None:
        """Hands on what came."""
        self.under_way -= 1
        try:
            with self._lock:
                if not self._cancelled:
                    self._keep(blob, data)
        except BaseException as exc:  # noqa: BLE001 - raised again by whoever waits for it
            self.fail(exc)

    def fail(self, error: BaseException) -> None:
        """Ends it, with an error."""
        self._error = self._error or error
        self.cancel()

    def end(self) -> None:
        """Tells that no more will come."""
        self._ended(self._error)


class Pool:
    """The connections that pulls which run together may take, shared out among them. Several threads may use it at once."""

    def __init__(self, each: int = workers.PARALLEL, connections: int = CONNECTIONS) -> None:
        """*each*: those of one pull, for its large blobs. *connections*: in all, as far as small ones are fetched."""
        self._connections = connections
        self.each = each
        self._elsewhere = 0
        self._lock = threading.Lock()
        self._fetches: list[Fetch] = []
        self._loop: _Loop | None = None

    @contextlib.contextmanager
    def large(self) -> Iterator[int]:
        """While a pull fetches large blobs: gives the number of its own connections, which are not for small ones then."""
        with self._lock:
            self._elsewhere += self.each
        try:
            yield self.each
        finally:
            with self._lock:
                self._elsewhere -= self.each

    @property
    def for_small(self) -> int:
        """Connections that are left for small blobs."""
        return max(self.each, self._connections - self._elsewhere)

    def begin(self, fetch: Fetch) -> None:
        """Lets a fetch begin. The one that began first is asked for first: so that it is at its end while others still come."""
        with self._lock:
            if self._loop is None:
                loop = _Loop(self)
                threading.Thread(target=loop.run, name="small blobs", daemon=True).start()
                self._loop = loop
            else:
                self._loop.wake()
            self._fetches.append(fetch)

    def cancel(self, fetch: Fetch) -> None:
        """Ends a fetch; from here on it keeps nothing. Fine for one that has ended."""
        fetch.cancel()
        with self._lock:
            if self._loop is not None:
                self._loop.wake()

    # --- for the loop ------------------------------------------------------------------------------------------

    def fetches(self) -> list[Fetch]:
        """Those that have begun and not ended."""
        with self._lock:
            return list(self._fetches)

    def over(self) -> list[Fetch]:
        """Takes those that are at their end."""
        with self._lock:
            ended = [fetch for fetch in self._fetches if not fetch.asks and not fetch.under_way]
            if ended:
                self._fetches = [fetch for fetch in self._fetches if fetch not in ended]
            return ended

    def closed(self) -> bool:
        """Whether none is left: then the loop ends, and the next fetch begins another."""
        with self._lock:
            if not self._fetches:
                self._loop = None
            return not self._fetches

    def gone(self) -> list[Fetch]:
        """All that are left, where the loop ends before them."""
        with self._lock:
            left, self._fetches, self._loop = self._fetches, [], None
            return left


class _UnderWay(NamedTuple):
    """A blob that was asked for, and when it is given up (monotonic)."""

    fetch: Fetch
    asked: Asked
    blob: Descriptor
    until: float


class _Loop:
    """The thread of a pool, as long as there is something to fetch.

    It waits for answers alone. A connection that is not there yet is made by a thread of its own: over a long way, or with TLS, that
    takes as long as several answers over one that is there.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._answers = select.poll()
        self._answers.register(self._waker, select.POLLIN)
        self._under_way: dict[int, _UnderWay] = {}
        #: For which there is no connection yet.
        self._waiting: collections.deque[_Wanted] = collections.deque()
        self._ready: collections.deque[tuple[Fetch, Descriptor, bytes]] = collections.deque()
        self._lock = threading.Lock()
        self._opening = 0
        self._opened: collections.deque[bool] = collections.deque()
        self._may_open = True
        self._looked = time.monotonic()

    def wake(self) -> None:
        """Something has begun, or is cancelled; under the pool's lock, under which the loop also ends. Or a connection is there."""
        os.eventfd_write(self._waker, 1)

    def run(self) -> None:
        """Until nothing is left to fetch."""
        try:
            while self._opening or not self._pool.closed():
                self._ask()
                self._tell_ended()
                if self._under_way or self._ready or self._opening:
                    self._step()
        except BaseException as exc:  # noqa: BLE001 - raised again by whoever waits for a fetch
            for fetch in self._pool.gone():
                fetch.fail(exc)
                fetch.end()
        finally:
            for one in self._under_way.values():
                with contextlib.suppress(OSError):
                    one.asked.close()
            if not self._opening:  # else a number that is another's by then would be written to
                os.close(self._waker)

    # --- asking ------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        for _ in range(len(self._waiting)):
            if not self._send(self._waiting.popleft()):
                break
        most = self._pool.for_small
        if len(self._under_way) + len(self._waiting) >= most:
            return
        for fetch in self._pool.fetches():
            while fetch.asks:
                if len(self._under_way) + len(self._waiting) >= most:
                    return
                if (wanted := fetch.next()) is not None:
                    self._send(wanted)

    def _send(self, wanted: _Wanted) -> bool:
        """False where it has to wait for a connection."""
        fetch, blob, send = wanted
        if fetch.cancelled:
            fetch.lost()
            return True
        asked = None
        try:
            asked = send()
        except NoneIdle as exc:
            if not self._wait_for_one(wanted, exc.open):
                fetch.lost()
            return False
        except OvmsError:
            pass
        if asked is None:
            fetch.lost()
            return True
        until = time.monotonic() + READ_TIMEOUT + blob.size / RATE_MIN
        self._under_way[asked.fileno] = _UnderWay(fetch, asked, blob, until)
        self._answers.register(asked.fileno, select.POLLIN)
        return True

    def _wait_for_one(self, wanted: _Wanted, make: Callable[[], None]) -> bool:
        if self._may_open and self._opening <= len(self._waiting):
            try:
                # not threading's, whose start waits until the thread runs: a millisecond for each, with answers to be taken
                _thread.start_new_thread(self._open, (make,))
                self._opening += 1
            except RuntimeError:  # no more threads
                self._may_open = False
        if not self._opening and not self._under_way:
            return False
        self._waiting.append(wanted)
        return True

    def _open(self, make: Callable[[], None]) -> None:
        # in a thread of its own
        came = False
        try:
            make()
            came = True
        except Exception:  # noqa: BLE001, S110 - whoever asks for it in the usual way is told
            pass
        finally:
            # the loop may end as soon as it knows: it does not before it was woken
            with self._lock:
                self._opened.append(came)
                self.wake()

    def _see_opened(self) -> None:
        with self._lock:
            while self._opened:
                came = self._opened.popleft()
                self._opening -= 1
                # what has refused one refuses the next
                self._may_open = self._may_open and came
        if not self._opening and not self._under_way and not self._may_open:
            while self._waiting:
                self._waiting.popleft().fetch.lost()

    # --- answers -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        # whoever takes them writes files, which takes as long as an answer: that is for when there is none
        come = self._answers.poll(0 if self._ready else READ_TIMEOUT * 1000)
        if not come and not self._ready:
            self._drop(lambda _one: True)  # nothing more is said
        if self._ready and (not come or len(self._ready) >= _READY_MAX):
            fetch, blob, data = self._ready.popleft()
            fetch.keep(blob, data)
        for fileno, _ in come:
            if fileno == self._waker:
                os.eventfd_read(self._waker)
                self._see_opened()
                self._drop(lambda one: one.fetch.cancelled)
            elif fileno in self._under_way:
                self._receive(fileno)
        if (now := time.monotonic()) - self._looked > _LOOK:
            self._looked = now
            self._drop(lambda one: one.until < now)

    def _receive(self, fileno: int) -> None:
        fetch, asked, blob, _ = self._under_way[fileno]
        try:
            data = fetch.receive(asked, blob)
            if data is None:
                return
        except _Lost:
            fetch.lost()
            data = None
        del self._under_way[fileno]
        self._answers.unregister(fileno)
        if isinstance(data, _Wanted):
            self._send(data)
        # the registry works on the next one meanwhile
        self._ask()
        if isinstance(data, bytes):
            self._ready.append((fetch, blob, data))

    def _drop(self, which: Callable[[_UnderWay], bool]) -> None:
        for fileno, one in list(self._under_way.items()):
            if which(one):
                del self._under_way[fileno]
                self._answers.unregister(fileno)
                with contextlib.suppress(OSError):
                    one.asked.close()
                one.fetch.lost()

    def _tell_ended(self) -> None:
        # while the others go on
        for fetch in self._pool.over():
            fetch.end()
