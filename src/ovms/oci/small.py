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
    elsewhere: bool = False


class Fetch:
    """Blobs that are asked for, in their order, as long as the registry simply sends them.

    Where it sends us elsewhere, they are asked for there. At the first that does not simply come (a challenge, an error, a
    connection that breaks) no more are asked for, and nothing is raised: what was not given to *keep* is to be fetched in the
    usual way, which knows what to do about all that.
    """

    def __init__(
        self,
        client: RegistryClient,
        repository: str,
        blobs: Iterable[Descriptor],
        keep: Keep,
        ended: Callable[[BaseException | None], object],
    ) -> None:
        """*ended* is called once, when no more will come: with what *keep* raised."""
        #: Of whom they are asked: connections to the same one are shared.
        self.client = client
        self._repository = repository
        self._left = collections.deque(blobs)
        self._keep = keep
        self._ended = ended
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._cancelled = False
        #: What the registry said, where it wants to be left alone for a while: before anything is fetched in the usual way.
        self.busy: Busy | None = None
        #: Asked for, and not kept yet; the pool's thread counts, here and below.
        self.under_way = 0
        #: Connections that are being made for it; and whether more are worth a try.
        self.opening = 0
        self.may_open = True

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
        return _Wanted(self, blob, lambda: self.client.send_blob(self._repository, blob))

    def receive(self, asked: Asked, blob: Descriptor) -> bytes | _Wanted | None:
        """Something has come: all of a blob, or where to ask for it. None: there is more to come.

        Raises:
            _Lost: it is anything else.
        """
        try:
            return asked.take(blob.size)
        except Unlike:
            if self._cancelled:
                asked.close()
                raise _Lost from None
        except OvmsError:
            raise _Lost from None
        try:
            data = self.client.receive_blob(asked, blob)
        except Elsewhere as exc:
            return _Wanted(self, blob, exc.send, elsewhere=True)
        except Busy as exc:
            self.busy = self.busy or exc
            raise _Lost from None
        except OvmsError:
            raise _Lost from None
        if data is None:
            raise _Lost
        return data

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
        # an error knows the frames that it came through, and so whoever holds it: a circle, in which connections stay open
        error, self._error = self._error, None
        self._ended(error)


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
    def large(self) -> Iterator[None]:
        """While a pull fetches large blobs: its own connections are not for small ones then."""
        with self._lock:
            self._elsewhere += self.each
        try:
            yield
        finally:
            with self._lock:
                self._elsewhere -= self.each

    @property
    def for_small(self) -> int:
        """Connections that are left for small blobs."""
        return max(self.each, self._connections - self._elsewhere)

    def begin(self, fetch: Fetch) -> None:
        """Lets a fetch begin. The one that began first is asked for first: so that it is at its end while others still come.

        Raises:
            OSError, RuntimeError: this host has no descriptor, or no thread, left for it.
        """
        with self._lock:
            if self._loop is None:
                self._loop = _Loop.started(self)
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
        self._opened: collections.deque[tuple[Fetch, bool]] = collections.deque()
        self._looked = time.monotonic()

    @classmethod
    def started(cls, pool: Pool) -> _Loop:
        """A loop that runs; under the pool's lock."""
        loop = cls(pool)
        try:
            threading.Thread(target=loop.run, name="small blobs", daemon=True).start()
        except BaseException:
            os.close(loop._waker)
            raise
        return loop

    def wake(self) -> None:
        """Something has begun, or is cancelled; under the pool's lock, under which the loop also ends. Or a connection is there."""
        os.eventfd_write(self._waker, 1)

    def run(self) -> None:
        """Until nothing is left to fetch."""
        try:
            while self._opening or not self._pool.closed():
                self._drop(lambda one: one.fetch.cancelled)
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
        most = self._pool.for_small
        in_vain: set[tuple[Fetch, bool]] = set()
        for _ in range(len(self._waiting)):
            wanted = self._waiting.popleft()
            if len(self._under_way) >= most or (wanted.fetch, wanted.elsewhere) in in_vain:
                self._waiting.append(wanted)
            elif not self._send(wanted):
                in_vain.add((wanted.fetch, wanted.elsewhere))
        for fetch in self._pool.fetches():
            while fetch.asks and self._used(fetch) < most:
                if (coming := fetch.next()) is not None:
                    self._send(coming)

    def _used(self, fetch: Fetch) -> int:
        # a registry to which no connection comes about takes no other's
        return len(self._under_way) + sum(one.fetch.client is fetch.client for one in self._waiting)

    def _send(self, wanted: _Wanted) -> bool:
        """False where it has to wait for a connection."""
        fetch, blob, send, _ = wanted
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
        except Exception as exc:  # noqa: BLE001 - raised again by whoever waits for it; the others have nothing to do with it
            fetch.fail(exc)
        if asked is None:
            fetch.lost()
            return True
        until = time.monotonic() + READ_TIMEOUT + blob.size / RATE_MIN
        self._under_way[asked.fileno] = _UnderWay(fetch, asked, blob, until)
        self._answers.register(asked.fileno, select.POLLIN)
        return True

    def _wait_for_one(self, wanted: _Wanted, make: Callable[[], object]) -> bool:
        fetch = wanted.fetch
        waiting = sum(one.fetch is fetch for one in self._waiting)
        if fetch.may_open and fetch.opening <= waiting:
            try:
                # not threading's, whose start waits until the thread runs: a millisecond for each, with answers to be taken
                _thread.start_new_thread(self._open, (fetch, make))
                self._opening += 1
                fetch.opening += 1
            except RuntimeError:  # no more threads
                fetch.may_open = False
        if not fetch.opening and not any(one.fetch is fetch for one in self._under_way.values()):
            return False
        self._waiting.append(wanted)
        return True

    def _open(self, fetch: Fetch, make: Callable[[], object]) -> None:
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
                self._opened.append((fetch, came))
                self.wake()

    def _see_opened(self) -> None:
        with self._lock:
            while self._opened:
                fetch, came = self._opened.popleft()
                self._opening -= 1
                fetch.opening -= 1
                # what has refused one refuses the next
                fetch.may_open = fetch.may_open and came

    # --- answers -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        # whoever takes them writes files, which takes as long as an answer: that is for when there is none
        come = self._answers.poll(0 if self._ready else READ_TIMEOUT * 1000)
        if not come and not self._ready:
            self._drop(lambda _one: True)  # nothing more is said
        if self._ready and not come:
            self._keep_one()
        for fileno, _ in come:
            if fileno == self._waker:
                os.eventfd_read(self._waker)
                self._see_opened()
            elif fileno in self._under_way:
                self._receive(fileno)
        while len(self._ready) > _READY_MAX:
            self._keep_one()
        if (now := time.monotonic()) - self._looked > _LOOK:
            self._looked = now
            self._drop(lambda one: one.until < now)

    def _keep_one(self) -> None:
        fetch, blob, data = self._ready.popleft()
        fetch.keep(blob, data)

    def _receive(self, fileno: int) -> None:
        fetch, asked, blob, _ = self._under_way[fileno]
        data = None
        try:
            data = fetch.receive(asked, blob)
            if data is None:
                return
        except _Lost:
            fetch.lost()
        except Exception as exc:  # noqa: BLE001 - as above
            with contextlib.suppress(OSError):
                asked.close()
            fetch.fail(exc)
            fetch.lost()
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
