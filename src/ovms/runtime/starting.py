"""Starts that are answered before they are done: the instance has an ID and a record before its artifact is found.

Whoever starts one holds its lock until the VM runs, so the state is ``starting`` as long as there is somebody who works on it,
and no longer. A stop or a forced removal leaves a mark, which breaks the start off at its next step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ovms import fsutil
from ovms.artifact import ram
from ovms.artifact.resolve import Connect, Found, PullPolicy, allow, find, resolve
from ovms.errors import Conflict, HostError, InputError, Interrupted, OvmsError, ReferenceNotFound
from ovms.lazy import dataclass, replace
from ovms.oci import transport
from ovms.oci.platform import Platform
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress, Task
from ovms.runtime import ports
from ovms.runtime.record import Record, StartKey
from ovms.runtime.runtime import DEFAULT_MEMORY, DEFAULT_VCPUS, RunOptions, Runtime, Started, ms_since, now
from ovms.spec import api
from ovms.spec.choices import Accel
from ovms.vmm.jail import Jail
from ovms.vmm.model import Machine

#: Seconds between two looks at whether the start is to be broken off.
_LOOK: Final = 0.1


class Start:
    """A start that has an instance. ``run`` is called once; the instance's lock is held until it returns."""

    def __init__(
        self,
        runtime: Runtime,
        record: Record,
        lock: ExitStack,
        text: str,
        options: RunOptions,
        known: _Known | None = None,
    ) -> None:
        """*known*: what *text* was found to name a moment ago."""
        self.record = record
        #: Called when the artifact is in the store: an answer need not wait any longer.
        self.on_resolved: Callable[[], object] = lambda: None
        #: Why it failed.
        self.error: OvmsError | None = None
        self._runtime = runtime
        self._lock = lock
        self._text = text
        self._options = options
        self._known = known
        self._claim = threading.Lock()
        self._settled: str | None = None
        self._broken_off = False

    def answered(self) -> bool:
        """To be called before the caller is told of the instance: from then on it stays, whatever becomes of the start.

        False when the start has failed already, and nothing is left of it.
        """
        return self._settle("answered")

    def break_off(self) -> None:
        """Breaks the start off at its next step: the program ends."""
        self._broken_off = True

    def fail(self, error: OvmsError) -> None:
        """Gives a start up that was never run."""
        with self._lock:
            self._failed(error)

    def _settle(self, how: str) -> bool:
        with self._claim:
            if self._settled is None:
                self._settled = how
            return self._settled == how

    def run(
        self,
        connect: Connect,
        *,
        policy: PullPolicy = "missing",
        platform: Platform | None = None,
        progress: Progress = NULL,
    ) -> Started:
        """Finds or pulls the artifact, and starts the VM.

        Raises:
            OvmsError: what :func:`~ovms.artifact.resolve.resolve` and :meth:`Runtime.start` raise. The instance is in the
                state ``error`` then, and says why, or ``stopped`` where it was to be broken off; or nothing is left of it
                where nobody was told of it yet.
        """
        watched = _Watched(progress, self._look)
        with self._lock:
            try:
                with self._runtime.layout.using():
                    found = self._find(connect, policy, platform, watched)
                    self._look()
                    self.on_resolved()
                    return self._runtime.start(found, self._options, watched, pending=self.record)
            except OvmsError as exc:
                self._failed(exc)
                raise
            except OSError as exc:
                error = host_error(exc)
                self._failed(error)
                raise error from exc
            except BaseException as exc:
                self._failed(OvmsError(f"a fault of ovms itself: {type(exc).__name__}"))
                raise

    def _find(self, connect: Connect, policy: PullPolicy, platform: Platform | None, progress: Progress) -> Found:
        layout, guard, began = self._runtime.layout, self._runtime.guard, time.monotonic()
        gate, timings = self._runtime.gate(self._options), {}
        try:
            if policy == "always" or transport.parse_place(self._text) is not None:
                raise ReferenceNotFound(self._text)
            known = self._known if platform is None else None
            # nothing was named anew since, so it is read once; that all of it is still there is asked in any case
            same = known is not None and known.stamp is not None and known.stamp == layout.index_stamp()
            found = known.found if known is not None and same else find(layout, self._text, platform)
            allow(guard, found, self._text, connect if policy != "never" else None)
            timings["resolve"] = ms_since(began)
            if ram.left_out(layout, found.artifact):
                began = time.monotonic()
                fetch = policy != "never"
                found = ram.complete(layout, connect, found, gate, fetch=fetch, progress=progress, guard=guard)
                timings["pull"] = ms_since(began)
        except ReferenceNotFound:
            timings["resolve"] = ms_since(began)
            began = time.monotonic()
            found = resolve(
                layout,
                connect,
                self._text,
                policy=policy,
                progress=progress,
                platform=platform,
                gate=gate,
                guard=guard,
            )
            timings["pull"] = ms_since(began)
        self.record = replace(self.record, timings=timings)
        return found

    def _look(self) -> None:
        instances = self._runtime.instances
        # gone: removed by force
        if instances.gone(self.record) or self._broken_off or instances.stop_asked(self.record):
            raise Interrupted(f"the start of {self.record.name} was broken off")

    def _failed(self, error: OvmsError) -> None:
        instances = self._runtime.instances
        self.error = error
        newest = instances.newest(self.record)
        if newest is None:
            return
        instances.end_unnoted(newest)
        if self._settle("failed"):
            instances.remove(newest)
            return
        instances.clear(newest)
        stopped = instances.stop_asked(newest)
        problem = None if stopped else api.problem(error)
        instances.save(
            replace(newest, problem=problem, stop_requested=stopped, overlays=(), ram_image=None, jail=Jail())
        )


def begin(
    runtime: Runtime,
    text: str,
    options: RunOptions,
    *,
    key: StartKey | None = None,
) -> Start | Record:
    """Makes the instance of a start. Returns the instance that *key* has made already, where there is one.

    What can be seen at once is refused at once: a reference that is none, an artifact that neither is here nor has a registry
    to come from, a port or a name that is taken.

    Raises:
        Conflict: *key* has made an instance by another request.
        OvmsError: nothing is left of the start then.
    """

    def known(record: Record) -> bool:
        return key is not None and record.start_key is not None and record.start_key.key == key.key

    if key is not None and (there := next(filter(known, runtime.instances.records()), None)) is not None:
        return _same(there, key)
    vmm = runtime.vmm(options.runtime)
    name, found = _name(runtime, text)
    settled = ports.settle(options.ports)
    machine = Machine(
        machine_type="",
        accel=options.accel or Accel.TCG,
        cpu="",
        cpu_flags=(),
        memory=options.memory or DEFAULT_MEMORY,
        vcpus=options.vcpus or DEFAULT_VCPUS,
        mac="",
        disk_size=None,
    )

    def make(instance_id: str, instance_name: str) -> Record:
        return Record(
            id=instance_id,
            name=instance_name,
            created=now(),
            reference=text,
            digest=None,
            vmm=vmm.name,
            vmm_version="",
            machine=machine,
            accel_reason=None,
            ports=settled,
            overlays=(),
            remove_on_exit=options.remove_on_exit,
            resolved=False,
            start_key=key,
        )

    record, lock = runtime.instances.add(make, name, options.name, known=known)
    if lock is None:  # another call with the same key was faster
        return _same(record, key)
    return Start(runtime, record, lock, text, options, found)


def _same(record: Record, key: StartKey | None) -> Record:
    if record.start_key != key:
        raise Conflict(
            f"the Idempotency-Key has made the instance {record.name} by another request",
            hint="a key stands for one request: make a new one for each",
            rule="RUN-11",
        )
    return record


@dataclass(frozen=True)
class _Known:
    """An artifact that was found when the store's index was as *stamp* tells."""

    found: Found
    stamp: tuple[int, int, int] | None


def _name(runtime: Runtime, text: str) -> tuple[str, _Known | None]:
    # What the instance is named after, and the artifact where it is here; raises what can be known at once.
    place = transport.parse_place(text)
    if place is not None:
        # what a file calls itself is a proposal, and good enough for a name to begin with
        tag = place.tag
        return Reference.parse(tag).repository if tag and _is_reference(tag) else place.path.stem, None
    if text.startswith(("/", "./", "../")):
        raise InputError(f"{text[:120]!a} is a path of an unpacked artifact, which this version does not start")
    stamp = runtime.layout.index_stamp()
    try:
        found = find(runtime.layout, text)
        return found.artifact.manifest.name, _Known(found, stamp)
    except ReferenceNotFound:
        reference = Reference.parse(text)
        if reference.registry is None:
            raise
        return reference.repository, None


def host_error(exc: OSError) -> OvmsError:
    """What the host has refused, as an error that says where."""
    place = str(exc.filename or "")
    full = fsutil.disk_full(exc, place or "a start", Path(place).parent)
    return full or HostError(f"{place}: {exc.strerror}" if place else exc.strerror or type(exc).__name__)


def _is_reference(text: str) -> bool:
    try:
        Reference.parse(text)
    except OvmsError:
        return False
    return True


class _Watched:
    """Progress that is passed on, and asks now and then whether the work is to go on."""

    def __init__(self, progress: Progress, look: Callable[[], None]) -> None:
        self._progress = progress
        self._look = look
        self._last = 0.0

    def task(self, label: str, total: int | None = None) -> Task:
        self.look()
        return _WatchedTask(self._progress.task(label, total), self.look)

    def look(self) -> None:
        now = time.monotonic()
        if now - self._last >= _LOOK:
            self._last = now
            self._look()


class _WatchedTask:
    def __init__(self, task: Task, look: Callable[[], None]) -> None:
        self._task = task
        self._look = look

    def __enter__(self) -> Self:
        self._task.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.__exit__(kind, exc, trace)

    def advance(self, amount: int) -> None:
        self._task.advance(amount)
        self._look()

    def note(self, text: str) -> None:
        self._task.note(text)

    def waiting(self, text: str) -> None:
        self._look()
        self._task.waiting(text)
