"""A Debian guest that runs qemu-guest-agent: exec, cp, shutdown; after a restore, too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests
from support.cli import Ovm
from support.faulty import wait_until
from support.server import Server

from ovms.runtime import quiesce
from ovms.runtime.agent import Agent
from ovms.runtime.root import Root
from ovms.runtime.runtime import Runtime

#: Few in the usual run: each is another moment.
KILLS = int(os.environ.get("OVMS_KILLS", "4"))
MAKE = Path(__file__).parents[2] / "demo" / "make_images.py"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ovm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ovm]:
    """With a VM "web" whose agent answers."""
    done = subprocess.run([sys.executable, MAKE, "--agent"], stdout=subprocess.PIPE, text=True, check=True, timeout=800)
    root, home = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("home")
    ovm = Ovm(root, home)
    ovm.ok("build", f"{done.stdout.splitlines()[-1]}/manifest.yaml", "-t", "agent:1")
    ovm.ok("run", "-d", "--name", "web", "--memory", "256m", "agent:1")
    yield ovm
    ovm("rm", "-f", *ovm("ps", "-aq").out.split())
    assert guests.qemu_children(root) == []


def started(ovm: Ovm) -> None:
    # init has made what it makes at boot
    ovm.ok("exec", "--wait", "120", "web", "--", "sh", "-c", "until [ -d /run/lock ]; do sleep 0.1; done", timeout=150)


def execute(ovm: Ovm, *words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    with ovm.popen("exec", *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        out, err = running.communicate(stdin, timeout=120)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def test_what_a_program_says_and_how_it_ends(ovm: Ovm) -> None:
    started(ovm)
    assert ovm.ok("exec", "web", "cat", "/etc/hostname").out == "localhost\n"
    done = ovm("exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n")
    assert ovm("exec", "web", "--", "sh", "-c", "kill -KILL $$").code == 137
    done = ovm("exec", "--json", "-e", "A=one two", "-w", "/etc", "web", "--", "sh", "-c", "echo $A; pwd; exit 3")
    assert (done.code, done.json) == (
        3, {"exit_code": 3, "stdout": "one two\n/etc\n", "stderr": "", "truncated": False},
    )  # fmt: skip
    done = ovm("exec", "-w", "/nowhere", "web", "--", "true")
    assert done.code != 0
    assert "nowhere" in done.err


def test_what_cannot_be_run(ovm: Ovm) -> None:
    started(ovm)
    done = ovm("exec", "--json", "web", "--", "no-such-program")
    assert (done.code, done.error["code"]) == (127, "guest-failed")
    assert ovm("exec", "web", "--", "/etc/passwd").code == 126
    done = ovm("exec", "-t", "--json", "web", "--", "sh")
    assert (done.code, done.error["code"]) == (3, "unsupported")
    assert "ovm console" in done.error["hint"]


def test_bytes_go_in_and_out(ovm: Ovm) -> None:
    started(ovm)
    data = os.urandom(300_000)
    done = execute(ovm, "-i", "web", "--", "cat", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")
    done = execute(ovm, "web", "--", "head", "-c", "17000000", "/dev/zero")
    assert (done.returncode, len(done.stdout)) == (0, 16 << 20)
    assert b"more than" in done.stderr


def test_an_interrupt_ends_the_program_in_the_guest(ovm: Ovm) -> None:
    started(ovm)
    look = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done | grep -c '^sleep 4242' || true"
    for number in (signal.SIGINT, signal.SIGTERM):
        with ovm.popen("exec", "web", "--", "sleep", "4242", stderr=subprocess.DEVNULL) as running:
            time.sleep(1.0)
            assert ovm.ok("exec", "web", "--", "sh", "-c", look).out == "1\n"
            running.send_signal(number)
            assert running.wait(60) == 128 + number
        assert ovm.ok("exec", "web", "--", "sh", "-c", look).out == "0\n"
    assert ovm("exec", "--timeout", "0.5", "--json", "web", "--", "sleep", "4242").error["code"] == "guest-timeout"
    assert ovm.ok("exec", "web", "--", "sh", "-c", look).out == "0\n"


def test_files_go_in_and_out(ovm: Ovm, tmp_path: Path) -> None:
    started(ovm)
    source = tmp_path / "tool"
    source.write_bytes(os.urandom(2_500_000))
    source.chmod(0o751)
    ovm.ok("cp", source, "web:/srv")
    assert ovm.ok("exec", "web", "stat", "-c", "%a %s %U", "/srv/tool").out == "751 2500000 root\n"
    assert ovm.ok("cp", "web:/srv/tool", tmp_path / "back", "--json").json["target"] == str(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert (tmp_path / "back").stat().st_mode & 0o100
    (tmp_path / "empty").write_bytes(b"")
    ovm.ok("cp", tmp_path / "empty", "web:/srv/tool")
    assert ovm.ok("exec", "web", "sh", "-c", "stat -c %s /srv/tool; ls -A /srv | grep -c tmp || true").out == "0\n0\n"
    ovm.ok("cp", "web:/proc/version", tmp_path)
    assert (tmp_path / "version").read_text().startswith("Linux version")
    for words, code in (
        (("web:/nothing", tmp_path), 4),
        (("web:/dev/zero", tmp_path), 3),
        ((tmp_path / "nothing", "web:/srv"), 3),
        ((source, "web:/nowhere/x"), 4),
        ((source, "web:root"), 3),
        ((source, tmp_path / "x"), 2),
        (("web:/a", "web:/b"), 2),
    ):
        assert ovm("cp", *words).code == code, words
    # a full file system in the guest
    done = ovm(
        "exec", "web", "--", "sh", "-c", "mkdir /run/small && busybox mount -t tmpfs -o size=1m small /run/small"
    )
    assert done.code == 0
    done = ovm("cp", "--json", source.with_name("back"), "web:/run/small/x")
    assert (done.code, done.error["code"]) == (13, "guest-failed")
    assert ovm.ok("exec", "web", "--", "ls", "-A", "/run/small").out == ""


def test_directories_go_in_and_out(ovm: Ovm, tmp_path: Path) -> None:
    started(ovm)
    source = tmp_path / "site"
    (source / "sub" / ("d" * 150)).mkdir(parents=True)
    (source / "sub" / ("d" * 150) / "x").write_text("x")
    (source / "big").write_bytes(os.urandom(3_000_000))
    (source / "tool").write_text("#!/bin/sh\n")
    (source / "tool").chmod(0o751)
    (source / "link").symlink_to("sub")
    ovm.ok("cp", source, "web:/srv")
    assert ovm.ok("exec", "web", "stat", "-c", "%a %s %U", "/srv/site/tool").out == "751 10 root\n"
    done = ovm.ok("cp", "--json", "web:/srv/site", tmp_path / "back")
    assert (done.json["target"], done.json["files"]) == (str(tmp_path / "back"), 3)
    subprocess.run(["diff", "-r", "--no-dereference", source, tmp_path / "back"], check=True)
    # what is in it goes into what is there
    ovm.ok("cp", f"{source}/.", "web:/srv/site/sub")
    ovm.ok("cp", "web:/srv/site/.", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "big").read_bytes() == (source / "big").read_bytes()
    # links out of it, and a device
    ovm.ok("exec", "web", "--", "sh", "-c", "cd /srv/site && ln -s /etc/passwd out && mknod null c 1 3")
    done = ovm.ok("cp", "--json", "web:/srv/site", tmp_path)
    assert (done.json["left_out"], done.json["target"]) == (2, str(tmp_path / "site"))
    assert "left out" in done.err
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["big", "link", "sub", "tool"]
    ovm.ok("cp", "web:/etc", tmp_path / "etc")
    assert (tmp_path / "etc" / "passwd").read_text().startswith("root:")
    for words, code in ((("web:/etc", tmp_path / "back" / "tool"), 3), ((source, "web:/nowhere/x"), 4)):
        assert ovm("cp", *words).code == code, words
    # no room in the guest
    ovm.ok("exec", "web", "--", "sh", "-c", "mkdir /run/little && busybox mount -t tmpfs -o size=1m little /run/little")
    done = ovm("cp", "--json", source, "web:/run/little")
    assert (done.code, done.error["code"]) == (13, "guest-failed")
    assert ovm.ok("exec", "web", "--", "ls", "-A", "/run/little").out == ""
    assert ovm.ok("exec", "web", "--", "sh", "-c", "ls -A /srv /var/tmp | grep -c tmp$ || true").out == "0\n"


def frozen(ovm: Ovm) -> bool:
    """Whether a write waits for a thaw."""
    look = "sync -f /srv; echo x > /srv/probe & sleep 1; kill -0 $! 2>/dev/null && echo frozen; true"
    return "frozen" in ovm.ok("exec", "web", "--", "sh", "-c", look).out


def test_a_commit_and_an_export_freeze_the_file_systems(ovm: Ovm, tmp_path: Path) -> None:
    started(ovm)
    write = (
        "cd /srv && echo committed > fresh && dd if=/dev/zero of=dirty bs=1M count=8 2>/dev/null && echo end >> dirty"
    )
    ovm.ok("exec", "web", "--", "sh", "-c", write)
    done = ovm.ok("commit", "--json", "web", "-t", "agent:frozen")
    assert done.json["not_frozen"] is None
    assert "power failure" not in done.err
    target = tmp_path / "disk.img"
    assert ovm.ok("export", "--json", "web", "-o", target).json["not_frozen"] is None
    # nothing to be mended, and all there
    assert subprocess.run(["/sbin/e2fsck", "-fn", target], check=False, capture_output=True).returncode == 0
    for name in ("agent:frozen", target):
        if name != target:
            ovm.ok("export", name, "-o", tmp_path / "committed.img")
        image = target if name == target else tmp_path / "committed.img"
        read = subprocess.run(["/sbin/debugfs", "-R", "cat /srv/fresh", image], capture_output=True, check=True)
        assert read.stdout == b"committed\n"
    done = ovm.ok("commit", "--no-freeze", "--json", "web", "-t", "agent:torn")
    assert done.json["not_frozen"] == "it was not asked for"
    assert "power failure" not in done.err
    ovm.ok("pause", "web")
    done = ovm.ok("commit", "--json", "web", "-t", "agent:torn")
    assert done.json["not_frozen"] == "the instance is paused"
    assert "as after a power failure" in done.err
    ovm.ok("resume", "web")
    assert not frozen(ovm)


def test_a_guest_that_was_left_frozen_is_thawed_by_the_next_command(ovm: Ovm) -> None:
    started(ovm)
    runtime = Runtime(Root(Path(ovm.root)))
    record = runtime.instances.find("web")
    with runtime.instances.locked(record) as newest, runtime.instances.control(newest) as control:
        keep = quiesce.file_systems(runtime.instances, newest, control)
        _, why = keep.__enter__()  # and never left: as one who is killed
        assert why is None
    noted = runtime.instances.find("web").fs_frozen
    with Agent(runtime.instances.files(record)) as agent:
        assert (noted, agent.execute("guest-fsfreeze-status")) == (True, "frozen")
    ovm.ok("ps")
    assert not runtime.instances.find("web").fs_frozen
    with Agent(runtime.instances.files(record)) as agent:
        assert agent.execute("guest-fsfreeze-status") == "thawed"
    assert not frozen(ovm)


def test_a_guest_is_thawed_whenever_a_commit_is_killed(ovm: Ovm) -> None:
    """By the next command, and by a server that runs."""
    started(ovm)
    runtime = Runtime(Root(Path(ovm.root)))
    record = runtime.instances.find("web")
    rng, found = random.Random(14), 0

    def commit_and_kill() -> bool:
        with ovm.popen("commit", "web", "-t", "agent:killed", stdout=subprocess.DEVNULL) as working:
            deadline = time.monotonic() + 60
            while not (noted := runtime.instances.find("web").fs_frozen) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.2)  # it takes some time until the guest is
            working.kill()
        return noted and runtime.instances.find("web").fs_frozen

    for _ in range(KILLS):
        found += commit_and_kill()
        ovm.ok("ps")
        with Agent(runtime.instances.files(record)) as agent:
            assert agent.execute("guest-fsfreeze-status") == "thawed"
    server = Server(Path(ovm.root))
    try:
        for _ in range(KILLS):
            found += commit_and_kill()
            wait_until(lambda: not runtime.instances.find("web").fs_frozen, 20)
            with Agent(runtime.instances.files(record)) as agent:
                assert agent.execute("guest-fsfreeze-status") == "thawed"
    finally:
        assert server.close() == 0
    assert found > 0
    assert not frozen(ovm)


def test_a_clone_answers_and_so_does_what_it_was_made_of(ovm: Ovm) -> None:
    started(ovm)
    with ovm.popen("exec", "web", "--", "sh", "-c", "sleep 3; echo done", stdout=subprocess.PIPE) as running:
        time.sleep(0.7)  # the snapshot comes amid a session
        ovm.ok("snapshot", "web", "-t", "agent:warm")
        out, _ = running.communicate(timeout=60)
    assert (running.returncode, out) == (0, b"done\n")
    for name in ("one", "two"):
        assert ovm.ok("run", "-d", "--json", "--name", name, "agent:warm").json["restored"]
    for name in ("one", "two", "web"):
        assert ovm.ok("exec", name, "--", "sh", "-c", f"echo {name} > /srv/name; cat /srv/name").out == f"{name}\n"
    ovm.ok("snapshot", "one", "-t", "agent:third")
    ovm.ok("run", "-d", "--name", "three", "agent:third")
    assert ovm.ok("exec", "three", "--", "cat", "/srv/name").out == "one\n"
    ovm.ok("stop", "-t", "0", "one", "two")
    stopped = ovm.ok("stop", "--agent", "-t", "60", "--json", "three", timeout=90).json
    assert stopped[0]["ending"] == "powered-off"
    done = ovm("exec", "--json", "three", "--", "true")
    assert (done.code, done.error["code"]) == (5, "state-conflict")


def test_killed_amid_a_copy(ovm: Ovm, tmp_path: Path) -> None:
    started(ovm)
    (tmp_path / "big").write_bytes(bytes(20 << 20))
    with ovm.popen("cp", tmp_path / "big", "web:/srv/big") as running:
        time.sleep(1.5)
        running.kill()
    assert ovm.ok("exec", "web", "--", "sh", "-c", "[ -e /srv/big ] || echo none").out == "none\n"
    with ovm.popen("cp", tmp_path / "big", "web:/srv/big", stderr=subprocess.DEVNULL) as running:
        time.sleep(1.5)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    left = ovm.ok("exec", "web", "--", "sh", "-c", "ls -A /srv | grep -c '^.big' || true").out
    assert left == "1\n", "what the killed one left; the interrupted one left nothing"


def test_a_kernel_that_panics_ends_its_vm_and_is_told(ovm: Ovm) -> None:
    ovm.ok("run", "-d", "--name", "doomed", "--memory", "256m", "agent:1")
    with ovm.popen(
        "exec",
        "--wait",
        "120",
        "doomed",
        "--",
        "sh",
        "-c",
        "sleep 1; echo c > /proc/sysrq-trigger",
        stderr=subprocess.DEVNULL,
    ):
        deadline = time.monotonic() + 200
        while (told := ovm.ok("inspect", "doomed").json)["state"] != "error":
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
    assert (told["ending"], told["error"]["detail"]) == ("panicked", "the guest panicked")
    assert "Error (the guest panicked)" in ovm.ok("ps", "-a").out
    assert "Kernel panic - not syncing: sysrq triggered crash" in ovm.ok("logs", "doomed").out
