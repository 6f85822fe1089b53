"""Passwords and tokens go where they have to, and nowhere else: no command line, no message, no record, no core dump."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.artifacts import write_inputs, write_manifest
from support.cli import OVM, Done, Ovm
from support.guests import Console
from support.registry import Registry
from support.tls import Authority
from support.tokens import TokenService

PASSWORD = "pa55word-of-the-registry"
TOKEN = "identity-t0ken-of-the-registry"
KEY_PASSWORD = "phrase-that-seals-a-k3y"
INJECTED = b"1njected-into-the-guest"
SECRETS = (PASSWORD, TOKEN, KEY_PASSWORD)
#: A credential helper that notes what anybody on this machine can see while it runs, and answers with what its file says.
HELPER = """
    #!{python}
    import glob, json, pathlib, sys
    there = pathlib.Path({there!r})
    seen = there / "seen"
    with seen.open("ab") as file:
        for name in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                file.write(pathlib.Path(name).read_bytes() + b"\\n")
            except OSError:
                pass
        file.write(pathlib.Path("/proc/self/environ").read_bytes())
    sys.stdin.read()
    print((there / "answer").read_text())
"""


def forms(secret: str) -> list[bytes]:
    """A secret as it is, and as the middle of something in base64."""
    encoded = [base64.b64encode(b"." * i + secret.encode())[4:-4] for i in range(3)]
    return [secret.encode(), *encoded]


def found(data: bytes) -> list[str]:
    return [secret for secret in SECRETS if any(form in data for form in forms(secret))]


def test_the_search_finds_what_it_looks_for() -> None:
    for before in range(4):
        assert found(base64.b64encode(b"u" * before + b":" + PASSWORD.encode() + b"x" * before)) == [PASSWORD]


@pytest.fixture
def registry(tmp_path: Path, ovm: Ovm) -> Iterator[Registry]:
    """One whose token service knows the password and the identity token."""
    authority = Authority(tmp_path / "ca")
    with TokenService(tmp_path / "tokens", authority.issue("tokens")) as tokens:
        tokens.users = {"ovms": PASSWORD}
        tokens.refresh_tokens = {TOKEN: "ovms"}
        registry = Registry(tmp_path / "registry", tls=authority.issue("registry"), auth=tokens.registry_config())
        authority.trust(ovm.home, registry.host)
        yield registry
        registry.close()


@pytest.fixture
def spy(tmp_path: Path) -> Path:
    there = tmp_path / "spy"
    there.mkdir()
    helper = there / "docker-credential-spy"
    helper.write_text(textwrap.dedent(HELPER).lstrip().format(python=sys.executable, there=str(there)))
    helper.chmod(0o755)
    return there


def told(*outputs: Done) -> bytes:
    return "".join(one.out + one.err for one in outputs).encode()


def files(directory: Path) -> bytes:
    """The content of all files, but those of this host's that instances share."""
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return b"\n".join(path.read_bytes() for path in paths)


@pytest.mark.long
@pytest.mark.parametrize(("user", "secret"), [("ovms", PASSWORD), ("<token>", TOKEN)], ids=["password", "token"])
def test_credentials(ovm: Ovm, registry: Registry, spy: Path, project: Path, user: str, secret: str) -> None:
    authfile = spy / "auth.json"
    authfile.write_text(json.dumps({"credHelpers": {registry.host: "spy"}}))
    env = {
        "REGISTRY_AUTH_FILE": str(authfile),
        "PATH": f"{spy}:{os.environ['PATH']}",
        "OVMS_DEBUG": "1",
    }

    def run(*arguments: object) -> Done:
        return ovm(*arguments, env=env)

    name = f"{registry.host}/secret/echo:1"
    (spy / "answer").write_text(json.dumps({"Username": user, "Secret": secret}))
    done = [run("build", project, "-t", name), run("push", name), run("rmi", name), run("referrers", name, "--json")]
    instance = run("run", "-d", "--accel", "tcg", "--memory", "32m", name)
    done += [instance, run("ps", "--json"), run("inspect", instance.out.strip()), run("logs", instance.out.strip())]
    assert [one.code for one in done] == [0] * len(done), told(*done).decode()
    # where it is the wrong one, too
    (spy / "answer").write_text(json.dumps({"Username": user, "Secret": f"{secret}-wrong"}))
    denied = [run("pull", name), run("pull", name, "--json"), run("push", name, "--json")]
    assert all(one.code in (6, 7) for one in denied), told(*denied).decode()
    # nor where the helper fails after it has answered
    answer = json.dumps({"Username": user, "Secret": secret})
    (spy / "docker-credential-spy").write_text(f"#!/bin/sh\necho '{answer}'\nexit 1\n")
    failed = [run("pull", name), run("pull", name, "--json")]
    assert all(one.code for one in failed)
    seen = (spy / "seen").read_bytes()
    assert str(OVM).encode() in seen, "nobody looked"
    assert found(seen) == []
    assert found(told(*done, *denied, *failed)) == []
    assert found(files(ovm.root)) == []


def test_the_password_of_a_key(ovm: Ovm, tmp_path: Path, spy: Path) -> None:
    write_inputs(tmp_path / "p")
    env = {"OVMS_KEY_PASSWORD": KEY_PASSWORD, "OVMS_DEBUG": "1"}
    done = [
        ovm("build", write_manifest(tmp_path / "p", ramSnapshot=None), "-t", "web:1"),
        ovm("key", "generate", "--output-key-prefix", tmp_path / "k", env=env),
    ]
    done += [ovm("sign", "--key", tmp_path / "k.key", "web:1", env=env)]
    assert [one.code for one in done] == [0, 0, 0], told(*done).decode()
    wrong = ovm("sign", "--key", tmp_path / "k.key", "web:1", env={**env, "OVMS_KEY_PASSWORD": f"{KEY_PASSWORD}-wrong"})
    assert wrong.code == 3
    # and on a file descriptor
    reader, writer = os.pipe()
    os.write(writer, f"{KEY_PASSWORD}\n".encode())
    os.close(writer)
    command = [str(OVM), "sign", "--password-fd", str(reader), "--key", str(tmp_path / "k.key"), "web:1", "--json"]
    given = subprocess.run(command, env=ovm.env(), pass_fds=[reader], capture_output=True, timeout=60, check=False)
    os.close(reader)
    assert given.returncode == 0, given.stderr
    assert found(told(*done, wrong) + given.stdout + given.stderr) == []
    assert found(files(ovm.root) + files(tmp_path)) == []


#: Starts a program as a shell in the foreground would, with core dumps allowed (pytest's own children may ignore SIGQUIT).
WRAPPER = (
    "import os, resource, signal, sys; signal.signal(signal.SIGQUIT, signal.SIG_DFL); "
    "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]; resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def dies_by_quit(command: list[str], ovm: Ovm, directory: Path) -> bool:
    """Whether a program that holds a secret dumps core when it dies by SIGQUIT."""
    directory.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, *command],
        env=ovm.env(), cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(PASSWORD.encode())
    child.stdin.flush()
    deadline = time.monotonic() + 30
    while not reads(child.pid):  # the wrapper never does
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGQUIT)
    _, ended = os.waitpid(child.pid, 0)
    child.returncode = 0
    child.stdin.close()
    assert os.WTERMSIG(ended) == signal.SIGQUIT
    return os.WCOREDUMP(ended) or any(directory.iterdir())


def reads(pid: int) -> bool:
    """Whether a process waits in read(2) for its stdin."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[:2] == ["0", "0x0"]
    except OSError:
        return False


def test_no_core_dump_holds_a_password(ovm: Ovm, tmp_path: Path) -> None:
    plain = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    if not dies_by_quit(plain, ovm, tmp_path / "plain"):
        pytest.skip("no program dumps core here")
    login = [str(OVM), "login", "127.0.0.1:1", "-u", "ovms", "--password-stdin"]
    assert not dies_by_quit(login, ovm, tmp_path / "login")


@pytest.mark.long
def test_what_was_injected_may_be_in_a_snapshot(ovm: Ovm, project: Path) -> None:
    with project.open("a") as file:
        file.write("\ndevices: [{type: ivshmem, name: mail, size: 1048576}]\n")
    ovm.ok("build", project, "-t", "mail:1")
    instance = ovm.ok("run", "-d", "--accel", "tcg", "--memory", "32m", "mail:1").out.strip()
    Console(ovm.root / "instances" / instance).wait_for("READY")
    before = ovm.ok("snapshot", instance, "--json")
    assert (before.json["injected"], before.json["user_data"]) == (False, False)
    assert ovm("inject", instance, "mail", "0", input=INJECTED).code == 0
    after = ovm.ok("snapshot", instance, "-t", "mail:2")
    assert "shares was written to" in after.err
    assert INJECTED.decode() not in after.err + after.out
    assert ovm.ok("snapshot", instance, "--json").json["injected"]
    assert INJECTED not in files(ovm.root / "instances")


def test_a_login_is_for_its_owner_alone(ovm: Ovm, registry: Registry, tmp_path: Path) -> None:
    authfile = tmp_path / "auth.json"
    login = ("login", registry.host, "-u", "ovms", "--password-stdin")
    env = {"REGISTRY_AUTH_FILE": str(authfile), "OVMS_DEBUG": "1"}
    done = ovm(*login, "--json", env=env, input=PASSWORD.encode() + b"\n")
    assert done.code == 0, done.err
    assert found(told(done)) == []
    assert authfile.stat().st_mode & 0o077 == 0
    assert found(authfile.read_bytes()) == [PASSWORD]
