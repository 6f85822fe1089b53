"""What a user does with ``ovm``, on the bare guest."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests
from support.cli import OVM, Ovm
from support.guests import Console

RUN = ("run", "-d", "--accel", "tcg", "--memory", "32m")


def console(ovm: Ovm, instance_id: str) -> Console:
    return Console(ovm.root / "instances" / instance_id)


def start(ovm: Ovm, *options: object, ref: str = "echo:1") -> Console:
    instance_id = ovm.ok(*RUN, *options, ref).out.strip()
    terminal = console(ovm, instance_id)
    terminal.wait_for("READY")
    return terminal


@pytest.fixture
def built(ovm: Ovm, project: Path) -> str:
    return ovm.ok("build", project, "-t", "echo:1", "--no-provenance").out.strip()


# --- artifacts ---------------------------------------------------------------------------------------------------


def test_build_prints_the_digest_and_ls_shows_it(ovm: Ovm, built: str, project: Path) -> None:
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", built)
    assert ovm.ok("build", project, "--no-provenance").out.strip() == built
    lines = ovm.ok("ls").out.splitlines()
    assert lines[0].split() == ["NAME", "DIGEST", "CREATED", "SIZE", "RAM", "SNAPSHOT"]
    assert lines[1].split()[:2] == ["echo:1", built[7:19]]
    (entry,) = ovm.ok("ls", "--json").json
    assert (entry["name"], entry["digest"]) == ("echo:1", built)


def test_inspect_shows_both_manifests_and_the_raw_bytes(ovm: Ovm, built: str) -> None:
    value = ovm.ok("inspect", "echo:1").json
    assert value["digest"] == built
    assert value["manifest"]["name"] == "echo"
    assert json.loads(ovm.ok("inspect", "--raw", built[7:19]).out) == value["oci"]


def test_tag_and_rmi(ovm: Ovm, built: str) -> None:
    ovm.ok("tag", "echo:1", "localhost:5000/team/echo:2")
    assert {e["name"] for e in ovm.ok("ls", "--json").json} == {"echo:1", "localhost:5000/team/echo:2"}
    ovm.ok("rmi", "echo:1")
    assert ovm.ok("inspect", built).json["digest"] == built
    ovm.ok("rmi", built)
    assert ovm.ok("ls", "--json").json == []
    assert list((ovm.root / "store" / "blobs" / "sha256").iterdir()) == []


def test_rmi_by_name_and_digest_takes_that_name_alone(ovm: Ovm, built: str) -> None:
    ovm.ok("tag", "echo:1", "localhost:5000/team/echo:2")
    assert ovm("rmi", f"other@{built}").code == 4
    ovm.ok("rmi", f"localhost:5000/team/echo@{built}")
    assert [e["name"] for e in ovm.ok("ls", "--json").json] == ["echo:1"]


def test_run_from_a_place_on_disk(ovm: Ovm, built: str, tmp_path: Path) -> None:
    place = f"oci-archive:{tmp_path / 'echo.tar'}"
    ovm.ok("push", "echo:1", place)
    ovm.ok("push", "echo:1", f"oci:{tmp_path / 'layout'}:x")
    ovm.ok("rmi", "echo:1")
    start(ovm, "--name", "named", ref=place)
    (entry,) = ovm.ok("ls", "--json").json
    assert (entry["name"], entry["digest"]) == ("echo:1", built)
    ovm.ok("rmi", "-f", "echo:1")
    # without a name: the instance keeps it
    start(ovm, "--name", "nameless", "--platform", "linux/amd64", ref=f"oci:{tmp_path / 'layout'}:x")
    assert ovm.ok("ls", "--json").json == []
    ovm.ok("rm", "-f", "named")
    ovm.ok("tag", built, "again:1")
    ovm.ok("rmi", "-f", "again:1")
    assert (ovm.root / "store/blobs/sha256" / built[7:]).exists()
    ovm.ok("rm", "-f", "nameless")


def test_an_artifact_in_use_stays(ovm: Ovm, built: str) -> None:
    terminal = start(ovm, "--name", "user")
    done = ovm("rmi", "echo:1", "--json")
    assert (done.code, done.error["code"]) == (5, "in-use")
    assert "user" in done.error["hint"]
    ovm.ok("rmi", "-f", "echo:1")
    assert terminal.ping() == 1
    assert len(list((ovm.root / "store" / "blobs" / "sha256").iterdir())) == 4
    ovm.ok("rm", "-f", "user")
    ovm.ok("build", Path(terminal.files.directory).parents[2] / "project" / "ovms.yaml", "-t", "x")
    ovm.ok("rmi", "x")
    assert list((ovm.root / "store" / "blobs" / "sha256").iterdir()) == []


# --- instances ---------------------------------------------------------------------------------------------------


def test_run_ps_logs_stop_rm(ovm: Ovm, built: str) -> None:
    terminal = start(ovm, "--name", "web", "-p", "80")
    head, row = ovm.ok("ps").out.splitlines()
    assert head.split() == ["INSTANCE", "ID", "NAME", "ARTIFACT", "CREATED", "STATUS", "PORTS"]
    assert " Up " in row
    assert re.search(r"127\.0\.0\.1:\d+->80/tcp", row)
    assert ovm.ok("logs", "web").out == "READY\n"
    assert terminal.ping() == 1
    assert ovm.ok("logs", "-n", "1", "web").out == "PONG 00000001\n"
    assert ovm.ok("stop", "web").out == "web\n"
    assert ovm.ok("ps").out.splitlines() == [head.rstrip()] or len(ovm.ok("ps").out.splitlines()) == 1
    assert "Exited (powered off)" in ovm.ok("ps", "-a").out
    assert ovm.ok("rm", "web").out == "web\n"
    assert ovm.ok("ps", "-a", "--json").json == []


def test_an_instance_is_found_by_the_first_digits_of_its_id(ovm: Ovm, built: str) -> None:
    start(ovm, "--name", "web")
    (instance,) = ovm.ok("ps", "--json").json
    shown = ovm.ok("inspect", instance["instance_id"][:6]).json
    assert shown["name"] == "web"
    assert set(shown["metrics"]) >= {"memory_bytes", "cpu_ms", "disk_read_bytes", "disk_written_bytes"}
    assert (instance["state"], instance["accel"], instance["memory"]) == ("running", "tcg", 32 << 20)


def test_logs_follow_until_the_vm_ends(ovm: Ovm, built: str) -> None:
    terminal = start(ovm, "--name", "web")
    with ovm.popen("logs", "-f", "web", stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"READY\n"
        terminal.send("\n")
        assert follower.stdout.readline() == b"PONG 00000001\n"
        terminal.send("q")
        assert follower.stdout.read() == b""
        assert follower.wait(20) == 0
    record = json.loads(ovm.ok("logs", "--json", "web").out.splitlines()[0])
    assert (record["stream"], record["text"]) == ("console", "READY")


def test_snapshot_and_restore(ovm: Ovm, built: str) -> None:
    terminal = start(ovm, "--name", "web")
    assert [terminal.ping(), terminal.ping()] == [1, 2]
    taken = ovm.ok("snapshot", "web", "-t", "echo:warm", "--json").json
    assert (taken["name"], taken["pushed"]) == ("echo:warm", False)
    ovm.ok("stop", "-t", "0", "web")
    ovm.ok("rm", "web")
    answer = ovm.ok("run", "-d", "--json", "--accel", "tcg", "echo:warm").json
    assert answer["restored"]
    assert console(ovm, answer["instance_id"]).ping() == 3
    meta = ovm.ok("inspect", "echo:warm").json["ram_snapshot"]
    assert (meta["vmm"]["name"], meta["source"]) == ("qemu", built)


def test_a_snapshot_without_a_name_is_kept_by_its_digest(ovm: Ovm, built: str) -> None:
    assert start(ovm, "--name", "web").ping() == 1
    digest = ovm.ok("snapshot", "web").out.strip()
    ovm.ok("rm", "-f", "web")
    ovm.ok("prune")
    clone = ovm.ok("run", "-d", "--restore", "require", digest).out.strip()
    assert console(ovm, clone).ping() == 2


def test_killing_ovm_run_leaves_a_vm_that_ps_shows_and_stop_stops(ovm: Ovm, built: str) -> None:
    with ovm.popen(
        "run", "--accel", "tcg", "--memory", "32m", "--name", "web", "echo:1", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as foreground:  # fmt: skip
        assert foreground.stdout is not None
        assert foreground.stdout.readline() == b"READY\n"
        os.kill(foreground.pid, signal.SIGKILL)
    assert "Up" in ovm.ok("ps").out
    assert ovm.ok("stop", "--json", "web").json[0]["ending"] == "powered-off"


# --- the foreground ----------------------------------------------------------------------------------------------


class Terminal:
    """``ovm`` on a terminal of its own."""

    def __init__(self, ovm: Ovm, *arguments: str) -> None:
        self.fd, theirs = pty.openpty()
        # setsid makes the terminal its controlling one, so that ^C typed there is a SIGINT
        self.process = subprocess.Popen(
            ["setsid", "--ctty", OVM, *arguments], env=ovm.env(), stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.said = b""

    def wait_for(self, text: bytes, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.said:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not in {self.said!r}"
            try:
                data = os.read(self.fd, 4096)
            except OSError:
                data = b""
            assert data, f"{text!r} is not in {self.said!r}"
            self.said += data

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def end(self, timeout: float = 20) -> int:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None  # looked at before the last read, so nothing is missed
            while select.select([self.fd], [], [], 0.02)[0]:
                try:
                    self.said += os.read(self.fd, 4096)
                except OSError:  # EIO: nobody has the other end any more
                    break
            if ended:
                return self.process.returncode
            time.sleep(0.01)
        raise AssertionError(f"ovm does not end; it said {self.said!r}")


@pytest.fixture
def terminal(ovm: Ovm, built: str) -> Iterator[Terminal]:
    terminal = Terminal(ovm, "run", "--accel", "tcg", "-m", "32m", "--rm", "--name", "fg", "echo:1")
    terminal.wait_for(b"READY")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.fd)


def test_keys_go_to_the_guest_and_ctrl_c_powers_it_down(ovm: Ovm, terminal: Terminal) -> None:
    terminal.type(b"\n")
    terminal.wait_for(b"PONG 00000001")
    terminal.type(b"\x03")
    assert terminal.end() == 0
    assert b"power down" in terminal.said
    assert ovm.ok("ps", "-aq").out == ""


def test_a_second_ctrl_c_ends_a_guest_that_does_not_listen(ovm: Ovm, terminal: Terminal) -> None:
    terminal.type(b"i")
    time.sleep(0.2)
    terminal.type(b"\x03")
    terminal.wait_for(b"once more")
    terminal.type(b"\x03")
    assert terminal.end() == 137
    assert ovm.ok("ps", "-aq").out == ""


def test_the_foreground_ends_with_the_guest(terminal: Terminal) -> None:
    terminal.type(b"q")
    assert terminal.end() == 0


def test_the_foreground_sees_a_vmm_that_dies(ovm: Ovm, terminal: Terminal) -> None:
    (instance,) = ovm.ok("ps", "--json").json
    os.kill(instance["pid"], signal.SIGKILL)
    assert terminal.end() == 11


def test_sigterm_powers_the_guest_down(ovm: Ovm, built: str) -> None:
    with ovm.popen(
        "run", "--accel", "tcg", "-m", "32m", "echo:1", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as foreground:
        assert foreground.stdout is not None
        assert foreground.stdout.readline() == b"READY\n"
        foreground.terminate()
        assert foreground.wait(20) == 0


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["run", "-d", "nothing:1"], 4, "reference-not-found"),
        (["inspect", "nothing:1"], 4, "reference-not-found"),
        (["rmi", "nothing:1"], 4, "reference-not-found"),
        (["tag", "nothing:1", "x"], 4, "reference-not-found"),
        (["push", "localhost:1/nothing:1"], 4, "reference-not-found"),
        (["push", "nothing:1"], 3, "invalid-input"),
        (["pull", "nothing:1"], 3, "invalid-input"),
        (["stop", "nobody"], 4, "instance-not-found"),
        (["rm", "nobody"], 4, "instance-not-found"),
        (["logs", "nobody"], 4, "instance-not-found"),
        (["snapshot", "nobody", "-t", "x"], 4, "instance-not-found"),
        # who waits for a registry, waits
        pytest.param(["pull", "localhost:1/x:1"], 6, "registry-unreachable", marks=pytest.mark.long),
        pytest.param(["run", "-d", "localhost:1/x:1"], 6, "registry-unreachable", marks=pytest.mark.long),
        (["run", "-d", "UPPER"], 3, "reference-invalid"),
        (["build", "/nonexistent/ovms.yaml"], 3, "file-missing"),
        (["build", "/"], 3, "file-not-regular"),
    ],
)
def test_errors_have_a_code_and_a_way_out(ovm: Ovm, arguments: list[str], code: int, error: str) -> None:
    done = ovm(*arguments, "--json")
    assert (done.code, done.error["code"]) == (code, error)
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    lines = ovm(*arguments).err.splitlines()
    news = (f"ovm: {ovm.root} has no artifacts and no instances yet", "ovm: waiting for localhost:1, try 5")
    assert next(line for line in lines if line not in news).startswith("ovm: error: ")
    assert ovm.ok("ps", "-aq").out == ""


def test_a_port_in_use(ovm: Ovm, built: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = ovm(*RUN, "-p", f"{taken.getsockname()[1]}:80", "--json", "echo:1")
    assert (done.code, done.error["code"]) == (8, "port-in-use")


def test_no_qemu_installed(ovm: Ovm, built: str, tmp_path: Path) -> None:
    # the standard directories are looked in whatever PATH says, so they have to be hidden for this
    script = "import shutil, sys; shutil.which = lambda *a, **k: None; from ovms.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [OVM.parent / "python", "-c", script, *RUN, "echo:1"],
        env=ovm.env(), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 9
    assert "qemu-system-x86" in done.stderr


def test_a_manifest_with_three_mistakes_names_all_three(ovm: Ovm, project: Path) -> None:
    project.write_text(
        "schemaVersion: 1\nmediaType: application/vnd.oci.manifest\nname: echo\n"
        "kernel: {ref: kernel}\ndiskLayers: [{ref: base.qcow2, format: vmdk}]\n"
    )
    done = ovm("build", project)
    assert done.code == 3
    for path in ("$.mediaType", "$.version", "$.diskLayers[0].format"):
        assert f"  {path}: " in done.err


def test_a_root_that_cannot_be_used(ovm: Ovm, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = ovm("--root", tmp_path / "file" / "x", "ls")
    assert done.code == 9
    assert "OVMS_ROOT" in done.err


def test_an_answer_that_nobody_reads_is_no_error(ovm: Ovm, built: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{OVM} inspect echo:1 | true; {OVM} version"],
        env=ovm.env(), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_what_was_started_with_a_stream_closed(ovm: Ovm, built: str, closed: str) -> None:
    def run(*words: object) -> int:
        script = " ".join(map(str, (OVM, *words, closed)))
        return subprocess.run(["/bin/sh", "-c", script], env=ovm.env(), timeout=60, check=False).returncode

    for name in ("one", "two"):
        assert run("run", "-d", "-m", "32M", "--accel", "tcg", "--name", name, "echo:1") == 0
    assert run("stop", "-t", "0", "one", "two") == 0
    assert [instance["state"] for instance in ovm.ok("ps", "-a", "--json").json] == ["stopped"] * 2
    for name in ("one", "two"):
        for file in (ovm.root / "instances" / ovm.ok("inspect", name).json["instance_id"]).glob("*.json"):
            assert file.read_bytes().startswith(b"{"), "nothing was printed into a file of ours"


@pytest.mark.spec("GEN-1")
def test_version_says_what_there_is(ovm: Ovm) -> None:
    value = ovm.ok("version", "--json").json
    assert value["qemu"]
    assert value["spec"] == ["0.1"]
    assert set(value["roles"]) <= {"producer", "reader", "runtime"}
    assert value["accel"] in ("kvm", "tcg")
    assert ovm.ok("--version").out.startswith("ovm ")
    assert guests.qemu_children(ovm.root) == []


@pytest.mark.spec("GEN-2")
def test_validate_names_every_problem(ovm: Ovm, built: str, tmp_path: Path) -> None:
    document = tmp_path / "web.json"
    document.write_text(
        '{"schemaVersion": 1, "mediaType": "application/vnd.ovms.manifest.v1+json", "name": "my vm", "version": "1",'
        ' "diskLayers": [{"ref": "a", "format": "qcow2"}, {"ref": "b", "format": "raw"}]}'
    )
    done = ovm("validate", document)
    assert done.code == 3
    assert done.out.splitlines()[0] == f"{document}: manifest: 2 problems"
    assert done.out.splitlines()[1].startswith("  $.diskLayers[1].format: only the base layer can be raw")
    assert done.out.splitlines()[1].endswith("[MAN-13]")
    report = ovm("validate", document, "--json").json
    assert [(p["path"], p["rule"], p["code"]) for p in report["problems"]] == [
        ("$.diskLayers[1].format", "MAN-13", "manifest-invalid"),
        ("$.name", "MAN-4", "manifest-invalid"),
    ]
    assert ovm.ok("validate", "echo:1").out == "echo:1: artifact: valid\n"
    assert ovm.ok("validate", "echo:1", "--json").json["valid"]
    assert ovm("validate", "gone:1").code == 4
    assert ovm("validate", tmp_path / "gone.json").code == 3
