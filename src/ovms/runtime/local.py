"""The runtime in this process, as a :class:`~ovms.runtime.client.Client`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from ovms.artifact.resolve import Connect, push, resolve
from ovms.errors import HostError, OvmsError
from ovms.oci.transport import new_name
from ovms.progress import NULL, Progress
from ovms.runtime.client import Document
from ovms.runtime.document import instance
from ovms.runtime.runtime import RunOptions, Runtime

#: Seconds between two looks at a log.
_LOOK: Final = 0.2


class Local:
    """The runtime in this process."""

    def __init__(self, runtime: Runtime, connect: Connect, damaged: Callable[[OvmsError], None] | None = None) -> None:
        self._runtime = runtime
        self._connect = connect
        self._damaged = damaged

    def start(self, reference: str, options: RunOptions, progress: Progress = NULL) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        with self._runtime.layout.using():
            gate = self._runtime.gate(options)
            found = resolve(
                self._runtime.layout, self._connect, reference, progress=progress, gate=gate, guard=self._runtime.guard
            )
            started = self._runtime.start(found, options, progress)
        return self._document(started.record.id)

    def instances(self) -> list[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        instances = self._runtime.instances
        return [instance(instances.status(record)) for record in instances.records(damaged=self._damaged)]

    def instance(self, text: str) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return self._document(text)

    def _document(self, text: str) -> Document:
        instances = self._runtime.instances
        record = instances.find(text)
        return instance(instances.status(record), files=instances.files(record))

    def ask_to_stop(self, text: str, grace: float) -> None:
        """See :class:`~ovms.runtime.client.Client`."""
        self._runtime.power_down(self._runtime.instances.find(text))

    def stop(self, text: str, grace: float, *, asked: bool = False) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return instance(self._runtime.stop(self._runtime.instances.find(text), grace=grace, asked=asked))

    def remove(self, text: str, *, force: bool = False) -> None:
        """See :class:`~ovms.runtime.client.Client`."""
        self._runtime.remove(self._runtime.instances.find(text), force=force)

    def pause(self, text: str) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return self._document(self._runtime.pause(self._runtime.instances.find(text)).id)

    def resume(self, text: str) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        return self._document(self._runtime.resume(self._runtime.instances.find(text)).id)

    def snapshot(self, text: str, tag: str | None, progress: Progress = NULL) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        from ovms.runtime import snapshots

        name = None if tag is None else new_name(tag)
        taken = snapshots.take(self._runtime, self._runtime.instances.find(text), name, progress)
        pushed = name is not None and name.registry is not None
        if pushed:
            push(self._runtime.layout, self._connect, str(name), progress)
        return {
            **taken.to_json(),
            **({} if name is None else {"reference": str(name)}),
            "pushed": pushed,
        }

    def warm(self, reference: str, size: int) -> Document:
        """See :class:`~ovms.runtime.client.Client`."""
        raise self._no_pools()

    def pools(self) -> list[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        raise self._no_pools()

    def _no_pools(self) -> HostError:
        return HostError(
            "warm pools are held by a server, and none runs here", hint="start one: 'ovm serve', or a systemd unit"
        )

    def logs(self, text: str, *, follow: bool = False, tail: int | None = None) -> Iterator[Document]:
        """See :class:`~ovms.runtime.client.Client`."""
        from ovms.runtime import logrecords

        instances = self._runtime.instances
        record = instances.find(text)
        files = instances.files(record)
        if not follow:
            yield from logrecords.read_all(files, tail=tail)
            return
        skip = 0 if tail is None else max(0, sum(1 for _ in logrecords.read_all(files)) - tail)
        reader = logrecords.LogReader(files)
        while True:
            newest = instances.by_id(record.id)
            alive = newest is not None and instances.status(newest).state.alive
            for found in reader.read():
                skip -= 1
                if skip < 0:
                    yield found
            if not alive:
                yield from reader.rest()
                return
            time.sleep(_LOOK)

    def events(self, *, follow: bool = False, since: int | None = None) -> Iterator[Document]:
        """See :class:`~ovms.runtime.client.Client`. Without a server nobody remembers what was: there is only what comes."""
        from ovms.runtime.watching import EventLog, Watcher

        log = EventLog()
        if since is not None and since < log.last:
            yield from log.after(since)
        if not follow:
            return
        last = log.last
        watcher = Watcher(self._runtime.instances, log)
        news = threading.Event()
        thread = threading.Thread(target=watcher.run, daemon=True)
        with log.listening(news.set):
            thread.start()
            try:
                while True:
                    news.wait()
                    news.clear()
                    for event in log.after(last):
                        last = event["seq"]
                        yield event
            finally:
                watcher.stop()
                thread.join(5.0)
