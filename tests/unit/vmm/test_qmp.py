"""The QMP client against a peer that says anything."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import VmmError, VmmTimeout
from ovms.spec import limits
from ovms.vmm.qemu.qmp import LINE_MAX, Qmp, QmpError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
OK = b'{"return": {}}\n'


@pytest.fixture
def peer() -> Iterator[Callable[[bytes], socket.socket]]:
    threads: list[threading.Thread] = []
    ends: list[socket.socket] = []

    def start(data: bytes) -> socket.socket:
        here, there = socket.socketpair()
        ends.extend((here, there))

        def speak() -> None:
            try:
                there.sendall(data)
                there.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        thread = threading.Thread(target=speak)
        thread.start()
        threads.append(thread)
        return here

    yield start
    for end in ends:
        end.close()
    for thread in threads:
        thread.join()


def test_events_before_an_answer_are_skipped(peer: Callable[[bytes], socket.socket]) -> None:
    event = b'{"event": "STOP", "timestamp": {}}\n'
    sock = peer(GREETING + event + OK + event + event + b'{"return": {"status": "running"}}\n')
    with Qmp(sock, timeout=5) as qmp:
        assert qmp.execute("query-status") == {"status": "running"}


def test_a_refusal_names_the_command_and_the_reason(peer: Callable[[bytes], socket.socket]) -> None:
    sock = peer(GREETING + OK + b'{"error": {"class": "GenericError", "desc": "no\\u001b[31m"}}\n')
    with Qmp(sock, timeout=5) as qmp, pytest.raises(QmpError, match=r"refused eject: no\?\[31m") as caught:
        qmp.execute("eject")
    assert caught.value.qmp_class == "GenericError"


@pytest.mark.spec("SEC-6")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"[]\n",
        b'{"QMP": 1}\n',
        GREETING,
        GREETING + b'{"error": 5}\n',
        GREETING + OK + b"\xff\xfe\n",
        GREETING + OK + b"[" * 100000 + b"\n",
        GREETING + OK + b'{"return": {"a": 1}',
    ],
)
def test_nonsense_is_an_error_of_the_vmm(peer: Callable[[bytes], socket.socket], data: bytes) -> None:
    with pytest.raises(VmmError):
        qmp = Qmp(peer(data), timeout=5)
        with qmp:
            qmp.execute("query-status")


@pytest.mark.spec("SEC-6")
def test_a_disk_of_as_many_layers_as_there_may_be_is_told_in_one_message(
    peer: Callable[[bytes], socket.socket],
) -> None:
    def answer(layers: int) -> bytes:
        image = b'{"format-specific": {"data": {}}, "backing-image": ' * layers + b"{}" + b"}" * layers
        return b'{"return": [{"inserted": {"image": %b}}]}\n' % image

    with Qmp(peer(GREETING + OK + answer(limits.DISK_LAYERS_MAX)), timeout=5) as qmp:
        assert qmp.execute("query-block")
    with Qmp(peer(GREETING + OK + answer(1000)), timeout=5) as qmp, pytest.raises(VmmError, match="nested deeper"):
        qmp.execute("query-block")


def test_an_endless_line_is_cut(peer: Callable[[bytes], socket.socket]) -> None:
    with pytest.raises(VmmError, match="more than"):
        Qmp(peer(GREETING + b"x" * (LINE_MAX + 200_000)), timeout=5)


def test_a_flood_of_events_is_no_answer(peer: Callable[[bytes], socket.socket]) -> None:
    sock = peer(GREETING + OK + b'{"event": "X"}\n' * 20_000)
    with Qmp(sock, timeout=20) as qmp, pytest.raises(VmmError, match="without end"):
        qmp.execute("query-status")


def test_silence_is_a_timeout() -> None:
    here, there = socket.socketpair()
    with there, pytest.raises(VmmTimeout):
        Qmp(here, timeout=0.05)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="does not listen"):
        Qmp.connect(tmp_path / "qmp.sock", timeout=1)


@given(st.binary(max_size=200), st.booleans())
def test_no_other_error_comes_out(data: bytes, greeted: bool) -> None:
    here, there = socket.socketpair()
    with there:
        there.sendall((GREETING + OK if greeted else b"") + data)
        there.shutdown(socket.SHUT_WR)
        try:
            with Qmp(here, timeout=1) as qmp:
                qmp.execute("query-status")
        except VmmError:
            pass


@pytest.mark.spec("SEC-6")
@given(st.recursive(st.none() | st.booleans() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_any_json_is_an_answer_or_an_error(value: object) -> None:
    here, there = socket.socketpair()
    with there:
        there.sendall(GREETING + OK + json.dumps(value).encode() + b"\n")
        there.shutdown(socket.SHUT_WR)
        try:
            with Qmp(here, timeout=1) as qmp:
                qmp.execute("query-status")
        except VmmError:
            pass
