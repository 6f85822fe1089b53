"""The memory of a paused VM, copied out of it as fast as can be, because the guest stands still meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import HostError
from ovms.lazy import dataclass
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


@dataclass(frozen=True)
class Run:
    """Consecutive pages: bytes from *start* up to *end*, counted from the start of the memory."""

    start: int
    end: int


class Capture:
    """A VM's memory at one moment, in a sparse file. Call :meth:`finish` once the VM goes on again."""

    def __init__(self, fd: int, base: int | None, runs: list[Run], size: int, *, shared: bool = False) -> None:
        """*base*: a descriptor of what the VM was restored from; it is ours from here on.

        *shared*: *fd* is not a copy, but the memory itself, from which the VM goes on; it is ours, too.
        """
        self.fd = fd
        self.size = size
        self._base = base
        self._runs = runs
        self._shared = shared

    def finish(self) -> None:
        """Fills in what did not have to be copied while the VM stood still: the image that it was restored from.

        Raises:
            VmmError: the VMM can still write to what was to stand still.
        """
        if self._shared:
            sealing.seal(self.fd)
        if self._base is None:
            return
        at = 0
        for run in [*self._runs, Run(self.size, self.size)]:
            _copy_range(self._base, self.fd, at, run.start)
            at = run.end
        os.close(self._base)
        self._base = None

    def close(self) -> None:
        """Lets go of the memory, where it is no copy."""
        if self._shared:
            os.close(self.fd)
            self._shared = False


def take(guest: GuestRam, fd: int) -> Capture:
    """Copies the memory of a paused VM into the empty file *fd*: all of it, or what it wrote since its restore.

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
                return Capture(fd, base, _take_private(guest, fd), guest.size)
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


def _take_private(guest: GuestRam, fd: int) -> list[Run]:
    address = maps.find(guest.pid, guest.file, guest.size).address
    memory = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        runs = list(written_pages(guest.pid, address, guest.size))
        for run in runs:
            at = run.start
            while at < run.end:
                data = os.pread(memory, min(fsutil.COPY_BUFFER, run.end - at), address + at)
                if not data:
                    raise HostError(f"the memory of process {guest.pid} cannot be read at {address + at:#x}")
                if not fsutil.is_zero(data):
                    fsutil.pwrite_all(fd, data, at)
                at += len(data)
        return runs
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
        found.extend(Run(regions[3 * i] - address, regions[3 * i + 1] - address) for i in range(min(count, _REGIONS)))
        if walked <= start:
            break
        start = walked
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
