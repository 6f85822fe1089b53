"""The one place that starts, finds and ends other programs."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ovms.errors import HostError, ToolMissing
from ovms.lazy import dataclass
from ovms.text import printable

#: Nothing of the caller's environment reaches a program but this: no credentials, no library paths.
CLEAN_ENV: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}

#: Bytes of a program's stderr that an error message shows.
STDERR_TAIL = 2000

#: Which Debian and Ubuntu package holds a program that we call.
PACKAGES: Mapping[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "tc": "iproute2",
}


def find_tool(name: str) -> Path:
    """The program *name*, on the caller's PATH or on the standard one.

    Raises:
        ToolMissing: it is not installed; the hint names the package.
    """
    import shutil

    found = shutil.which(name) or shutil.which(name, path=CLEAN_ENV["PATH"])
    if found is None:
        package = PACKAGES.get(name, name)
        raise ToolMissing(
            f"{name} is not installed",
            hint=f"install the package {package} (Debian, Ubuntu: apt-get install {package})",
            tool=name,
            package=package,
        )
    return Path(found).absolute()  # a relative PATH entry would mean nothing in the directory that spawn starts it in


@dataclass(frozen=True)
class Completed:
    """How a program ended: its exit code and what it said."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    check: bool = True,
    input: bytes | None = None,
    env: Mapping[str, str] | None = None,
    shown: str | None = None,
) -> Completed:
    """Runs a program to its end, with a clean environment (and what *env* adds to it) and no stdin but *input*.

    *shown* is what errors call it, where its arguments must not be told (None: the command line).

    Raises:
        HostError: it failed (with *check*), took longer than *timeout* seconds (it is then killed and reaped), or
            could not be started.
    """
    args = tuple(str(a) for a in argv)
    shown = shlex.join(args) if shown is None else shown
    try:
        done = subprocess.run(
            args,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
            env={**CLEAN_ENV, **(env or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise HostError(f"{shown} did not end within {timeout:g} s") from exc
    except OSError as exc:
        raise HostError(f"cannot run {shown}: {exc.strerror}") from exc
    if check and done.returncode != 0:
        raise HostError(f"{shown} failed ({describe_exit(done.returncode)}): {tail(done.stderr)}")
    return Completed(args, done.returncode, done.stdout, done.stderr)


def spawn(
    argv: Sequence[str | Path],
    *,
    pass_fds: Sequence[int] = (),
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    detach: bool = False,
    cwd: Path = Path("/"),
) -> subprocess.Popen[bytes]:
    """Starts a program that outlives this call: clean environment, no stdin, only *pass_fds* inherited.

    With *detach* it gets a session of its own, so that neither the terminal's signals nor our end reach it.

    Raises:
        HostError: it could not be started.
    """
    args = [str(a) for a in argv]
    try:
        return subprocess.Popen(
            args,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=detach,
            env=dict(CLEAN_ENV),
            cwd=cwd,
        )
    except OSError as exc:
        raise HostError(f"cannot run {shlex.join(args)}: {exc.strerror}") from exc


def tail(data: bytes) -> str:
    """The end of a program's output, fit for a message: one line, no control characters."""
    text = data[-STDERR_TAIL:].decode("utf-8", "replace").strip()
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return printable(joined, None) or "it said nothing"


def describe_exit(returncode: int) -> str:
    """``exit code 3`` or ``signal SIGSEGV``, from a :mod:`subprocess` return code."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"


#: The host's boot, once it was asked for: it does not change while we run.
_boot_id: list[str] = []


def boot_id() -> str:
    """The host's boot, as a UUID: what ran before a reboot does not run any more."""
    if not _boot_id:
        _boot_id.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    return _boot_id[0]


def is_root(proc: Path = Path("/proc/self")) -> bool:
    """Whether we can become any user: root, and not that of a user namespace which knows a few users (a rootless container's)."""
    if os.geteuid() != 0:
        return False
    try:
        lines = (proc / "uid_map").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:  # a kernel that has none
        return True
    return any(int(line.split()[2]) > 0x7FFF_FFFF for line in lines)


def start_time(pid: int) -> int | None:
    """When *pid* started, in clock ticks since the host's boot (field 22 of ``/proc/PID/stat``).

    None when there is no such process, or only a zombie that its parent has yet to reap.
    """
    fields = _stat(pid)
    return None if fields is None or _ended(fields) else int(fields[_STARTED])


def parent(pid: int) -> int | None:
    """The parent of *pid*; None when there is no such process."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


#: Of the fields of ``/proc/PID/stat`` from the third on, which are counted from 0 here: when it started.
_STARTED = 19


def _stat(pid: int) -> list[bytes] | None:
    # asked for with every look at an instance: the plain calls take a third of the time of a Path's
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        line = os.read(fd, 4096)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The program's name stands in parentheses and may hold anything, so fields count from the last one.
    return line[line.rindex(b")") + 2 :].split()


def _ended(fields: list[bytes]) -> bool:
    return fields[0] in (b"Z", b"X", b"x")


@dataclass(frozen=True)
class ProcessId:
    """A process that can be found again without mistaking a later one of the same number for it."""

    pid: int
    start_time: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of a living process, or None when there is none of that number."""
        started = start_time(pid)
        return None if started is None else cls(pid, started, boot_id())

    def began(self) -> float:
        """When it was started, in seconds since the epoch, by the clock as it goes now. Of a process of this boot."""
        up = time.clock_gettime(time.CLOCK_BOOTTIME) - self.start_time / os.sysconf("SC_CLK_TCK")
        return time.time() - up

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return self.stat() is not None

    def stat(self) -> list[bytes] | None:
        """The fields of its ``/proc/PID/stat``, from the third (its state) on; None when this very process has ended."""
        if self.boot_id != boot_id() or (fields := _stat(self.pid)) is None:
            return None
        return None if _ended(fields) or int(fields[_STARTED]) != self.start_time else fields

    def open(self) -> int | None:
        """A pidfd of this very process, or None when it has ended. The caller closes it.

        Raises:
            HostError: the host has no descriptor left, say; that is not the end of the process.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except OSError as exc:
            # besides "no such process": the number cannot be a process's, or is a thread's now
            if exc.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                return None
            raise HostError(f"cannot watch process {self.pid}: {exc.strerror}", pid=self.pid) from exc
        if not self.alive():  # the number was given to another process before the pidfd was opened
            os.close(fd)
            return None
        return fd

    def signal(self, number: signal.Signals) -> bool:
        """Sends a signal to this very process. False when it has ended."""
        fd = self.open()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def wait(self, timeout: float) -> bool:
        """Waits until this very process has ended, at most *timeout* seconds. False when it still runs."""
        fd = self.open()
        if fd is None:
            return True
        try:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            return bool(poller.poll(max(0.0, timeout) * 1000))
        finally:
            os.close(fd)

    def kill(self, timeout: float = 10.0) -> None:
        """SIGKILL, and waits until the process is gone.

        Raises:
            HostError: it is still there after *timeout* seconds (stuck in the kernel).
        """
        self.signal(signal.SIGKILL)
        reap(self.pid)
        if not self.wait(timeout):
            raise HostError(f"process {self.pid} does not die", pid=self.pid)
        reap(self.pid)


def reap(pid: int) -> int | None:
    """Collects a child of ours that has ended. Its return code as :mod:`subprocess` gives it, None if not ours."""
    with contextlib.suppress(ChildProcessError):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)
    return None


def terminate(process: subprocess.Popen[bytes], *, grace: float = 2.0) -> int:
    """TERM, a grace of some seconds, KILL; always reaped. Returns the return code."""
    if process.poll() is None:
        process.terminate()
        deadline = time.monotonic() + grace
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
    return process.wait()


def memory_available() -> int:
    """The bytes of memory that the host can give without swapping; 0 where it does not say."""
    return _meminfo("MemAvailable")


def memory_total() -> int:
    """The bytes of memory that the host has."""
    return _meminfo("MemTotal")


def _meminfo(wanted: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == wanted:
            return int(value.split()[0]) * 1024
    return 0
