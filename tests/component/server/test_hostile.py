"""Callers that mean no good: never a 500, never a hang, never a growth without bound."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.server import Server

from ovms.runtime.server import http
from ovms.spec import api, limits

NOBODY: Final = "7f0c3f6e-7d3b-4f1c-9a53-0d9c2f0e8a11"
POST: Final = b"POST /stop HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["../../etc/passwd", "/etc/shadow", "a\0b", "oci:/etc", "oci-archive:/dev/zero", "x" * 5000, "%2e%2e/"]
    ),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4),
    max_leaves=10,
)
FIELDS: Final = st.dictionaries(
    st.sampled_from(["manifest", "instance_id", "timeout_s", "force", "tag", "overrides", "content"]), JSON, max_size=5
)
OVERRIDES: Final = st.fixed_dictionaries(
    {
        "manifest": st.just("nowhere:1") | JSON,
        "overrides": st.dictionaries(st.sampled_from(sorted(api.Overrides.__dataclass_fields__)), JSON, max_size=4),
    }
)


def alive(server: Server) -> None:
    assert server.get("/healthz") == {"status": "ok"}


def refused(answer: bytes, *statuses: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    assert status in statuses, answer[:500]
    assert json.loads(body)["status"] == status


@pytest.mark.spec("RUN-3", "RUN-4", "ERR-5")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([operation.path for operation in api.OPERATIONS if operation.method == "POST"]),
    body=FIELDS | OVERRIDES | JSON,
)
def test_any_body_is_answered(server: Server, path: str, body: Any) -> None:
    reply = server.call("POST", path, body)
    assert 400 <= reply.status < 500, (reply.body, body)
    assert reply.json["code"] in api.CODES
    assert reply.json["status"] == reply.status


@pytest.mark.spec("RUN-5", "STA-5")
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=60))
def test_any_path_is_answered(server: Server, path: bytes) -> None:
    quoted = "".join(f"%{byte:02x}" for byte in path)
    for target in (f"/status/{quoted}", f"/logs/{quoted}?tail={quoted}", f"/{quoted}"):
        assert server.call("GET", target).status in (400, 404)
    assert server.call("GET", f"/events?since={quoted}").status == (200 if path.isdigit() else 400)


@pytest.mark.spec("SEC-2", "STA-5")
@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", ".lock", "%00", "a%2f..", "*", "%ff", "x" * 300]
)
def test_path_tricks_in_names(server: Server, name: str) -> None:
    assert server.call("GET", f"/status/{name}").status == 404
    assert server.call("GET", f"/logs/{name}").status == 404


@pytest.mark.spec("RUN-2")
def test_large_and_deep_bodies(server: Server) -> None:
    deep = b"[" * 200_000
    assert server.call("POST", "/stop", raw=deep).json["code"] == "json-invalid"
    long = b'{"instance_id": "' + b"a" * (limits.API_BODY_MAX - 100) + b'"}'
    assert server.call("POST", "/stop", raw=long).json["code"] == "invalid-input"
    many = json.dumps({"manifest": "web:1", "overrides": {"ports": [{"guest_port": "x"}] * 20000}}).encode()
    assert server.call("POST", "/start", raw=many).json["code"] == "invalid-input"
    # announced, and never sent
    refused(server.raw(POST + b"Content-Length: 99999999999\r\n\r\n"), 413)
    # not announced: chunks without end
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    refused(server.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20), 413)
    alive(server)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1 x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"POST /stop HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /stop HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /stop HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000,
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-Y: z\r\n" * 20_000 + b"\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-Y: z\r\n" * 5_000 + b"\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\0" * 100_000,
    ],
)
def test_what_is_no_request(server: Server, data: bytes) -> None:
    refused(server.raw(data), 400)
    alive(server)


def test_half_requests(server: Server) -> None:
    for data in (b"", b"GET", b"GET /healthz HTTP/1.1\r\nHost", POST + b"Content-Length: 10\r\n\r\n{", POST):
        server.raw(data)
    alive(server)


def test_expectations_and_pipelines(server: Server) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = server.raw(one * 50)
    assert answer.count(b"HTTP/1.1 200") == 50
    answer = server.raw(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 100")
    assert b"HTTP/1.1 400" in answer
    # after an error that leaves the connection whole, it goes on
    answer = server.raw(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n" + one)
    assert (answer.count(b"HTTP/1.1 404"), answer.count(b"HTTP/1.1 200")) == (1, 1)
    assert server.raw(b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.long
def test_slow_callers_do_not_hold_others_up(server: Server) -> None:
    """Many that never end their requests; all others are answered, and the slow ones are told after HEAD_TIMEOUT."""
    slow = []
    for _ in range(50):
        sock = server.open()
        sock.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        slow.append(sock)
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        at = time.monotonic()
        alive(server)
        assert time.monotonic() - at < 0.5
    for sock in slow:  # a byte now and then does not help
        sock.sendall(b"a")
    answer = slow[0].recv(65536)
    assert http.HEAD_TIMEOUT - 2 < time.monotonic() - began < http.HEAD_TIMEOUT + 5
    refused(answer, 408)
    for sock in slow:
        sock.close()


def test_thousands_of_connections(server: Server) -> None:
    before = server.fds()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard == resource.RLIM_INFINITY else min(hard, 4096), hard))
    held: list[socket.socket] = []
    try:
        refusals = 0
        for _ in range(http.CONNECTIONS_MAX + 100):
            sock = server.open()
            held.append(sock)
        held[-1].settimeout(10)
        if b"503" in held[-1].recv(100):
            refusals += 1
        assert refusals == 1
    finally:
        for sock in held:
            sock.close()
    deadline = time.monotonic() + 10
    while server.fds() > before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    alive(server)


@pytest.mark.long
def test_slow_bodies_are_told_so(server: Server) -> None:
    with server.open(timeout=http.BODY_TIMEOUT + 20) as sock:
        sock.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        refused(sock.recv(65536), 408)


def test_many_bodies_at_once_are_held_within_a_limit(server: Server) -> None:
    """Callers that send nearly all of a large body, and then wait: what the server holds of them has an end."""
    before, fds = server.rss(), server.fds()
    size = limits.API_BODY_MAX
    held = [server.open() for _ in range(2 * http.BODIES_MAX // size)]
    refusals = 0
    try:
        for sock in held:
            sock.setblocking(False)
        begin = [POST + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 10)] * len(held)
        deadline = time.monotonic() + 60
        while any(begin):
            assert time.monotonic() < deadline
            for at, sock in enumerate(held):
                with contextlib.suppress(BlockingIOError):
                    while begin[at]:
                        begin[at] = begin[at][sock.send(begin[at][:65536]) :]
                with contextlib.suppress(BlockingIOError):
                    if begin[at] and (answer := sock.recv(65536)):
                        refused(answer, 503)
                        refusals, begin[at] = refusals + 1, b""
            time.sleep(0.001)
        alive(server)
        assert server.rss() - before < 2 * http.BODIES_MAX
        for sock in held:
            with contextlib.suppress(BlockingIOError):
                if b" 503 " in sock.recv(100):
                    refusals += 1
    finally:
        for sock in held:
            sock.close()
    assert refusals >= len(held) // 2
    deadline = time.monotonic() + 10
    while server.fds() > fds + 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # and there is room again
    assert server.call("POST", "/stop", raw=b"{" + b" " * (size - 2)).json["code"] == "json-invalid"


@pytest.mark.long
def test_a_reader_that_does_not_read(server: Server) -> None:
    before = server.rss()
    socks = []
    for _ in range(10):
        sock = server.open()
        # thousands of answers, none of which is read
        try:
            sock.settimeout(0.3)
            for _ in range(50):
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        except TimeoutError:
            pass
        socks.append(sock)
    alive(server)
    assert server.rss() - before < 48 * limits.MIB
    for sock in socks:
        sock.close()


def test_streams_end_with_their_readers(server: Server) -> None:
    before = server.fds()
    for _ in range(30):
        sock = server.open()
        sock.sendall(b"GET /events?follow=true&since=99999999999999999 HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.recv(10)
        sock.close()
    deadline = time.monotonic() + 10
    while server.fds() > before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.spec("RUN-3", "ERR-5")
def test_nonsense_behind_a_head_is_answered_like_any(server: Server) -> None:
    answers = server.raw(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n50\r\n\r\n")
    head, _, rest = answers.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), head
    refused(rest, 400)
