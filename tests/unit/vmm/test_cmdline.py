"""QEMU's command line: golden, and the properties that keep a hostile artifact inside."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ovms.disk.layers import Layer
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.spec.manifest import DiskFormat
from ovms.vmm.extras import ExtraDisk, Extras, Share
from ovms.vmm.model import Machine, Network, PortForward, Region, Restore, Uplink, VmConfig
from ovms.vmm.qemu import cmdline
from ovms.vmm.qemu.versions import OLDEST, Since, number

MACHINE = Machine("pc-i440fx-7.2", Accel.TCG, "qemu64", (), 256 << 20, 2, "52:54:00:01:02:03", 1 << 30, agent=True)
CONFIG = VmConfig(
    name="web",
    uuid="11111111-2222-3333-4444-555555555555",
    machine=MACHINE,
    kernel=Path("/store/kernel"),
    initrd=Path("/store/initrd"),
    kernel_args="console=ttyS0 root=/dev/vda",
    layers=(
        Layer(Path("/store/base"), DiskFormat.RAW, 1 << 30),
        Layer(Path("/store/diff"), DiskFormat.QCOW2, 1 << 30),
    ),
    overlay=Path("/instance/overlay-0.qcow2"),
    network=Network(ports=(PortForward("127.0.0.1", 8080, 80), PortForward("0.0.0.0", 53, 5353, "udp"))),
)
FDS = cmdline.Descriptors(3, 4, 5, 12, layers=(6, 7), overlay=(8, 9), kernel=10, initrd=11, agent=14)
SHARED = replace(CONFIG, machine=replace(MACHINE, regions=tuple(Region(f"r{i}", 4096 << i) for i in range(6))))
RESTORED = replace(CONFIG, restore=Restore(12, b"state"))
EXTRAS = Extras(
    seed=ExtraDisk(14, Path("/instance/seed.img"), DiskFormat.RAW, True, "seed"),
    volumes=(
        ExtraDisk(15, Path("/files/raw"), DiskFormat.RAW, False, "vol0"),
        ExtraDisk(16, Path("/files/data"), DiskFormat.QCOW2, True, "data"),
    ),
    shares=(
        Share(40, Path("/files/user,x=y"), True, "src"),
        Share(41, Path("/files/work"), False, "work"),
        Share(42, Path("/files/fast"), False, "fast", "virtiofs"),
    ),
)


def build(config: VmConfig = CONFIG, fds: cmdline.Descriptors = FDS) -> list[str]:
    return cmdline.build(Path("/usr/bin/qemu"), config, fds, sandbox=True)


@pytest.mark.spec("BIN-2", "MAN-9", "RAM-37", "LAY-3")
def test_the_whole_command_line(golden: object) -> None:
    golden("qemu-boot.txt", "\n".join(build()) + "\n")  # type: ignore[operator]


@pytest.mark.spec("RAM-36", "RAM-37", "SEC-9")
def test_the_command_line_of_a_restore(golden: object) -> None:
    argv = build(RESTORED, replace(FDS, state=13))
    golden("qemu-restore.txt", "\n".join(argv) + "\n")  # type: ignore[operator]
    # a generation ID of its own, and the host's clock
    assert "vmgenid,guid=auto" in argv
    assert argv[argv.index("-rtc") + 1] == "base=utc,clock=host"


@pytest.mark.spec("BOOT-33")
def test_the_command_line_with_all_that_can_be_attached(golden: object) -> None:
    argv = build(replace(CONFIG, extras=EXTRAS), replace(FDS, extras=(14, 15, 16), virtiofs={2: 43}))
    golden("qemu-extras.txt", "\n".join(argv) + "\n")  # type: ignore[operator]
    assert not [word for word in argv if "/files" in word]


@pytest.mark.spec("DEV-2", "DEV-3")
def test_the_command_line_with_shared_memory(golden: object) -> None:
    plain, shared = build(), build(SHARED, replace(FDS, regions=(20, 21, 22, 23, 24, 25)))
    added = [word for word in shared if word not in plain]
    golden("qemu-regions.txt", "\n".join(added) + "\n")  # type: ignore[operator]
    with pytest.raises(ValueError, match="shorter"):
        build(SHARED, replace(FDS, regions=(20,)))


def test_every_device_has_a_place_of_its_own_on_the_bus() -> None:
    regions = tuple(Region(f"r{i}", 4096) for i in range(limits.DEVICES_MAX))
    config = replace(CONFIG, machine=replace(MACHINE, regions=regions))
    argv = build(config, replace(FDS, regions=tuple(range(20, 20 + len(regions)))))
    places = re.findall(r"addr=(\S+?)(?:,|$)", "\n".join(argv), re.MULTILINE)
    assert len(places) == len(set(places)) == 4 + len(regions)
    assert places[-1] == "0x17.3"


@pytest.mark.spec("RAM-35", "RAM-36")
@pytest.mark.parametrize("version", ["8.2.0", "11.0.0"])
def test_the_command_line_of_a_restore_by_a_newer_qemu(golden: object, version: str) -> None:
    fds = replace(FDS, state=13)
    plain = cmdline.build(Path("/usr/bin/qemu"), RESTORED, fds, sandbox=True)
    newer = cmdline.build(Path("/usr/bin/qemu"), RESTORED, fds, sandbox=True, since=Since.of(version))
    added = [word for word in newer if word not in plain]
    golden(f"qemu-restore-{version}.txt", "\n".join(added) + "\n")  # type: ignore[operator]


def test_versions_are_compared_as_numbers() -> None:
    assert Since.of("7.2.22") == frozenset()
    assert Since.of("8.1.99") == frozenset()
    assert Since.of("8.2.0") == Since.of("10.2.1") == {Since.PRIVATE_OF_READONLY}
    assert Since.of("11.0.0") == set(Since)
    assert number("10.0.2") > number("9.2.4") > number("7.2.22") > OLDEST


@pytest.mark.parametrize("uplink", Uplink)
def test_the_card_is_the_same_whatever_it_is_connected_to(uplink: Uplink) -> None:
    def card(config: VmConfig) -> str:
        return next(word for word in build(config) if word.startswith("virtio-net"))

    fd = 20 if uplink in (Uplink.STREAM, Uplink.TAP) else None
    config = replace(CONFIG, network=Network(uplink, fd))
    assert card(config) == card(CONFIG)
    argv = build(config)
    netdevs = [b for a, b in itertools.pairwise(argv) if a == "-netdev"]
    assert (
        netdevs
        == {
            Uplink.SLIRP: ["user,id=net0"],
            Uplink.STREAM: [
                "socket,id=stream0,fd=20",
                "hubport,id=hub0,hubid=0,netdev=stream0",
                "hubport,id=net0,hubid=0",
            ],
            Uplink.TAP: ["tap,id=net0,fd=20,vhost=off"],
            Uplink.NONE: ["hubport,id=net0,hubid=0"],
        }[uplink]
    )


def nodes(argv: list[str]) -> dict[str, dict[str, object]]:
    values = [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "-blockdev"]
    return {value["node-name"]: value for value in values}


@pytest.mark.spec("LAY-2")
def test_every_qcow2_node_says_its_backing_itself() -> None:
    config = replace(CONFIG, layers=tuple(replace(layer, format=DiskFormat.QCOW2) for layer in CONFIG.layers))
    found = nodes(build(config))
    assert [found[n]["backing"] for n in ("layer0", "layer1", "overlay-0")] == [None, "layer0", "layer1"]


@pytest.mark.spec("LAY-4")
def test_only_the_overlay_is_writable() -> None:
    found = nodes(build())
    assert {name for name, value in found.items() if not value["read-only"]} == {"overlay-0", "overlay-0-file"}


def test_a_machine_without_a_port_for_the_agent_has_no_device_of_it() -> None:
    argv = build(replace(CONFIG, machine=replace(MACHINE, agent=False)), replace(FDS, agent=None))
    assert not any("serial" in word and word != "-serial" for word in argv)


def test_a_vm_without_a_disk_has_no_disk() -> None:
    config = replace(CONFIG, layers=(), overlay=None, machine=replace(MACHINE, disk_size=None))
    assert not any("blk" in word or word == "-blockdev" for word in build(config))


@pytest.mark.spec("SEC-2")
@pytest.mark.parametrize("name", ["a,file=/etc/passwd", "x,process=y"])
def test_commas_in_names_are_no_options(name: str) -> None:
    argv = build(replace(CONFIG, name=name))
    assert f"guest={name.replace(',', ',,')},process=ovms-11111111" in argv


@pytest.mark.spec("SEC-7")
def test_no_path_of_the_host_is_told_to_qemu() -> None:
    words = [word for argv in (build(), build(RESTORED, replace(FDS, state=13))) for word in argv[1:]]
    assert not [word for word in words if "/store" in word or "/instance" in word]


@pytest.mark.spec("RAM-36", "RAM-37")
def test_the_shape_of_a_restore_is_that_of_the_boot() -> None:
    def shape(argv: list[str]) -> list[str]:
        keep = ("-machine", "-cpu", "-smp", "-m", "-device", "-rtc", "-serial")
        return [f"{a} {b}" for a, b in itertools.pairwise(argv) if a in keep]

    assert shape(build()) == shape(build(RESTORED, replace(FDS, state=13)))
