"""The watcher and the jail: programs of the tests' own run in it, and try what a VMM that was taken over would try."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support import shares

from ovms import fsutil
from ovms.errors import VmmError
from ovms.memory import template
from ovms.memory.template import Holder
from ovms.process import ProcessId
from ovms.runtime import jail as jails
from ovms.spec.digest import of_bytes
from ovms.vmm import watch
from ovms.vmm.jail import Jail, Namespace, User
from ovms.vmm.model import VmFiles

SOURCE = watch.PROGRAM.parent / "watch.c"
PLAIN = Jail()
PYTHON = "/usr/bin/python3"


def full_jail() -> Jail:
    root = os.geteuid() == 0
    user = User(jails.UID_FIRST + 7, jails.UID_FIRST + 7) if root else User(os.geteuid(), os.getegid())
    return Jail(
        frozenset(Namespace),
        user,
        own_root=True,
        limits={resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0},
    )


@pytest.fixture(scope="module")
def jail() -> Jail:
    full = full_jail()
    if reason := jails.probe(full):
        pytest.skip(f"this host gives no jail: {reason}")
    return full


@dataclass
class Vm:
    """A program that stands for a VMM, with its console."""

    watched: watch.Watched
    files: VmFiles
    console: socket.socket
    events: socket.socket

    def end(self) -> watch.Exit:
        self.console.close()
        self.events.close()
        assert self.watched.watcher.wait(20)
        seen = watch.read_exit(self.files)
        assert seen is not None
        return seen


@contextlib.contextmanager
def started(
    directory: Path,
    argv: Sequence[str],
    jail: Jail = PLAIN,
    *,
    keep: Sequence[int] = (),
    hold: Sequence[int] = (),
    at_end: Sequence[str] = (),
    read_only: Mapping[int, Path] | None = None,
    share: Path | None = None,
    until: int | None = None,
    shares: Mapping[str, tuple[int, Path]] | None = None,
    trees: Mapping[str, Path] | None = None,
) -> Iterator[Vm]:
    directory.mkdir(exist_ok=True)
    files = VmFiles(directory)
    with contextlib.ExitStack() as held:
        listen = held.enter_context(fsutil.listen_unix(files.console))
        vmm_console, console = socket.socketpair()
        vmm_events, events = socket.socketpair()
        fds = (console.fileno(), listen.fileno(), events.fileno())
        if share is not None:
            opened = os.open(share, os.O_PATH)
            held.callback(os.close, opened)
            shares = {"shared/0": (opened, share)}
        launch = watch.Launch(
            argv,
            keep,
            *fds,
            hold,
            at_end=at_end,
            read_only=read_only or {},
            shares=shares or {},
            until=until,
            trees=trees or {},
        )
        try:
            watched = watch.start(launch, jail, files)
        except BaseException:
            vmm_console.close()
            vmm_events.close()
            raise
        finally:
            console.close()
            events.close()
        vm = Vm(watched, files, vmm_console, vmm_events)
    try:
        yield vm
    finally:
        vm.console.close()
        vm.events.close()
        watched.vmm.kill()
        assert watched.watcher.wait(20)


def in_jail(directory: Path, jail: Jail, code: str, **options: Any) -> Any:
    """What a Python program prints as JSON that runs in the jail in place of a VMM."""
    program = [PYTHON, "-ISc", textwrap.dedent(code)]
    with started(directory, program, jail, **options) as vm:
        vm.console.close()
        vm.events.close()
        assert vm.watched.watcher.wait(30)
        said = vm.files.vmm_log.read_text()
    try:
        return json.loads(said.splitlines()[-1])  # before it what programs said that it ran
    except (ValueError, IndexError):
        raise AssertionError(said) from None


# --- watching --------------------------------------------------------------------------------------------------------


def test_the_binary_is_what_its_source_says() -> None:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert f"watch.c sha256:{digest}".encode() in watch.PROGRAM.read_bytes(), "run scripts/build-native.sh"


def test_the_source_builds(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    script = Path(__file__).parents[3] / "scripts" / "build-native.sh"
    subprocess.run([script, tmp_path / "watch", tmp_path / "fence"], check=True, timeout=60)
    assert (tmp_path / "watch").stat().st_size < 32768


@pytest.mark.parametrize(
    ("program", "returncode"),
    [("exit 0", 0), ("exit 7", 7), ("kill -SEGV $$", -signal.SIGSEGV), ("kill -KILL $$", -signal.SIGKILL)],
)
def test_how_it_ended_is_written_down(tmp_path: Path, program: str, returncode: int) -> None:
    before = time.time_ns()
    with started(tmp_path, ["/bin/sh", "-c", f"sleep 0.05; {program}"]) as vm:
        assert watch.read_exit(vm.files) is None
        seen = vm.end()
    assert seen.returncode == returncode
    assert before < seen.time_ns < time.time_ns()
    assert seen.memory_max > 100_000


def test_it_lives_on_without_us_and_is_nobody_s_zombie(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sleep", "60"]) as vm:
        assert watch.find(vm.files) == vm.watched
        for pid in (vm.watched.vmm.pid, vm.watched.watcher.pid):
            assert os.getsid(pid) != os.getsid(0)
        with pytest.raises(ChildProcessError):
            os.waitpid(vm.watched.watcher.pid, os.WNOHANG)
        vm.watched.vmm.kill()
        assert vm.end().returncode == -signal.SIGKILL
        assert watch.find(vm.files) is None


def test_signals_for_everybody_do_not_end_the_watcher(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sleep", "60"]) as vm:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            vm.watched.watcher.signal(number)
        vm.watched.vmm.signal(signal.SIGTERM)
        assert vm.end().returncode == -signal.SIGTERM


def test_a_stale_pid_file_names_nobody(tmp_path: Path) -> None:
    files = VmFiles(tmp_path)
    for content in (b"", b"x y\n", f"{os.getpid()} {os.getppid()}\n".encode(), b"1 0\n", b"999999999 999999998\n"):
        files.pid.write_bytes(content)
        assert watch.find(files) is None


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="No such file"), started(tmp_path, ["/nowhere/qemu"]):
        pass
    assert not VmFiles(tmp_path).pid.exists()


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp"])
def test_a_program_with_a_place_of_its_own(tmp_path: Path, jail: Jail, place: str) -> None:
    """Also below /tmp, where its root has a directory of its own."""
    with tempfile.TemporaryDirectory(dir=place) as directory:
        program = Path(directory) / "bin" / "true"
        program.parent.mkdir()
        Path(directory).chmod(0o755)  # a VM's user looks into it
        shutil.copy("/usr/bin/true", program)
        with started(tmp_path / "vm", [str(program)], jail, trees=watch.program_trees(program)) as vm:
            assert vm.end().returncode == 0


def test_what_the_console_prints_is_kept_with_its_time(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sleep", "60"]) as vm:
        times = []
        for text in (b"one\n", b"two\n"):
            times.append(time.time_ns())
            vm.console.sendall(text)
            time.sleep(0.05)
        assert vm.files.console_log.read_bytes() == b"one\ntwo\n"
        entries = list(struct.iter_unpack("<QQ", vm.files.console_index.read_bytes()))
        assert [at for at, _ in entries] == [0, 4]
        for (_, then), sent in zip(entries, times, strict=True):
            assert sent <= then < sent + 10**10


def test_those_who_ask_for_the_console_see_it_and_type(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sleep", "60"]) as vm, contextlib.ExitStack() as held:
        clients = [held.enter_context(fsutil.connect_unix(vm.files.console, timeout=10)) for _ in range(3)]
        time.sleep(0.05)
        vm.console.sendall(b"hello")
        assert [client.recv(100) for client in clients] == [b"hello"] * 3
        clients[1].sendall(b"keys")
        assert vm.console.recv(100) == b"keys"
        clients[0].close()
        vm.console.sendall(b"more")
        assert clients[2].recv(100) == b"more"


def test_a_client_that_reads_nothing_holds_nobody_up(tmp_path: Path) -> None:
    with (
        started(tmp_path, ["/bin/sleep", "60"]) as vm,
        fsutil.connect_unix(vm.files.console, timeout=10) as lazy,
    ):
        vm.console.settimeout(10)
        for _ in range(64):
            vm.console.sendall(b"x" * 65536)
        deadline = time.monotonic() + 10
        while vm.files.console_log.stat().st_size < 64 * 65536 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert vm.files.console_log.stat().st_size == 64 * 65536
        assert lazy.recv(1) == b"x"


def test_a_guest_that_takes_no_keys_does_not_make_us_collect_them(tmp_path: Path) -> None:
    with (
        started(tmp_path, ["/bin/sleep", "60"]) as vm,
        fsutil.connect_unix(vm.files.console, timeout=1) as typist,
    ):
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                typist.sendall(b"k" * 65536)
        vm.console.sendall(b"still here")
        time.sleep(0.1)
        assert vm.files.console_log.read_bytes() == b"still here"


def test_the_console_log_is_begun_anew_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOG_MAX", 100_000)
    with started(tmp_path, ["/bin/sleep", "60"]) as vm:
        data = b"".join(b"%07d\n" % i for i in range(40_000))
        vm.console.settimeout(10)
        vm.console.sendall(data)
        deadline = time.monotonic() + 10
        new = old = b""
        while time.monotonic() < deadline:
            new, old = vm.files.console_log.read_bytes(), vm.files.old(vm.files.console_log).read_bytes()
            if data.endswith(old + new) and new.endswith(b"0039999\n"):
                break
            time.sleep(0.02)
        assert data.endswith(old + new)
        assert len(old) + len(new) <= 2 * (100_000 + 65536)
        base = struct.unpack_from("<Q", vm.files.console_index.read_bytes())[0]
        assert data[base : base + len(new)] == new
        assert struct.unpack_from("<Q", vm.files.old(vm.files.console_index).read_bytes())[0] == base - len(old)


def test_events_are_asked_for_and_kept_up_to_a_limit(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sleep", "60"]) as vm:
        assert json.loads(vm.events.recv(1000)) == {"execute": "qmp_capabilities"}
        vm.events.settimeout(10)
        for _ in range(100):
            vm.events.sendall(b"e" * 65536)
        vm.events.close()
        time.sleep(0.1)
        assert vm.files.events.stat().st_size == 4 << 20


def test_what_the_vmm_says_is_kept_up_to_a_limit(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sh", "-c", "head -c 3000000 /dev/zero >&2"]) as vm:
        assert vm.end().returncode == 0
        assert vm.files.vmm_log.stat().st_size == 1 << 20


def test_something_is_run_at_the_end(tmp_path: Path) -> None:
    after = ["/bin/sh", "-c", f"cat {tmp_path}/exit > {tmp_path}/seen"]
    with started(tmp_path, ["/bin/sh", "-c", "exit 3"], at_end=after) as vm:
        assert vm.end().returncode == 3
    assert (tmp_path / "seen").read_bytes() == (tmp_path / "exit").read_bytes()


def test_a_killed_copier_is_no_end(tmp_path: Path) -> None:
    with started(tmp_path, ["/bin/sleep", "60"]) as vm:
        children = Path(f"/proc/{vm.watched.watcher.pid}/task/{vm.watched.watcher.pid}/children")
        if not children.exists():
            pytest.skip("this kernel does not list children")
        copier = next(int(pid) for pid in children.read_text().split() if int(pid) != vm.watched.vmm.pid)
        os.kill(copier, signal.SIGKILL)
        time.sleep(0.05)
        assert vm.watched.vmm.alive()
        vm.watched.vmm.kill()
        assert vm.end().returncode == -signal.SIGKILL


@contextlib.contextmanager
def other_process() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with subprocess.Popen(["sleep", "60"]) as other:
        pidfd = os.pidfd_open(other.pid)
        try:
            yield other, pidfd
        finally:
            os.close(pidfd)
            other.kill()


def test_it_ends_with_another_process(tmp_path: Path, jail: Jail) -> None:
    for confined in (PLAIN, jail):
        with (
            other_process() as (other, pidfd),
            started(tmp_path / str(bool(confined.namespaces)), ["/bin/sleep", "60"], confined, until=pidfd) as vm,
        ):
            assert not vm.watched.vmm.wait(0.1)
            other.kill()
            assert vm.watched.vmm.wait(10)
            assert vm.end().returncode == -signal.SIGKILL


def test_it_may_end_before_that_process_does(tmp_path: Path) -> None:
    with other_process() as (other, pidfd), started(tmp_path, ["/bin/sh", "-c", "exit 3"], until=pidfd) as vm:
        assert vm.end().returncode == 3
        assert other.poll() is None


def test_it_ends_with_its_watcher_where_it_is_to_end_with_somebody(tmp_path: Path, jail: Jail) -> None:
    with other_process() as (_, pidfd), started(tmp_path, ["/bin/sleep", "60"], jail, until=pidfd) as vm:
        vm.watched.watcher.kill()
        assert vm.watched.vmm.wait(10)


def test_it_ends_with_a_process_that_has_ended_already(tmp_path: Path) -> None:
    with other_process() as (other, pidfd):
        other.kill()
        other.wait(10)
        with started(tmp_path, ["/bin/sleep", "60"], until=pidfd) as vm:
            assert vm.end().returncode == -signal.SIGKILL


# --- the jail --------------------------------------------------------------------------------------------------------


def test_the_processes_hold_little(tmp_path: Path, jail: Jail) -> None:
    secret = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(secret, True)
    try:
        with started(tmp_path / "vm", ["/bin/sleep", "60"], jail) as vm:
            watcher = vm.watched.watcher.pid
            deadline = time.monotonic() + 5
            while len(opened := list(Path(f"/proc/{watcher}/fd").iterdir())) > 1 and time.monotonic() < deadline:
                time.sleep(0.005)  # it lets go of the pipe that it answered on
            assert len(opened) == 1, "the directory, and nothing else"
            vmm = Path(f"/proc/{vm.watched.vmm.pid}/fd")
            while len(held := sorted(int(fd.name) for fd in vmm.iterdir())) > 3 and time.monotonic() < deadline:
                time.sleep(0.005)  # its loader may be reading the C library
            assert held == [0, 1, 2]
            rss = int(Path(f"/proc/{watcher}/statm").read_text().split()[1]) * 4096
            assert rss < 256 * 1024
    finally:
        os.close(secret)


def test_what_is_in_force_is_in_proc(tmp_path: Path, jail: Jail) -> None:
    with started(tmp_path, ["/bin/sleep", "60"], jail) as vm:
        pid = vm.watched.vmm.pid
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert jail.user is not None
        assert status["Uid"].split() == [str(jail.user.uid)] * 4
        assert status["NSpid"].split()[-1] == "1"
        for namespace in Namespace:
            link = f"ns/{namespace.proc_name}"
            assert os.readlink(f"/proc/{pid}/{link}") != os.readlink(f"/proc/self/{link}"), namespace  # noqa: PTH115


ESCAPES = """
    import ctypes, errno, json, os, resource, socket, sys
    libc = ctypes.CDLL(None, use_errno=True)
    answer = {}

    def attempt(name, action):
        try:
            result = action()
            answer[name] = "done" if result is None else result
        except OSError as exc:
            answer[name] = errno.errorcode[exc.errno]
        except (ValueError, ImportError) as exc:
            answer[name] = str(exc)

    def call(number, *arguments):
        ctypes.set_errno(0)
        if libc.syscall(number, *arguments) < 0:
            code = ctypes.get_errno()
            raise OSError(code, "")

    for path in ("/etc/shadow", "/etc/passwd", "/root", "/home", "/work", "/var", "/sys", "/run", "/dev/mem", "/dev/sda",
                 "/proc/1/root/etc/shadow", "/proc/kcore", SECRET):
        attempt("open " + path, lambda: os.close(os.open(path, os.O_RDONLY)))
    attempt("write /usr", lambda: os.close(os.open("/usr/evil", os.O_WRONLY | os.O_CREAT)))
    attempt("write /", lambda: os.close(os.open("/evil", os.O_WRONLY | os.O_CREAT)))
    attempt("core_pattern", lambda: os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)))
    attempt("processes", lambda: sorted(int(n) for n in os.listdir("/proc") if n.isdigit()))
    attempt("kill host", lambda: os.kill(PARENT, 0))
    attempt("connect", lambda: socket.create_connection(("127.0.0.1", PORT), 2).close())
    attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0ovms-test-PORT".replace("PORT", str(PORT))))
    attempt("interfaces", lambda: [name for _, name in socket.if_nameindex()])
    attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close())
    attempt("setuid", lambda: os.setuid(0))
    attempt("nofile", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100000, 100000)))
    attempt("mount", lambda: call(165, b"x", b"/tmp", b"tmpfs", 0, 0))
    attempt("unshare", lambda: call(272, 0x10000000))
    attempt("clone", lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0))
    attempt("ptrace", lambda: call(101, 0, 0, 0, 0))
    attempt("bpf", lambda: call(321, 0, 0, 0))
    attempt("io_uring", lambda: call(425, 1, 0))
    attempt("keyctl", lambda: call(250, 0, -3))
    attempt("userfaultfd", lambda: call(323, 0))
    attempt("chroot", lambda: os.chroot("/tmp"))
    attempt("mknod", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0)))
    attempt("suid", lambda: [name for name in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount") if os.path.exists(name)
                             and os.spawnv(os.P_WAIT, name, [name, "--version"]) == 0 and os.geteuid() == 0])
    attempt("reopen layer", lambda: os.close(os.open("/proc/self/fd/LAYER", os.O_RDWR)))
    attempt("write layer", lambda: os.write(LAYER, b"x"))
    attempt("chmod layer", lambda: os.fchmod(LAYER, 0o666))
    attempt("write template", lambda: os.pwrite(TEMPLATE, b"x", 0))
    attempt("grow template", lambda: os.ftruncate(TEMPLATE, 1 << 30))
    def shared():
        import mmap
        mmap.mmap(TEMPLATE, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()

    attempt("map template", shared)
    attempt("fill tmp", lambda: os.write(os.open("/tmp/big", os.O_WRONLY | os.O_CREAT), bytes(8 << 20)))
    sys.stderr.write(json.dumps(answer))
"""


@pytest.mark.spec("SEC-7")
def test_it_does_not_get_out(tmp_path: Path, jail: Jail) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o755)
    layer = tmp_path / "layer"
    layer.write_bytes(b"layer" * 1000)
    layer.chmod(0o444)
    image = tmp_path / "image"
    image.write_bytes(b"memory" * 4096)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        layer.open("rb") as opened,
        template.opened(lambda: image, image.stat().st_size, of_bytes(b"x"), ()) as memory,
    ):
        port = server.getsockname()[1]
        abstract.bind(f"\0ovms-test-{port}")
        abstract.listen()
        code = ESCAPES
        for name, value in (
            ("SECRET", repr(str(secret))),
            ("PORT", str(port)),
            ("PARENT", str(os.getpid())),
            ("LAYER", str(opened.fileno())),
            ("TEMPLATE", str(memory)),
        ):
            code = code.replace(name, value)
        handed = {"keep": (opened.fileno(), memory), "read_only": {opened.fileno(): layer}}
        answer = in_jail(tmp_path / "vm", jail, code, **handed)
    assert answer.pop("processes") == [1], "it sees itself alone"
    assert set(answer.pop("interfaces")) <= {"lo", "sit0", "tunl0"}
    assert answer.pop("suid") == []
    assert answer.pop("fill tmp") in ("ENOSPC", 1 << 20)
    assert [name for name, result in answer.items() if result == "done" or not isinstance(result, str)] == [], answer
    assert layer.read_bytes() == b"layer" * 1000
    # it is not just that nothing works in there
    assert answer["connect"] in ("ECONNREFUSED", "ENETUNREACH")
    assert answer["map template"] == "EPERM"
    assert answer["bpf"] == answer["mount"] == answer["unshare"] == "EPERM"


def test_without_a_jail_the_same_attempts_succeed(tmp_path: Path) -> None:
    """The test above can fail."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    code = ESCAPES.replace("SECRET", repr(str(secret))).replace("PARENT", str(os.getpid()))
    # "/evil" and "/usr/evil" would be files of the host's
    for name, value in (
        ("PORT", "1"),
        ("LAYER", "0"),
        ("TEMPLATE", "0"),
        ('/usr/evil"', '/evil"'),
        ('"/evil"', repr(str(tmp_path / "evil"))),
    ):
        code = code.replace(name, value)
    answer = in_jail(tmp_path / "vm", replace(PLAIN, seccomp=False), code)
    assert answer[f"open {secret}"] == answer["open /etc/passwd"] == answer["kill host"] == "done"
    assert len(answer["processes"]) > 1
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("owner", [(0, 0), (4321, 4322), (4321, 0)])
@pytest.mark.parametrize("without", [None, Namespace.USER])
def test_a_directory_to_write_to_is_no_way_out(
    tmp_path: Path, jail: Jail, owner: tuple[int, int], without: Namespace | None
) -> None:
    share = shares.prepare(tmp_path / "share")
    if os.geteuid() == 0:
        for path in (share, *share.iterdir()):
            os.chown(path, *owner, follow_symlinks=False)
        tmp_path.chmod(0o700)  # of the way there the VM sees nothing
    elif owner != (0, 0) or without is not None:
        pytest.skip("only root has directories of others, and jails without a user namespace")
    else:
        owner = (os.geteuid(), os.getegid())
    confined = replace(jail, namespaces=jail.namespaces - {without})
    answer = in_jail(tmp_path / "vm", confined, shares.attempts("/shared/0"), share=share)
    shares.check(share, answer, owner)


def test_a_directory_of_a_user_s_own_is_no_way_out(tmp_path: Path, jail: Jail) -> None:
    """Without a mount that has other owners: what a user has, and the root of a rootless container."""
    share = shares.prepare(tmp_path / "share")
    own = User(os.geteuid(), os.getegid())
    answer = in_jail(tmp_path / "vm", replace(jail, user=own), shares.attempts("/shared/0"), share=share)
    shares.check(share, answer, (own.uid, own.gid))


def test_without_a_jail_the_same_writes_succeed(tmp_path: Path) -> None:
    """The test above can fail."""
    share = shares.prepare(tmp_path / "share")
    answer = in_jail(tmp_path / "vm", replace(PLAIN, seccomp=False), shares.attempts_within(str(share)))
    for name in ("chmod 4755", "openat 4755", "fifo", "socket"):
        assert answer[name] == "done" or isinstance(answer[name], int), answer[name]
    with pytest.raises(AssertionError):
        shares.check(share, answer, (os.geteuid(), os.getegid()))


def test_what_belongs_to_others_is_left_to_them(tmp_path: Path, jail: Jail) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has files of others")
    share = tmp_path / "share"
    share.mkdir()
    for name, uid, gid, mode in (
        ("secret", 4321, 4322, 0o600),
        ("group", 4321, 5001, 0o660),
        ("open", 4321, 4322, 0o666),
        ("shown", 4321, 4322, 0o644),
        ("root", 0, 0, 0o600),
        ("own", 5000, 5001, 0o600),
    ):
        (share / name).write_text("of another")
        os.chown(share / name, uid, gid)
        (share / name).chmod(mode)
    os.chown(share, 5000, 5001)
    answer = in_jail(
        tmp_path / "vm",
        jail,
        """
        import errno, json, os, sys
        answer = {}

        def attempt(name, action):
            try:
                answer[name] = action() or "done"
            except OSError as exc:
                answer[name] = errno.errorcode[exc.errno]

        for name in os.listdir("/shared/0"):
            path = f"/shared/0/{name}"
            attempt(f"{name} read", lambda: open(path).read())
            attempt(f"{name} write", lambda: os.close(os.open(path, os.O_WRONLY)))
            attempt(f"{name} chmod", lambda: os.chmod(path, 0o777))
            attempt(f"{name} chown", lambda: os.chown(path, 1000, 1000))
            attempt(f"{name} remove", lambda: os.unlink(path))
        sys.stderr.write(json.dumps(answer))
        """,
        share=share,
    )
    done = {name for name, result in answer.items() if result in ("done", "of another")}
    own = {f"own {what}" for what in ("read", "write", "chmod", "chown", "remove")}
    assert done == own | {"open read", "shown read", "group read"}, answer
    assert sorted(path.name for path in share.iterdir()) == ["group", "open", "root", "secret", "shown"]
    assert {path.read_text() for path in share.iterdir()} == {"of another"}


def test_the_directory_is_the_one_that_was_opened(tmp_path: Path, jail: Jail) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "mark").touch()
    fd = os.open(share, os.O_PATH)
    try:
        share.rename(tmp_path / "moved")
        share.symlink_to("/etc")
        seen: list[str] = []
        with contextlib.suppress(watch.JailRefused):
            launched = {"shared/0": (fd, share)}
            seen = in_jail(
                tmp_path / "vm",
                jail,
                "import json, os, sys; sys.stderr.write(json.dumps(os.listdir('/shared/0')))",
                shares=launched,
            )
    finally:
        os.close(fd)
    # root has it by the descriptor; a user is refused, whose jail can only go by the name
    assert seen == (["mark"] if os.geteuid() == 0 else [])


def test_another_file_under_a_sealed_one_s_path_is_refused(tmp_path: Path, jail: Jail) -> None:
    (tmp_path / "layer").write_bytes(b"checked")
    tmp_path.chmod(0o755)
    with (tmp_path / "layer").open("rb") as opened:
        (tmp_path / "other").write_bytes(b"swapped")
        (tmp_path / "other").rename(tmp_path / "layer")
        handed = {opened.fileno(): tmp_path / "layer"}
        own = replace(jail, user=User(os.geteuid(), os.getegid()))
        with (
            pytest.raises(watch.JailRefused, match="seal"),
            started(tmp_path / "vm", ["/bin/true"], own, keep=(opened.fileno(),), read_only=handed),
        ):
            pass


@pytest.mark.parametrize("part", list(Namespace))
def test_each_namespace_can_be_left_out_alone(tmp_path: Path, jail: Jail, part: Namespace) -> None:
    namespaces = jail.namespaces - {part}
    needs_root = part is Namespace.USER and os.geteuid() != 0
    if needs_root:
        pytest.skip("only root makes namespaces without a user namespace")
    own_root = not {Namespace.MOUNT, Namespace.PID} - namespaces
    with started(tmp_path, ["/bin/sleep", "60"], replace(jail, namespaces=namespaces, own_root=own_root)) as vm:
        for namespace in Namespace:
            link = f"ns/{namespace.proc_name}"
            own = os.readlink(f"/proc/{vm.watched.vmm.pid}/{link}") != os.readlink(f"/proc/self/{link}")  # noqa: PTH115
            assert own == (namespace in namespaces), namespace


def test_a_jail_that_cannot_be_made_is_said_and_leaves_nothing(tmp_path: Path, jail: Jail) -> None:
    # a root of its own in the host's mount namespace would be everybody's
    shared = replace(jail, namespaces=jail.namespaces - {Namespace.MOUNT})
    with pytest.raises(watch.JailRefused, match="root: Invalid") as caught, started(tmp_path, ["/bin/true"], shared):
        pass
    assert not VmFiles(tmp_path).pid.exists()
    assert caught.value.code == "host"


def test_a_template_is_shared_by_those_who_hold_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"memory" * 4096)
    digest, size = of_bytes(b"snapshot"), image.stat().st_size

    def unwanted() -> Path:
        raise AssertionError("it is there")

    with (
        template.opened(lambda: image, size, digest, ()) as first,
        started(tmp_path / "vm", ["/bin/sleep", "60"], hold=(first,)) as vm,
    ):
        inode = os.fstat(first).st_ino
        pid = vm.watched.watcher.pid
        with template.opened(unwanted, size, digest, (Holder(1), Holder(pid))) as second:
            assert os.fstat(second).st_ino == inode
        other_digest = of_bytes(b"another")
        with template.opened(lambda: image, size, other_digest, (Holder(pid), Holder(pid, inode + 1))) as other:
            assert os.fstat(other).st_ino != inode
        with template.opened(unwanted, size, other_digest, (Holder(pid, inode),)) as same:
            assert os.fstat(same).st_ino == inode
        with template.opened(lambda: image, size + 4096, digest, (Holder(pid),)) as larger:
            assert os.fstat(larger).st_ino != inode
    assert ProcessId.of(vm.watched.watcher.pid) is None
