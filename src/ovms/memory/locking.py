"""Memory that is never swapped out: whether this host lets us, asked before anything starts (SEC-10).

What is locked is the template, once for each clone's watcher and without a page more: ``lock=`` of ``watch.c``. Pages that are its
holes stay holes. A VMM's own way (``-overcommit mem-lock``) would give every clone a copy of all of it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from typing import Final

from ovms.spec import limits

HINT: Final = (
    "a line 'USER - memlock unlimited' in /etc/security/limits.d/ovms.conf, and log in anew; "
    "with --restore=auto it boots from the disk instead"
)
_MAP_NORESERVE: Final = 0x4000
_MLOCK_ONFAULT: Final = 1
_FAILED: Final = ctypes.c_void_p(-1).value


def why_not(size: int) -> str | None:
    """Why *size* bytes of a snapshot's memory can't be locked by a process of ours; None where they can.

    Tried, and not reckoned: what counts are the limit, capabilities, and the namespace in which we have them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))  # as the watcher does: nobody has to allow that
    try:
        number = _try(size)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    if number is None:
        return None
    wanted = f"its memory must be locked (mlock_required), which takes {-(-size // limits.MIB)} MiB"
    if number in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        return f"{wanted}, and this user may lock {hard // limits.MIB} MiB (RLIMIT_MEMLOCK) without CAP_IPC_LOCK"
    return f"{wanted}, and this host does not do that: {os.strerror(number)}"


def _try(size: int) -> int | None:
    # Locked as it is touched, and never touched: it costs an entry in a table of the kernel.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    length = ctypes.c_size_t(size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    at = libc.mmap(None, length, mmap.PROT_READ, flags, -1, ctypes.c_long(0))
    if at == _FAILED:
        return ctypes.get_errno()
    address = ctypes.c_void_p(at)
    try:
        return ctypes.get_errno() if libc.mlock2(address, length, _MLOCK_ONFAULT) else None
    finally:
        libc.munmap(address, length)
