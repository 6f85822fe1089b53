"""Warm pools: clones of a RAM snapshot that are spawned, jailed and loaded, and stand still until somebody starts one.

A restore takes 50 ms and more, nearly all of it before the guest's first instruction. A parked clone has that behind it: what
is left of a start is to give it a name and to let its CPUs go (ADR 0023).

::

    parked/<uuid>/          an instance's directory, with its record; what is handed out is moved to instances/<uuid>/
    parked/.owner           locked by the server that has the pools
    warm.json               what the pools are to be

A server holds the pools, and ends what is parked when it ends. What a killed server left, whoever comes next ends.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ovms import fsutil, process
from ovms.artifact.resolve import Connect, Found, find, lookup, resolve
from ovms.errors import (
    Conflict,
    HostError,
    InputError,
    JsonInvalid,
    Locked,
    NameTaken,
    OvmsError,
    ReferenceNotFound,
    SnapshotIncompatible,
    VmmError,
)
from ovms.lazy import dataclass, field, replace
from ovms.progress import NULL, Progress
from ovms.runtime import names, network
from ovms.runtime import ports as port_forwards
from ovms.runtime.instances import LOCK
from ovms.runtime.record import Record, StartKey, save
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime, now
from ovms.spec import limits, strictjson
from ovms.spec.choices import RestorePolicy
from ovms.spec.digest import Digest
from ovms.vmm import watch
from ovms.vmm.model import PortForward
from ovms.vmm.protocol import Control

#: Seconds after which a parked clone is replaced: its guest's clock and its connections have been standing still for so long.
AGE_MAX: Final = 3600.0
#: A pool grows only while the host has as much memory left as this, and this part of it in all; else it shrinks.
RESERVE: Final = 512 * limits.MIB
_RESERVE_PART: Final = 20
#: Seconds after a hand-out in which nothing is spawned: the next one may come at once, and should find the host idle.
QUIET: Final = 0.05
#: Seconds that a clone has for its resume where nobody may wait for long: else it is given up.
PATIENCE: Final = 0.25
#: Seconds until a spawn is tried again that failed.
_RETRY: Final = 10.0
_OWNER: Final = ".owner"
_FILE_MAX: Final = 1 * limits.MIB
#: References whose digests are remembered, until the store's index changes.
_KNOWN_MAX: Final = 4096


@dataclass(frozen=True)
class _Parked:
    """A clone that waits: its record, its open control channel, its lock, and when it was made.

    The record is on disk as that of an instance already, so that a start that asks for nothing has nothing to write.
    """

    record: Record
    control: Control
    channel: contextlib.ExitStack
    lock: contextlib.ExitStack
    born: float

    @property
    def lives(self) -> bool:
        return self.record.process is not None and self.record.process.alive()


@dataclass()
class _Pool:
    """What waits for one reference. ``digest`` is what it stands for in the store."""

    reference: str
    size: int
    found: Found
    digest: Digest
    ready: deque[_Parked] = field(default_factory=deque)
    starting: int = 0
    handed_out: int = 0
    problem: OvmsError | None = None
    retry: float = 0.0

    def document(self) -> dict[str, Any]:
        return {
            "manifest": self.reference,
            "digest": self.found.artifact.digest,
            "size": self.size,
            "ready": len(self.ready),
            "starting": self.starting,
            "handed_out": self.handed_out,
            "problem": None if self.problem is None else self.problem.message,
        }


class Handed:
    """An instance that runs. :meth:`finish` writes down what had no time before, and lets go of its lock."""

    def __init__(self, runtime: Runtime, record: Record, held: contextlib.ExitStack, *, keep_identity: bool) -> None:
        self.record = record
        self._keep_identity = keep_identity
        self._runtime = runtime
        self._held = held

    def finish(self) -> None:
        """To be called once, after the caller has been answered."""
        with self._held, contextlib.suppress(OvmsError):
            record = self._runtime.instances.save(self.record)
            if not self._keep_identity:
                self._runtime.become(record)


class Pools:
    """The warm pools of a server. Safe for threads."""

    def __init__(self, runtime: Runtime, parked: Runtime, lock: contextlib.ExitStack) -> None:
        """See :func:`opened`."""
        self._runtime = runtime
        self._parked = parked
        self._lock = lock
        self._pools: dict[Digest | None, _Pool] = {}
        self._guard = threading.Lock()
        self._last = 0.0
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Digest | None] = {}
        self._closed = False
        #: What takes its time, and is nobody's to wait for: done by the next :meth:`work`, :meth:`tidy` or :meth:`close`.
        self._chores: deque[Callable[[], None]] = deque()

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._pools)

    # --- what they are to be -----------------------------------------------------------------------------------

    def set(self, reference: str, size: int, connect: Connect, progress: Progress = NULL) -> dict[str, Any]:
        """Lets *size* clones of an artifact's RAM snapshot wait from now on; 0 ends that. Returns what is there of it.

        Raises:
            SnapshotIncompatible: it has no RAM snapshot, or one that can't be restored on this host.
            OvmsError: it can't be found or fetched.
        """
        if not 0 <= size <= limits.WARM_MAX:
            raise InputError(f"a pool of {size} is out of range (0 to {limits.WARM_MAX})", rule="RUN-21")
        pool = self._named(reference)
        if size == 0:
            if pool is None:
                raise ReferenceNotFound(f"there is no warm pool of {reference[:120]!a}", hint="'ovm warm' lists them")
            with self._guard:
                del self._pools[pool.digest]
            pool.size = 0
            self._drop(pool)
        else:
            fresh = self._make(reference, size, connect, progress)
            with self._guard:
                pool = self._pools.setdefault(fresh.digest, fresh)
                pool.size, pool.retry, pool.problem = size, 0.0, None
        self._save()
        return pool.document()

    def _make(self, reference: str, size: int, connect: Connect, progress: Progress) -> _Pool:
        with self._runtime.layout.using():
            gate = self._runtime.gate(RunOptions(restore=RestorePolicy.REQUIRE))
            found = resolve(
                self._runtime.layout, connect, reference, progress=progress, gate=gate, guard=self._runtime.guard
            )
            if found.artifact.manifest.ram_snapshot is None:
                raise SnapshotIncompatible(
                    f"{found.name} has no RAM snapshot, and only those can wait in a warm pool",
                    hint="'ovm snapshot' makes one of a running instance",
                )
        known = lookup(self._runtime.layout, reference)
        return _Pool(reference, size, found, found.artifact.digest if known is None else known[1])

    def list(self) -> list[dict[str, Any]]:
        """What there is."""
        with self._guard:
            return [pool.document() for pool in self._pools.values()]

    def _named(self, reference: str) -> _Pool | None:
        with self._guard:
            for pool in self._pools.values():
                if reference in (pool.reference, pool.digest, pool.found.name):
                    return pool
        known = lookup(self._runtime.layout, reference)
        with self._guard:
            return None if known is None else self._pools.get(known[1])

    def _save(self) -> None:
        with self._guard:
            wanted = [{"manifest": pool.reference, "size": pool.size} for pool in self._pools.values()]
        data = strictjson.canonical({"version": 1, "pools": wanted})
        fsutil.atomic_write(self._runtime.root.pools, data, mode=0o600)

    def load(self, connect: Connect, said: Callable[[str], object]) -> None:
        """Makes the pools that there were before. What is not to be had is told to *said*, and left out."""
        path = self._runtime.root.pools
        try:
            document = strictjson.parse(path.read_bytes(), str(path), max_size=_FILE_MAX)
            wanted = [(str(item["manifest"]), int(item["size"])) for item in document["pools"]]
        except FileNotFoundError:
            return
        except (OSError, JsonInvalid, KeyError, TypeError, ValueError) as exc:
            said(f"{path} cannot be read, so there are no warm pools: {exc}")
            return
        for reference, size in wanted:
            try:
                pool = self._make(reference, size, connect, NULL)
            except (OvmsError, OSError) as exc:
                said(f"no warm pool of {reference[:120]!a}: {exc}")
                continue
            with self._guard:
                self._pools.setdefault(pool.digest, pool)

    # --- handing out -------------------------------------------------------------------------------------------

    def take(
        self, reference: str, options: RunOptions, key: StartKey | None = None, *, wait: bool = True
    ) -> Handed | None:
        """An instance that runs, from a pool; None where none waits for such a start. Its lock is held until ``finish``.

        Without *wait* it takes some milliseconds, and in no case more than :data:`PATIENCE` seconds: for a thread in which others
        wait.

        Raises:
            NameTaken: another instance has the name.
            Locked: without *wait*, where another command is adding an instance just now, or signatures have to be checked.
            Untrusted: and its kinds: a policy does not allow it.
        """
        if not self._pools or not _plain(options):
            return None
        pool = self._pools.get(self._lookup(reference))
        if pool is None:
            return None
        self._allow(pool, reference, wait)
        options = replace(options, ports=port_forwards.settle(options.ports))
        while True:
            try:
                parked = pool.ready.popleft()
            except IndexError:
                return None
            if parked.lives:
                break
            self._chores.append(functools.partial(self._end, parked))
        self._last = time.monotonic()
        try:
            return self._hand_out(pool, parked, options, key, wait)
        except BaseException:
            # what was moved already is an instance, and is found as one
            if parked not in pool.ready and self._parked.instances.directory(parked.record.id).exists():
                self._end(parked)
            raise

    def _allow(self, pool: _Pool, reference: str, wait: bool) -> None:
        # what a policy said of the clone may not hold any more
        guard, digest = self._runtime.guard, pool.found.artifact.digest
        if wait:
            guard.allow(digest, pool.found.name, asked=reference, ram=True)
        elif not guard.quick(digest, asked=reference, ram=True):
            raise Locked("signatures take their time")

    def _lookup(self, reference: str) -> Digest | None:
        # The index of a large store takes longer to read than all the rest of a start.
        stamp = self._runtime.layout.index_stamp()
        if stamp is None or stamp != self._stamp:
            self._stamp, self._known = stamp, {}
        if reference not in self._known:
            known = lookup(self._runtime.layout, reference)
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[reference] = None if known is None else known[1]
        return self._known[reference]

    def _hand_out(
        self, pool: _Pool, parked: _Parked, options: RunOptions, key: StartKey | None, wait: bool
    ) -> Handed | None:
        instances, began = self._runtime.instances, time.monotonic()
        instance_id = parked.record.id
        source, target = self._parked.instances.directory(instance_id), instances.directory(instance_id)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(fsutil.file_lock(instances.lock_path, timeout=None if wait else 0))
            except Locked:
                pool.ready.appendleft(parked)
                raise
            with held.pop_all():
                taken = {record.name: record for record in instances.records()}
                twice = key is not None and any(r.start_key and r.start_key.key == key.key for r in taken.values())
                if twice or (options.name is not None and names.check(options.name) in taken):
                    pool.ready.appendleft(parked)
                    if twice:
                        return None  # the usual way knows what to say
                    assert options.name is not None
                    raise NameTaken(
                        f"the name {options.name} is taken by the instance {taken[options.name].id}",
                        hint=f"choose another, or remove that one: 'ovm rm {options.name}'",
                        instance=taken[options.name].id,
                    )
                record = parked.record
                if options.ports:
                    self._forward(parked, options.ports)
                if options.name is not None:
                    record = replace(record, name=options.name)
                elif record.name in taken:
                    record = replace(record, name=names.make(pool.found.artifact.manifest.name, instance_id, taken))
                if options.ports or options.remove_on_exit or key is not None:
                    record = replace(record, ports=options.ports, remove_on_exit=options.remove_on_exit, start_key=key)
                if record is not parked.record:
                    save(source, record, durable=False)
                source.rename(target)
            held.push(parked.lock.pop_all())
            try:
                with parked.channel:
                    parked.control.resume(timeout=None if wait else PATIENCE)
            except VmmError:
                # it died in this very moment: whoever asked gets another
                self._chores.append(functools.partial(self._bury, record))
                return None
            ready_ms = round((time.monotonic() - began) * 1000, 2)
            pool.handed_out += 1
            when, timings = now(), {"resume": ready_ms}
            record = replace(record, pausing=False, created=when, started=when, start_ms=ready_ms, timings=timings)
            return Handed(self._runtime, record, held.pop_all(), keep_identity=options.keep_identity)

    def _bury(self, record: Record) -> None:
        with contextlib.suppress(OvmsError, OSError):
            _kill(record)
            self._runtime.instances.remove(record)

    def _do_chores(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._chores.popleft()()

    def _forward(self, parked: _Parked, ports: tuple[PortForward, ...]) -> None:
        record = parked.record
        if record.network.kind is network.Kind.SLIRP:
            for port in ports:
                parked.control.add_forward(port)
        else:
            directory = self._parked.instances.directory(record.id)
            network.rewire(parked.control, ports, directory, mac=record.machine.mac, user=record.jail.user)

    # --- filling -----------------------------------------------------------------------------------------------

    def work(self) -> bool:
        """One step: spawns one clone where one is missing. Whether there is more to do just now."""
        self._do_chores()
        if self._closed or not (pool := self._neediest()):
            return False
        if pool.ready and (quiet := self._last + QUIET - time.monotonic()) > 0:
            time.sleep(quiet)
            return True
        pool.starting += 1
        try:
            parked = self._spawn(pool)
        except (OvmsError, OSError) as exc:
            pool.problem = exc if isinstance(exc, OvmsError) else HostError(str(exc))
            pool.retry = time.monotonic() + _RETRY
            return True
        finally:
            pool.starting -= 1
        pool.problem = None
        pool.ready.append(parked)
        if pool.size == 0 or self._closed:  # ended meanwhile
            self._drop(pool)
        return True

    def _neediest(self) -> _Pool | None:
        if _short_of_memory():
            return None
        with self._guard:
            missing = [
                pool
                for pool in self._pools.values()
                if len(pool.ready) + pool.starting < pool.size and pool.retry <= time.monotonic()
            ]
        return min(missing, key=lambda pool: (len(pool.ready) + pool.starting) / pool.size, default=None)

    def _spawn(self, pool: _Pool) -> _Parked:
        runtime = self._parked
        with runtime.layout.using():
            started = runtime.start(pool.found, RunOptions(restore=RestorePolicy.REQUIRE, parked=True))
        directory = runtime.instances.directory(started.record.id)
        # should who hands it out be killed, the next command lets it go on: as after a snapshot
        record = replace(started.record, reference=pool.found.name, warm=True, pausing=True)
        with contextlib.ExitStack() as channel, contextlib.ExitStack() as lock:
            try:
                lock.enter_context(fsutil.file_lock(directory / LOCK))
                control = channel.enter_context(runtime.instances.control(record))
                save(directory, record, durable=False)
            except BaseException:
                self._discard(record)
                raise
            return _Parked(record, control, channel.pop_all(), lock.pop_all(), time.monotonic())

    def tidy(self) -> None:
        """Ends clones that are too old, dead or too many; all of those of a name that stands for something else now."""
        self._do_chores()
        with self._guard:
            pools = list(self._pools.values())
        short = _short_of_memory()
        for pool in pools:
            self._follow(pool)
            for _ in range(len(pool.ready)):
                try:
                    parked = pool.ready.popleft()
                except IndexError:
                    break
                old = time.monotonic() - parked.born > AGE_MAX
                if short or old or not parked.lives or len(pool.ready) >= pool.size:
                    self._end(parked)
                else:
                    pool.ready.append(parked)

    def _follow(self, pool: _Pool) -> None:
        try:
            known = lookup(self._runtime.layout, pool.reference)
            if known is None or known[1] == pool.digest:
                return
            found = find(self._runtime.layout, pool.reference)
            if found.artifact.manifest.ram_snapshot is None:
                return
        except OvmsError:
            return
        fresh = _Pool(pool.reference, pool.size, found, known[1])
        with self._guard:
            self._pools.pop(pool.digest, None)
            self._pools.setdefault(fresh.digest, fresh)
        pool.size = 0
        self._drop(pool)

    def _drop(self, pool: _Pool) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._end(pool.ready.popleft())

    def _end(self, parked: _Parked) -> None:
        with contextlib.suppress(VmmError):
            parked.channel.close()
        self._discard(parked.record)
        parked.lock.close()

    def _discard(self, record: Record) -> None:
        _kill(record)
        with contextlib.suppress(OvmsError, OSError):
            self._parked.instances.remove(record)

    def close(self) -> None:
        """Ends what is parked."""
        self._closed = True
        with self._guard:
            pools = list(self._pools.values())
        for pool in pools:
            self._drop(pool)
        self._do_chores()
        self._lock.close()


def opened(runtime: Runtime) -> Pools:
    """The pools of a server, empty; what a killed server has left parked is ended.

    Raises:
        Conflict: another server has the pools of this root.
    """
    root = runtime.root
    root.parked.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(fsutil.file_lock(root.parked / _OWNER, timeout=0))
        except Locked:
            raise Conflict("another server has the warm pools of this root") from None
        parked = Runtime(root, parked=True)
        sweep(parked)
        return Pools(runtime, parked, lock.pop_all())


def sweep_left(root: Root) -> None:
    """Ends what a killed server has left parked; nothing where a server lives."""
    try:
        with fsutil.file_lock(root.parked / _OWNER, timeout=0):
            sweep(Runtime(root, parked=True))
    except (FileNotFoundError, Locked):
        return


def sweep(parked: Runtime) -> None:
    """Ends everything that is parked (under the owner's lock)."""
    instances = parked.instances
    for record in instances.records():
        # one that was just being made is not in its record yet
        left = watch.find(instances.files(record)) if record.process is None else record.watched
        if left is not None:
            left.vmm.kill()
            left.watcher.wait(5.0)
        with contextlib.suppress(OvmsError, OSError):
            instances.remove(record)
    instances.recover()  # directories without a record


def _kill(record: Record) -> None:
    if record.process is not None:
        record.process.kill()
    if record.watcher is not None:
        record.watcher.wait(5.0)


def _plain(options: RunOptions) -> bool:
    # one that asks for nothing which is settled when a clone is spawned
    asked = replace(options, name=None, remove_on_exit=False, ports=(), restore=RestorePolicy.AUTO, keep_identity=False)
    return asked == RunOptions() and options.restore is not RestorePolicy.NEVER


def _short_of_memory() -> bool:
    available, total = process.memory_available(), process.memory_total()
    return available < max(RESERVE, total // _RESERVE_PART)
