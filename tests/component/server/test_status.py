"""``GET /status`` is asked all the time: what it costs is counted here, and that what is at hand is as true as what is looked for."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.guests import MEMORY

from ovms.artifact.resolve import Found
from ovms.lazy import replace
from ovms.runtime import figures
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.runtime.server.app import App
from ovms.runtime.server.gate import Gate, Peers
from ovms.runtime.server.http import Answer, Http, Request
from ovms.runtime.server.jobs import Jobs
from ovms.runtime.watching import EventLog
from ovms.spec.choices import Accel

#: Files that one question opens: of the process, of its network, and two where the first byte of the console may stand.
OPENS_MAX = 4


class Asked:
    """An app that is asked for the status of one instance, and how often that took a thread."""

    def __init__(self, runtime: Runtime, record: Record) -> None:
        self.runtime, self.id = runtime, record.id
        log = EventLog()
        self.jobs = Jobs(runtime, log)
        self.app = App(runtime, log, self.jobs, Gate(Peers(), None), lambda: 0)
        self.threads = 0
        run = self.jobs.readers.run

        async def counted(work: Callable[..., Any], *arguments: Any) -> Any:
            self.threads += 1
            return await run(work, *arguments)

        self.jobs.readers.run = counted  # type: ignore[method-assign]

    async def ask(self) -> tuple[int, dict[str, Any]]:
        answer = await self.app.answer(Request("GET", f"/status/{self.id}", {}, remote=False), b"")
        assert isinstance(answer.body, bytes)
        return answer.status, json.loads(answer.body)


@pytest.fixture
def record(runtime: Runtime, echo: Found) -> Record:
    return runtime.start(echo, RunOptions(memory=MEMORY, accel=Accel.TCG)).record


@pytest.fixture
def asked(runtime: Runtime, record: Record) -> Iterator[Asked]:
    asked = Asked(runtime, record)
    yield asked
    for pool in asked.jobs._pools:
        pool.close()


_counting: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counting:
        _counting[-1].append(str(arguments[0]))


def test_a_question_takes_no_thread_and_few_files(asked: Asked) -> None:
    sys.addaudithook(_hook)

    async def work() -> None:
        first = (await asked.ask())[1]
        assert asked.threads == 1
        _counting.append([])
        try:
            status, again = await asked.ask()
        finally:
            opened = _counting.pop()
        assert (status, asked.threads) == (200, 1)
        assert len(opened) <= OPENS_MAX, opened
        changing = ("uptime_ms", "metrics", "timings_ms")
        assert {k: v for k, v in again.items() if k not in changing} == {
            k: v for k, v in first.items() if k not in changing
        }
        assert again["metrics"].keys() == first["metrics"].keys() > {"memory_bytes", "cpu_ms"}

    asyncio.run(work())


def test_many_requests_at_once_are_answered_in_turn_with_those_of_others(tmp_path: Path) -> None:
    answered: list[str] = []

    class Quick:
        def admit(self, request: Request) -> int:
            return 0

        async def answer(self, request: Request, body: bytes) -> Answer:
            answered.append(request.target)
            return Answer.json({})

    async def work() -> None:
        http = Http(Quick(), refuse=lambda _: None)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await http.serve(reader, writer, remote=False)

        async with await asyncio.start_unix_server(serve, tmp_path / "sock"):
            many, one = [await asyncio.open_unix_connection(tmp_path / "sock") for _ in range(2)]
            many[1].write(b"GET /many HTTP/1.1\r\nHost: x\r\n\r\n" * 300)
            one[1].write(b"GET /one HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(20):
                assert (await one[0].readline()).startswith(b"HTTP/1.1 200")
                while answered.count("/many") < 300:
                    await many[0].readline()
            for _, writer in (many, one):
                writer.close()
            await http.stop(1.0)

    asyncio.run(work())
    assert answered.index("/one") < 250


def test_who_asks_all_the_time_never_waits_for_the_vmm(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, instances = asked.app._usage, asked.runtime.instances
    renewed: list[float] = []
    renew, done = usage.renew, threading.Event()

    def noted(record: Record) -> None:
        renew(record)
        renewed.append(usage._asked[record.id][0])
        done.set()

    monkeypatch.setattr(usage, "renew", noted)

    async def work() -> None:
        await asked.ask()
        first = usage._asked[asked.id][0]
        # as if time had passed
        usage._asked[asked.id] = (first - figures._RENEWED, usage._asked[asked.id][1])
        for _ in range(3):
            assert (await asked.ask())[0] == 200
        assert usage._renewing == {asked.id}
        await asyncio.to_thread(done.wait, 20)
        assert (len(renewed), usage._renewing, asked.threads) == (1, set(), 2)
        assert renewed[0] > first
        # where there is no thread for it, who comes when they are too old does wait
        usage._renewing.add(asked.id)
        usage._asked[asked.id] = (first - figures._FRESH, {})
        assert "disk_read_bytes" in (await asked.ask())[1]["metrics"]
        assert (usage._renewing, asked.threads) == (set(), 3)

    asyncio.run(work())
    # what others have removed is let go when there is something new
    usage._asked["gone"] = (time.monotonic() - figures._FORGOTTEN - 1, {})
    usage.forget(asked.id)
    usage.of(instances.find(asked.id))
    assert usage._asked.keys() == {asked.id}


@pytest.mark.spec("RUN-16")
def test_what_is_at_hand_is_as_true(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, instances = asked.runtime, asked.runtime.instances

    def record() -> Record:
        return Runtime(runtime.root).instances.find(asked.id)

    async def work() -> None:
        async def state() -> tuple[str, int]:
            before = asked.threads
            return str((await asked.ask())[1]["state"]), asked.threads - before

        assert [await state(), await state()] == [("running", 1), ("running", 0)]
        runtime.pause(record())
        assert [await state(), await state()] == [("paused", 1), ("paused", 0)]
        runtime.resume(record())
        assert [await state(), await state()] == [("running", 1), ("running", 0)]
        # whoever has paused it for a moment holds the lock
        with instances.locked(record()) as newest:
            instances.save(replace(newest, pausing=True))
            assert await state() == ("running", 1)
        assert await state() == ("paused", 1)
        with instances.locked(record()) as newest:
            instances.save(replace(newest, pausing=False))
        assert [await state(), await state()] == [("running", 1), ("running", 0)]
        # figures become old
        with monkeypatch.context() as patched:
            patched.setattr(figures, "_FRESH", 0.0)
            assert await state() == ("running", 1)
        instances.ask_to_stop(record(), time.time() + 60)
        assert await state() == ("stopping", 0)
        process = record().process
        assert process is not None
        process.kill()
        assert await state() == ("error", 1)
        runtime.remove(record(), force=True)
        assert (await asked.ask())[0] == 404

    asyncio.run(work())
