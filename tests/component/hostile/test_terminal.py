"""Every command on a terminal, with hostile text wherever it takes or finds some: nothing that it says drives the terminal."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pty
import signal
import sys
import threading
import tty
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import guests, hostile
from support.played import Played, Refusal

from ovms.artifact.build import Builder
from ovms.artifact.resolve import find
from ovms.cli import output
from ovms.cli.main import COMMANDS, main
from ovms.oci.cosign import BUNDLE_TYPE
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel

#: A title, a screen that is cleared, the same in eight bits, letters that turn round, a line written over.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202egnp\r\x08\x7f"
#: The console is the terminal's by its nature, and what a server says is no answer.
NOT_WALKED = {"console", "serve"}


class Terminal:
    """``ovm`` in this process, with a terminal as its stdout and stderr."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: object, stdin: bytes = b"") -> str:
        """What the terminal got."""
        ours, theirs = pty.openpty()
        tty.setraw(theirs)
        got = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while data := os.read(ours, 65536):
                    got.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with (
                self._monkeypatch.context() as patched,
                os.fdopen(theirs, "w", encoding="utf-8") as out,
                os.fdopen(os.dup(theirs), "w", encoding="utf-8") as err,
            ):
                assert out.isatty()
                patched.setattr(sys, "stdout", out)
                patched.setattr(sys, "stderr", err)
                patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
                main(["--root", str(self.root), "--host", "local", "--progress", "none", *map(str, arguments)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            reader.join(10)
            os.close(ours)
        text = got.decode()
        assert "internal error" not in text
        return text


@contextlib.contextmanager
def registry() -> Iterator[str]:
    """A registry that answers everything with escapes."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = json.dumps({"errors": [{"code": ESCAPES, "message": ESCAPES, "detail": ESCAPES}]}).encode()
            self.send_response(400 if self.path != "/v2/" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _answer

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def agent(name: str, arguments: dict[str, Any]) -> Any:
    """An agent of a guest that says nothing but escapes."""
    said = base64.b64encode(ESCAPES.encode()).decode()
    match name:
        case "guest-exec":
            if arguments["path"] == "refused":
                raise Refusal(ESCAPES)
            return {"pid": 7}
        case "guest-exec-status":
            return {"exited": True, "exitcode": 1, "out-data": said, "err-data": said}
    raise Refusal(ESCAPES)


@pytest.fixture
def walked(runtime: Runtime, echo_kernel: Path, tmp_path: Path) -> Iterator[str]:
    """A store with hostile artifacts, and the name of an instance whose guest has printed all that is hostile."""
    region = "devices: [{type: ivshmem, name: shared, size: 4096}]\n"
    manifest = guests.write_project(tmp_path / "project", echo_kernel, more=region)
    Builder(runtime.layout, lambda host: pytest.fail(host)).build(manifest, name="echo:1")
    started = runtime.start(
        find(runtime.layout, "echo:1"), RunOptions(name="vm", memory=guests.MEMORY, accel=Accel.TCG)
    )
    record = started.record
    directory = runtime.instances.directory(record.id)
    guests.Console(directory).wait_for("READY")
    runtime.inject(record, "shared", 0, ESCAPES.encode())
    files = runtime.instances.files(record)
    with files.console_log.open("ab") as log:
        for attack in hostile.attacks("console"):
            log.write(attack.data)
        log.write(ESCAPES.encode() + b"\n")
    with files.vmm_log.open("ab") as log:
        log.write(ESCAPES.encode() + b"\n")
    files.agent.unlink()
    with contextlib.closing(Played(directory, agent)):
        yield record.name


def calls(vm: str, host: str, directory: Path) -> dict[str, list[list[object]]]:
    """Each command with hostile text in its way."""
    file, sbom, bundle = directory / "file", directory / "sbom.json", directory / "bundle.json"
    file.write_bytes(ESCAPES.encode())
    sbom.write_bytes(b"{}")
    bundle.write_text(json.dumps({"mediaType": ESCAPES, ESCAPES: ESCAPES}))
    archives: list[list[object]] = []
    for number, attack in enumerate(a for a in hostile.attacks("oci-archive") if "escapes" in a.name):
        (directory / f"{number}.tar").write_bytes(attack.data)
        archives.append(["pull", f"oci-archive:{directory / f'{number}.tar'}", "-t", f"web:{number}"])
    manifests = []
    for attack in (a for a in hostile.attacks("manifest", "qcow2") if "escapes" in a.name):
        path = directory / f"{attack.name}.{'json' if attack.form == 'manifest' else 'img'}"
        path.write_bytes(attack.data)
        manifests.append(path)
    e = ESCAPES
    return {
        "build": [["build", path] for path in manifests] + [["build", e], ["build", directory / e, "-t", e]],
        "pull": [*archives, ["pull", e], ["pull", f"{host}/x:1"], ["pull", f"oci:{e}"]],
        "push": [["push", "web:0", f"oci:{directory / e}"], ["push", "web:0", f"{host}/x:1"], ["push", e]],
        "ls": [["ls"], ["ls", "--json"]],
        "inspect": [["inspect", "web:0"], ["inspect", "--raw", "web:0"], ["inspect", vm], ["inspect", e]],
        "validate": [["validate", "web:0"], ["validate", e], *(["validate", path] for path in manifests)],
        "tag": [["tag", "web:0", e], ["tag", e, "x"]],
        "attach": [
            ["attach", "--type", "application/x", "--annotation", f"x={e}", sbom, "web:0"],
            ["attach", "--type", e, sbom, "web:0"],
            ["attach", "--type", BUNDLE_TYPE, "--artifact-type", BUNDLE_TYPE, bundle, "web:1"],
        ],
        "key": [
            ["key", "generate", "--output-key-prefix", directory / "k"],
            ["key", "generate", "--output-key-prefix", directory / e / "k"],
            ["key", "public", file],
            ["key", "public", f"exec:{e}"],
            ["key", "import", file],
            ["key", "import", e],
        ],
        "sign": [
            ["sign", "--local", "--key", directory / "k.key", "web:0"],
            ["sign", "--key", directory / "k.key", f"{host}/x:1"],
            ["sign", "--local", "--key", f"exec:{e}", "web:0"],
            ["sign", "--key", e, e],
        ],
        "verify": [
            ["verify", "--local", "--key", directory / "k.pub", "web:0"],
            ["verify", "--local", "--key", directory / "k.pub", "web:1"],
            ["verify", "--key", directory / "k.pub", f"{host}/x:1"],
            ["verify", "--local", "--key", file, "web:0"],
            ["verify", "--certificate-identity", e, "--certificate-oidc-issuer", e, "--trusted-root", file, "web:0"],
        ],
        "policy": [["policy", "show"], ["policy", "check", "web:0"], ["policy", "check", e]],
        "unpack": [
            ["unpack", "web:0", directory / e],
            ["unpack", "web:0", file],
            ["unpack", e, directory / "unpacked"],
        ],
        "referrers": [["referrers", "--local", "web:0"], ["referrers", f"{host}/x:1"], ["referrers", e]],
        "logs": [["logs", vm], ["logs", "-t", vm], ["logs", "--json", vm], ["logs", "--tail", "2", vm], ["logs", e]],
        "exec": [["exec", vm, "true"], ["exec", "--json", vm, "true"], ["exec", vm, "refused"], ["exec", vm, "--", e]],
        "cp": [["cp", f"{vm}:/{e}", file], ["cp", file, f"{vm}:/{e}"], ["cp", e, f"{e}:/"]],
        "inject": [["inject", vm, "shared", "0", "--read", "4096"], ["inject", vm, e, "0"]],
        "port": [["port", vm], ["port", vm, e], ["port", e]],
        "ps": [["ps", "-a"], ["ps", "--json"]],
        "events": [["events"], ["events", "--since", e]],
        "df": [["df"], ["df", "-v"]],
        "fsck": [["fsck"], ["fsck", e]],
        "run": [["run", "-d", e], ["run", "-d", "echo:1", "--name", e], ["run", "-d", f"{host}/x:1"]],
        "snapshot": [["snapshot", vm, "-t", e], ["snapshot", e]],
        "export": [["export", "web:0", "-o", directory / e / "x"], ["export", e, "-o", "x"]],
        "login": [
            ["login", host, "-u", e, "--password-stdin"],
            ["login", host, "-u", "me", "--password-stdin"],
            ["login", e],
        ],
        "rm": [["rm", e], ["rm", vm]],
        "prune": [["prune", "--dry-run"], ["prune", "--filter", e]],
        "commit": [["commit", vm, "-t", e], ["commit", e, "-t", "x"]],
        "warm": [["warm", e, "--size", "1"], ["warm", "echo:1", "--size", e]],
        **{
            name: [[name, e], [name, vm, f"--{e}"]]
            for name in ("pause", "resume", "stop", "rmi", "fork", "logout", "doctor", "version")
        },
    }


@pytest.mark.spec("SEC-3")
def test_no_command_drives_the_terminal(
    runtime: Runtime, walked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVMS_KEY_PASSWORD", "secret")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    terminal = Terminal(runtime.root.path, monkeypatch)
    said: dict[str, str] = {}
    with registry() as host:
        every = calls(walked, host, tmp_path)
        assert set(every) == set(COMMANDS) - NOT_WALKED
        for name, some in every.items():
            for words in some:
                text = terminal(*words, stdin=b"secret\n" if name == "login" else ESCAPES.encode())
                assert all(c.isprintable() or c in "\n\t" for c in text), (words, text)
                said[name] = said.get(name, "") + text
    assert all(said.values())
    # what is hostile did come that far: a test whose input is lost on the way would see nothing
    for name in ("inspect", "referrers", "logs", "exec", "inject"):
        assert "gnp" in said[name], name


@pytest.mark.parametrize("show", [output.answer, output.say, output.answer_json, output.answer_document])
def test_whatever_is_shown_is_harmless(show: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    show(ESCAPES + "".join(map(chr, [*range(0x250), 0x2028, 0x2066, 0xFEFF, 0xE0001])))
    said = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in said.out + said.err)
