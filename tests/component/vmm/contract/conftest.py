"""The adapters that have to keep the contract, and a VM of one of them: no runtime, no store."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.guests import DISK, MEMORY, Console, qemu_children

from ovms.disk import qcow2
from ovms.spec.choices import Accel
from ovms.vmm import watch
from ovms.vmm.model import Machine, VmConfig, VmFiles
from ovms.vmm.protocol import Vmm
from ovms.vmm.qemu.vmm import QemuVmm
from ovms.vmm.watch import Watched

#: A new adapter is a line here.
ADAPTERS: dict[str, Callable[[Path], Vmm]] = {"qemu": QemuVmm}


@pytest.fixture(params=sorted(ADAPTERS))
def vmm(request: pytest.FixtureRequest, qemu_cache: Path) -> Vmm:
    return ADAPTERS[request.param](qemu_cache)


@dataclass
class Vm:
    """A VM that was started, and what to talk to it with."""

    vmm: Vmm
    config: VmConfig
    files: VmFiles
    watched: Watched
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        self.console = Console(self.files.directory)

    def control(self) -> Any:
        return self.vmm.connect(self.files, self.config.machine, self.watched)

    def wait(self) -> watch.Exit:
        assert self.watched.vmm.wait(20.0), "the VMM is still there"
        seen = watch.wait_exit(self.files, self.watched.watcher, 5.0)
        assert seen is not None
        return seen


class Maker:
    """Starts VMs of one adapter, and ends them all."""

    def __init__(self, vmm: Vmm, directory: Path, kernel: Path) -> None:
        self.vmm = vmm
        self.directory = directory
        self.kernel = kernel
        self.vms: list[Vm] = []

    def machine(self, **more: Any) -> Machine:
        accel = self.vmm.choose_accel(None).accel
        accel = accel if Accel.TCG not in self.vmm.capabilities.accels else Accel.TCG
        shape = {"memory": MEMORY, "vcpus": 1, "mac": "52:54:00:00:00:01", "disk_size": DISK, **more}
        return self.vmm.machine(accel, **shape)

    def config(self, machine: Machine | None = None, **more: Any) -> VmConfig:
        number = len(list(self.directory.iterdir()))
        directory = self.directory / str(number)
        directory.mkdir()
        machine = machine or self.machine()
        overlay = None
        if machine.disk_size is not None:
            overlay = directory / "overlay-0.qcow2"
            qcow2.create_overlay(overlay, machine.disk_size)
        config = VmConfig(f"vm{number}", str(uuid.uuid4()), machine, self.kernel, None, "", (), overlay)
        return replace(config, **more)

    def files(self, config: VmConfig) -> VmFiles:
        return VmFiles(self.directory / config.name.removeprefix("vm"))

    def start(self, config: VmConfig | None = None) -> Vm:
        config = config or self.config()
        files = self.files(config)
        vm = Vm(self.vmm, config, files, self.vmm.start(config, files))
        self.vms.append(vm)
        if config.restore is None:
            vm.console.wait_for("READY")
        return vm


@pytest.fixture
def maker(vmm: Vmm, tmp_path: Path, echo_kernel: Path) -> Iterator[Maker]:
    directory = tmp_path / "vms"
    directory.mkdir()
    maker = Maker(vmm, directory, echo_kernel)
    yield maker
    for vm in maker.vms:
        vm.watched.vmm.kill()
        vm.watched.watcher.wait(5.0)
    assert qemu_children(directory) == []
