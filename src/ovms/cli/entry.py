"""The process of ``ovm``: in quickly, and out quickly.

A fifth of a short command was Python's looking for garbage while it imports, and its taking all modules apart at the end.
"""

import gc
import os
import signal
import sys
from typing import Final, NoReturn

#: Objects made before garbage is looked for: more than a start makes, and few enough for a command that works for hours.
_GARBAGE_AFTER: Final = 50_000


def entry() -> NoReturn:
    """Runs ``ovm`` with the arguments of this process, and ends the process with its exit code."""
    gc.set_threshold(_GARBAGE_AFTER, 10, 10)
    try:
        from ovms.cli.main import main

        code = main()
        _end(code)
    except KeyboardInterrupt:  # before main looks out for it
        code = 130
    os._exit(code)


def _end(code: int) -> None:
    # What Python does at its end, but for taking everything apart.
    threading = sys.modules.get("threading")
    if threading is not None and any(not thread.daemon for thread in threading.enumerate()[1:]):
        sys.exit(code)  # it waits for them
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends us from here on, and not with a traceback
    if (atexit := sys.modules.get("atexit")) is not None:
        atexit._run_exitfuncs()  # noqa: SLF001 - there is no other way to run them
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        sys.exit(code)  # closed, or broken: Python's own business
