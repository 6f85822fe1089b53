"""Which certificates count where, and what is said of a handshake that failed."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from ovms.oci import tls
from ovms.oci.registries import Certificates
from ovms.oci.tls import Trust, explain

HOST = "registry.example:5000"
OWN = Certificates((Path("own.crt"),), Path("own.cert"), Path("own.key"))
OTHER = Certificates((Path("other.crt"),))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Certificates, bool]]:
    """What contexts were made of: the files, and whether certificates are checked."""
    made: list[tuple[Certificates, bool]] = []

    def make(files: Certificates, *, verify: bool) -> Any:
        made.append((files, verify))
        return object()

    monkeypatch.setattr(tls, "_make", make)
    return made


def find(host: str) -> Certificates:
    return {HOST: OWN, "tokens.example": OTHER}.get(host, Certificates())


def test_each_host_has_its_own_files(made: list[tuple[Certificates, bool]]) -> None:
    trust = Trust(HOST, find)
    assert trust.named()
    assert not Trust("elsewhere.example", find).named()
    first = trust.context("Registry.example:5000")
    assert trust.context(HOST) is first
    trust.context("tokens.example")
    trust.context("cdn.example")
    trust.context("registry.example:5001")
    # elsewhere the registry's authorities, and never its client certificate
    assert made == [(OWN, True), (OTHER, True), (Certificates(OWN.ca_files), True)]


@pytest.mark.parametrize(("said", "led_to"), [("r.example:443", "r.example"), ("r.example", "r.example:443")])
def test_the_port_that_goes_without_saying(said: str, led_to: str, made: list[tuple[Certificates, bool]]) -> None:
    trust = Trust(said, lambda host: OWN if host == said else Certificates())
    assert trust.context(said) is trust.context(led_to)
    assert made == [(OWN, True)]


def test_insecure_is_one_host(made: list[tuple[Certificates, bool]]) -> None:
    trust = Trust(HOST, insecure=True)
    for host in (HOST, "registry.example:5001", "tokens.example", "registry.example.evil.net"):
        trust.context(host)
    none = Certificates()
    assert made == [(none, False), (none, True)]


def test_the_files_are_looked_for_once(made: list[tuple[Certificates, bool]]) -> None:
    asked: list[str] = []

    def look(host: str) -> Certificates:
        asked.append(host)
        return Certificates()

    trust = Trust(HOST, look)
    for _ in range(3):
        trust.context(HOST)
    assert asked == [HOST]


def error(kind: type[ssl.SSLError], reason: str) -> ssl.SSLError:
    exc = kind(1, f"[SSL: {reason}] (_ssl.c:1)")
    exc.reason = reason
    return exc


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "client certificate"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", "client certificate"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "protocol version"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "handshake failure"),
    ],
)
def test_what_a_failed_handshake_means(reason: str, said: str) -> None:
    explained = explain(error(ssl.SSLError, reason), HOST)
    assert explained is not None
    assert said in explained[0]


@pytest.mark.parametrize(
    "exc",
    [
        error(ssl.SSLEOFError, "UNEXPECTED_EOF_WHILE_READING"),
        error(ssl.SSLError, "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"),
        ConnectionResetError(),
    ],
)
def test_a_connection_that_breaks_is_tried_again(exc: Exception) -> None:
    assert explain(exc, HOST) is None
