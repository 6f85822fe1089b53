"""An instance's serial console on the terminal: until the VM ends, or until the user leaves.

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
from types import FrameType
from typing import Final

from ovms import fsutil
from ovms.cli import output
from ovms.cli.terminal import Cleaner, DetachKeys
from ovms.runtime.logs import Console
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.vmm import watch
from ovms.vmm.model import VmFiles
from ovms.vmm.watch import Watched

_BUFFER: Final = 65536
#: Seconds between looks at the log where no socket wakes us.
_POLL: Final = 0.2
#: Seconds that the watcher gets to write down the VM's last words.
_LAST_WORDS: Final = 2.0
#: Keys that wait for a guest to take them.
_TYPED_MAX: Final = 65536


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


#: Ends what a guest may have begun (a string, the other screen, mouse reports, pasting in brackets), and shows the cursor.
_RESET: Final = b"\x18\x1b\\\x1b[?1047l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1l\x1b[?7h\x1b[?25h\x1b>\x1b(B\x0f\x1b[0m"


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too. The terminal is as before afterwards, and while we are stopped."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
        | termios.ICRNL | termios.IXON
    )  # fmt: skip
    raw[1] &= ~termios.OPOST
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)

    def stopped(number: int, _frame: FrameType | None) -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def back(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTSTP, stopped)
        termios.tcsetattr(fd, termios.TCSADRAIN, raw)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTSTP, signal.SIGCONT)}
    try:
        signal.signal(signal.SIGTSTP, stopped)
        signal.signal(signal.SIGCONT, back)
        termios.tcsetattr(fd, termios.TCSADRAIN, raw)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        with contextlib.suppress(OSError):
            if sys.stdout.isatty():
                sys.stdout.buffer.write(_RESET)
                sys.stdout.flush()


class _Shown:
    """What the guest prints, block by block: a guest that prints without end must not keep us from anything else."""

    def __init__(self, log: Console, at: int) -> None:
        self._log = log
        self._at = at

    def copy(self) -> bool:
        """Shows a block. False when there is no more."""
        self._at, data = self._log.read(self._at)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        self._at += len(data)
        return bool(data)


def _tell(text: str) -> None:
    # a raw terminal wants to be told to go back to the start of the line
    sys.stderr.write(f"ovm: {output.safe(text)}\r\n")
    sys.stderr.flush()


class Visit:
    """A user at the console of a VM, who may leave while that goes on."""

    def __init__(self, files: VmFiles, watched: Watched, keys: DetachKeys) -> None:
        self._files = files
        self._watched = watched
        self._keys = keys
        self._pending = bytearray()

    def run(self, stdin: int | None, *, welcome: str | None = None) -> bool:
        """Until the user leaves (True), or the VM has ended (False). Without *stdin* there is nothing but looking.

        *welcome* is said when the terminal is ready: what is typed before would be the terminal's, and not the guest's.
        """
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(Console(self._files))
            pidfd = self._watched.vmm.open()
            if pidfd is not None:
                stack.callback(os.close, pidfd)
            console = None if stdin is None else _connect(self._files, stack)
            if stdin is not None:
                stack.enter_context(raw_terminal(stdin))
            if welcome is not None:
                _tell(welcome)
            shown = _Shown(log, _show_last_line(log))
            while True:
                more = shown.copy()
                if pidfd is None and not more:
                    return False
                reading = [fd for fd in (pidfd, console, stdin) if fd is not None]
                writing = [console] if console is not None and self._pending else []
                ready, _, _ = select.select(reading, writing, [], 0 if more else _POLL)
                if pidfd in ready:
                    pidfd = None
                    watch.wait_exit(self._files, self._watched.watcher, _LAST_WORDS)
                if console is not None and console in ready and not _drain(console):
                    console = None
                    if pidfd is not None and not select.select([pidfd], [], [], _LAST_WORDS)[0]:
                        _tell("nothing that is typed reaches the guest: too many others are at its console")
                if stdin is not None and stdin in ready:
                    keys = _read_keys(stdin)
                    if keys is None:
                        stdin = None
                    elif self._type(keys, listening=console is not None):
                        return True
                self._flush(console)

    def _type(self, keys: bytes, *, listening: bool) -> bool:
        typed, left = self._keys.feed(keys)
        # a guest that takes nothing must not make us collect it, nor keep the user here
        if listening and len(self._pending) + len(typed) <= _TYPED_MAX:
            self._pending += typed
        return left

    def _flush(self, console: int | None) -> None:
        if console is not None and self._pending:
            with contextlib.suppress(OSError):
                del self._pending[: os.write(console, self._pending)]


def _show_last_line(log: Console) -> int:
    # A prompt, mostly. Nothing more of the past: what a guest asked a terminal then, this one would answer now.
    at = log.tail(1)
    where, data = log.read(at)
    rest = data[data.rfind(b"\n") + 1 :]
    sys.stdout.write(Cleaner().feed(rest, final=True))
    sys.stdout.flush()
    return where + len(data)


def _read_keys(stdin: int) -> bytes | None:
    try:
        return os.read(stdin, 4096) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _connect(files: VmFiles, stack: contextlib.ExitStack) -> int | None:
    try:
        sock = fsutil.connect_unix(files.console, timeout=5.0)
    except OSError:
        return None  # the VM has ended already; its log is all there is
    stack.callback(sock.close)
    sock.setblocking(False)
    return sock.fileno()


class Attachment:
    """The terminal's side of a console that is in the foreground."""

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
            log = stack.enter_context(Console(self._files))
            shown = _Shown(log, log.first())
            pidfd = process.open()
            if pidfd is not None:
                stack.callback(os.close, pidfd)
            console = _connect(self._files, stack)
            stdin = _input(pipes=self._pipes)
            if stdin is not None:
                stack.enter_context(raw_keys(stdin))
            deadline: float | None = None
            while True:
                more = shown.copy()
                if pidfd is None and not more:
                    return
                watched = [fd for fd in (pidfd, console, stdin, self._interrupts.fileno()) if fd is not None]
                # The socket alone does not do: what the guest prints before QEMU takes our connection wakes nobody.
                ready, _, _ = select.select(watched, [], [], 0 if more else _POLL)
                if pidfd in ready:
                    pidfd = None
                    if self._record.watcher is not None:
                        watch.wait_exit(self._files, self._record.watcher, _LAST_WORDS)
                if console is not None and console in ready and not _drain(console):
                    console = None
                if stdin is not None and stdin in ready and not _forward(stdin, console):
                    stdin = None
                deadline = self._react(deadline, grace)

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
