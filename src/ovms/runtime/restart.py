"""What becomes of an instance when its VM has ended by itself: it is started again, removed, or left as it is.

The watcher of a VM runs ``ovm … ended ID`` when there is something to be done then (:func:`at_end`), so that no daemon has to
wait for it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ovms import process
from ovms.errors import OvmsError, UsageError
from ovms.runtime.record import Record, Restart

if TYPE_CHECKING:
    from ovms.runtime.runtime import Runtime
    from ovms.trust.files import Policies

#: Seconds before the first new start; doubled each time, up to the most.
_BACKOFF: Final = 0.1
_BACKOFF_MAX: Final = 60.0
#: A VM that has run for so many seconds has started well: the waiting begins anew.
_WELL: Final = 10.0
#: The command that the watcher runs, and how.
COMMAND: Final = "ended"
_START: Final = (
    "import os, sys; os.environ['PATH'] = sys.argv.pop(1); sys.path.insert(0, sys.argv.pop(1)); "
    "from ovms.cli.entry import entry; entry()"
)


def parse(text: str) -> Restart | None:
    """Reads what follows ``--restart``; None for ``no``.

    Raises:
        UsageError: not of the form.
    """
    match = re.fullmatch(r"(no|on-failure)(?::([0-9]{1,6}))?", text)
    if match is None or (match[1] == "no" and match[2]):
        raise UsageError(f"{text[:40]!a} is no restart policy", hint="write no, on-failure, or on-failure:N")
    return None if match[1] == "no" else Restart(None if match[2] is None else int(match[2]))


def at_end(root: str, record: Record, policies: Policies) -> tuple[str, ...]:
    """What the watcher runs when the VM of *record* has ended; nothing where there is nothing to be done.

    The watcher has nothing of our environment, so it is told which policies are asked before the VM is started again.
    """
    if record.restart is None and not record.remove_on_exit:
        return ()
    # whatever it was that let us find ovms (a virtual environment, PYTHONPATH), and the VMM: there is no such thing in the watcher
    source = str(Path(__file__).parents[2])
    path = os.environ.get("PATH") or process.CLEAN_ENV["PATH"]
    policy = ("--policy", str(policies.user), *(["--policy-needed"] if policies.needed else []))
    command = ("--root", root, "--progress", "none", COMMAND, record.id, *policy)
    return (sys.executable, "-c", _START, path, source, *command)


def ended(runtime: Runtime, instance_id: str, *, sleep: Callable[[float], None] = time.sleep) -> Record | None:
    """Does what is to be done after the end of an instance's VM. Returns the record of one that was started again.

    Raises:
        InstanceNotFound: it was removed meanwhile.
        OvmsError: the new start failed; the instance stays as it is.
    """
    record = runtime.instances.find(instance_id)
    while True:
        status = runtime.instances.status(record)
        if status.state.alive:
            return None  # somebody else was faster
        policy = record.restart
        if policy is None or not status.failed or policy.used_up:
            runtime.instances.recover()
            return None
        pause = _pause(policy, status.ran_s)
        with runtime.instances.restarting(record, pause):
            sleep(pause)
        if runtime.instances.stop_asked(record):
            return None  # its user has stopped it meanwhile
        try:
            return runtime.start_again(record)
        except OvmsError:
            record = runtime.instances.find(instance_id)
            if record.restart == policy:  # not even tried
                raise


def _pause(policy: Restart, ran_s: float | None) -> float:
    failures = 0 if ran_s is not None and ran_s >= _WELL else policy.count
    return min(_BACKOFF * 2.0 ** min(failures, 16), _BACKOFF_MAX)
