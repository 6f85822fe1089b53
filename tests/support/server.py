"""``ovm serve`` as a process of its own, and HTTP to it byte by byte where that matters."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.artifact.build import Builder
from ovms.oci.layout import Layout
from ovms.process import terminate
from ovms.runtime.root import Root
from support import guests
from support.cli import OVM

#: The least that an instance takes.
LEAST: Final = {"memory": "32M", "accel": "tcg"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]


class UnixHttp(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = 30) -> None:
        super().__init__("unix", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock: socket.socket = fsutil.connect_unix(self.path, timeout=self.timeout)


class Server:
    """A running server over a root of the test's own."""

    def __init__(
        self, root: Path, *arguments: str, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        self.root = root
        self.socket = root / "ovms.sock"
        self.log = log or root.parent / "server.log"
        self.arguments = arguments
        self._env = dict(env or {})
        self.start()

    def start(self) -> None:
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root.parent),
            "OVMS_ROOT": str(self.root),
            "PYTHONFAULTHANDLER": "1",
            **self._env,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [OVM, "serve", *self.arguments], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                if self.call("GET", "/healthz").status == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(self.log.read_text())
            time.sleep(0.02)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Reply:
        connection = UnixHttp(self.socket, timeout)
        try:
            data = raw if raw is not None else None if body is None else json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **(headers or {})} if data is not None else dict(headers or {})
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        reply = self.call("GET", path)
        assert reply.status == 200, reply.body
        return reply.json

    def post(self, path: str, body: Any, **options: Any) -> Any:
        reply = self.call("POST", path, body, **options)
        assert reply.status == 200, reply.body
        return reply.json

    def state(self, instance_id: str) -> str:
        return str(self.get(f"/status/{instance_id}")["state"])

    def wait(self, instance_id: str, *states: str, timeout: float = 30) -> dict[str, Any]:
        """Waits until an instance is in one of *states*."""
        deadline = time.monotonic() + timeout
        while True:
            document: dict[str, Any] = self.get(f"/status/{instance_id}")
            if document["state"] in states:
                return document
            assert time.monotonic() < deadline, document
            time.sleep(0.01)

    def stream(self, path: str, timeout: float = 30) -> Iterator[Any]:
        """The records of a stream, as they come."""
        connection = UnixHttp(self.socket, timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            while line := answer.readline():
                yield json.loads(line)
        finally:
            connection.close()

    def open(self, timeout: float = 30) -> socket.socket:
        return fsutil.connect_unix(self.socket, timeout=timeout)

    def raw(self, data: bytes, timeout: float = 30) -> bytes:
        """What comes back on *data*, until the server closes."""
        with self.open(timeout) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while part := sock.recv(65536):
                answer += part
            return answer

    def rss(self) -> int:
        """Resident memory, in bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> int:
        code = terminate(self.process, grace=25)
        said = self.log.read_text()
        assert "Traceback" not in said, said
        assert "internal error" not in said, said
        return code


def no_registry(host: str) -> object:
    raise AssertionError(f"a test of the server asks for the registry {host}")


def prepare(directory: Path, kernel: Path, cache: Path) -> Path:
    """A root with the echo guest as ``echo:1``, ``web:1``, ``web`` and ``registry.example/web:1``; ``shared:1`` has a region."""
    root = Root(directory / "root")
    root.prepare()
    root.cache.symlink_to(cache)
    layout: Layout = root.layout()
    manifest = guests.write_project(directory / "project", kernel)
    for name in ("echo:1", "web:1", "web", "registry.example/web:1"):
        Builder(layout, no_registry).build(manifest, name=name)  # type: ignore[arg-type]
    region = "devices: [{type: ivshmem, name: mmio0, size: 4096, mmio_addr: '0xfe000000'}]\n"
    manifest = guests.write_project(directory / "shared", kernel, more=region)
    Builder(layout, no_registry).build(manifest, name="shared:1")  # type: ignore[arg-type]
    return root.path


@contextlib.contextmanager
def with_snapshot(root: Path, *, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[Server]:
    """A server over a root of :func:`prepare`'s, with ``echo:snap``, a snapshot of the echo guest. *options* are of that.

    Nothing of it is left in the end.
    """
    running = Server(root, env=env)
    try:
        started = running.post("/start", {"manifest": "echo:1", "overrides": LEAST})["instance_id"]
        running.wait(started, "running")
        guests.Console(root / "instances" / started).wait_for("READY")
        running.post("/snapshot", {"instance_id": started, "tag": "echo:snap", **options})
        running.post("/remove", {"instance_id": started, "force": True})
        yield running
        for one in running.get("/instances")["instances"]:
            running.post("/remove", {"instance_id": one["instance_id"], "force": True})
    finally:
        assert running.close() == 0
    assert guests.qemu_children(root) == []
