"""``ovm port`` and ``ovm run --network``, as a user runs them; and hosts without a route to anywhere."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import netns
from support.cli import Ovm


@pytest.fixture
def echo(ovm: Ovm, project: Path) -> str:
    ovm.ok("build", project, "-t", "echo:1")
    return "echo:1"


RUN = ("run", "-d", "-m", "32m", "--accel=tcg", "--name")


def test_ports_are_listed_and_changed(ovm: Ovm, echo: str) -> None:
    ovm.ok(*RUN, "one", "-p", "80", "-p", "53/udp", echo)
    listed = ovm.ok("port", "one", "--json").json
    assert [(p["guest_port"], p["protocol"], p["host_ip"]) for p in listed] == [
        (80, "tcp", "127.0.0.1"),
        (53, "udp", "127.0.0.1"),
    ]
    first = listed[0]["host_port"]
    assert ovm.ok("port", "one").out.splitlines()[0] == f"80/tcp -> 127.0.0.1:{first}"
    assert ovm.ok("port", "one", "80").out == f"127.0.0.1:{first}\n"
    missing = ovm("port", "one", "81", "--json")
    assert (missing.code, missing.error["code"]) == (4, "not-found")

    added = ovm.ok("port", "one", "--add", "22", "--rm", "53/udp", "--json").json
    assert [p["guest_port"] for p in added] == [80, 22]
    socket.create_connection(("127.0.0.1", added[1]["host_port"]), timeout=5).close()
    assert "->22/tcp" in ovm.ok("ps").out
    assert ovm("port", "one", "--add", "x").code == 2
    ovm.ok("stop", "-t", "0", "one")
    assert ovm.ok("port", "one").out == "", "nothing is forwarded any more"
    assert ovm("port", "one", "--add", "22", "--json").error["code"] == "state-conflict"


def test_networks_that_cannot_be(ovm: Ovm, echo: str) -> None:
    for wanted in ("host", "tap:", "netns:here"):
        done = ovm(*RUN, "one", "--network", wanted, "--json", echo)
        assert (done.code, done.error["code"]) == (2, "usage")
    assert ovm(*RUN, "one", "--network=none", "-p", "80", "--json", echo).error["code"] == "usage"
    assert ovm(*RUN, "one", "--network=netns:/nowhere", "--json", echo).error["code"] == "host"
    assert ovm.ok("ps", "-aq").out == ""


@pytest.mark.parametrize("route", [None, "ipv4", "ipv6"])
def test_a_host_without_a_route(ovm: Ovm, echo: str, route: str | None) -> None:
    if shutil.which("passt") is None:
        pytest.skip("there is no passt")
    if reason := netns.allowed():
        pytest.skip(reason)
    with netns.namespace() as name:
        if route is not None:
            netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1", ns=name)
            netns.ip("addr", "add", "2001:db8::2/64" if route == "ipv6" else "192.0.2.2/24", "dev", "eth0", ns=name)
            for link in ("eth0", "eth1"):
                netns.ip("link", "set", link, "up", ns=name)
            gateway = "2001:db8::1" if route == "ipv6" else "192.0.2.1"
            netns.ip(*(["-6"] if route == "ipv6" else []), "route", "add", "default", "via", gateway, ns=name)
        inside = replace(ovm, prefix=("nsenter", f"--net={netns.path_of(name)}"))
        started = inside.ok(*RUN, "one", "--network=user:passt", "-p", "80", "--json", echo).json
        port = started["ports"][0]["host_port"]
        script = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        assert netns.run_in(name, script).returncode == 0
        inside.ok("rm", "-f", "one")


@pytest.mark.long
@pytest.mark.spec("RUN-19")
def test_a_start_or_a_change_that_is_killed_leaves_nothing(ovm: Ovm, echo: str) -> None:
    if reason := netns.allowed():
        pytest.skip(reason)
    with netns.namespace() as name:
        inside = replace(ovm, prefix=("nsenter", f"--net={netns.path_of(name)}"))
        for i in range(8):
            starting = inside.popen(*RUN, f"one-{i}", "-p", "80", echo, stdout=subprocess.DEVNULL)
            time.sleep(0.15 + 0.04 * i)
            starting.kill()
            starting.wait(10)
            inside.ok("ps")
        inside.ok(*RUN, "two", "-p", "80", echo)
        for i in range(6):
            changing = inside.popen("port", "two", "--add", str(100 + i), stdout=subprocess.DEVNULL)
            time.sleep(0.1 + 0.03 * i)
            changing.kill()
            changing.wait(10)
            for port in inside.ok("port", "two", "--json").json:
                script = f"import socket; socket.create_connection(('127.0.0.1', {port['host_port']}), timeout=5)"
                assert netns.run_in(name, script).returncode == 0
        inside.ok("rm", "-f", *inside.ok("ps", "-aq").out.split())
        # of a VM itself nothing is in this namespace but the watcher, so what is left would be of its network
        assert netns.processes(name) == []
