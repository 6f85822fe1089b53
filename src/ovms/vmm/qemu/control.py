"""What :class:`~ovms.vmm.protocol.Control` asks, in QMP."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import FileProblem, VmmError
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat
from ovms.vmm.model import GuestRam, Machine, RunState
from ovms.vmm.qemu import cmdline, state
from ovms.vmm.qemu.qmp import Qmp

_RUNNING: Final = frozenset({"running"})
_PAUSED: Final = frozenset(
    {"paused", "prelaunch", "postmigrate", "finish-migrate", "inmigrate", "save-vm", "restore-vm"}
)
#: Flushing a large disk cache can take its time.
_DISK_TIMEOUT: Final = 120.0


class QemuControl:
    """The control channel of one QEMU."""

    def __init__(self, qmp: Qmp, machine: Machine, pid: int, ram_file: Path | None) -> None:
        """*ram_file* is what the VM was restored from, None for one that was booted."""
        self._qmp = qmp
        self._machine = machine
        self._pid = pid
        self._ram_file = ram_file

    def state(self) -> RunState:
        """See :class:`~ovms.vmm.protocol.Control`."""
        status = self._query("query-status").get("status")
        if status in _RUNNING:
            return RunState.RUNNING
        return RunState.PAUSED if status in _PAUSED else RunState.HALTED

    def pause(self) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("stop", timeout=_DISK_TIMEOUT)

    def resume(self) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("cont")

    def power_down(self) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("system_powerdown")

    def quit(self) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("quit")
        self._qmp.wait_closed(_DISK_TIMEOUT)

    def active_overlay(self) -> str | None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        node = self._active_node()
        return None if node is None else f"{node}.qcow2"

    def _active_node(self) -> str | None:
        devices = self._qmp.execute("query-block")
        if not isinstance(devices, list):
            raise VmmError("QEMU's answer to query-block is no list")
        for device in devices:
            if isinstance(device, dict) and cmdline.DISK_ID in str(device.get("qdev")):
                inserted = device.get("inserted")
                node = inserted.get("node-name") if isinstance(inserted, dict) else None
                if isinstance(node, str) and node:
                    return node
        return None

    def add_overlay(self, overlay: Path) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        below = self._active_node()
        if below is None:
            raise VmmError("the VM has no disk to put an overlay on")
        node = cmdline.node_of(overlay)
        added: list[str] = []
        try:
            for value in cmdline.layer_nodes(node, overlay, DiskFormat.QCOW2, below=None, read_only=False):
                self._qmp.execute("blockdev-add", value)
                added.append(str(value["node-name"]))
            self._qmp.execute("blockdev-snapshot", {"node": below, "overlay": node}, timeout=_DISK_TIMEOUT)
        except BaseException:
            for name in reversed(added):
                with contextlib.suppress(VmmError):
                    self._qmp.execute("blockdev-del", {"node-name": name})
            raise

    def save_state(self, scratch: Path) -> bytes:
        """See :class:`~ovms.vmm.protocol.Control`."""
        try:
            # live: the disks stay ours
            self._qmp.execute("xen-save-devices-state", {"filename": str(scratch), "live": True})
            devices = _read_scratch(scratch, limits.RAM_STATE_MAX - state.BIOS_SIZE * 2)
            arguments = {"val": state.BIOS_ADDRESS, "size": state.BIOS_SIZE, "filename": str(scratch)}
            self._qmp.execute("pmemsave", arguments)
            bios = _read_scratch(scratch, state.BIOS_SIZE)
        finally:
            scratch.unlink(missing_ok=True)
        return state.wrap(
            devices,
            machine_type=self._machine.machine_type,
            ram_block=cmdline.RAM_ID,
            ram_size=self._machine.memory,
            bios=bios,
        )

    def ram(self) -> GuestRam:
        """See :class:`~ovms.vmm.protocol.Control`."""
        if self._ram_file is not None:
            return GuestRam(self._pid, self._machine.memory, self._ram_file, private=True)
        return GuestRam(self._pid, self._machine.memory, _memfd_of(self._pid, self._machine.memory), private=False)

    def _query(self, command: str) -> dict[str, Any]:
        answer = self._qmp.execute(command)
        if not isinstance(answer, dict):
            raise VmmError(f"QEMU's answer to {command} is no object")
        return answer


def _read_scratch(path: Path, max_size: int) -> bytes:
    try:
        return fsutil.read_input(path, "the device state", max_size=max_size)
    except FileProblem as exc:
        raise VmmError(f"QEMU did not write its device state: {exc.message}") from exc


def _memfd_of(pid: int, size: int) -> Path:
    """The descriptor of QEMU's memory: the one memfd of exactly the guest's size."""
    directory = Path(f"/proc/{pid}/fd")
    try:
        for entry in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if "memfd:memory-backend" in str(entry.readlink()) and entry.stat().st_size == size:
                    return entry
    except OSError as exc:
        raise VmmError(f"the memory of process {pid} cannot be read: {exc.strerror}") from exc
    raise VmmError(f"process {pid} has no guest memory of {size} bytes")
