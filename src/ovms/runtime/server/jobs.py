"""Where the synchronous work is done: threads, as many as are named here, and no queue without an end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from ovms.errors import OvmsError, ResourceError
from ovms.progress import Task
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.runtime.server.http import HttpError
from ovms.runtime.starting import Start
from ovms.runtime.warm import Handed, Pools
from ovms.runtime.watching import EventLog
from ovms.spec.states import State
from ovms.text import printable

if TYPE_CHECKING:
    from ovms.oci.registry import RegistryClient

#: Threads that answer questions, that change instances, and that do what takes long: starts and snapshots.
READERS: Final = 4
CHANGERS: Final = 16
LONG: Final = 8
#: Threads that finish what was left half done: guests whose agents keep them waiting hold up nothing else.
MENDERS: Final = 2
#: Work of one kind that waits for a thread; more is refused.
WAITING_MAX: Final = 512
#: Seconds to wait for another command that works on the same instance.
LOCK_TIMEOUT: Final = 10.0
#: Seconds that a start gets to be broken off when the server ends.
_BREAK_OFF: Final = 3.0
#: Seconds after an answer in which nothing is done but to write it.
_FINISH: Final = 0.005
#: Seconds between two looks at the warm pools, while nobody takes from them.
_WARM_LOOK: Final = 1.0
#: Seconds between two looks at whether what waits is still good.
_WARM_TIDY: Final = 1.0
#: Seconds between two reports of one piece of long work.
_REPORT: Final = 0.5

_T = TypeVar("_T")


class Pool:
    """Threads for one kind of work."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"ovms-{name}")
        self._waiting = 0
        self._most = threads + WAITING_MAX

    async def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Does *work* in a thread.

        Raises:
            HttpError: there is too much to do already.
        """
        if self._waiting >= self._most:
            error = ResourceError("the server has too much to do", hint="try again in a while")
            raise HttpError(error, 503, {"Retry-After": "1"})
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        future.add_done_callback(self._done)
        # what was begun goes on, also when its caller is gone
        return await asyncio.shield(future)

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # somebody has looked at it

    @property
    def idle(self) -> bool:
        """Whether nothing is at work."""
        return self._waiting == 0

    def close(self) -> None:
        """Leaves what has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Jobs:
    """The pools, and the work that goes on after its caller was answered."""

    def __init__(self, runtime: Runtime, log: EventLog, look: Callable[[str], object] = lambda _: None) -> None:
        """*look* is told of an instance, from whatever thread, when its start has come to an end."""
        self.readers = Pool("read", READERS)
        self.changers = Pool("change", CHANGERS)
        self.long = Pool("long", LONG)
        self.menders = Pool("mend", MENDERS)
        self._runtime = runtime
        self._log = log
        self._look = look
        self._starts: set[Start] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._mending: set[str] = set()
        self._closing = False
        self._taken = asyncio.Event()
        runtime.instances.lock_timeout = LOCK_TIMEOUT

    @staticmethod
    def connect(host: str) -> RegistryClient:
        """A client for a registry, as the configuration of the server's user says now."""
        from ovms.oci.connect import Connector

        return Connector.from_environment()(host)

    # --- starts ------------------------------------------------------------------------------------------------

    async def start(self, start: Start, patience: float) -> None:
        """Goes on with a start. Returns when its artifact is there, or after *patience* seconds.

        Raises:
            OvmsError: it has failed, and nothing is left of it.
        """
        self._starts.add(start)
        resolved = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            # the pool's thread waits for nobody: whoever waits is told
            start.on_resolved = lambda: loop.call_soon_threadsafe(resolved.set)
            try:
                start.run(self.connect, progress=Reported(self._log, start.record.id))
            finally:
                self._look(start.record.id)

        task = asyncio.ensure_future(self._run_start(start, work))
        self._keep(task)
        waiter = asyncio.ensure_future(resolved.wait())
        try:
            await asyncio.wait((task, waiter), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if not start.answered():
            await task
            raise start.error or OvmsError("the start failed")

    async def _run_start(self, start: Start, work: Callable[[], None]) -> None:
        try:
            await self.long.run(work)
        except OvmsError:
            pass  # it stands in the record, and was an event
        except HttpError as exc:
            start.fail(exc.error)
        except Exception as exc:  # noqa: BLE001 - no fault of ours may end the server
            print(f"ovm: internal error in a start: {type(exc).__name__}: {printable(str(exc), 500)}", file=sys.stderr)  # noqa: T201
        finally:
            self._starts.discard(start)

    def finish(self, handed: Handed) -> None:
        """Writes down what a start from a warm pool had no time for."""
        self._keep(asyncio.ensure_future(self._finish(handed)))

    async def _finish(self, handed: Handed) -> None:
        await asyncio.sleep(_FINISH)
        with contextlib.suppress(HttpError):
            await self.changers.run(handed.finish)
        self.refill()

    def refill(self) -> None:
        """The warm pools are looked at now."""
        self._taken.set()

    async def keep_warm(self, pools: Pools) -> None:
        """Fills the pools, until it is cancelled."""
        tidied = 0.0
        while True:
            with contextlib.suppress(OvmsError, OSError, HttpError):
                if pools.any and time.monotonic() - tidied > _WARM_TIDY:
                    await self.changers.run(pools.tidy)
                    tidied = time.monotonic()
                while pools.any and await self.changers.run(pools.work):
                    pass
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._taken.wait(), _WARM_LOOK)
            self._taken.clear()

    # --- stops -------------------------------------------------------------------------------------------------

    def see_to(self, record: Record) -> None:
        """Asks the guest of an instance that is marked to power down, and ends the VM when its time is over."""
        if record.id not in self._stopping and not self._closing:
            task = asyncio.ensure_future(self._end(record))
            self._stopping[record.id] = task
            task.add_done_callback(lambda _: self._stopping.pop(record.id, None))
            self._keep(task)

    async def _end(self, record: Record) -> None:
        asked = False
        while (left := await self.readers.run(self._left, record)) is not None:
            with contextlib.suppress(OvmsError, OSError, HttpError):
                if left <= 0:
                    await self.changers.run(self._runtime.kill, record)
                elif not asked:
                    await self.changers.run(self._runtime.power_down, record)
                    asked = True
            await asyncio.sleep(min(max(left, 0.05), 1.0))

    def _left(self, record: Record) -> float | None:
        # None when there is nothing to be ended any more
        try:
            newest = self._runtime.instances.by_id(record.id)
        except OvmsError:
            return None
        if newest is None or self._runtime.instances.status(newest).state is not State.STOPPING:
            return None
        return self._runtime.instances.stop_left(newest)

    async def see_to_all(self) -> None:
        """The same for what other servers have not come to the end of."""

        def marked() -> list[Record]:
            instances = self._runtime.instances
            return [r for r in instances.records() if instances.stop_asked(r) and instances.status(r).state.alive]

        for record in await self.readers.run(marked):
            self.see_to(record)

    def beside(self, work: Callable[..., None], *arguments: Any) -> None:
        """Does what nobody waits for, in a thread that answers questions."""
        self._keep(asyncio.ensure_future(self._beside(work, *arguments)))

    async def _beside(self, work: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(OvmsError, OSError, HttpError):
            await self.readers.run(work, *arguments)

    # --- what killed commands left -----------------------------------------------------------------------------

    def mend(self, instance_id: str) -> None:
        """Finishes what was left half done with the guest of an instance: it goes on, and is thawed."""
        if instance_id not in self._mending and not self._closing:
            self._mending.add(instance_id)
            self._keep(asyncio.ensure_future(self._mend(instance_id)))

    async def _mend(self, instance_id: str) -> None:
        try:
            with contextlib.suppress(HttpError):
                await self.menders.run(self._runtime.instances.recover_one, instance_id)
        finally:
            self._mending.discard(instance_id)

    async def recover(self) -> None:
        """Finishes or takes back whatever was left half done."""
        await self.menders.run(self._runtime.instances.recover)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, grace: float) -> bool:
        """Lets what is begun come to its end, and breaks off starts that don't within *grace* seconds. VMs live on.

        False when something is at work still: a thread that waits for a registry can't be called back.
        """
        self._closing = True
        for task in self._stopping.values():
            task.cancel()  # the mark stays: the next server sees to it
        if not await self._idle(grace):
            for start in list(self._starts):
                start.break_off()
        idle = await self._idle(_BREAK_OFF)
        for pool in self._pools:
            pool.close()
        return idle

    async def _idle(self, patience: float) -> bool:
        # whether nothing is at work, in time
        end = time.monotonic() + patience
        while any(not pool.idle for pool in self._pools):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    @property
    def _pools(self) -> tuple[Pool, ...]:
        return (self.readers, self.changers, self.long, self.menders)


class Reported:
    """Progress as events."""

    def __init__(self, log: EventLog, instance_id: str) -> None:
        self._log = log
        self._instance_id = instance_id

    def task(self, label: str, total: int | None = None) -> Task:
        """A piece of work."""
        return _ReportedTask(self._log, self._instance_id, label, total)


class _ReportedTask:
    def __init__(self, log: EventLog, instance_id: str, label: str, total: int | None) -> None:
        self._log = log
        self._instance_id = instance_id
        self._label = label
        self._total = total
        self._done = 0
        self._last = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._report()
        return self

    def __exit__(self, *_: object) -> None:
        self._report()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            due = time.monotonic() - self._last >= _REPORT
        if due:
            self._report()

    def note(self, text: str) -> None:
        return None

    def waiting(self, text: str) -> None:
        return None

    def _report(self) -> None:
        self._last = time.monotonic()
        progress = {"label": self._label, "done": self._done, "total": self._total}
        self._log.add("progress", instance_id=self._instance_id, progress=progress)
