"""What an artifact in the store lacks in a registry, sent there: what is there is skipped, or mounted from another repository."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from ovms import fsutil
from ovms.errors import BlobNotFound, OvmsError, ReferenceNotFound, RegistryProtocol, StoreCorrupt
from ovms.oci import absent, workers
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, label
from ovms.oci.layout import REPAIR, Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import Busy, RegistryClient
from ovms.progress import Progress, Task
from ovms.spec import limits
from ovms.spec.digest import Digest

if TYPE_CHECKING:
    import socket

#: Bytes of an upload after which progress is told, and it is asked whether to go on.
_SENT_AT_ONCE: Final = 1 * limits.MIB
#: Manifests that a message names.
_NAMED_MAX: Final = 3


class Upload:
    """Sends what is here of artifacts to one repository."""

    def __init__(
        self,
        layout: Layout,
        client: RegistryClient,
        repository: str,
        progress: Progress,
        files: Mapping[Digest, Path] | None = None,
    ) -> None:
        self._layout = layout
        self._client = client
        self._repository = repository
        self._progress = progress
        self._files = files or {}
        self._elsewhere: dict[Digest, str] | None = None
        self._lock = threading.Lock()

    def image(self, image: ImageManifest, target: str) -> None:
        """Every blob, several at once; then the manifest."""
        self.blobs(image)
        self.manifest(image, target)

    def blobs(self, image: ImageManifest) -> None:
        """Every blob, several at once."""
        left_out = [] if self._files else absent.left_out(self._layout, image.blobs)
        for blob in left_out:
            if not self._client.has_blob(self._repository, blob.digest):
                raise absent.missing(self._layout, image.digest, blob.digest, "the artifact is not whole here")
        for blob in image.blobs:
            if blob in left_out:
                continue
            if blob.digest not in self._files and not self._layout.has(blob):
                raise BlobNotFound(
                    f"the store has lost the blob {blob.digest}",
                    hint="build or pull the artifact again",
                    digest=blob.digest,
                )
        workers.run_all([self._job(blob) for blob in sorted(image.blobs, key=lambda blob: -blob.size)])

    def index(self, index: ImageIndex, reference: Reference) -> None:
        """What is here of an index, then the index. The rest of it may be there already; not every registry asks for it."""
        absent_here: list[Digest] = []
        here: list[Digest] = []
        for child in index.manifests:
            if self._layout.size(child.digest) is None:
                absent_here.append(child.digest)
                continue
            image = self._layout.manifest(child.digest)
            if isinstance(image, ImageManifest):
                self.image(image, child.digest)
                here.append(child.digest)
        lacking = [digest for digest in absent_here if not self._there(digest)]
        try:
            self.manifest(index, reference.tag or index.digest, retry=not lacking)
        except (Busy, RegistryProtocol) as exc:
            if not lacking:
                raise
            raise BlobNotFound(
                f"the registry {self._client.host} takes no index that is not whole, and what {reference} lists for other "
                f"platforms is neither here nor there: {', '.join(lacking[:_NAMED_MAX])}{', …' if lacking[_NAMED_MAX:] else ''}",
                hint=f"push what is here by itself: 'ovm push {here[0]} {reference}'" if here else "pull it again",
                missing=lacking,
            ) from exc

    def _there(self, digest: Digest) -> bool:
        try:
            self._client.get_manifest(Reference(self._client.host, self._repository, None, digest))
        except ReferenceNotFound:
            return False
        return True

    def manifest(self, manifest: ImageManifest | ImageIndex, target: str, *, retry: bool = True) -> None:
        """The manifest, and what lets it be found by its subject."""
        entry = manifest.as_referrer()
        handled = self._client.put_manifest(self._repository, target, manifest.raw, entry.media_type, retry=retry)
        if manifest.subject is not None and not handled:
            from ovms.oci import referrers

            referrers.add(self._client, self._repository, entry, manifest.subject.digest)

    def _job(self, blob: Descriptor) -> workers.Job:
        def send(stopped: Callable[[], bool]) -> None:
            with self._progress.task(label(blob), blob.size) as task:
                if self._client.has_blob(self._repository, blob.digest):
                    task.note("exists already")
                elif (source := self._source(blob.digest)) and self._client.mount_blob(
                    self._repository, blob.digest, source
                ):
                    task.note(f"mounted from {source}")
                else:
                    path = self._files.get(blob.digest) or self._layout.path(blob.digest)
                    body = _Body(path, task, stopped)
                    with contextlib.closing(body):
                        self._push(blob, body, task)

        return send

    def _push(self, blob: Descriptor, body: _Body, task: Task) -> None:
        try:
            self._client.push_blob(self._repository, blob, body.open, tell=task.waiting)
        except RegistryProtocol:
            from ovms.oci.fsck import damage

            # what it refuses may well be our fault
            if (why := damage(self._layout, blob.digest)) is None:
                raise
            raise StoreCorrupt(why, hint=REPAIR, digest=blob.digest) from None

    def _source(self, digest: Digest) -> str | None:
        # Another repository of this registry that we have pushed the blob to, or pulled it from.
        with self._lock:
            if self._elsewhere is None:
                self._elsewhere = self._find_elsewhere()
            return self._elsewhere.get(digest)

    def _find_elsewhere(self) -> dict[Digest, str]:
        answer: dict[Digest, str] = {}
        for entry in self._layout.entries():
            with contextlib.suppress(OvmsError):
                reference = Reference.parse(entry.name)
                if reference.registry == self._client.host and reference.repository != self._repository:
                    for digest in self._layout.reachable(entry.descriptor.digest):
                        answer.setdefault(digest, reference.repository)
        return answer


class _Body:
    """A blob's file, opened anew for each attempt, whose reading is the progress."""

    def __init__(self, path: Path, task: Task, stopped: Callable[[], bool]) -> None:
        self._path = path
        self._task = task
        self._stopped = stopped
        self._sent = 0
        self._reader: _Reader | None = None

    def open(self, offset: int, size: int) -> IO[bytes]:
        """What an HTTP body needs of a file: ``read``, ``close`` and iteration over *size* bytes from *offset* on."""
        self.close()
        self._task.advance(offset - self._sent)
        self._sent = offset
        self._reader = _Reader(self._path, offset, size, self._advance)
        return self._reader  # type: ignore[return-value]

    def _advance(self, amount: int) -> None:
        if self._stopped():
            raise workers.Stopped("the transfer was broken off")
        self._sent += amount
        self._task.advance(amount)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Reader:
    def __init__(self, path: Path, offset: int, size: int, advance: Callable[[int], None]) -> None:
        self._file = path.open("rb", buffering=0)
        self._at = offset
        self._left = size
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        wanted = min(self._left, size if size >= 0 else self._left)
        data = os.pread(self._file.fileno(), wanted, self._at)
        self._at += len(data)
        self._left -= len(data)
        self._advance(len(data))
        return data

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(fsutil.COPY_BUFFER):
            yield data

    def send_to(self, sock: socket.socket) -> None:
        """All that is left, from the page cache into the socket: no copy comes by here."""
        while self._left and (sent := sock.sendfile(self._file, self._at, min(self._left, _SENT_AT_ONCE))):
            self._at += sent
            self._left -= sent
            self._advance(sent)

    def close(self) -> None:
        self._file.close()
