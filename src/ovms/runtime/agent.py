"""A client of qemu-guest-agent, which runs in the guest if the guest likes. Nothing that comes from there is believed.

Source: QEMU's ``docs/interop/qemu-ga-ref`` and ``qga/``. A message is a line of JSON; the one answer to a command is its
``return`` or its ``error``. There are no numbers that would tell which answer is to which command, so every session begins
with ``guest-sync-delimited``: what an earlier client, or the VM that a clone was made of, had left unread comes before
the delimiter, and is thrown away. A session in which an answer did not come is never gone on with.

The socket takes one client at a time. Whoever talks holds ``agent.lock`` in the instance's directory, for as long as
:data:`HOLD` at the most while others may want their turn.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from ovms import fsutil
from ovms.errors import AgentUnavailable, GuestError, InstanceNotFound, JsonInvalid, Locked
from ovms.spec import limits, strictjson
from ovms.text import printable
from ovms.vmm.model import VmFiles

LOCK: Final = "agent.lock"
#: Seconds that the agent gets to answer at all.
WAIT: Final = 10.0
#: Seconds that a session lasts while others may wait for theirs.
HOLD: Final = 1.0
#: Bytes of an answer, but for those that carry data.
ANSWER_MAX: Final = 1 * limits.MIB
#: Bytes thrown away before the delimiter: what was left unread is one answer with data, at the most.
SKIP_MAX: Final = 64 * limits.MIB
#: Bytes of data a second that even an emulated guest takes or gives.
_RATE: Final = 100_000
_BLOCK: Final = 65536
_DELIMITER: Final = b"\xff"
#: Seconds that it gets even when the lock came late.
_LEAST: Final = 1.0
#: Seconds after which we look whether the guest has opened the port at all.
_LOOK: Final = 0.3
#: Seconds of silence after which a session is begun once more; each time after twice as many.
_AGAIN: Final = 1.0


class AgentRefused(GuestError):
    """The agent answered with an error; ``said`` is its own description."""

    def __init__(self, command: str, said: str) -> None:
        super().__init__(f"the guest's agent refused {command}: {said}", command=command)
        self.said = said


class _Silent(AgentUnavailable):
    """Nothing came in time."""


class Agent:
    """The agent of one VM. A context manager: what it holds at its end, it lets go of. Not for several threads at once.

    Args:
        files: the VM's.
        listens: whether the guest has opened the agent's port; None when that can't be told.
        wait: seconds until an agent that says nothing is given up; None: :data:`WAIT`, but nothing where the guest has
            not opened the port.
    """

    def __init__(
        self, files: VmFiles, *, listens: Callable[[], bool | None] = lambda: None, wait: float | None = None
    ) -> None:
        self._files = files
        self._listens = listens
        self._patient = wait is not None
        self._wait = WAIT if wait is None else wait
        self._held = contextlib.ExitStack()
        self._sock: socket.socket | None = None
        self._buffer = bytearray()
        self._since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Lets others talk to the agent; the next command begins a new session."""
        self._sock = None
        self._buffer.clear()
        self._held.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        answer_max: int = ANSWER_MAX,
    ) -> Any:
        """Runs a command, and returns what it returns: any JSON, of at most *answer_max* bytes.

        Raises:
            AgentRefused: the agent refused it.
            GuestError: what it said makes no sense.
            AgentUnavailable: there is no agent, or no answer in time.
            Locked: others talk to it all the time.
        """
        request = _request(command, arguments)
        seconds = (self._wait if timeout is None else timeout) + (len(request) + answer_max - ANSWER_MAX) / _RATE
        if self._sock is not None and time.monotonic() - self._since > HOLD:
            self.release()
            time.sleep(0.02)  # who waits for the lock looks a hundred times a second
        if self._sock is None:
            self._open()
        try:
            deadline = time.monotonic() + seconds
            self._send(request, deadline)
            return _result(command, _parse(self._line(deadline, answer_max), answer_max))
        except AgentRefused:
            raise
        except BaseException:
            self.release()
            raise

    def send(self, command: str, arguments: Mapping[str, Any] | None = None, *, listen: float = 1.0) -> None:
        """Runs a command that has no answer unless it fails; an error is waited for *listen* seconds.

        Raises: as :meth:`execute`.
        """
        if self._sock is None:
            self._open()
        with contextlib.suppress(AgentUnavailable):
            self.execute(command, arguments, timeout=listen)

    # --- sessions ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        began = time.monotonic()
        deadline = began + self._wait
        try:
            lock = fsutil.file_lock(self._files.directory / LOCK, timeout=self._wait)
            self._held.enter_context(lock)
        except FileNotFoundError:
            raise InstanceNotFound("the instance was removed meanwhile") from None
        except Locked as exc:
            raise Locked("other commands talk to the guest's agent", hint="try again when they have ended") from exc
        try:
            self._connect(max(deadline, time.monotonic() + _LEAST))
        except BaseException:
            self.release()
            raise
        self._since = time.monotonic()

    def _connect(self, deadline: float) -> None:
        began = time.monotonic()
        try:
            sock = fsutil.connect_unix(self._files.agent, timeout=max(0.001, deadline - time.monotonic()))
        except OSError as exc:  # also a time-out
            raise AgentUnavailable(
                f"the VM has no channel to an agent: {exc.strerror or 'it does not take a connection'}",
                hint="a VM that was restored from a snapshot without one has none; "
                "else it has just ended: 'ovm ps -a' tells",
            ) from exc
        self._held.callback(sock.close)
        self._sock = sock
        number = self._sync(deadline)
        look, again = self._patient, time.monotonic() + _AGAIN
        skipped = 0
        while True:
            now = time.monotonic()
            until = min(deadline, again) if look else min(deadline, again, now + _LOOK)
            try:
                skipped += self._skip(until, SKIP_MAX - skipped)
            except _Silent:
                late = time.monotonic() >= deadline
                if (late or not self._patient) and self._listens() is False:
                    raise _no_agent() from None
                if late:
                    raise
                look = True
                if time.monotonic() >= again:
                    # one that was just starting, or that had somebody else's words in its ear, has heard nothing of the first
                    number, again = self._sync(deadline), 2 * time.monotonic() - began
                continue
            with contextlib.suppress(GuestError):
                if _result("guest-sync-delimited", _parse(self._line(deadline, ANSWER_MAX), ANSWER_MAX)) == number:
                    return

    def _sync(self, deadline: float) -> int:
        # The delimiter at the front makes the agent forget half a command. Each has a number of its own, and the answer to the
        # latest alone is waited for: it is the last that comes.
        number = int.from_bytes(os.urandom(4), "big") >> 1
        self._send(_DELIMITER + _request("guest-sync-delimited", {"id": number}), deadline)
        return number

    def _skip(self, deadline: float, most: int) -> int:
        # Throws away what comes before the delimiter, and the delimiter. Returns how much that was.
        skipped = 0
        while (at := self._buffer.find(_DELIMITER)) < 0:
            skipped += len(self._buffer)
            self._buffer.clear()
            if skipped > most:
                raise GuestError("the guest's agent says things without end, and none of them is an answer")
            self._receive(deadline)
        del self._buffer[: at + 1]
        return skipped + at + 1

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._sock is not None
        try:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            self._sock.sendall(data)
        except TimeoutError:
            raise _no_answer() from None
        except OSError as exc:
            raise AgentUnavailable(f"the channel to the guest's agent broke: {exc.strerror}") from exc

    def _line(self, deadline: float, most: int) -> bytes:
        looked = 0
        while (end := self._buffer.find(b"\n", looked)) < 0:
            looked = len(self._buffer)
            if looked > most:
                raise GuestError(f"the guest's agent sent a line of more than {most} bytes")
            self._receive(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _receive(self, deadline: float) -> None:
        assert self._sock is not None
        left = deadline - time.monotonic()
        if left <= 0:
            raise _no_answer()
        try:
            self._sock.settimeout(left)
            data = self._sock.recv(_BLOCK)
        except TimeoutError:
            raise _no_answer() from None
        except OSError as exc:
            raise AgentUnavailable(f"the channel to the guest's agent broke: {exc.strerror}") from exc
        if not data:
            raise AgentUnavailable("the VM ended, or another client took its agent's channel")
        self._buffer += data


def _request(command: str, arguments: Mapping[str, Any] | None) -> bytes:
    return json.dumps({"execute": command, **({} if arguments is None else {"arguments": arguments})}).encode() + b"\n"


def _parse(line: bytes, most: int) -> dict[str, Any]:
    try:
        message = strictjson.parse(line, "the answer of the guest's agent", max_size=most + _BLOCK)
    except JsonInvalid as exc:
        raise GuestError(f"the guest's agent talks nonsense: {exc.message}") from exc
    if not isinstance(message, dict):
        raise GuestError("the guest's agent talks nonsense: JSON that is no message")
    return message


def _result(command: str, answer: Mapping[str, Any]) -> Any:
    if "return" in answer:
        return answer["return"]
    error = answer.get("error")
    if isinstance(error, dict):
        raise AgentRefused(command, printable(str(error.get("desc"))))
    raise GuestError(f"the guest's agent answers {command} with neither a result nor an error")


def _no_agent() -> AgentUnavailable:
    return AgentUnavailable(
        "no agent runs in the guest (nothing has opened the port org.qemu.guest_agent.0)",
        hint="install and start qemu-guest-agent in the guest; while it boots, --wait SECONDS waits for it",
    )


def _no_answer() -> _Silent:
    return _Silent(
        "the guest's agent does not answer in time",
        hint="is qemu-guest-agent installed and running in the guest, and is the guest not paused?",
    )


# --- what answers hold -----------------------------------------------------------------------------------------------


def field(value: Any, key: str, kind: type, *, default: Any = None) -> Any:
    """A field of an object that the agent returned.

    Raises:
        GuestError: it is missing (and there is no *default*), or of another type.
    """
    if not isinstance(value, dict):
        raise GuestError("the guest's agent returned no object")
    item = value.get(key, default)
    if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
        raise GuestError(f"the guest's agent returned no {key}, or one that makes no sense")
    return item


def data(value: Any, key: str, most: int) -> bytes:
    """Bytes that an answer holds in base64: at most *most*; none where there is no such field.

    Raises:
        GuestError: it is no base64, or more.
    """
    try:
        decoded = base64.b64decode(field(value, key, str, default=""), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise GuestError(f"what the guest's agent returned as {key} is no base64") from exc
    if len(decoded) > most:
        raise GuestError(f"the guest's agent returned {len(decoded)} bytes as {key}, and {most} at most were asked for")
    return decoded
