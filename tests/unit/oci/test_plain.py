"""Plain answers: taken as they come, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

import pytest

from ovms.oci import plain
from ovms.oci import response as unusual
from ovms.oci.connections import Response

BODY = b"some bytes\r\n\r\nof a blob"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: %d\r\nETag: x\r\n\r\n" % len(BODY)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def through(data: bytes, size: int, *, pieces: int = 1 << 20) -> Iterator[tuple[bytes | None, plain.Answer]]:
    """What is made of an answer that comes in *pieces* of so many bytes, its rest not waited for."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    answer = plain.Answer(ours)
    body = None
    with ours, theirs:
        for at in range(0, len(data), pieces):
            theirs.sendall(data[at : at + pieces])
            if (body := answer.take(size)) is not None:
                break
        theirs.close()
        yield body, answer


@pytest.mark.parametrize("pieces", [1, 2, 7, len(HEAD) - 1, len(HEAD), len(HEAD) + 1, 1000])
def test_an_answer_comes_whole_however_it_comes(pieces: int) -> None:
    with through(HEAD + BODY, len(BODY), pieces=pieces) as (body, answer):
        assert body == BODY
        assert answer.clean


@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_of_every_size(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    ours, theirs = pair
    data = random.Random(size).randbytes(size)
    answer = plain.Answer(ours)
    theirs.sendall(b"HTTP/1.1 200 \r\ncontent-length:%d \r\n\r\n" % size)
    body = answer.take(size)
    for at in range(0, size, 50_000):
        assert body is None
        theirs.sendall(data[at : at + 50_000])
        while body is None and len(answer._data) < answer._body + at + min(50_000, size - at):  # type: ignore[operator]
            body = answer.take(size)
    assert body == data
    assert answer.clean


def test_what_comes_after_it_is_no_part_of_it(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(HEAD + BODY + b"HTTP/1.1 200 OK\r\n")
    answer = plain.Answer(ours)
    assert answer.take(len(BODY)) == BODY
    assert not answer.clean


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1", HEAD, HEAD + BODY[:-1]])
def test_one_that_ends_too_early(pair: tuple[socket.socket, socket.socket], data: bytes) -> None:
    ours, theirs = pair
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    answer = plain.Answer(ours)
    with pytest.raises(plain.Disconnected):
        while True:
            assert answer.take(len(BODY)) is None


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([status, *lines, b"", b""])


@pytest.mark.parametrize("line", [b"Connection: keep-alive", b"connection:Keep-Alive\t", b"Keep-Alive: timeout=5"])
def test_one_that_says_what_goes_without_saying(line: bytes) -> None:
    with through(head(LENGTH, line) + BODY, len(BODY)) as (body, _):
        assert body == BODY


LENGTH = b"Content-Length: %d" % len(BODY)


@pytest.mark.parametrize(
    "data",
    [
        head(LENGTH, status=b"HTTP/1.1 404 Not Found"),
        head(LENGTH, status=b"HTTP/1.1 206 Partial Content"),
        head(LENGTH, b"Location: http://elsewhere/", status=b"HTTP/1.1 307 Temporary Redirect"),
        head(LENGTH, b"Retry-After: 1", status=b"HTTP/1.1 429 Too Many Requests"),
        head(LENGTH, status=b"HTTP/1.0 200 OK"),
        head(LENGTH, status=b"HTTP/1.1 2000 OK"),
        head(LENGTH, status=b"HTTP/1.1  200 OK"),
        head(status=b"HTTP/1.1 100 Continue") + head(LENGTH),
        head(b"Content-Type: a/b"),
        head(b"Content-Length: %d" % (len(BODY) + 1)),
        head(b"Content-Length: +%d" % len(BODY)),
        head(b"Content-Length: 0%d" % len(BODY)),
        head(b"Content-Length: %d, %d" % (len(BODY), len(BODY))),
        head(LENGTH, LENGTH),
        head(LENGTH, b"content-length: 5"),
        head(LENGTH, b"Transfer-Encoding: chunked"),
        head(LENGTH, b"TRANSFER-ENCODING: identity"),
        head(LENGTH, b"Connection: close"),
        head(LENGTH, b"Connection: keep-alive, close"),
        head(LENGTH, b"Content-Encoding: gzip"),
        head(LENGTH, b"Trailer: X"),
        head(LENGTH, b"Upgrade: h2c"),
        head(b"Content-Length: 1" + b"0" * 18),
        head(b"Content-Length: 1" + b"0" * 5000),
        head(LENGTH, b"X: a", b" folded"),
        head(b" ", LENGTH),
        head(LENGTH, b"no colon"),
        head(LENGTH, b"X : a"),
        head(LENGTH, b": a"),
        head(LENGTH, b"X: a\0b"),
        head(LENGTH, b"X: a\rb"),
        head(LENGTH, b"X: a\nTransfer-Encoding: chunked"),
        head(LENGTH, b"X\xff: a"),
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\n%s\n\n" % LENGTH + b"x" * plain._HEAD_MAX,
        head(LENGTH, b"X: " + b"a" * plain._HEAD_MAX),
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
@pytest.mark.parametrize("pieces", [3, 1 << 20])
def test_any_other_answer_is_left_to_others_whole(data: bytes, pieces: int) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    whole = data + BODY
    answer = plain.Answer(ours)
    with ours, theirs:
        given = 0
        with contextlib.suppress(plain.Unlike):
            while given < len(whole):
                theirs.sendall(whole[given : given + pieces])
                given += pieces
                assert answer.take(len(BODY)) is None
            pytest.fail("it was taken for one that is to go on")
        theirs.sendall(whole[given:])
        theirs.shutdown(socket.SHUT_WR)
        with plain.Ahead(answer.come, ours).makefile("rb") as file:
            assert file.read() == whole


STATUSES = [
    b"HTTP/1.1 %d x" % status for status in (100, 101, 199, 201, 202, 204, 206, 299, 304, 307, 401, 404, 429, 500, 600)
]
PIECES = [
    b"HTTP/1.1 200 OK", b"HTTP/1.1 200 ", b"HTTP/1.0 200 OK", b"HTTP/1.1 206 x", b"\r\n", b"\r\n", b"\n", b"\r", b" ", b"\t",
    b"Content-Length: 5", b"content-length:5", b"Content-Length : 5", b"Content-Length: 6", b"Content-Length: 5 ",
    b"Content-Length: 05", b"Content-Length: 5, 5", b"Content-Length", b": 5", b"X: y", b"X:", b"Transfer-Encoding: chunked",
    b"Connection: close", b"Connection: keep-alive", b"\0", b"\xe9", b"hello",
]  # fmt: skip


def odd_answers(statuses: list[bytes]) -> Iterator[bytes]:
    rng = random.Random(5)
    for _ in range(20_000):
        lines = [rng.choice(PIECES[:1] * 8 + PIECES + statuses), b"\r\n"]
        for _ in range(rng.randrange(4)):
            lines += [rng.choice(PIECES), *rng.choice([[b"\r\n"]] * 6 + [[b"\n"], [], [rng.choice(PIECES), b"\r\n"]])]
        yield b"".join([*lines, rng.choice([b"Content-Length: 5\r\n", b""]), b"\r\n", b"hello"])


def read_all(response: Response) -> bytes:
    buffer, data = memoryview(bytearray(3)), b""
    while count := response.read_some(buffer):
        data += buffer[:count]
    return data


def test_what_is_taken_is_what_the_standard_library_reads() -> None:
    """Whatever we take for a plain answer, it takes for the same; where it says another thing, we say nothing."""
    taken = 0
    for data in odd_answers([]):
        with contextlib.suppress(plain.Unlike), through(data, 5) as (body, answer):
            if body is None:
                continue
            taken += 1
            response = unusual.read(answer.come, answer._sock, "GET")
            assert (response.status, response.length, response.chunked, response.will_close) == (200, 5, False, False)
            assert read_all(response) == body
    assert taken > 100


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_answer_that_is_waited_for_is_what_the_standard_library_reads(
    method: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    theirs.close()
    taken = set()
    for data in odd_answers(STATUSES):
        if (response := plain.response(data, ours, method)) is None:
            continue
        taken.add(response.status)
        other = unusual.read(data, ours, method)
        for name in ("content-length", "X", "Connection", "y", "Transfer-Encoding"):
            assert [value.strip(" \t") for value in other.get_all(name)] == response.get_all(name), data
        assert (response.status, response.chunked) == (other.status, other.chunked)
        assert (response.isclosed(), method) in ((False, "GET"), (True, "HEAD"))
        body = read_all(response)
        assert body == read_all(other), data
        promised = 0 if method == "HEAD" else int(response.get_all("content-length")[0])
        assert response.isclosed() == (len(body) == promised)
        more = len(data) > data.index(b"\r\n\r\n") + 4 + promised
        assert response.will_close == (other.will_close or more), data
    assert taken == {200, 201, 202, 206, 299, 307, 401, 404, 429, 500}


def test_a_body_comes_from_the_socket_after_what_came_with_the_head(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(HEAD + BODY[:5])
    response = plain.response(plain.receive(ours), ours, "GET")
    assert response is not None
    theirs.sendall(BODY[5:] + b"HTTP/1.1 200 OK\r\n")
    assert read_all(response) == BODY, "and no byte of what comes next"
    assert response.isclosed()
    assert not response.will_close


def test_a_body_that_ends_too_early_is_not_at_its_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(HEAD + BODY[:5])
    theirs.close()
    response = plain.response(plain.receive(ours), ours, "GET")
    assert response is not None
    assert read_all(response) == BODY[:5]
    assert not response.isclosed()


def test_after_more_than_was_promised_the_connection_is_of_no_use(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(HEAD + BODY + b"HTTP/1.1 200 OK\r\n")
    response = plain.response(plain.receive(ours), ours, "GET")
    assert response is not None
    assert read_all(response) == BODY
    assert response.will_close


def test_no_answer_at_all(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(plain.Disconnected):
        plain.receive(ours)
