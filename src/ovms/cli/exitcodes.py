"""The only table from errors to exit codes. ``docs/exit-codes.md`` shows it to users, and a test compares the two."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from ovms import errors


class Exit(IntEnum):
    """What ``ovm`` exits with. Stable: scripts depend on it."""

    OK = 0
    #: A bug in ovms.
    INTERNAL = 1
    USAGE = 2
    INPUT = 3
    NOT_FOUND = 4
    CONFLICT = 5
    REGISTRY = 6
    DENIED = 7
    RESOURCE = 8
    HOST = 9
    INTEGRITY = 10
    VMM = 11
    TIMEOUT = 12
    GUEST = 13
    UNTRUSTED = 14
    #: Ctrl-C: 128 + SIGINT, as shells have it.
    INTERRUPTED = 130
    #: ``ovm run`` in the foreground: the VM was killed (128 + SIGKILL).
    KILLED = 137
    #: 128 + SIGTERM
    TERMINATED = 143


#: The first class that fits counts, so the special ones stand before the general ones.
TABLE: Final[tuple[tuple[type[errors.OvmsError], Exit], ...]] = (
    (errors.UsageError, Exit.USAGE),
    (errors.Unauthorized, Exit.DENIED),
    (errors.InputError, Exit.INPUT),
    (errors.NotFound, Exit.NOT_FOUND),
    (errors.Conflict, Exit.CONFLICT),
    (errors.RegistryDenied, Exit.DENIED),
    (errors.RegistryError, Exit.REGISTRY),
    (errors.ResourceError, Exit.RESOURCE),
    (errors.HostError, Exit.HOST),
    (errors.IntegrityError, Exit.INTEGRITY),
    (errors.Untrusted, Exit.UNTRUSTED),
    (errors.VmmTimeout, Exit.TIMEOUT),
    (errors.VmmError, Exit.VMM),
    (errors.GuestTimeout, Exit.TIMEOUT),
    (errors.GuestError, Exit.GUEST),
    (errors.Interrupted, Exit.INTERRUPTED),
)


def exit_code(error: errors.OvmsError) -> Exit:
    """The exit code of an error."""
    return next((code for kind, code in TABLE if isinstance(error, kind)), Exit.INTERNAL)
