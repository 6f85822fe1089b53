"""Starts a VMM in its jail, with a watcher beside it that outlives us: what ``watch.c`` does, from Python.

::

    instances/<uuid>/
    ├── vmm.pid                 "VMM-PID WATCHER-PID", written before the VMM runs
    ├── start.lock              locked until that is written, also when whoever starts the VM is killed
    ├── exit                    how the VMM ended: wait status, time (ns), CPU times (µs), most memory (bytes)
    ├── console.log(.1)         what the serial console printed, all boots of it; at LOG_MAX the one becomes the other
    ├── console.idx(.1)         pairs of 64-bit numbers: the console's byte of that number came at that time (ns)
    ├── events.out              the VMM's events, as they came (at most 4 MiB)
    └── vmm.log                 the VMM's stderr (at most 1 MiB)

Why it is a program of its own, and in C: ADR 0017.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import HostError, VmmError, VmmTimeout
from ovms.lazy import dataclass, field
from ovms.process import ProcessId
from ovms.spec import limits
from ovms.vmm.jail import Jail, Namespace
from ovms.vmm.model import VmFiles

PROGRAM: Final = Path(__file__).parent / "watch"
#: Bytes of console.log; there are two of them at the most.
LOG_MAX: Final = 16 * limits.MIB
#: Seconds from the watcher's start until the VMM was executed.
_TIMEOUT: Final = 30.0
_ANSWER_MAX: Final = 512
_START_LOCK: Final = "start.lock"


@dataclass(frozen=True)
class Launch:
    """A VMM to start.

    Attributes:
        argv: its program (a path) and arguments.
        keep: descriptors that it inherits, under their numbers.
        hold: descriptors that the watcher keeps open, under their numbers.
        lock: the one of those that is a file in memory, of which nothing may be swapped out.
        until: a pidfd of the process with which it is to end at the latest.
        console, listen, events: our end of the console's socket pair, the socket for those who want it, and our end of a
            QMP channel.
        trees: files and directories of its own root, beside the system's: path there (no slash before it) → path here.
        shares: directories of its own root that it may write to, as who owns them: path there → an open descriptor, and its
            path here.
        devices: further device nodes, by their names in ``/dev``.
        read_only: where those of *keep* come from that the VMM must not be able to write to.
        at_end: a program and its arguments that the watcher becomes when the VMM has ended.
        env: variables of its environment, beside a clean one's.
    """

    argv: Sequence[str]
    keep: Sequence[int]
    console: int
    listen: int
    events: int
    hold: Sequence[int] = ()
    lock: int | None = None
    until: int | None = None
    trees: Mapping[str, Path] = field(default_factory=dict)
    shares: Mapping[str, tuple[int, Path]] = field(default_factory=dict)
    devices: Sequence[str] = ()
    read_only: Mapping[int, Path] = field(default_factory=dict)
    at_end: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """A VMM that was executed, and its watcher; ``timings`` are milliseconds of the phases of its start."""

    vmm: ProcessId
    watcher: ProcessId
    timings: Mapping[str, float] = field(default_factory=dict, compare=False)


class JailRefused(HostError):
    """The host does not let us make a part of the jail."""

    def __init__(self, stage: str, number: int) -> None:
        self.reason = os.strerror(number)
        super().__init__(
            f"this host does not let ovms confine the VM ({stage}: {self.reason})",
            hint="'ovm doctor' tells what is missing; --security-opt leaves out one part of the jail at a time",
            stage=stage,
        )
        self.stage = stage


def start(launch: Launch, jail: Jail, files: VmFiles) -> Watched:
    """Starts a VMM. It, and its watcher, live on when we end.

    Raises:
        JailRefused: the jail can't be made on this host.
        VmmError: the program can't be executed.
        VmmTimeout: nothing came of it in time.
    """
    with contextlib.ExitStack() as held:
        words, inherited = _words(launch, jail, files, held)
        # no word tells the watcher of it: it closes what it does not know once the VMM was executed, and the lock goes with that
        inherited.append(_locked(files, held))
        try:
            running = subprocess.Popen(
                [str(PROGRAM), *words, "--", *launch.argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,
                env=dict(process.CLEAN_ENV),
                cwd="/",
            )
        except OSError as exc:
            raise HostError(
                f"cannot run {PROGRAM}: {exc.strerror}", hint="install ovms again: a part of it is missing"
            ) from exc
        answer = _answer(running)
    return _read(answer, files)


def _locked(files: VmFiles, held: contextlib.ExitStack) -> int:
    fd = os.open(files.directory / _START_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    held.callback(os.close, fd)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _answer(running: subprocess.Popen[bytes]) -> bytes:
    # The first process ends at once; its child answers, and closes the pipe.
    assert running.stdout is not None
    with running.stdout:
        try:
            answer, _ = running.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            raise VmmTimeout(f"the VMM was not executed within {_TIMEOUT:g} s") from None
    return answer[:_ANSWER_MAX]


def _read(answer: bytes, files: VmFiles) -> Watched:
    words = answer.decode("ascii", "replace").split()
    if len(words) == 3 and words[0] == "ok":
        return Watched(_identity(int(words[1])), _identity(int(words[2])))
    if len(words) == 3 and words[0] == "error":
        if words[1] == "exec":
            raise VmmError(f"the VMM cannot be executed: {os.strerror(int(words[2]))}")
        if words[1] == "lock":
            raise HostError(
                f"the memory of the snapshot cannot be locked: {os.strerror(int(words[2]))}",
                hint="'ovm doctor' tells the limit",
            )
        raise JailRefused(words[1], int(words[2]))
    raise VmmError(f"the watcher of {files.directory} died")


def _identity(pid: int) -> ProcessId:
    # one that has ended already has an identity, too: nobody's
    return ProcessId.of(pid) or ProcessId(pid, 0, process.boot_id())


def _words(launch: Launch, jail: Jail, files: VmFiles, held: contextlib.ExitStack) -> tuple[list[str], list[int]]:
    inherited = [launch.console, launch.listen, launch.events, *launch.keep, *launch.hold]
    inherited += [fd for fd, _ in launch.shares.values()]
    words = [f"console={launch.console}", f"listen={launch.listen}", f"events={launch.events}", f"log-max={LOG_MAX}"]
    words += [f"keep={fd}" for fd in launch.keep]
    words += [f"hold={fd}" for fd in launch.hold]
    words += [] if launch.lock is None else [f"lock={launch.lock}"]
    if launch.until is not None:
        inherited.append(launch.until)
        words.append(f"until={launch.until}")

    def inherit(path: Path, flags: int, mode: int = 0o600) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, mode)
        held.callback(os.close, fd)
        inherited.append(fd)
        return fd

    # the console's log goes on when an instance is started again; the rest tells of this VMM alone
    for name, path, anew in (
        ("log", files.console_log, 0),
        ("old", files.old(files.console_log), 0),
        ("index", files.console_index, 0),
        ("old-index", files.old(files.console_index), 0),
        ("said", files.vmm_log, os.O_TRUNC),
        ("event-log", files.events, os.O_TRUNC),
    ):
        words.append(f"{name}={inherit(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | anew)}")
    for stale in (files.exit, files.pid):
        stale.unlink(missing_ok=True)
    words.append(f"dir={inherit(files.directory, os.O_PATH | os.O_DIRECTORY)}")
    words += _jail_words(launch, jail, inherit)
    words += [f"at-end={word}" for word in launch.at_end]
    words += [f"env={name}={value}" for name, value in launch.env.items()]
    return words, inherited


def _jail_words(launch: Launch, jail: Jail, inherit: Callable[[Path, int], int]) -> list[str]:
    words = [f"ns={sum(int(namespace) for namespace in jail.namespaces)}", f"seccomp={int(jail.seccomp)}"]
    if jail.user is not None:
        words.append(f"user={jail.user.uid}:{jail.user.gid}")
    words += [f"limit={int(resource)}:{value}" for resource, value in sorted(jail.limits.items())]
    words += [f"cgroup={inherit(path, os.O_WRONLY)}" for path in jail.cgroups]
    if not jail.own_root:
        return words
    # its own files: their mode alone keeps nobody out
    sealed = launch.read_only if jail.user is not None and jail.user.uid == os.geteuid() else {}
    trees, links = system_trees()
    shared = [path for _, path in launch.shares.values()]
    words.append(f"root={_mount_point([*sealed.values(), *trees.values(), *launch.trees.values(), *shared])}")
    for name, path in {**trees, **launch.trees}.items():
        words.append(f"tree={name}:{path}")
    words += [f"share={fd}/{name}:{path}" for name, (fd, path) in launch.shares.items()]
    for device in ("null", "zero", "full", "random", "urandom", *launch.devices):
        words.append(f"dev=dev/{device}:/dev/{device}")
    words += [f"link={name}:{target}" for name, target in links.items()]
    words += [f"sealed={fd}:{path}" for fd, path in sealed.items()]
    return words


def _mount_point(needed: Sequence[Path]) -> Path:
    # any directory would do that hides nothing which is still to be looked up
    for candidate in (Path("/mnt"), Path("/srv"), Path("/media"), Path("/tmp")):  # noqa: S108 - nothing is written to it
        if candidate.is_dir() and not any(path.is_relative_to(candidate) for path in needed):
            return candidate
    raise HostError("there is no directory to build the VM's own root on", hint="make /srv, an empty directory")


def system_trees() -> tuple[dict[str, Path], dict[str, str]]:
    """What a program of the system needs to run: trees (name → path), and symbolic links (name → target)."""
    trees, links = {"usr": Path("/usr")}, {}
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            links[name] = str(path.readlink())
        elif path.is_dir():
            trees[name] = path
    for path in (Path("/etc/ld.so.cache"), Path("/etc/alternatives")):
        if path.exists():
            trees[str(path).lstrip("/")] = path
    return trees, links


def program_trees(program: Path) -> dict[str, Path]:
    """What *program* needs beside that to run: one that is not the system's brings its libraries and firmware with it."""
    real = program.resolve()
    if real.is_relative_to("/usr") or real.parent in (Path("/bin"), Path("/sbin")):
        return {}
    prefix = real.parent.parent
    return {str(prefix).lstrip("/"): prefix} if len(prefix.parts) > 1 else {str(real).lstrip("/"): real}


def find(files: VmFiles) -> Watched | None:
    """The living VMM of an instance whose starter died before it could note it.

    Raises:
        Locked: its watcher does not come to the end of the start.
    """
    lock = files.directory / _START_LOCK
    with contextlib.suppress(FileNotFoundError):
        if lock.exists():
            with fsutil.file_lock(lock, timeout=_TIMEOUT):
                pass
    try:
        vmm_pid, watcher_pid = (int(word) for word in files.pid.read_bytes()[:64].split())
    except (OSError, ValueError):
        return None
    vmm, watcher = ProcessId.of(vmm_pid), ProcessId.of(watcher_pid)
    # the numbers may be of others by now: only a child of a watcher of this directory is meant
    if vmm is None or watcher is None or process.parent(vmm_pid) != watcher_pid:
        return None
    return Watched(vmm, watcher) if _watches(watcher_pid, files.directory) else None


def _watches(pid: int, directory: Path) -> bool:
    try:
        here = directory.stat()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                there = entry.stat()
                if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                    return True
    except OSError:
        pass
    return False


@dataclass(frozen=True)
class Exit:
    """How a VMM ended: a return code as :mod:`subprocess` gives it, when (ns since the epoch), and what it had used."""

    returncode: int
    time_ns: int
    user_us: int
    system_us: int
    memory_max: int


def read_exit(files: VmFiles) -> Exit | None:
    """How the VMM of an instance ended; None while it has not, or when nobody saw it."""
    try:
        status, *rest = (int(word) for word in files.exit.read_bytes()[:256].split())
        return Exit(os.waitstatus_to_exitcode(status), *rest)
    except (OSError, ValueError, TypeError):
        return None


def wait_exit(files: VmFiles, watcher: ProcessId, timeout: float) -> Exit | None:
    """How a VMM ended that has just ended: its watcher is given *timeout* seconds to write that down."""
    deadline = time.monotonic() + timeout
    while (seen := read_exit(files)) is None and watcher.alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    return seen or read_exit(files)


def socket_pair(held: contextlib.ExitStack) -> tuple[int, int]:
    """Two connected sockets: the VMM's end and ours. They are closed with *held*."""
    theirs, ours = socket.socketpair()
    for end in (theirs, ours):
        held.callback(end.close)
    return theirs.fileno(), ours.fileno()


__all__ = ["Exit", "Jail", "JailRefused", "Launch", "Namespace", "Watched", "find", "read_exit", "socket_pair", "start"]
