"""``ovm login`` and ``logout`` against real registries, with skopeo as the witness."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import OVM, Done, Ovm
from support.registry import HTPASSWD, Registry
from support.tls import Authority
from support.tokens import TokenService

from ovms.cli.exitcodes import Exit

SECRET = "secret"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("guarded"), htpasswd=HTPASSWD)
    yield registry
    registry.close()


@pytest.fixture
def ovm(tmp_path: Path) -> Ovm:
    home = tmp_path / "home"
    home.mkdir()
    return Ovm(tmp_path / "root", home)


@pytest.fixture
def authfile(tmp_path: Path) -> Path:
    return tmp_path / "auth.json"


def log_in(ovm: Ovm, host: str, authfile: Path, *extra: object, password: str = SECRET, user: str = "ovms") -> Done:
    done = ovm(
        "login", host, "-u", user, "--password-stdin", *extra,
        env={"REGISTRY_AUTH_FILE": str(authfile)}, input=password.encode() + b"\n",
    )  # fmt: skip
    assert password not in done.out + done.err
    return done


def test_a_login_is_tried_and_stored(ovm: Ovm, guarded: Registry, authfile: Path) -> None:
    authfile.write_text('{"auths": {"other.example": {"auth": "YTpi"}}, "unknown": {"kept": [1]}}')
    done = log_in(ovm, guarded.host, authfile, "--json")
    assert done.code == 0, done.err
    assert done.json == {"registry": guarded.host, "username": "ovms", "authfile": str(authfile)}
    document = json.loads(authfile.read_text())
    assert document["auths"][guarded.host] == {"auth": "b3ZtczpzZWNyZXQ="}
    assert document["auths"]["other.example"] == {"auth": "YTpi"}
    assert document["unknown"] == {"kept": [1]}
    assert stat.S_IMODE(authfile.stat().st_mode) == 0o600


@pytest.mark.parametrize(("user", "password"), [("ovms", "wrong-one"), ("nobody", "wrong-one")])
def test_a_wrong_password_is_not_stored(ovm: Ovm, guarded: Registry, authfile: Path, user: str, password: str) -> None:
    done = log_in(ovm, guarded.host, authfile, "--json", user=user, password=password)
    assert done.code == 7
    assert done.error["code"] == "registry-denied"
    assert not authfile.exists()


def test_what_the_login_is_good_for(ovm: Ovm, guarded: Registry, authfile: Path, tmp_path: Path) -> None:
    env = {"REGISTRY_AUTH_FILE": str(authfile)}
    denied = ovm("pull", f"{guarded.host}/t/x:1", env=env)
    assert denied.code == 7
    assert f"ovm login {guarded.host}" in denied.err
    assert log_in(ovm, guarded.host, authfile).code == 0
    assert ovm("pull", f"{guarded.host}/t/x:1", env=env).code == 4
    assert ovm("logout", guarded.host, env=env).out == f"logged out of {guarded.host}\n"
    assert ovm("pull", f"{guarded.host}/t/x:1", env=env).code == 7
    again = ovm("logout", guarded.host, "--json", env=env)
    assert (again.code, again.error["code"]) == (4, "not-found")


def test_where_a_login_goes(ovm: Ovm, guarded: Registry, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    done = ovm(
        "login", guarded.host, "-u", "ovms", "--password-stdin", env={"XDG_RUNTIME_DIR": str(run)}, input=b"secret\r\n"
    )
    assert done.code == 0, done.err
    stored = run / "containers/auth.json"
    assert guarded.host in stored.read_text()
    assert stat.S_IMODE(stored.parent.stat().st_mode) == 0o700
    named = tmp_path / "named.json"
    assert log_in(ovm, guarded.host, tmp_path / "unused.json", "--authfile", named).code == 0
    assert named.exists()
    assert not (tmp_path / "unused.json").exists()
    all_gone = ovm("logout", "--all", "--authfile", named, "--json")
    assert all_gone.json == {"registries": [guarded.host], "authfile": str(named)}
    assert json.loads(named.read_text()) == {"auths": {}}


def test_a_password_on_the_command_line_is_refused_and_not_repeated(ovm: Ovm) -> None:
    for arguments in (["-p", "hunter2"], ["-phunter2"], ["--password", "hunter2"], ["--password=hunter2"]):
        done = ovm("login", "registry.example", "-u", "me", *arguments)
        assert done.code == 2
        assert "hunter2" not in done.out + done.err
        assert "--password-stdin" in done.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "code"),
    [
        (["registry.example", "-u", "me"], b"", 2),  # no terminal
        (["registry.example", "--password-stdin"], b"x", 2),
        (["registry.example", "-u", "me", "--password-stdin"], b"", 3),
        (["registry.example", "-u", "me", "--password-stdin"], b"one\ntwo\n", 3),
        (["registry.example", "-u", "me", "--password-stdin"], b"\xff\n", 3),
        (["registry.example", "-u", "a:b", "--password-stdin"], b"x", 3),
        (["registry.example/x:1", "-u", "me", "--password-stdin"], b"x", 3),
        (["not a host", "-u", "me", "--password-stdin"], b"x", 3),
        (["", "-u", "me", "--password-stdin"], b"x", 3),
        (["registry.example", "--tls-verify", "maybe"], b"x", 2),
    ],
)
def test_what_cannot_be_a_login(ovm: Ovm, arguments: list[str], stdin: bytes, code: int) -> None:
    done = ovm("login", *arguments, input=stdin)
    assert done.code == code, done.err


def test_a_registry_that_is_none(ovm: Ovm, authfile: Path) -> None:
    done = log_in(ovm, "127.0.0.1:1", authfile)
    assert done.code == 6
    assert not authfile.exists()


@pytest.mark.parametrize(
    ("typed", "said", "code"),
    [(SECRET.encode() + b"\n", b"logged in to", Exit.OK), (b"\x04", b"no password was typed", Exit.USAGE)],
    ids=["password", "Ctrl-D"],
)
def test_the_prompt_does_not_echo(
    ovm: Ovm, guarded: Registry, authfile: Path, typed: bytes, said: bytes, code: int
) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [OVM, "login", guarded.host],
        env=ovm.env({"REGISTRY_AUTH_FILE": str(authfile)}),
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    shown = b""

    def until(pattern: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 20
        while not re.search(pattern, shown):
            assert time.monotonic() < deadline, shown
            if select.select([master], [], [], 0.1)[0]:
                try:
                    shown += os.read(master, 4096)
                except OSError:
                    break

    try:
        until(b"Username: ")
        os.write(master, b"ovms\n")
        until(b"Password: ")
        os.write(master, typed)
        until(said)
        assert process.wait(timeout=20) == code
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert SECRET.encode() not in shown
    assert authfile.exists() == (code == Exit.OK)


def test_a_token_service(ovm: Ovm, authfile: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with TokenService(tmp_path / "tokens", authority.issue("tokens")) as tokens:
        registry = Registry(tmp_path / "r", tls=authority.issue("registry"), auth=tokens.registry_config())
        try:
            unknown = log_in(ovm, registry.host, authfile)
            assert unknown.code == 6
            assert "certs.d" in unknown.err
            authority.trust(ovm.home, registry.host)
            assert log_in(ovm, registry.host, authfile, password="wrong-one").code == 7
            assert not authfile.exists()
            assert log_in(ovm, registry.host, authfile).code == 0
            assert {asked.scopes for asked in tokens.asked} == {()}
            if shutil.which("skopeo"):
                assert skopeo("--get-login", authfile, registry.host).stdout == b"ovms\n"
        finally:
            registry.close()


def skopeo(verb: str, authfile: Path, host: str, *extra: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = ["logout"] if verb == "logout" else ["login", *([verb] if verb.startswith("-") else [])]
    return subprocess.run(
        ["skopeo", *command, "--authfile", str(authfile), *extra, host], input=input, capture_output=True, timeout=60
    )


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed: run 'make setup'")
def test_skopeo_and_ovm_share_their_logins(ovm: Ovm, guarded: Registry, authfile: Path) -> None:
    env = {"REGISTRY_AUTH_FILE": str(authfile)}
    assert log_in(ovm, guarded.host, authfile).code == 0
    assert skopeo("--get-login", authfile, guarded.host).stdout == b"ovms\n"
    assert skopeo("logout", authfile, guarded.host).returncode == 0
    nobody = ovm("login", "--get-login", guarded.host, env=env)
    assert nobody.code == 4
    done = skopeo(
        "login", authfile, guarded.host, "--tls-verify=false", "-u", "ovms", "--password-stdin", input=b"secret\n"
    )
    assert done.returncode == 0, done.stderr
    assert ovm("login", "--get-login", guarded.host, env=env).out == "ovms\n"
    assert ovm("logout", guarded.host, env=env).code == 0
    assert skopeo("--get-login", authfile, guarded.host).returncode != 0
