"""The calls of the contract: from requests to the runtime, and from what it says to answers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.parse
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from ovms import __version__
from ovms.artifact.resolve import push
from ovms.errors import InputError, Locked, NotFound, OvmsError, Unsupported, UsageError
from ovms.lazy import regex
from ovms.oci import transport
from ovms.runtime import logrecords, snapshots
from ovms.runtime.document import instance
from ovms.runtime.figures import Usage
from ovms.runtime.instances import Status
from ovms.runtime.record import Record, StartKey
from ovms.runtime.runtime import RUNTIMES, RunOptions, Runtime
from ovms.runtime.server.gate import Gate
from ovms.runtime.server.http import Answer, HttpError, Request
from ovms.runtime.server.jobs import Jobs
from ovms.runtime.server.metrics import Metrics
from ovms.runtime.starting import Start, begin, host_error
from ovms.runtime.warm import Pools
from ovms.runtime.watching import EventLog
from ovms.spec import api, limits
from ovms.spec.digest import of_bytes
from ovms.spec.states import Call, State, after
from ovms.text import printable
from ovms.vmm.model import PortForward

#: Seconds that the answer of a start waits for its artifact: what fails so soon is answered as an error (RUN-8).
PATIENCE: Final = 0.5
#: Seconds between two looks at a log that is followed, and before a line without an end is given out.
_LOG_LOOK: Final = 0.2
_LINE_PATIENCE: Final = 1.0
#: Bytes of a stream that are put together before they are written.
_CHUNK: Final = 64 * 1024
_TARGET_MAX: Final = 8192

_ROUTES: Final[Mapping[str, Mapping[str, api.Operation]]] = {
    path: {one.method: one for one in api.OPERATIONS if one.path == path} for path in {o.path for o in api.OPERATIONS}
}
#: Of each call that has a query: its parameters.
QUERIES: Final[Mapping[str, frozenset[str]]] = {
    "logs": frozenset({"follow", "tail", "since"}),
    "instances": frozenset({"state"}),
    "events": frozenset({"follow", "since"}),
}
_NUMBER: Final = regex(r"[0-9]{1,18}")
_ID: Final = regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")

Query = Mapping[str, list[str]]


class App:
    """Answers requests."""

    def __init__(
        self,
        runtime: Runtime,
        log: EventLog,
        jobs: Jobs,
        gate: Gate,
        connections: Callable[[], int],
        pools: Pools | None = None,
    ) -> None:
        """*pools*: None where another server of this root has them."""
        self._runtime = runtime
        self._pools = pools
        self._instances = runtime.instances
        self._log = log
        self._jobs = jobs
        self._gate = gate
        self._usage = Usage(runtime.instances)
        self._metrics = Metrics(self._statuses, connections)
        self._changes: Mapping[str, Callable[[Any], Awaitable[Answer]]] = {
            "stop": self._stop,
            "pause": self._pause,
            "resume": self._resume,
            "snapshot": self._snapshot,
            "inject": self._inject,
            "remove": self._remove,
            "warm": self._warm,
        }
        self._questions: Mapping[str, Callable[[str, Query], Awaitable[Answer]]] = {
            "status": self._status,
            "logs": self._logs,
            "instances": self._list,
            "events": self._events,
            "pools": self._list_pools,
            "health": self._health,
            "metrics": self._figures,
            "version": self._version,
        }
        #: Set when the server ends: streams end, too.
        self.ending = asyncio.Event()

    # --- requests ----------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> int:
        """See :class:`~ovms.runtime.server.http.Handler`."""
        self._gate.check(request)
        operation, _, _ = _route(request)
        if operation.request is None:
            return limits.API_BODY_MAX  # nobody asked for it; it is read, and left aside
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != api.JSON:
            what = f"of the type {media_type[:80]}" if media_type else "without a Content-Type"
            raise HttpError(InputError(f"the request is {what}; it must be {api.JSON}", rule="RUN-2"), 415)
        return limits.API_BODY_MAX

    async def answer(self, request: Request, body: bytes) -> Answer:
        """See :class:`~ovms.runtime.server.http.Handler`."""
        began = time.monotonic()
        operation, argument, query = _route(request)
        try:
            answer = await self._answer(operation, argument, query, request, body)
        except HttpError as exc:
            answer = exc.answer()
        except OvmsError as exc:
            answer = HttpError(exc).answer()
        except OSError as exc:
            answer = HttpError(host_error(exc)).answer()
        except Exception as exc:  # noqa: BLE001 - no fault of ours may end the server
            print(  # noqa: T201
                f"ovm: internal error in {operation.name}: {type(exc).__name__}: {printable(str(exc), 500)}",
                file=sys.stderr,
            )
            fault = OvmsError("a fault of ovms itself", hint="the server's log says more; report it")
            answer = HttpError(fault).answer()
        self._metrics.requests.labels(operation.name, str(answer.status)).inc()
        self._metrics.seconds.labels(operation.name).observe(time.monotonic() - began)
        return answer

    async def _answer(
        self, operation: api.Operation, argument: str, query: Query, request: Request, body: bytes
    ) -> Answer:
        unknown = set(query) - QUERIES.get(operation.name, frozenset())
        if unknown and operation.name in QUERIES:
            known = ", ".join(sorted(QUERIES[operation.name]))
            raise UsageError(f"{min(unknown)[:80]!a} is no parameter of this call", hint=f"known are {known}")
        if operation.request is not None:
            parsed = api.parse_body(operation, body)
            if isinstance(parsed, api.StartRequest):
                return await self._start(parsed, request, body)
            return await self._changes[operation.name](parsed)
        return await self._questions[operation.name](argument, query)

    # --- what changes instances --------------------------------------------------------------------------------

    async def _start(self, request: api.StartRequest, http: Request, body: bytes) -> Answer:
        key = http.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= limits.KEY_MAX:
            raise InputError(f"the Idempotency-Key must have 1 to {limits.KEY_MAX} characters", rule="RUN-11")
        start_key = None if key is None else StartKey(of_bytes(key.encode()), of_bytes(body))
        options = _options(request.overrides)
        place = transport.parse_place(request.manifest)
        if place is not None and not place.path.is_absolute():
            raise InputError(f"the path {str(place.path)[:120]!a} must begin with '/'", rule="RUN-7")

        def work() -> Start | Record:
            return begin(self._runtime, request.manifest, options, key=start_key)

        # beside what the contract asks for: whoever follows the events from there on misses nothing of this start
        seq = self._log.last
        if (warm := await self._take(request.manifest, options, start_key)) is not None:
            return Answer.json({**warm, "status": "starting", "event_seq": seq})
        begun = await self._jobs.changers.run(work)
        if isinstance(begun, Record):
            document = await self._jobs.readers.run(lambda: instance(self._instances.status(begun)))
        else:
            document = instance(Status(begun.record, State.STARTING))
            await self._jobs.start(begun, PATIENCE)
        return Answer.json({**document, "status": "starting", "event_seq": seq})

    async def _take(self, reference: str, options: RunOptions, key: StartKey | None) -> dict[str, Any] | None:
        # of a warm pool, where one has what is asked for
        if self._pools is None or not self._pools.any:
            return None
        take = self._pools.take
        try:
            if options.ports:
                raise Locked("forwards take their time")
            # here, and in no other thread: to wake one, and to be woken by it, takes as long as all the rest
            handed = take(reference, options, key, wait=False)
        except Locked:
            handed = await self._jobs.changers.run(take, reference, options, key)
        if handed is None:
            self._jobs.refill()
            return None
        self._jobs.finish(handed)
        return instance(Status(handed.record, State.RUNNING))

    async def _warm(self, request: api.WarmRequest) -> Answer:
        if self._pools is None:
            raise Unsupported("another server of this root has the warm pools", rule="RUN-21")
        document = await self._jobs.long.run(self._pools.set, request.manifest, request.size, self._jobs.connect)
        self._jobs.refill()
        return Answer.json(document)

    async def _list_pools(self, _argument: str, _query: Query) -> Answer:
        return Answer.json({"pools": [] if self._pools is None else self._pools.list()})

    async def _stop(self, request: api.StopRequest) -> Answer:
        grace = 0 if request.force else request.timeout_s

        def work() -> Record | None:
            record = self._instances.find(request.instance_id)
            state = self._instances.status(record).state
            after(state, Call.STOP, record.name)
            if not state.alive:
                self._runtime.leave_ended(record)
                return None
            if state is not State.STOPPING or grace == 0:
                self._instances.ask_to_stop(record, grace)
            return record

        # a mark needs no lock: a snapshot that goes on does not hold the answer up
        record = await self._jobs.readers.run(work)
        if record is not None:
            self._jobs.see_to(record)
        return Answer.json({"status": "stopping"})

    async def _pause(self, request: api.InstanceRequest) -> Answer:
        await self._jobs.changers.run(lambda: self._runtime.pause(self._instances.find(request.instance_id)))
        return Answer.json({"status": "ok"})

    async def _resume(self, request: api.InstanceRequest) -> Answer:
        await self._jobs.changers.run(lambda: self._runtime.resume(self._instances.find(request.instance_id)))
        return Answer.json({"status": "ok"})

    async def _remove(self, request: api.RemoveRequest) -> Answer:
        def work() -> None:
            record = self._instances.find(request.instance_id)
            self._runtime.remove(record, force=request.force)
            self._usage.forget(record.id)

        await self._jobs.changers.run(work)
        return Answer.json({"status": "ok"})

    async def _inject(self, request: api.InjectRequest) -> Answer:
        def work() -> None:
            record = self._instances.find(request.instance_id)
            after(self._instances.status(record).state, Call.INJECT, record.name)
            self._runtime.inject(record, request.device, request.offset, request.data)

        await self._jobs.changers.run(work)
        return Answer.json({"status": "ok"})

    async def _snapshot(self, request: api.SnapshotRequest) -> Answer:
        name = None if request.tag is None else transport.new_name(request.tag)

        def work() -> dict[str, Any]:
            record = self._instances.find(request.instance_id)
            taken = snapshots.take(
                self._runtime, record, name, leave=request.leave, scrub=request.scrub, encrypt=request.encrypt
            )
            answer: dict[str, Any] = {**taken.to_json(), "pushed": False}
            if name is not None:
                answer["reference"] = str(name)
                if name.registry is not None:
                    push(self._runtime.layout, self._jobs.connect, str(name))
                    answer["pushed"] = True
            self._log.add("snapshot", instance_id=record.id, snapshot_ref=taken.artifact.digest)
            return answer

        # a state that does not allow it is told at once, however many snapshots are waited for
        def check() -> None:
            record = self._instances.find(request.instance_id)
            after(self._instances.status(record).state, Call.SNAPSHOT, record.name)

        await self._jobs.readers.run(check)
        return Answer.json(await self._jobs.long.run(work))

    # --- what asks ---------------------------------------------------------------------------------------------

    async def _status(self, argument: str, _query: Query) -> Answer:
        def work() -> dict[str, Any]:
            record = self._find(argument)
            status = self._instances.status(record)
            metrics = self._usage.of(record) if status.state.alive else None
            return instance(status, files=self._instances.files(record), metrics=metrics)

        if (document := self._status_at_hand(argument)) is not None:
            return Answer.json(document)
        return Answer.json(await self._jobs.readers.run(work))

    def _status_at_hand(self, argument: str) -> dict[str, Any] | None:
        # A VM that lives, with figures that are fresh: nothing of it has to be waited for, and to wake a thread, and to be woken by
        # it, takes longer than all the rest. So questions that are asked all the time don't contend with what is at work.
        record = self._instances.known(argument)
        if record is None or record.half_done or (found := self._usage.at_hand(record)) is None:
            return None
        metrics, due = found
        if due:
            self._jobs.beside(self._usage.renew, record)
        return instance(self._instances.living(record), files=self._instances.files(record), metrics=metrics)

    def _find(self, argument: str) -> Record:
        if not _ID.fullmatch(argument):
            raise self._no_instance(argument)
        return self._instances.find(argument)

    @staticmethod
    def _no_instance(argument: str) -> OvmsError:
        from ovms.errors import InstanceNotFound

        return InstanceNotFound(f"there is no instance {argument[:80]!a}", hint="GET /instances lists all of them")

    def _statuses(self) -> list[Status]:
        return [self._instances.status(record) for record in self._instances.records()]

    async def _list(self, _argument: str, query: Query) -> Answer:
        wanted = set()
        for text in query.get("state", []):
            for name in text.split(","):
                if name not in list(State):
                    raise UsageError(f"{name[:40]!a} is no state", hint=f"states are {', '.join(State)}")
                wanted.add(State(name))

        def work() -> list[dict[str, Any]]:
            return [instance(s) for s in self._statuses() if not wanted or s.state in wanted]

        return Answer.json({"instances": await self._jobs.readers.run(work)})

    async def _logs(self, argument: str, query: Query) -> Answer:
        follow, tail = _flag(query, "follow"), _number(query, "tail")
        since = _one(query, "since")
        since_ns = 0 if since is None else _time_ns(since)
        record = await self._jobs.readers.run(self._find, argument)
        return Answer(self._log_records(record, follow, tail, since_ns), api.NDJSON)

    async def _log_records(
        self, record: Record, follow: bool, tail: int | None, since_ns: int
    ) -> AsyncGenerator[bytes, None]:
        files = self._instances.files(record)
        run = self._jobs.readers.run
        reader = logrecords.LogReader(files, since_ns=since_ns)
        skip = 0
        if tail is not None:
            skip = max(0, await run(lambda: sum(1 for _ in logrecords.read_all(files, since_ns=since_ns))) - tail)
        quiet_since = time.monotonic()
        while True:
            # looked at before the last read, so nothing is missed
            alive = follow and not self.ending.is_set() and await run(self._alive, record.id)
            records = reader.read()
            while chunk := await run(_take, records):
                quiet_since = time.monotonic()
                lines, skip = chunk[skip:], max(0, skip - len(chunk))
                yield _lines(lines)
            if not alive or time.monotonic() - quiet_since >= _LINE_PATIENCE:
                rest = list(reader.rest())
                yield _lines(rest[skip:])
                skip = max(0, skip - len(rest))
            if not alive:
                return
            await asyncio.sleep(_LOG_LOOK)

    def _alive(self, instance_id: str) -> bool:
        try:
            record = self._instances.by_id(instance_id)
        except OvmsError:
            return False
        return record is not None and self._instances.status(record).state.alive

    async def _events(self, _argument: str, query: Query) -> Answer:
        follow, since = _flag(query, "follow"), _number(query, "since")
        return Answer(self._event_records(follow, since), api.NDJSON)

    async def _event_records(self, follow: bool, since: int | None) -> AsyncGenerator[bytes, None]:
        more = asyncio.Event()
        loop = asyncio.get_running_loop()
        with self._log.listening(lambda: loop.call_soon_threadsafe(more.set)):
            while True:
                more.clear()
                text, since = self._log.text_after(since)
                for at in range(0, len(text), _CHUNK):
                    yield text[at : at + _CHUNK]
                if not follow or self.ending.is_set():
                    return
                news, end = asyncio.ensure_future(more.wait()), asyncio.ensure_future(self.ending.wait())
                try:
                    await asyncio.wait((news, end), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
                    end.cancel()

    async def _health(self, _argument: str, _query: Query) -> Answer:
        await self._jobs.readers.run(self._runtime.root.prepare)
        return Answer.json({"status": "ok"})

    async def _figures(self, _argument: str, _query: Query) -> Answer:
        return Answer(await self._jobs.readers.run(self._metrics.text), f"{api.METRICS}; charset=utf-8")

    async def _version(self, _argument: str, _query: Query) -> Answer:
        return Answer.json(await self._jobs.readers.run(self._about))

    def _about(self) -> dict[str, Any]:
        vmms = []
        for name in RUNTIMES:
            about = {"name": name}
            try:
                vmm = self._runtime.vmm(name)
                about |= {"version": vmm.version, "accel": str(vmm.choose_accel(None).accel)}
            except OvmsError:
                pass  # not installed: 'ovm doctor' tells why
            vmms.append(about)
        return {
            "name": "ovms",
            "version": __version__,
            "spec": ["0.1"],
            "roles": ["producer", "reader", "runtime"],
            "vmms": vmms,
        }


def _route(request: Request) -> tuple[api.Operation, str, Query]:
    """The operation of a request, what stands in its path, and its query.

    Raises:
        HttpError: there is none.
    """
    target = request.target
    if len(target) > _TARGET_MAX or not target.startswith("/"):
        raise HttpError(NotFound("the request's path is none", rule="RUN-5"))
    path, _, query_text = target.partition("?")
    head, _, argument = path[1:].partition("/")
    operations = _ROUTES.get(f"/{head}") if not argument and path == f"/{head}" else None
    if operations is None and argument:
        operations = _ROUTES.get(f"/{head}/{{instance_id}}")
    if operations is None:
        shown = urllib.parse.unquote(path)[:80]
        raise HttpError(NotFound(f"there is no path {shown!a} in the contract", rule="RUN-5"))
    operation = operations.get(request.method)
    if operation is None:
        allowed = ", ".join(sorted(operations))
        error = InputError(f"/{head} is for {allowed}, not {request.method[:20]}", rule="RUN-5")
        raise HttpError(error, 405, {"Allow": allowed})
    query: Query = {}
    try:
        if query_text:
            query = urllib.parse.parse_qs(query_text, keep_blank_values=True, max_num_fields=64, errors="replace")
    except ValueError:
        raise HttpError(UsageError("the query has too many parameters")) from None
    return operation, urllib.parse.unquote(argument, errors="replace"), query


def _options(overrides: api.Overrides) -> RunOptions:
    if overrides.bootstrap is not None:
        raise Unsupported("this version runs no bootstrap configs", rule="RUN-10")
    return RunOptions(
        name=overrides.name,
        memory=overrides.memory,
        vcpus=overrides.cpus,
        ports=tuple(PortForward(p.host_ip, p.host_port, p.guest_port, str(p.protocol)) for p in overrides.ports),
        accel=overrides.accel,
        restore=overrides.restore,
        remove_on_exit=overrides.remove_on_exit,
        keep_identity=overrides.keep_identity,
    )


def _one(query: Query, name: str) -> str | None:
    values = query.get(name, [])
    if len(values) > 1:
        raise UsageError(f"{name} may be given once")
    return values[0] if values else None


def _flag(query: Query, name: str) -> bool:
    text = _one(query, name)
    if text not in (None, "true", "false"):
        raise UsageError(f"{name} must be true or false, not {text[:40]!a}")
    return text == "true"


def _number(query: Query, name: str) -> int | None:
    text = _one(query, name)
    if text is not None and not _NUMBER.fullmatch(text):
        raise UsageError(f"{name} must be a number from 0 on, not {text[:40]!a}")
    return None if text is None else int(text)


def _time_ns(text: str) -> int:
    try:
        when = datetime.fromisoformat(text.upper().replace(" ", "+"))
        if when.tzinfo is None:
            raise ValueError(text)
        return int(when.timestamp() * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(f"since must be a time as in RFC 3339, not {text[:40]!a}") from None


def _take(records: Any) -> list[dict[str, Any]]:
    # as many as make a chunk
    taken, size = [], 0
    for record in records:
        taken.append(record)
        size += len(record["text"]) + 80
        if size >= _CHUNK:
            break
    return taken


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)
