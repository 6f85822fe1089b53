"""What the versions of QEMU differ in, as far as our command lines and QMP commands go: one table.

Read: the sources of 7.2, and from there to 11.0 ``docs/about/removed-features.rst``, ``deprecated.rst`` and the QAPI
documentation. Run by the tests: 7.2. What is said from a later version on has been read, and not run.

What changed as well, and asks nothing of us: machine types are deprecated three years after their version and removed three
later, so a snapshot can be restored for six years (RAM-32 tells when it can't); ``-smp`` deprecates parameters that a machine
does not have, even as 1 (9.0: ours are sockets, cores and threads); ``reconnect`` of sockets becomes ``reconnect-ms`` (9.2:
ours do not reconnect); ``backing`` must be null, never an empty string (2.12); ``-no-acpi``, ``-no-hpet``, ``-chroot`` and ``-runas``
are gone (we give none).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

#: The oldest that is known to work: the first with ``-netdev stream``.
OLDEST: Final = (7, 2)


class Since(Enum):
    """What we say otherwise from a version on."""

    #: ``rom=off`` of a memory-backend-file: what is opened to read only can be mapped privately, and written to there.
    PRIVATE_OF_READONLY = (8, 2)
    #: ``-incoming file:``, with a set of descriptors; ``fd:`` takes no plain files any more (deprecated in 9.1).
    INCOMING_FILE = (11, 0)

    @classmethod
    def of(cls, version: str) -> frozenset[Since]:
        """What a QEMU of *version* has."""
        return frozenset(since for since in cls if number(version) >= since.value)


def number(version: str) -> tuple[int, ...]:
    """``7.2.22`` as numbers that can be compared."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:3])
