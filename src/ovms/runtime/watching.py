"""Sees what happens to instances, whoever does it: another command, another server, or a guest that powers off.

The kernel tells: inotify of records that are replaced, pidfds of VMMs that end. Where it has no inotify left for us, and for
what it does not tell (a command that is killed while it starts an instance lets go of a lock), we look again now and then.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from ovms.errors import HostError, OvmsError
from ovms.lazy import dataclass
from ovms.runtime.document import instance
from ovms.runtime.instances import STOP, Instances
from ovms.runtime.record import FILE
from ovms.runtime.runtime import now
from ovms.spec import limits
from ovms.spec.states import State
from ovms.vmm.model import VmFiles

#: Events that are remembered, and the bytes of their JSON: an error may be long.
EVENTS_MAX: Final = 4096
EVENTS_BYTES_MAX: Final = 1 * limits.MIB
_BLOCK: Final = 16 * limits.KIB
#: Seconds between two looks at everything, with and without inotify.
_LOOK: Final = 5.0
_LOOK_BLIND: Final = 0.5
#: Seconds between two looks at whether those are alive who have something half done with a guest: nothing tells of their end.
_LOOK_HALF_DONE: Final = 0.25
#: Seconds while which further news of an instance are taken together with the first.
_SETTLE: Final = 0.01
#: What is written to be woken: for a look at everything, at those that were named.
_ALL, _NAMED = b"!", b"?"

_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x8, 0x80, 0x100, 0x200
_IN_Q_OVERFLOW, _IN_ONLYDIR, _IN_IGNORED = 0x4000, 0x01000000, 0x8000
_IN_CLOEXEC, _IN_NONBLOCK = 0o2000000, 0o4000
_HEADER: Final = struct.Struct("iIII")
#: Files whose change may be a change of state.
_TELLING: Final = frozenset({FILE, STOP, VmFiles.EXIT})

Event = dict[str, Any]


class EventLog:
    """Numbered events; the latest are remembered, as the text that they are sent as: a quarter of what their objects take.

    Numbers begin with the time (ms) of the log's own beginning, so they never fall, not when a server is started anew either,
    and nothing has to be kept for that.
    """

    def __init__(self, *, first: int | None = None) -> None:
        self._lock = threading.Lock()
        self._next = int(time.time() * 1000) if first is None else first
        # some hundred lines a block: lines of their own would lie scattered among all that comes and goes, and one of all
        # would be made anew again and again
        self._blocks: deque[bytearray] = deque()
        self._size = 0
        self._lengths: deque[int] = deque()
        self._listeners: dict[object, Callable[[], object]] = {}

    def add(self, kind: str, **fields: Any) -> None:
        """Notes an event; fields that are None are left out."""
        with self._lock:
            line = _line(self._next, kind, {key: value for key, value in fields.items() if value is not None})
            self._next += 1
            if not self._blocks or len(self._blocks[-1]) >= _BLOCK:
                self._blocks.append(bytearray())
            self._blocks[-1] += line
            self._lengths.append(len(line))
            self._size += len(line)
            while len(self._lengths) > EVENTS_MAX or self._size > EVENTS_BYTES_MAX:
                self._forget()
        for listener in list(self._listeners.values()):
            listener()

    def _forget(self) -> None:
        length = self._lengths.popleft()
        self._size -= length
        del self._blocks[0][:length]
        if not self._blocks[0]:
            self._blocks.popleft()

    def after(self, seq: int | None) -> list[Event]:
        """What came after the event *seq* (None: all that is remembered), with ``lost`` first where some is forgotten."""
        return [json.loads(line) for line in self.text_after(seq)[0].splitlines()]

    def text_after(self, seq: int | None) -> tuple[bytes, int]:
        """The same as lines of JSON, and the number of the latest event."""
        with self._lock:
            last = self._next - 1
            first = self._next - len(self._lengths)
            if seq is None:
                return b"".join(self._blocks), last
            if first - 1 <= seq <= last:
                return self._newest(sum(itertools.islice(reversed(self._lengths), last - seq))), last
            return b"".join((_line(first - 1, "lost", {}), *self._blocks)), last

    def _newest(self, size: int) -> bytes:
        blocks: list[bytearray] = []
        for block in reversed(self._blocks):
            if size <= 0:
                break
            blocks.append(block[max(0, len(block) - size) :])
            size -= len(block)
        return b"".join(reversed(blocks))

    @property
    def last(self) -> int:
        """The number of the latest event."""
        with self._lock:
            return self._next - 1

    @contextlib.contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """Calls *listener*, from whatever thread, after each event."""
        # without the lock: this may be ended by the garbage collector, in a thread that holds it
        key = object()
        self._listeners[key] = listener
        try:
            yield
        finally:
            self._listeners.pop(key, None)


def _line(seq: int, kind: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"time": now(), "seq": seq, "type": kind, **fields}).encode() + b"\n"


@dataclass()
class _Seen:
    state: State
    pidfd: int | None = None


class Watcher:
    """Turns changes of instances into events. ``run`` is for a thread of its own.

    *left* is told of an instance whose guest was left paused or frozen by somebody who was killed; again with every look at
    everything, as long as it is.
    """

    def __init__(self, instances: Instances, log: EventLog, left: Callable[[str], object] | None = None) -> None:
        self._instances = instances
        self._log = log
        self._left = left
        self._half_done: set[str] = set()
        self._looked = 0.0
        self._seen: dict[str, _Seen] = {}
        self._inotify = _Inotify()
        self._poll = select.poll()
        self._pidfds: dict[int, str] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_read, select.POLLIN)
        self._settling = select.poll()
        self._settling.register(self._wake_read, select.POLLIN)
        self._asked: deque[str] = deque()
        if self._inotify.fd is not None:
            self._poll.register(self._inotify.fd, select.POLLIN)
            self._inotify.add(str(instances.place), "")
        self._stopped = False
        self._look_at_all(tell=False)

    def run(self) -> None:
        """Watches until :meth:`stop`."""
        try:
            while not self._stopped:
                self.step(_LOOK)
        finally:
            self.close()

    def stop(self) -> None:
        """Ends :meth:`run`, from another thread."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """Looks at everything again, soon."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, _ALL)

    def look(self, instance_id: str) -> None:
        """Looks at one instance at once: whoever has changed it knows that there is news, and that no more of it follows."""
        self._asked.append(instance_id)
        with contextlib.suppress(OSError):
            os.write(self._wake_write, _NAMED)

    def close(self) -> None:
        """Lets go of what is held."""
        for seen in self._seen.values():
            if seen.pidfd is not None:
                os.close(seen.pidfd)
        self._seen.clear()
        self._inotify.close()
        os.close(self._wake_read)
        # who is late writes nowhere
        closed, self._wake_write = self._wake_write, -1
        os.close(closed)

    def step(self, timeout: float) -> None:
        """Waits for news, *timeout* seconds at most, and tells them."""
        wait = timeout if self._inotify.whole else min(timeout, _LOOK_BLIND)
        ready = self._poll.poll(1000 * (min(wait, _LOOK_HALF_DONE) if self._half_done else wait))
        if self._half_done:
            self._see_whose_makers_live()
        if time.monotonic() - self._looked >= wait:
            self._look_at_all()
        if not ready:
            return
        dirty: set[str] = set()
        for fd, _ in ready:
            if fd == self._wake_read:
                self._woken()
            elif fd in self._pidfds:
                instance_id = self._pidfds[fd]
                self._unfollow(self._seen[instance_id])  # else it would stay ready for ever
                dirty.add(instance_id)
        if self._stopped or [fd for fd, _ in ready] == [self._wake_read]:
            return
        if self._settling.poll(_SETTLE * 1000):
            self._woken()
        named = self._inotify.read()
        if named is None:
            self._look_at_all()
        else:
            for instance_id in dirty | named:
                self._look_at(instance_id)

    def _see_whose_makers_live(self) -> None:
        for instance_id in list(self._half_done):
            with contextlib.suppress(OvmsError, OSError):
                record = self._instances.by_id(instance_id)
                if record is not None and record.half_done and self._instances.held(record):
                    continue
                self._half_done.discard(instance_id)
                # between the two looks it may have come to its end
                if record is not None and self._left is not None and self._instances.by_id(instance_id) == record:
                    self._left(instance_id)

    def _woken(self) -> None:
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._wake_read, 4096)
        if _ALL in said:
            self._look_at_all()
        with contextlib.suppress(IndexError):
            while True:
                self._look_at(self._asked.popleft())

    def _look_at_all(self, *, tell: bool = True) -> None:
        self._looked = time.monotonic()
        with contextlib.suppress(OSError):
            here = {entry.name for entry in os.scandir(self._instances.place) if not entry.name.startswith(".")}
            for instance_id in here | set(self._seen):
                self._look_at(instance_id, tell=tell)

    def _look_at(self, instance_id: str, *, tell: bool = True) -> None:
        directory = self._instances.directory(instance_id)
        seen = self._seen.get(instance_id)
        if seen is None:
            # before the record is read: what changes from here on is told
            self._inotify.add(str(directory), instance_id)
        try:
            record = self._instances.by_id(instance_id)
            if record is None:
                if seen is not None:  # else it is just being made: its record comes
                    self._forget(instance_id)
                    self._log.add("removed", instance_id=instance_id)
                return
            status = self._instances.status(record)
        except (OvmsError, OSError):
            return  # damaged, or gone in this moment: looked at again
        if self._left is not None and record.half_done and status.state.alive:
            self._half_done.add(instance_id)
        if seen is None:
            seen = self._seen[instance_id] = _Seen(status.state)
            if tell:
                self._log.add("created", instance_id=instance_id, state=str(status.state))
                self._tell(instance_id, status.state, instance(status)["error"])
        elif seen.state is not status.state:
            seen.state = status.state
            self._tell(instance_id, status.state, instance(status)["error"])
        self._follow(instance_id, seen, status.state.alive)

    def _tell(self, instance_id: str, state: State, error: Any) -> None:
        self._log.add("state", instance_id=instance_id, state=str(state), error=error)

    def _follow(self, instance_id: str, seen: _Seen, alive: bool) -> None:
        if not alive:
            self._unfollow(seen)
        elif seen.pidfd is None:
            with contextlib.suppress(OvmsError):
                record = self._instances.by_id(instance_id)
                process = None if record is None else record.process
                try:
                    seen.pidfd = None if process is None else process.open()
                except HostError:
                    return  # no descriptor left: the looks at everything have to do
                if seen.pidfd is not None:
                    self._pidfds[seen.pidfd] = instance_id
                    self._poll.register(seen.pidfd, select.POLLIN)

    def _unfollow(self, seen: _Seen) -> None:
        if seen.pidfd is not None:
            self._poll.unregister(seen.pidfd)
            del self._pidfds[seen.pidfd]
            os.close(seen.pidfd)
            seen.pidfd = None

    def _forget(self, instance_id: str) -> None:
        self._unfollow(self._seen.pop(instance_id))
        self._inotify.forget(instance_id)


class _Inotify:
    """The kernel's news of directories. ``whole`` says whether it tells of all of them."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        fd = self._libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
        self.fd: int | None = fd if fd >= 0 else None
        self.whole = self.fd is not None
        self._names: dict[int, str] = {}
        self._watches: dict[str, int] = {}

    def add(self, path: str, name: str) -> None:
        if self.fd is None or name in self._watches:
            return
        mask = _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_CLOSE_WRITE | _IN_ONLYDIR
        watch = self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask)
        if watch < 0:
            # ENOSPC: the user has no watches left
            self.whole = self.whole and not os.path.isdir(path)  # noqa: PTH112 - a string already
            return
        self._names[watch] = name
        self._watches[name] = watch

    def forget(self, name: str) -> None:
        watch = self._watches.pop(name, None)
        if watch is not None and self.fd is not None:
            self._names.pop(watch, None)
            self._libc.inotify_rm_watch(self.fd, watch)  # fails where the directory is gone, and so the watch

    def read(self) -> set[str] | None:
        """The instances of which there are news; None when some were lost."""
        found: set[str] = set()
        if self.fd is None:
            return None
        try:
            while data := os.read(self.fd, 65536):
                at = 0
                while at < len(data):
                    watch, mask, _, length = _HEADER.unpack_from(data, at)
                    at += _HEADER.size
                    name = data[at : at + length].rstrip(b"\0").decode("utf-8", "replace")
                    at += length
                    if mask & _IN_Q_OVERFLOW:
                        return None
                    directory = self._names.get(watch)
                    if mask & _IN_IGNORED and directory is not None:
                        self._names.pop(watch, None)
                        self._watches.pop(directory, None)
                        if directory:
                            found.add(directory)
                    elif directory == "" and not name.startswith("."):
                        found.add(name)
                    elif directory and name in _TELLING:
                        found.add(directory)
        except BlockingIOError:
            pass
        return found

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
