"""Control groups: what bounds a VMM's memory and threads, and tells whether the kernel ended it for want of memory.

Both versions: v2 below ``/sys/fs/cgroup/ovms/`` (root) or in what the user's service manager delegates; v1 below the
cgroup that we are in. Source: the kernel's ``admin-guide/cgroup-v2.rst`` and ``cgroup-v1/``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from ovms.lazy import dataclass, regex

#: What the groups are called that hold ours.
PARENT: Final = "ovms"
_PROCS: Final = "cgroup.procs"
#: The controllers that we use; one that is missing is said.
CONTROLLERS: Final = ("memory", "pids")
#: Tries to remove a group, 10 ms apart.
_TRIES: Final = 20
#: Seconds between two moves of ours, and after how many of them it is given up: see :func:`at_hand`.
_MOVE_EACH: Final = 0.004
_MOVES: Final = 100
#: Seconds that what is mounted is known for.
_KNOWN_FOR: Final = 5.0
#: Of each thread: who moves us for it.
_mover: Final = threading.local()
_OOM: Final = regex(r"^oom_kill ([0-9]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """What a VMM may use: bytes of memory, and threads."""

    memory: int
    tasks: int


@dataclass(frozen=True)
class Groups:
    """The groups that were made for one VMM, and which controllers are missing: controller → why."""

    directories: tuple[Path, ...]
    missing: Mapping[str, str]

    @property
    def procs(self) -> tuple[Path, ...]:
        """The files that take a process's number."""
        return tuple(directory / _PROCS for directory in self.directories)


@dataclass(frozen=True)
class _Hierarchy:
    own: Path
    parent: Path
    version: int
    controllers: tuple[str, ...]


def make(instance_id: str, limits: Limits, *, proc: Path = Path("/proc/self")) -> Groups:
    """Makes the groups of an instance, as far as this host lets us."""
    directories: list[Path] = []
    missing = dict.fromkeys(CONTROLLERS, "this host has no such cgroup controller")
    for hierarchy in _hierarchies(proc):
        directory = hierarchy.parent / PARENT / instance_id
        wanted = [name for name in hierarchy.controllers if name in missing]
        if not wanted:
            continue
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if hierarchy.version == 2:
                _delegate(directory, wanted)
            for name in wanted:
                _set(directory, name, hierarchy.version, limits)
                del missing[name]
            directories.append(directory)
        except OSError as exc:
            reason = exc.strerror or type(exc).__name__
            missing.update({name: f"cgroup {directory}: {reason}" for name in wanted if name in missing})
            _remove(directory)
    return Groups(tuple(directories), missing)


@contextlib.contextmanager
def at_hand(*, proc: Path = Path("/proc/self")) -> Iterator[None]:
    """Within it a process is moved into a group without a wait.

    The kernel lets whoever moves one wait until all processors have passed a quiet point (an RCU grace period, 5 to 20 ms),
    but not who comes soon after another. So we move ourselves to where we are, beside what else there is to do. Inside another
    one that has not given up yet, it does nothing.
    """
    outer: threading.Thread | None = getattr(_mover, "thread", None)
    if outer is not None and outer.is_alive():
        yield
        return
    done = threading.Event()
    procs = [hierarchy.own / _PROCS for hierarchy in _hierarchies(proc)]

    def move() -> None:
        for path in procs:
            # any that we are in will do, of whatever version: there is one lock for all
            with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
                for _ in range(_MOVES):
                    file.write(b"0")  # who writes it
                    if done.wait(_MOVE_EACH):
                        break
                return

    _mover.thread = threading.Thread(target=move, name="cgroups", daemon=True)
    _mover.thread.start()
    try:
        yield
    finally:
        done.set()
        _mover.thread = None  # it may take a moment to end, and the next one is not within this one


def _hierarchies(proc: Path) -> list[_Hierarchy]:
    try:
        mine = (proc / "cgroup").read_text()
    except OSError:
        return []
    return _mounted(proc, mine, int(time.monotonic() / _KNOWN_FOR))


@functools.lru_cache(maxsize=1)
def _mounted(proc: Path, text: str, _moment: int) -> list[_Hierarchy]:
    # a start asks twice; whoever was moved meanwhile is told so by the text
    mine = [line.split(":", 2) for line in text.splitlines()]
    try:
        # of many mounts few are these: the others are not even taken apart
        lines = (proc / "mountinfo").read_text().splitlines()
        mounts = [line.split() for line in lines if " - cgroup" in line]
    except OSError:
        return []
    answer: list[_Hierarchy] = []
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        root, point = fields[3], Path(fields[4])
        if kind == "cgroup2":
            own = next((path for number, _, path in mine if number == "0"), "/")
            own = _below(own, root)
            parent = _writable_parent(point, own)
            try:
                names = (point / "cgroup.controllers").read_text().split()
            except OSError:
                names = []
            answer.append(_Hierarchy(point / own, parent, 2, tuple(n for n in CONTROLLERS if n in names)))
        elif kind == "cgroup":
            for controller in CONTROLLERS:
                path = next((path for _, names, path in mine if controller in names.split(",")), None)
                if controller in options and path is not None:
                    group = point / _below(path, root)
                    answer.append(_Hierarchy(group, group, 1, (controller,)))
    return answer


def _below(path: str, root: str) -> str:
    # what is mounted may be a part of the hierarchy, as in a container
    return path.removeprefix(root if root != "/" else "").lstrip("/")


def _writable_parent(point: Path, own: str) -> Path:
    """The highest group that is ours to divide: processes may be in leaves alone, so our own group will not do."""
    if os.access(point, os.W_OK):
        return point
    path = point
    for part in Path(own).parts:
        path /= part
        if os.access(path, os.W_OK) and os.access(path / _PROCS, os.W_OK):
            return path
    return point


def _delegate(directory: Path, controllers: Sequence[str]) -> None:
    # from the top: a group hands on what it has itself
    for group in (directory.parent.parent, directory.parent):
        has = (group / "cgroup.subtree_control").read_text().split()
        for name in controllers:
            if name not in has:
                (group / "cgroup.subtree_control").write_text(f"+{name}")


def _set(directory: Path, controller: str, version: int, limits: Limits) -> None:
    if controller == "pids":
        (directory / "pids.max").write_text(str(limits.tasks))
    elif version == 2:
        (directory / "memory.max").write_text(str(limits.memory))
        with contextlib.suppress(OSError):  # a guest's memory on swap is slow, but no harm
            (directory / "memory.oom.group").write_text("1")
    else:
        (directory / "memory.limit_in_bytes").write_text(str(limits.memory))


def forbid_swap(directories: Sequence[Path]) -> bool:
    """Keeps what a VMM writes out of swap, as far as its groups can. False where none of them counts memory."""
    for directory in directories:
        # of v2; of v1, where the kernel swaps all the same when nothing else is left
        for name in ("memory.swap.max", "memory.swappiness"):
            with contextlib.suppress(OSError):
                (directory / name).write_text("0")
                return True
    return False


def allow_memory(directories: Sequence[Path], size: int) -> None:
    """Lets a VMM that runs use *size* bytes of memory."""
    for directory in directories:
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (directory / name).exists():
                with contextlib.suppress(OSError):
                    (directory / name).write_text(str(size))


def oom_killed(directories: Sequence[Path]) -> bool:
    """Whether the kernel has ended a process of these groups because they had no memory left."""
    for directory in directories:
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                match = _OOM.search((directory / name).read_text())
                if match is not None and int(match[1]) > 0:
                    return True
    return False


def usage(directories: Sequence[Path]) -> int | None:
    """The bytes of memory that these groups use now; None where nobody counts them."""
    for directory in directories:
        for name in ("memory.current", "memory.usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                return int((directory / name).read_text())
    return None


def remove(directories: Sequence[Path]) -> None:
    """Removes the groups of a VMM that has ended."""
    for directory in directories:
        if directory.parent.name == PARENT:
            _remove(directory)


def sweep(instances: Container[str], *, proc: Path = Path("/proc/self"), age: float = 60.0) -> None:
    """Removes groups that killed starts have left: of none of these instances, without processes, older than *age* s."""
    for hierarchy in _hierarchies(proc):
        with contextlib.suppress(OSError):
            for directory in (hierarchy.parent / PARENT).iterdir():
                if directory.name in instances or not directory.is_dir():
                    continue
                if time.time() - directory.stat().st_mtime > age:
                    directory.rmdir()  # one that is in use can't be


def _end_all(directory: Path) -> None:
    # what is beside a VMM ends with it; nobody leaves a group, so what does not is found here
    with contextlib.suppress(OSError, ValueError):
        for pid in map(int, (directory / _PROCS).read_text().split()):
            # 0 is what a process of another PID namespace is called here; as a number to kill, it is all of us
            if pid > 0:
                os.kill(pid, signal.SIGKILL)


def _remove(directory: Path) -> None:
    for _ in range(_TRIES):
        try:
            directory.rmdir()
            break
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                break
            _end_all(directory)
            time.sleep(0.01)  # the kernel takes a moment to let go of a process that has ended
    with contextlib.suppress(OSError):
        directory.parent.rmdir()  # with the last one
