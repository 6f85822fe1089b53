"""An instance's serial console on the terminal, until the VM ends.

What is printed comes from the console's log, so nothing is lost that the guest said before we came; the socket takes
what the user types, and wakes us when there is more in the log.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from ovms import fsutil
from ovms.cli import output
from ovms.process import ProcessId
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.vmm.model import VmFiles

_BUFFER: Final = 65536
#: Seconds between looks at the log where no socket wakes us.
_POLL: Final = 0.2


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP in the foreground: counted, and told through a pipe to who waits."""

    def __init__(self) -> None:
        self.count = 0
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Takes the signals over, and gives them back."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._caught) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._read)
            os.close(self._write)

    def _caught(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def fileno(self) -> int:
        """What becomes readable when a signal came."""
        return self._read

    def drain(self) -> None:
        """Makes it unreadable again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 1024)


@contextlib.contextmanager
def raw_keys(fd: int) -> Iterator[None]:
    """Keys go to the guest one by one, and are not echoed (the guest does that); Ctrl-C stays ours."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    changed = termios.tcgetattr(fd)
    changed[0] &= ~termios.ICRNL
    changed[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(fd, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def follow_log(path: Path, process: ProcessId | None, *, start: int = 0) -> Iterator[bytes]:
    """What a growing log holds from offset *start* on, until its writer has ended."""
    with path.open("rb", buffering=0) as log:
        log.seek(start)
        while True:
            alive = process is not None and process.alive()
            while data := log.read(_BUFFER):
                yield data
            if not alive:  # looked at before the last read, so nothing is missed
                return
            assert process is not None
            process.wait(_POLL)


class Attachment:
    """The terminal's side of a console."""

    def __init__(self, runtime: Runtime, record: Record, interrupts: Interrupts, *, pipes: bool = False) -> None:
        """*pipes*: what comes on stdin goes to the guest also when stdin is no terminal."""
        self._runtime = runtime
        self._record = record
        self._interrupts = interrupts
        self._files: VmFiles = runtime.instances.files(record)
        self._handled = 0
        self._pipes = pipes

    def run(self, grace: float) -> None:
        """Shows the console until the VM is no more.

        The first interrupt asks the guest to power down; a second one, or *grace* seconds, ends the VM.
        """
        process = self._record.process
        assert process is not None
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._files.console_log.open("rb", buffering=0))
            pidfd = process.open()
            if pidfd is not None:
                stack.callback(os.close, pidfd)
            console = self._connect(stack)
            stdin = _input(pipes=self._pipes)
            if stdin is not None:
                stack.enter_context(raw_keys(stdin))
            deadline: float | None = None
            while True:
                ended = pidfd is None
                self._copy(log.fileno())
                if ended:
                    return
                watched = [fd for fd in (pidfd, console, stdin, self._interrupts.fileno()) if fd is not None]
                # The socket alone does not do: what the guest prints before QEMU takes our connection wakes nobody.
                ready, _, _ = select.select(watched, [], [], _POLL)
                if pidfd in ready:
                    pidfd = None
                if console is not None and console in ready and not _drain(console):
                    console = None
                if stdin is not None and stdin in ready and not _forward(stdin, console):
                    stdin = None
                deadline = self._react(deadline, grace)

    def _connect(self, stack: contextlib.ExitStack) -> int | None:
        try:
            sock = fsutil.connect_unix(self._files.console, timeout=5.0)
        except OSError:
            return None  # the VM has ended already; its log is all there is
        stack.callback(sock.close)
        sock.setblocking(False)
        return sock.fileno()

    def _copy(self, log: int) -> None:
        while data := os.read(log, _BUFFER):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def _react(self, deadline: float | None, grace: float) -> float | None:
        self._interrupts.drain()
        count, now = self._interrupts.count, time.monotonic()
        if count > self._handled:
            first = self._handled == 0
            self._handled = count
            if first and count == 1:
                output.say(f"asking {self._record.name} to power down; once more ends it at once")
                self._runtime.power_down(self._record)
                return now + grace
            output.say(f"ending {self._record.name}")
            self._runtime.kill(self._record)
            return None
        if deadline is not None and now >= deadline:
            output.say(f"{self._record.name} did not power down within {grace:g} s: ending it")
            self._runtime.kill(self._record)
            return None
        return deadline


def _input(*, pipes: bool) -> int | None:
    # A pipe is left alone unless asked for: in a script, stdin is often meant for somebody else. A terminal is left
    # alone in the background, where reading it would stop us.
    try:
        fd = sys.stdin.fileno()
        if os.isatty(fd):
            return fd if os.tcgetpgrp(fd) == os.getpgrp() else None
        return fd if pipes else None
    except (OSError, ValueError, AttributeError):
        return None


def _drain(console: int) -> bool:
    # The same bytes are in the log. False when the VMM has closed its end.
    try:
        return bool(os.read(console, _BUFFER))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _forward(stdin: int, console: int | None) -> bool:
    # False when there is no more to come.
    try:
        data = os.read(stdin, 4096)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if not data:
        return False
    view = memoryview(data)
    while view and console is not None:
        select.select([], [console], [], 1.0)
        try:
            view = view[os.write(console, view) :]
        except BlockingIOError:
            continue
        except OSError:
            break
    return True
