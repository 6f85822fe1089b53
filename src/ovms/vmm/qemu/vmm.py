"""QEMU as a :class:`~ovms.vmm.protocol.Vmm`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import JsonInvalid, OvmsError, PortInUse, VmmError, VmmTimeout
from ovms.process import ProcessId
from ovms.spec import strictjson
from ovms.spec.choices import Accel
from ovms.vmm.model import AccelChoice, Ending, Machine, Restore, VmConfig, VmFiles
from ovms.vmm.qemu import accel as accelerators
from ovms.vmm.qemu import binary, cmdline
from ovms.vmm.qemu.control import QemuControl
from ovms.vmm.qemu.qmp import Qmp

#: Seconds from the spawn until the VM runs. A loaded machine takes its time; only a hang is longer.
START_TIMEOUT: Final = 60.0
_EVENTS_READ: Final = 256 * 1024
_EVENTS_READY: Final = b'{"execute": "qmp_capabilities"}\n'
_ENDINGS: Final = {
    "guest-shutdown": Ending.POWERED_OFF,
    "guest-panic": Ending.PANICKED,
    "host-qmp-quit": Ending.STOPPED,
    "host-signal": Ending.STOPPED,
    "subsystem-reset": Ending.STOPPED,
}
_PORT_TAKEN: Final = re.compile(r"Could not set up host forwarding rule '(\w+):([0-9.]*):([0-9]+)-")


class QemuVmm:
    """QEMU on this host. *cache_dir* keeps what is slow to find out."""

    name = "qemu"
    #: A migration stream (its version is 3) of device sections, with the firmware in a RAM section: ``qemu/state.py``.
    state_format = "qemu-migration-3"

    def __init__(self, cache_dir: Path) -> None:
        self._cache = binary.Cache(cache_dir / "qemu.json")
        self._found: binary.QemuBinary | None = None

    @property
    def _binary(self) -> binary.QemuBinary:
        if self._found is None:
            self._found = binary.find(self._cache)
        return self._found

    @property
    def version(self) -> str:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        return self._binary.version

    def choose_accel(self, wanted: Accel | None) -> AccelChoice:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        return accelerators.choose(self._binary, self._cache, wanted)

    def machine(self, accel: Accel, *, memory: int, vcpus: int, mac: str, disk_size: int | None) -> Machine:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        return Machine(
            self._binary.default_machine,
            accel,
            accelerators.cpu_model(accel),
            _host_cpu_flags() if accel is Accel.KVM else (),
            memory,
            vcpus,
            mac,
            disk_size,
        )

    def why_incompatible(self, machine: Machine, version: str) -> str | None:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        here = self._binary
        if machine.machine_type not in here.machines:
            return f"it was taken on the machine type {machine.machine_type}, which QEMU {here.version} does not have"
        if _version(version) > _version(here.version):
            return f"it was taken by QEMU {version}, and an older one ({here.version}) is installed here"
        if machine.cpu != accelerators.cpu_model(machine.accel):
            return f"it needs the CPU model {machine.cpu}, which is not what {machine.accel} gives here"
        missing = sorted(set(machine.cpu_flags) - set(_host_cpu_flags()))
        if missing:
            return f"it needs CPU features that this host lacks ({', '.join(missing[:5])})"
        return None

    def start(self, config: VmConfig, files: VmFiles) -> ProcessId:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        with contextlib.ExitStack() as undo:
            undo.callback(_remove_channels, files)
            running = self._spawn(config, files)
            undo.callback(process.terminate, running, grace=0.0)
            identity = ProcessId.of(running.pid)
            try:
                _wait_until_running(files, restored=config.restore is not None)
            except VmmError as exc:
                raise _explain(exc, running, files) from exc
            if identity is None:
                raise _explain(VmmError("QEMU ended at once"), running, files)
            with contextlib.suppress(FileNotFoundError):
                _event_commands(files).unlink()  # QEMU has it open; nobody else shall
            undo.pop_all()
            # The VM outlives this object: no warning that nobody waits for it.
            running.returncode = 0
            return identity

    def _spawn(self, config: VmConfig, files: VmFiles) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as held:
            control = held.enter_context(fsutil.listen_unix(files.control))
            console = held.enter_context(fsutil.listen_unix(files.console))
            pass_fds = [control.fileno(), console.fileno()]
            state = None
            if config.restore is not None:
                state = held.enter_context(_state_file(config.restore))
                pass_fds.append(state)
            _prepare_events(files, held)
            log = held.enter_context(files.vmm_log.open("wb"))
            fds = cmdline.Descriptors(control.fileno(), console.fileno(), state)
            argv = cmdline.build(self._binary.path, config, files, fds, sandbox=self._binary.sandbox)
            running = process.spawn(argv, pass_fds=pass_fds, stdout=log, stderr=log, detach=True)
            try:
                _wait_for_events(files, running)
            except BaseException:
                process.terminate(running, grace=0.0)
                raise
            return running

    def find_process(self, files: VmFiles) -> ProcessId | None:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        try:
            pid = int(files.pid.read_bytes()[:20])
            identity = ProcessId.of(pid)
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return identity if os.fsencode(files.pid) in words else None

    @contextlib.contextmanager
    def connect(self, files: VmFiles, machine: Machine, pid: int, ram_file: Path | None) -> Iterator[QemuControl]:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        with Qmp.connect(files.control) as qmp:
            yield QemuControl(qmp, machine, pid, ram_file)

    def ending(self, files: VmFiles) -> Ending:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        last = Ending.KILLED
        for event, data in _read_events(files):
            if event == "SHUTDOWN":
                last = _ENDINGS.get(str(data.get("reason")), Ending.STOPPED)
        return last


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", text)[:3])


def _host_cpu_flags() -> tuple[str, ...]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return tuple(sorted(value.split()))
    return ()


@contextlib.contextmanager
def _state_file(restore: Restore) -> Iterator[int]:
    fd = os.memfd_create("ovms-state", os.MFD_CLOEXEC)
    try:
        fsutil.pwrite_all(fd, restore.state, 0)
        yield fd
    finally:
        os.close(fd)


def _event_commands(files: VmFiles) -> Path:
    return files.directory / f"{files.EVENTS}.in"


def _prepare_events(files: VmFiles, held: contextlib.ExitStack) -> None:
    # A monitor of its own that writes QEMU's events into a file, whoever lives or dies: it is negotiated by one command
    # that waits in a FIFO. The FIFO must stay open until QEMU has it, or the command is lost.
    commands = _event_commands(files)
    commands.unlink(missing_ok=True)
    os.mkfifo(commands, 0o600)
    fd = os.open(commands, os.O_RDWR | os.O_CLOEXEC)
    held.callback(os.close, fd)
    os.write(fd, _EVENTS_READY)
    files.events.unlink(missing_ok=True)
    os.close(os.open(files.events, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _wait_for_events(files: VmFiles, running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while files.events.stat().st_size == 0 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def _wait_until_running(files: VmFiles, *, restored: bool) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    with Qmp.connect(files.control, timeout=START_TIMEOUT) as qmp:
        while restored:
            answer = qmp.execute("query-status")
            status = answer.get("status") if isinstance(answer, dict) else None
            if status != "inmigrate":
                break
            if time.monotonic() > deadline:
                raise VmmTimeout(f"QEMU did not load the device state within {START_TIMEOUT:g} s")
            time.sleep(0.0005)
        if restored:
            qmp.execute("cont")
        answer = qmp.execute("query-status")
        if not isinstance(answer, dict) or answer.get("status") not in ("running", "shutdown"):
            raise VmmError(f"the VM does not run: its status is {answer!r:.200}")


def _explain(exc: VmmError, running: subprocess.Popen[bytes], files: VmFiles) -> OvmsError:
    # When QEMU dies, its socket closes a moment before its last words are to be had.
    deadline = time.monotonic() + 1.0
    while running.poll() is None and not isinstance(exc, VmmTimeout) and time.monotonic() < deadline:
        time.sleep(0.005)
    said = files.vmm_log.read_bytes() if files.vmm_log.exists() else b""
    if match := _PORT_TAKEN.search(said.decode("utf-8", "replace")):
        return PortInUse(
            f"port {match[3]}/{match[1]} of {match[2] or 'the host'} is in use",
            hint="choose another port with -p",
            port=int(match[3]),
        )
    if isinstance(exc, VmmTimeout):
        return VmmTimeout(f"{exc.message}; QEMU said: {process.tail(said)}")
    if running.poll() is None:
        return VmmError(f"{exc.message}; QEMU said: {process.tail(said)}")
    return VmmError(f"QEMU did not start ({process.describe_exit(running.returncode)}): {process.tail(said)}")


def _remove_channels(files: VmFiles) -> None:
    for path in (files.control, files.console, _event_commands(files), files.pid):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _read_events(files: VmFiles) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        with files.events.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _EVENTS_READ))
            lines = file.read(_EVENTS_READ).splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            message = strictjson.parse(line, "an event", max_size=_EVENTS_READ)
        except JsonInvalid:
            continue  # the first line may be cut, and QEMU may have died inside the last
        if isinstance(message, dict) and isinstance(message.get("event"), str):
            data = message.get("data")
            yield message["event"], data if isinstance(data, dict) else {}
