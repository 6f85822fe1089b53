"""What a VM uses of its host: memory, CPU, and what its disks and its network moved."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Final

from ovms.errors import OvmsError
from ovms.runtime import network
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record

#: Seconds that figures which the VMM has to be asked for are good for.
_FRESH: Final = 5.0
#: Seconds until it is asked again when somebody else was talking to it.
_BUSY: Final = 0.25
_TICK_MS: Final = 1000 / os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Usage:
    """The figures of all instances. The VMM is asked now and then at most, and never while somebody else talks to it."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[float, dict[str, int]]] = {}

    def of(self, record: Record) -> dict[str, int]:
        """The figures of an instance, as far as they can be had; empty where there is no VM."""
        process = record.process
        if process is None or not process.alive():
            self.forget(record.id)
            return {}
        moved = network.figures(record.network, self._instances.directory(record.id))
        return {**_of_process(process.pid), **moved, **self._of_vmm(record)}

    def forget(self, instance_id: str) -> None:
        """An instance is no more."""
        with self._lock:
            self._asked.pop(instance_id, None)

    def _of_vmm(self, record: Record) -> dict[str, int]:
        now = time.monotonic()
        with self._lock:
            asked, figures = self._asked.get(record.id, (-_FRESH, {}))
            if now - asked < _FRESH:
                return figures
            # whoever comes meanwhile gets what was known before; should the VMM be busy, it is asked again soon
            self._asked[record.id] = (now - _FRESH + _BUSY, figures)
        with (
            contextlib.suppress(OvmsError, OSError),
            self._instances.locked(record, timeout=0) as newest,
            self._instances.control(newest) as control,
        ):
            figures = dict(control.figures())
            with self._lock:
                self._asked[record.id] = (now, figures)
        return figures


def _of_process(pid: int) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        # the program's name stands in parentheses and may hold anything, so fields count from the last one
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return {
            "memory_bytes": int(fields[21]) * _PAGE,
            "cpu_ms": round((int(fields[11]) + int(fields[12])) * _TICK_MS),
        }
    return {}
