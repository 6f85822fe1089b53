"""Challenges, tokens, and to whom credentials go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import RegistryDenied, RegistryError, RegistryProtocol
from ovms.oci.auth import Authenticator, Challenge, is_loopback, parse_challenges
from ovms.oci.credentials import Credential

ME = Credential("me", "secret")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Basic", [Challenge("basic", {})]),
        ('Basic realm="x"', [Challenge("basic", {"realm": "x"})]),
        (
            'Bearer realm="https://a/token",service="s",scope="repository:x:pull,push"',
            [Challenge("bearer", {"realm": "https://a/token", "service": "s", "scope": "repository:x:pull,push"})],
        ),
        (
            'bearer Realm=plain , service = "q\\"uo\\\\te"',
            [Challenge("bearer", {"realm": "plain", "service": 'q"uo\\te'})],
        ),
        (
            'Basic realm="x", Bearer realm="y"',
            [Challenge("basic", {"realm": "x"}), Challenge("bearer", {"realm": "y"})],
        ),
        ("", []),
        ('"', []),
        ('Bearer realm="open', [Challenge("bearer", {})]),
    ],
)
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges(header) == expected


@given(st.text(max_size=200))
def test_any_header_is_read(header: str) -> None:
    parse_challenges(header)


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:1", "127.1.2.3", "[::1]:5000", "LOCALHOST"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "localhost.example.com", "10.0.0.1", "[::2]", ""]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


class Service:
    """A token service that notes what it is asked."""

    def __init__(self, status: int = 200, body: bytes = b'{"token": "t", "expires_in": 300}') -> None:
        self.status, self.body = status, body
        self.asked: list[tuple[str, str, Mapping[str, str], bytes | None]] = []

    def __call__(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, limit: int
    ) -> tuple[int, bytes]:
        self.asked.append((method, url, headers, body))
        return self.status, self.body


def bearer(service: Service, realm: str, *, plain: bool = False, host: str = "registry.example.com") -> Authenticator:
    authenticator = Authenticator(host, plain_http=plain, fetch=service)
    assert authenticator.challenged([f'Bearer realm="{realm}",service="s"'], "repository:x:pull")
    return authenticator


@pytest.mark.spec("SEC-4")
def test_nothing_is_sent_before_it_is_asked_for() -> None:
    authenticator = Authenticator("registry.example.com", plain_http=False, fetch=Service())
    assert authenticator.header("repository:x:pull", lambda: ME) is None


def test_a_token_is_asked_for_once_for_each_scope() -> None:
    service = Service()
    authenticator = bearer(service, "https://auth.example.com/token")
    for _ in range(3):
        assert authenticator.header("repository:x:pull", lambda: ME) == "Bearer t"
    authenticator.header("repository:y:pull", lambda: None)
    assert len(service.asked) == 2
    method, url, headers, _ = service.asked[0]
    assert method == "GET"
    assert parse_qs(urlsplit(url).query) == {"service": ["s"], "scope": ["repository:x:pull"]}
    assert headers["Authorization"].startswith("Basic ")
    assert service.asked[1][2] == {}


def test_an_identity_token_is_exchanged() -> None:
    service = Service(body=b'{"access_token": "a"}')
    authenticator = bearer(service, "https://auth.example.com/token")
    assert authenticator.header("repository:x:pull", lambda: Credential("<token>", "r", identity=True)) == "Bearer a"
    method, _, headers, body = service.asked[0]
    assert method == "POST"
    assert "Authorization" not in headers
    form = parse_qs((body or b"").decode())
    assert form["grant_type"] == ["refresh_token"]
    assert form["refresh_token"] == ["r"]


@pytest.mark.spec("SEC-4")
@pytest.mark.parametrize(
    "realm",
    [
        "http://auth.example.com/token",
        "ftp://auth.example",
        "/token",
        "https://",
        "https://me@evil.example/",
        r"https://evil\\.example.com/",  # in a header, one backslash: to some parsers the host "evil"
        "http://127.0.0.1/",
    ],
)
def test_credentials_never_go_out_unprotected(realm: str) -> None:
    service = Service()
    with pytest.raises(RegistryProtocol):
        bearer(service, realm).header("repository:x:pull", lambda: ME)
    assert service.asked == []


def test_a_plain_registry_on_loopback_may_have_its_token_service_there() -> None:
    local = bearer(Service(), "http://127.0.0.1:5001/token", plain=True, host="localhost:5000")
    assert local.header("s", lambda: ME) == "Bearer t"
    with pytest.raises(RegistryProtocol):
        bearer(Service(), "http://auth.example.com/token", plain=True).header("s", lambda: ME)


@pytest.mark.parametrize("credential", [None, ME])
def test_a_refusal_says_how_to_log_in(credential: Credential | None) -> None:
    with pytest.raises(RegistryDenied) as caught:
        bearer(Service(401), "https://auth.example.com/").header("repository:team/x:pull", lambda: credential)
    assert "team/x" in caught.value.message
    assert "login" in str(caught.value.hint)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"token": 5}', b'{"token": "a\\nb"}', b'{"token": ""}', b"\xff"])
def test_a_service_that_gives_no_token(body: bytes) -> None:
    with pytest.raises(RegistryProtocol):
        bearer(Service(body=body), "https://auth.example.com/").header("s", lambda: ME)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.dictionaries(
    st.sampled_from(["token", "access_token", "expires_in"]), c)))  # fmt: skip
def test_any_answer_is_a_token_or_an_error(value: object) -> None:
    service = Service(body=json.dumps(value).encode())
    try:
        bearer(service, "https://auth.example.com/").header("s", lambda: ME)
    except RegistryError:
        pass


def test_basic_goes_to_the_registry_itself() -> None:
    authenticator = Authenticator("registry.example.com", plain_http=False, fetch=Service())
    assert authenticator.challenged(['Basic realm="x"'], "s")
    assert (
        authenticator.header("s", lambda: Credential("Aladdin", "open sesame")) == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    )
    assert authenticator.header("s", lambda: None) is None


@pytest.mark.parametrize("order", [1, -1])
def test_who_may_choose_and_has_no_password_gets_a_token(order: int) -> None:
    challenges = ['Basic realm="x"', 'Bearer realm="https://auth.example.com/token",service="s"'][::order]
    authenticator = Authenticator("registry.example.com", plain_http=False, fetch=Service())
    assert authenticator.challenged(challenges, "s")
    assert authenticator.header("s", lambda: None) == "Bearer t"
    expected = "Basic " if order == 1 else "Bearer "
    assert str(authenticator.header("s", lambda: ME)).startswith(expected)


def test_a_challenge_that_nobody_can_answer() -> None:
    authenticator = Authenticator("registry.example.com", plain_http=False, fetch=Service())
    assert not authenticator.challenged(["Negotiate", "Bearer", ""], "s")


def test_lifetimes_are_kept_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    service = Service(body=b'{"token": "t", "expires_in": 1}')
    authenticator = bearer(service, "https://auth.example.com/")
    authenticator.header("s", lambda: ME)
    now += 59
    authenticator.header("s", lambda: ME)
    assert len(service.asked) == 1
    now += 2
    authenticator.header("s", lambda: ME)
    assert len(service.asked) == 2


@pytest.mark.spec("SEC-4")
@pytest.mark.parametrize("realm", ["https://auth.example.com/token", "http://registry.example.com:5001/token"])
def test_a_registry_in_plain_text_gets_no_token_of_the_user_s(realm: str) -> None:
    """Neither does a token service beside it in plain text; both may be asked anonymously."""
    service = Service()
    with pytest.raises(RegistryDenied, match="without TLS"):
        bearer(service, realm, plain=True).header("s", lambda: ME)
    assert service.asked == []
    assert bearer(service, realm, plain=True).header("s", lambda: None) == "Bearer t"


def test_only_the_token_that_was_refused_is_dropped() -> None:
    service = Service()
    authenticator = bearer(service, "https://auth.example.com/token")
    scope, refused = "repository:x:pull", ['Bearer realm="https://auth.example.com/token"']
    assert authenticator.header(scope, lambda: ME) == "Bearer t"
    service.body = b'{"token": "u"}'
    # two transfers were sent away with the same token; the second one hears of it when the first has a new one
    assert authenticator.challenged(refused, scope, "Bearer t")
    assert authenticator.header(scope, lambda: ME) == "Bearer u"
    assert authenticator.challenged(refused, scope, "Bearer t")
    assert authenticator.header(scope, lambda: ME) == "Bearer u"
    assert len(service.asked) == 2
