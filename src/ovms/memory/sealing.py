"""Seals of memfds: what is sealed nobody can write to any more, whoever holds a descriptor of it."""

from __future__ import annotations

import errno
import fcntl
import time
from typing import Final

from ovms.errors import VmmError

# fcntl.h
_ADD_SEALS: Final = 1033
_GET_SEALS: Final = 1034
_SEALS: Final = 0x1 | 0x2 | 0x4 | 0x8  # SEAL, SHRINK, GROW, WRITE
#: Seconds: a mapping that another took the place of is still counted for a moment after it is out of the process's list.
_PATIENCE: Final = 1.0


def seal(fd: int) -> None:
    """Seals a memfd, whose descriptor must be one to write.

    Raises:
        VmmError: a process has it mapped to write.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                if time.monotonic() < deadline:
                    time.sleep(0.002)
                    continue
                raise VmmError("the VMM can still write to the memory that was to stand still") from None
            if not is_sealed(fd):  # EPERM: it is already
                raise
        return


def is_sealed(fd: int) -> bool:
    """Whether it is sealed."""
    return bool(fcntl.fcntl(fd, _GET_SEALS) & _SEALS == _SEALS)
