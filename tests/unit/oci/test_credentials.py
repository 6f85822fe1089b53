"""Where credentials are looked for, and what malformed files say."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import InputError
from ovms.oci.credentials import Credential, Credentials
from ovms.spec import api

HOST = "registry.example:5000"


def encoded(pair: str) -> dict[str, str]:
    return {"auth": base64.b64encode(pair.encode()).decode()}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("run/containers", "home/.config/containers", "home/.docker", "bin"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def credentials(home: Path, **extra: str) -> Credentials:
    environ = {
        "HOME": str(home / "home"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "PATH": f"{home / 'bin'}:/usr/bin:/bin",
    }
    return Credentials.from_environment({**environ, **extra}, uid=1000)


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def helper(home: Path, name: str, script: str) -> None:
    path = home / "bin" / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\nread host\n{script}\n")
    path.chmod(0o755)


def test_files_are_searched_in_order(home: Path) -> None:
    runtime, config = home / "run/containers/auth.json", home / "home/.config/containers/auth.json"
    docker = home / "home/.docker/config.json"
    assert credentials(home).get(HOST, "a") is None
    write(docker, {"auths": {HOST: encoded("docker:1")}})
    assert credentials(home).get(HOST, "a") == Credential("docker", "1")
    write(config, {"auths": {HOST: encoded("config:2")}})
    assert credentials(home).get(HOST, "a") == Credential("config", "2")
    write(runtime, {"auths": {HOST: encoded("runtime:3:4")}})
    assert credentials(home).get(HOST, "a") == Credential("runtime", "3:4")
    write(home / "own.json", {"auths": {}})
    assert credentials(home, REGISTRY_AUTH_FILE=str(home / "own.json")).get(HOST, "a") is None


def test_the_longest_path_wins(home: Path) -> None:
    write(
        home / "run/containers/auth.json",
        {"auths": {HOST: encoded("host:1"), f"{HOST}/team": encoded("team:2"), f"{HOST}/team/web": encoded("web:3")}},
    )
    found = credentials(home)
    names = [found.get(HOST, r).username for r in ("x", "team/x", "team/web", "team/web/y", "teams")]  # type: ignore[union-attr]
    assert names == ["host", "team", "web", "web", "host"]
    assert found.get("other.example", "team") is None


def test_an_empty_entry_ends_the_search_in_its_file(home: Path) -> None:
    """Not the shorter path's credentials: those are for others. The next file may have some."""
    entries = {HOST: encoded("host:1"), f"{HOST}/public": {}}
    write(home / "run/containers/auth.json", {"auths": entries})
    found = credentials(home)
    assert found.get(HOST, "public/web") is None
    assert found.get(HOST, "other") == Credential("host", "1")
    write(home / "home/.docker/config.json", {"auths": {HOST: encoded("docker:2")}})
    assert found.get(HOST, "public/web") == Credential("docker", "2")


def test_an_exact_key_comes_before_a_url(home: Path) -> None:
    entries = {"registry.example": encoded("exact:1"), "https://registry.example/v2/": encoded("url:2")}
    for order in (entries, dict(reversed(entries.items()))):
        write(home / "home/.docker/config.json", {"auths": order})
        assert credentials(home).get("registry.example", "x") == Credential("exact", "1")


def test_the_oldest_file_of_all(home: Path) -> None:
    write(home / "home/.dockercfg", {HOST: encoded("old:1")})
    assert credentials(home).get(HOST, "x") == Credential("old", "1")


@pytest.mark.parametrize("key", ["docker.io", "index.docker.io", "https://index.docker.io/v1/"])
def test_docker_hub_has_several_names(home: Path, key: str) -> None:
    write(home / "home/.docker/config.json", {"auths": {key: encoded("a:b")}})
    assert credentials(home).get("docker.io", "x/y") == Credential("a", "b")


@pytest.mark.parametrize("key", ["https://registry.example/v1/", "http://registry.example", "registry.example/v2/"])
def test_keys_that_docker_writes_as_urls(home: Path, key: str) -> None:
    write(home / "home/.docker/config.json", {"auths": {key: encoded("a:b")}})
    assert credentials(home).get("registry.example", "x") == Credential("a", "b")


def test_an_empty_entry_is_none_and_the_store_is_asked(home: Path) -> None:
    helper(home, "test", 'echo "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"s\\"}"')
    write(home / "home/.docker/config.json", {"auths": {HOST: {}}, "credsStore": "test"})
    assert credentials(home).get(HOST, "x") == Credential(HOST, "s")


def test_a_helper_of_the_host_comes_first(home: Path) -> None:
    helper(home, "test", 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"s\\"}"')
    write(home / "home/.docker/config.json", {"auths": {HOST: encoded("a:b")}, "credHelpers": {HOST: "test"}})
    assert credentials(home).get(HOST, "x") == Credential("<token>", "s", identity=True)


def test_a_helper_that_has_none(home: Path) -> None:
    helper(home, "test", "echo credentials not found in native keychain; exit 1")
    write(home / "home/.docker/config.json", {"credsStore": "test"})
    assert credentials(home).get(HOST, "x") is None


@pytest.mark.parametrize("script", ["exit 3", "echo nonsense", "echo '[]'", "echo '{}'"])
def test_a_helper_that_fails(home: Path, script: str) -> None:
    helper(home, "test", script)
    write(home / "home/.docker/config.json", {"credsStore": "test"})
    with pytest.raises(InputError, match="docker-credential-test"):
        credentials(home).get(HOST, "x")


@pytest.mark.parametrize("where", ["", " >&2"])
def test_what_a_helper_that_fails_says_may_be_its_answer(home: Path, where: str) -> None:
    helper(home, "test", f"""echo '{{"Username": "u", "Secret": "hunter2"}}'{where}; exit 1""")
    write(home / "home/.docker/config.json", {"credsStore": "test"})
    with pytest.raises(InputError, match="not shown") as caught:
        credentials(home).get(HOST, "x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../bin/sh", "", "a b", 5, "x" * 80])
def test_a_helper_is_a_name_and_no_path(home: Path, name: object) -> None:
    write(home / "home/.docker/config.json", {"credHelpers": {HOST: name}})
    with pytest.raises(InputError, match="no name of a credential helper"):
        credentials(home).get(HOST, "x")


def test_a_helper_that_is_not_installed(home: Path) -> None:
    write(home / "home/.docker/config.json", {"credsStore": "nowhere"})
    with pytest.raises(InputError, match="docker-credential-nowhere is not installed") as caught:
        credentials(home).get(HOST, "x")
    assert caught.value.hint == "install docker-credential-nowhere, or take it out of that file"


def test_a_helper_sees_little_of_the_environment(home: Path) -> None:
    helper(home, "test", 'echo "{\\"Username\\": \\"${SECRET_THING:-clean}\\", \\"Secret\\": \\"$HOME\\"}"')
    write(home / "home/.docker/config.json", {"credsStore": "test"})
    assert credentials(home, SECRET_THING="leak").get(HOST, "x") == Credential("clean", str(home / "home"))


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "GOOGLE_APPLICATION_CREDENTIALS", "HTTPS_PROXY", "no_proxy"])
def test_a_helper_sees_what_it_logs_in_with(home: Path, name: str) -> None:
    helper(home, "test", f'echo "{{\\"Username\\": \\"u\\", \\"Secret\\": \\"${{{name}}}\\"}}"')
    write(home / "home/.docker/config.json", {"credsStore": "test"})
    assert credentials(home, **{name: "given"}).get(HOST, "x") == Credential("u", "given")


@pytest.mark.parametrize(
    "entry",
    [{"username": "a", "password": "b"}, {"auth": "YT\npi\n"}, {"auth": "YTpi", "username": "c", "password": "d"}],
)
def test_entries_that_docker_takes(home: Path, entry: dict[str, str]) -> None:
    write(home / "home/.docker/config.json", {"auths": {HOST: entry}})
    assert credentials(home).get(HOST, "x") == Credential("a", "b")


@pytest.mark.spec("SEC-4", "ERR-3")
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"auths": []}',
        '{"auths": {"registry.example:5000": 5}}',
        '{"auths": {"registry.example:5000": {"auth": "!!!"}}}',
        '{"auths": {"registry.example:5000": {"auth": "c2VjcmV0"}}}',
        '{"credHelpers": 5}',
    ],
)
def test_a_malformed_file_is_named_and_no_secret_shown(home: Path, content: str) -> None:
    path = home / "home/.docker/config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"config\.json") as caught:
        credentials(home).get(HOST, "x")
    for said in (str(caught.value), json.dumps(api.problem(caught.value)), json.dumps(caught.value.to_json())):
        assert "secret" not in said
        assert "c2VjcmV0" not in said


@pytest.mark.spec("SEC-4")
def test_a_secret_is_not_in_a_repr() -> None:
    assert "hunter2" not in repr(Credential("me", "hunter2"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(st.sampled_from(["auths", "credHelpers", "credsStore", HOST, "auth"]), c, max_size=4)
        ),
        max_leaves=8,
    )
)
def test_any_document_gives_credentials_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write(path, value)
    try:
        Credentials((path,), {}).get(HOST, "x/y")
    except InputError:
        pass
