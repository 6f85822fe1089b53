"""Lets a paused guest go on on a private copy of its memory: what ``freeze.c`` does in the VMM, from outside (ADR 0022)."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Final

from ovms.errors import HostError
from ovms.lazy import regex
from ovms.vmm import maps

#: To be loaded into the VMM (``LD_PRELOAD``).
LIBRARY: Final = Path(__file__).parent / "freeze.so"
_SIGNAL: Final = 63
_CAUGHT: Final = regex(r"^SigCgt:\s*([0-9a-f]{16})$", 8)  # re.MULTILINE
_TIMEOUT: Final = 1.0
_FD_MAX: Final = 0xFFF


def able(pid: int) -> bool:
    """Whether the process has the library: one without it would be killed by the signal."""
    try:
        match = _CAUGHT.search(Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return False
    return match is not None and bool(int(match[1], 16) >> (_SIGNAL - 1) & 1)


def freeze(pid: int, file: Path, size: int) -> bool:
    """Makes the mapping of *size* bytes of *file* (a memfd, as ``/proc/PID/fd/N`` of the VMM) private, at its address.

    Whether it has become so. It has not where the process lacks the library, may not be signalled, or has no room.

    Raises:
        HostError: the process has not mapped the file.
    """
    mapped = maps.find(pid, file, size)
    if mapped.private:
        return False
    fd = int(file.name)
    if fd > _FD_MAX or not able(pid):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # a union of an int and a pointer, which is passed as the latter is
    if libc.sigqueue(pid, _SIGNAL, ctypes.c_void_p(mapped.address | fd)) != 0:
        return False
    deadline = time.monotonic() + _TIMEOUT
    while not _is_private(pid, file, size):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0002)
    return True


def _is_private(pid: int, file: Path, size: int) -> bool:
    try:
        return maps.find(pid, file, size).private
    except HostError:  # the list is read in pieces, and the mapping moved meanwhile
        return False
