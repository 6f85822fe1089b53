"""Which features of the kernel that we use this host has: each is tried for real, on ourselves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from ovms.memory import capture

_MOUNT_SETATTR: Final = 442
_LANDLOCK_CREATE_RULESET: Final = 444
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Feature(NamedTuple):
    """A feature: its name, how it is tried (OSError: it is not there), what goes without it, and whether VMs run then."""

    name: str
    attempt: Callable[[], None]
    lost: str
    needed: bool


def _seals() -> None:
    with _closing(os.memfd_create("ovms-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.ftruncate(fd, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _pagemap_scan() -> None:
    with _page() as address, _closing(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        list(capture.scan_pagemap(fd, address, mmap.PAGESIZE))


def _pagemap() -> None:
    with _page() as address, _closing(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        list(capture.read_pagemap(fd, address, mmap.PAGESIZE))


def _mount_setattr() -> None:
    # no such descriptor: whoever knows the call says so, or that we may not
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_MOUNT_SETATTR, -1, b"", 0, None, 0)
    if ctypes.get_errno() == errno.ENOSYS:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _landlock() -> None:
    # which version of it there is; the second lets a file be moved to another directory
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1) < 2:
        number = ctypes.get_errno() or errno.EOPNOTSUPP
        raise OSError(number, os.strerror(number))


FEATURES: Final = (
    Feature("memfd seals (Linux 3.17)", _seals, "restores and shared memory", needed=True),
    Feature("pidfd (Linux 5.3)", _pidfd, "watching VMs", needed=True),
    Feature("mount_setattr (Linux 5.12)", _mount_setattr, "a root of its own for each VM", needed=False),
    Feature(
        "Landlock (Linux 5.19)",
        _landlock,
        "what keeps sockets out of directories that guests write to",
        needed=False,
    ),
    Feature("/proc/PID/pagemap", _pagemap, "snapshots of restored VMs", needed=False),
    Feature(
        "PAGEMAP_SCAN (Linux 6.7)", _pagemap_scan, "the fast way to the pages that a clone has written", needed=False
    ),
)


def missing(features: tuple[Feature, ...] = FEATURES) -> list[tuple[Feature, str]]:
    """The features that are not there, each with the kernel's reason."""
    found = []
    for feature in features:
        try:
            feature.attempt()
        except OSError as exc:
            found.append((feature, exc.strerror or type(exc).__name__))
    return found


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _page() -> Iterator[int]:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 1
    yield ctypes.addressof(ctypes.c_char.from_buffer(page))
