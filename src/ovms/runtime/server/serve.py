"""A server's life: sockets, signals, what systemd is told, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import Conflict, HostError, Locked, OvmsError, PortInUse, UsageError
from ovms.lazy import dataclass
from ovms.runtime import warm
from ovms.runtime.runtime import Runtime
from ovms.runtime.server.app import App
from ovms.runtime.server.gate import Gate, Peers, TlsFiles
from ovms.runtime.server.http import CONNECTIONS_MAX, HEAD_MAX, Http, HttpError
from ovms.runtime.server.jobs import Jobs
from ovms.runtime.warm import Pools
from ovms.runtime.watching import EventLog, Watcher
from ovms.text import printable

#: Seconds that requests and starts get to come to their end when the server is to end.
GRACE: Final = 10.0
#: Seconds between two looks at what killed commands and servers left.
_TIDY: Final = 5.0
#: Python 3.13 and later would look for the socket's file by the path that it was bound to, which is gone, and remove it.
_AS_IT_IS: Final[dict[str, Any]] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
_BACKLOG: Final = 512
#: Descriptors beside those of connections: records, logs, VMs that are being started, their watchers.
_DESCRIPTORS_SPARE: Final = 1024
_HANDSHAKE_TIMEOUT: Final = 10.0
#: systemd hands sockets over from this number on.
_FIRST_FD: Final = 3


@dataclass(frozen=True)
class Options:
    """Where a server listens, and whom it admits. ``group`` is a number; ``tcp`` needs ``tls``."""

    socket: Path
    group: int | None = None
    tcp: tuple[str, int] | None = None
    tls: TlsFiles | None = None


def serve(runtime: Runtime, options: Options, *, ready: Callable[[list[str]], None] = lambda _: None) -> bool:
    """Serves until SIGTERM or SIGINT. *ready* is told where it listens.

    False when a thread is at work still, for which the interpreter's end would wait.

    Raises:
        Conflict: another server listens on this socket.
        HostError, PortInUse, InputError: it can't listen, or not like this.
    """
    with ExitStack() as held:
        sockets = _sockets(options, held)
        # a thread that computes must not let the connections wait for 5 ms each time
        sys.setswitchinterval(0.001)
        return asyncio.run(_Server(runtime, options, sockets).run(ready))


@dataclass(frozen=True)
class _Sockets:
    unix: list[socket.socket]
    places: list[str]
    tcp: list[socket.socket]
    groups: frozenset[int]


def _sockets(options: Options, held: ExitStack) -> _Sockets:
    unix, tcp, places = [], [], []
    groups = set() if options.group is None else {options.group}
    for sock in _from_systemd():
        held.callback(sock.close)
        if sock.family == socket.AF_UNIX:
            unix.append(sock)
            places.append(str(sock.getsockname()))
            with contextlib.suppress(OSError):
                # its unit says who may open it (SocketGroup=)
                groups.add(Path(sock.getsockname()).stat().st_gid)
        else:
            tcp.append(sock)
    if not unix:
        unix.append(_listen_unix(options.socket, options.group, held))
        places.append(str(options.socket))
    if options.tcp is not None:
        tcp.append(_listen_tcp(*options.tcp, held))
    if tcp and options.tls is None:
        raise UsageError(
            "over TCP the contract is offered with TLS and a token only",
            hint="give --tls-cert, --tls-key and --token-file",
        )
    return _Sockets(unix, [*places, *map(_address, tcp)], tcp, frozenset(groups))


def _from_systemd() -> Iterator[socket.socket]:
    # sd_listen_fds(3)
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return
    for fd in range(_FIRST_FD, _FIRST_FD + min(int(count), 16)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM:
            raise HostError(f"the socket {fd} that systemd handed over is no stream socket")
        yield sock


def _listen_unix(path: Path, group: int | None, held: ExitStack) -> socket.socket:
    try:
        # whoever holds the lock is alive: what a dead one left is replaced
        held.enter_context(fsutil.file_lock(path.with_name(f"{path.name}.lock"), timeout=0))
    except Locked:
        raise Conflict(f"another server listens on {path}", hint="give another socket with --socket") from None
    except OSError as exc:
        raise HostError(f"{path} cannot be made: {exc.strerror}", hint="give another socket with --socket") from exc
    if path.exists() and not path.is_socket():
        raise HostError(f"{path} is there, and no socket", hint="give another path with --socket")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        sock = fsutil.listen_unix(temporary, backlog=_BACKLOG)
        held.callback(sock.close)
        if group is not None:
            os.chown(temporary, -1, group)
        temporary.chmod(0o660)
        temporary.replace(path)  # it is there with its mode, or not at all
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HostError(f"{path} cannot be made: {exc.strerror}", hint="give another socket with --socket") from exc
    held.callback(path.unlink, missing_ok=True)
    return sock


def _listen_tcp(host: str, port: int, held: ExitStack) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        if exc.errno == 98:
            raise PortInUse(f"port {port} of {host} is in use", hint="choose another with --tcp", port=port) from exc
        raise HostError(f"cannot listen on {host}:{port}: {exc.strerror or exc}") from exc
    held.callback(sock.close)
    return sock


#: As Python has it: what a short command saves (``ovms.cli.entry``) would be memory that a server does not give back.
_GARBAGE_AFTER: Final = (700, 10, 10)


class _Server:
    def __init__(self, runtime: Runtime, options: Options, sockets: _Sockets) -> None:
        self._runtime = runtime
        self._tls = options.tls
        self._sockets = sockets
        self._context = None if options.tls is None else options.tls.context()
        token = None if options.tls is None else options.tls.read_token()
        self._gate = Gate(Peers(sockets.groups), token)
        self._log = EventLog()
        self._end = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._renewing = asyncio.Lock()
        self._http: Http
        self._jobs: Jobs

    async def run(self, ready: Callable[[list[str]], None]) -> bool:
        most = _connections_max()
        loop = asyncio.get_running_loop()
        watcher = Watcher(
            self._runtime.instances, self._log, lambda left: loop.call_soon_threadsafe(self._jobs.mend, left)
        )
        self._jobs = Jobs(self._runtime, self._log, watcher.look)
        pools = self._open_pools()
        app = App(self._runtime, self._log, self._jobs, self._gate, lambda: self._http.connections, pools)
        self._http = Http(app, refuse=self._gate.refuse, most=most)
        thread = threading.Thread(target=watcher.run, name="ovms-watch", daemon=True)
        thread.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        tasks = [asyncio.ensure_future(again(work)) for work in (self._jobs.see_to_all, self._jobs.recover)]
        try:
            await self._listen()
            if pools is not None:
                tasks.append(asyncio.ensure_future(self._keep_warm(pools)))
            # what is there now stays for good: a collection that looks through all of it holds everybody up
            gc.collect()
            gc.freeze()
            gc.set_threshold(*_GARBAGE_AFTER)
            ready(self._sockets.places)
            _notify("READY=1", "STATUS=listening")
            await self._end.wait()
        finally:
            _notify("STOPPING=1")
            for task in tasks:
                task.cancel()
            for server in self._servers:
                server.close()
            app.ending.set()
            await self._http.stop(GRACE)
            idle = await self._jobs.close(GRACE)
            if pools is not None:
                pools.close()
            watcher.stop()
            thread.join(2.0)
        return idle

    def _open_pools(self) -> Pools | None:
        try:
            return warm.opened(self._runtime)
        except Conflict:
            return None  # of another server, on another socket

    async def _keep_warm(self, pools: Pools) -> None:
        await self._jobs.long.run(pools.load, self._jobs.connect, _say)
        await self._jobs.keep_warm(pools)

    async def _listen(self) -> None:
        self._servers = [
            *[await self._serve(sock, None) for sock in self._sockets.unix],
            *[await self._serve(sock, self._context) for sock in self._sockets.tcp],
        ]

    async def _serve(self, sock: socket.socket, context: ssl.SSLContext | None) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._http.serve(reader, writer, remote=context is not None)

        # a descriptor of its own: a reload closes it, and the socket goes on listening
        copy = sock.dup()
        if sock.family == socket.AF_UNIX:
            return await asyncio.start_unix_server(serve, sock=copy, limit=HEAD_MAX, backlog=_BACKLOG, **_AS_IT_IS)
        return await asyncio.start_server(
            serve,
            sock=copy,
            limit=HEAD_MAX,
            backlog=_BACKLOG,
            ssl=context,
            ssl_handshake_timeout=_HANDSHAKE_TIMEOUT if context else None,
        )

    def _reload(self) -> None:
        # Open connections stay; what can't be read leaves all as it is.
        _notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            if self._tls is not None:
                self._context, self._gate.token = self._tls.context(), self._tls.read_token()
                task = asyncio.ensure_future(self._renew())
                task.add_done_callback(lambda _: _notify("READY=1"))
                return
        except OvmsError as exc:
            print(f"ovm: reload: {printable(exc.message)}; what was in force stays", file=sys.stderr, flush=True)  # noqa: T201
        _notify("READY=1")

    async def _renew(self) -> None:
        async with self._renewing:
            before = self._servers
            await self._listen()
            loop = asyncio.get_running_loop()
            for server in before:
                for sock in server.sockets:
                    loop.remove_reader(sock)
            # asyncio forgets a connection, and leaves it open, that was accepted but not begun when its server is closed
            await asyncio.sleep(0)
            for server in before:
                server.close()


async def again(work: Callable[[], Awaitable[None]], *, pause: float = _TIDY) -> None:
    """Does *work* again and again, until it is cancelled: no fault of it, and no want of threads, ends that."""
    while True:
        try:
            await work()
        except (OvmsError, OSError, HttpError):
            pass
        except Exception as exc:  # noqa: BLE001 - what is left of the others would stay for good
            _say(f"internal error while tidying up: {type(exc).__name__}: {str(exc)[:500]}")
        await asyncio.sleep(pause)


def _say(text: str) -> None:
    print(f"ovm: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201


def _connections_max() -> int:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + _DESCRIPTORS_SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else max(8, min(CONNECTIONS_MAX, soft // 2))


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _notify(*words: str) -> None:
    # sd_notify(3)
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.sendall("\n".join(words).encode())
