"""Writing a blob that comes in order: runs of zeroes as holes, and large ones past the page cache.

Past the cache (``O_DIRECT``) nothing is copied into pages that would then have to be written anyway, and what else the
host has in its cache stays there: three times as fast where it was measured. Linux asks for whole blocks at whole blocks'
offsets from memory that begins at one, so what comes otherwise goes through a buffer. Where a file system can't, it is
written as ever.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.oci.descriptor import Descriptor
from ovms.spec import mediatypes

#: What addresses, offsets and lengths have to be multiples of: no disk has larger logical blocks.
ALIGNMENT: Final = 4096
#: Bytes in one piece, where nothing goes through the cache (which likes 256 KiB best). Each doubling from 1 MiB on saves another sixteenth of
#: a pull's processor time; four blobs at once hold so many buffers.
BUFFER: Final = 4 << 20
_DIRECT_FROM: Final = 16 << 20
#: Bytes after which the kernel is asked to begin to write: the fsync at the end has little left to wait for then.
_FLUSH_EVERY: Final = 16 << 20


def past_cache(blob: Descriptor) -> bool:
    """Whether a blob should go past the page cache: a large one, and no RAM snapshot, which is read as soon as it is here."""
    return blob.size >= _DIRECT_FROM and blob.media_type not in mediatypes.RAM_SNAPSHOTS


def pages(size: int) -> memoryview:
    """Memory of *size* bytes that begins at a page, zeroed."""
    return memoryview(mmap.mmap(-1, size))


class Appender:
    """Appends to an open file. Call :meth:`flush` before anybody else looks at it, and :meth:`close` at the end."""

    def __init__(self, fd: int, path: Path, *, direct: bool) -> None:
        """*fd* is *path*, and stays the caller's. *direct*: past the page cache, where the file system can."""
        self._fd = fd
        self._direct = _open_direct(path) if direct else None
        #: Whole pages, so aligned; made when first needed.
        self._buffer: memoryview | None = None
        self._waiting = 0
        self._flushed = self.size = 0

    def close(self) -> None:
        """Gives up what :meth:`flush` has not written."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def start(self, size: int) -> None:
        """Goes on at *size*, whatever came before."""
        self.size = self._flushed = size
        self._waiting = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends *data*. Raises OSError as the file system does; what came before stays."""
        if self._direct is None:
            fsutil.pwrite_sparse(self._fd, data, self.size)
            self.size += len(data)
            self._begin_to_write()
            return
        view = memoryview(data)
        whole = 0 if self._waiting or self.size % ALIGNMENT else len(view) - len(view) % ALIGNMENT
        if whole and self._write_direct(view[:whole]):
            view = view[whole:]
        while view and self._direct is not None:
            view = view[self._keep(view) :]
            if self._waiting == BUFFER - (self.size - self._waiting) % ALIGNMENT:
                self._write_waiting()
        if view:
            self.write(view)

    def flush(self) -> None:
        """Writes what waits to become a whole block."""
        if self._waiting:
            assert self._buffer is not None
            at = self.size - self._waiting
            fsutil.pwrite_sparse(self._fd, self._buffer[: self._waiting], at)
            self._waiting = 0

    def _keep(self, view: memoryview) -> int:
        # as much as fits; the buffer is full where the file is at a whole block again
        if self._buffer is None:
            self._buffer = pages(BUFFER)
        room = BUFFER - (self.size - self._waiting) % ALIGNMENT - self._waiting
        count = min(len(view), room)
        self._buffer[self._waiting : self._waiting + count] = view[:count]
        self._waiting += count
        self.size += count
        return count

    def _write_waiting(self) -> None:
        assert self._buffer is not None
        at, waiting = self.size - self._waiting, self._waiting
        if at % ALIGNMENT:
            self.flush()  # once: the next begins at a whole block
            return
        self.size, self._waiting = at, 0
        if not self._write_direct(self._buffer[:waiting]):
            self.close()
            self.write(self._buffer[:waiting])

    def _write_direct(self, view: memoryview) -> bool:
        # False: the file system, or the memory's address, does not allow it
        assert self._direct is not None
        try:
            fsutil.pwrite_sparse(self._direct, view, self.size)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return False
        self.size += len(view)
        return True

    def _begin_to_write(self) -> None:
        if self.size - self._flushed >= _FLUSH_EVERY:
            # Linux begins to write what is dirty in the range, and does not wait for it.
            os.posix_fadvise(self._fd, self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None  # as tmpfs has it, before Linux 6.6
