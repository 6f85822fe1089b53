"""What an artifact in a registry has and the store lacks, fetched: small blobs together, large ones by a thread each.

A download that ends early is kept and gone on with (:mod:`ovms.oci.partial`), whatever ended it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ovms import fsutil
from ovms.errors import DigestMismatch, InputError, IntegrityError, RegistryError, RegistryProtocol
from ovms.lazy import dataclass
from ovms.oci import absent, partial, ranges, small, workers
from ovms.oci.descriptor import Descriptor, label
from ovms.oci.http import Broken, Refused
from ovms.oci.layout import BlobWriter, Layout
from ovms.oci.registry import Busy, RegistryClient
from ovms.progress import NULL, Progress, Task
from ovms.spec import limits
from ovms.spec.digest import Digest

if TYPE_CHECKING:
    from ovms.oci import reuse

#: A connection that brought this much before it broke is not counted as a failure.
_PROGRESS: Final = 1 * limits.MIB
#: Blobs up to this size are fetched in one piece.
_SMALL: Final = 256 * limits.KIB
#: Up to so many of them, it does not matter how.
_FEW: Final = 2
#: Of them, so many are made durable together: one by one, each would be a transaction of the file system.
_DURABLE_AT_ONCE: Final = 16


class _Borne(Exception):
    """A range did not come however often it was asked for: *error* is the user's."""

    def __init__(self, error: RegistryError) -> None:
        super().__init__(error.message)
        self.error = error


class _NoReuse(Exception):
    """What is here of other blobs is of no use; the rest is fetched plainly."""


@dataclass()
class Tally:
    """Bytes of blobs that a transfer has fetched, and those that it took from other blobs here instead."""

    fetched: int = 0
    reused: int = 0


class Download:
    """Fetches blobs of one artifact into the store."""

    def __init__(
        self,
        layout: Layout,
        client: RegistryClient,
        repository: str,
        progress: Progress,
        tally: Tally | None = None,
        pool: small.Pool | None = None,
    ) -> None:
        self.layout = layout
        self._client = client
        self._repository = repository
        self._progress = progress
        self._tally = tally or Tally()
        self._pool = pool or small.Pool()
        self._unfinished = 0
        self._several = True
        self._lock = threading.Lock()
        self._controls: dict[Digest, bytes] = {}

    def control(self, blob: Descriptor) -> bytes:
        """The control part of a RAM snapshot: of the blob, or of what was left out, where that is here; else fetched."""
        known = self._controls.get(blob.digest) or absent.control_part(self.layout, blob)
        if known is None:
            known = read_control(self._client, self._repository, blob, self._progress)
            self.count(len(known))
        self._controls[blob.digest] = known
        return known

    def note_absent(self, blobs: list[Descriptor]) -> None:
        """Notes that *blobs* were left out, with what is known of them."""
        for blob in blobs:
            absent.note(self.layout, blob, self._controls.get(blob.digest))
            with self.telling(blob) as task:
                task.note("left out")

    def count(self, fetched: int, reused: int = 0) -> None:
        """Counts bytes that have come."""
        with self._lock:
            self._tally.fetched += fetched
            self._tally.reused += reused

    def blobs(self, blobs: list[Descriptor], missing: list[Descriptor]) -> None:
        """Fetches those of *blobs* that are *missing*, several at once: the small ones, then the others, largest first."""
        with self.coming(blobs, missing, []) as small_ones:
            small_ones.finish()
        self.large(blobs, missing)

    @contextlib.contextmanager
    def coming(self, blobs: list[Descriptor], missing: list[Descriptor], first: list[Descriptor]) -> Iterator[Coming]:
        """The small ones of *blobs* that are *missing*, which begin to come: *first* ones, then the largest.

        At the end of the context those that :class:`Coming` was not asked for are given up.
        """
        lacking = {blob.digest for blob in missing}
        for blob in blobs:
            if blob.digest not in lacking:
                with self.telling(blob) as task:
                    task.note("exists already")
        ahead = {blob.digest for blob in first}
        wanted = {blob.digest: blob for blob in blobs if blob.digest in lacking and blob.size <= _SMALL}
        ordered = sorted(wanted.values(), key=lambda blob: (blob.digest not in ahead, -blob.size))
        with Coming(self, ordered, ahead) as coming:
            yield coming

    def together(
        self, blobs: list[Descriptor], keep: small.Keep, ended: Callable[[BaseException | None], object]
    ) -> small.Fetch:
        """A fetch of small blobs, together with those of other artifacts."""
        return small.Fetch(self._client, self._repository, blobs, keep, ended)

    def begin(self, fetch: small.Fetch) -> None:
        """Lets it begin. Raises as :meth:`ovms.oci.small.Pool.begin`."""
        self._pool.begin(fetch)

    def give_up(self, fetch: small.Fetch) -> None:
        """Ends that; nothing of it is kept from here on."""
        self._pool.cancel(fetch)

    def bear(self, busy: Busy) -> None:
        """Leaves the registry alone as long as it asks. Raises *busy* where that is longer than anybody waits."""
        self._client.patience().bear(busy)

    def run(self, jobs: list[workers.Job]) -> None:
        """Runs jobs over as many connections as this pull may have."""
        workers.run_all(jobs, parallel=self._pool.each)

    def telling(self, blob: Descriptor) -> Task:
        """The progress of a blob."""
        return self._progress.task(label(blob), blob.size)

    def large(self, blobs: list[Descriptor], missing: list[Descriptor]) -> None:
        """The large ones."""
        lacking = {blob.digest for blob in missing}
        large = [blob for blob in blobs if blob.digest in lacking and blob.size > _SMALL]
        large.sort(key=lambda blob: -blob.size)
        self._unfinished = len(large)
        if large:
            with self._pool.large():
                self.run([self._job(blob) for blob in large])

    def _spare(self) -> int:
        # connections that no blob is waiting for, shared out among those at work
        if not self._several:
            return 0
        return max(0, self._pool.each - self._unfinished) // max(1, self._unfinished)

    def _job(self, blob: Descriptor) -> workers.Job:
        def fetch(stopped: Callable[[], bool]) -> None:
            try:
                fetch_one(stopped)
            finally:
                with self._lock:
                    self._unfinished -= 1

        def fetch_one(stopped: Callable[[], bool]) -> None:
            with (
                self.telling(blob) as task,
                partial.receiving(self.layout, blob, stopped, task.waiting) as receiver,
            ):
                if receiver is None:
                    task.note("exists already")
                    return
                task.advance(receiver.size)
                if receiver.resumed:
                    task.note("resumed")
                self._fetch(blob, receiver, task, stopped)

        return fetch

    def read_small(self, blob: Descriptor, task: Task) -> bytes:
        """All of a small blob, by a request of its own."""

        def attempt() -> bytes:
            return b"".join(bytes(piece) for piece in self._client.read_blob(self._repository, blob))

        return self._client.retrying(attempt, tell=task.waiting)

    def _fetch(self, blob: Descriptor, receiver: partial.Partial, task: Task, stopped: Callable[[], bool]) -> None:
        patience = self._client.patience(task.waiting, stopped)
        plan = self._reusable(blob, receiver.size)
        reused = Tally()
        if receiver.size == 0 and (head := self._controls.get(blob.digest)) is not None:
            receiver.write(head)  # was fetched to decide by
            task.advance(len(head))
        while True:
            began, reached = receiver.size, 0
            try:
                if receiver.size < blob.size and plan is not None:
                    self._put_together(plan, blob, receiver, task, stopped, reused)
                if receiver.size < blob.size:
                    self._receive(blob, receiver, task, stopped)
                reached = receiver.size
                receiver.commit()
                self.count(0, reused.reused)
                return
            except (Broken, Refused, Busy) as exc:
                if receiver.size - began >= _PROGRESS:
                    patience.progressed()
                patience.bear(exc)
            except _Borne as exc:
                if receiver.size - began < _PROGRESS:
                    raise exc.error from None
                patience.progressed()
            except DigestMismatch:
                # Bytes of an earlier pull may be what is wrong (after a power failure, or of another registry's doing), a
                # control part that nothing vouched for, or what was taken from other blobs.
                if not receiver.resumed and not began:
                    receiver.reset()
                    raise
                task.advance(-(receiver.size or reached))
                receiver.reset()
                if plan is not None:
                    task.note("chunks of other snapshots did not fit")
                    plan, reused = None, Tally()

    def _reusable(self, blob: Descriptor, have: int) -> reuse.Plan | None:
        # What of the blob need not be fetched. Whatever is wrong with its control part shows when all of it is here.
        if blob.media_type not in absent.RAM_TYPES or not self._several:
            return None
        from ovms.oci import reuse

        if blob.size - have < reuse.SAVED_MIN or not (candidates := reuse.others(self.layout, blob.digest)):
            return None
        try:
            return reuse.plan(self.control(blob), candidates)
        except (IntegrityError, InputError, RegistryProtocol):
            return None

    def _put_together(
        self,
        plan: reuse.Plan,
        blob: Descriptor,
        receiver: partial.Partial,
        task: Task,
        stopped: Callable[[], bool],
        reused: Tally,
    ) -> None:
        """Writes what *receiver* lacks, in order and as far as the plan goes: what is here, and ranges of what is not."""

        def take(data: bytes | memoryview) -> None:
            receiver.write(data)
            task.advance(len(data))
            if stopped():
                raise workers.Stopped("the transfer was broken off")

        if receiver.size < len(plan.control):
            head = plan.control[receiver.size :]
            receiver.write(head)
            task.advance(len(head))
        rest = plan.rest(receiver.size)
        task.note(f"{plan.reused / limits.MIB:.1f} MiB from other snapshots here")
        spans = [(piece.offset, piece.size) for piece in rest if piece.source is None]
        lanes = min(1 + self._spare(), len(spans))
        with contextlib.closing(ranges.fetch_spans(spans, lanes, self._fetcher(blob, task, stopped))) as fetched:
            try:
                for piece in rest:
                    if piece.source is None:
                        take(next(fetched))
                        self.count(piece.size)
                    else:
                        for data in _copied(self.layout.path(piece.source), piece.at, piece.size):
                            take(data)
                            reused.reused += len(data)
            except ranges.NoRanges:
                self._several = False  # and the rest comes plainly
            except _NoReuse:
                pass

    def _receive(self, blob: Descriptor, receiver: partial.Partial, task: Task, stopped: Callable[[], bool]) -> None:
        judge = ranges.Judge(spare=self._spare)

        def take(data: bytes | memoryview) -> None:
            receiver.write(data)
            task.advance(len(data))
            self.count(len(data))
            if stopped():
                raise workers.Stopped("the transfer was broken off")

        try:
            with contextlib.closing(self._client.read_blob(self._repository, blob, receiver.size)) as stream:
                for data in stream:
                    take(data)
                    judge.received(len(data), blob.size - receiver.size)
        except ranges.Slow:
            pass
        else:
            return
        try:
            for segment in self._ranges(blob, receiver.size, judge.rate, task, stopped):
                take(segment)
        except (ranges.NoRanges, ranges.NoGain):
            self._several = False
            self._receive(blob, receiver, task, stopped)

    def _ranges(
        self, blob: Descriptor, start: int, rate: float, task: Task, stopped: Callable[[], bool]
    ) -> Iterator[bytes]:
        return ranges.fetch(start, blob.size, 1 + self._spare(), self._fetcher(blob, task, stopped), rate=rate)

    def _fetcher(self, blob: Descriptor, task: Task, stopped: Callable[[], bool]) -> ranges.FetchRange:
        def fetch_range(offset: int, size: int) -> bytes:
            def attempt() -> bytes:
                if stopped():
                    raise workers.Stopped("the transfer was broken off")
                return self._client.read_range(self._repository, blob, offset, size)

            try:
                return self._client.retrying(attempt, tell=task.waiting, stopped=stopped)
            except (Broken, Refused, Busy) as exc:
                raise _Borne(exc) from exc

        return fetch_range


def _copied(path: Path, offset: int, size: int) -> Iterator[bytes]:
    # a part of another blob here
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            while size:
                data = os.pread(fd, min(size, fsutil.COPY_BUFFER), offset)
                if not data:
                    raise _NoReuse
                yield data
                offset, size = offset + len(data), size - len(data)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _NoReuse from exc


class Coming:
    """Small blobs that begin to come when the context does.

    They are not worth files that could be gone on with: each comes whole, or again. They are made durable together.
    """

    def __init__(self, download: Download, blobs: list[Descriptor], first: Collection[Digest]) -> None:
        self._download = download
        self._left = {blob.digest: blob for blob in blobs}
        self._first = first
        self._held = contextlib.ExitStack()
        #: Nothing is written to a file that was closed, whose number may be another's by then.
        self._lock = threading.Lock()
        self._new: list[tuple[Descriptor, BlobWriter]] = []
        self._come: queue.SimpleQueue[list[tuple[Descriptor, BlobWriter]] | None] = queue.SimpleQueue()
        self._finished: dict[Digest, BlobWriter] = {}
        self._error: BaseException | None = None
        self._fetch: small.Fetch | None = None

    def __enter__(self) -> Self:
        if len(self._left) > _FEW:
            self._fetch = self._download.together(list(self._left.values()), self._keep_soon, self._ended)
            try:
                self._download.begin(self._fetch)
            except (OSError, RuntimeError):  # no descriptor, or no thread, left for it
                self._fetch = None
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fetch is not None:
            self._download.give_up(self._fetch)
            self._fetch = None  # which knows us
        with self._lock:
            self._held.close()

    # --- called by the pool's thread ---------------------------------------------------------------------------

    def _keep_soon(self, blob: Descriptor, data: bytes) -> None:
        with self._download.telling(blob) as task:
            self._new.append((blob, self._keep(blob, data)))
            task.advance(len(data))
        if len(self._new) >= _DURABLE_AT_ONCE or blob.digest in self._first:
            # while the others come, and not all of them at the end
            self._hand_over()

    def _ended(self, error: BaseException | None) -> None:
        self._error = error
        self._hand_over()
        self._come.put(None)

    def _hand_over(self) -> None:
        new, self._new = self._new, []
        self._come.put(new)

    # --- called by the pull ------------------------------------------------------------------------------------

    def come_first(self) -> None:
        """Waits for those that were to come first; they are in the store then. Raises like :func:`ovms.oci.transfer.pull`."""
        self._wait(self._first)
        self._fetch_as_ever([blob for digest, blob in self._left.items() if digest in self._first])
        self._commit(self._first)

    def finish(self) -> None:
        """Waits for all of them; they are in the store then. Raises like :func:`ovms.oci.transfer.pull`."""
        self._wait(None)
        self._fetch_as_ever(list(self._left.values()))
        self._commit(list(self._finished))

    def _wait(self, wanted: Collection[Digest] | None) -> None:
        # for those that are wanted (None: for all), or until no more come
        while self._fetch is not None and (wanted is None or any(digest in self._left for digest in wanted)):
            if (come := self._come.get()) is None:
                busy, self._fetch = self._fetch.busy, None
                error, self._error = self._error, None
                try:
                    if error is not None:
                        raise error
                finally:
                    del error
                if busy is not None:
                    self._download.bear(busy)
                return
            for blob, writer in come:
                writer.wait()
                self._finished[blob.digest] = writer
                self._left.pop(blob.digest, None)

    def _fetch_as_ever(self, blobs: list[Descriptor]) -> None:
        def job(blob: Descriptor) -> workers.Job:
            def fetch(stopped: Callable[[], bool]) -> None:
                with self._download.telling(blob) as task:
                    data = self._download.read_small(blob, task)
                    with self._lock:
                        if stopped():
                            return
                        self._finished[blob.digest] = self._keep(blob, data)
                        del self._left[blob.digest]
                    task.advance(len(data))

            return fetch

        if blobs:
            self._download.run([job(blob) for blob in blobs])

    def _keep(self, blob: Descriptor, data: bytes) -> BlobWriter:
        writer = self._held.enter_context(self._download.layout.loose(blob.digest))
        writer.write(data)
        writer.finish(blob)
        self._download.count(len(data))
        return writer

    def _commit(self, digests: Collection[Digest]) -> None:
        finished = [self._finished.pop(digest) for digest in digests if digest in self._finished]
        self._download.layout.commit_all(finished)


def read_control(client: RegistryClient, repository: str, blob: Descriptor, progress: Progress = NULL) -> bytes:
    """The control part of a RAM snapshot in a registry, by ranges; from the beginning of the blob where it knows none.

    Raises:
        DigestMismatch, SnapshotInvalid: see :func:`ovms.oci.control.fetch`.
        RegistryError: and its kinds: as the registry met us.
    """
    from ovms.oci import control

    with progress.task(f"what {label(blob)} needs") as task:

        def read(offset: int, size: int) -> bytes:
            try:
                data = client.retrying(lambda: client.read_range(repository, blob, offset, size), tell=task.waiting)
            except ranges.NoRanges:
                data = client.retrying(lambda: begin(offset + size), tell=task.waiting)[offset:]
            task.advance(len(data))
            return data

        def begin(size: int) -> bytes:
            data = bytearray()
            with contextlib.closing(client.read_blob(repository, blob)) as stream:
                for piece in stream:
                    data += piece[: size - len(data)]
                    if len(data) == size:
                        break
            return bytes(data)

        return control.fetch(blob, read)
