"""What the runtime relies on of every adapter (``ovms.vmm.protocol``); what one can't do by its capabilities is skipped.

The guest is the bare echo guest: an adapter whose VMM boots no PVH kernel brings its own way to start it.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import MEMORY

from ovms import fsutil
from ovms.disk import qcow2
from ovms.errors import PortInUse, VmmError
from ovms.memory import capture, template
from ovms.spec.digest import of_bytes
from ovms.vmm.model import Ending, Network, PortForward, Region, Restore, RunState
from ovms.vmm.protocol import Vmm

from .conftest import Maker, Vm


def need(vmm: Vmm, has: object, what: str) -> None:
    if not has:
        pytest.skip(f"{vmm.name} has no {what}")


# --- what is known without a VM --------------------------------------------------------------------------------------


def test_an_adapter_knows_itself(vmm: Vmm) -> None:
    can = vmm.capabilities
    assert vmm.name
    assert vmm.version
    assert "x86_64" in can.archs
    assert vmm.choose_accel(None).accel in can.accels
    assert can.memory_max >= MEMORY
    assert can.vcpus_max >= 1
    if can.state_formats:
        assert vmm.state_format == can.state_formats[0]


@pytest.mark.spec("RAM-32", "RAM-33")
def test_a_machine_of_its_own_is_fit_and_others_are_not(maker: Maker) -> None:
    vmm, machine = maker.vmm, maker.machine()
    assert machine.memory == MEMORY
    assert vmm.why_incompatible(machine, vmm.version) is None
    assert vmm.why_incompatible(replace(machine, machine_type="no-such-machine"), vmm.version)
    assert vmm.why_incompatible(replace(machine, cpu="no-such-cpu"), vmm.version)
    assert vmm.why_incompatible(machine, "99.0.0")


# --- life ------------------------------------------------------------------------------------------------------------


def test_a_vm_runs_is_found_again_and_answers(maker: Maker) -> None:
    vm = maker.start()
    assert vm.watched.vmm.alive()
    assert vm.watched.watcher.alive()
    for _ in range(3):  # a channel is let go of, and taken again
        with vm.control() as control:
            assert control.state() is RunState.RUNNING
    assert vm.console.ping() == 1


def test_a_paused_vm_stands_still_and_goes_on(maker: Maker) -> None:
    vm = maker.start()
    with vm.control() as control:
        control.pause()
        control.pause()  # a second time is no error
        assert control.state() is RunState.PAUSED
    vm.console.send("\n")
    time.sleep(0.1)
    assert "PONG" not in vm.console.text()
    with vm.control() as control:
        control.resume()
        assert control.state() is RunState.RUNNING
    vm.console.wait_for("PONG 00000001")


def test_the_power_button_is_heard(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.power_button, "power button")
    vm = maker.start()
    with vm.control() as control:
        control.power_down()
    assert vm.wait().returncode == 0
    assert maker.vmm.ending(vm.files) is Ending.POWERED_OFF


def test_a_guest_that_powers_off_has_done_so_by_itself(maker: Maker) -> None:
    vm = maker.start()
    vm.console.send("q")
    assert vm.wait().returncode == 0
    assert maker.vmm.ending(vm.files) is Ending.POWERED_OFF


def test_an_ended_vm_has_let_go_when_the_call_returns(maker: Maker) -> None:
    vm = maker.start()
    with vm.control() as control:
        control.quit()
    vm.wait()
    assert maker.vmm.ending(vm.files) is Ending.STOPPED


def test_a_killed_vmm_is_told_apart(maker: Maker) -> None:
    vm = maker.start()
    vm.watched.vmm.signal(signal.SIGKILL)
    assert vm.wait().returncode == -signal.SIGKILL
    assert maker.vmm.ending(vm.files) is Ending.KILLED
    with pytest.raises(VmmError), vm.control() as control:
        control.state()


@pytest.mark.spec("GEN-3")
def test_nothing_is_left_of_a_start_that_fails(maker: Maker) -> None:
    config = maker.config(replace(maker.machine(), machine_type="no-such-machine"))
    with pytest.raises(VmmError):
        maker.start(config)
    files = maker.files(config)
    assert not [path for path in (files.control, files.console, files.pid) if path.exists()]


@pytest.mark.spec("RUN-20")
def test_two_vms_share_nothing(maker: Maker) -> None:
    first, second = maker.start(), maker.start()
    assert [first.console.ping(), first.console.ping(), second.console.ping()] == [1, 2, 1]
    with first.control() as control:
        control.quit()
    assert second.console.ping() == 2


# --- what not every VMM has ------------------------------------------------------------------------------------------


def test_a_vm_without_a_disk(maker: Maker) -> None:
    vm = maker.start(maker.config(maker.machine(disk_size=None)))
    with vm.control() as control:
        assert control.active_overlay() is None


def test_several_cpus(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.vcpus_max >= 2, "second CPU")
    assert maker.start(maker.config(maker.machine(vcpus=2))).console.ping() == 1


@pytest.mark.spec("LAY-4")
def test_a_new_overlay_takes_the_writes(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.live_overlay, "live overlays")
    vm = maker.start()
    new = vm.files.directory / "overlay-1.qcow2"
    qcow2.create_overlay(new, vm.config.machine.disk_size or 0)
    with vm.control() as control:
        assert control.active_overlay() == "overlay-0.qcow2"
        control.pause()
        control.add_overlay(new)
        assert control.active_overlay() == "overlay-1.qcow2"
        control.resume()
    assert vm.console.ping() == 1


def test_a_port_is_forwarded_or_said_to_be_taken(maker: Maker) -> None:
    need(maker.vmm, "tcp" in maker.vmm.capabilities.port_protocols, "forwarded ports")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = PortForward("127.0.0.1", taken.getsockname()[1], 80)
        with pytest.raises(PortInUse) as caught:
            maker.start(maker.config(network=Network(ports=(port,))))
        assert caught.value.context["port"] == port.host_port
    maker.start(maker.config(network=Network(ports=(port,))))
    socket.create_connection(("127.0.0.1", port.host_port), timeout=5).close()


@pytest.mark.spec("DEV-2", "DEV-3")
def test_a_region_is_shared_with_whoever_has_its_descriptor(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.devices.get("ivshmem"), "ivshmem")
    fd = os.memfd_create("contract", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        vm = maker.start(maker.config(maker.machine(regions=(Region("shm", 4096),)), regions=(fd,)))
        assert vm.console.ask("n", "REGION ") != 0
        os.pwrite(fd, b"\7", 0)
        assert vm.console.ask("g", "GOT ") == 7
        vm.console.send("p")
        assert vm.console.ask("g", "GOT ") == 7
        assert os.pread(fd, 1, 4) == b"\1"
    finally:
        os.close(fd)


def snapshot(vm: Vm, scratch: Path) -> tuple[bytes, Path]:
    """The state and the memory of a VM, which goes on."""
    image = scratch / "memory"
    with image.open("x+b") as file, vm.control() as control:
        control.pause()
        state = control.save_state()
        taken = capture.take(control.ram(), file.fileno())
        control.resume()
        taken.finish()
    return state, image


@pytest.mark.spec("RAM-35", "RAM-36")
def test_a_vm_goes_on_elsewhere_and_its_memory_is_not_written_to(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.state_formats, "snapshots")
    vm = maker.start()
    assert [vm.console.ping() for _ in range(3)] == [1, 2, 3]
    with tempfile.TemporaryDirectory() as scratch:
        state, image = snapshot(vm, Path(scratch))
        digest = of_bytes(state)
        before = image.read_bytes()
        with template.opened(lambda: image, MEMORY, digest, ()) as ram:
            clones = [maker.start(maker.config(vm.config.machine, restore=Restore(ram, state))) for _ in range(2)]
            assert [clone.console.ping() for clone in clones] == [4, 4]
            assert clones[0].console.ping() == 5
            with os.fdopen(os.dup(ram), "rb") as file:
                file.seek(0)
                assert file.read() == before
        assert vm.console.ping() == 4
        # a clone is a VM like another: a snapshot of it has what it wrote
        (Path(scratch) / "again").mkdir()
        state, image = snapshot(clones[0], Path(scratch) / "again")
        with template.opened(lambda: image, MEMORY, of_bytes(state), ()) as ram:
            again = maker.start(maker.config(vm.config.machine, restore=Restore(ram, state)))
            assert again.console.ping() == 6


def test_a_state_that_is_none_is_refused(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.state_formats, "snapshots")
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "memory"
        with image.open("xb") as file:
            os.ftruncate(file.fileno(), MEMORY)
        with template.opened(lambda: image, MEMORY, of_bytes(b"x"), ()) as ram, pytest.raises(VmmError):
            maker.start(maker.config(restore=Restore(ram, b"no state at all")))


def test_the_console_is_one_for_those_who_come_and_go(maker: Maker) -> None:
    vm = maker.start()
    for number in (1, 2):
        with fsutil.connect_unix(vm.files.console, timeout=5) as client:
            client.sendall(b"\n")
            said = b""
            while f"PONG {number:08x}\n".encode() not in said:
                said += client.recv(256)
    assert "PONG 00000002" in vm.console.text()


def test_what_was_prepared_and_not_used_is_taken_back(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.live_overlay, "live overlays")
    vm = maker.start()
    assert vm.config.overlay is not None
    new = vm.config.overlay.with_name("overlay-1.qcow2")
    qcow2.create_overlay(new, vm.config.machine.disk_size or 0)
    with vm.control() as control:
        for _ in range(2):
            with control.prepare(new):
                pass
            assert control.active_overlay() == vm.config.overlay.name
        with control.prepare(new):
            control.pause()
            control.add_overlay(new)
            control.resume()
        assert control.active_overlay() == new.name
    assert vm.console.ping() == 1


def test_a_vm_goes_on_on_a_private_copy_of_its_memory(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.state_formats, "snapshots")
    vm = maker.start()
    assert [vm.console.ping() for _ in range(3)] == [1, 2, 3]
    with vm.control() as control:
        control.pause()
        state = control.save_state()
        if not control.freeze_ram():
            pytest.skip("this VMM copies")
        ram = control.ram()
        assert ram.private
        taken = capture.frozen(ram)
        control.resume()
        taken.finish()
    try:
        before = of_bytes(os.pread(taken.fd, MEMORY, 0))
        assert [vm.console.ping() for _ in range(2)] == [4, 5]
        assert of_bytes(os.pread(taken.fd, MEMORY, 0)) == before
        # a clone of that moment, beside the original
        clone = maker.start(maker.config(vm.config.machine, restore=Restore(taken.fd, state)))
        assert [clone.console.ping(), vm.console.ping()] == [4, 6]
        with vm.control() as control:
            control.pause()
            assert not control.freeze_ram()  # it is private already
            control.resume()
        assert vm.console.ping() == 7
    finally:
        taken.close()


def test_a_parked_vm_runs_when_it_is_resumed(maker: Maker) -> None:
    need(maker.vmm, maker.vmm.capabilities.state_formats, "snapshots")
    vm = maker.start()
    assert vm.console.ping() == 1
    with tempfile.TemporaryDirectory() as scratch:
        state, image = snapshot(vm, Path(scratch))
        with template.opened(lambda: image, MEMORY, of_bytes(state), ()) as ram:
            config = maker.config(vm.config.machine, restore=Restore(ram, state), parked=True)
            parked = maker.start(config)
        with parked.control() as control:
            assert control.state() is RunState.PAUSED
            control.resume()
            assert control.state() is RunState.RUNNING
        assert parked.console.ping() == 2
