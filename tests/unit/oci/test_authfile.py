"""Where logins are written, and what is not touched by it."""

from __future__ import annotations

import json
import stat
import threading
from functools import partial
from pathlib import Path

import pytest

from ovms.errors import HostError, InputError
from ovms.oci.authfile import AuthFile
from ovms.oci.credentials import Credential

HOST = "registry.example:5000"
ME = Credential("me", "pass:word")
#: A helper that keeps one file for each registry.
HELPER = """#!/bin/sh
cd "$HOME" || exit 1
case "$1" in
store) cat > stored; sed 's/.*"ServerURL": "\\([^"]*\\)".*/\\1/' stored | tr / _ > name; mv stored "secret-$(cat name)";;
get) read -r host; file="secret-$(echo "$host" | tr / _)"
  [ -f "$file" ] && cat "$file" || { echo credentials not found in native keychain; exit 1; };;
erase) read -r host; rm "secret-$(echo "$host" | tr / _)";;
esac
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "containers/auth.json"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(HELPER)
    helper.chmod(0o755)
    return {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}


def write(path: Path, document: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def test_the_file_of_the_environment() -> None:
    def path(**environ: str) -> str:
        return str(AuthFile.from_environment(environ, uid=7).path)

    assert path(REGISTRY_AUTH_FILE="/x/a.json", XDG_RUNTIME_DIR="/run/user/7") == "/x/a.json"
    assert path(XDG_RUNTIME_DIR="/nowhere/7") == "/nowhere/7/containers/auth.json"
    assert path(DOCKER_CONFIG="/x").endswith("/run/containers/7/auth.json")


def test_store_and_erase(path: Path) -> None:
    file = AuthFile(path, {})
    assert not file.erase(HOST)
    assert not path.exists(), "nothing to forget is no reason for a file"
    file.store(HOST, ME)
    file.store(f"{HOST}/team", Credential("team", "x"))
    assert file.get(HOST) == ME
    assert file.get(f"{HOST}/team/web") == Credential("team", "x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert file.erase(HOST)
    assert file.get(HOST) is None
    assert file.erase_all() == [f"{HOST}/team"]
    assert json.loads(path.read_text()) == {"auths": {}}


def test_what_else_is_there_stays(path: Path) -> None:
    others = {"b.example": {"auth": "eDp5"}, "a.example": {"future": 1.5}}
    write(path, {"HttpHeaders": {"x": "ü"}, "auths": {**others, HOST: {"identitytoken": "old", "email": "me@x"}}})
    AuthFile(path, {}).store(HOST, ME)
    document = json.loads(path.read_text())
    assert document["HttpHeaders"] == {"x": "ü"}
    assert document["auths"].pop(HOST) == {"email": "me@x", "auth": "bWU6cGFzczp3b3Jk"}
    assert document["auths"] == others
    assert list(document["auths"]) == ["b.example", "a.example"]


def test_an_entry_that_docker_wrote_as_a_url_is_replaced(path: Path) -> None:
    write(path, {"auths": {"https://registry.example/v1/": {"auth": "YTpi"}}})
    file = AuthFile(path, {})
    file.store("registry.example", ME)
    assert list(json.loads(path.read_text())["auths"]) == ["registry.example"]
    write(path, {"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"}}})
    assert file.get("docker.io") == Credential("a", "b")
    assert file.erase("docker.io")


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": []}', '{"auths": {}, "auths": {}}'])
def test_a_malformed_file_is_left_alone(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    file = AuthFile(path, {})
    for change in (partial(file.store, HOST, ME), partial(file.erase, HOST), file.erase_all):
        with pytest.raises(InputError, match=r"auth\.json"):
            change()
    assert path.read_text() == content


def test_a_link_stays_one(path: Path, tmp_path: Path) -> None:
    write(path, {})
    link = tmp_path / "link.json"
    link.symlink_to(path)
    AuthFile(link, {}).store(HOST, ME)
    assert link.is_symlink()
    assert HOST in path.read_text()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HostError, match="cannot be stored"):
        AuthFile(tmp_path / "file/auth.json", {}).store(HOST, ME)


def test_writers_at_once_lose_nothing(path: Path) -> None:
    def store(number: int) -> None:
        AuthFile(path, {}).store(f"r{number}.example", ME)

    threads = [threading.Thread(target=store, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())["auths"]) == 12


def test_a_helper_of_the_host_keeps_the_secret(path: Path, environ: dict[str, str], tmp_path: Path) -> None:
    write(path, {"credHelpers": {HOST: "test"}, "auths": {HOST: {"auth": "b2xkOm9sZA=="}}})
    file = AuthFile(path, environ)
    file.store(HOST, ME)
    assert json.loads((tmp_path / f"secret-{HOST}").read_text()) == {
        "ServerURL": HOST, "Username": "me", "Secret": "pass:word",
    }  # fmt: skip
    assert json.loads(path.read_text()) == {"credHelpers": {HOST: "test"}, "auths": {HOST: {}}}
    assert file.get(HOST) == ME
    assert file.erase(HOST)
    assert not (tmp_path / f"secret-{HOST}").exists()
    assert not file.erase(HOST)


def test_docker_s_store_keeps_the_secret(path: Path, environ: dict[str, str], tmp_path: Path) -> None:
    write(path, {"credsStore": "test"})
    file = AuthFile(path, environ)
    file.store(HOST, ME)
    file.store("docker.io", ME)
    assert json.loads(path.read_text())["auths"] == {HOST: {}, "docker.io": {}}
    assert file.get(HOST) == file.get("docker.io") == ME
    assert (tmp_path / "secret-https:__index.docker.io_v1_").exists()
    assert file.erase_all() == [HOST, "docker.io"]
    assert list(tmp_path.glob("secret-*")) == []


def test_a_helper_that_fails_changes_nothing(path: Path, environ: dict[str, str], tmp_path: Path) -> None:
    helper = tmp_path / "bin/docker-credential-test"
    helper.write_text("#!/bin/sh\nexit 3\n")
    write(path, {"credsStore": "test", "auths": {"a.example": {}}})
    before = path.read_text()
    with pytest.raises(InputError, match="docker-credential-test failed") as caught:
        AuthFile(path, environ).store(HOST, ME)
    assert "pass:word" not in str(caught.value)
    assert path.read_text() == before
