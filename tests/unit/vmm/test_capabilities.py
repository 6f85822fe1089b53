"""What an adapter can't do is refused by name; what nobody asks for is never missed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ovms.errors import Unsupported
from ovms.spec import manifest
from ovms.spec.choices import Accel
from ovms.spec.manifest import DiskFormat
from ovms.vmm.capabilities import CHECKS, Asked, Capabilities, require, require_snapshots
from ovms.vmm.qemu.vmm import QemuVmm

D = "sha256:" + "0" * 64
DOCUMENT: dict[str, Any] = {
    "schemaVersion": 1,
    "mediaType": "application/vnd.ovms.manifest.v1+json",
    "name": "web",
    "version": "1",
    "kernel": {"ref": D},
}
#: As small as an adapter can be: a kernel, in memory.
LEAST = Capabilities(
    archs=frozenset({"x86_64"}),
    accels=frozenset({Accel.KVM}),
    disk_formats=frozenset(),
    memory_max=1 << 30,
    vcpus_max=4,
)
SHARED = {"type": "ivshmem", "name": "shm"}


class Adapter:
    """One that has nothing but a name and capabilities."""

    name = "least"

    def __init__(self, capabilities: Capabilities = LEAST) -> None:
        self.capabilities = capabilities


def ask(more: dict[str, Any] | None = None, **options: Any) -> Asked:
    return Asked(manifest.check({**DOCUMENT, **(more or {})}), **options)


def disk(*formats: str) -> dict[str, Any]:
    return {"diskLayers": [{"ref": D, "format": name} for name in formats]}


#: feature → what asks for it, what it is called, and what an adapter has that has it
CASES: dict[str, tuple[Asked, str, dict[str, Any]]] = {
    "arch": (
        ask({"metadata": {"platform": {"arch": "aarch64"}}}), "the architecture aarch64", {"archs": {"aarch64"}},
    ),
    "firmware": (ask({"metadata": {"platform": {"uefi": True}}}), "UEFI firmware", {"uefi": True}),
    "devices": (ask({"devices": [SHARED]}), "a device of the type 'ivshmem'", {"devices": {"ivshmem": 1}}),
    "disk": (ask(disk("raw")), "disks of the format raw", {"disk_formats": {DiskFormat.RAW}}),
    "accel": (ask(accel=Accel.TCG), "the accelerator tcg", {"accels": {Accel.TCG}}),
    "memory": (ask(memory=2 << 30), "2048 MiB of memory, of 1024 MiB at most", {"memory_max": 2 << 30}),
    "cpus": (ask(vcpus=5), "5 CPUs, of 4 at most", {"vcpus_max": 5}),
    "network": (ask(network="tap"), "the network tap", {"networks": {"tap"}}),
    "ports": (ask(port_protocols=frozenset({"udp"})), "forwarded ports of udp", {"port_protocols": {"udp"}}),
    "shares": (ask(shares=frozenset({"9p"})), "shared directories by 9p", {"shares": {"9p"}}),
    "volumes": (ask(volumes=1), "1 volumes, of 0 at most", {"volumes": 1}),
    "vsock": (ask(vsock=True), "a virtual socket", {"vsock": True}),
    "agent": (ask(agent=True), "a channel for its agent", {"agent": True}),
}  # fmt: skip


@pytest.mark.spec("BIN-4", "DEV-1")
@pytest.mark.parametrize("feature", [check.feature for check in CHECKS])
def test_what_is_lacking_is_named_and_what_is_there_passes(feature: str) -> None:
    asked, words, has = CASES[feature]
    with pytest.raises(Unsupported) as caught:
        require(Adapter(), asked)  # type: ignore[arg-type]
    assert caught.value.message == f"web needs {words}, which the runtime least does not give"
    assert caught.value.code == "unsupported"
    assert (caught.value.context["adapter"], caught.value.context["feature"]) == ("least", feature)
    require(Adapter(replace(LEAST, **has)), asked)  # type: ignore[arg-type]


def test_who_asks_for_nothing_gets_it_from_every_adapter() -> None:
    require(Adapter(), ask())  # type: ignore[arg-type]


def test_counts_are_bounded() -> None:
    two = ask({"devices": [SHARED, {**SHARED, "name": "other"}]})
    with pytest.raises(Unsupported, match="2 devices of the type ivshmem, of 1 at most"):
        require(Adapter(replace(LEAST, devices={"ivshmem": 1})), two)  # type: ignore[arg-type]
    flat = replace(LEAST, disk_formats=frozenset(DiskFormat), disk_layers=1)
    with pytest.raises(Unsupported, match="2 disk layers, of 1 at most"):
        require(Adapter(flat), ask(disk("raw", "qcow2")))  # type: ignore[arg-type]
    pairs = Adapter(replace(LEAST, vcpus_unit=2))
    with pytest.raises(Unsupported, match="CPUs that are no multiple of 2"):
        require(pairs, ask(vcpus=3))  # type: ignore[arg-type]
    for count in (1, 2, 4):
        require(pairs, ask(vcpus=count))  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="memory that is no multiple of 1048576 bytes"):
        require(Adapter(replace(LEAST, memory_unit=1 << 20)), ask(memory=(64 << 20) + 4096))  # type: ignore[arg-type]


def test_a_disk_without_a_kernel_needs_firmware_that_boots_it() -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "kernel"}
    asked = Asked(manifest.check({**document, **disk("raw")}))
    disks = replace(LEAST, disk_formats=frozenset(DiskFormat))
    with pytest.raises(Unsupported, match="a BIOS, to boot from its disk"):
        require(Adapter(disks), asked)  # type: ignore[arg-type]
    require(Adapter(replace(disks, bios=True)), asked)  # type: ignore[arg-type]


def test_snapshots_need_saved_memory_and_a_new_overlay() -> None:
    saves = replace(LEAST, state_formats=("x-1",))
    with pytest.raises(Unsupported, match="its memory saved"):
        require_snapshots(Adapter(), "web", disk=False)  # type: ignore[arg-type]
    require_snapshots(Adapter(saves), "web", disk=False)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="a new overlay"):
        require_snapshots(Adapter(saves), "web", disk=True)  # type: ignore[arg-type]
    require_snapshots(Adapter(replace(saves, live_overlay=True)), "web", disk=True)  # type: ignore[arg-type]


def test_every_capability_is_compared_somewhere() -> None:
    # hotplug and the power button are for those who add to a running VM, or ask it to stop: no start needs them
    by_hand = {"hotplug", "power_button", "state_formats", "live_overlay"}
    compared = {"bios", "uefi", "memory_unit", "vcpus_unit", "disk_layers"} | {
        key for _, _, has in CASES.values() for key in has
    }
    assert {field.name for field in fields(Capabilities)} == compared | by_hand


def test_qemu_declares_the_form_that_it_writes() -> None:
    assert QemuVmm.capabilities.state_formats[0] == QemuVmm.state_format
