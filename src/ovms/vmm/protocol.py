"""What the runtime asks of any virtual machine monitor."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ovms.spec.choices import Accel
from ovms.vmm.capabilities import Capabilities
from ovms.vmm.model import AccelChoice, Ending, GuestRam, Machine, PortForward, Region, RunState, VmConfig, VmFiles
from ovms.vmm.watch import Watched


class Control(Protocol):
    """The control channel of one living VM. Every call raises VmmError or VmmTimeout when the VMM fails.

    A snapshot is taken in one connection, in this order: :meth:`prepare`, :meth:`pause`, :meth:`add_overlay`,
    :meth:`save_state`, :meth:`freeze_ram`, :meth:`ram` (a VMM that writes state and memory in one go does so in the fourth,
    and says in the last where the memory is), :meth:`resume`.
    """

    def state(self) -> RunState:
        """What the VM does now."""

    def pause(self) -> None:
        """Stops all CPUs; what the disk was told is flushed."""

    def resume(self, *, timeout: float | None = None) -> None:
        """Lets the CPUs go on. *timeout*: seconds for it, where the usual ones are too many."""

    def power_down(self) -> None:
        """Presses the power button; what the guest makes of it is its own matter."""

    def figures(self) -> Mapping[str, int]:
        """What the guest has moved so far: ``disk_read_bytes``, ``disk_written_bytes``, … as far as the VMM counts it."""

    def set_link(self, up: bool) -> None:
        """Plugs the network card's cable in, or out."""

    def agent_listens(self) -> bool:
        """Whether the guest has opened the port for its agent."""

    def quit(self) -> None:
        """Ends the VM at once, as if its power failed. The VMM has let go of its files when this returns."""

    def active_overlay(self) -> str | None:
        """The file name of the overlay that takes the writes now; None without a disk."""

    def prepare(self, overlay: Path | None) -> AbstractContextManager[None]:
        """Does what a snapshot needs and can be done while the guest runs still. *overlay* is the one to be added, if any.

        What was not used is taken back at the end.
        """

    def add_overlay(self, overlay: Path) -> None:
        """Lets all further writes go to *overlay* (an empty qcow2 file); the one before is complete and read-only."""

    def save_state(self) -> bytes:
        """The device state of the paused VM, in the form that :class:`~ovms.vmm.model.Restore` takes."""

    def add_forward(self, port: PortForward) -> None:
        """Lets the VMM's own user network forward a port. Raises PortInUse."""

    def remove_forward(self, port: PortForward) -> None:
        """Ends a forward; connections that it has go on."""

    def replace_stream(self, fd: int) -> None:
        """Connects the network card to another stream socket than before."""

    def ram(self) -> GuestRam:
        """Where the memory can be read."""

    def freeze_ram(self) -> bool:
        """Lets the paused guest go on on a private copy of its memory, whose file stays as it is now, in no time.

        False where that can't be, and then nothing has changed: the memory must be copied out by way of :meth:`ram`.
        """


class Vmm(Protocol):
    """A virtual machine monitor on this host. What every adapter has to keep: ``tests/component/vmm/contract``.

    Nothing that :attr:`capabilities` does not have is asked of it.
    """

    @property
    def name(self) -> str:
        """``qemu``, …"""

    @property
    def version(self) -> str:
        """Its version, such as ``7.2.22``. Raises ToolMissing when it is not installed."""

    @property
    def state_format(self) -> str:
        """The form of the device state that it writes, such as ``qemu-migration-3``."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do. Costs nothing, and does not need the VMM to be installed."""

    def choose_accel(self, wanted: Accel | None) -> AccelChoice:
        """The accelerator to use: KVM where a guest really runs on it.

        Raises:
            AccelUnavailable: *wanted* is KVM, and it does not run guests here.
        """

    def machine(
        self,
        accel: Accel,
        *,
        memory: int,
        vcpus: int,
        mac: str,
        disk_size: int | None,
        regions: tuple[Region, ...] = (),
    ) -> Machine:
        """The shape that a new VM gets on this host."""

    def why_incompatible(self, machine: Machine, version: str) -> str | None:
        """Why a snapshot of *machine*, taken by this VMM in *version*, can't be restored here; None when it can."""

    def start(self, config: VmConfig, files: VmFiles) -> Watched:
        """Starts a VM, running (or loaded and paused, where it is to be *parked*), and detached from us, with its watcher.

        Nothing is left of it when this fails.

        Raises:
            VmmError, VmmTimeout: the VMM refused, died or hung; its own words are in the message.
            PortInUse: a port was taken meanwhile.
            JailRefused: the host does not allow a part of the jail.
        """

    def connect(self, files: VmFiles, machine: Machine, vmm: Watched) -> AbstractContextManager[Control]:
        """The control channel of a living VM."""

    def ending(self, files: VmFiles) -> Ending:
        """How a VM that is no more came to its end."""
