"""A running guest's file systems, made to stand still by its agent while its disk is frozen: then a file system is whole on it.

The agent writes out what the guest has cached, and lets no program write until it thaws (``guest-fsfreeze-freeze``; programs that
have hooks in ``/etc/qemu/fsfreeze-hook.d`` are told). The record says so before that, so whoever finds a guest that was left frozen,
and unlocked, thaws it (:meth:`ovms.runtime.instances.Instances.finish`): the next command, or soon a server that runs.
Where this cannot be had, the disk is as after a power failure.

A RAM snapshot needs none of it: what is missing on its disk is in its memory. Its clones would find their file systems frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ovms.errors import AgentUnavailable, GuestError, Locked
from ovms.lazy import replace
from ovms.runtime.agent import Agent
from ovms.vmm.model import VmFiles
from ovms.vmm.protocol import Control

if TYPE_CHECKING:
    from ovms.runtime.instances import Instances
    from ovms.runtime.record import Record

#: Seconds that the guest gets to write out what it has; without an answer by then it is thawed, and its disk taken as it is.
FREEZE: Final = 20.0
#: Seconds that a thaw is tried for by whoever has frozen, and by a command that finds a guest so.
THAW: Final = 30.0
THAW_FOUND: Final = 3.0


@contextlib.contextmanager
def file_systems(instances: Instances, record: Record, control: Control) -> Iterator[tuple[Record, str | None]]:
    """Freezes the file systems of a running guest, and thaws them at the end, whatever happens (under the instance's lock).

    Gives the record, and why they are not frozen (None: they are).

    Raises:
        AgentUnavailable: the guest took the order, and none to thaw: it may stand frozen until a later command comes through.
    """
    if (why := _why_not(record, control)) is not None:
        yield record, why
        return
    files = instances.files(record)
    record = instances.save(replace(record, fs_frozen=True))
    try:
        with Agent(files, listens=control.agent_listens, wait=FREEZE) as agent:
            count = agent.execute("guest-fsfreeze-freeze")
        if not isinstance(count, int) or count < 1:
            why = "the guest has no file system that can be frozen"
    except (GuestError, Locked) as exc:
        why = exc.message
    except BaseException:
        _thaw_after(instances, record, control)
        raise
    if why is not None:
        yield _thaw_after(instances, record, control), why
        return
    try:
        yield record, None
    finally:
        _thaw_after(instances, record, control)


def _why_not(record: Record, control: Control) -> str | None:
    if not record.machine.agent:
        return "its VM has no port for an agent"
    return None if control.agent_listens() else "no agent runs in the guest"


def _thaw_after(instances: Instances, record: Record, control: Control) -> Record:
    # the record has got overlays meanwhile
    try:
        thaw(instances.files(record), control, THAW)
    except (GuestError, Locked) as exc:
        raise AgentUnavailable(
            f"the file systems of the guest of {record.name} may stand frozen still: {exc.message}",
            hint="each later command tries to thaw them; in the guest, 'fsfreeze --unfreeze MOUNTPOINT' does",
        ) from exc
    return instances.save(replace(instances.newest(record) or record, fs_frozen=False))


def thaw(files: VmFiles, control: Control, wait: float) -> None:
    """Thaws a guest's file systems; fine where none is frozen.

    Raises:
        AgentUnavailable, GuestError, Locked: it was not done within *wait* seconds.
    """
    with Agent(files, listens=control.agent_listens, wait=wait) as agent:
        agent.execute("guest-fsfreeze-thaw")
