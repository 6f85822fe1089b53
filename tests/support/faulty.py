"""A small registry of the tests' own that misbehaves on demand; what it is asked is written down.

It is no stand-in for a registry (those tests use real ones): it makes the faults that a real one can't be told to make.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

#: Bytes between two calls of a server's ``pace``.
PIECE = 16384

#: What a fault does with one request: True when it has answered.
Fault = Callable[["Handler", bytes], bool]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # --- helpers for faults ------------------------------------------------------------------------------------

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_range(self, data: bytes, *, cut: int | None = None, honour: bool = True) -> None:
        """*data*, from where the Range header says; *cut* bytes of it, then the connection ends."""
        start, end = 0, len(data)
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", self.headers.get("Range", ""))
        if match and honour and self.server.ranges:
            start, end = int(match[1]), min(end, int(match[2] or end) + 1)
            if start >= len(data):
                self.reply(416)
                return
        partial = (start, end) != (0, len(data))
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        part = data[start:end] if cut is None else data[start : min(end, start + cut)]
        with self.server.counted():
            for at in range(0, len(part), PIECE) if self.server.pace else (0,):
                piece = part[at : at + PIECE] if self.server.pace else part
                if self.server.pace:
                    self.server.pace(len(piece))
                self.wfile.write(piece)
        self.server.sent += len(part)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    # --- requests ----------------------------------------------------------------------------------------------

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        path = urlsplit(self.path).path
        with self.server.lock:
            self.server.seen.append((self.command, self.path, self.headers.get("Range")))
            fault = None
            for i, (method, pattern, candidate) in enumerate(self.server.faults):
                if method == self.command and re.search(pattern, self.path):
                    fault = candidate
                    del self.server.faults[i]
                    break
        if fault is not None and fault(self, body):
            return
        if path == "/v2/":
            self.reply(200)
        elif "/manifests/" in path:
            self.manifest(path.rpartition("/")[2], body)
        elif "/uploads/" in path:
            self.upload(path.rpartition("/")[2], body)
        elif "/blobs/" in path:
            data = self.server.blobs.get(path.rpartition("/")[2])
            if data is None:
                self.reply(404)
            elif self.command == "HEAD":
                self.reply(200, data)
            else:
                self.send_range(data)
        else:
            self.reply(404)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = handle_any

    def manifest(self, name: str, body: bytes) -> None:
        if self.command == "PUT":
            self.server.manifests[name] = self.server.manifests[digest_of(body)] = body
            self.reply(201, Docker_Content_Digest=digest_of(body))
            return
        found = self.server.manifests.get(name)
        if found is None:
            self.reply(404)
        else:
            media_type = json.loads(found).get("mediaType", "application/vnd.oci.image.manifest.v1+json")
            self.reply(200, found, Content_Type=media_type, Docker_Content_Digest=digest_of(found))

    def upload(self, session: str, body: bytes) -> None:
        uploads = self.server.uploads
        query = parse_qs(urlsplit(self.path).query)
        if self.command == "POST":
            session = f"u{len(uploads)}"
            uploads[session] = b""
            self.reply(202, Location=f"/v2/x/blobs/uploads/{session}")
        elif session not in uploads:
            self.reply(404)
        elif self.command == "GET":
            self.reply(204, Location=self.path, Range=f"0-{max(0, len(uploads[session]) - 1)}")
        elif self.command == "PATCH":
            start = re.fullmatch(r"([0-9]+)-[0-9]+", self.headers.get("Content-Range", ""))
            if start and int(start[1]) != len(uploads[session]):
                self.reply(416, Location=self.path, Range=f"0-{len(uploads[session]) - 1}")
                return
            uploads[session] += body
            self.reply(202, Location=self.path, Range=f"0-{len(uploads[session]) - 1}")
        else:
            data = uploads.pop(session) + body
            if query.get("digest") != [digest_of(data)]:
                self.reply(400)
                return
            self.server.blobs[digest_of(data)] = data
            self.reply(201)


class Server(ThreadingHTTPServer):
    """``faults`` are taken in order by the first request that fits: (method, pattern of the path, what happens)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manifests: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: list[tuple[str, str, Fault]] = []
        self.seen: list[tuple[str, str, str | None]] = []
        self.sent = 0
        #: Whether ranges are honoured; what is called before each piece of a body; how many bodies were sent at once.
        self.ranges = True
        self.pace: Callable[[int], None] | None = None
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.host = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what many tests are about

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1

    def asked(self, method: str, pattern: str) -> list[str | None]:
        """The Range headers of the requests that fit."""
        return [found for command, path, found in self.seen if command == method and re.search(pattern, path)]

    def serve_artifact(self, files: dict[str, tuple[str, bytes]], config: tuple[str, bytes], tag: str = "1") -> str:
        """Lets *tag* stand for an artifact of these blobs (title → media type, content). Returns its digest."""

        def descriptor(media_type: str, data: bytes) -> dict[str, Any]:
            self.blobs[digest_of(data)] = data
            return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": config[0],
            "config": descriptor(*config),
            "layers": [
                {**descriptor(*content), "annotations": {"org.opencontainers.image.title": title}}
                for title, content in files.items()
            ],
        }
        raw = json.dumps(manifest).encode()
        self.manifests[tag] = self.manifests[digest_of(raw)] = raw
        return digest_of(raw)


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Waits for *condition*, and not for ever: who waits here is the server."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


# --- faults ----------------------------------------------------------------------------------------------------------


def _blob(handler: Handler) -> bytes:
    return handler.server.blobs[urlsplit(handler.path).path.rpartition("/")[2]]


def cut(size: int) -> Fault:
    """The connection ends after *size* bytes of the body."""

    def fault(handler: Handler, body: bytes) -> bool:
        handler.send_range(_blob(handler), cut=size)
        return True

    return fault


def hang_up(handler: Handler, body: bytes) -> bool:
    """No answer at all."""
    handler.close_connection = True
    return True


def status(code: int, **headers: str) -> Fault:
    """An answer of this status, without a body."""

    def fault(handler: Handler, body: bytes) -> bool:
        handler.reply(code, b"", **headers)
        return True

    return fault


def wrong_bytes(handler: Handler, body: bytes) -> bool:
    """The right number of bytes, and one of them is another."""
    data = bytearray(_blob(handler))
    data[len(data) // 2] ^= 1
    handler.send_range(bytes(data))
    return True


def no_ranges(handler: Handler, body: bytes) -> bool:
    """All of it, whatever part is asked for."""
    handler.send_range(_blob(handler), honour=False)
    return True


def other_range(handler: Handler, body: bytes) -> bool:
    """Another part than the one that is asked for."""
    data = _blob(handler)
    handler.reply(206, data[1:], Content_Range=f"bytes 1-{len(data) - 1}/{len(data)}")
    return True


def longer(handler: Handler, body: bytes) -> bool:
    handler.reply(200, _blob(handler) + b"more")
    return True


def endless(handler: Handler, body: bytes) -> bool:
    """Bytes without an announced end."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(65536))
    except OSError:
        handler.close_connection = True
    return True


def gzip_bomb(handler: Handler, body: bytes) -> bool:
    """A small body that says that it unpacks to gigabytes."""
    import gzip

    handler.reply(200, gzip.compress(bytes(32 << 20)), Content_Encoding="gzip")
    return True


def stall(seconds: float) -> Fault:
    """Half of the body, then silence."""

    def fault(handler: Handler, body: bytes) -> bool:
        data = _blob(handler)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        time.sleep(seconds)
        handler.close_connection = True
        return True

    return fault


def redirect(location: str) -> Fault:
    return status(307, Location=location)
