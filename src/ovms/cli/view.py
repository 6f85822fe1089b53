"""How instances are shown: from the documents of the runtime contract, wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ovms.cli import output

_ENDINGS: Final = {
    "powered-off": "Exited (powered off)",
    "panicked": "Exited (guest panicked)",
    "stopped": "Exited (stopped)",
    "killed": "Exited (killed)",
    "oom-killed": "Exited (out of memory)",
    "host-rebooted": "Exited (the host was rebooted)",
}


def state_text(instance: Mapping[str, Any]) -> str:
    """The state as Docker words it: ``Up 3 minutes``."""
    state = str(instance["state"])
    if state == "error":
        text = _error_text(instance)
        if (soon := instance.get("restarts_in_ms")) is not None:
            return f"Restarting in {output.duration(soon / 1000)}{text.removeprefix('Error')}"
        return text
    if state == "stopped":
        return _ENDINGS.get(str(instance.get("ending")), "Exited")
    if state in ("running", "paused", "stopping") and instance.get("started"):
        text = f"Up {output.ago(instance['started'])}"
        return text if state == "running" else f"{text} ({state})"
    return state.capitalize()


def _error_text(instance: Mapping[str, Any]) -> str:
    error = instance.get("error") or {}
    if not instance.get("started"):
        broken_off = error.get("code", "interrupted") == "interrupted"
        return "Error (the start was broken off)" if broken_off else f"Error (the start failed: {error['code']})"
    if instance.get("ending") == "oom-killed":
        return "Error (out of memory)"
    if instance.get("ending") == "panicked":
        return "Error (the guest panicked)"
    seen = instance.get("exit") or {}
    how = f"signal {seen['signal']}" if seen.get("signal") else f"exit code {seen['code']}" if "code" in seen else ""
    return f"Error (the VMM died{': ' if how else ''}{how})"


def port_text(port: Mapping[str, Any]) -> str:
    """``127.0.0.1:8080->80/tcp``"""
    return f"{port['host_ip']}:{port['host_port']}->{port['guest_port']}/{port['protocol']}"
