"""How much of a VM's memory is not zero: what a snapshot of it has to store, before it is compressed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final

from ovms import fsutil
from ovms.errors import HostError
from ovms.memory import capture
from ovms.memory.capture import PAGE
from ovms.vmm import maps
from ovms.vmm.model import GuestRam

_BLOCK: Final = 1 << 20


def nonzero(fd: int, size: int) -> int:
    """The bytes of an open file's pages that are not zero. What is a hole is not read, and stays one."""
    return _count(fd, fsutil.data_extents(fd, size))


def nonzero_of(guest: GuestRam) -> int:
    """The same of a VM's memory. The VM may run: then it is what it was while we looked.

    Raises:
        HostError: we may not read it.
    """
    try:
        fd = os.open(guest.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not guest.private:
                return nonzero(fd, guest.size)
            address = maps.find(guest.pid, guest.file, guest.size).address
            # what it has written, and what it came from: to read anything else would fill holes of the latter
            own = ((run.start, run.end) for run in capture.written_pages(guest.pid, address, guest.size))
            extents = list(_merged([*own, *fsutil.data_extents(fd, guest.size)]))
        finally:
            os.close(fd)
        memory = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _count(memory, extents, address)
        finally:
            os.close(memory)
    except OSError as exc:
        raise HostError(f"the memory of process {guest.pid} cannot be read: {exc.strerror}") from exc


def _merged(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = 0
    for start, end in sorted(extents):
        if end > at:
            yield max(start, at), end
            at = end


def _count(fd: int, extents: Iterable[tuple[int, int]], base: int = 0) -> int:
    found = 0
    for start, end in extents:
        at = start
        while at < end:
            data = os.pread(fd, min(_BLOCK, end - at), base + at)
            if not data:
                break
            if not fsutil.is_zero(data):
                found += sum(PAGE for i in range(0, len(data), PAGE) if not fsutil.is_zero(data[i : i + PAGE]))
            at += len(data)
    return found
