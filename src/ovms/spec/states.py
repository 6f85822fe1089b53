"""The state machine of an instance: ``spec/rfc/ovms-v0.1.md``, section 8.3."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from ovms.errors import StateConflict


class State(StrEnum):
    """The state of an instance."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"

    @property
    def alive(self) -> bool:
        """Whether there is a VM, or soon will be."""
        return self not in (State.STOPPED, State.ERROR)


class Call(StrEnum):
    """A call that depends on the state. ``REMOVE_FORCE`` is ``remove`` with ``force``."""

    STOP = "stop"
    PAUSE = "pause"
    RESUME = "resume"
    SNAPSHOT = "snapshot"
    INJECT = "inject"
    REMOVE = "remove"
    REMOVE_FORCE = "remove, force"


class Happening(StrEnum):
    """What changes the state without a call."""

    RUNS = "the guest's CPUs run"
    START_FAILS = "the start fails"
    POWERS_OFF = "the guest powers off"
    FAILS = "the VMM or the guest fails"
    ENDED = "the runtime ends it, or the start"
    REBOOTED = "the host was rebooted"


#: The state after a call; None: the instance is removed. A call that is missing is not allowed (STA-2).
CALLS: Final[Mapping[State, Mapping[Call, State | None]]] = {
    State.STARTING: {Call.STOP: State.STOPPING, Call.REMOVE_FORCE: None},
    State.RUNNING: {
        Call.STOP: State.STOPPING,
        Call.PAUSE: State.PAUSED,
        Call.RESUME: State.RUNNING,
        Call.SNAPSHOT: State.RUNNING,
        Call.INJECT: State.RUNNING,
        Call.REMOVE_FORCE: None,
    },
    State.PAUSED: {
        Call.STOP: State.STOPPING,
        Call.PAUSE: State.PAUSED,
        Call.RESUME: State.RUNNING,
        Call.SNAPSHOT: State.PAUSED,
        Call.INJECT: State.PAUSED,
        Call.REMOVE_FORCE: None,
    },
    State.STOPPING: {Call.STOP: State.STOPPING, Call.REMOVE_FORCE: None},
    State.STOPPED: {Call.STOP: State.STOPPED, Call.REMOVE: None, Call.REMOVE_FORCE: None},
    State.ERROR: {Call.STOP: State.ERROR, Call.REMOVE: None, Call.REMOVE_FORCE: None},
}

#: The state after what happens by itself; what is missing can't happen (STA-3).
HAPPENINGS: Final[Mapping[State, Mapping[Happening, State]]] = {
    State.STARTING: {
        Happening.RUNS: State.RUNNING,
        Happening.START_FAILS: State.ERROR,
        Happening.POWERS_OFF: State.STOPPED,
        Happening.FAILS: State.ERROR,
        Happening.REBOOTED: State.STOPPED,
    },
    State.RUNNING: {
        Happening.POWERS_OFF: State.STOPPED,
        Happening.FAILS: State.ERROR,
        Happening.REBOOTED: State.STOPPED,
    },
    State.PAUSED: {
        Happening.POWERS_OFF: State.STOPPED,
        Happening.FAILS: State.ERROR,
        Happening.REBOOTED: State.STOPPED,
    },
    State.STOPPING: {
        Happening.POWERS_OFF: State.STOPPED,
        Happening.FAILS: State.STOPPED,
        Happening.ENDED: State.STOPPED,
        Happening.REBOOTED: State.STOPPED,
    },
    State.STOPPED: {},
    State.ERROR: {},
}

_HINTS: Final = {
    Call.REMOVE: "stop it first, or remove it by force",
    Call.SNAPSHOT: "only a running or paused instance can be snapshot",
    Call.INJECT: "only a running or paused instance has memory to write to",
}


def allowed(state: State) -> list[Call]:
    """The calls that *state* allows."""
    return list(CALLS[state])


def after(state: State, call: Call, instance: str) -> State | None:
    """The state after *call*; None: the instance is removed. *instance* names it in errors.

    Raises:
        StateConflict: *state* does not allow the call; ``state`` and ``allowed`` say more.
    """
    try:
        return CALLS[state][call]
    except KeyError:
        raise StateConflict(
            f"the instance {instance} is {state}, which does not allow {call}",
            hint=_HINTS.get(call),
            instance=instance,
            state=str(state),
            allowed=[str(other) for other in allowed(state)],
            rule="STA-4",
        ) from None
