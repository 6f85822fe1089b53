"""A guest's agent that is played: behind the socket where a VM has its own."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovms import fsutil
from ovms.vmm.model import VmFiles

#: What a played agent answers to a command: bytes as they are, anything else as JSON in "return".
Answer = Callable[[str, dict[str, Any]], Any]


class Refusal(Exception):
    pass


class Played:
    """An agent behind a socket. *sync* answers ``guest-sync-delimited``, *answer* all else."""

    def __init__(self, directory: Path, answer: Answer, sync: Callable[[int], bytes] | None = None) -> None:
        self.files = VmFiles(directory)
        self._answer = answer
        self._sync = sync or (lambda number: b'\xff{"return": %d}\n' % number)
        self._listener = fsutil.listen_unix(self.files.agent)
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.sessions = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def names(self) -> list[str]:
        return [name for name, _ in self.commands]

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.sessions += 1
            with sock, contextlib.suppress(OSError), sock.makefile("rb") as lines:
                for line in lines:
                    self._one(sock, line)

    def _one(self, sock: socket.socket, line: bytes) -> None:
        message = json.loads(line.lstrip(b"\xff"))
        name, arguments = message["execute"], message.get("arguments", {})
        if name == "guest-sync-delimited":
            assert line[0] == 0xFF
            sock.sendall(self._sync(arguments["id"]))
            return
        self.commands.append((name, arguments))
        try:
            answer = self._answer(name, arguments)
        except Refusal as exc:
            sock.sendall(json.dumps({"error": {"class": "GenericError", "desc": str(exc)}}).encode() + b"\n")
            return
        sock.sendall(answer if isinstance(answer, bytes) else json.dumps({"return": answer}).encode() + b"\n")
