"""A small world of network namespaces: a host, with a resolver on its loopback alone, and a server outside it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

#: The server outside, and what it answers.
OUTSIDE = "198.51.100.1"
OUTSIDE_6 = "2001:db8:1::1"
OUTSIDE_PORT = 8000
ANSWER = "this is outside"
#: What the resolver answers, whatever it is asked.
RESOLVED = "198.51.100.77"
#: Where something listens that is the host's own business; every connection, and every datagram, is a line of its log.
PRIVATE_PORT = 9999

_SERVERS = """
import os, select, socket, sys, threading
def tcp(family, address, port, work):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((address, port))
    s.listen(16)
    def loop():
        while True:
            client, peer = s.accept()
            work(client, peer)
            client.close()
    threading.Thread(target=loop, daemon=True).start()
def udp(address, port, work):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind((address, port))
    def loop():
        while True:
            data, peer = s.recvfrom(2048)
            work(s, data, peer)
    threading.Thread(target=loop, daemon=True).start()
def page(client, peer):
    client.recv(4096)
    body = ANSWER.encode()
    client.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
def note(*what):
    print(*what, flush=True)
def answer(s, data, peer):
    end = data.index(b"\\0", 12) + 5
    if data[end - 4 : end - 2] != b"\\0\\1":  # no address is asked for: there is none
        s.sendto(data[:2] + b"\\x81\\x80\\0\\1\\0\\0\\0\\0\\0\\0" + data[12:end], peer)
        return
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + socket.inet_aton(RESOLVED)
    s.sendto(data[:2] + b"\\x81\\x80\\0\\1\\0\\1\\0\\0\\0\\0" + data[12:end] + record, peer)
"""


def allowed() -> str | None:
    """Why no such world can be made here; None when it can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces with names"
    for tool in ("ip", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    name = f"ovmt{secrets.token_hex(4)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=10, check=False).returncode != 0:
        return "this host lets us make no network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)
    return None


def ip(*words: str, ns: str | None = None) -> None:
    inside = () if ns is None else ("-n", ns)
    subprocess.run(["ip", *inside, *words], check=True, timeout=10)


@contextmanager
def namespace() -> Iterator[str]:
    """A network namespace, by its name, with its loopback up."""
    name = f"ovmt{secrets.token_hex(4)}"
    ip("netns", "add", name)
    try:
        ip("link", "set", "lo", "up", ns=name)
        yield name
    finally:
        ip("netns", "del", name)


def path_of(name: str) -> Path:
    return Path("/run/netns", name)


@dataclass(frozen=True)
class World:
    """``prefix`` runs a program on its host."""

    host: str
    prefix: tuple[str, ...]
    log: Path

    def python(self, script: str, *arguments: str, timeout: float = 20) -> str:
        """Runs a script on the host."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-c", script, *arguments], capture_output=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def get(self, port: int, *, path: str = "/", timeout: float = 20) -> str:
        """What a server at a port of the host's loopback answers."""
        script = (
            "import sys, urllib.request as r; "
            "print(r.urlopen(f'http://127.0.0.1:{sys.argv[1]}{sys.argv[2]}', timeout=10).read().decode())"
        )
        return self.python(script, str(port), path, timeout=timeout)

    def reached(self) -> list[str]:
        """What reached the host's private port."""
        return self.log.read_text().splitlines()[1:]


def _serve(ns: str, script: str, log: Path) -> subprocess.Popen[bytes]:
    head = f"ANSWER = {ANSWER!r}; RESOLVED = {RESOLVED!r}\n"
    tail = "\nnote('ready')\nthreading.Event().wait()\n"
    with log.open("wb") as out:
        running = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{ns}", sys.executable, "-c", head + _SERVERS + script + tail],
            stdin=subprocess.DEVNULL,
            stdout=out,
        )
    deadline = time.monotonic() + 20
    while b"ready" not in log.read_bytes():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return running


@contextmanager
def world(scratch: Path) -> Iterator[World]:
    """Makes such a world; skips the test where that is not allowed."""
    if reason := allowed():
        pytest.skip(reason)
    with ExitStack() as held:
        host, outside = held.enter_context(namespace()), held.enter_context(namespace())
        link = f"o{secrets.token_hex(4)}"
        ip("link", "add", link, "netns", host, "type", "veth", "peer", "name", link, "netns", outside)
        for ns, ipv4, ipv6 in (
            (host, "198.51.100.2/24", "2001:db8:1::2/64"),
            (outside, f"{OUTSIDE}/24", f"{OUTSIDE_6}/64"),
        ):
            ip("addr", "add", ipv4, "dev", link, ns=ns)
            ip("addr", "add", ipv6, "dev", link, "nodad", ns=ns)
            ip("link", "set", link, "up", ns=ns)
        ip("route", "add", "default", "via", OUTSIDE, ns=host)
        ip("-6", "route", "add", "default", "via", OUTSIDE_6, ns=host)
        pages = f"tcp(2, {OUTSIDE!r}, {OUTSIDE_PORT}, page); tcp(10, {OUTSIDE_6!r}, {OUTSIDE_PORT}, page)"
        private = (
            "udp('127.0.0.53', 53, answer)\n"
            f"tcp(2, '127.0.0.1', {PRIVATE_PORT}, lambda client, peer: note('tcp', peer))\n"
            f"tcp(10, '::1', {PRIVATE_PORT}, lambda client, peer: note('tcp6', peer))\n"
            f"udp('127.0.0.1', {PRIVATE_PORT}, lambda s, data, peer: note('udp', peer))"
        )
        for ns, script, log in ((outside, pages, scratch / "outside.log"), (host, private, scratch / "private.log")):
            server = _serve(ns, script, log)
            held.callback(server.wait, 10)
            held.callback(server.kill)
        resolv = scratch / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.53\n")
        enter = ("nsenter", f"--net=/run/netns/{host}", "unshare", "-m", "--propagation", "private", "sh", "-c")
        yield World(
            host, (*enter, 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(resolv)), scratch / "private.log"
        )


def run_in(name: str, script: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a script in a namespace."""
    argv = ["nsenter", f"--net={path_of(name)}", sys.executable, "-c", script]
    return subprocess.run(argv, capture_output=True, timeout=20, check=False)


def processes(name: str, *, timeout: float = 5) -> list[int]:
    """The processes that are still in a namespace after a while."""
    deadline = time.monotonic() + timeout
    while True:
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, timeout=10, check=True)
        found = [int(pid) for pid in done.stdout.split()]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)
