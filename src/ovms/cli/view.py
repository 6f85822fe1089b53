"""How instances are shown."""

from __future__ import annotations

from typing import Any

from ovms.cli import output
from ovms.runtime.instances import Status
from ovms.spec.states import State
from ovms.vmm.model import Ending

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
        "ports": [
            {"host_ip": p.host_ip, "host_port": p.host_port, "guest_port": p.guest_port, "protocol": p.protocol}
            for p in record.ports
        ],
        "pid": None if record.process is None or not status.state.alive else record.process.pid,
    }
    if details:
        answer["machine"] = record.machine.to_json()
        answer["volumes"] = [volume.to_json() for volume in record.volumes]
        answer["user_data"] = record.user_data
        answer["runtime_version"] = record.vmm_version
        answer["remove_on_exit"] = record.remove_on_exit
    return answer


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
