"""The fence between a guest and passt: which frames pass, whole, in order, and both ways. A program stands for passt."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from ovms.runtime import passt

SOURCE = passt.FENCE.parent / "fence.c"
MAC = bytes.fromhex("525400010203")
#: Gives back all that it gets.
ECHO = ("/bin/sh", "-c", "exec /bin/cat <&3 >&3")
ROUTER = bytes.fromhex("52550a000202")


ETHERNET = 14


def ethernet(kind: int, payload: bytes) -> bytes:
    return ROUTER + MAC + struct.pack(">H", kind) + payload


def ipv4(source: str, destination: str, payload: bytes = b"x" * 20) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, 6, 0)
    return ethernet(0x0800, head + socket.inet_aton(source) + socket.inet_aton(destination) + payload)


def ipv6(source: str, destination: str) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    return ethernet(0x86DD, struct.pack(">IHBB", 6 << 28, 20, 6, 64) + addresses + b"x" * 20)


GUEST, OTHER = "10.0.2.15", "192.0.2.7"
PASSING = {
    "ipv4": ipv4(GUEST, OTHER),
    "to the router": ipv4(GUEST, "10.0.2.2"),
    "dhcp": ipv4("0.0.0.0", "255.255.255.255"),
    "126": ipv4(GUEST, "126.255.255.255"),
    "128": ipv4(GUEST, "128.0.0.1"),
    "1": ipv4(GUEST, "1.0.0.1"),
    "arp": ethernet(0x0806, b"\0" * 28),
    "rarp": ethernet(0x8035, b"\0" * 28),
    "ipv6": ipv6("fec0::15", "2001:db8::1"),
    "ipv6 duplicate address detection": ipv6("::", "ff02::1"),
    "ipv6 to nat64": ipv6("fec0::15", "64:ff9b::192.0.2.7"),
    "the largest": ipv4(GUEST, OTHER, b"x" * 65515),
}
STOPPED = {
    "to loopback": ipv4(GUEST, "127.0.0.1"),
    "to loopback's end": ipv4(GUEST, "127.255.255.255"),
    "from loopback": ipv4("127.0.0.1", OTHER),
    "to 0.0.0.0": ipv4(GUEST, "0.0.0.0"),
    "to 0.1.2.3": ipv4(GUEST, "0.1.2.3"),
    "to ::1": ipv6("fec0::15", "::1"),
    "to ::": ipv6("fec0::15", "::"),
    "to a mapped address": ipv6("fec0::15", "::ffff:127.0.0.1"),
    "to a compatible address": ipv6("fec0::15", "::127.0.0.1"),
    "from ::1": ipv6("::1", "2001:db8::1"),
    "in a vlan": ethernet(0x8100, b"\0\1\x08\0" + ipv4(GUEST, "127.0.0.1")[14:]),
    "an unknown protocol": ethernet(0x88CC, b"x" * 60),
    "a cut ipv4 header": ipv4(GUEST, OTHER)[:33],
    "a cut ipv6 header": ipv6("fec0::15", "2001:db8::1")[:53],
    "a cut ethernet header": MAC,
    "nothing": b"",
}


#: Frames that the fence sends by itself.
ANNOUNCED = 2


def with_length(frame: bytes) -> bytes:
    return struct.pack(">I", len(frame)) + frame


@contextlib.contextmanager
def fenced(*program: str, count: BinaryIO | None = None) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """The guest's end of a fence's connection; the program's end is on its descriptor 3. *count*: where it counts."""
    ours, theirs = socket.socketpair()
    user = "12345:12345" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"
    with ours, theirs:
        counting = () if count is None else (count.fileno(),)
        words = [f"guest={theirs.fileno()}", f"user={user}", f"mac={MAC.hex()}", *(f"count={fd}" for fd in counting)]
        fence = subprocess.Popen(
            [passt.FENCE, *words, "--", *program],
            pass_fds=[theirs.fileno(), *counting],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        theirs.close()
        ours.settimeout(20)
        try:
            assert fence.stdout is not None
            with fence.stdout:
                assert int(fence.stdout.readline()) > 0
            yield ours, fence
        finally:
            ours.close()
            try:
                fence.wait(10)
            finally:
                fence.kill()
                fence.wait(10)


def frames(sock: socket.socket, count: int) -> list[bytes]:
    with sock.makefile("rb") as file:
        return [file.read(struct.unpack(">I", file.read(4))[0]) for _ in range(count)]


def test_what_the_program_is_told_first() -> None:
    with fenced(*ECHO) as (sock, _):
        first, second = frames(sock, ANNOUNCED)
    assert first[:14] == b"\xff" * 6 + MAC + b"\x80\x35", "who the guest is, before it says anything"
    assert len(first) == 60
    solicitation = second[14:]
    assert second[6:14] == MAC + b"\x86\xdd"
    assert solicitation[8:24] == socket.inet_pton(socket.AF_INET6, "fe80::5054:ff:fe01:203")
    assert solicitation[24:40] == socket.inet_pton(socket.AF_INET6, "ff02::2")
    assert solicitation[40] == 133
    words = struct.unpack(">20H", solicitation[8:])
    total = sum(words) + 8 + 58
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF, "the checksum"


@pytest.mark.parametrize("frame", PASSING.values(), ids=PASSING)
def test_frames_that_pass(frame: bytes) -> None:
    with fenced(*ECHO) as (sock, _):
        sock.sendall(with_length(frame))
        assert frames(sock, ANNOUNCED + 1)[-1] == frame


@pytest.mark.spec("SEC-6")
@pytest.mark.parametrize("frame", STOPPED.values(), ids=STOPPED)
def test_frames_that_go_no_further(frame: bytes) -> None:
    after = PASSING["ipv4"]
    with fenced(*ECHO) as (sock, _):
        sock.sendall(with_length(frame) + with_length(after))
        assert frames(sock, ANNOUNCED + 1)[-1] == after


def segment(flags: int, *, by_ipv6: bool = False, options: int = 0) -> bytes:
    tcp = struct.pack(">HHIIBBHHH", 80, 40000, 0xFFFFFFFF, 77, 0x50, flags, 512, 0, 0)
    if by_ipv6:
        frame = ipv6("fec0::15", "fec0::2")
        return frame[: ETHERNET + 40] + tcp
    frame = ipv4(GUEST, "10.0.2.2", bytes(options) + tcp)
    return frame[:ETHERNET] + bytes([0x45 + options // 4]) + frame[ETHERNET + 1 :]


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    return (total & 0xFFFF) + (total >> 16)


@pytest.mark.parametrize(
    "frame",
    [segment(0x12), segment(0x52, options=8), segment(0x12, by_ipv6=True)],
    ids=["ipv4", "ipv4 with options", "ipv6"],
)
def test_the_handshake_of_a_client_that_waits_is_ended(frame: bytes) -> None:
    with fenced(*ECHO) as (sock, _):
        sock.sendall(with_length(frame))
        got = frames(sock, ANNOUNCED + 2)
    acks = [f for f in got if f[6:12] == ROUTER and f[:6] == MAC]
    (ack,) = acks
    assert frame in got, "and passt gets its own"
    six = frame[12:14] == b"\x86\xdd"
    packet, tcp = ack[ETHERNET:], ack[ETHERNET + (40 if six else 20) :]
    assert ack[12:14] == frame[12:14]
    ports, sequence, acknowledged, offset, flags = struct.unpack(">IIIBB", tcp[:14])
    assert (ports, sequence, acknowledged, offset, flags) == (40000 << 16 | 80, 77, 0, 0x50, 0x10)
    addresses = packet[8:40] if six else packet[12:20]
    sent = frame[ETHERNET + 8 : ETHERNET + 40] if six else frame[ETHERNET + 12 : ETHERNET + 20]
    assert addresses == sent[len(sent) // 2 :] + sent[: len(sent) // 2]
    assert checksum(addresses + struct.pack(">HH", 6, 20) + tcp) == 0xFFFF
    if six:
        assert struct.unpack(">H", packet[4:6]) == (20,)
    else:
        assert checksum(packet[:20]) == 0xFFFF
        assert struct.unpack(">H", packet[2:4]) == (40,)


OTHERS = [segment(flags) for flags in (0x02, 0x10, 0x18, 0x11, 0x13, 0x16)]
FRAGMENT = segment(0x12)[: ETHERNET + 6] + b"\x20\0" + segment(0x12)[ETHERNET + 8 :]


@pytest.mark.parametrize(
    "frame", [*OTHERS, FRAGMENT, segment(0x12)[:-1], segment(0x12)[:ETHERNET] + b"\x4f" * 40], ids=range(9)
)
def test_nothing_else_is_answered(frame: bytes) -> None:
    with fenced(*ECHO) as (sock, _):
        sock.sendall(with_length(frame) + with_length(PASSING["arp"]))
        assert frames(sock, ANNOUNCED + 2)[ANNOUNCED:] == [frame, PASSING["arp"]]


def test_many_frames_in_pieces_come_whole_and_in_order() -> None:
    rng = random.Random(5)
    passing, stopped = [*PASSING.values(), segment(0x12)], list(STOPPED.values())
    sent = [rng.choice(passing if rng.random() < 0.7 else stopped) for _ in range(3000)]
    expected = [frame for frame in sent if frame in passing]
    data = b"".join(map(with_length, sent))

    def send(sock: socket.socket) -> None:
        at = 0
        while at < len(data):
            size = rng.choice((1, 3, 17, 1500, 70000, 300000))
            sock.sendall(data[at : at + size])
            at += size

    # the echo fills both ways at once, and neither may wait for the other
    with fenced(*ECHO) as (sock, _):
        sender = threading.Thread(target=send, args=(sock,))
        sender.start()
        got: list[bytes] = []
        answers = 0
        with sock.makefile("rb") as file:
            while len(got) < ANNOUNCED + len(expected):
                frame = file.read(struct.unpack(">I", file.read(4))[0])
                if frame[:6] == MAC:
                    answers += 1  # between the others, never inside one
                else:
                    got.append(frame)
        sender.join(20)
    assert got[ANNOUNCED:] == expected
    assert 0 < answers <= expected.count(segment(0x12))


def test_a_frame_that_no_network_has_ends_it() -> None:
    with fenced(*ECHO) as (sock, fence):
        sock.sendall(struct.pack(">I", 1 << 20))
        assert fence.wait(10) == 2


def test_it_ends_when_the_program_does() -> None:
    with fenced("/bin/true") as (sock, fence):
        assert fence.wait(10) == 0
        assert sock.recv(1) == b""


def test_the_program_ends_and_is_reaped_when_the_guest_does() -> None:
    with fenced(*ECHO) as (sock, fence):
        children = [int(pid) for pid in Path(f"/proc/{fence.pid}/task/{fence.pid}/children").read_text().split()]
        assert len(children) == 1
        sock.close()
        assert fence.wait(10) == 0
        assert not Path(f"/proc/{children[0]}").exists()


def test_what_passes_is_counted(tmp_path: Path) -> None:
    path, size = tmp_path / "count", len(PASSING["ipv4"])
    path.touch()

    def counts() -> tuple[int, ...]:
        return passt.COUNTS.unpack(data) if (data := path.read_bytes()) else (0, 0)

    def soon(expected: tuple[int, int]) -> bool:
        deadline = time.monotonic() + 10
        while counts() != expected:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    # its own two, which are none of the guest's, come back from the echo
    announced = 60 + 62
    for boot in range(2):
        with path.open("r+b") as file, fenced(*ECHO, count=file) as (sock, _):
            frames(sock, ANNOUNCED)
            before = (boot * 3 * size, boot * 3 * size + (boot + 1) * announced)
            assert soon(before), "it goes on from what is there"
            sock.sendall(with_length(PASSING["ipv4"]) + with_length(STOPPED["to loopback"]))
            frames(sock, 1)
            assert soon((before[0] + size, before[1] + size)), "and what is stopped has not passed"
            for _ in range(2):
                sock.sendall(with_length(PASSING["ipv4"]))
                frames(sock, 1)
        assert counts() == (before[0] + 3 * size, before[1] + 3 * size), "to the last one"
    assert path.stat().st_size == passt.COUNTS.size


def test_a_disk_without_room_for_the_count_stops_nothing() -> None:
    with Path("/dev/full").open("r+b", buffering=0) as file, fenced(*ECHO, count=file) as (sock, _):
        frames(sock, ANNOUNCED)
        for _ in range(40):
            sock.sendall(with_length(PASSING["ipv4"]))
            assert frames(sock, 1) == [PASSING["ipv4"]]


def test_it_has_no_rights_and_few_descriptors() -> None:
    with fenced(*ECHO) as (sock, fence):
        frames(sock, ANNOUNCED)
        status = Path(f"/proc/{fence.pid}/status").read_text()
        if os.geteuid() == 0:
            assert len(os.listdir(f"/proc/{fence.pid}/fd")) == 2
            assert "Uid:\t12345\t12345\t12345\t12345" in status
    for line in ("CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        assert line in status


@pytest.mark.parametrize("words", [[], ["guest=0"], ["guest=0", "user=1:1", "mac=00", "--", "/bin/true"]])
def test_words_that_it_does_not_understand(words: list[str]) -> None:
    done = subprocess.run([passt.FENCE, *words], capture_output=True, timeout=10, check=False)
    assert done.returncode == 1
    assert done.stderr == b"fence: usage\n"


def test_the_binary_is_what_its_source_says() -> None:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert f"fence.c sha256:{digest}".encode() in passt.FENCE.read_bytes(), "run scripts/build-native.sh"


def test_the_source_builds(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    script = Path(__file__).parents[3] / "scripts" / "build-native.sh"
    subprocess.run([script, tmp_path / "watch", tmp_path / "fence"], check=True, timeout=60)
    assert (tmp_path / "fence").stat().st_size < 8192
