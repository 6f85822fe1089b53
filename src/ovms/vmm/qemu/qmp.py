"""A QMP client: one command at a time, everything under a deadline.

Source: QEMU's ``docs/interop/qmp-spec.txt``. A compromised QEMU may answer anything, so lines and nesting are bounded.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ovms import fsutil
from ovms.errors import JsonInvalid, VmmError, VmmTimeout
from ovms.spec import limits, strictjson
from ovms.text import printable

LINE_MAX: Final = 4 * limits.MIB
#: Messages that are not the answer (events) while one is awaited; more than that is a flood.
_SKIPPED_MAX: Final = 10_000
#: Levels of a message: what is told of a disk has what is told of the layer below in it, and so on down.
DEPTH_MAX: Final = limits.JSON_DEPTH_MAX + limits.DISK_LAYERS_MAX


class QmpError(VmmError):
    """QEMU refused a command; ``qmp_class`` is its error class."""

    def __init__(self, command: str, qmp_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}", command=command)
        self.qmp_class = qmp_class


class Qmp:
    """A negotiated QMP session. Not for several threads at once."""

    def __init__(self, sock: socket.socket, *, timeout: float) -> None:
        """Waits for the greeting and negotiates. The socket is ours from here on, and closed when this fails."""
        self._sock = sock
        self._timeout = timeout
        self._buffer = bytearray()
        try:
            deadline = time.monotonic() + timeout
            greeting = self._message(deadline, "greeting")
            if not isinstance(greeting.get("QMP"), dict):
                raise VmmError("what listens on QEMU's control socket does not speak QMP")
            self._command("qmp_capabilities", {}, deadline)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, path: Path, *, timeout: float = 10.0) -> Self:
        """Connects to the socket at *path*; *timeout* (seconds) also holds for each command later on.

        Raises:
            VmmError: nobody listens there.
            VmmTimeout: no greeting: QEMU hangs, or another client has the channel.
        """
        try:
            sock = fsutil.connect_unix(path, timeout=timeout)
        except TimeoutError:
            raise VmmTimeout(f"QEMU does not take a connection on {path}") from None
        except OSError as exc:
            raise VmmError(f"QEMU does not listen on {path}: {exc.strerror}") from exc
        return cls(sock, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; the VM goes on."""
        self._sock.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        fds: Sequence[int] = (),
    ) -> Any:
        """Runs a command and returns what it returns. *fds* are sent along with it.

        Raises:
            QmpError: QEMU refused it.
            VmmError: QEMU died, or said nonsense.
            VmmTimeout: no answer in time.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        return self._command(command, arguments or {}, deadline, fds)

    def wait_closed(self, timeout: float) -> bool:
        """Waits until QEMU has closed the channel, as it does when it ends. False when it has not in time."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self._message(deadline, "its end")
        except VmmTimeout:
            return False
        except VmmError:
            return True

    def _command(self, command: str, arguments: Mapping[str, Any], deadline: float, fds: Sequence[int] = ()) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            if fds:
                sent = socket.send_fds(self._sock, [request], list(fds))
                request = request[sent:]
            self._sock.sendall(request)
        except TimeoutError:
            raise VmmTimeout(f"QEMU does not take the command {command}") from None
        except OSError as exc:
            raise VmmError(f"QEMU is gone: {exc.strerror}") from exc
        for _ in range(_SKIPPED_MAX):
            answer = self._message(deadline, f"an answer to {command}")
            if "return" in answer:
                return answer["return"]
            error = answer.get("error")
            if isinstance(error, dict):
                raise QmpError(command, str(error.get("class"))[:100], printable(str(error.get("desc")), 2000))
        raise VmmError(f"QEMU sends events without end instead of an answer to {command}")

    def _message(self, deadline: float, awaited: str) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > LINE_MAX:
                raise VmmError(f"QEMU sent a line of more than {LINE_MAX} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise VmmTimeout(f"QEMU did not send {awaited} in time")
            try:
                self._sock.settimeout(left)
                data = self._sock.recv(65536)
            except TimeoutError:
                raise VmmTimeout(f"QEMU did not send {awaited} in time") from None
            except OSError as exc:
                raise VmmError(f"QEMU is gone: {exc.strerror}") from exc
            if not data:
                raise VmmError(f"QEMU ended instead of sending {awaited}")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = strictjson.parse(line, "QEMU's message", max_size=LINE_MAX, max_depth=DEPTH_MAX)
        except JsonInvalid as exc:
            raise VmmError(f"QEMU sent something else than JSON: {exc.message}") from exc
        if not isinstance(message, dict):
            raise VmmError("QEMU sent JSON that is no message")
        return message
