"""Networks: what users write, what comes of it, and the command line of passt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import HostError, PortInUse, SnapshotIncompatible, ToolMissing, Unsupported, UsageError
from ovms.process import ProcessId
from ovms.runtime import network, passt, taps
from ovms.runtime.network import Attachment, Kind, Wanted
from ovms.vmm.jail import User
from ovms.vmm.model import PortForward

MAC = "52:54:00:01:02:03"
ID = "11111111-2222-3333-4444-555555555555"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user", Wanted()),
        ("user:passt", Wanted(Kind.PASST)),
        ("user:slirp", Wanted(Kind.SLIRP)),
        ("none", Wanted(Kind.NONE)),
        ("tap", Wanted(Kind.TAP)),
        ("tap:tap0", Wanted(Kind.TAP, "tap0")),
        ("bridge:br-lan.7", Wanted(Kind.BRIDGE, "br-lan.7")),
        ("netns:/run/netns/blue", Wanted(Kind.NETNS, path=Path("/run/netns/blue"))),
        ("netns:/proc/7/ns/net,redirect=eth0", Wanted(Kind.NETNS, path=Path("/proc/7/ns/net"), redirect="eth0")),
    ],
)
def test_networks(text: str, expected: Wanted) -> None:
    assert Wanted.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "none:",
            "user:",
            "user:tap",
            "tap:",
            "tap:a/b",
            "tap:..",
            "tap:" + "x" * 16,
            "tap:a b",
            "bridge",
            "bridge:",
        ),
        *("netns", "netns:", "netns:blue", "netns:/x,redirect=", "netns:/x,eth0", "netns:/x,redirect=a,b=c", "host"),
        *("netns:/x\0", "slirp", "passt"),
    ],
)
def test_networks_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        Wanted.parse(text)


@given(st.text(max_size=30))
def test_any_text_is_a_network_or_a_usage_error(text: str) -> None:
    for word in (text, f"tap:{text}", f"netns:/{text}", f"netns:/x,redirect={text}"):
        try:
            wanted = Wanted.parse(word)
        except UsageError:
            continue
        attachment = network.Attachment(wanted.kind or Kind.SLIRP, wanted.name, wanted.path, wanted.redirect)
        assert Attachment.from_json(json.loads(json.dumps(attachment.to_json()))) == attachment


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The programs that there are."""
    found = {"passt": "/usr/bin/passt"}
    monkeypatch.setattr(shutil, "which", lambda name, **_: found.get(name))
    return found


def choose(text: str, state: str | None = None, *, ports: bool = False) -> Kind:
    return network.choose(Wanted.parse(text), state=state, ports=PORTS if ports else ()).kind


def test_ipv6_ports_need_passt(tools: dict[str, str]) -> None:
    port = PortForward("::1", 8080, 80)
    assert network.choose(Wanted(), state=None, ports=[port]).kind is Kind.PASST
    with pytest.raises(Unsupported):
        network.choose(Wanted(), state="user", ports=[port])
    tools.clear()
    with pytest.raises(Unsupported):
        network.choose(Wanted(), state=None, ports=[port])


def test_the_user_network_is_passt_where_it_is_installed(tools: dict[str, str]) -> None:
    assert choose("user", ports=True) is Kind.PASST
    tools.clear()
    assert choose("user", ports=True) is Kind.SLIRP
    with pytest.raises(ToolMissing):
        choose("user:passt")


@pytest.mark.spec("RAM-32")
def test_which_snapshot_goes_on_which_network(tools: dict[str, str]) -> None:
    assert choose("user", "user") is Kind.SLIRP
    assert choose("user:slirp", "user") is Kind.SLIRP
    for text in ("none", "user:passt", "tap", "bridge:br0", "netns:/x"):
        with pytest.raises(SnapshotIncompatible):
            choose(text, "user")
        for state in ("passt", "tap", "none", "something-of-another-runtime"):
            assert choose(text, state) is Wanted.parse(text).kind
    assert choose("user", "passt") is Kind.PASST
    assert choose("user:slirp", "passt") is Kind.SLIRP


@pytest.mark.parametrize("text", ["none", "tap", "bridge:br0", "netns:/x"])
def test_ports_need_the_user_network(text: str) -> None:
    assert choose(text) is Wanted.parse(text).kind
    with pytest.raises(UsageError):
        choose(text, ports=True)


def test_what_is_noted_is_read_again(tmp_path: Path) -> None:
    assert network.outside(tmp_path) is None
    for outside in (
        network.Outside((ProcessId(1, 2, "boot"), ProcessId(3, 4, "boot")), (PortForward("127.0.0.1", 1, 2, "udp"),)),
        network.Outside((), (), network.Redirect(Path("/run/netns/x"), "eth0", "ovm111111112222")),
    ):
        network._note(tmp_path, outside)
        assert network.outside(tmp_path) == outside


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"processes": 1, "ports": [], "redirect": null}'])
def test_a_damaged_note_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / network.FILE).write_text(content)
    assert network.outside(tmp_path) is None
    network.sweep(tmp_path)
    assert not network.left_over(tmp_path)


def test_names_of_tap_devices() -> None:
    name = taps.name_of(ID)
    assert len(name) <= 15
    assert name != taps.name_of(ID.replace("1", "2", 1))
    assert 1 <= int(taps._number(name)) <= 0x7FFF


# --- passt -----------------------------------------------------------------------------------------------------------

PORTS = (PortForward("127.0.0.1", 8080, 80), PortForward("0.0.0.0", 53, 5353, "udp"))


def test_the_command_line(golden: object) -> None:
    host = passt.Routes("eth0", "eth0")
    argv = passt.command(Path("/usr/bin/passt"), PORTS, User(12345, 23456), host, MAC)
    golden("passt.txt", "\n".join(argv) + "\n")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (passt.Routes("eth0", None), ["-4"]),
        (passt.Routes(None, "eth1"), ["-i", "eth1"]),
        (passt.Routes(None, None), ["-4", "-i", "lo"]),
    ],
)
def test_hosts_without_a_route(host: passt.Routes, expected: list[str]) -> None:
    argv = passt.command(Path("/usr/bin/passt"), (), None, host, MAC)
    assert [word for word in argv if word in ("-4", "-i", "lo", "eth1")] == expected
    assert ("fec0::5054:00ff:fe01:0203" in argv) == (host.ipv6 is not None)
    assert "--runas" not in argv
    assert "--no-map-gw" in argv


ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
LAN = "eth1\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n"
WORLD = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
ROUTE_6 = f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200       lo\n"


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "expected"),
    [
        (ROUTE, ROUTE_6, passt.Routes(None, None)),
        (
            ROUTE + LAN + WORLD,
            f"{ROUTE_6}{'0' * 32} 00 {'0' * 32} 00 fd{'0' * 29}1 00000400 00000001 00000000 00000003     eth2\n",
            passt.Routes("eth0", "eth2"),
        ),
    ],
)
def test_the_routes_of_the_host(tmp_path: Path, ipv4: str, ipv6: str, expected: passt.Routes) -> None:
    (tmp_path / "route").write_text(ipv4)
    (tmp_path / "ipv6_route").write_text(ipv6)
    assert passt.routes(tmp_path) == expected


def test_a_host_without_these_files(tmp_path: Path) -> None:
    assert passt.routes(tmp_path) == passt.Routes(None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 127.0.0.53\nsearch a.test\n", "search a.test\nnameserver 127.0.0.53\nnameserver 10.0.2.3\n"),
        ("nameserver ::1\nnameserver 127.0.0.1", "nameserver 127.0.0.1\nnameserver 10.0.2.3\n"),
        ("nameserver 192.0.2.1\n", None),
        ("nameserver 127.0.0.1\nnameserver 192.0.2.1\n", None),
        ("# nameserver 127.0.0.53\nnameserver\n", None),
        ("", None),
    ],
)
def test_what_passt_is_shown_of_resolvers(text: str, expected: str | None) -> None:
    assert passt.resolvers(text) == expected


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Failed to bind any port for '-t 127.0.0.1/8080:80', exiting", PortInUse),
        ("Failed to bind any port for '-t ::1/8080:80', exiting", PortInUse),
        ("Failed to bind any port for '-u 0.0.0.0/53:53', exiting", PortInUse),
        ("Overlapping port specifier ::1/8080:80", HostError),
        ("Couldn't create user namespace: Operation not permitted", HostError),
    ],
)
def test_why_passt_does_not_start(said: str, error: type[Exception]) -> None:
    assert type(passt.failure(said)) is error
