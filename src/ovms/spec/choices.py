"""What a caller may choose when an instance is started, or a snapshot taken of it."""

from __future__ import annotations

from enum import StrEnum


class Accel(StrEnum):
    """Who runs the guest's instructions: the processor (KVM), or a translator (TCG)."""

    KVM = "kvm"
    TCG = "tcg"


class RestorePolicy(StrEnum):
    """What to do with a RAM snapshot: ``spec/rfc/ramsnap-v1.md``, section 7."""

    #: Restore it where this host can; else boot, and say why.
    AUTO = "auto"
    #: Restore it, or fail.
    REQUIRE = "require"
    #: Leave it aside.
    NEVER = "never"


class Leave(StrEnum):
    """What an instance does after a snapshot of it (RUN-13)."""

    #: What it did before.
    RUNNING = "running"
    #: It stands still, at the moment of the snapshot.
    PAUSED = "paused"
    #: It was ended at that moment.
    STOPPED = "stopped"
