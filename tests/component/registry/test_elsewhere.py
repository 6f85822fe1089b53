"""Registries that are not on loopback by their names (a proxy leads there), and redirects to other hosts."""

from __future__ import annotations

import base64
import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import faulty
from support.artifacts import small
from support.faulty import Server
from support.proxy import Proxy
from support.registry import HTPASSWD, Registry
from support.tls import Authority, server_context
from support.tokens import TokenService

from ovms.errors import RegistryDenied, RegistryProtocol, RegistryUnreachable
from ovms.oci import transfer
from ovms.oci.connect import Connector
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.spec.digest import of_bytes


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def log_in(home: Path, host: str) -> None:
    entry = {"auth": base64.b64encode(b"ovms:secret").decode()}
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker/config.json").write_text(json.dumps({"auths": {host: entry}}))


def test_through_a_proxy(authority: Authority, tmp_path: Path, layout: Layout) -> None:
    registry = Registry(tmp_path / "r", tls=authority.issue("far", names="DNS:registry.example"), htpasswd=HTPASSWD)
    try:
        with Proxy() as proxy:
            host = f"registry.example:{registry.port}"
            authority.trust(tmp_path, host)
            log_in(tmp_path, host)
            name = Reference(host, "t/x", "1")
            artifact = small(layout, str(name))
            proxied = {"HOME": str(tmp_path), "HTTPS_PROXY": proxy.url.replace("//", "//me:p%40ss@")}
            with Connector.from_environment(proxied)(host) as client:
                transfer.push(layout, client, name, artifact.digest)
            assert proxy.heads[0].startswith(f"CONNECT {host} ".encode())
            heads = b"".join(proxy.heads).lower()
            assert b"proxy-authorization: basic " + base64.b64encode(b"me:p@ss").lower() in heads
            assert b"\r\nauthorization" not in heads
            proxy.refuse = True
            connections = len(proxy.heads)
            with (
                Connector.from_environment(proxied)(host) as client,
                pytest.raises(RegistryUnreachable, match=r"through the proxy: .*407") as caught,
            ):
                client.get_manifest(name)
            assert "NO_PROXY" in str(caught.value.hint)
            assert "p@ss" not in str(caught.value)
            assert sum(b"CONNECT" in head for head in proxy.heads) <= connections + 1, "it asked again"
            count = len(proxy.heads)
            # loopback is never gone to by way of a proxy
            with (
                Connector.from_environment(proxied, tls_verify=False)(registry.host) as client,
                pytest.raises(RegistryDenied),
            ):
                client.get_manifest(Reference(registry.host, "t/x", "1"))
            assert len(proxy.heads) == count
    finally:
        registry.close()


@pytest.mark.spec("SEC-4")
def test_a_password_never_goes_out_in_plain_text(tmp_path: Path, layout: Layout) -> None:
    """Not even to a registry that the user has called insecure."""
    registry = Registry(tmp_path / "r", htpasswd=HTPASSWD)
    try:
        with Proxy() as proxy:
            host = f"registry.example:{registry.port}"
            environ = {"HOME": str(tmp_path), "HTTPS_PROXY": proxy.url, "HTTP_PROXY": proxy.url}
            name = Reference(host, "t/x", "1")
            artifact = small(layout, str(name))
            log_in(tmp_path, host)
            with (
                Connector.from_environment(environ, tls_verify=False)(host) as client,
                pytest.raises(RegistryDenied, match="without TLS"),
            ):
                transfer.push(layout, client, name, artifact.digest)
            assert any(head.startswith(b"GET http://registry.example") for head in proxy.heads)
            assert b"authorization:" not in b"".join(proxy.heads).lower()
            proxy.heads.clear()
            with (
                Connector.from_environment(environ)(host) as client,
                pytest.raises(RegistryUnreachable, match="does not speak TLS"),
            ):
                transfer.push(layout, client, name, artifact.digest)
            assert {head.partition(b" ")[0] for head in proxy.heads} == {b"CONNECT"}
    finally:
        registry.close()


def test_an_open_registry_in_plain_text_when_asked(registry: Registry, tmp_path: Path, layout: Layout) -> None:
    with Proxy() as proxy:
        host = f"registry.example:{registry.port}"
        environ = {"HOME": str(tmp_path), "HTTPS_PROXY": proxy.url, "HTTP_PROXY": proxy.url}
        name = Reference(host, "t/open", "1")
        artifact = small(layout, str(name))
        with Connector.from_environment(environ, tls_verify=False)(host) as client:
            transfer.push(layout, client, name, artifact.digest)
            assert client.get_manifest(name)[1].digest == artifact.digest


@pytest.mark.spec("SEC-4")
@pytest.mark.parametrize(
    ("service", "named", "served"),
    [
        ("tokens.example.com", "", True),  # a sibling
        ("tokens.example.net", "", False),
        ("tokens.example.net", "registry.example.com:{registry}=tokens.example.net:{service}", True),
        ("tokens.example.net", "registry.example.com:{registry}=tokens.example.net", False),  # another port
    ],
)
def test_a_token_service_elsewhere(
    service: str, named: str, served: bool, authority: Authority, tmp_path: Path, layout: Layout
) -> None:
    tls = authority.issue("both", names=f"DNS:registry.example.com,DNS:{service}")
    with Proxy() as proxy, TokenService(tmp_path / "tokens", tls, host=service) as tokens:
        registry = Registry(tmp_path / "r", tls=tls, auth=tokens.registry_config())
        try:
            host = f"registry.example.com:{registry.port}"
            authority.trust(tmp_path, host)
            log_in(tmp_path, host)
            name = Reference(host, "t/x", "1")
            artifact = small(layout, str(name))
            environ = {"HOME": str(tmp_path), "HTTPS_PROXY": proxy.url}
            environ["OVMS_TOKEN_SERVICES"] = named.format(registry=registry.port, service=tokens.port)
            with Connector.from_environment(environ)(host) as client:
                if served:
                    transfer.push(layout, client, name, artifact.digest)
                    return
                with pytest.raises(RegistryDenied, match=service) as caught:
                    transfer.push(layout, client, name, artifact.digest)
            assert f"OVMS_TOKEN_SERVICES='{host}={service}:{tokens.port}'" in str(caught.value.hint)
            assert tokens.asked == []
            # without credentials anybody may be asked
            (tmp_path / ".docker/config.json").unlink()
            with Connector.from_environment(environ)(host) as client, pytest.raises(RegistryDenied):
                client.get_manifest(name)
            assert [asked.user for asked in tokens.asked] == [None]
        finally:
            registry.close()


@pytest.mark.spec("SEC-4")
def test_a_token_does_not_follow_a_redirect(authority: Authority, tmp_path: Path, layout: Layout) -> None:
    """docker-registry's own redirects, to a server that has its blobs."""
    seen: list[Any] = []
    data = tmp_path / "r/data"

    class Storage(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    storage = ThreadingHTTPServer(("127.0.0.1", 0), partial(Storage, directory=str(data)))
    storage.socket = server_context(authority.issue("storage")).wrap_socket(storage.socket, server_side=True)
    threading.Thread(target=storage.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    base = f"https://127.0.0.1:{storage.server_address[1]}"
    with TokenService(tmp_path / "tokens", authority.issue("tokens")) as tokens:
        redirects = f"middleware: {{storage: [{{name: redirect, options: {{baseurl: '{base}'}}}}]}}\n"
        registry = Registry(tmp_path / "r", tls=authority.issue("registry"), auth=tokens.registry_config() + redirects)
        try:
            authority.trust(tmp_path, registry.host)
            log_in(tmp_path, registry.host)
            name = Reference(registry.host, "t/x", "1")
            artifact = small(layout, str(name))
            other = Layout(tmp_path / "other")
            with Connector.from_environment({"HOME": str(tmp_path)})(registry.host) as client:
                transfer.push(layout, client, name, artifact.digest)
                transfer.pull(other, client, name)
            assert len(seen) == len(artifact.image.blobs), "the registry did not redirect"
            assert {authorization for _, authorization in seen} == {None}
        finally:
            registry.close()
            storage.shutdown()
            storage.server_close()


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("what", ["redirect", "upload"])
def test_plain_text_goes_to_strangers_only_where_that_is_allowed(
    what: str, allowed: bool, tmp_path: Path, layout: Layout
) -> None:
    """A registry on loopback may be spoken to in plain text. What it leads to may not, for that."""
    conf = tmp_path / "registries.conf"
    with Proxy() as proxy, Server() as server, Server() as stranger:
        away = f"blobs.example:{stranger.server_address[1]}"
        conf.write_text(f'[[registry]]\nlocation = "{away}"\ninsecure = true\n' if allowed else "")
        environ = {"HOME": str(tmp_path), "HTTP_PROXY": proxy.url, "CONTAINERS_REGISTRIES_CONF": str(conf)}
        data = b"a blob"
        blob = Descriptor("a/b", of_bytes(data), len(data))
        stranger.blobs[blob.digest] = data
        stranger.uploads["u"] = b""
        server.faults = [
            ("GET", "/blobs/", faulty.redirect(f"http://{away}/v2/x/blobs/{blob.digest}")),
            ("POST", "/uploads/", faulty.status(202, Location=f"http://{away}/v2/x/blobs/uploads/u")),
        ]
        with Connector.from_environment(environ)(server.host) as client:

            def transport() -> None:
                if what == "redirect":
                    assert b"".join(bytes(piece) for piece in client.read_blob("x", blob)) == data
                else:
                    client.push_blob("x", blob, lambda _offset, _size: io.BytesIO(data))

            if allowed:
                transport()
                assert len(stranger.seen) == 1
            else:
                with pytest.raises(RegistryProtocol, match=f"{away} in plain HTTP") as caught:
                    transport()
                assert server.host in caught.value.message
                assert "insecure" in str(caught.value.hint)
                assert (proxy.heads, stranger.seen) == ([], [])
