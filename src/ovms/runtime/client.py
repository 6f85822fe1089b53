"""What the command line asks of a runtime: of this process, or of a server. Both answer alike, in the contract's documents.

Which one: ``--host`` or ``OVMS_SOCKET`` where given, else the server on ``ROOT/ovms.sock`` where one lives, else this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from ovms.artifact.resolve import Connect, push, resolve
from ovms.errors import HostError, OvmsError, UsageError
from ovms.oci.transport import new_name
from ovms.progress import NULL, Progress
from ovms.runtime.document import instance
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime

VARIABLE: Final = "OVMS_SOCKET"
#: What ``--host`` and ``OVMS_SOCKET`` say to leave a server aside.
LOCAL: Final = "local"
#: Seconds between two looks at a log.
_LOOK: Final = 0.2

Document = dict[str, Any]


class Client(Protocol):
    """A runtime. Instances are named by a name, an ID, or the first digits of one."""

    def start(self, reference: str, options: RunOptions, progress: Progress = NULL) -> Document:
        """Starts an instance, and returns when its VM runs. Nothing is left of one whose start fails."""

    def instances(self) -> list[Document]:
        """All instances, oldest first."""

    def instance(self, text: str) -> Document:
        """What is known of an instance."""

    def stop(self, text: str, grace: float) -> Document:
        """Asks the guest to power down, and ends it after *grace* seconds. Returns how it ended."""

    def remove(self, text: str, *, force: bool = False) -> None:
        """Removes an instance."""

    def pause(self, text: str) -> Document:
        """Lets an instance's CPUs stand still."""

    def resume(self, text: str) -> Document:
        """Lets them go on."""

    def snapshot(self, text: str, tag: str, progress: Progress = NULL) -> Document:
        """Makes an artifact of a running instance; where *tag* has a registry, it is pushed there."""

    def logs(self, text: str, *, follow: bool = False, tail: int | None = None) -> Iterator[Document]:
        """What an instance's VM printed, as records."""

    def events(self, *, follow: bool = False, since: int | None = None) -> Iterator[Document]:
        """What happens to instances."""


def choose(root: Root, host: str | None, environ: Mapping[str, str]) -> Path | None:
    """The socket of the server to ask; None to do it ourselves.

    Raises:
        UsageError: *host* (from the command line) is none.
        HostError: nobody listens where the user said that there is a server.
    """
    named = host or environ.get(VARIABLE)
    if named == LOCAL:
        return None
    if named:
        path = Path(named.removeprefix("unix:"))
        if not path.is_absolute():
            raise UsageError(f"{named[:120]!a} is no server", hint=f"write unix:/PATH, or {LOCAL} for none")
        if not _alive(path):
            raise HostError(
                f"no server listens on {path}", hint=f"'ovm serve --socket {path}' starts one", path=str(path)
            )
        return path
    return root.socket if _alive(root.socket) else None


def _alive(path: Path) -> bool:
    if not path.exists():
        return False
    from ovms import fsutil

    try:
        fsutil.connect_unix(path, timeout=2.0).close()
    except OSError:
        return False
    return True


class Local:
    """The runtime in this process."""

    def __init__(self, runtime: Runtime, connect: Connect, damaged: Callable[[OvmsError], None] | None = None) -> None:
        self._runtime = runtime
        self._connect = connect
        self._damaged = damaged

    def start(self, reference: str, options: RunOptions, progress: Progress = NULL) -> Document:
        """See :class:`Client`."""
        with self._runtime.layout.using():
            found = resolve(self._runtime.layout, self._connect, reference, progress=progress)
            started = self._runtime.start(found, options, progress)
        return self._document(started.record.id)

    def instances(self) -> list[Document]:
        """See :class:`Client`."""
        instances = self._runtime.instances
        return [instance(instances.status(record)) for record in instances.records(damaged=self._damaged)]

    def instance(self, text: str) -> Document:
        """See :class:`Client`."""
        return self._document(text)

    def _document(self, text: str) -> Document:
        instances = self._runtime.instances
        record = instances.find(text)
        return instance(instances.status(record), files=instances.files(record))

    def stop(self, text: str, grace: float) -> Document:
        """See :class:`Client`."""
        return instance(self._runtime.stop(self._runtime.instances.find(text), grace=grace))

    def remove(self, text: str, *, force: bool = False) -> None:
        """See :class:`Client`."""
        self._runtime.remove(self._runtime.instances.find(text), force=force)

    def pause(self, text: str) -> Document:
        """See :class:`Client`."""
        return self._document(self._runtime.pause(self._runtime.instances.find(text)).id)

    def resume(self, text: str) -> Document:
        """See :class:`Client`."""
        return self._document(self._runtime.resume(self._runtime.instances.find(text)).id)

    def snapshot(self, text: str, tag: str, progress: Progress = NULL) -> Document:
        """See :class:`Client`."""
        from ovms.runtime import snapshots

        name = new_name(tag)
        taken = snapshots.take(self._runtime, self._runtime.instances.find(text), name, progress)
        if name.registry is not None:
            push(self._runtime.layout, self._connect, str(name), progress)
        return {
            "snapshot_ref": taken.artifact.digest,
            "reference": str(name),
            "size": taken.artifact.size,
            "ram_bytes": taken.ram_size,
            "downtime_ms": taken.downtime_ms,
            "pushed": name.registry is not None,
        }

    def logs(self, text: str, *, follow: bool = False, tail: int | None = None) -> Iterator[Document]:
        """See :class:`Client`."""
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
        """See :class:`Client`. Without a server nobody remembers what was: there is only what comes."""
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


__all__ = ["LOCAL", "VARIABLE", "Client", "Document", "Local", "choose"]
