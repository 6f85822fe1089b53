"""What a guest's agent does for us: run a program, take or give a file, power down.

What the agent can't do is not pretended: it has no terminal; stdin is given whole before the program starts, stdout and
stderr come whole when it has ended, and of each at most :data:`STREAM_MAX` bytes.

A command of ours that is killed leaves in the guest what nobody but the agent could take back: the program goes on, and
an open file stays open until the agent is restarted. Whatever else ends a command of ours, an interrupt among it, ends
the program and closes the file. A file appears in the guest under its name only when it is whole.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import (
    AgentUnavailable,
    GuestError,
    GuestTimeout,
    InputError,
    NotFound,
    OvmsError,
    StateConflict,
    Unsupported,
)
from ovms.lazy import dataclass, regex
from ovms.runtime.agent import ANSWER_MAX, HOLD, Agent, AgentRefused, data, field
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record
from ovms.spec import limits
from ovms.text import printable

#: Bytes of stdin, stdout or stderr of a program: qemu-guest-agent keeps no more of the latter two.
STREAM_MAX: Final = 16 * limits.MIB
#: Bytes of a file that are moved at once.
BLOCK: Final = 1 * limits.MIB
#: Bytes of the arguments and variables of a program.
ARGUMENTS_MAX: Final = 128 * limits.KIB
#: Between two looks at a running program, in seconds: at first, and in the end.
_POLL: Final = (0.005, 0.5)
#: Seconds for small jobs of ours in the guest, and for tidying up there.
SMALL: Final = 30.0
TIDY: Final = 3.0
#: Exit codes as shells have them: the program can't be run; there is none.
CANNOT_RUN: Final = 126
NO_PROGRAM: Final = 127
_SIGNALLED: Final = 128


def _encoded(size: int) -> int:
    return (size + 2) // 3 * 4


_STATUS_MAX: Final = ANSWER_MAX + 2 * _encoded(STREAM_MAX)


@dataclass(frozen=True)
class Finished:
    """How a program in the guest ended: its exit code (128 + N: by signal N), what it said, whether that was cut."""

    code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


def agent_of(instances: Instances, record: Record, *, wait: float | None = None) -> Agent:
    """The agent in the guest of a living instance. *wait* as :class:`~ovms.runtime.agent.Agent` has it.

    Raises:
        StateConflict: the instance does not run.
        Unsupported: its VM has no port for an agent.
    """
    if not instances.status(record).state.alive:
        raise StateConflict(
            f"the instance {record.name} does not run", hint="'ovm ps -a' tells its state", instance=record.name
        )
    if not record.machine.agent:
        raise Unsupported(
            f"the VM of {record.name} has no port for a guest's agent: "
            f"{'the snapshot that it was restored from has none' if record.restored else 'its VMM gives none'}",
            hint="started with --cold it has one" if record.restored else None,
        )

    def listens() -> bool | None:
        try:
            with instances.locked(record, timeout=1.0) as newest, instances.control(newest) as control:
                return control.agent_listens()
        except OvmsError:
            return None

    return Agent(instances.files(record), listens=listens, wait=wait)


def run(
    agent: Agent,
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    directory: str | None = None,
    timeout: float | None = None,
) -> Finished:
    """Runs a program in the guest, to its end. *env* is added to the agent's own.

    Raises:
        InputError: arguments or stdin are too large.
        AgentRefused: the agent can't run it: :func:`refusal_code` tells the exit code of that.
        GuestTimeout: it did not end within *timeout* seconds, and was ended.
        AgentUnavailable, GuestError: as :meth:`ovms.runtime.agent.Agent.execute`.
    """
    words = _wrapped(argv, env or {}, directory)
    _check(words, stdin)
    arguments: dict[str, Any] = {"path": words[0], "arg": words[1:], "capture-output": True}
    if stdin:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    pid = field(agent.execute("guest-exec", arguments), "pid", int)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        return _wait(agent, pid, deadline)
    except AgentUnavailable as exc:
        raise AgentUnavailable(
            f"{exc.message}; {printable(argv[0])} may still run in the guest (process {pid})", hint=exc.hint
        ) from exc
    except AgentRefused as exc:
        raise GuestError(
            f"the guest's agent has forgotten {printable(argv[0])}: it, or the guest, was started anew meanwhile"
        ) from exc
    except BaseException:
        _end(agent, pid)
        raise


def _wrapped(argv: Sequence[str], env: Mapping[str, str], directory: str | None) -> list[str]:
    # The agent replaces the environment and knows no directory; a shell in the guest adds to the one, and goes to the
    # other. Exit codes stay what they are.
    words = list(argv)
    if env:
        words = ["env", *(f"{name}={value}" for name, value in env.items()), *words]
    if directory is not None:
        words = ["sh", "-c", 'cd -- "$0" && exec "$@"', directory, *words]
    return words


def _check(words: Sequence[str], stdin: bytes) -> None:
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise InputError("an argument is not UTF-8, and the guest's agent takes nothing else") from exc
        if "\0" in word:
            raise InputError("an argument holds a zero byte")
    if sum(len(word.encode()) + 1 for word in words) > ARGUMENTS_MAX:
        raise InputError(f"the arguments have more than {ARGUMENTS_MAX} bytes")
    if len(stdin) > STREAM_MAX:
        raise InputError(
            f"stdin has more than {STREAM_MAX} bytes, which is what the guest's agent takes",
            hint="copy it into the guest as a file: ovm cp",
        )


def _wait(agent: Agent, pid: int, deadline: float | None) -> Finished:
    began = time.monotonic()
    pause, longest = _POLL
    while True:
        status = agent.execute("guest-exec-status", {"pid": pid}, answer_max=_STATUS_MAX)
        if field(status, "exited", bool):
            return _finished(status)
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise GuestTimeout("the program in the guest did not end in time, and was ended")
        if now - began > HOLD:  # it takes longer: others get their turn meanwhile
            agent.release()
        time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - now)))
        pause = min(pause * 1.5, longest)


def _finished(status: Any) -> Finished:
    number = field(status, "signal", int, default=0)
    code = _SIGNALLED + number if number else field(status, "exitcode", int)
    if not 0 <= code <= 255:
        raise GuestError(f"the guest's agent tells of an exit code {code}")
    return Finished(
        code,
        data(status, "out-data", STREAM_MAX),
        data(status, "err-data", STREAM_MAX),
        field(status, "out-truncated", bool, default=False) or field(status, "err-truncated", bool, default=False),
    )


def _end(agent: Agent, pid: int) -> None:
    # Asks the program to end, and lets the agent forget it. What fails here is not what the user must hear of. An agent
    # that does not know the program was started anew since, and its number may be that of another.
    with contextlib.suppress(GuestError):
        agent.release()
        if field(
            agent.execute("guest-exec-status", {"pid": pid}, timeout=TIDY, answer_max=_STATUS_MAX), "exited", bool
        ):
            return
        kill = {"path": "sh", "arg": ["-c", 'kill -s TERM "$0"', str(pid)]}
        killer = field(agent.execute("guest-exec", kill, timeout=TIDY), "pid", int)
        _wait(agent, killer, time.monotonic() + TIDY)
        _wait(agent, pid, time.monotonic() + TIDY)


def refusal_code(error: AgentRefused) -> int | None:
    """The exit code of a program that can't be run in the guest, as a shell has it; None when that is not the error."""
    if "Failed to execute child" not in error.said:  # GLib's words, whatever the agent's version puts around them
        return None
    return NO_PROGRAM if "No such file" in error.said else CANNOT_RUN


# --- files -----------------------------------------------------------------------------------------------------------


class Kind(StrEnum):
    """What is at a path of the guest."""

    FILE = "file"
    PROGRAM = "program"
    DIRECTORY = "directory"
    OTHER = "other"
    NOTHING = "nothing"


_KIND: Final = (
    'if [ -d "$0" ]; then echo directory; elif [ -f "$0" ]; then if [ -x "$0" ]; then echo program; else echo file; fi;'
    ' elif [ -e "$0" ]; then echo other; else echo nothing; fi'
)


def kind(agent: Agent, path: str) -> Kind:
    """What is at *path* of the guest.

    Raises:
        GuestError: the agent does not tell.
    """
    done = run(agent, ["sh", "-c", _KIND, path], timeout=SMALL)
    try:
        return Kind(done.stdout.decode("ascii").strip())
    except ValueError as exc:
        raise GuestError(f"the guest does not tell what is at {printable(path)}: {said(done)}") from exc


def put(
    agent: Agent, source: int, path: str, *, name: str, mode: int, advance: Callable[[int], None] = lambda _: None
) -> str:
    """Copies an open file into the guest. Returns its path there: *path*, or *name* in it where that is a directory.

    It appears there when it is whole, with the permissions *mode*; what was there before is replaced.

    Raises:
        NotFound: the directory does not exist in the guest.
        GuestError: the agent refused, or the guest has no room.
    """
    target = _target(agent, path, name)
    parent, _, base = target.rpartition("/")
    temporary = f"{parent}/.{base[:100]}.{fsutil.unique(6)}.tmp"
    try:
        with opened(agent, temporary, "w") as handle:
            while block := os.read(source, BLOCK):
                write(agent, handle, block, advance)
        script = 'chmod -- "$0" "$1" && mv -f -- "$1" "$2"'
        done = run(agent, ["sh", "-c", script, f"{mode & 0o777:o}", temporary, target], timeout=SMALL)
        if done.code != 0:
            raise GuestError(f"the guest does not give {printable(target)} its name: {said(done)}")
    except BaseException:
        with contextlib.suppress(GuestError):
            run(agent, ["rm", "-f", "--", temporary], timeout=TIDY)
        raise
    return target


def _target(agent: Agent, path: str, name: str) -> str:
    found = kind(agent, path)
    if found is Kind.DIRECTORY:
        path = f"{path.rstrip('/')}/{name}"
        found = kind(agent, path)
    if found in (Kind.DIRECTORY, Kind.OTHER):
        raise Unsupported(f"{printable(path)} in the guest is no file, and is not replaced")
    parent = path.rpartition("/")[0] or "/"
    if found is Kind.NOTHING and (path.endswith("/") or kind(agent, parent) is not Kind.DIRECTORY):
        raise NotFound(f"there is no directory {printable(path if path.endswith('/') else parent)} in the guest")
    return path


@contextlib.contextmanager
def opened(agent: Agent, path: str, mode: str) -> Iterator[int]:
    """Opens a file of the guest, as fopen(3) has modes, and closes it."""
    handle = agent.execute("guest-file-open", {"path": path, "mode": mode})
    if not isinstance(handle, int) or isinstance(handle, bool):
        raise GuestError("the guest's agent opened a file, and returned no handle of it")
    try:
        yield handle
    finally:
        with contextlib.suppress(GuestError):
            agent.execute("guest-file-close", {"handle": handle})


def write(agent: Agent, handle: int, block: bytes, advance: Callable[[int], None]) -> None:
    """Writes at most :data:`BLOCK` bytes to an open file of the guest."""
    left = memoryview(block)
    while left:
        encoded = base64.b64encode(left).decode()
        written = field(agent.execute("guest-file-write", {"handle": handle, "buf-b64": encoded}), "count", int)
        if not 0 < written <= len(left):
            raise GuestError(f"the guest's agent says that it wrote {written} of {len(left)} bytes")
        left = left[written:]
        advance(written)


def get(agent: Agent, path: str, target: Path, *, advance: Callable[[int], None] = lambda _: None) -> None:
    """Copies a file of the guest to *target*, which appears, or is replaced, when it is whole.

    Raises:
        NotFound: there is no such file in the guest.
        Unsupported: it is a directory, a device, …
        DiskFull: the guest gives more than there is room for.
        GuestError: the agent refused.
    """
    found = kind(agent, path)
    if found is Kind.NOTHING:
        raise NotFound(f"there is no file {printable(path)} in the guest")
    if found is Kind.DIRECTORY:
        raise Unsupported(f"{printable(path)} in the guest is a directory")
    if found is Kind.OTHER:
        raise Unsupported(f"{printable(path)} in the guest is no regular file")
    temporary = target.with_name(f".{target.name[:100]}.{fsutil.unique(6)}.tmp")
    with contextlib.ExitStack() as undo, fsutil.noticing_full_disk("the copy", target.parent):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        undo.callback(temporary.unlink, missing_ok=True)
        with os.fdopen(fd, "wb", buffering=0) as file:
            with opened(agent, path, "r") as handle:
                read(agent, handle, file.fileno(), target.parent, advance)
            if found is Kind.PROGRAM:
                readable = os.fstat(fd).st_mode & 0o444
                os.fchmod(fd, os.fstat(fd).st_mode | readable >> 2)
            os.fsync(fd)
        temporary.replace(target)
        undo.pop_all()


def read(agent: Agent, handle: int, fd: int, where: Path, advance: Callable[[int], None]) -> None:
    """Copies what an open file of the guest holds into *fd*, on the file system of *where*.

    Raises:
        DiskFull: the guest gives more than there is room for.
    """
    at = room = 0
    while True:
        if at >= room:  # a guest may go on for ever
            room = at + 16 * BLOCK
            fsutil.require_space(where, 17 * BLOCK, "the copy")
        answer = agent.execute(
            "guest-file-read", {"handle": handle, "count": BLOCK}, answer_max=ANSWER_MAX + _encoded(BLOCK)
        )
        block = data(answer, "buf-b64", BLOCK)
        fsutil.pwrite_all(fd, block, at)
        at += len(block)
        advance(len(block))
        if field(answer, "eof", bool):
            return
        if not block:
            raise GuestError("the guest's agent gives neither data nor the end of the file")


def said(done: Finished) -> str:
    """What a program of ours in the guest said in the end, fit for a message."""
    text = (done.stderr or done.stdout)[-500:].decode("utf-8", "replace").strip()
    return printable(text) or f"exit code {done.code}"


def shut_down(agent: Agent) -> None:
    """Asks the guest to power down, through its agent. That it does is seen by the VM's end.

    Raises:
        GuestError, AgentUnavailable: it does not.
    """
    agent.send("guest-shutdown", {"mode": "powerdown"})


#: ``INSTANCE:PATH``, as docker and scp have it; what has a slash before the colon is a path of the host.
_PLACE: Final = regex(r"(?P<instance>[^/:]+):(?P<path>.*)", re.DOTALL)


def place(text: str) -> tuple[str | None, str]:
    """A place on the command line: the instance (None: this host) and the path there.

    Raises:
        InputError: a path in the guest that is not absolute.
    """
    match = _PLACE.fullmatch(text)
    if match is None:
        return None, text
    if not match["path"].startswith("/"):
        raise InputError(
            f"{printable(text)}: a path in the guest begins with a slash",
            hint="a file of this host with a colon in its name is written with a slash before it: ./a:b",
        )
    return match["instance"], match["path"]
