"""A real Debian guest on the user network: what it reaches, what it does not, and what reaches it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import netns
from support.cli import Ovm
from support.guests import Console

from ovms import fsutil

MAKE_IMAGES = Path(__file__).parents[2] / "demo" / "make_images.py"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[netns.World]:
    with netns.world(tmp_path) as made:
        yield made


@pytest.fixture
def images() -> Path:
    made = subprocess.run([sys.executable, MAKE_IMAGES], stdout=subprocess.PIPE, timeout=900, check=True)
    return Path(made.stdout.decode().splitlines()[-1])


class Shell:
    """The guest's shell on its console."""

    def __init__(self, ovm: Ovm, instance: str) -> None:
        self.console = Console(ovm.root / "instances" / instance)
        self.count = 0

    def __call__(self, command: str, timeout: float = 60) -> str:
        """What a command prints."""
        self.count += 1
        mark = f"done-{self.count}"
        # the mark is not in what the terminal echoes
        with fsutil.connect_unix(self.console.files.console, timeout=5) as sock:
            sock.sendall(f"{{ {command}; }} 2>&1; echo do''ne-{self.count}\n".encode())
            time.sleep(0.1)
        said = self.console.wait_for(mark, timeout=timeout)
        return said[said.rindex(f"ne-{self.count}", 0, said.rindex(mark)) : said.rindex(mark)].partition("\n")[2]


def fetch(address: str, port: int, *, seconds: int = 10) -> str:
    """A command of the guest's shell that gets a page, or says why not."""
    request = r'"GET / HTTP/1.0\r\n\r\n"'
    words = f"exec 3<>/dev/tcp/{address}/{port} && printf {request} >&3 && cat <&3"
    return f"timeout {seconds} bash -c '{words}'"


def port_of(answer: dict[str, object], guest_port: int = 80) -> int:
    ports = answer["ports"]
    assert isinstance(ports, list)
    return int(next(p["host_port"] for p in ports if p["guest_port"] == guest_port))


def test_what_a_guest_reaches_and_what_reaches_it(ovm: Ovm, world: netns.World, images: Path, tmp_path: Path) -> None:
    ovm = replace(ovm, prefix=world.prefix)
    ovm.ok("build", images / "manifest.yaml", "-t", "demo:1")
    first = ovm.ok("run", "-d", "--json", "-m", "256m", "--network=user:passt", "-p", "80", "demo:1").json
    second = ovm.ok("run", "-d", "--json", "-m", "256m", "-p", "80", "demo:1").json
    assert second["network"] == "passt"
    shell = Shell(ovm, first["instance_id"])
    for vm in (first, second):
        Console(ovm.root / "instances" / vm["instance_id"]).wait_for("ovms-demo: ready", timeout=150)
    time.sleep(0.5)

    # in
    tokens = [json.loads(world.get(port_of(vm)))["token"] for vm in (first, second)]
    assert tokens[0] != tokens[1]
    # out
    page = fetch(netns.OUTSIDE, netns.OUTSIDE_PORT)
    assert netns.ANSWER in shell(page)
    # by name: the host's resolver is on its loopback alone
    assert netns.RESOLVED in shell("busybox nslookup ovms.test 10.0.2.3")
    # what it is told when it asks
    shell(r"printf '#!/bin/bash\necho told $1 $ip $router $dns\n' > /tmp/told; chmod +x /tmp/told")
    assert "told bound 10.0.2.15 10.0.2.2 10.0.2.3\n" in shell("busybox udhcpc -f -q -n -i eth0 -s /tmp/told")
    # by IPv6, with an address that the network has given it
    shell("sleep 2")  # the router's advertisement
    assert netns.ANSWER in shell(fetch(netns.OUTSIDE_6, netns.OUTSIDE_PORT))

    # not: the host's loopback, however it is asked for
    port = netns.PRIVATE_PORT
    shell("echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; ip addr del 127.0.0.1/8 dev lo")
    shell("ip route del local 127.0.0.1 table local; ip route add 127.0.0.0/8 via 10.0.2.2 src 10.0.2.15")
    for address in ("10.0.2.2", "127.0.0.1", "127.0.0.53"):
        shell(f"{fetch(address, port, seconds=3)}; echo x > /dev/udp/{address}/{port}")
    assert world.reached() == []

    # a clone, with a port of its own
    ovm.ok("snapshot", first["name"], "-t", "demo:warm", timeout=120)
    clone = ovm.ok("run", "-d", "--json", "-p", "80", "demo:warm").json
    assert clone["restored"]
    assert clone["network"] == "passt"
    assert port_of(clone) != port_of(first)
    answers = [json.loads(world.get(port_of(vm))) for vm in (first, clone)]
    assert answers[0]["token"] == answers[1]["token"]
    cloned = Shell(ovm, clone["instance_id"])
    assert netns.ANSWER in cloned(page)

    # without a network, the card is there and its link down, also in a clone that had one
    alone = ovm.ok("run", "-d", "--json", "--network=none", "demo:warm").json
    assert alone["restored"]
    assert "0\n" in Shell(ovm, alone["instance_id"])("cat /sys/class/net/eth0/carrier")
    assert "1\n" in cloned("cat /sys/class/net/eth0/carrier")
    ovm.ok("snapshot", alone["name"], "-t", "demo:alone", timeout=120)
    linked = ovm.ok("run", "-d", "--json", "-p", "80", "demo:alone").json
    assert linked["restored"]
    assert json.loads(world.get(port_of(linked)))["token"] == answers[0]["token"]

    # other ports while it runs
    listed = ovm.ok("port", clone["name"], "--add", "80", "--rm", f"{port_of(clone)}:80", "--json").json
    assert [p["guest_port"] for p in listed] == [80]
    assert listed[0]["host_port"] != port_of(clone)
    assert json.loads(world.get(listed[0]["host_port"]))["token"] == answers[0]["token"]
    assert netns.ANSWER in cloned(page)

    # in, where the guest speaks first: by IPv4 and by IPv6
    listed = ovm.ok("port", clone["name"], "--add", "90", "--add", "[::1]::91", "--json").json
    script = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10).recv(9))"
    for forward, family, address in zip(listed[-2:], ("", "6"), ("INADDR_ANY", "IN6ADDR_ANY"), strict=True):
        serve = (
            f"socket(my $s, PF_INET{family}, SOCK_STREAM, 0); "
            f"bind($s, pack_sockaddr_in{family}({forward['guest_port']}, {address})) or die; "
            'listen($s, 1); accept(my $c, $s); syswrite($c, "first"); sleep 5'
        )
        said = cloned(f"perl -MSocket=:all -e '{serve}' & sleep 2")
        assert "first" in world.python(script, forward["host_ip"], str(forward["host_port"])), said
