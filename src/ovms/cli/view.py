"""How instances are shown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ovms.cli import output
from ovms.process import describe_exit
from ovms.runtime.instances import Status
from ovms.spec.states import State
from ovms.vmm.model import Ending, PortForward

_ENDINGS = {
    Ending.POWERED_OFF: "Exited (powered off)",
    Ending.PANICKED: "Exited (guest panicked)",
    Ending.STOPPED: "Exited (stopped)",
    Ending.KILLED: "Exited (killed)",
    Ending.OUT_OF_MEMORY: "Exited (out of memory)",
    Ending.HOST_REBOOTED: "Exited (the host was rebooted)",
}


def instance(status: Status, *, details: bool = False) -> dict[str, Any]:
    """An instance as JSON."""
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
        "runtime": record.vmm,
        "accel": str(record.machine.accel),
        "accel_reason": record.accel_reason,
        "memory": record.machine.memory,
        "cpus": record.machine.vcpus,
        "ports": [forward(port) for port in record.ports],
        "network": str(record.network),
        "exit": _exit(status),
        "restarts": None if record.restart is None else record.restart.count,
        "pid": None if record.process is None or not status.state.alive else record.process.pid,
    }
    if details:
        answer["machine"] = record.machine.to_json()
        answer["volumes"] = [volume.to_json() for volume in record.volumes]
        answer["user_data"] = record.user_data
        answer["runtime_version"] = record.vmm_version
        answer["remove_on_exit"] = record.remove_on_exit
        answer["jail"] = record.jail.to_json()
    return answer


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


def forward(port: PortForward) -> dict[str, Any]:
    """A forwarded port as JSON."""
    return {
        "host_ip": port.host_ip,
        "host_port": port.host_port,
        "guest_port": port.guest_port,
        "protocol": port.protocol,
    }


def state_text(status: Status) -> str:
    """The state as Docker words it: ``Up 3 minutes``."""
    if status.state in (State.RUNNING, State.PAUSED, State.STOPPING):
        text = f"Up {output.ago(status.record.started)}"
        return text if status.state is State.RUNNING else f"{text} ({status.state})"
    if status.state is State.STARTING:
        return "Starting"
    if status.state is State.ERROR:
        return _error_text(status)
    return _ENDINGS[status.ending] if status.ending else "Exited"


def _error_text(status: Status) -> str:
    if status.record.process is None:
        return "Error (the start was broken off)"
    if status.ending is Ending.OUT_OF_MEMORY:
        return "Error (out of memory)"
    how = "" if status.exit is None else f": {describe_exit(status.exit.returncode)}"
    return f"Error (the VMM died{how})"
