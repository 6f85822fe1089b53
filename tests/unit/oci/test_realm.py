"""Which token services get a password, and which proxies are used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import InputError, OvmsError, Unsupported
from ovms.oci.proxies import Proxies
from ovms.oci.realm import TokenServices, same_host


@pytest.mark.spec("SEC-4")
@pytest.mark.parametrize(
    ("registry", "service"),
    [
        ("registry.example", "registry.example"),
        ("registry.example:5000", "registry.example:5001"),  # its own host, whatever the port
        ("registry.example", "REGISTRY.example:443"),
        ("registry-1.docker.io", "auth.docker.io"),  # siblings
        ("registry.gitlab.com", "gitlab.com"),  # a parent
        ("a.b.example.com:5000", "example.com"),
        ("registry.example.com", "auth.example.com:8443"),
        ("127.0.0.1:5000", "127.0.0.1:5001"),
        ("localhost:5000", "127.0.0.1:5001"),
        ("192.0.2.1:5000", "192.0.2.1:5001"),
        ("[2001:db8::1]:5000", "[2001:db8::1]"),
    ],
)
def test_services_beside_the_registry(registry: str, service: str) -> None:
    assert TokenServices().trusts(registry, service)


@pytest.mark.spec("SEC-4")
@pytest.mark.parametrize(
    ("registry", "service"),
    [
        ("registry.example", "auth.example"),  # one label in common
        ("registry.example", "example"),
        ("registry.example.com", "com"),
        ("registry.example.com", "evil.com"),
        ("registry.example.com", "evilexample.com"),
        ("registry.example.com", "auth.evil.com"),
        ("registry.example.com", "a.auth.example.com"),  # no sibling: more than the first label differs
        ("registry.example.com", "registry.example.com.evil.net"),
        ("example.com", "auth.example.net"),
        ("192.0.2.1", "192.0.2.2"),
        ("1.192.0.2", "192.0.2"),
        ("10.0.0.1", "11.0.0.1"),
        ("registry.example.com", "127.0.0.1"),
        ("127.0.0.1:5000", "registry.example.com"),
        ("[2001:db8::1]", "[2001:db8::2]"),
        ("registry.example.com", "auth.example.com@evil.net"),
        ("registry.example.com", ""),
        ("registry.example.com", "auth.example.com:x"),
    ],
)
def test_services_elsewhere(registry: str, service: str) -> None:
    assert not TokenServices().trusts(registry, service)


def test_services_that_the_user_has_named() -> None:
    named = TokenServices("registry.example=auth.example.net, other.example:5000=auth.example.net:8443\n")
    assert named.trusts("registry.example", "auth.example.net")
    assert named.trusts("registry.example:443", "auth.example.net:443")
    assert named.trusts("other.example:5000", "auth.example.net:8443")
    assert not named.trusts("registry.example", "auth.example.net:8443")
    assert not named.trusts("other.example", "auth.example.net:8443")
    assert not named.trusts("auth.example.net", "registry.example")
    assert TokenServices.from_environment({}).trusts("a.example", "a.example")


@pytest.mark.parametrize("text", ["registry.example", "=", "a=", "=b", "a=b=c/d", "https://a=b", "a:x=b", "a=me@b"])
def test_what_names_no_service(text: str) -> None:
    with pytest.raises(InputError, match="OVMS_TOKEN_SERVICES"):
        TokenServices(text)


@given(st.text(), st.text(), st.text())
def test_any_text_is_answered(text: str, registry: str, service: str) -> None:
    same_host(registry, service)
    try:
        assert TokenServices(text).trusts(registry, service) in (True, False)
    except InputError:
        pass


ENVIRON = {"HTTPS_PROXY": "http://proxy.example:3128", "http_proxy": "plain.example"}


def test_the_proxy_of_a_scheme() -> None:
    proxies = Proxies(ENVIRON)
    found = proxies.find("https://registry.example/v2/")
    assert found is not None
    assert (found.url, found.credentials) == ("http://proxy.example:3128", None)
    assert proxies.find("http://registry.example/v2/").url == "http://plain.example:80"  # type: ignore[union-attr]
    assert Proxies({}).find("https://registry.example/") is None
    assert Proxies({**ENVIRON, "https_proxy": "http://lower.example"}).find("https://r.example/").url == (  # type: ignore[union-attr]
        "http://lower.example:80"
    )


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1", "127.1.2.3:80", "[::1]:5000"])
def test_never_for_loopback(host: str) -> None:
    assert Proxies(ENVIRON).find(f"https://{host}/v2/") is None


@pytest.mark.parametrize(
    ("entry", "url", "excepted"),
    [
        ("*", "https://r.example/", True),
        ("r.example", "https://r.example:5000/", True),
        ("example", "https://r.example/", True),
        (".example", "https://r.example/", True),
        ("*.example", "https://r.example/", True),
        ("xample", "https://r.example/", False),
        ("r.example:5000", "https://r.example:5000/", True),
        ("r.example:443", "https://r.example/", True),
        ("r.example:5000", "https://r.example/", False),
        ("a.example, b.example", "https://b.example/", True),
        ("192.0.2.0/24", "https://192.0.2.7/", True),
        ("192.0.2.0/24", "https://192.0.3.7/", False),
        ("192.0.2.7", "https://192.0.2.7:5000/", True),
        ("2001:db8::/32", "https://[2001:db8::1]/", True),
        ("[nonsense", "https://r.example/", False),
    ],
)
def test_exceptions(entry: str, url: str, excepted: bool) -> None:
    assert (Proxies({**ENVIRON, "NO_PROXY": entry}).find(url) is None) is excepted


def test_a_proxy_with_a_password() -> None:
    found = Proxies({"HTTPS_PROXY": "http://me:p%40ss@proxy.example:3128"}).find("https://r.example/")
    assert found is not None
    assert (found.url, found.credentials) == ("http://proxy.example:3128", "me:p@ss")
    assert "p@ss" not in repr(found)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("socks5://me:hunter2@proxy.example", Unsupported),
        ("http://me:hunter2@[", InputError),
        ("http://me:hunter2@", InputError),
        ("http://me:hunter2@proxy.example:x", InputError),
    ],
)
def test_a_proxy_that_is_none(value: str, kind: type[OvmsError]) -> None:
    with pytest.raises(kind, match="HTTPS_PROXY") as caught:
        Proxies({"https_proxy": value}).find("https://r.example/")
    assert "hunter2" not in str(caught.value) + str(caught.value.hint)
