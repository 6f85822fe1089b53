"""Starting, finding and ending other programs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ovms import process
from ovms.errors import HostError, ToolMissing
from ovms.process import ProcessId


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def until(condition: object, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- find_tool -----------------------------------------------------------------------------------------------------


def program(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("tool", "package"),
    [("qemu-img", "qemu-utils"), ("qemu-system-x86_64", "qemu-system-x86"), ("no-such-tool", "no-such-tool")],
)
def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tool: str, package: str) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(process, "CLEAN_ENV", {"PATH": "/nonexistent"})
    with pytest.raises(ToolMissing, match=f"{tool} is not installed") as info:
        process.find_tool(tool)
    assert info.value.hint is not None
    assert package in info.value.hint
    assert info.value.context == {"tool": tool, "package": package}


def test_the_caller_s_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = program(tmp_path / "bin" / "sh")
    monkeypatch.setenv("PATH", str(mine.parent))
    assert process.find_tool("sh") == mine
    monkeypatch.setenv("PATH", str(tmp_path))
    assert process.find_tool("sh").is_absolute()


def test_a_relative_path_entry_gives_an_absolute_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = program(tmp_path / "bin" / "mytool")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin")
    # spawn starts programs in another directory, where a relative name is nothing
    assert process.find_tool("mytool") == mine


# --- run -----------------------------------------------------------------------------------------------------------


def test_run_gives_what_the_program_said() -> None:
    done = process.run(["sh", "-c", "cat; echo err >&2; exit 3"], timeout=10, check=False, input=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in", b"err\n")
    assert done.argv[0] == "sh"


def test_run_has_a_clean_environment_and_no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "leaks")
    monkeypatch.setenv("LD_PRELOAD", "")
    done = process.run(["/usr/bin/env"], timeout=10, env={"MORE": "1"})
    assert set(done.stdout.decode().split()) == {*(f"{k}={v}" for k, v in process.CLEAN_ENV.items()), "MORE=1"}
    assert process.run(["cat"], timeout=10).stdout == b""


def test_a_failure_tells_the_command_its_end_and_its_last_words() -> None:
    with pytest.raises(HostError, match=r"sh -c 'echo first.*' failed \(exit code 2\): first; second"):
        process.run(["sh", "-c", "echo first >&2; echo second >&2; exit 2"], timeout=10)
    with pytest.raises(HostError, match=r"\(signal SIGKILL\): it said nothing"):
        process.run(["sh", "-c", "kill -9 $$"], timeout=10)


def test_a_program_that_takes_too_long_is_killed_and_reaped(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    begin = time.monotonic()
    with pytest.raises(HostError, match=r"did not end within 0\.3 s"):
        process.run(["sh", "-c", f"echo $$ > {pid}; exec sleep 60"], timeout=0.3)
    assert time.monotonic() - begin < 10
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.parametrize("argv", [["/no/such/program"], ["/etc/passwd"], ["/"]])
def test_what_cannot_be_started(argv: list[str]) -> None:
    with pytest.raises(HostError, match="cannot run"):
        process.run(argv, timeout=5)
    with pytest.raises(HostError, match="cannot run"):
        process.spawn(argv)


def test_tail_is_one_short_printable_line() -> None:
    assert process.tail(b"a\x1b[31m\n\n  b\xff\n") == "a?[31m; b\ufffd"
    assert process.tail(b" \n ") == "it said nothing"
    assert len(process.tail(b"x" * 100_000)) == process.STDERR_TAIL


def test_describe_exit() -> None:
    assert process.describe_exit(0) == "exit code 0"
    assert process.describe_exit(-11) == "signal SIGSEGV"
    assert process.describe_exit(-200) == "signal 200"


# --- spawn ---------------------------------------------------------------------------------------------------------


def test_spawn_passes_these_descriptors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "leaks")
    (read, write), (other, _) = os.pipe(), os.pipe()
    os.set_inheritable(other, True)
    code = f"""if True:
        import os
        fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
        here = [fd for fd in fds if os.path.exists(f"/proc/self/fd/{{fd}}")]
        os.write({write}, repr((here, os.getcwd(), "SECRET" in os.environ, os.read(0, 1))).encode())
        """
    child = process.spawn(python(code), pass_fds=[write])
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert file.read() == repr(([0, 1, 2, write], "/", False, b"")).encode()
    assert child.wait() == 0
    os.close(other)
    os.close(_)


@pytest.mark.parametrize("detach", [True, False])
def test_detach_gives_a_session_of_its_own(detach: bool) -> None:
    child = process.spawn(["sleep", "60"], detach=detach)
    try:
        assert (os.getsid(child.pid) == child.pid) is detach
    finally:
        process.terminate(child)


def test_a_detached_program_outlives_its_starter(tmp_path: Path) -> None:
    code = f"""if True:
        from ovms import process
        child = process.spawn(["sleep", "60"], detach=True)
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        import os; os.kill(0, 9)
        """
    starter = subprocess.Popen(python(code), start_new_session=True)
    starter.wait()
    assert starter.returncode == -9
    identity = ProcessId.of(int((tmp_path / "pid").read_text()))
    assert identity is not None
    assert identity.alive()
    identity.kill()
    assert not identity.alive()


# --- identities ----------------------------------------------------------------------------------------------------


def test_a_process_is_known_until_it_ends() -> None:
    child = process.spawn(["sleep", "60"])
    identity = ProcessId.of(child.pid)
    assert identity is not None
    assert identity.alive()
    assert not identity.wait(0)
    assert identity.signal(signal.SIGTERM)
    assert identity.wait(10)
    # a zombie has ended, though nobody has reaped it
    assert Path(f"/proc/{child.pid}").exists()
    assert not identity.alive()
    assert ProcessId.of(child.pid) is None
    assert identity.open() is None
    assert not identity.signal(signal.SIGTERM)
    assert identity.wait(0)
    assert process.reap(child.pid) == -signal.SIGTERM
    assert process.reap(child.pid) is None
    assert not identity.alive()
    child.wait()


def test_a_later_process_of_the_same_number_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    child = process.spawn(["sleep", "60"])
    try:
        identity = ProcessId.of(child.pid)
        assert identity is not None
        for other in (
            replace(identity, start_time=identity.start_time - 1),
            replace(identity, boot_id="00000000-0000-0000-0000-000000000000"),
        ):
            assert not other.alive()
            assert other.open() is None
            assert not other.signal(signal.SIGKILL)
            assert other.wait(0)
            other.kill()
        assert child.poll() is None, "another process was killed"
    finally:
        process.terminate(child)


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1])
def test_there_is_no_such_process(pid: int) -> None:
    assert ProcessId.of(pid) is None
    identity = ProcessId(pid, 1, process.boot_id())
    assert not identity.alive()
    assert identity.open() is None
    assert not identity.signal(signal.SIGTERM)


def test_too_few_descriptors_are_not_the_end_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = ProcessId.of(os.getpid())
    assert identity is not None

    def fail(pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", fail)
    for call in (identity.open, lambda: identity.wait(0), lambda: identity.signal(signal.SIGWINCH)):
        with pytest.raises(HostError, match="Too many open files"):
            call()


def test_a_name_with_parentheses_and_spaces(tmp_path: Path) -> None:
    tool = tmp_path / "a) Z 1 (b"
    tool.symlink_to("/bin/sleep")
    child = process.spawn([tool, "60"])
    try:
        # its name is the shell's until exec is done
        until(lambda: b"a) Z 1" in Path(f"/proc/{child.pid}/stat").read_bytes())
        identity = ProcessId.of(child.pid)
        assert identity is not None
        boot = float(Path("/proc/uptime").read_text().split()[0])
        assert abs(identity.start_time / os.sysconf("SC_CLK_TCK") - boot) < 30
    finally:
        process.terminate(child)


def test_kill_reaps_a_child() -> None:
    child = process.spawn(["sleep", "60"])
    identity = ProcessId.of(child.pid)
    assert identity is not None
    identity.kill()
    assert not Path(f"/proc/{child.pid}").exists()
    child.wait()


def test_kill_says_when_a_process_does_not_die(monkeypatch: pytest.MonkeyPatch) -> None:
    child = process.spawn(["sleep", "60"])
    try:
        identity = ProcessId.of(child.pid)
        assert identity is not None
        monkeypatch.setattr(signal, "pidfd_send_signal", lambda fd, number: None)
        with pytest.raises(HostError, match="does not die"):
            identity.kill(timeout=0.05)
    finally:
        process.terminate(child)


def test_terminate_asks_first_and_then_insists(tmp_path: Path) -> None:
    polite = process.spawn(["sleep", "60"])
    assert process.terminate(polite) == -signal.SIGTERM
    ready = tmp_path / "ready"
    deaf = process.spawn(["sh", "-c", f"trap '' TERM; touch {ready}; while :; do sleep 0.01; done"])
    until(ready.exists)
    assert process.terminate(deaf, grace=0.1) == -signal.SIGKILL
    assert process.terminate(deaf) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("uid", "known", "root"),
    [
        (0, "         0          0 4294967295\n", True),
        (0, None, True),
        (0, "         0       1000          1\n", False),
        (0, "         0       1000          1\n         1     100000      65536\n", False),
        (1000, "         0          0 4294967295\n", False),
    ],
)
def test_root_is_who_can_become_anybody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, known: str | None, root: bool
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    if known is not None:
        (tmp_path / "uid_map").write_text(known)
    assert process.is_root(tmp_path) is root
