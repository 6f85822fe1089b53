"""How a host is spoken to, without a network: what is sent where, and in which order."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

import pytest

from ovms.errors import RegistryUnreachable
from ovms.oci.credentials import Credential
from ovms.oci.http import Broken
from ovms.oci.registries import Certificates, Endpoint
from ovms.oci.route import Route
from ovms.oci.session import Place, Session, Settings
from ovms.oci.tls import Trust

CHALLENGE = 'Bearer realm="https://auth.example.com/token",service="s"'
SCOPE = "repository:x:pull,push"


class Answer:
    elsewhere = False

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.status, self.body = status, body
        self._headers = {key.replace("_", "-").lower(): value for key, value in headers.items()}
        self.asked, self.authorized = "", False
        self.ended = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended += 1

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    def headers(self, name: str) -> list[str]:
        return [self._headers[name]] if name in self._headers else []

    def read(self, limit: int, *, what: str = "") -> bytes:
        return self.body


class Wire:
    """Takes the transport's place."""

    def __init__(self, reply: Callable[[str, str, Mapping[str, str]], Answer]) -> None:
        self.reply = reply
        self.sent: list[tuple[str, str, str | None]] = []

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | IO[bytes] | None = None
    ) -> Answer:
        self.sent.append((method, url, headers.get("Authorization")))
        return self.reply(method, url, headers)


class Me:
    def get(self, host: str, repository: str) -> Credential:
        return Credential("me", "pass")


def session(host: str, wire: Wire, *, insecure: bool = False, files: bool = False, **settings: Any) -> Session:
    trust = Trust(host, lambda _: FILES if files else Certificates())
    made = Session(host, Settings(credentials=Me(), **settings), trust=trust, insecure=insecure)
    made._transport = wire  # type: ignore[assignment]
    return made


FILES = Certificates(ca_files=(Path("ca.crt"),))


def get(session: Session) -> Any:
    return session.request("GET", "x/manifests/1", "x", SCOPE, {})


@pytest.mark.parametrize(
    ("host", "options", "expected"),
    [
        ("registry.example", {}, ["https"]),
        ("registry.example", {"tls_verify": True}, ["https"]),
        ("127.0.0.1:5000", {}, ["http"]),
        ("localhost:5000", {"files": True}, ["https"]),
        ("localhost:5000", {"tls_verify": True}, ["https"]),
        ("registry.example", {"insecure": True}, ["https", "https"]),  # the first asks what it speaks
        ("localhost:5000", {"insecure": True}, ["https", "https"]),
        ("docker.io", {}, ["https"]),
    ],
)
def test_tls_is_the_rule(host: str, options: dict[str, Any], expected: list[str]) -> None:
    wire = Wire(lambda *_: Answer(200))
    get(session(host, wire, **options))
    assert [url.partition(":")[0] for _, url, _ in wire.sent] == expected


def test_docker_hub_is_elsewhere() -> None:
    wire = Wire(lambda *_: Answer(200))
    assert get(session("docker.io", wire)).asked == "docker.io"
    assert wire.sent[0][1] == "https://registry-1.docker.io/v2/x/manifests/1"


def test_plain_text_comes_last() -> None:
    def reply(method: str, url: str, headers: Mapping[str, str]) -> Answer:
        if url.startswith("https"):
            raise RegistryUnreachable("no TLS")
        return Answer(200)

    wire = Wire(reply)
    insecure = session("registry.example", wire, insecure=True)
    get(insecure)
    get(insecure)
    assert [url.rpartition("/v2/")[0] for _, url, _ in wire.sent] == [
        "https://registry.example", "http://registry.example", "http://registry.example", "http://registry.example",
    ]  # fmt: skip
    with pytest.raises(RegistryUnreachable, match="no TLS"):
        get(session("registry.example", wire))


def test_a_loopback_registry_that_turns_out_to_speak_tls() -> None:
    def reply(method: str, url: str, headers: Mapping[str, str]) -> Answer:
        tls = url.startswith("https")
        return Answer(200 if tls else 400, b"Client sent an HTTP request to an HTTPS server.\n")

    wire = Wire(reply)
    local = session("localhost:5000", wire)
    assert get(local).status == get(local).status == 200
    assert [url.partition(":")[0] for _, url, _ in wire.sent] == ["http", "http", "https", "https"]


def test_a_400_is_no_sign_of_tls() -> None:
    wire = Wire(lambda *_: Answer(400, b"bad name"))
    assert get(session("localhost:5000", wire)).status == 400
    assert {url.partition(":")[0] for _, url, _ in wire.sent} == {"http"}


@pytest.mark.parametrize("challenge", ["", "Negotiate", CHALLENGE.removeprefix("Bearer ")])
def test_a_401_that_nobody_can_answer_is_ended_by_who_reads_it(challenge: str) -> None:
    """Else its connection would be given back twice, and the second time while somebody else may have it."""
    wire = Wire(lambda *_: Answer(401, b"go away", **({"www_authenticate": challenge} if challenge else {})))
    answer = session("r.example", wire).request("GET", "x/manifests/1", "x", SCOPE, {})
    assert (answer.status, answer.ended) == (401, 0)  # type: ignore[attr-defined]
    assert len(wire.sent) == 1


def test_an_upload_that_breaks_may_have_broken_for_its_token() -> None:
    """A registry need not read what it refuses: the 401 is lost with the connection. The next try has a new token."""
    tokens = iter((b'{"token": "old"}', b'{"token": "new"}'))

    def reply(method: str, url: str, headers: Mapping[str, str]) -> Answer:
        if "/token" in url:
            return Answer(200, next(tokens))
        if "Authorization" not in headers:
            return Answer(401, www_authenticate=CHALLENGE)
        if headers["Authorization"] == "Bearer old" and method == "PUT":
            raise Broken("reset")
        return Answer(201)

    upload = session("registry.example.com", Wire(reply))
    assert get(upload).status == 201
    with pytest.raises(Broken):
        upload.request("PUT", "x/blobs/uploads/1", "x", SCOPE, {}, lambda: io.BytesIO(b"data"))
    assert upload.request("PUT", "x/blobs/uploads/1", "x", SCOPE, {}, lambda: io.BytesIO(b"data")).status == 201


@pytest.mark.spec("SEC-4")
def test_an_upload_that_leads_elsewhere_goes_without_a_token() -> None:
    wire = Wire(lambda method, url, headers: Answer(201 if "cdn" in url else 200))
    upload = session("registry.example.com", wire)
    upload.request("PUT", "https://cdn.example.net/v2/upload", "x", SCOPE, {}, lambda: b"data")
    assert wire.sent == [("PUT", "https://cdn.example.net/v2/upload", None)]


@pytest.mark.parametrize(
    ("host", "location"),
    [
        ("registry.example.com", "https://registry.example.com:443/v2/upload"),
        ("registry.example.com:443", "https://registry.example.com/v2/upload"),
        ("Registry.example.com", "https://registry.example.com/v2/upload"),
        ("registry.example.com", "https://registry.example.com/api/upload"),
    ],
)
def test_an_upload_at_home_goes_with_its_token(host: str, location: str) -> None:
    def reply(method: str, url: str, headers: Mapping[str, str]) -> Answer:
        if "/token" in url:
            return Answer(200, b'{"token": "t"}')
        return Answer(201) if "Authorization" in headers else Answer(401, www_authenticate=CHALLENGE)

    upload = session(host, Wire(reply))
    assert upload.request("PUT", location, "x", SCOPE, {}, lambda: b"data").status == 201


@pytest.mark.parametrize(
    "url",
    [
        "http://registry.example.com/v2/upload",
        "https://registry.example.com:444/v2/upload",
        "https://registry.example.com:80/v2/upload",
        "https://registry.example.com.evil.example/v2/upload",
    ],
)
def test_another_port_or_scheme_is_another_place(url: str) -> None:
    wire = Wire(lambda method, url, headers: Answer(200))
    registry = session("registry.example.com", wire)
    get(registry)
    assert not registry.owns(url)


def test_how_an_answer_goes_on_is_asked_of_who_gave_it() -> None:
    mirror_wire, wire = (Wire(lambda *_: Answer(200)) for _ in range(2))
    mirror, own = session("mirror.example", mirror_wire), session("registry.example", wire)
    places = (
        Place(mirror, Endpoint("mirror.example", "cache", False, True, False)),
        Place(own, Endpoint("registry.example", "", False, False, False)),
    )
    route = Route(lambda repository, *, pull: places)
    first = route.request("GET", "x/referrers/sha256:0", "x", "pull", {})
    assert first.home == ("https", "mirror.example")
    get(own)
    route.request("GET", "https://mirror.example/v2/next", "x", "pull", {})
    route.request("GET", "https://registry.example/v2/next", "x", "pull", {})
    assert [url for _, url, _ in mirror_wire.sent] == [
        "https://mirror.example/v2/cache/x/referrers/sha256:0", "https://mirror.example/v2/next",
    ]  # fmt: skip
    assert wire.sent[-1][1] == "https://registry.example/v2/next"
