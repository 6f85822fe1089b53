"""Networks of VMs: what is made, what it ends with, and how its ports change. Real QEMU and passt, bare guest."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import netns
from support.guests import MEMORY, Console

from ovms.artifact.resolve import Found, find
from ovms.errors import (
    HostError,
    InUse,
    NotFound,
    OvmsError,
    PortInUse,
    SnapshotIncompatible,
    StateConflict,
    Unsupported,
    UsageError,
)
from ovms.oci.reference import Reference
from ovms.runtime import forwards, network, passt, ports, snapshots, taps
from ovms.runtime.figures import Usage
from ovms.runtime.network import Kind, Wanted
from ovms.runtime.record import Record
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel, RestorePolicy
from ovms.vmm.model import PortForward

OPTIONS = RunOptions(memory=MEMORY, accel=Accel.TCG)
USER = ("user:passt", "user:slirp")

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="there is no passt")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes tap devices")


def start(runtime: Runtime, found: Found, wanted: str, *forwarded: str, restore: str = "auto") -> Record:
    if wanted == "user:passt" and shutil.which("passt") is None:
        pytest.skip("there is no passt")
    options = replace(
        OPTIONS,
        network=Wanted.parse(wanted),
        ports=tuple(map(ports.parse, forwarded)),
        restore=RestorePolicy(restore),
    )
    return runtime.start(found, options).record


def directory(runtime: Runtime, record: Record) -> Path:
    return runtime.instances.directory(record.id)


def outside(runtime: Runtime, record: Record) -> network.Outside:
    found = network.outside(directory(runtime, record))
    assert found is not None
    return found


def connects(port: PortForward) -> bool:
    try:
        with socket.create_connection((port.host_ip, port.host_port), timeout=5):
            return True
    except ConnectionRefusedError:
        return False


def soon(condition: object, *, timeout: float = 10) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def ended(found: network.Outside) -> bool:
    return not any(process.alive() for process in found.processes)


@pytest.fixture
def namespace() -> Iterator[str]:
    if reason := netns.allowed():
        pytest.skip(reason)
    with netns.namespace() as name:
        yield name


def links(namespace: str | None = None) -> str:
    inside = () if namespace is None else ("-n", namespace)
    done = subprocess.run(["ip", *inside, "-o", "link"], capture_output=True, timeout=10, check=True)
    return done.stdout.decode()


# --- passt -----------------------------------------------------------------------------------------------------------


@needs_passt
@pytest.mark.spec("SEC-5")
def test_with_passt_the_vmm_has_no_network_of_the_hosts(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo, "user", "80")
    assert record.network.kind is Kind.PASST
    assert record.process is not None
    assert "network" not in record.jail.missing
    assert Path(f"/proc/{record.process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert connects(record.ports[0])
    for process in outside(runtime, record).processes:
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        if os.geteuid() == 0:
            assert record.jail.user is not None
            assert f"Uid:\t{record.jail.user.uid}\t" in status


@needs_passt
@pytest.mark.spec("RUN-19")
@pytest.mark.parametrize("how", ["stop", "kill", "remove"])
def test_passt_ends_with_its_vm(runtime: Runtime, echo: Found, how: str) -> None:
    record = start(runtime, echo, "user:passt", "80")
    found = outside(runtime, record)
    if how == "kill":
        assert record.process is not None
        os.kill(record.process.pid, signal.SIGKILL)
        assert record.process.wait(20)
    elif how == "stop":
        runtime.stop(record, grace=0)
    else:
        runtime.remove(record, force=True)
    assert soon(lambda: ended(found)), "by itself: nobody may be left to end it"
    assert not connects(record.ports[0])
    runtime.instances.recover()
    assert network.outside(directory(runtime, record)) is None


@pytest.mark.parametrize("wanted", USER)
@pytest.mark.parametrize("grace", [0.0, 20.0])
def test_the_ports_of_a_stopped_vm_are_free_at_once(runtime: Runtime, echo: Found, wanted: str, grace: float) -> None:
    port = ports.settle([ports.parse("80")])[0]
    for _ in range(3):
        record = start(runtime, echo, wanted, f"{port.host_port}:80")
        Console(directory(runtime, record)).wait_for("READY")
        if record.network.kind is Kind.PASST:
            # on a machine that has more to do: it does not see at once that its VM is gone
            os.kill(outside(runtime, record).processes[1].pid, signal.SIGSTOP)
        runtime.stop(record, grace=grace)


@needs_passt
def test_a_passt_that_does_not_end_is_ended(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo, "user:passt")
    found = outside(runtime, record)
    for process in found.processes:
        os.kill(process.pid, signal.SIGSTOP)
    assert record.process is not None
    record.process.kill()
    time.sleep(0.05)
    assert not ended(found)
    runtime.instances.recover()
    assert ended(found)


@needs_passt
@pytest.mark.parametrize("which", [0, 1], ids=["fence", "passt"])
def test_a_network_that_died_is_made_anew(runtime: Runtime, echo: Found, which: int) -> None:
    record = start(runtime, echo, "user:passt", "80")
    found = outside(runtime, record)
    os.kill(found.processes[which].pid, signal.SIGKILL)
    assert soon(lambda: ended(found)), "the one does not live without the other"
    assert not connects(record.ports[0])
    runtime.instances.recover()
    assert connects(record.ports[0])
    assert Console(directory(runtime, record)).ping() == 1
    again = outside(runtime, record)
    runtime.instances.recover()
    assert outside(runtime, record) == again, "what works is left alone"


@needs_passt
def test_a_start_that_fails_leaves_no_passt(runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[network.Outside] = []

    def note(where: Path, found: network.Outside) -> None:
        seen.append(found)

    monkeypatch.setattr(network, "_note", note)
    monkeypatch.setattr(ports, "settle", tuple)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUse) as caught:
        start(runtime, echo, "user:passt", f"{taken.getsockname()[1]}:80")
    assert "is in use" in caught.value.message or "cannot be bound" in caught.value.message
    assert len(seen) == 1
    assert soon(lambda: ended(seen[0]))
    assert runtime.instances.records() == []


def test_without_passt_the_network_is_in_qemu(runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == "passt" else real(name, *a, **k))
    record = start(runtime, echo, "user", "80")
    assert record.network.kind is Kind.SLIRP
    assert "passt" in record.jail.missing["network"]
    assert connects(record.ports[0])


# --- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", USER)
def test_ports_change_while_a_vm_runs(runtime: Runtime, echo: Found, wanted: str) -> None:
    record = start(runtime, echo, wanted, "80", "81")
    kept = record.ports[1]
    changed = forwards.change(runtime, record, [ports.parse("22"), ports.parse("53/udp")], [ports.parse("80")])
    assert [(p.guest_port, p.protocol) for p in changed.ports] == [(81, "tcp"), (22, "tcp"), (53, "udp")]
    assert runtime.instances.find(record.id).ports == changed.ports
    assert not connects(record.ports[0])
    assert connects(kept)
    assert connects(changed.ports[1])
    assert Console(directory(runtime, record)).ping() == 1
    # a port of the host goes on to another of the guest
    changed = forwards.change(runtime, changed, [replace(kept, guest_port=82)], [ports.parse("81")])
    kept = changed.ports[-1]
    assert (kept.guest_port, kept.host_port) == (82, record.ports[1].host_port)
    assert connects(kept)
    # again, and what was free before can be had
    changed = forwards.change(runtime, changed, [record.ports[0]], [changed.ports[0]])
    assert connects(record.ports[0])
    assert [p.guest_port for p in changed.ports] == [53, 82, 80]
    assert changed.ports[-1] == record.ports[0]


@pytest.mark.parametrize("wanted", USER)
def test_a_change_of_ports_that_fails_changes_nothing(
    runtime: Runtime, echo: Found, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = start(runtime, echo, wanted, "80")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ports.parse(f"{taken.getsockname()[1]}:22")
        with pytest.raises(PortInUse):
            forwards.change(runtime, record, [port], [ports.parse("80")])
        assert connects(record.ports[0])
        monkeypatch.setattr(ports, "settle", tuple)  # taken at the last moment
        with pytest.raises(PortInUse):
            forwards.change(runtime, record, [port], [ports.parse("80")])
    assert connects(record.ports[0])
    assert runtime.instances.find(record.id).ports == record.ports


@needs_passt
def test_ports_of_ipv6_addresses(runtime: Runtime, echo: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    if passt.routes().ipv6 is None:
        with pytest.raises(HostError):
            start(runtime, echo, "user:passt", "[::1]::80")
        return
    record = start(runtime, echo, "user:passt", "[::1]::80", "80")
    assert str(record.ports[0]).startswith("[::1]:")
    assert connects(record.ports[0])
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = f"[::1]:{taken.getsockname()[1]}:81"
        with pytest.raises(PortInUse):
            forwards.change(runtime, record, [ports.parse(port)], [])
        monkeypatch.setattr(ports, "settle", tuple)
        with pytest.raises(PortInUse):
            forwards.change(runtime, record, [ports.parse(port)], [])
    assert connects(record.ports[0])


@needs_passt
def test_a_change_of_ports_that_was_broken_off_is_taken_back(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo, "user:passt", "80")
    with runtime.instances.locked(record) as newest:
        # killed before the record was written
        other = ports.settle([ports.parse("22")])
        runtime.instances.reconnect(replace(newest, ports=other))
    assert connects(other[0])
    runtime.instances.recover()
    assert not connects(other[0])
    assert connects(record.ports[0])


@pytest.mark.parametrize("wanted", USER)
def test_a_change_that_is_refused(runtime: Runtime, echo: Found, wanted: str) -> None:
    record = start(runtime, echo, wanted, "80")
    for pattern in ("81", "80/udp", "1:80"):
        with pytest.raises(NotFound):
            forwards.change(runtime, record, [], [ports.parse(pattern)])
    with pytest.raises(PortInUse):
        forwards.change(runtime, record, [replace(record.ports[0], guest_port=81)], [])
    assert forwards.change(runtime, record, [], []) == runtime.instances.find(record.id)
    runtime.kill(record)
    with pytest.raises(StateConflict):
        forwards.change(runtime, record, [ports.parse("22")], [])


def test_a_network_without_forwards(runtime: Runtime, echo: Found) -> None:
    with pytest.raises(UsageError):
        start(runtime, echo, "none", "80")
    record = start(runtime, echo, "none")
    with pytest.raises(Unsupported):
        forwards.change(runtime, record, [ports.parse("80")], [])


# --- snapshots -------------------------------------------------------------------------------------------------------


def snapshot(runtime: Runtime, echo: Found, wanted: str) -> Found:
    record = start(runtime, echo, wanted, *(["80"] if wanted.startswith("user") else []))
    assert Console(directory(runtime, record)).ping() == 1
    snapshots.take(runtime, record, Reference.parse("echo:warm"))
    runtime.remove(record, force=True)
    return find(runtime.layout, "echo:warm")


@pytest.mark.spec("RAM-32", "RAM-36", "SEC-9")
@pytest.mark.parametrize("taken", ["user:passt", "none"])
def test_a_snapshot_without_a_network_in_its_state_goes_on_any(runtime: Runtime, echo: Found, taken: str) -> None:
    warm = snapshot(runtime, echo, taken)
    places = ["user", "user:slirp", "none", *(["tap"] if os.geteuid() == 0 else [])]
    for wanted in places:
        record = start(runtime, warm, wanted, *(["80"] if "user" in wanted else []), restore="require")
        assert Console(directory(runtime, record)).ping() == 2
        assert all(map(connects, record.ports))
    if shutil.which("passt") is not None and taken != "none":
        # a clone's ports change as any other's
        changed = forwards.change(runtime, runtime.instances.records()[0], [ports.parse("22")], [])
        assert all(map(connects, changed.ports))


@pytest.mark.spec("RAM-32", "RAM-34")
def test_a_snapshot_with_qemus_own_network_goes_on_that_alone(runtime: Runtime, echo: Found) -> None:
    warm = snapshot(runtime, echo, "user:slirp")
    record = start(runtime, warm, "user", "80", restore="require")
    assert record.network.kind is Kind.SLIRP, "the default gives way"
    assert Console(directory(runtime, record)).ping() == 2
    assert connects(record.ports[0])
    for wanted in ("none", "user:passt", "tap"):
        with pytest.raises(SnapshotIncompatible) as caught:
            start(runtime, warm, wanted, restore="require")
        assert "user:slirp" in caught.value.message
    started = runtime.start(warm, replace(OPTIONS, network=Wanted.parse("none")))
    assert not started.record.restored
    assert "user:slirp" in (started.not_restored or "")


# --- figures ---------------------------------------------------------------------------------------------------------


def moved(runtime: Runtime, record: Record) -> dict[str, int]:
    found = Usage(runtime.instances).of(runtime.instances.find(record.id))
    return {name: value for name, value in found.items() if name.startswith("net_")}


@needs_passt
def test_what_has_passed_is_counted_also_when_the_ports_change(runtime: Runtime, echo: Found) -> None:
    record = start(runtime, echo, "user:passt", "80")
    connects(record.ports[0])  # the guest is asked for its hardware address, at the least
    assert soon(lambda: moved(runtime, record)["net_rx_bytes"] > 0)
    before = moved(runtime, record)["net_rx_bytes"]
    forwards.change(runtime, record, [ports.parse("81")], [])
    assert moved(runtime, record)["net_rx_bytes"] >= before


def test_networks_in_which_nobody_counts(runtime: Runtime, echo: Found) -> None:
    assert moved(runtime, start(runtime, echo, "none")) == {"net_rx_bytes": 0, "net_tx_bytes": 0}
    assert moved(runtime, start(runtime, echo, "user:slirp")) == {}


@needs_root
def test_a_tap_device_is_counted_by_the_kernel(runtime: Runtime, echo: Found, namespace: str) -> None:
    for wanted in ("tap", f"netns:{netns.path_of(namespace)}"):
        record = start(runtime, echo, wanted)
        assert set(moved(runtime, record)) == {"net_rx_bytes", "net_tx_bytes"}
        runtime.kill(record)
        assert soon(lambda: network.figures(record.network, directory(runtime, record)) == {})  # noqa: B023
    # the bare guest has no driver for its card, so we stand for the VMM
    place = netns.path_of(namespace)
    fd = taps.make_in(place, "ovm-counted", None)
    try:
        sent, received = taps.counts("ovm-counted", place)
        os.write(fd, b"\xff" * 6 + bytes.fromhex("525400010203") + b"\x88\xb5" + bytes(986))
        assert taps.counts("ovm-counted", place)[0] == sent + 1000
        assert soon(lambda: _took(fd) and taps.counts("ovm-counted", place)[1] > received), (
            "what the kernel says to all"
        )
    finally:
        os.close(fd)


def _took(fd: int) -> bool:
    try:
        return len(os.read(fd, 65536)) > 0
    except BlockingIOError:
        return False


# --- tap devices -----------------------------------------------------------------------------------------------------


@needs_root
def test_a_tap_device_is_the_vms_alone_and_ends_with_it(runtime: Runtime, echo: Found) -> None:
    first, second = start(runtime, echo, "tap"), start(runtime, echo, "tap")
    names = [taps.name_of(record.id) for record in (first, second)]
    assert names[0] != names[1]
    assert all(f" {name}: <BROADCAST,MULTICAST,UP," in links() for name in names)
    assert first.process is not None
    assert Path(f"/proc/{first.process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    os.kill(first.process.pid, signal.SIGKILL)
    assert soon(lambda: names[0] not in links())
    assert names[1] in links()


@needs_root
def test_a_tap_device_of_somebody_else(runtime: Runtime, echo: Found, namespace: str) -> None:
    name = f"{namespace[:12]}t"
    netns.ip("tuntap", "add", name, "mode", "tap")
    try:
        record = start(runtime, echo, f"tap:{name}")
        with pytest.raises(InUse):
            start(runtime, echo, f"tap:{name}")
        runtime.kill(record)
        assert name in links(), "it stays"
        start(runtime, echo, f"tap:{name}")
    finally:
        for record in runtime.instances.records():
            runtime.kill(record)
        netns.ip("link", "del", name)
    assert len(runtime.instances.records()) == 2


@needs_root
def test_a_tap_device_on_a_bridge(runtime: Runtime, echo: Found, namespace: str) -> None:
    name = f"{namespace[:12]}b"
    netns.ip("link", "add", name, "type", "bridge")
    try:
        record = start(runtime, echo, f"bridge:{name}")
        tap = taps.name_of(record.id)
        assert any(f" {tap}:" in line and f"master {name} " in line for line in links().splitlines())
        runtime.kill(record)
        assert soon(lambda: tap not in links())
    finally:
        netns.ip("link", "del", name)


@pytest.mark.parametrize("wanted", ["tap:ovm-none", "tap:lo", "bridge:lo", "netns:/nowhere", "netns:/proc/self/status"])
def test_a_network_that_is_not_there(runtime: Runtime, echo: Found, wanted: str) -> None:
    with pytest.raises(HostError):
        start(runtime, echo, wanted)
    assert runtime.instances.records() == []


def filters(namespace: str, interface: str) -> str:
    argv = ["tc", "-n", namespace, "filter", "show", "dev", interface, "ingress"]
    return subprocess.run(argv, capture_output=True, timeout=10, check=True).stdout.decode()


def test_a_network_namespace(runtime: Runtime, echo: Found, namespace: str) -> None:
    record = start(runtime, echo, f"netns:{netns.path_of(namespace)}")
    tap = taps.name_of(record.id)
    assert f" {tap}: <BROADCAST,MULTICAST,UP," in links(namespace)
    assert tap not in links()
    assert Path("/proc/self/ns/net").readlink() == Path(f"/proc/{os.getppid()}/ns/net").readlink(), "we are back"
    runtime.kill(record)
    assert soon(lambda: tap not in links(namespace))


def test_the_traffic_of_an_interface_is_led_to_the_guest(runtime: Runtime, echo: Found, namespace: str) -> None:
    if shutil.which("tc") is None:
        pytest.skip("there is no tc")
    netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1", ns=namespace)
    netns.ip("link", "set", "eth0", "up", ns=namespace)
    wanted = f"netns:{netns.path_of(namespace)},redirect=eth0"
    record = start(runtime, echo, wanted)
    tap = taps.name_of(record.id)
    assert f"mirred (Egress Redirect to device {tap})" in filters(namespace, "eth0")
    assert "mirred (Egress Redirect to device eth0)" in filters(namespace, tap)
    # a frame that comes in at eth0 goes out at the tap: the kernel counts it there
    netns.ip("link", "set", "eth1", "up", ns=namespace)
    assert soon(lambda: " 0 packets" not in stats(namespace, tap)), "duplicate address detection, say"
    assert record.process is not None
    os.kill(record.process.pid, signal.SIGKILL)
    assert record.process.wait(20), "a process closes its files, and so its tap, before it has ended"
    assert soon(lambda: tap not in links(namespace))
    assert "mirred" in filters(namespace, "eth0")
    runtime.instances.recover()
    assert "mirred" not in filters(namespace, "eth0")
    # the same namespace serves another one
    again = start(runtime, echo, wanted)
    assert "mirred" in filters(namespace, "eth0")
    runtime.remove(again, force=True)
    assert "mirred" not in filters(namespace, "eth0")
    with pytest.raises(HostError):
        start(runtime, echo, f"netns:{netns.path_of(namespace)},redirect=eth7")


def stats(namespace: str, interface: str) -> str:
    argv = ["ip", "-n", namespace, "-s", "link", "show", "dev", interface]
    lines = subprocess.run(argv, capture_output=True, timeout=10, check=True).stdout.decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("TX:"))
    sent, dropped = lines[at + 1].split()[1], lines[at + 1].split()[3]
    return f" {int(sent) + int(dropped)} packets"


def test_a_namespace_that_is_gone_is_no_obstacle(runtime: Runtime, echo: Found, namespace: str) -> None:
    if shutil.which("tc") is None:
        pytest.skip("there is no tc")
    with netns.namespace() as other:
        netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1", ns=other)
        record = start(runtime, echo, f"netns:{netns.path_of(other)},redirect=eth0")
    runtime.remove(record, force=True)
    with pytest.raises(OvmsError):
        runtime.instances.find(record.id)
