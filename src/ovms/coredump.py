"""What becomes of a process's memory when it crashes."""

from __future__ import annotations

import contextlib
import resource


def leave_no_core() -> None:
    """Keeps what this process holds (passwords, tokens, keys) off the disk should it crash. Programs that it starts have it from it."""
    # by 1, and not 0, no dump is piped to a program either: core(5)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
