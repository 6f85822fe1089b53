"""Blobs that are still coming: kept when a pull ends early, and gone on with by the next one.

::

    store/ovms.partial/
    ├── <hex>           what has come so far, in order; its length is how much that is
    └── <hex>.lock      flock: whoever fetches this blob. A second pull waits, and finds the blob there

Bytes are appended in order, so a file is right up to its length whenever its writer is killed. Its digest is checked over
all of it before the blob gets its name: what a power failure may have done to the file is found then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import DigestMismatch, Locked
from ovms.oci import appending
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.spec.digest import from_hasher, hex_of

#: Seconds for which a partial file is worth keeping: the collector takes those that are older.
KEPT: Final = 7 * 24 * 3600.0


class Partial:
    """One blob in the making; its bytes come in order through :meth:`write`."""

    def __init__(self, layout: Layout, fd: int, path: Path, descriptor: Descriptor) -> None:
        self._layout = layout
        self._fd = fd
        self._path = path
        self._descriptor = descriptor
        self._hasher = hashlib.sha256()
        self._file = appending.Appender(fd, path, direct=appending.past_cache(descriptor))
        #: Whether bytes of an earlier pull are in it.
        self.resumed = False

    @property
    def size(self) -> int:
        """How many bytes have come."""
        return self._file.size

    def load(self) -> None:
        """Takes over what an earlier pull has left."""
        length = os.fstat(self._fd).st_size
        if length > self._descriptor.size:
            self.reset()
            return
        fsutil.hash_file(self._fd, self._hasher)
        self._file.start(length)
        self.resumed = length > 0

    def reset(self) -> None:
        """Throws away what there is."""
        os.ftruncate(self._fd, 0)
        self._hasher = hashlib.sha256()
        self._file.start(0)
        self.resumed = False

    def write(self, data: bytes | memoryview) -> None:
        """Appends *data*; runs of zeroes take no disk.

        Raises:
            DiskFull: the file system has no room; what came before stays.
        """
        self._hasher.update(data)
        with self._noticing():
            self._file.write(data)

    def close(self) -> None:
        """Leaves what has come to the next pull."""
        with contextlib.suppress(OSError):
            self._file.flush()
        self._file.close()

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise (fsutil.disk_full(exc, "writing a blob", self._path) or exc) from exc

    def commit(self) -> None:
        """Checks the whole of it, makes it durable, and gives it its name in the store (which ``Layout.sync`` makes durable).

        Raises:
            DigestMismatch: it is not what was promised; nothing of it is kept.
        """
        wanted = self._descriptor
        digest = from_hasher(self._hasher)
        if digest != wanted.digest or self.size != wanted.size:
            size = self.size
            self.reset()
            raise DigestMismatch(
                f"a blob of {wanted.size} bytes with digest {wanted.digest} was expected; "
                f"{size} bytes with digest {digest} came",
                hint="the source is damaged or was tampered with; try again, or ask its owner",
                expected=wanted.digest,
                got=digest,
                rule="OCI-21",
            )
        with self._noticing():
            self._file.flush()
        self._layout.publish(self._fd, self._path, digest, durable=False)


def have(layout: Layout, descriptor: Descriptor) -> int:
    """How many bytes of a blob an earlier pull has left, on disk."""
    try:
        info = (layout.partial_dir / hex_of(descriptor.digest)).stat()
    except FileNotFoundError:
        return 0
    return min(info.st_blocks * 512, info.st_size, descriptor.size)


def any_since(layout: Layout, when: float) -> bool:
    """Whether a blob has partly come since *when* (seconds since 1970), for a later pull to go on with."""
    with os.scandir(layout.partial_dir) as files:
        infos = [file.stat() for file in files if not file.name.endswith(".lock")]
    return any(info.st_size and info.st_mtime >= when for info in infos)


@contextlib.contextmanager
def receiving(
    layout: Layout,
    descriptor: Descriptor,
    stopped: Callable[[], bool],
    tell: Callable[[str], None] = lambda _text: None,
) -> Iterator[Partial | None]:
    """The partial file of a blob, locked; None when the blob is in the store (another pull may have put it there).

    Waits for another pull of the same blob; *tell* is told so, and with ``""`` of the end. What is not committed stays for the
    next one.

    Raises:
        Locked: we waited, and *stopped* says that there is no point in it any more.
    """
    directory = layout.partial_dir
    path = directory / hex_of(descriptor.digest)
    lock = directory / f"{path.name}.lock"
    with _locked(lock, stopped, tell):
        try:
            if layout.has(descriptor):
                yield None
            else:
                with _opened(layout, path, descriptor) as partial:
                    yield partial
        finally:
            if layout.size(descriptor.digest) is not None:
                # whoever waits for it finds the blob
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(layout: Layout, path: Path, descriptor: Descriptor) -> Iterator[Partial]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        partial = Partial(layout, fd, path, descriptor)
        try:
            partial.load()
            yield partial
        finally:
            partial.close()
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: Path, stopped: Callable[[], bool], tell: Callable[[str], None]) -> Iterator[None]:
    told = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not _try_lock(fd):
                if stopped():
                    raise Locked(f"another ovms process holds {path}", path=str(path))
                if not told:
                    told = True
                    tell("another ovm fetches it")
                time.sleep(0.05)
            # Whoever had it may have removed the file: then its lock keeps nobody away.
            if _same_file(fd, path):
                if told:
                    tell("")
                yield
                return
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(fd: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
