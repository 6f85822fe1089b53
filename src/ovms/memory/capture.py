"""The memory of a paused VM, copied out of it as fast as can be, because the guest stands still meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from ovms import fsutil
from ovms.errors import HostError
from ovms.memory import sealing
from ovms.vmm import maps
from ovms.vmm.model import GuestRam

PAGE: Final = 4096

# PAGEMAP_SCAN (Linux 6.7): _IOWR('f', 16, struct pm_scan_arg)
_PAGEMAP_SCAN: Final = 0xC0606610
_PAGE_IS_FILE: Final = 1 << 2
_PAGE_IS_PRESENT: Final = 1 << 3
_PAGE_IS_SWAPPED: Final = 1 << 4
_SCAN_ARG: Final = struct.Struct("<12Q")
_REGIONS: Final = 4096

# Bits of an entry of /proc/PID/pagemap
_FILE_BIT: Final = 1 << 61
_PRESENT_OR_SWAPPED: Final = 3 << 62
_ENTRIES: Final = 32 * 1024

# madvise: MADV_POPULATE_WRITE (Linux 5.14)
_POPULATE_WRITE: Final = 23
#: What one call of process_vm_readv copies: so many vectors (IOV_MAX), of so many bytes each.
_VECTORS: Final = 1024
_PIECE: Final = 1024 * 1024


class Run(NamedTuple):
    """Consecutive pages: bytes from *start* up to *end*, counted from the start of the memory."""

    start: int
    end: int


class Capture:
    """A VM's memory at one moment, in a sparse file; or of it the *runs* that it wrote since its restore.

    ``base`` is what it was restored from (None: it was booted): what is not in ``runs`` is that. :meth:`finish` makes it whole,
    once the VM goes on again; a diff needs no such thing. :meth:`close` it in the end.
    """

    def __init__(self, fd: int, base: int | None, runs: list[Run], size: int, *, shared: bool = False) -> None:
        """*base*: a descriptor of what the VM was restored from; it is ours from here on.

        *shared*: *fd* is not a copy, but the memory itself, from which the VM goes on; it is ours, too.
        """
        self.fd = fd
        self.size = size
        self.base = base
        self.runs = runs
        self._shared = shared

    @property
    def shared(self) -> bool:
        """Whether ``fd`` is the memory itself, on a private copy of which the VM goes on."""
        return self._shared

    @property
    def written(self) -> int:
        """Bytes of the pages that the VM wrote since its restore."""
        return sum(run.end - run.start for run in self.runs)

    def finish(self) -> None:
        """Fills in what did not have to be copied while the VM stood still: the image that it was restored from.

        Raises:
            VmmError: the VMM can still write to what was to stand still.
        """
        if self._shared:
            sealing.seal(self.fd)
        if self.base is None:
            return
        at = 0
        for run in [*self.runs, Run(self.size, self.size)]:
            _copy_range(self.base, self.fd, at, run.start)
            at = run.end

    def close(self) -> None:
        """Lets go of what the VM was restored from, and of the memory where it is no copy."""
        if self.base is not None:
            os.close(self.base)
            self.base = None
        if self._shared:
            os.close(self.fd)
            self._shared = False


@contextlib.contextmanager
def room(guest: GuestRam, fd: int, directory: Path | None) -> Iterator[mmap.mmap | None]:
    """Makes the empty file *fd* ready for what :func:`take` copies into it, while the VM still runs.

    It is in *directory* (None: in memory).

    What was written until now is written still when the VM is paused, so the pages for it can be had beforehand: that is half of
    the work. None for a VM whose memory is shared.

    Raises:
        DiskFull: no room for it.
    """
    if not guest.private:
        yield None
        return
    import ctypes

    os.ftruncate(fd, guest.size)
    with mmap.mmap(fd, guest.size) as target:
        # Where it can't be done, the copy is slower, and its errors are told there.
        with contextlib.suppress(OSError, HostError):
            address = maps.find(guest.pid, guest.file, guest.size).address
            runs = list(written_pages(guest.pid, address, guest.size))
            # asked first: the guest's disk is to find room there, too
            if directory is not None:
                fsutil.require_space(directory, sum(run.end - run.start for run in runs), "a copy of the VM's memory")
            ours = _address(target)
            madvise = ctypes.CDLL(None, use_errno=True).madvise
            for run in runs:
                if madvise(ctypes.c_void_p(ours + run.start), ctypes.c_size_t(run.end - run.start), _POPULATE_WRITE):
                    break
        yield target


def _address(target: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(target))


def take(guest: GuestRam, fd: int, target: mmap.mmap | None = None) -> Capture:
    """Copies the memory of a paused VM into the empty file *fd*: all of it, or what it wrote since its restore.

    *target* is that file mapped, where :func:`room` was made for it.

    Raises:
        HostError: we may not read the VMM's memory.
        DiskFull: no room for the copy.
    """
    os.ftruncate(fd, guest.size)
    try:
        if guest.private:
            # opened while the VM is there: should it end, its memory goes on being readable
            base = os.open(guest.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return Capture(fd, base, _take_private(guest, fd, target), guest.size)
            except BaseException:
                os.close(base)
                raise
        source = os.open(guest.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fsutil.copy_sparse(source, fd)
        finally:
            os.close(source)
        return Capture(fd, None, [], guest.size)
    except PermissionError as exc:
        raise HostError(
            f"no permission to read the memory of process {guest.pid}",
            hint="run as the user that started the VM; where kernel.yama.ptrace_scope is 1 or more, run as root",
        ) from exc
    except OSError as exc:
        full = fsutil.disk_full(exc, "copying the VM's memory", Path("/proc/self/fd") / str(fd))
        raise full or HostError(f"the memory of process {guest.pid} cannot be read: {exc.strerror}") from exc


def frozen(guest: GuestRam) -> Capture:
    """The memory of a VM that goes on on a private copy of it, and has not yet: nothing is copied."""
    return Capture(os.open(guest.file, os.O_RDWR | os.O_CLOEXEC), None, [], guest.size, shared=True)


def _take_private(guest: GuestRam, fd: int, target: mmap.mmap | None) -> list[Run]:
    address = maps.find(guest.pid, guest.file, guest.size).address
    runs = list(written_pages(guest.pid, address, guest.size))
    # nothing is looked at here: what is zero, or as it was before, is found when the VM goes on again
    if target is None or not _read_at_once(guest.pid, address, _address(target), runs):
        _read_singly(guest.pid, address, fd, runs)
    return runs


def _read_at_once(pid: int, address: int, ours: int, runs: Sequence[Run]) -> bool:
    # process_vm_readv: the kernel copies page to page. False where it does not do all of it (a full disk below *ours*, too).
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    pieces = list(_pieces(runs))
    for i in range(0, len(pieces), _VECTORS):
        part = pieces[i : i + _VECTORS]
        local = array("Q", [n for start, size in part for n in (ours + start, size)])
        remote = array("Q", [n for start, size in part for n in (address + start, size)])
        got = libc.process_vm_readv(
            pid,
            ctypes.c_void_p(local.buffer_info()[0]),
            ctypes.c_ulong(len(part)),
            ctypes.c_void_p(remote.buffer_info()[0]),
            ctypes.c_ulong(len(part)),
            ctypes.c_ulong(0),
        )
        # an int of C: a call moves no more bytes than that holds
        if got != sum(size for _, size in part):
            return False
    return True


def _pieces(runs: Iterable[Run]) -> Iterator[tuple[int, int]]:
    for run in runs:
        for start in range(run.start, run.end, _PIECE):
            yield start, min(_PIECE, run.end - start)


def _read_singly(pid: int, address: int, fd: int, runs: Iterable[Run]) -> None:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = memoryview(bytearray(fsutil.COPY_BUFFER))
        for run in runs:
            at = run.start
            while at < run.end:
                got = os.preadv(memory, [buffer[: min(len(buffer), run.end - at)]], address + at)
                if not got:
                    raise HostError(f"the memory of process {pid} cannot be read at {address + at:#x}")
                fsutil.pwrite_all(fd, buffer[:got], at)
                at += got
    finally:
        os.close(memory)


def written_pages(pid: int, address: int, size: int) -> Iterator[Run]:
    """The pages of a private file mapping that the process has written to: they are its own, and not the file's."""
    with contextlib.ExitStack() as stack:
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        try:
            yield from scan_pagemap(fd, address, size)
        except OSError as exc:
            # ENOTTY: Linux before 6.7; EINVAL, EFAULT: one that knows it in another form
            if isinstance(exc, PermissionError):
                raise
            yield from read_pagemap(fd, address, size)


def scan_pagemap(fd: int, address: int, size: int) -> Iterator[Run]:
    """:func:`written_pages` by ``PAGEMAP_SCAN`` on an open ``/proc/PID/pagemap``: fast. OSError where there is none."""
    import ctypes

    regions = (ctypes.c_uint64 * (3 * _REGIONS))()
    found: list[Run] = []
    start, end = address, address + size
    while start < end:
        argument = bytearray(
            _SCAN_ARG.pack(
                _SCAN_ARG.size,
                0,
                start,
                end,
                0,
                ctypes.addressof(regions),
                _REGIONS,
                0,
                _PAGE_IS_FILE,  # inverted: not of the file
                _PAGE_IS_FILE,
                _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,
                _PAGE_IS_PRESENT,
            )
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
        walked = _SCAN_ARG.unpack(argument)[4]
        numbers = regions[: 3 * min(count, _REGIONS)]
        starts, ends = ([at - address for at in numbers[i::3]] for i in (0, 1))
        found.extend(map(Run, starts, ends))
        # Of many regions Linux (6.18) tells more than it says that it has walked: the last ones would come twice.
        reached = max(walked, address + (ends[-1] if ends else 0))
        if reached <= start:
            break
        start = reached
    # Only when all of it went well: the caller falls back to the other way on an error.
    yield from found


def read_pagemap(fd: int, address: int, size: int) -> Iterator[Run]:
    """:func:`written_pages` by reading the map itself: everywhere, and slower."""
    pages = size // PAGE
    open_run: int | None = None
    for first in range(0, pages, _ENTRIES):
        count = min(_ENTRIES, pages - first)
        data = os.pread(fd, count * 8, (address // PAGE + first) * 8)
        if len(data) != count * 8:
            raise HostError("the page map of the VMM ends too early")
        for i, entry in enumerate(memoryview(data).cast("Q")):
            own = entry & _PRESENT_OR_SWAPPED and not entry & _FILE_BIT
            at = (first + i) * PAGE
            if own and open_run is None:
                open_run = at
            elif not own and open_run is not None:
                yield Run(open_run, at)
                open_run = None
    if open_run is not None:
        yield Run(open_run, size)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    buffer = bytearray(fsutil.COPY_BUFFER)
    view = memoryview(buffer)
    for first, last in fsutil.data_extents(source, end, start=start):
        at = first
        while at < last:
            got = os.preadv(source, [view[: min(len(buffer), last - at)]], at)
            if got == 0:
                return
            if not fsutil.is_zero(view[:got]):
                fsutil.pwrite_all(target, view[:got], at)
            at += got
