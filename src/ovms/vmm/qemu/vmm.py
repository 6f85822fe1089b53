"""QEMU as a :class:`~ovms.vmm.protocol.Vmm`."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import FileProblem, JsonInvalid, Locked, OvmsError, PortInUse, Unsupported, VmmError, VmmTimeout
from ovms.lazy import regex, replace
from ovms.spec import limits, strictjson
from ovms.spec.choices import Accel
from ovms.spec.manifest import DiskFormat
from ovms.vmm import freeze, virtiofs, watch
from ovms.vmm.capabilities import Capabilities
from ovms.vmm.extras import BY_9P, BY_VIRTIOFS, VOLUMES_MAX, Share
from ovms.vmm.model import TEMPLATE, AccelChoice, Ending, Machine, Region, Restore, Uplink, VmConfig, VmFiles
from ovms.vmm.qemu import accel as accelerators
from ovms.vmm.qemu import binary, cmdline, versions
from ovms.vmm.qemu.control import QemuControl
from ovms.vmm.qemu.qmp import Qmp
from ovms.vmm.watch import Watched

#: Seconds from the spawn until the VM runs. A loaded machine takes its time; only a hang is longer.
START_TIMEOUT: Final = 60.0
_EVENTS_READ: Final = 256 * 1024
_ENDINGS: Final = {
    "guest-shutdown": Ending.POWERED_OFF,
    "guest-panic": Ending.PANICKED,
    "host-qmp-quit": Ending.STOPPED,
    "host-signal": Ending.STOPPED,
    "subsystem-reset": Ending.STOPPED,
}
#: What QEMU says of an image that another QEMU, or a qemu-img, has open; the device is one of ours.
_FILE_TAKEN: Final = regex(r'-device \w[\w-]*,id=(\w+),.*Failed to get (?:shared )?"[\w ]+" lock')
_PORT_TAKEN: Final = regex(r"Could not set up host forwarding rule '(\w+):([0-9.]*):([0-9]+)-")


class QemuVmm:
    """QEMU on this host. *cache_dir* keeps what is slow to find out."""

    name = "qemu"
    #: A migration stream (its version is 3) of device sections, with the firmware in a RAM section: ``qemu/state.py``.
    state_format = "qemu-migration-3"
    capabilities = Capabilities(
        archs=frozenset({"x86_64"}),
        accels=frozenset(Accel),
        disk_formats=frozenset(DiskFormat),
        bios=True,
        memory_unit=1024,
        state_formats=(state_format,),
        live_overlay=True,
        devices={"ivshmem": limits.DEVICES_MAX},
        networks=frozenset({"user", "passt", "tap", "bridge", "netns", "none"}),
        agent=True,
        port_protocols=frozenset({"tcp", "udp"}),
        shares=frozenset({BY_9P, BY_VIRTIOFS}),
        volumes=VOLUMES_MAX + 1,  # and the seed
        power_button=True,
    )

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

    def machine(
        self,
        accel: Accel,
        *,
        memory: int,
        vcpus: int,
        mac: str,
        disk_size: int | None,
        regions: tuple[Region, ...] = (),
    ) -> Machine:
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
            agent=True,
            regions=regions,
        )

    def why_incompatible(self, machine: Machine, version: str) -> str | None:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        here = self._binary
        if machine.machine_type not in here.machines:
            return f"it was taken on the machine type {machine.machine_type}, which QEMU {here.version} does not have"
        if versions.number(version) > versions.number(here.version):
            return f"it was taken by QEMU {version}, and an older one ({here.version}) is installed here"
        if machine.cpu != accelerators.cpu_model(machine.accel):
            return f"it needs the CPU model {machine.cpu}, which is not what {machine.accel} gives here"
        missing = sorted(set(machine.cpu_flags) - set(_host_cpu_flags()))
        if missing:
            return f"it needs CPU features that this host lacks ({', '.join(missing[:5])})"
        return None

    def start(self, config: VmConfig, files: VmFiles) -> Watched:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        with contextlib.ExitStack() as undo:
            undo.callback(_remove_channels, files)
            began = time.monotonic()
            watched = self._spawn(config, files)
            undo.callback(_end, watched, files)
            spawned = time.monotonic()
            try:
                loaded = _wait_until_running(files, config)
            except VmmError as exc:
                raise _explain(exc, watched, config, files) from exc
            undo.pop_all()
            # of one that boots, the wait for its control channel is a part of the spawn
            marks = (began, spawned, loaded, time.monotonic()) if loaded else (began, time.monotonic())
            phases = zip(("spawn", "load", "resume"), itertools.pairwise(marks), strict=False)
            return replace(watched, timings={name: round((to - at) * 1000, 1) for name, (at, to) in phases})

    def _spawn(self, config: VmConfig, files: VmFiles) -> Watched:
        with contextlib.ExitStack() as held:
            listen = held.enter_context(fsutil.listen_unix(files.console))
            console, our_console = watch.socket_pair(held)
            events, our_events = watch.socket_pair(held)
            shares = config.extras.shares
            program = virtiofs.find() if any(share.via == BY_VIRTIOFS for share in shares) else None
            ends = virtiofs.connect(shares, files, held)
            fds = _open(config, files, held, console, events)
            fds = replace(fds, virtiofs={number: end for number, (_, end) in ends.items()})
            library = os.open(freeze.LIBRARY, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, library)
            launch = watch.Launch(
                argv=cmdline.build(
                    self._binary.path,
                    config,
                    fds,
                    sandbox=self._binary.sandbox,
                    since=versions.Since.of(self._binary.version),
                ),
                keep=[*fds.all(), library],
                # a volume that is opened anew, for reading, loses the lock that its descriptor has
                hold=(
                    fds.ram,
                    *fds.regions,
                    *(disk.fd for disk in config.extras.volumes if disk.read_only),
                ),
                lock=fds.ram if config.restore is not None and config.restore.lock else None,
                console=our_console,
                listen=listen.fileno(),
                events=our_events,
                trees={**watch.program_trees(self._binary.path), **cmdline.share_trees(shares)},
                shares=cmdline.writable_shares(shares),
                read_only=_read_only(config, fds),
                devices=("kvm",) if config.machine.accel is Accel.KVM else (),
                at_end=config.at_end,
                env={"LD_PRELOAD": cmdline.fd_path(library)},
            )
            try:
                watched = watch.start(launch, config.jail, files)
                try:
                    # it waits for them when it makes their devices
                    for number, (listener, _) in ends.items():
                        assert program is not None
                        virtiofs.start(program, number, shares[number], listener, files, config.jail, watched.vmm)
                except BaseException:
                    watched.vmm.kill()
                    raise
                return watched
            except watch.JailRefused as exc:
                if (problem := _of_shares(exc, shares)) is not None:
                    raise problem from exc
                raise

    @contextlib.contextmanager
    def connect(self, files: VmFiles, machine: Machine, vmm: Watched) -> Iterator[QemuControl]:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        with Qmp.connect(files.control) as qmp:
            yield QemuControl(qmp, machine, vmm)

    def ending(self, files: VmFiles) -> Ending:
        """See :class:`~ovms.vmm.protocol.Vmm`."""
        last = Ending.KILLED
        for event, data in _read_events(files):
            if event == "SHUTDOWN":
                last = _ENDINGS.get(str(data.get("reason")), Ending.STOPPED)
        return last


def _of_shares(refused: watch.JailRefused, shares: tuple[Share, ...]) -> OvmsError | None:
    # What is told of a directory, where it is one that the jail can't be made with.
    read, written = ([share.path for share in shares if share.read_only is kind] for kind in (True, False))
    if refused.stage == "tree" and read:
        return FileProblem(
            f"the VM's own user cannot get to {' or '.join(map(str, read))}",
            hint="it is nobody's owner: each directory on the way must let others search it ('chmod o+x'), the last one read it",
            path=str(read[0]),
        )
    if refused.stage not in ("share", "idmap") or not written:
        return None
    which = " or ".join(map(str, written))
    if refused.stage == "share":
        return FileProblem(
            f"{which} cannot be shared with a guest: {refused.reason}",
            hint="it was moved in the meantime, or its mount cannot be bound: name it anew",
            path=str(written[0]),
        )
    return Unsupported(
        f"{which} cannot be shared with a guest that writes to it: its file system, or one that is mounted in it, gives files"
        f" no other owners for one VM (an idmapped mount: {refused.reason})",
        hint="ext4, XFS, Btrfs do, and tmpfs from Linux 6.3 on, where they are not idmapped already: add ',ro' to read only, or use"
        " a disk ('--volume FILE')",
        path=str(written[0]),
    )


def _host_cpu_flags() -> tuple[str, ...]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return tuple(sorted(value.split()))
    return ()


def _open(
    config: VmConfig, files: VmFiles, held: contextlib.ExitStack, console: int, events: int
) -> cmdline.Descriptors:
    def opened(path: Path | None, flags: int) -> int | None:
        if path is None:
            return None
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        held.callback(os.close, fd)
        return fd

    def must(path: Path, flags: int) -> int:
        fd = opened(path, flags)
        assert fd is not None
        return fd

    overlay = config.overlay
    return cmdline.Descriptors(
        control=held.enter_context(fsutil.listen_unix(files.control)).fileno(),
        console=console,
        events=events,
        layers=tuple(must(layer.path, os.O_RDONLY) for layer in config.layers),
        overlay=None if overlay is None else (must(overlay, os.O_RDWR), must(overlay, os.O_RDONLY)),
        kernel=opened(config.kernel, os.O_RDONLY),
        initrd=opened(config.initrd, os.O_RDONLY),
        ram=_memory_file(config, held) if config.restore is None else config.restore.ram,
        state=None if config.restore is None else _state_file(config.restore, held),
        extras=tuple(config.extras.fds()),
        agent=held.enter_context(fsutil.listen_unix(files.agent)).fileno() if config.machine.agent else None,
        regions=config.regions,
        network=config.network.fd,
    )


def _read_only(config: VmConfig, fds: cmdline.Descriptors) -> dict[int, Path]:
    paths = [*(layer.path for layer in config.layers), config.kernel, config.initrd]
    numbers = [*fds.layers, fds.kernel, fds.initrd]
    ours = {fd: path for fd, path in zip(numbers, paths, strict=True) if fd is not None and path is not None}
    return ours | {disk.fd: disk.path for disk in config.extras.disks() if disk.read_only}


def _memory_file(config: VmConfig, held: contextlib.ExitStack) -> int:
    # ours from the start, for a snapshot makes a template of it
    fd = os.memfd_create(f"{TEMPLATE}:{config.uuid}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    held.callback(os.close, fd)
    os.ftruncate(fd, config.machine.memory)
    return fd


def _state_file(restore: Restore, held: contextlib.ExitStack) -> int:
    fd = os.memfd_create("ovms-state", os.MFD_CLOEXEC)
    held.callback(os.close, fd)
    fsutil.pwrite_all(fd, restore.state, 0)
    # QEMU takes from a set of descriptors what can do no more than it asks for
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    held.callback(os.close, reading)
    return reading


def _wait_until_running(files: VmFiles, config: VmConfig) -> float | None:
    # When the device state was loaded; None where there is none.
    loaded = None
    restored, linked = config.restore is not None, config.network.uplink is not Uplink.NONE
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
        if restored or not linked:
            # a snapshot has the link as it was then
            qmp.execute("set_link", {"name": cmdline.NIC_ID, "up": linked})
        if restored:
            loaded = time.monotonic()
            if not config.parked:
                qmp.execute("cont")
        answer = qmp.execute("query-status")
        expected = ("paused", "prelaunch") if config.parked else ("running", "shutdown")
        if not isinstance(answer, dict) or answer.get("status") not in expected:
            raise VmmError(f"the VM does not run: its status is {answer!r:.200}")
    return loaded


def _explain(exc: VmmError, watched: Watched, config: VmConfig, files: VmFiles) -> OvmsError:
    # When QEMU dies, its socket closes a moment before its last words are to be had: they are before the exit file.
    ended = None if isinstance(exc, VmmTimeout) else watch.wait_exit(files, watched.watcher, 2.0)
    said = files.vmm_log.read_bytes() if files.vmm_log.exists() else b""
    if match := _PORT_TAKEN.search(said.decode("utf-8", "replace")):
        return PortInUse(
            f"port {match[3]}/{match[1]} of {match[2] or 'the host'} is in use",
            hint="choose another port with -p",
            port=int(match[3]),
        )
    if b"lock" in said and (match := _FILE_TAKEN.search(said.decode("utf-8", "replace"))):
        return Locked(
            f"the disk {match[1]} is in use by another program",
            hint="something else than ovms has it open: 'fuser FILE' says what",
        )
    for number, share in enumerate(config.extras.shares):
        # each ends with its VMM, by itself and without words
        if share.via == BY_VIRTIOFS and b"vhost" in said and (why := virtiofs.lost(files.directory, number)):
            return VmmError(f"{share.path} cannot be shared: {why}; QEMU said: {process.tail(said)}")
    if isinstance(exc, VmmTimeout):
        return VmmTimeout(f"{exc.message}; QEMU said: {process.tail(said)}")
    if ended is None:
        return VmmError(f"{exc.message}; QEMU said: {process.tail(said)}")
    return VmmError(f"QEMU did not start ({process.describe_exit(ended.returncode)}): {process.tail(said)}")


def _end(watched: Watched, files: VmFiles) -> None:
    watched.vmm.kill()
    # only now: should we be interrupted before, it is by this that it is found, and ended
    files.pid.unlink(missing_ok=True)


def _remove_channels(files: VmFiles) -> None:
    for path in (files.control, files.console, files.agent):
        path.unlink(missing_ok=True)


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
