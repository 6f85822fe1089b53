"""A registry with TLS whose tokens come from a real service, and what happens when they end."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from support.artifacts import of_layers, small
from support.registry import Registry
from support.tls import Authority
from support.tokens import TokenService

from ovms.errors import RegistryDenied, RegistryUnreachable
from ovms.oci import plain, transfer
from ovms.oci import registry as registry_module
from ovms.oci.connect import Connector
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec import mediatypes
from ovms.spec.digest import of_bytes

#: Of the first token; both clocks count whole seconds, so it is good for one of them at least.
LIFETIME = 2
ENDED = LIFETIME + 0.1


@dataclass
class Secure:
    registry: Registry
    tokens: TokenService
    authority: Authority
    home: Path

    @property
    def host(self) -> str:
        return self.registry.host

    def name(self, repository: str, tag: str = "1") -> Reference:
        return Reference(self.host, repository, tag)

    def log_in(self, pair: str | None, **entry: str) -> None:
        if pair is not None:
            entry["auth"] = base64.b64encode(pair.encode()).decode()
        path = self.home / ".docker/config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"auths": {self.host: entry}}))

    def connect(self, **environ: str) -> RegistryClient:
        values = {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home / "run"), **environ}
        return Connector.from_environment(values)(self.host)

    def scopes(self) -> list[tuple[str, ...]]:
        return [asked.scopes for asked in self.tokens.asked]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def service(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenService]:
    with TokenService(tmp_path_factory.mktemp("tokens"), authority.issue("tokens")) as service:
        yield service


@pytest.fixture(scope="module")
def tls_registry(
    authority: Authority, service: TokenService, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    directory = tmp_path_factory.mktemp("tls-registry")
    registry = Registry(directory, tls=authority.issue("registry"), auth=service.registry_config())
    yield registry
    registry.close()


@pytest.fixture
def secure(tls_registry: Registry, service: TokenService, authority: Authority, tmp_path: Path) -> Iterator[Secure]:
    home = tmp_path / "home"
    home.mkdir()
    authority.trust(home, tls_registry.host)
    secure = Secure(tls_registry, service, authority, home)
    secure.log_in("ovms:secret")
    service.asked.clear()
    kept = service.allow, service.lifetime, service.told
    yield secure
    service.allow, service.lifetime, service.told = kept


@pytest.fixture
def other(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "other")


def test_push_and_pull(secure: Secure, layout: Layout, other: Layout) -> None:
    name = secure.name("t/first")
    artifact = small(layout, str(name))
    with secure.connect() as client:
        transfer.push(layout, client, name, artifact.digest)
    with secure.connect() as client:
        assert transfer.pull(other, client, name).digest == artifact.digest
    # several blobs at once, and one token for each scope
    assert secure.scopes() == [("repository:t/first:pull,push",), ("repository:t/first:pull",)]
    assert {asked.user for asked in secure.tokens.asked} == {"ovms"}


def test_many_small_blobs_take_one_token(
    secure: Secure, layout: Layout, other: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And come through TLS as they come without it: also what is longer than one record of it."""
    plainly: list[int] = []
    take = plain.Answer.take

    def noted(self: plain.Answer, size: int) -> bytes | None:
        if (body := take(self, size)) is not None:
            plainly.append(len(body))
        return body

    monkeypatch.setattr(plain.Answer, "take", noted)
    name = secure.name("t/many")
    artifact = of_layers(layout, str(name), [b"layer %02d" % i * (500 + 2300 * i) for i in range(12)])
    with secure.connect() as client:
        transfer.push(layout, client, name, artifact.digest)
    secure.tokens.asked.clear()
    with secure.connect() as client:
        transfer.pull(other, client, name)
    assert all(other.has(blob) for blob in artifact.image.blobs)
    assert secure.scopes() == [("repository:t/many:pull",)]
    assert sorted(plainly) == sorted(blob.size for blob in artifact.image.blobs)


@pytest.mark.parametrize("pair", ["ovms:wrong", "nobody:secret", None])
def test_what_the_service_refuses(secure: Secure, layout: Layout, pair: str | None) -> None:
    secure.log_in(pair)
    name = secure.name("t/refused")
    artifact = small(layout, str(name))
    with secure.connect() as client, pytest.raises(RegistryDenied, match="t/refused") as caught:
        transfer.push(layout, client, name, artifact.digest)
    assert "ovm login" in str(caught.value.hint)
    assert "wrong" not in str(caught.value) + str(caught.value.hint)


def test_a_repository_that_the_user_may_not_write(secure: Secure, layout: Layout, other: Layout) -> None:
    allowed, forbidden = secure.name("mine/x"), secure.name("theirs/x")
    secure.tokens.allow = lambda user, repository: {"pull", "push"} if repository.startswith("mine/") else set()
    artifact = small(layout, str(allowed))
    with secure.connect() as client:
        transfer.push(layout, client, allowed, artifact.digest)
        with pytest.raises(RegistryDenied, match="theirs/x"):
            transfer.push(layout, client, forbidden, artifact.digest)
        with pytest.raises(RegistryDenied, match="theirs/x"):
            transfer.pull(other, client, forbidden)
    assert other.entries() == []


def test_an_identity_token_is_exchanged(secure: Secure, layout: Layout) -> None:
    secure.log_in(None, identitytoken="refresh-me")
    name = secure.name("t/identity")
    with secure.connect() as client:
        transfer.push(layout, client, name, small(layout, str(name)).digest)
    assert {(asked.method, asked.user, asked.status) for asked in secure.tokens.asked} == {("POST", "ovms", 200)}
    secure.log_in(None, identitytoken="stolen")
    with secure.connect() as client, pytest.raises(RegistryDenied):
        transfer.pull(layout, client, name)


@pytest.mark.long
def test_a_token_ends_between_two_blobs(secure: Secure, layout: Layout, other: Layout) -> None:
    name = secure.name("t/ends")
    artifact = small(layout, str(name))
    with secure.connect() as client:
        transfer.push(layout, client, name, artifact.digest)
    secure.tokens.lifetime = LIFETIME
    secure.tokens.asked.clear()

    def wait(*_: object) -> None:  # between the manifests and the bulk
        time.sleep(ENDED)
        secure.tokens.lifetime = 300

    with secure.connect() as client:
        transfer.pull(other, client, name, check=wait)
    assert secure.scopes() == [("repository:t/ends:pull",)] * 2, "one new token for all"
    assert all(other.has(blob) for blob in artifact.image.blobs)


@pytest.mark.long
def test_a_token_ends_between_the_chunks_of_an_upload(secure: Secure, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"0123456789" * 200_000
    monkeypatch.setattr(registry_module, "CHUNKED_FROM", 1000)
    monkeypatch.setattr(registry_module, "CHUNK", 700_000)
    secure.tokens.lifetime = LIFETIME
    opened: list[int] = []

    def body(offset: int, size: int) -> IO[bytes]:
        if offset == 700_000 and offset not in opened:
            time.sleep(ENDED)
            secure.tokens.lifetime = 300
        opened.append(offset)
        return io.BytesIO(data[offset : offset + size])

    blob = Descriptor(mediatypes.DISK_LAYER, of_bytes(data), len(data))
    with secure.connect() as client:
        client.push_blob("t/chunks", blob, body)
        assert client.has_blob("t/chunks", blob.digest)
        assert b"".join(map(bytes, client.read_blob("t/chunks", blob))) == data
    assert opened.count(0) == 1, "what had arrived was sent again"
    assert opened.count(700_000) >= 2, "the token did not end"


def test_a_mount_asks_for_two_scopes(secure: Secure, layout: Layout) -> None:
    source, target = secure.name("t/source"), secure.name("t/target")
    artifact = small(layout, str(source))
    with secure.connect() as client:
        transfer.push(layout, client, source, artifact.digest)
        transfer.push(layout, client, target, artifact.digest)
        assert client.has_blob("t/target", artifact.image.blobs[0].digest)
    assert ("repository:t/target:pull,push", "repository:t/source:pull") in secure.scopes()


def test_a_source_that_must_not_be_read_is_no_obstacle(secure: Secure, layout: Layout) -> None:
    source, target = secure.name("t/source2"), secure.name("t/target2")
    artifact = small(layout, str(source))
    with secure.connect() as client:
        transfer.push(layout, client, source, artifact.digest)
    secure.tokens.allow = lambda user, repository: {"pull", "push"} if repository == "t/target2" else set()
    with secure.connect() as client:
        transfer.push(layout, client, target, artifact.digest)
        assert client.get_manifest(target)[1].digest == artifact.digest


def test_a_ca_that_is_not_known(secure: Secure, layout: Layout) -> None:
    name = secure.name("t/ca")
    for path in (secure.home / ".config/containers/certs.d" / secure.host).iterdir():
        path.unlink()
    with secure.connect() as client, pytest.raises(RegistryUnreachable, match="not trusted") as caught:
        transfer.push(layout, client, name, small(layout, str(name)).digest)
    assert f"certs.d/{secure.host}/ca.crt" in str(caught.value.hint)
    assert secure.tokens.asked == []


def test_the_system_s_cas_can_be_named(
    secure: Secure, authority: Authority, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = secure.name("t/system")
    (secure.home / ".config/containers/certs.d" / secure.host / "ca.crt").unlink()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca.cert))
    with secure.connect() as client:
        transfer.push(layout, client, name, small(layout, str(name)).digest)


def test_a_certificate_of_another_name(authority: Authority, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r", tls=authority.issue("elsewhere", names="DNS:registry.example"))
    try:
        authority.trust(tmp_path, registry.host)
        with (
            Connector.from_environment({"HOME": str(tmp_path)})(registry.host) as client,
            pytest.raises(RegistryUnreachable, match="localhost"),
        ):
            client.has_blob("x", of_bytes(b""))
    finally:
        registry.close()


def test_a_certificate_that_has_ended(authority: Authority, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r", tls=authority.issue("old", days=-1))
    authority.trust(tmp_path / "home", registry.host)
    try:
        connector = Connector.from_environment({"HOME": str(tmp_path / "home")})
        with connector(registry.host) as client, pytest.raises(RegistryUnreachable) as caught:
            client.get_manifest(Reference(registry.host, "x", "1"))
    finally:
        registry.close()
    assert "expired" in caught.value.message
    assert "clock" in str(caught.value.hint)


def test_a_client_certificate(authority: Authority, tmp_path: Path, layout: Layout) -> None:
    registry = Registry(tmp_path / "r", tls=authority.issue("mutual"), client_ca=authority.ca.cert)
    try:
        name = Reference(registry.host, "t/x", "1")
        artifact = small(layout, str(name))
        connector = {"HOME": str(tmp_path)}
        authority.trust(tmp_path, registry.host)
        with (
            Connector.from_environment(connector)(registry.host) as client,
            pytest.raises(RegistryUnreachable, match="client certificate") as caught,
        ):
            transfer.push(layout, client, name, artifact.digest)
        assert "client.cert" in str(caught.value.hint)
        authority.trust(tmp_path, registry.host, authority.issue("client"))
        with Connector.from_environment(connector)(registry.host) as client:
            transfer.push(layout, client, name, artifact.digest)
    finally:
        registry.close()


def test_any_certificate_when_asked(secure: Secure, authority: Authority, layout: Layout) -> None:
    """And the password still goes to nobody whose certificate was not checked: the token service is another port of
    the host that the user has called insecure."""
    (secure.home / ".config/containers/certs.d" / secure.host / "ca.crt").unlink()
    values = {"HOME": str(secure.home)}
    name = secure.name("t/insecure")
    with Connector.from_environment(values, tls_verify=False)(secure.host) as client:
        transfer.push(layout, client, name, small(layout, str(name)).digest)


def test_plain_http_is_tried_last_when_asked(registry: Registry, layout: Layout) -> None:
    name = Reference(registry.host, "t/plain", "1")
    artifact = small(layout, str(name))
    with Connector.from_environment({"HOME": "/nowhere"}, tls_verify=False)(registry.host) as client:
        transfer.push(layout, client, name, artifact.digest)
    with (
        Connector.from_environment({"HOME": "/nowhere"}, tls_verify=True)(registry.host) as client,
        pytest.raises(RegistryUnreachable, match="does not speak TLS"),
    ):
        client.get_manifest(name)


@pytest.mark.parametrize("content", [b"nonsense", b""])
def test_a_broken_file_in_certs_d(secure: Secure, content: bytes) -> None:
    from ovms.errors import InputError

    path = secure.home / ".config/containers/certs.d" / secure.host / "ca.crt"
    path.write_bytes(content)
    with secure.connect() as client, pytest.raises(InputError, match=r"ca\.crt"):
        client.has_blob("x", of_bytes(b""))


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed: run 'make setup'")
def test_skopeo_reads_what_was_pushed(secure: Secure, layout: Layout, tmp_path: Path) -> None:
    """The witness: the same registry, token service, login and ``certs.d``."""
    name = secure.name("t/witness")
    artifact = small(layout, str(name))
    with secure.connect() as client:
        transfer.push(layout, client, name, artifact.digest)
    done = subprocess.run(
        ["skopeo", "inspect", "--raw", "--authfile", secure.home / ".docker/config.json",
         "--cert-dir", secure.home / ".config/containers/certs.d" / secure.host, f"docker://{name}"],
        capture_output=True, timeout=60, check=False, env={"PATH": os.environ["PATH"], "HOME": str(secure.home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert of_bytes(done.stdout) == artifact.digest
