"""From a captured memory to a RAM snapshot blob, and back to a file that a VMM maps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ovms import fsutil, process
from ovms.errors import SnapshotInvalid, StoreCorrupt, Unsupported
from ovms.memory.capture import Capture
from ovms.oci.layout import Layout
from ovms.progress import NULL, Progress
from ovms.spec import limits, ramsnap
from ovms.spec.digest import Digest, hex_of
from ovms.spec.ramheader import Header

PAGE: Final = ramsnap.PAGE
_CHUNK: Final = limits.RAM_CHUNK_PAGES * PAGE
_ZERO_PAGE: Final = bytes(PAGE)


def store(
    layout: Layout, capture: Capture, state: bytes, header: Header, progress: Progress = NULL
) -> tuple[Digest, int]:
    """Encodes a captured memory and adds it to the store. Returns the blob's digest and size.

    Raises:
        DiskFull: no room.
    """
    import tempfile

    with (
        tempfile.TemporaryFile(dir=layout.staging_root) as spool,
        layout.writer() as writer,
        progress.task("RAM snapshot", capture.size) as task,
    ):
        chunks: list[ramsnap.Chunk] = []
        offset = 0
        done = 0
        for page, pages in _chunks(capture.fd, capture.size):
            codec, stored, digest = ramsnap.compress(pages)
            try:
                spool.write(stored)
            except OSError as exc:
                raise (fsutil.disk_full(exc, "writing the RAM snapshot", layout.root) or exc) from exc
            chunks.append(ramsnap.Chunk(page, len(pages) // PAGE, offset, len(stored), codec, digest))
            offset += len(stored)
            at = page * PAGE + len(pages)
            task.advance(at - done)
            done = at
        task.advance(capture.size - done)
        control = ramsnap.build_control(header, state, chunks, chunk_pages=limits.RAM_CHUNK_PAGES)
        writer.write(control)
        spool.seek(0)
        while data := spool.read(fsutil.COPY_BUFFER):
            writer.write(data)
        size = writer.size
        return writer.commit(), size


def _chunks(fd: int, size: int) -> Iterator[tuple[int, memoryview]]:
    # Aligned windows, so that equal memory gives equal chunks whatever lies before it; zero pages at a window's ends
    # are left out.
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    done = 0
    for start, end in fsutil.data_extents(fd, size):
        for at in range(max(done, start // _CHUNK * _CHUNK), end, _CHUNK):
            got = os.preadv(fd, [view[: min(_CHUNK, size - at)]], at)
            done = at + _CHUNK
            first, last = _trim(view[:got])
            if first < last:
                yield at // PAGE + first, view[first * PAGE : last * PAGE]


def _trim(window: memoryview) -> tuple[int, int]:
    first, last = 0, len(window) // PAGE
    if fsutil.is_zero(window):
        return 0, 0
    while window[first * PAGE : (first + 1) * PAGE] == _ZERO_PAGE:
        first += 1
    while window[(last - 1) * PAGE : last * PAGE] == _ZERO_PAGE:
        last -= 1
    return first, last


def read_control(layout: Layout, digest: Digest) -> ramsnap.Control:
    """The control part of a RAM snapshot in the store: what it needs, its device state and its index.

    Raises:
        SnapshotInvalid, JsonInvalid: malformed.
        FileProblem: it is not in the store.
    """
    with fsutil.open_input(layout.path(digest), "the RAM snapshot") as blob:
        return _control_of(blob)


def _control_of(blob: BinaryIO) -> ramsnap.Control:
    fd = blob.fileno()
    prefix = ramsnap.parse_prefix(os.pread(fd, ramsnap.PREFIX_SIZE, 0))
    size = os.fstat(fd).st_size
    if prefix.blob_size != size:
        raise SnapshotInvalid(
            f"the RAM snapshot has {size} bytes, but says that it has {prefix.blob_size}", rule="RAM-1"
        )
    return ramsnap.parse_control(os.pread(fd, prefix.data_offset, 0))


def materialise(layout: Layout, digest: Digest, progress: Progress = NULL) -> Path:
    """The memory of a RAM snapshot as a sparse file, ready to be mapped; made once for each boot of the host.

    The file is in the page cache after this, and never synced to the disk: what a power failure might damage carries
    the number of another boot, and is made again.

    Raises:
        SnapshotInvalid, JsonInvalid: the blob is damaged.
        Unsupported: it is a diff.
        DiskFull: said before anything is written.
    """
    name = hex_of(digest)
    target = layout.derived_dir / f"{name}.{process.boot_id()[:8]}.ram"
    with fsutil.file_lock(layout.derived_dir / f"{name}.lock"), contextlib.ExitStack() as undo:
        blob = undo.enter_context(fsutil.open_input(layout.path(digest), "the RAM snapshot"))
        control = _control_of(blob)
        if control.header.parent is not None:
            raise Unsupported("the RAM snapshot is a diff on another one, which this version does not put together")
        if target.exists():
            if target.stat().st_size == control.prefix.memory_size:
                return target
            raise StoreCorrupt(
                f"{target} is not of the size that it should have",
                hint="'ovm fsck --repair' removes it, and the next start makes it anew",
            )
        for stale in layout.derived_dir.glob(f"{name}.*"):
            if stale.suffix != ".lock":
                stale.unlink()
        fsutil.require_space(layout.derived_dir, sum(c.size for c in control.chunks), "unpacking the RAM snapshot")
        temporary = target.with_suffix(".tmp")
        undo.callback(temporary.unlink, missing_ok=True)
        try:
            _unpack(blob, control, temporary, progress)
        except OSError as exc:
            raise (fsutil.disk_full(exc, "unpacking the RAM snapshot", temporary) or exc) from exc
        temporary.replace(target)
        return target


def _unpack(blob: BinaryIO, control: ramsnap.Control, path: Path, progress: Progress) -> None:
    prefix = control.prefix
    with (
        path.open("xb", buffering=0) as image,
        progress.task("unpacking RAM", sum(c.size for c in control.chunks)) as task,
    ):
        path.chmod(0o600)
        os.ftruncate(image.fileno(), prefix.memory_size)
        for chunk in control.chunks:
            stored = os.pread(blob.fileno(), chunk.stored_size, prefix.data_offset + chunk.offset)
            data = ramsnap.unpack_chunk(chunk, stored, prefix.data_offset)
            fsutil.pwrite_all(image.fileno(), data, chunk.page * PAGE)
            task.advance(len(data))
