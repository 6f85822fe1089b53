"""What a VM uses of its host: memory, CPU, and what its disks and its network moved."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Final

from ovms.errors import OvmsError
from ovms.runtime import network
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record

#: Seconds that figures which the VMM has to be asked for are good for.
_FRESH: Final = 5.0
#: Seconds after which it is asked for new ones beside the answer, so that who asks all the time never waits for them.
_RENEWED: Final = 4.0
#: Seconds after which figures that nobody asks for are let go.
_FORGOTTEN: Final = 60.0
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
        self._renewing: set[str] = set()

    def of(self, record: Record) -> dict[str, int]:
        """The figures of an instance, as far as they can be had; empty where there is no VM."""
        fields = None if record.process is None else record.process.stat()
        if fields is None:
            self.forget(record.id)
            return {}
        return {**_of_process(fields), **self._moved(record), **self._of_vmm(record)}

    def at_hand(self, record: Record) -> tuple[dict[str, int], bool] | None:
        """The same, where nobody has to be asked and waited for; None where somebody has to be, or there is no VM.

        And whether :meth:`renew` is to be called, from a thread that may wait.
        """
        if record.network.path is not None:
            return None  # only a thread of its own can look into another network namespace
        with self._lock:
            asked, figures = self._asked.get(record.id, (-_FRESH, {}))
        age = time.monotonic() - asked
        if record.process is None or age >= _FRESH or (fields := record.process.stat()) is None:
            return None
        with self._lock:
            due = age >= _RENEWED and record.id not in self._renewing
            if due:
                self._renewing.add(record.id)
        return {**_of_process(fields), **self._moved(record), **figures}, due

    def renew(self, record: Record) -> None:
        """Asks for new figures before the old ones are too old."""
        try:
            self._ask(record, time.monotonic())
        finally:
            with self._lock:
                self._renewing.discard(record.id)

    def _moved(self, record: Record) -> dict[str, int]:
        return network.figures(record.network, self._instances.directory(record.id))

    def forget(self, instance_id: str) -> None:
        """An instance is no more."""
        with self._lock:
            self._asked.pop(instance_id, None)
            self._renewing.discard(instance_id)

    def _of_vmm(self, record: Record) -> dict[str, int]:
        now = time.monotonic()
        with self._lock:
            asked, figures = self._asked.get(record.id, (-_FRESH, {}))
            if now - asked < _FRESH:
                return figures
            self._renewing.discard(record.id)  # who was to do it had no thread
            if record.id not in self._asked:
                # others remove instances, too, and nobody tells us
                for old in [one for one, (when, _) in self._asked.items() if now - when > _FORGOTTEN]:
                    del self._asked[old]
            # whoever comes meanwhile gets what was known before; should the VMM be busy, it is asked again soon
            self._asked[record.id] = (now - _FRESH + _BUSY, figures)
        renewed = self._ask(record, now)
        return figures if renewed is None else renewed

    def _ask(self, record: Record, now: float) -> dict[str, int] | None:
        with (
            contextlib.suppress(OvmsError, OSError),
            self._instances.locked(record, timeout=0) as newest,
            self._instances.control(newest) as control,
        ):
            figures = dict(control.figures())
            with self._lock:
                self._asked[record.id] = (now, figures)
            return figures
        return None


def _of_process(fields: list[bytes]) -> dict[str, int]:
    return {
        "memory_bytes": int(fields[21]) * _PAGE,
        "cpu_ms": round((int(fields[11]) + int(fields[12])) * _TICK_MS),
    }
