"""From a captured memory to a RAM snapshot blob, and back to a file that a VMM maps."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from ovms import fsutil, process
from ovms.errors import ResourceError, StoreCorrupt, Unsupported
from ovms.memory import chain, parallel
from ovms.memory.capture import Capture, Run
from ovms.oci.layout import Layout
from ovms.progress import NULL, Progress
from ovms.spec import limits, ramsnap
from ovms.spec.digest import Digest, hex_of
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Header

PAGE: Final = ramsnap.PAGE
_CHUNK: Final = limits.RAM_CHUNK_PAGES * PAGE
#: Bytes that a thread takes at once: they stay in its cache, and handing them over costs nothing beside the work. Written in pieces
#: of 1 MiB, a file in the page cache of Linux 6.18 takes five times as much of the system's time as in ones of 512 KiB.
_BATCH: Final = 8 * _CHUNK
_ZERO_DIGEST: Final = bytes(32)


# --- storing ---------------------------------------------------------------------------------------------------------


class _Encoded(NamedTuple):
    # Pages as they are stored.
    page: int
    pages: int
    codec: int
    stored: bytes | memoryview
    digest: bytes


#: Encodes a part of the memory; called in threads.
_Encoder = Callable[[], list[_Encoded]]
#: Gives what decrypts the snapshot with an encrypted one's header.
Decrypt = Callable[[Header], Cipher]


class _Form(NamedTuple):
    # How pages are stored.
    compression: Compression
    cipher: Cipher | None


def store(
    layout: Layout,
    capture: Capture,
    state: bytes,
    header: Header,
    progress: Progress = NULL,
    *,
    compression: Compression = Compression.LZ4,
    cipher: Cipher | None = None,
) -> tuple[Digest, int]:
    """Encodes a captured memory and adds it to the store. Returns the blob's digest and size.

    *cipher* encrypts it, where *header* says so: no file has anything of the memory but its ciphertext then.

    Where *header* names a parent, that is what the VM was restored from (``capture.base``), and the blob has the pages that
    differ from it. Without a parent it has all of the memory, which the capture must be (:meth:`Capture.finish`).

    Raises:
        DiskFull: no room.
    """
    import tempfile

    diff = header.parent is not None
    form = _Form(compression, cipher)
    work = _diff_work(capture, form) if diff else _base_work(capture, form)
    total = capture.written if diff else capture.size
    encoded = parallel.ordered(lambda item: (item[0], item[1]()), work)
    with (
        tempfile.TemporaryFile(dir=layout.staging_root) as spool,
        layout.writer() as writer,
        contextlib.closing(encoded),
        progress.task("RAM snapshot", total) as task,
    ):
        chunks: list[ramsnap.Chunk] = []
        offset = done = 0
        for reached, items in encoded:
            for item in items:
                try:
                    spool.write(item.stored)
                except OSError as exc:
                    raise (fsutil.disk_full(exc, "writing the RAM snapshot", layout.root) or exc) from exc
                chunk = ramsnap.Chunk(item.page, item.pages, offset, len(item.stored), item.codec, item.digest)
                if chunks and _goes_on(chunks[-1], chunk):
                    before = chunks.pop()
                    chunk = before._replace(pages=before.pages + chunk.pages)
                chunks.append(chunk)
                offset += chunk.stored_size
            task.advance(reached - done)
            done = reached
        task.advance(total - done)
        control = ramsnap.build_control(header, state, chunks, chunk_pages=limits.RAM_CHUNK_PAGES, cipher=cipher)
        writer.write(control)
        spool.seek(0)
        while data := spool.read(fsutil.COPY_BUFFER):
            writer.write(data)
        size = writer.size
        return writer.commit(), size


def _goes_on(one: ramsnap.Chunk, other: ramsnap.Chunk) -> bool:
    # of zeroes there may be any number in one
    return one.codec == other.codec == ramsnap.CODEC_ZERO and one.page + one.pages == other.page


def _base_work(capture: Capture, form: _Form) -> Iterator[tuple[int, _Encoder]]:
    # (how far the memory is done then, what does it)
    fd, size = capture.fd, capture.size
    windows: list[int] = []
    for at in _windows(fd, size):
        if windows and at - windows[0] >= _BATCH:
            yield windows[-1] + _CHUNK, _base_encoder(fd, size, windows, form)
            windows = []
        windows.append(at)
    if windows:
        yield min(windows[-1] + _CHUNK, size), _base_encoder(fd, size, windows, form)


def _windows(fd: int, size: int) -> Iterator[int]:
    # Aligned, so that equal memory gives equal chunks whatever lies before it.
    done = 0
    for start, end in fsutil.data_extents(fd, size):
        for at in range(max(done, start // _CHUNK * _CHUNK), end, _CHUNK):
            yield at
            done = at + _CHUNK


def _base_encoder(fd: int, size: int, windows: Sequence[int], form: _Form) -> _Encoder:
    def encode() -> list[_Encoded]:
        start = windows[0]
        data = memoryview(_read(fd, start, min(windows[-1] + _CHUNK, size)))
        answer = []
        for at in windows:
            window = data[at - start : at - start + _CHUNK]
            # zero pages at a window's ends are left out
            first, last = _trim(window)
            if first < last:
                answer.append(_encode(at // PAGE + first, window[first * PAGE : last * PAGE], form))
        return answer

    return encode


def _encode(page: int, data: memoryview, form: _Form) -> _Encoded:
    if form.cipher is None:
        codec, stored, digest = ramsnap.compress(data, form.compression)
    else:
        codec, stored, digest = ramsnap.encrypt(page, data, form.compression, form.cipher)
    return _Encoded(page, len(data) // PAGE, codec, stored, digest)


def _read(fd: int, start: int, end: int) -> bytes:
    data = os.pread(fd, end - start, start)
    while len(data) < end - start:
        more = os.pread(fd, end - start - len(data), start + len(data))
        if not more:
            raise StoreCorrupt("a copy of a VM's memory ends too early")
        data += more
    return data


def _trim(window: memoryview) -> tuple[int, int]:
    first, last = 0, len(window) // PAGE
    if fsutil.is_zero(window):
        return 0, 0
    while fsutil.is_zero(window[first * PAGE : (first + 1) * PAGE]):
        first += 1
    while fsutil.is_zero(window[(last - 1) * PAGE : last * PAGE]):
        last -= 1
    return first, last


def _diff_work(capture: Capture, form: _Form) -> Iterator[tuple[int, _Encoder]]:
    if capture.base is None:
        raise AssertionError("a diff needs what the VM was restored from")
    runs: list[Run] = []
    done = 0
    for run in _split(capture.runs):
        if runs and run.start // _BATCH != runs[0].start // _BATCH:
            yield done, _diff_encoder(capture.fd, capture.base, runs, form)
            runs = []
        runs.append(run)
        done += run.end - run.start
    if runs:
        yield done, _diff_encoder(capture.fd, capture.base, runs, form)


def _split(runs: Iterable[Run]) -> Iterator[Run]:
    # at each multiple of a batch
    for start, end in runs:
        at = start
        while at < end:
            behind = min(end, (at // _BATCH + 1) * _BATCH)
            yield Run(at, behind)
            at = behind


def _diff_encoder(fd: int, base: int, runs: Sequence[Run], form: _Form) -> _Encoder:
    def encode() -> list[_Encoded]:
        start, end = runs[0].start, runs[-1].end
        data, before = _read(fd, start, end), _read(base, start, end)
        view = memoryview(data)
        answer = []
        for zero, first, last in _changed(data, before, start, runs):
            if zero:
                answer.append(_Encoded(first // PAGE, (last - first) // PAGE, ramsnap.CODEC_ZERO, b"", _ZERO_DIGEST))
            else:
                answer.append(_encode(first // PAGE, view[first - start : last - start], form))
        return answer

    return encode


def _changed(data: bytes, before: bytes, start: int, runs: Iterable[Run]) -> Iterator[tuple[bool, int, int]]:
    # (whether they are zero now, from, to) of what a VM wrote and is not as before, in pieces that are chunks
    kind: bool | None = None  # of the piece that is open, which begins at first
    first = 0
    for run in runs:
        for at in range(run.start, run.end, PAGE):
            page = data[at - start : at - start + PAGE]
            now = None if page == before[at - start : at - start + PAGE] else fsutil.is_zero(page)
            if now != kind or at % _CHUNK == 0:
                if kind is not None:
                    yield kind, first, at
                kind, first = now, at
        if kind is not None:
            yield kind, first, run.end
            kind = None


# --- looking into them -----------------------------------------------------------------------------------------------


def read_control(layout: Layout, digest: Digest) -> ramsnap.Control:
    """The control part of a RAM snapshot in the store: what it needs, its device state and its index.

    Raises:
        SnapshotInvalid, JsonInvalid: malformed.
        FileProblem: it is not in the store.
    """
    with fsutil.open_input(layout.path(digest), "the RAM snapshot") as blob:
        return _control_of(blob)


def read_needs(layout: Layout, digest: Digest) -> ramsnap.Needs:
    """What a RAM snapshot in the store needs, and its device state; its index is not looked into. Raises like :func:`read_control`."""
    with fsutil.open_input(layout.path(digest), "the RAM snapshot") as blob:
        fd = blob.fileno()
        return ramsnap.parse_needs(os.pread(fd, chain.read_prefix(fd).data_offset, 0))


def _control_of(blob: BinaryIO) -> ramsnap.Control:
    fd = blob.fileno()
    return ramsnap.parse_control(os.pread(fd, chain.read_prefix(fd).data_offset, 0))


# --- unpacking -------------------------------------------------------------------------------------------------------


def image_of(layout: Layout, digest: Digest) -> Path:
    """Where the memory of a RAM snapshot lies, ready to be mapped, once :func:`materialise` has made it."""
    return layout.derived_dir / f"{hex_of(digest)}.{process.boot_id()[:8]}.ram"


def materialise(
    layout: Layout, digest: Digest, progress: Progress = NULL, *, compression: Compression | None = None
) -> Path:
    """The memory of a RAM snapshot as a sparse file, ready to be mapped; made once for each boot of the host.

    Of a diff it is the whole chain, as its members name each other. The file is in the page cache after this, and never synced
    to the disk: what a power failure might damage carries the number of another boot, and is made again.

    *compression* is what the artifact says of the chain (None: it may be any).

    Raises:
        SnapshotInvalid, JsonInvalid: a blob is damaged, or they are no chain.
        BlobNotFound: an ancestor is not in the store.
        Unsupported: something of it is encrypted, and is not for a file.
        DiskFull: said before anything is written.
    """
    name = hex_of(digest)
    target = image_of(layout, digest)
    with fsutil.file_lock(layout.derived_dir / f"{name}.lock"), contextlib.ExitStack() as undo:
        blob = undo.enter_context(chain.opened(layout, digest))
        size = chain.read_prefix(blob.fileno()).memory_size
        if target.exists():
            if target.stat().st_size == size:
                return target
            raise StoreCorrupt(
                f"{target} is not of the size that it should have",
                hint="'ovm fsck --repair' removes it, and the next start makes it anew",
            )
        for stale in layout.derived_dir.glob(f"{name}.*"):
            if stale.suffix != ".lock":
                stale.unlink()
        temporary = target.with_suffix(".tmp")
        undo.callback(temporary.unlink, missing_ok=True)
        with temporary.open("xb", buffering=0) as image:
            temporary.chmod(0o600)
            unpack(layout, digest, image.fileno(), progress, compression=compression)
        temporary.replace(target)
        return target


def unpack(
    layout: Layout,
    digest: Digest,
    target: int,
    progress: Progress = NULL,
    *,
    compression: Compression | None = None,
    decrypt: Decrypt | None = None,
) -> None:
    """Writes the memory of a RAM snapshot into the empty file *target*, and keeps it sparse. Raises like :func:`materialise`.

    Nothing of it may be used before this has returned. An ancestor's image that is there already is copied, and only what is
    newer unpacked. With *decrypt*, of a chain with encrypted members, *target* is memory, and no file on a disk: whoever calls sees
    to that. What *decrypt* raises is raised.

    Raises:
        ResourceError: *target* is memory, of which there is too little.
    """
    links = chain.read(layout, digest)
    if decrypt is None:
        require_plain(links, "is only unpacked into memory, where it is restored")
    with contextlib.ExitStack() as files:
        below, links = _nearest_image(layout, links, files)
        members = []
        for i, link in enumerate(links):
            child = links[i + 1].digest if i + 1 < len(links) else None
            blob = files.enter_context(chain.opened(layout, link.digest, child))
            naming = functools.partial(chain.naming, link.digest, child)
            with naming():
                control = _control_of(blob)
                if compression is not None:
                    ramsnap.check_codecs(control, compression)
                cipher = None
                if decrypt is not None and link.header.encryption is not None:
                    cipher = decrypt(link.header)
                    ramsnap.decrypt_state(control, cipher)  # vouches for the index
            # not all of it: each one's device state may have 64 MiB
            blob_fd, data_offset = blob.fileno(), control.prefix.data_offset
            members.append((_Source(blob_fd, data_offset, cipher), control.chunks, naming))
        zeroes = below is not None
        seen = chain.visible([chunks for _, chunks, _ in members])
        parts = [[part for part in member if zeroes or part.chunk.stored_size] for member in seen]
        written = sum(pages for member in parts for part in member for _, pages in part.runs) * PAGE
        copied = 0 if below is None else os.fstat(below).st_blocks * 512
        if decrypt is None:
            fsutil.require_space(layout.derived_dir, written + copied, "unpacking the RAM snapshot")
        else:
            require_memory(written + copied, "the RAM snapshot")
        try:
            if below is not None and not fsutil.reflink(below, target):
                fsutil.copy_sparse(below, target)
            os.ftruncate(target, links[-1].header.memory)
            with progress.task("unpacking RAM", written) as task:
                for (source, _, naming), member in zip(members, parts, strict=True):
                    unpacked = parallel.ordered(_unpacker(source, target), _batches(member))
                    with naming(), contextlib.closing(unpacked):
                        for amount in unpacked:
                            task.advance(amount)
        except OSError as exc:
            raise (fsutil.disk_full(exc, "unpacking the RAM snapshot", layout.derived_dir) or exc) from exc


def require_plain(links: Iterable[chain.Link], what: str) -> None:
    """Refuses a chain with encrypted members: it *what*.

    Raises:
        Unsupported: it has some.
    """
    if any(link.header.encryption is not None for link in links):
        raise Unsupported(f"the RAM snapshot is encrypted, and {what}", rule="RAM-64")


def require_memory(size: int, what: str) -> None:
    """Refuses what needs *size* bytes of memory that the host does not have.

    Raises:
        ResourceError: it has not.
    """
    if process.memory_available() < size:
        raise ResourceError(f"too little memory for {what}: it needs {size} bytes", hint="stop other VMs")


class _Source(NamedTuple):
    # An open blob of a chain, and what decrypts it.
    fd: int
    data_offset: int
    cipher: Cipher | None


def _nearest_image(
    layout: Layout, links: list[chain.Link], files: contextlib.ExitStack
) -> tuple[int | None, list[chain.Link]]:
    # An open image of an ancestor, and the members that are newer; without one, all of them. It may go while we look: an open
    # one stays, and what has its name is complete.
    for i in range(len(links) - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            image = files.enter_context(image_of(layout, links[i - 1].digest).open("rb", buffering=0))
            if os.fstat(image.fileno()).st_size == links[-1].header.memory:
                return image.fileno(), links[i:]
    return None, links


def _batches(parts: Iterable[chain.Part]) -> Iterator[list[chain.Part]]:
    # Parts whose stored bytes follow each other. (Zeroes count: they are written as any other pages.)
    batch: list[chain.Part] = []
    size = 0
    for part in parts:
        chunk = part.chunk
        if batch and (size + chunk.size > _BATCH or chunk.offset != _stored_end(batch[-1])):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += chunk.size
    if batch:
        yield batch


def _stored_end(part: chain.Part) -> int:
    return part.chunk.offset + part.chunk.stored_size


def _unpacker(source: _Source, target: int) -> Callable[[list[chain.Part]], int]:
    fd, data_offset, cipher = source

    def work(batch: list[chain.Part]) -> int:
        start, end = batch[0].chunk.offset, _stored_end(batch[-1])
        stored = memoryview(os.pread(fd, end - start, data_offset + start))
        writer = _Writer(target)
        for part in batch:
            chunk = part.chunk
            if chunk.codec == ramsnap.CODEC_ZERO:
                for page, pages in part.runs:
                    writer.zero(page * PAGE, pages * PAGE)
                continue
            at = chunk.offset - start
            data = ramsnap.unpack_chunk(chunk, stored[at : at + chunk.stored_size], data_offset, cipher)
            if part.whole:
                writer.add(chunk.page * PAGE, data)
                continue
            view = memoryview(data)
            for page, pages in part.runs:
                at = (page - chunk.page) * PAGE
                writer.add(page * PAGE, view[at : at + pages * PAGE])
        writer.flush()
        return writer.amount

    return work


class _Writer:
    # Pieces that follow each other go out in one call.

    def __init__(self, fd: int) -> None:
        self.amount = 0
        self._fd = fd
        self._pieces: list[bytes | memoryview] = []
        self._start = self._end = 0

    def add(self, offset: int, data: bytes | memoryview) -> None:
        if offset != self._end or self._end - self._start >= _BATCH:
            self.flush()
            self._start = offset
        self._pieces.append(data)
        self._end = offset + len(data)
        self.amount += len(data)

    def zero(self, offset: int, size: int) -> None:
        # what was copied from an ancestor's image has blocks there: a hole would be no quicker
        zeroes = memoryview(bytes(min(size, fsutil.COPY_BUFFER)))
        for at in range(offset, offset + size, fsutil.COPY_BUFFER):
            self.add(at, zeroes[: offset + size - at])

    def flush(self) -> None:
        if self._pieces:
            size = self._end - self._start
            if os.pwritev(self._fd, self._pieces, self._start) != size:
                fsutil.pwrite_all(self._fd, b"".join(self._pieces), self._start)  # which says why
            self._pieces = []
