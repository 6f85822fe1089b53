"""KVM for the bare guest: also on a host whose KVM runs no more than that, not by QEMU's usual CPU, and for root alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ovms.artifact.resolve import Found
from ovms.errors import OvmsError
from ovms.runtime import jail
from ovms.runtime.jail import SecurityOptions
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.vmm.jail import Jail
from ovms.vmm.model import Machine
from ovms.vmm.qemu import accel
from support.guests import Console


class NoKvm(Exception):
    """Why not."""


@contextlib.contextmanager
def running(runtime: Runtime, echo: Found, memory: int) -> Iterator[Record]:
    """The echo guest under KVM, which is chosen by default meanwhile.

    Raises:
        NoKvm: it does not come up, with any CPU.
    """
    device = Path("/dev/kvm")
    if not os.access(device, os.R_OK | os.W_OK):
        raise NoKvm(f"there is no {device}, or it is not for us")
    plan = jail.plan

    def as_root(instance_id: str, machine: Machine, options: SecurityOptions, **more: Any) -> Jail:
        return plan(instance_id, machine, SecurityOptions(options.off | {jail.Part.USER}), **more)

    with contextlib.ExitStack() as held:
        # the probe is right to refuse what runs bare guests alone: it is left out here
        held.enter_context(patch.object(accel, "_why_not_kvm", lambda binary, cache: None))
        if not device.stat().st_mode & 0o066:  # root's alone, and so no VM's own user's
            held.enter_context(patch.object(jail, "plan", as_root))
        for cpu in ("host", "host,-arch-capabilities"):
            held.enter_context(patch.dict(accel._CPUS, {Accel.KVM: cpu}))
            try:
                record = runtime.start(echo, RunOptions(memory=memory, accel=Accel.KVM)).record
                Console(runtime.instances.directory(record.id)).wait_for("READY", timeout=10)
            except (OvmsError, AssertionError):
                for left in runtime.instances.records():
                    runtime.remove(left, force=True)
                continue
            yield record
            return
        raise NoKvm("the bare guest does not run on this KVM")
