"""What :class:`~ovms.vmm.protocol.Control` asks, in QMP."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import PortInUse, VmmError
from ovms.lazy import regex
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat
from ovms.vmm import freeze, maps
from ovms.vmm.model import TEMPLATE, GuestRam, Machine, PortForward, RunState
from ovms.vmm.qemu import cmdline, state
from ovms.vmm.qemu.qmp import Qmp
from ovms.vmm.watch import Watched

_RUNNING: Final = frozenset({"running"})
_PAUSED: Final = frozenset(
    {"paused", "prelaunch", "postmigrate", "finish-migrate", "inmigrate", "save-vm", "restore-vm"}
)
_STREAM: Final = regex(rf"\b{cmdline.stream_id(0)[:-1]}([0-9]+): index=")
#: Flushing a large disk cache can take its time.
_DISK_TIMEOUT: Final = 120.0


class QemuControl:
    """The control channel of one QEMU."""

    def __init__(self, qmp: Qmp, machine: Machine, vmm: Watched) -> None:
        self._qmp = qmp
        self._machine = machine
        self._vmm = vmm
        # of a snapshot that is prepared: the firmware, the overlay that has nodes already, and the node that it will stand on
        self._bios: bytes | None = None
        self._prepared: Path | None = None
        self._below: str | None = None

    def state(self) -> RunState:
        """See :class:`~ovms.vmm.protocol.Control`."""
        status = self._query("query-status").get("status")
        if status in _RUNNING:
            return RunState.RUNNING
        return RunState.PAUSED if status in _PAUSED else RunState.HALTED

    def pause(self) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("stop", timeout=_DISK_TIMEOUT)

    def resume(self, *, timeout: float | None = None) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("cont", timeout=timeout)

    def power_down(self) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("system_powerdown")

    def figures(self) -> dict[str, int]:
        """See :class:`~ovms.vmm.protocol.Control`."""
        devices = self._qmp.execute("query-blockstats")
        totals = {"disk_read_bytes": 0, "disk_written_bytes": 0}
        for device in devices if isinstance(devices, list) else []:
            stats = device.get("stats") if isinstance(device, dict) else None
            if isinstance(stats, dict) and device.get("qdev"):
                for name, key in (("disk_read_bytes", "rd_bytes"), ("disk_written_bytes", "wr_bytes")):
                    value = stats.get(key)
                    totals[name] += value if isinstance(value, int) and value >= 0 else 0
        return totals

    def set_link(self, up: bool) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._qmp.execute("set_link", {"name": cmdline.NIC_ID, "up": up})

    def agent_listens(self) -> bool:
        """See :class:`~ovms.vmm.protocol.Control`."""
        answer = self._qmp.execute("query-chardev")
        devices = answer if isinstance(answer, list) else []
        found = (d for d in devices if isinstance(d, dict) and d.get("label") == cmdline.AGENT_ID)
        return any(device.get("frontend-open") is True for device in found)

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

    @contextlib.contextmanager
    def prepare(self, overlay: Path | None) -> Iterator[None]:
        """See :class:`~ovms.vmm.protocol.Control`."""
        self._bios = self._read_bios()  # read-only memory: it is the same in the pause
        with contextlib.ExitStack() as undo:
            if overlay is not None:
                self._prepare_overlay(overlay, undo)
            yield

    def add_overlay(self, overlay: Path) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        if self._prepared != overlay:
            with self.prepare(overlay):
                return self.add_overlay(overlay)
        arguments = {"node": self._below, "overlay": cmdline.node_of(overlay)}
        self._qmp.execute("blockdev-snapshot", arguments, timeout=_DISK_TIMEOUT)
        self._prepared = None
        return None

    def _prepare_overlay(self, overlay: Path, undo: contextlib.ExitStack) -> None:
        self._below = self._active_node()
        if self._below is None:
            raise VmmError("the VM has no disk to put an overlay on")
        node = cmdline.node_of(overlay)
        # what a snapshot that was killed has left of the same number; none that is in use can be deleted
        for name in (node, f"{node}-file"):
            self._forget_node(name)
        fd_set = self._add_fd(overlay, os.O_RDWR)
        added: list[str] = []
        self._prepared = overlay

        def forget() -> None:
            if self._prepared is None:
                return
            self._prepared = None
            for name in reversed(added):
                self._forget_node(name)
            self._remove_fds(fd_set)

        undo.callback(forget)
        self._add_fd(overlay, os.O_RDONLY, fd_set)
        for value in cmdline.layer_nodes(node, fd_set, DiskFormat.QCOW2, below=None, read_only=False):
            self._qmp.execute("blockdev-add", value)
            added.append(str(value["node-name"]))

    def _forget_node(self, name: str) -> None:
        with contextlib.suppress(VmmError):
            self._qmp.execute("blockdev-del", {"node-name": name})

    def _add_fd(self, path: Path, flags: int, fd_set: int | None = None) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return self._send_fd(fd, fd_set)
        finally:
            os.close(fd)

    def _send_fd(self, fd: int, fd_set: int | None = None) -> int:
        answer = self._qmp.execute("add-fd", {} if fd_set is None else {"fdset-id": fd_set}, fds=(fd,))
        number = answer.get("fdset-id") if isinstance(answer, dict) else None
        if not isinstance(number, int):
            raise VmmError("QEMU's answer to add-fd has no fdset-id")
        return number

    def _remove_fds(self, fd_set: int) -> None:
        with contextlib.suppress(VmmError):
            self._qmp.execute("remove-fd", {"fdset-id": fd_set})

    def save_state(self) -> bytes:
        """See :class:`~ovms.vmm.protocol.Control`."""
        return state.wrap(
            self._devices(),
            machine_type=self._machine.machine_type,
            ram_block=cmdline.RAM_ID,
            ram_size=self._machine.memory,
            bios=self._bios or self._read_bios(),
        )

    def _devices(self) -> bytes:
        with contextlib.ExitStack() as held:
            memory = os.memfd_create("ovms-state", os.MFD_CLOEXEC)
            held.callback(os.close, memory)
            # QEMU opens it to write only, and takes no descriptor that can do more
            fd = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
            held.callback(os.close, fd)
            fd_set = self._send_fd(fd)
            try:
                # Not live: that would give a paused VM's disks away, and QEMU aborts at what is done with them next.
                filename = f"/dev/fdset/{fd_set}"
                self._qmp.execute("xen-save-devices-state", {"filename": filename, "live": False})
            finally:
                self._remove_fds(fd_set)
            size = os.fstat(memory).st_size
            if not 0 < size <= limits.RAM_STATE_MAX - state.BIOS_SIZE * 2:
                raise VmmError(f"QEMU wrote a device state of {size} bytes")
            return os.pread(memory, size, 0)

    def _read_bios(self) -> bytes:
        # pmemsave takes a path alone: one in QEMU's own /tmp, which is nobody else's where it has a root of its own
        name = f"/tmp/ovms-{fsutil.unique(8)}"  # noqa: S108
        arguments = {"val": state.BIOS_ADDRESS, "size": state.BIOS_SIZE, "filename": name}
        path = Path(f"/proc/{self._vmm.vmm.pid}/root{name}")
        self._qmp.execute("pmemsave", arguments)
        try:
            # a hostile QEMU may have made a link of it, which would lead out of its root
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as exc:
            raise VmmError(f"the firmware that QEMU wrote cannot be read: {exc.strerror}") from exc
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        with os.fdopen(fd, "rb") as file:
            data = file.read(state.BIOS_SIZE + 1)
        if len(data) != state.BIOS_SIZE:
            raise VmmError(f"QEMU wrote {len(data)} bytes of firmware, not {state.BIOS_SIZE}")
        return data

    def add_forward(self, port: PortForward) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        if said := self._human(f"hostfwd_add {cmdline.NETDEV_ID} {cmdline.forward(port)}"):
            raise PortInUse(f"the port cannot be forwarded: {said}", hint="choose another port", port=port.host_port)

    def remove_forward(self, port: PortForward) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        rule = cmdline.forward(port).rpartition("-")[0]
        said = self._human(f"hostfwd_remove {cmdline.NETDEV_ID} {rule}")
        if not said.endswith("removed"):
            raise VmmError(f"QEMU does not remove the forward {port}: {said}")

    def _human(self, command: str) -> str:
        # there is no QMP for these; the words are ours alone
        answer = self._qmp.execute("human-monitor-command", {"command-line": command})
        return str(answer).strip()

    def replace_stream(self, fd: int) -> None:
        """See :class:`~ovms.vmm.protocol.Control`."""
        # only "info network" lists them
        old = [int(number) for number in _STREAM.findall(self._human("info network"))]
        for name in (cmdline.HUB_PORT_ID, *map(cmdline.stream_id, old)):
            with contextlib.suppress(VmmError):  # whoever was here before us may have come half the way
                self._qmp.execute("netdev_del", {"id": name})
        new = cmdline.stream_id(max(old, default=-1) + 1)
        self._qmp.execute("getfd", {"fdname": new}, fds=(fd,))
        # not "stream": QEMU 7.2 looks for its descriptor in a thread that knows no names of descriptors
        self._qmp.execute("netdev_add", {"type": "socket", "id": new, "fd": new})
        port = {"type": "hubport", "id": cmdline.HUB_PORT_ID, "hubid": cmdline.HUB, "netdev": new}
        self._qmp.execute("netdev_add", port)

    def ram(self) -> GuestRam:
        """See :class:`~ovms.vmm.protocol.Control`."""
        pid, size = self._vmm.vmm.pid, self._machine.memory
        file = _memfd_of(self._vmm.watcher.pid, size)
        return GuestRam(pid, size, file, private=maps.find(pid, file, size).private)

    def freeze_ram(self) -> bool:
        """See :class:`~ovms.vmm.protocol.Control`."""
        pid, size = self._vmm.vmm.pid, self._machine.memory
        return freeze.freeze(pid, _memfd_of(pid, size), size)

    def _query(self, command: str) -> dict[str, Any]:
        answer = self._qmp.execute(command)
        if not isinstance(answer, dict):
            raise VmmError(f"QEMU's answer to {command} is no object")
        return answer


def _memfd_of(pid: int, size: int) -> Path:
    """The descriptor of the guest's memory in QEMU or its watcher: the one memfd of its name and exactly its size."""
    directory = Path(f"/proc/{pid}/fd")
    try:
        for entry in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if f"memfd:{TEMPLATE}:" in str(entry.readlink()) and entry.stat().st_size == size:
                    return entry
    except OSError as exc:
        raise VmmError(f"the memory of process {pid} cannot be read: {exc.strerror}") from exc
    raise VmmError(f"process {pid} has no guest memory of {size} bytes")
