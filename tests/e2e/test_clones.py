"""Clones of a real Debian on the generic kernel: each becomes itself, has random numbers of its own, and can be scrubbed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import generic_guest, guests
from support.cli import Ovm

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

MACHINE_ID = "0123456789abcdef0123456789abcdef"
#: Prints random bytes on the console, again and again: what is printed last before a snapshot is followed by what comes in a clone.
PRINTER = (
    "while :; do echo \"RANDOM $(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ')\"; sleep 0.05; done >/dev/ttyS0"
)


@pytest.fixture(scope="module")
def ovm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ovm]:
    """With a VM "web" whose agent answers, and which has a machine ID and a host name."""
    root, home = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("home")
    ovm = Ovm(root, home)
    ovm.ok("build", generic_guest.make(), "-t", "generic:1")
    ovm.ok("run", "-d", "--name", "web", "--memory", "256m", "generic:1")
    ovm.ok("exec", "--wait", "180", "web", "--", "sh", "-c", "until [ -d /run/lock ]; do sleep 0.1; done", timeout=200)
    # the demo's service, which looks after the clock
    guest(
        ovm,
        "web",
        "for p in /proc/[0-9]*; do grep -aq ovms-demo/[s]ervice $p/cmdline && kill -STOP ${p#/proc/}; done; true",
    )
    guest(ovm, "web", f"echo {MACHINE_ID} >/etc/machine-id; chmod 0444 /etc/machine-id; hostname template")
    yield ovm
    ovm("rm", "-f", *ovm("ps", "-aq").out.split())
    assert guests.qemu_children(root) == []


def guest(ovm: Ovm, name: str, script: str) -> str:
    return ovm.ok("exec", "--wait", "60", name, "--", "sh", "-c", script, timeout=120).out


def clock_of(ovm: Ovm, name: str) -> float:
    """Seconds by which a guest's clock differs from ours."""
    before = time.time()
    there = float(guest(ovm, name, "date +%s.%N"))
    after = time.time()
    return 0.0 if before <= there <= after else min(there - before, there - after, key=abs)


@pytest.mark.spec("SEC-9", "RAM-37")
def test_each_clone_is_a_machine_of_its_own(ovm: Ovm) -> None:
    taken = ovm.ok("snapshot", "web", "-t", "generic:warm", "--json")
    assert (taken.json["reseeds"], "VMGENID" in taken.err) == (True, False)
    guest(ovm, "web", "date -s @1000000000")
    ovm.ok("snapshot", "web", "-t", "generic:old")
    started = {name: ovm.ok("run", "-d", "--json", "--name", name, "generic:old").json for name in ("one", "two")}
    ids = set()
    for name, document in started.items():
        assert document["restored"]
        assert document["identity"] == {
            "clock": True, "random": True, "hostname": name, "machine_id": True, "mac": None, "link": False, "note": None,
        }  # fmt: skip
        assert document["timings_ms"]["identity"] < 4000
        assert abs(clock_of(ovm, name)) < 1.0
        said = guest(ovm, name, "hostname; cat /etc/hostname; cat /etc/machine-id; stat -c %a /etc/machine-id").split()
        assert said[:2] == [name, name]
        assert re.fullmatch(r"[0-9a-f]{32}", said[2])
        assert said[3] == "444"
        ids.add(said[2])
    assert len(ids | {MACHINE_ID}) == 3
    # what it was made of is what it was
    assert guest(ovm, "web", "hostname; cat /etc/machine-id").split() == ["template", MACHINE_ID]
    # by a name that was given, and for who wants a double
    named = ovm.ok("run", "-d", "--json", "--name", "three", "--hostname", "db.example", "generic:old").json
    assert named["identity"]["hostname"] == "db.example"
    assert guest(ovm, "three", "hostname; cat /etc/hostname") == "db.example\ndb.example\n"
    double = ovm.ok("run", "-d", "--json", "--name", "four", "--keep-identity", "generic:old").json
    assert double["identity"] is None
    assert guest(ovm, "four", "hostname; cat /etc/machine-id").split() == ["template", MACHINE_ID]
    assert clock_of(ovm, "four") < -1e8
    if os.geteuid() == 0:  # the guest sees that its cable was out, where others give it an address
        changes = "cat /sys/class/net/eth0/carrier_changes"
        five = ovm.ok("run", "-d", "--json", "--name", "five", "--network", "tap", "generic:old").json["identity"]
        assert five["link"]
        assert int(guest(ovm, "five", changes)) == int(guest(ovm, "four", changes)) + 2
        address = "cat /sys/class/net/eth0/address"
        assert guest(ovm, "five", address).strip() == five["mac"] != guest(ovm, "four", address).strip()
        ovm.ok("snapshot", "five", "-t", "generic:five")  # a clone of the clone is another one
        six = ovm.ok("run", "-d", "--json", "--name", "six", "--network", "tap", "generic:five").json["identity"]
        assert guest(ovm, "six", address).strip() == six["mac"] != five["mac"]
        ovm.ok("rm", "-f", "five", "six")
    ovm.ok("rm", "-f", "one", "two", "three", "four")
    guest(ovm, "web", f"date -s @{time.time():.0f}")


@pytest.mark.spec("SEC-9", "RAM-37")
def test_a_guest_that_does_not_let_its_name_be_changed_says_so(ovm: Ovm) -> None:
    mount = "busybox mount"
    guest(
        ovm,
        "web",
        f"{mount} -o bind /proc/sys /proc/sys && {mount} -o remount,bind,ro /proc/sys && {mount} -o remount,ro /",
    )
    ovm.ok("snapshot", "web", "-t", "generic:fixed")
    guest(ovm, "web", "busybox umount /proc/sys; busybox mount -o remount,rw /")
    done = ovm.ok("run", "-d", "--json", "--name", "fixed", "generic:fixed").json["identity"]
    assert (done["clock"], done["hostname"], done["machine_id"]) == (True, None, False)
    assert "Read-only file system" in done["note"]
    failed = ovm("run", "-d", "--json", "--name", "named", "--hostname", "x", "generic:fixed", timeout=60)
    assert failed.error["code"] == "agent-unavailable"
    assert {one["name"] for one in ovm.ok("ps", "-a", "--json").json} == {"web", "fixed"}
    ovm.ok("rm", "-f", "fixed")


def prints(ovm: Ovm, name: str) -> None:
    """Lets a guest print random bytes. It is a minute old then: younger kernels reseed so often that no clones look alike for long."""
    script = PRINTER.replace("'", "'\\''")
    guest(ovm, name, f"printf '%s\\n' '{script}' >/printer; (setsid sh /printer </dev/null >/dev/null 2>&1 &)")
    while float(guest(ovm, name, "cat /proc/uptime").split()[0]) < 60:
        time.sleep(2)


def clones(ovm: Ovm, reference: str, *options: str) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Two clones: what is said of them, and what they print after that."""
    names = ("left", "right")
    said = [ovm.ok("run", "-d", "--json", "--name", name, *options, reference).json for name in names]
    printed = []
    # what is printed now was perhaps made before
    before = [len(random_of(ovm, name)) + 1 for name in names]
    deadline = time.monotonic() + 90
    for name, first in zip(names, before, strict=True):
        while len(lines := random_of(ovm, name)[0 if "--keep-identity" in options else first :]) < 8:
            assert time.monotonic() < deadline, f"{name} prints nothing"
            time.sleep(0.2)
        printed.append(lines)
    return said, printed


def random_of(ovm: Ovm, name: str) -> list[str]:
    return re.findall(r"RANDOM ([0-9a-f]{32})", ovm.ok("logs", name).out)


@pytest.mark.spec("SEC-9", "RAM-37")
def test_two_clones_give_no_random_bytes_twice(ovm: Ovm) -> None:
    prints(ovm, "web")
    ovm.ok("snapshot", "web", "-t", "generic:random")
    kill = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline | grep -q '^sh /printer' && kill ${p#/proc/}; done; true"
    guest(ovm, "web", kill)
    # nothing but the kernel makes them different: no agent stirs anything in
    _, (left, right) = clones(ovm, "generic:random", "--keep-identity")
    # the first was perhaps made before the kernel was told
    assert set(left[1:]) & set(right[1:]) == set()
    assert "reseeded due to virtual machine fork" in guest(ovm, "left", "dmesg")
    ovm.ok("rm", "-f", "left", "right")


@pytest.mark.spec("RUN-13")
def test_a_scrub_makes_a_snapshot_smaller(ovm: Ovm) -> None:
    guest(
        ovm,
        "web",
        "find /usr -type f | head -2000 | xargs cat >/dev/null; head -c 40000000 /dev/urandom | sort | wc -c",
    )
    plain = ovm.ok("snapshot", "web", "-t", "generic:plain", "--json").json
    assert plain["scrubbed"] is None
    small = ovm.ok("snapshot", "web", "-t", "generic:small", "--scrub", "--json", timeout=400).json
    scrubbed = small["scrubbed"]
    assert scrubbed["zeroed"]
    assert scrubbed["after"] < scrubbed["before"] - (40 << 20)
    assert small["ram_bytes"] < plain["ram_bytes"] * 0.8
    # the guest is as it was, and so is what is made of it: a clone, and one of that, which has pages of its own
    assert guest(ovm, "web", "grep -c ovms-scrub /proc/mounts || true; ls -A /run | grep -c ovms || true") == "0\n0\n"
    ovm.ok("run", "-d", "--name", "small", "generic:small")
    assert guest(ovm, "small", "cat /etc/debian_version").startswith("12")
    guest(ovm, "small", "head -c 40000000 /dev/urandom | sort | wc -c")
    again = ovm.ok("snapshot", "small", "-t", "generic:again", "--scrub", "--stop", "--json", timeout=400).json
    assert again["scrubbed"]["after"] < again["scrubbed"]["before"] - (10 << 20)
    assert [one["state"] for one in ovm.ok("ps", "-a", "--json").json if one["name"] == "small"] == ["stopped"]
    ovm.ok("rm", "small")


@pytest.mark.spec("SEC-9")
def test_a_kernel_that_does_not_notice_is_warned_of_and_told_by_the_agent(ovm: Ovm) -> None:
    ovm.ok("build", generic_guest.agent_images() / "manifest.yaml", "-t", "cloud:1")
    ovm.ok("run", "-d", "--name", "cloud", "--memory", "256m", "cloud:1")
    prints(ovm, "cloud")
    taken = ovm.ok("snapshot", "cloud", "-t", "cloud:warm", "--stop", "--json")
    assert taken.json["reseeds"] is False
    assert "CONFIG_VMGENID" in taken.err
    # without the agent they say the same: were this not so, the other tests would show nothing
    _, (left, right) = clones(ovm, "cloud:warm", "--keep-identity")
    assert set(left) & set(right) != set()
    ovm.ok("rm", "-f", "left", "right")
    said, (left, right) = clones(ovm, "cloud:warm")
    assert [one["identity"]["random"] for one in said] == [True, True]
    assert set(left) & set(right) == set()
    ovm.ok("rm", "-f", "left", "right", "cloud")
