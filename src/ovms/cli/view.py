"""How instances are shown."""

from __future__ import annotations

from typing import Any

from ovms.cli import output
from ovms.runtime.instances import Status
from ovms.spec.states import State
from ovms.vmm.model import Ending, PortForward

_ENDINGS = {
    Ending.POWERED_OFF: "Exited (powered off)",
    Ending.PANICKED: "Exited (guest panicked)",
    Ending.STOPPED: "Exited (stopped)",
    Ending.KILLED: "Exited (killed)",
}


def instance(status: Status, *, details: bool = False) -> dict[str, Any]:
    """An instance as JSON."""
    record = status.record
    answer: dict[str, Any] = {
        "instance_id": record.id,
        "name": record.name,
        "state": str(status.state),
        "ending": None if status.ending is None else str(status.ending),
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
        "pid": None if record.process is None or not status.state.alive else record.process.pid,
    }
    if details:
        answer["machine"] = record.machine.to_json()
        answer["runtime_version"] = record.vmm_version
        answer["remove_on_exit"] = record.remove_on_exit
    return answer


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
        return "Error (the VMM died)" if status.record.process else "Error (the start was broken off)"
    return _ENDINGS[status.ending] if status.ending else "Exited"
