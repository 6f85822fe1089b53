"""A server's own life: who may call, signals, systemd, TLS, and what it leaves."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.cli import OVM, Ovm
from support.faulty import wait_until
from support.guests import qemu_children
from support.server import Server, prepare

from ovms.process import terminate

LEAST = {"memory": "32M", "accel": "tcg"}
START = {"manifest": "echo:1", "overrides": LEAST}
TESTS = Path(__file__).parents[2]
TOKEN = "a-token-of-the-test-0123456789"


def _certificate(directory: Path, name: str, *, ca: tuple[Path, Path] | None = None) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    if ca is not None:
        command += ["-CA", str(ca[0]), "-CAkey", str(ca[1])]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


class Tls:
    def __init__(self, directory: Path) -> None:
        self.certificate, self.key = _certificate(directory, "one")
        self.token = directory / "token"
        self.token.write_text(f"{TOKEN}\n")
        self.token.chmod(0o600)
        self.port = _port()

    @property
    def arguments(self) -> list[str]:
        return [
            "--tcp", f"127.0.0.1:{self.port}", "--tls-cert", str(self.certificate), "--tls-key", str(self.key),
            "--token-file", str(self.token),
        ]  # fmt: skip

    def get(
        self, path: str, token: str | None, *, client: tuple[Path, Path] | None = None
    ) -> tuple[int, dict[str, str]]:
        context = ssl.create_default_context(cafile=self.certificate)
        if client is not None:
            context.load_cert_chain(*client)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
        try:
            connection.request("GET", path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            answer.read()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}
        finally:
            connection.close()


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return Tls(tmp_path)


@pytest.fixture
def secure(root: Path, tls: Tls) -> Iterator[Server]:
    server = Server(root, *tls.arguments)
    yield server
    assert server.close() == 0


@pytest.mark.spec("RUN-1")
def test_tcp_asks_for_tls_and_a_token(secure: Server, tls: Tls) -> None:
    assert tls.get("/version", TOKEN)[0] == 200
    for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x"):
        # what the vectors have of TCP among it
        for path in ("/version", "/nothing", "/start"):
            status, headers = tls.get(path, token)
            assert status == 401
            assert headers["www-authenticate"].startswith("Bearer")
    with socket.create_connection(("127.0.0.1", tls.port), timeout=10) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not sock.recv(1000).startswith(b"HTTP")
    assert secure.get("/healthz") == {"status": "ok"}  # no token on the socket


@pytest.mark.long
def test_no_connection_is_lost_in_a_reload(secure: Server, tls: Tls) -> None:
    """What has come in just then is served, by the old files or the new, and does not hang until somebody gives up."""
    assert tls.get("/version", TOKEN)[0] == 200
    open_before, end = secure.fds(), time.monotonic() + 3
    slow: list[float] = []

    def ask() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            assert tls.get("/version", TOKEN)[0] == 200
            slow.append(time.monotonic() - began)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        while time.monotonic() < end:
            secure.process.send_signal(signal.SIGHUP)
            time.sleep(0.003)
        for one in asking:
            one.result()
    assert max(slow) < 9  # of the ten seconds after which a client gives up
    wait_until(lambda: secure.fds() <= open_before, 10)


@pytest.mark.spec("RUN-1")
def test_a_reload_takes_new_files_and_keeps_connections(secure: Server, tls: Tls, tmp_path: Path) -> None:
    stream = secure.stream("/events?follow=true", timeout=10)
    held = secure.open(10)
    tls.token.write_text("another-token-of-the-test\n")
    certificate, key = _certificate(tmp_path, "two")
    old = tls.certificate.read_bytes()
    tls.certificate.write_bytes(certificate.read_bytes())
    tls.key.write_bytes(key.read_bytes())
    secure.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while True:
        try:
            if tls.get("/version", "another-token-of-the-test")[0] == 200:
                break
        except (ssl.SSLError, OSError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert tls.get("/version", TOKEN)[0] == 401
    held.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert held.recv(100).startswith(b"HTTP/1.1 200")
    held.close()
    # what can't be read changes nothing
    tls.token.write_text("short")
    secure.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert tls.get("/version", "another-token-of-the-test")[0] == 200
    assert "what was in force stays" in secure.log.read_text()
    assert old != tls.certificate.read_bytes()
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.spec("RUN-1")
def test_only_known_clients(root: Path, tls: Tls, tmp_path: Path) -> None:
    ca = _certificate(tmp_path, "ca")
    client = _certificate(tmp_path, "client", ca=ca)
    stranger = _certificate(tmp_path, "stranger")
    server = Server(root, *tls.arguments, "--tls-client-ca", str(ca[0]))
    try:
        assert tls.get("/version", TOKEN, client=client)[0] == 200
        for other in (None, stranger):
            with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
                tls.get("/version", TOKEN, client=other)
    finally:
        assert server.close() == 0


def test_what_it_refuses_to_begin_with(tmp_path: Path, root: Path, tls: Tls) -> None:
    ovm = Ovm(root, tmp_path)
    assert ovm("serve", "--tcp", "127.0.0.1:0").code == 2
    tls.token.chmod(0o644)
    done = ovm("serve", *tls.arguments)
    assert (done.code, "chmod 600" in done.err) == (9, True)
    tls.token.chmod(0o600)
    tls.token.write_text("short")
    assert ovm("serve", *tls.arguments).code == 3
    assert ovm("serve", "--group", "no-such-group").code == 2
    assert ovm("serve", "--socket", "/proc/none/x.sock").code == 9
    (root / "file").write_text("mine")
    assert ovm("serve", "--socket", str(root / "file")).code == 9
    assert (root / "file").read_text() == "mine"


@pytest.mark.spec("RUN-1")
def test_the_socket_is_the_owner_s(root: Path) -> None:
    server = Server(root)
    try:
        mode = server.socket.stat().st_mode
        assert stat.S_IMODE(mode) == 0o660
        second = subprocess.run(
            [OVM, "serve"], env={**os.environ, "OVMS_ROOT": str(root)}, capture_output=True, timeout=30, check=False
        )
        assert second.returncode == 5
        assert b"another server" in second.stderr
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        assert server.socket.exists()  # left by the dead one
        server.start()
    finally:
        assert server.close() == 0
    assert not server.socket.exists()


@pytest.mark.spec("RUN-1")
@pytest.mark.skipif(os.geteuid() != 0, reason="calls as another user")
def test_peers_are_asked_of_the_kernel(tmp_path: Path, root: Path) -> None:
    nobody = pwd.getpwnam("nobody")

    def call(path: Path) -> str:
        read, write = os.pipe()
        child = os.fork()  # Python itself may be where only root can read
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(10)
                    sock.connect(str(path))
                    sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                    os.write(write, sock.recv(4096))
            except OSError as exc:
                os.write(write, type(exc).__name__.encode())
            finally:
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as answer:
            return answer.read().decode()

    for directory in (root, tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o001 == 0:  # pytest's own directories are ours alone
            directory.chmod(0o711)
    server = Server(root)
    try:
        assert "PermissionError" in call(server.socket)
        server.socket.chmod(0o666)  # whoever opens it is asked for, too
        assert "401" in call(server.socket)
    finally:
        assert server.close() == 0
    server = Server(root, "--group", str(nobody.pw_gid))
    try:
        assert server.socket.stat().st_gid == nobody.pw_gid
        assert call(server.socket).startswith("HTTP/1.1 200")
    finally:
        assert server.close() == 0


def test_systemd_hands_a_socket_over_and_is_told(root: Path, tmp_path: Path) -> None:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(20)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "handed.sock"))
    listening.listen(8)
    # as systemd does it: descriptor 3, and the process's own number in the environment
    script = "import os,sys; os.environ['LISTEN_PID']=str(os.getpid()); os.environ['LISTEN_FDS']='1'; os.execv(sys.argv[1], sys.argv[1:])"

    def hand_over() -> None:
        os.dup2(listening.fileno(), 3)

    process = subprocess.Popen(
        [sys.executable, "-c", script, OVM, "serve"],
        env={**os.environ, "OVMS_ROOT": str(root), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        preexec_fn=hand_over,
        close_fds=False,
    )
    try:
        assert b"READY=1" in notify.recv(1000)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(tmp_path / "handed.sock"))
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert not (root / "ovms.sock").exists()
        process.send_signal(signal.SIGHUP)
        assert b"RELOADING=1" in notify.recv(1000)
        assert b"READY=1" in notify.recv(1000)
        process.terminate()
        assert b"STOPPING=1" in notify.recv(1000)
        assert process.wait(20) == 0
    finally:
        terminate(process)
        listening.close()
        notify.close()


@pytest.mark.spec("RUN-19")
def test_sigterm_ends_streams_and_leaves_vms(server: Server, running: str) -> None:
    stream = server.stream(f"/logs/{running}?follow=true")
    events = server.stream("/events?follow=true")
    next(stream)
    next(events)
    pid = server.get(f"/status/{running}")["pid"]
    began = time.monotonic()
    server.process.terminate()
    list(stream)
    list(events)
    assert server.process.wait(20) == 0
    assert time.monotonic() - began < 5
    assert Path(f"/proc/{pid}").exists()
    server.start()
    assert server.state(running) == "running"


@pytest.mark.long
@pytest.mark.spec("RUN-19")
def test_a_start_that_hangs_does_not_hold_the_end_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reference = f"127.0.0.1:{silent.getsockname()[1]}/web:1"
        instance_id = server.post("/start", {"manifest": reference, "overrides": LEAST})["instance_id"]
        server.process.terminate()
        assert server.process.wait(25) == 0
        server.start()
        document = server.wait(instance_id, "error")
        assert document["error"]["code"] == "interrupted"
        server.post("/remove", {"instance_id": instance_id})


@pytest.mark.long
def test_nothing_is_left_of_a_start_but_what_is_remembered(
    tmp_path: Path, echo_kernel: Path, qemu_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from inside, so that one entry of one container in each cycle is found."""
    cycles = int(os.environ.get("OVMS_CYCLES", "60"))
    root = prepare(tmp_path, echo_kernel, qemu_cache)
    done = subprocess.run(
        [sys.executable, "-m", "support.growing", str(root), str(cycles)],
        cwd=TESTS, env={**os.environ, "HOME": str(tmp_path)}, stdout=subprocess.PIPE, timeout=240, check=True,
    )  # fmt: skip
    grown = json.loads(done.stdout)
    assert qemu_children(root) == []
    assert grown["events"] >= 4 * cycles
    assert grown["entries"] - grown["events"] < cycles / 2, grown
    assert grown["blocks"] < 15 * cycles, grown
    assert grown["event_bytes"] < 1200 * cycles, grown
    for of_all in ("tasks", "threads", "fds"):
        assert grown[of_all] <= 3, grown


@pytest.mark.long
def test_nothing_grows_over_many_starts(server: Server) -> None:
    def cycle() -> None:
        started = server.post("/start", START)
        server.wait(started["instance_id"], "running")
        server.post("/remove", {"instance_id": started["instance_id"], "force": True})

    for _ in range(8):
        cycle()
    fds, rss = server.fds(), server.rss()
    for _ in range(20):
        cycle()
    assert server.fds() <= fds + 2
    assert server.rss() - rss < 4 << 20
    assert [p for p in qemu_children(server.root, timeout=3) if p != server.process.pid] == []
