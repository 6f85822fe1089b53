"""An instance as the runtime contract shows it (the schema ``Instance``), with some fields of our own beside those."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from io import FileIO
from typing import Any, Final

from ovms.errors import Interrupted, OvmsError, VmmError
from ovms.process import describe_exit
from ovms.runtime.instances import Status
from ovms.runtime.record import Record
from ovms.spec import api
from ovms.spec.states import State
from ovms.vmm import virtiofs
from ovms.vmm.extras import BY_VIRTIOFS
from ovms.vmm.model import Ending, PortForward, VmFiles

_PAIR: Final = struct.Struct("<QQ")
#: Milliseconds by which the times of records are rounded.
_CLOCK_STEP: Final = 1.0
_WITH_VM: Final = frozenset({State.RUNNING, State.PAUSED, State.STOPPING})


def instance(
    status: Status,
    *,
    files: VmFiles | None = None,
    metrics: Mapping[str, int] | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """An instance as JSON; *files* are where its first output is looked for, and (with *details*) whether the directories that it
    shares are served still; *metrics* its use of the host.
    """
    record = status.record
    answer: dict[str, Any] = {
        "instance_id": record.id,
        "name": record.name,
        "state": str(status.state),
        "ending": None if status.ending is None else str(status.ending),
        "exit_status": status.exit_status,
        "reference": record.reference,
        "digest": record.digest,
        "created": record.created,
        "started": record.started,
        "start_ms": record.start_ms,
        "restored": record.restored,
        "not_restored": record.not_restored,
        "identity": None if record.identity is None else record.identity.to_json(),
        "memory_locked": record.memory_locked,
        "vmm": record.vmm,
        "runtime": record.vmm,
        "accel": str(record.machine.accel),
        "accel_reason": record.accel_reason,
        "memory": record.machine.memory,
        "cpus": record.machine.vcpus,
        "ports": [forward(port) for port in record.ports],
        "network": str(record.network),
        "timings_ms": _timings(record, files),
        "exit": _exit(status),
        "restarts": None if record.restart is None else record.restart.count,
        "restarts_in_ms": None if status.restarts_in is None else round(status.restarts_in * 1000),
        "pid": None if record.process is None or not status.state.alive else record.process.pid,
        "error": _error(status),
    }
    if record.digest is None:
        del answer["digest"]
    if not record.resolved:
        del answer["accel"]  # nobody has chosen yet
    if record.process is not None and status.state in _WITH_VM and record.started is not None:
        ran = datetime.now(UTC) - datetime.fromisoformat(record.started)
        answer["uptime_ms"] = max(0, round(ran.total_seconds() * 1000))
    if metrics is not None:
        answer["metrics"] = dict(metrics)
    if details:
        answer["machine"] = record.machine.to_json()
        answer["volumes"] = _volumes(status, files)
        answer["user_data"] = record.user_data
        answer["runtime_version"] = record.vmm_version
        answer["remove_on_exit"] = record.remove_on_exit
        answer["jail"] = record.jail.to_json()
    return answer


def _volumes(status: Status, files: VmFiles | None) -> list[dict[str, Any]]:
    answer, number = [], 0
    for volume in status.record.volumes:
        answer.append(volume.to_json())
        if volume.format is not None:
            continue
        if volume.via == BY_VIRTIOFS and files is not None and status.state in _WITH_VM:
            answer[-1]["problem"] = virtiofs.lost(files.directory, number)
        number += 1
    return answer


def forward(port: PortForward) -> dict[str, Any]:
    """A forwarded port as JSON."""
    return {
        "host_ip": port.host_ip,
        "host_port": port.host_port,
        "guest_port": port.guest_port,
        "protocol": port.protocol,
    }


def _timings(record: Record, files: VmFiles | None) -> dict[str, float]:
    timings = dict(record.timings)
    if files is None or record.started is None or record.start_ms is None:
        return timings
    spawned = datetime.fromisoformat(record.started).timestamp() * 1000 - record.start_ms
    index_path = f"{files.directory}/{files.CONSOLE_INDEX}"
    for path in (f"{index_path}{files.OLD}", index_path):
        with contextlib.suppress(OSError, struct.error), open(path, "rb", buffering=0) as index:  # noqa: PTH123 - often
            found = _first_since(index, spawned)
            if found is None:
                continue
            at, number, time_ns = found
            if at or number == 0 or path == index_path:  # what came before it is there, too
                timings["first_output"] = max(0.0, round(time_ns / 1e6 - spawned, 1))
            break
    return timings


def _first_since(index: FileIO, moment_ms: float) -> tuple[int, int, int] | None:
    # of the entries, which are in the order of time: the place of the first that is not before *moment_ms*, and what it says
    low, high = 0, os.fstat(index.fileno()).st_size // _PAIR.size

    def entry(place: int) -> tuple[int, int]:
        number, time_ns = _PAIR.unpack(os.pread(index.fileno(), _PAIR.size, place * _PAIR.size))
        return number, time_ns

    end = high
    while low < high:
        middle = (low + high) // 2
        if entry(middle)[1] / 1e6 < moment_ms - _CLOCK_STEP:
            low = middle + 1
        else:
            high = middle
    return None if low == end else (low, *entry(low))


def _exit(status: Status) -> dict[str, Any] | None:
    seen = status.exit
    if seen is None:
        return None
    ended = datetime.fromtimestamp(seen.time_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "time": ended,
        "code": seen.returncode if seen.returncode >= 0 else None,
        "signal": describe_exit(seen.returncode).removeprefix("signal ") if seen.returncode < 0 else None,
        "cpu_ms": round((seen.user_us + seen.system_us) / 1000, 1),
        "memory_max": seen.memory_max,
    }


def _error(status: Status) -> dict[str, Any] | None:
    if status.state is not State.ERROR:
        return None
    record = status.record
    if record.problem is not None:
        return dict(record.problem)
    if record.process is None:
        error: OvmsError = Interrupted("the start was broken off", hint="whoever worked on it was killed: start anew")
    elif status.ending is Ending.OUT_OF_MEMORY:
        error = VmmError("the kernel ended the VMM: its cgroup had no memory left")
    elif status.ending is Ending.PANICKED:
        error = VmmError("the guest panicked", hint=f"'ovm logs {record.name}' shows its last words")
    else:
        how = "" if status.exit is None else f" ({describe_exit(status.exit.returncode)})"
        error = VmmError(f"the VMM died{how}")
    return api.problem(error)
