"""What can be done with instances: start, stop, snapshot, remove."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ovms import fsutil
from ovms.artifact.kernels import check_kernel
from ovms.artifact.model import Artifact, load
from ovms.artifact.ram import Gate, blobs_of
from ovms.artifact.resolve import Found, allow
from ovms.disk import qcow2
from ovms.disk.layers import Layer, open_chain
from ovms.errors import (
    DiskFull,
    GuestError,
    InputError,
    Interrupted,
    SnapshotIncompatible,
    StateConflict,
    Unsupported,
    UsageError,
    VmmError,
)
from ovms.lazy import dataclass, field, replace
from ovms.memory import compat, locking, snapshot, template
from ovms.oci import absent
from ovms.oci.layout import Layout
from ovms.oci.whole import require_whole
from ovms.progress import NULL, Progress
from ovms.runtime import attachments, cgroups, identity, jail, network, regions, restart, restoring, workload
from ovms.runtime import ports as port_forwards
from ovms.runtime.instances import Instances, Status
from ovms.runtime.jail import SecurityOptions
from ovms.runtime.record import Record, Restart, Still, overlay_name
from ovms.runtime.root import Root
from ovms.runtime.volumes import Volume
from ovms.spec import bootstrap, limits, ramheader, ramsnap
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.spec.manifest import DiskFormat, Manifest
from ovms.spec.states import Call, State, after
from ovms.trust.files import Policies
from ovms.trust.guard import Guard
from ovms.vmm import virtiofs, watch
from ovms.vmm.capabilities import Asked, require
from ovms.vmm.extras import Extras
from ovms.vmm.model import Machine, PortForward, Restore, VmConfig
from ovms.vmm.protocol import Vmm
from ovms.vmm.qemu.binary import Cache
from ovms.vmm.qemu.vmm import QemuVmm

if TYPE_CHECKING:
    from ovms.runtime.seeds import Seed

DEFAULT_MEMORY: Final = 512 * limits.MIB
DEFAULT_VCPUS: Final = 1
RUNTIMES: Final = ("qemu",)
#: Seconds that a guest gets to power down before it is ended.
STOP_GRACE: Final = float(limits.STOP_TIMEOUT_DEFAULT)


@dataclass(frozen=True)
class RunOptions:
    """How an instance is started; None leaves it to the snapshot, or to the default. Memory in bytes."""

    name: str | None = None
    memory: int | None = None
    vcpus: int | None = None
    ports: tuple[PortForward, ...] = ()
    accel: Accel | None = None
    restore: RestorePolicy = RestorePolicy.AUTO
    remove_on_exit: bool = False
    runtime: str = "qemu"
    security: SecurityOptions = field(default_factory=SecurityOptions)
    restart: Restart | None = None
    network: network.Wanted = field(default_factory=network.Wanted)
    volumes: tuple[Volume, ...] = ()
    seed: Seed | None = None
    parked: bool = False
    #: A restored guest goes on as the one that the snapshot was taken of: nothing is asked of its agent.
    keep_identity: bool = False
    #: Files of identities that decrypt RAM snapshots; none: those of this process's environment.
    identities: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Started:
    """A started instance; ``not_restored`` says why its RAM snapshot was left aside, where it has one."""

    record: Record
    not_restored: str | None = None


@dataclass(frozen=True)
class _Plan:
    """What a start was found to need, before anything exists of it."""

    machine: Machine
    accel_reason: str | None
    layers: tuple[Layer, ...]
    restore: restoring.Prepared | None
    not_restored: str | None
    network: network.Attachment


class Runtime:
    """The runtime over one root directory."""

    def __init__(self, root: Root, *, parked: bool = False) -> None:
        """*parked*: of instances that wait in a warm pool."""
        self.root = root
        self.layout: Layout = root.layout()
        self._vmms: dict[str, Vmm] = {}
        self.instances = Instances(root, self.vmm, parked=parked)
        #: Asked whether an artifact may be pulled, and each time before one is used.
        self.guard = Guard(self.layout, Policies.from_environment())

    def vmm(self, name: str) -> Vmm:
        """The VMM of a name.

        Raises:
            UsageError: no such runtime.
        """
        if name not in RUNTIMES:
            raise UsageError(
                f"there is no runtime {name[:40]!a}", hint=f"runtimes of this version: {', '.join(RUNTIMES)}"
            )
        if name not in self._vmms:
            self._vmms[name] = QemuVmm(self.root.cache)
        return self._vmms[name]

    # --- start -------------------------------------------------------------------------------------------------

    def start(
        self, found: Found, options: RunOptions, progress: Progress = NULL, *, pending: Record | None = None
    ) -> Started:
        """Starts an instance of an artifact in the store: restored where it can be, booted otherwise.

        With *pending* it is that one, which has an ID and a record already, and stays should this fail
        (:mod:`ovms.runtime.starting`). The caller holds the store (``layout.using()``) from when it found the artifact.

        Raises:
            Unsupported, InputError: the artifact can't be run, or not like this.
            PortInUse, NameTaken, ToolMissing, AccelUnavailable, DiskFull: the host's reasons.
            BlobNotFound, StoreCorrupt: the store does not have all of it.
            Locked: another VM has a volume.
            Untrusted: and its kinds: a policy does not allow it.
            VmmError: the VMM failed. Nothing is left of the instance then.
        """
        confined = jail.Part.CGROUPS not in options.security.off
        with cgroups.at_hand() if confined else contextlib.nullcontext():
            return self._start(found, options, progress, pending)

    def _start(self, found: Found, options: RunOptions, progress: Progress, pending: Record | None) -> Started:
        began = time.monotonic()
        vmm = self.vmm(options.runtime)
        artifact = found.artifact
        allow(self.guard, found, None, None)
        require_whole(self.layout, found.name, artifact.image.blobs)
        told = workload.seed_for(self.layout, artifact, options.seed)
        plan = self._plan(vmm, found, options, told, progress)
        hostname = None if told is None or plan.restore is None else told.hostname
        if plan.restore is not None:
            told = None  # its guest has booted: what it is told, its agent is
        ports = port_forwards.settle(options.ports) if pending is None else pending.ports

        def make(instance_id: str, name: str) -> Record:
            return Record(
                id=instance_id,
                name=name,
                created=now(),
                reference=found.name,
                digest=artifact.digest,
                vmm=vmm.name,
                vmm_version=vmm.version,
                machine=plan.machine,
                accel_reason=plan.accel_reason,
                ports=ports,
                overlays=() if plan.machine.disk_size is None else (overlay_name(0),),
                remove_on_exit=options.remove_on_exit,
                ram_image=None if plan.restore is None else snapshot.image_of(self.layout, plan.restore.digest),
                restart=options.restart,
                network=plan.network,
                jail=jail.plan(
                    instance_id,
                    plan.machine,
                    options.security,
                    cache=Cache(self.root.cache / "host.json"),
                    own_network=plan.network.kind is not network.Kind.SLIRP,
                    taken=self.instances.users(),
                    place=self.root.path,
                ),
                volumes=options.volumes,
                user_data=attachments.may_hold_secrets(plan.machine, told),
                workload=artifact.manifest.bootstrap is not None,
                memory_locked=plan.restore is not None and plan.restore.lock,
                # loaded, it stands still: should we be killed before it goes on, the next command lets it go
                pausing=plan.restore is not None,
            )

        with (
            attachments.opened(options.volumes, self.root.path) as volumes,
            self.instances.create(make, artifact.manifest.name, options.name)
            if pending is None
            else self.instances.settle(pending, make) as bare,
            contextlib.nullcontext() if plan.restore is None else plan.restore.opened(self.instances) as restore,
            attachments.seeded(self.instances.directory(bare.id), bare, told) as (seeded, seed),
        ):
            record = seeded
            if plan.restore is not None and restore is not None and template.digest_of(restore.ram) is None:
                inode = os.fstat(restore.ram).st_ino
                record = replace(seeded, still=Still(inode, artifact.digest, plan.restore.digest, artifact.encrypted))
            if record != bare:
                self.instances.save(record)  # should we be killed, whoever finds the VM knows all of its machine
            config = self._config(artifact, record, plan.layers, restore, attachments.extras(record, seed, volumes))
            config = replace(config, parked=options.parked)
            if config.overlay is not None and plan.machine.disk_size is not None:
                qcow2.create_overlay(config.overlay, plan.machine.disk_size)
            if record.memory_locked:
                cgroups.forbid_swap([procs.parent for procs in record.jail.cgroups])
            disks = {"disks": ms_since(began)}
            made = replace(record, timings={**record.timings, **disks}, not_restored=plan.not_restored)
            if pending is not None and self.instances.stop_asked(made):
                raise Interrupted(f"the start of {made.name} was broken off")
            keeps = plan.restore is None or options.keep_identity or options.parked
            become = None if keeps else _identity(made, hostname)
            return Started(self._launch(vmm, config, made, become), plan.not_restored)

    def _launch(self, vmm: Vmm, config: VmConfig, record: Record, become: identity.Wanted | None = None) -> Record:
        files = self.instances.files(record)
        try:
            began = time.monotonic()
            outside = network.connected(
                record.network, record.ports, files.directory, mac=record.machine.mac, user=record.jail.user
            )
            with outside as link, regions.made(config.machine) as shared:
                running = vmm.start(replace(config, network=link.network, regions=shared), files)
                link.settle()
            timings = {**record.timings, **running.timings}
            record = self.instances.save(
                replace(
                    record,
                    process=running.vmm,
                    watcher=running.watcher,
                    started=now(),
                    start_ms=ms_since(began),
                    timings=timings,
                    pausing=False,
                    link_down=become is not None and become.renew_link,
                )
            )
            return record if become is None else self._become(record, become)
        except BaseException:
            # An interrupt may come between the VMM's start and our note of it.
            self.instances.end_unnoted(record)
            raise

    def become(self, record: Record) -> Record:
        """Makes a clone itself that has just begun to run and was parked before (under its lock). Returns its record."""
        wanted = _identity(record, None)
        if wanted.renew_link:
            record = self.instances.save(replace(record, link_down=True))
        return self._become(record, wanted)

    def _become(self, record: Record, wanted: identity.Wanted) -> Record:
        # The guest runs already; only our answer waits for it.
        began = time.monotonic()
        with self.instances.control(record) as control:
            done = identity.become(control, self.instances.files(record), wanted, port=record.machine.agent)
        timings = {**record.timings, "identity": ms_since(began)}
        return self.instances.save(replace(record, identity=done, link_down=False, timings=timings))

    def gate(self, options: RunOptions) -> Gate:
        """What a pull for a start asks before the bulk comes: why the RAM snapshot is left aside; None: it is needed.

        It raises what :meth:`start` would raise because of the snapshot: with nothing but the control part at hand.
        """

        def ask(manifest: Manifest, read: Callable[[], ramsnap.Needs]) -> str | None:
            _require_snapshot(manifest, options)
            if manifest.ram_snapshot is None or options.restore is RestorePolicy.NEVER:
                return "it is not to be restored"
            control = read()
            vmm = self.vmm(options.runtime)
            # what the disk's size is shows in its layers, which are not here yet
            disk = control.header.device("virtio-blk") if manifest.disk_layers else None
            size = None if disk is None else disk.size
            why = _why_cold(vmm, manifest, control, options, vmm.choose_accel(options.accel).accel, size)
            if why is None and control.encrypted is not None:
                restoring.state_of(control, restoring.identities_of(options.identities))
            return why

        return ask

    def _control(self, found: Found) -> tuple[ramsnap.Needs | None, str | None]:
        # The control part of the artifact's RAM snapshot; or why that was left out, where it tells nothing by itself.
        artifact = found.artifact
        ram_blobs = blobs_of(artifact.image, artifact.manifest)
        missing = absent.left_out(self.layout, ram_blobs[-1:])
        if not missing:
            assert artifact.manifest.ram_snapshot is not None
            return snapshot.read_needs(self.layout, Digest(artifact.manifest.ram_snapshot.ref)), None
        if (raw := absent.control_part(self.layout, missing[0])) is not None:
            return ramsnap.parse_needs(raw), None
        if found.left_out is None:
            absent.require_here(self.layout, artifact.digest, missing, f"{found.name} can't be restored")
        return None, found.left_out

    def _plan(self, vmm: Vmm, found: Found, options: RunOptions, told: Seed | None, progress: Progress) -> _Plan:
        artifact = found.artifact
        require(
            vmm,
            Asked(
                artifact.manifest,
                accel=options.accel,
                memory=options.memory,
                vcpus=options.vcpus,
                network=options.network.kind and network.Attachment(options.network.kind).state,
                port_protocols=frozenset(port.protocol for port in options.ports),
                shares=frozenset(volume.via for volume in options.volumes if volume.format is None),
                volumes=sum(volume.format is not None for volume in options.volumes) + bool(told),
            ),
        )
        _check_supported(artifact)
        layers = tuple(open_chain([(self.layout.path(Digest(d.ref)), d.format) for d in artifact.manifest.disk_layers]))
        disk_size = layers[-1].virtual_size if layers else None
        if artifact.manifest.kernel is not None:
            with fsutil.open_input(self.layout.path(Digest(artifact.manifest.kernel.ref)), "the kernel") as kernel:
                check_kernel(kernel.fileno())
        choice = vmm.choose_accel(options.accel)
        reason = None if options.accel is not None else choice.reason
        ram = artifact.manifest.ram_snapshot
        not_restored: str | None = None
        _require_snapshot(artifact.manifest, options)
        if ram is not None and options.restore is not RestorePolicy.NEVER:
            control, not_restored = self._control(found)
            if control is not None:
                not_restored = _why_cold(vmm, artifact.manifest, control, options, choice.accel, disk_size)
            if control is not None and not_restored is None:
                allow(self.guard, found, None, None, ram=True)
                ram_blobs = blobs_of(artifact.image, artifact.manifest)
                absent.require_here(self.layout, artifact.digest, ram_blobs, f"{found.name} can't be restored")
                prepared = restoring.prepare(
                    self.layout, self.instances, artifact, control, options.identities, progress
                )
                return _Plan(
                    compat.machine_of(control.header),
                    reason,
                    layers,
                    prepared,
                    None,
                    network.choose(options.network, state=compat.network_of(control.header), ports=options.ports),
                )
        machine = vmm.machine(
            choice.accel,
            memory=options.memory or DEFAULT_MEMORY,
            vcpus=options.vcpus or DEFAULT_VCPUS,
            mac=_mac(os.urandom(3)),
            disk_size=disk_size,
            regions=regions.of(artifact.manifest),
        )
        connected = network.choose(options.network, state=None, ports=options.ports)
        return _Plan(machine, reason, layers, None, not_restored, connected)

    def start_again(self, record: Record) -> Record:
        """Boots an instance anew whose VM is no more, on the disk that the one before has left; its memory is lost.

        Raises:
            StateConflict: its VM lives.
            Interrupted: somebody wants it stopped.
            PortInUse, VmmError, …: as for :meth:`start`; the instance stays as it is.
        """
        with self.layout.using(), self.instances.locked(record) as newest:
            if self.instances.status(newest).state.alive:
                raise StateConflict(f"the instance {newest.name} runs already", instance=newest.name)
            if self.instances.stop_asked(newest):
                raise Interrupted(f"{newest.name} was to be stopped")
            artifact = self.artifact(newest)
            self.guard.allow(artifact.digest, newest.reference)
            layers = [(self.layout.path(Digest(d.ref)), d.format) for d in artifact.manifest.disk_layers]
            directory = self.instances.directory(newest.id)
            written = [(directory / name, DiskFormat.QCOW2) for name in newest.overlays[:-1]]
            disks = open_chain([*layers, *written])
            port_forwards.settle(newest.ports)
            count = None if newest.restart is None else replace(newest.restart, count=newest.restart.count + 1)
            # noted first: an attempt that kills us counts
            again = self.instances.save(
                replace(
                    newest,
                    ram_image=None,
                    still=None,
                    identity=None,
                    memory_locked=False,
                    restart=count,
                    stop_requested=False,
                    pausing=False,
                    paused=False,
                    fs_frozen=False,
                    oom_killed=False,
                )
            )
            cgroups.remove([procs.parent for procs in again.jail.cgroups])
            again = replace(again, jail=jail.renew(again.jail, again.id, again.machine))
            with (
                attachments.opened(again.volumes, self.root.path) as volumes,
                attachments.seeded(directory, again, None) as (_, seed),
            ):
                extras = attachments.extras(again, seed, volumes)
                return self._launch(
                    self.vmm(again.vmm), self._config(artifact, again, tuple(disks), None, extras), again
                )

    def _config(
        self, artifact: Artifact, record: Record, layers: tuple[Layer, ...], restore: Restore | None, extras: Extras
    ) -> VmConfig:
        manifest = artifact.manifest
        directory = self.instances.directory(record.id)
        return VmConfig(
            name=record.name,
            uuid=record.id,
            machine=record.machine,
            kernel=None if manifest.kernel is None else self.layout.path(Digest(manifest.kernel.ref)),
            initrd=None if manifest.initrd is None else self.layout.path(Digest(manifest.initrd.ref)),
            kernel_args="" if manifest.kernel is None else manifest.kernel.args,
            layers=layers,
            overlay=directory / record.overlays[-1] if record.overlays else None,
            restore=restore,
            jail=record.jail,
            at_end=restart.at_end(str(self.root.path), record, self.guard.policies),
            extras=extras,
        )

    # --- shared memory -----------------------------------------------------------------------------------------

    def inject(self, record: Record, device: str, offset: int, data: bytes) -> None:
        """Writes into the region of an ivshmem device: see :func:`ovms.runtime.regions.inject`."""
        regions.inject(self.instances, record, device, offset, data)

    # --- stop and remove ---------------------------------------------------------------------------------------

    def power_down(self, record: Record, *, agent: bool = False) -> Record:
        """Asks the guest to power down. What it makes of it is seen by its process's end.

        With *agent* it is the guest's agent that is asked; the button is pressed where that does not answer. A start that is
        going on is broken off instead.
        """
        if self.break_off(record):
            return record
        if agent and self._ask_agent(record):
            return self.instances.find(record.id)
        with self.instances.locked(record) as newest:
            if not self.instances.status(newest).state.alive:
                self.leave_ended(newest)
                return newest
            stopping = self._note_stop(newest)
            with contextlib.suppress(VmmError, StateConflict), self.instances.control(stopping) as control:
                control.resume()  # a paused guest sees no button
                control.power_down()
            return stopping

    def leave_ended(self, record: Record) -> None:
        """Sees to it that an instance whose VM is no more is not started again: its policy may be waiting to do that."""
        if record.restart is not None:
            self.instances.ask_to_stop(record)

    def break_off(self, record: Record) -> bool:
        """Asks whoever is starting an instance to break that off. False where nobody is."""
        if self.instances.status(record).state is not State.STARTING:
            return False
        self.instances.ask_to_stop(record)
        return True

    def _ask_agent(self, record: Record) -> bool:
        from ovms.runtime import guest

        with contextlib.suppress(GuestError, StateConflict, Unsupported):
            with self.instances.locked(record) as newest:
                if not self.instances.status(newest).state.alive:
                    self.leave_ended(newest)
                    return True
                self._note_stop(newest)
                with contextlib.suppress(VmmError, StateConflict), self.instances.control(newest) as control:
                    control.resume()
            with guest.agent_of(self.instances, newest) as agent:
                guest.shut_down(agent)
            return True
        return False

    def kill(self, record: Record) -> None:
        """Ends a VM at once. Its disks are as after a power failure."""
        self.break_off(record)
        with self.instances.locked(record) as newest:
            self.end(newest)

    def _note_stop(self, record: Record, *, going: bool = False) -> Record:
        try:
            return self.instances.save(replace(record, stop_requested=True))
        except DiskFull:
            # Room is freed by what ends. Only what would be started again must not end without a note.
            if record.restart is not None and not going:
                raise
            return record

    def end(self, record: Record, *, going: bool = False) -> None:
        """Ends the VM of an instance at once (under its lock); *going*: the instance is removed then."""
        running = record.process
        if running is None or not running.alive():
            if not going:
                self.leave_ended(record)
            return
        self._note_stop(record, going=going)
        with contextlib.suppress(VmmError, StateConflict), self.instances.control(record) as control:
            control.quit()
        if not running.wait(2.0):
            running.kill()
        if record.watcher is not None:
            watch.wait_exit(self.instances.files(record), record.watcher, 2.0)
        network.sweep(self.instances.directory(record.id))
        virtiofs.sweep(self.instances.directory(record.id))

    def stop(self, record: Record, *, grace: float = STOP_GRACE, agent: bool = False, asked: bool = False) -> Status:
        """Asks the guest to power down (as :meth:`power_down`), waits *grace* seconds, then ends it. Returns how it ended.

        *asked*: somebody has done so just now. Stopping what is stopped is no error.
        """
        if grace > 0:
            if not asked:
                record = self.power_down(record, agent=agent)
            if record.process is not None and record.process.wait(grace):
                self.instances.sweep_network(record)
                return self.instances.status(record)
        self.kill(record)
        return self.instances.status(self.instances.find(record.id))

    def remove(self, record: Record, *, force: bool = False) -> None:
        """Removes an instance, with everything that its guest wrote.

        Raises:
            StateConflict: it runs, and *force* is not given.
        """
        call = Call.REMOVE_FORCE if force else Call.REMOVE
        # looked at without the lock: a start holds it, and may hold it for long
        after(self.instances.status(record).state, call, record.name)
        self.break_off(record)
        if self.instances.remove_unresolved(record):
            return
        with self.instances.locked(record) as newest:
            state = self.instances.status(newest).state
            # A start holds the lock: one that is "starting" under it was broken off.
            if state is not State.STARTING:
                after(state, call, newest.name)
                self.end(newest, going=True)
            self.instances.remove(newest)

    def pause(self, record: Record) -> Record:
        """Lets an instance's CPUs stand still, until :meth:`resume`.

        Raises:
            StateConflict: its state does not allow that.
            VmmError: the VMM refused.
        """
        after(self.instances.status(record).state, Call.PAUSE, record.name)
        with self.instances.locked(record, finish=True) as newest:
            after(self.instances.status(newest).state, Call.PAUSE, newest.name)
            # Noted first, and asked of the VMM also where it is noted: should we be killed between, 'resume' sets it right.
            paused = self.instances.save(replace(newest, paused=True)) if not newest.paused else newest
            try:
                with self.instances.control(paused) as control:
                    control.pause()
            except BaseException:
                self.instances.save(newest)
                raise
            return paused

    def resume(self, record: Record) -> Record:
        """Lets them go on. Raises like :meth:`pause`."""
        after(self.instances.status(record).state, Call.RESUME, record.name)
        with self.instances.locked(record) as newest:
            after(self.instances.status(newest).state, Call.RESUME, newest.name)
            with self.instances.control(newest) as control:
                control.resume()
            resumed = self.instances.save(replace(newest, paused=False)) if newest.paused else newest
            return self.instances.finish(resumed)

    def artifact(self, record: Record) -> Artifact:
        """The artifact that an instance was started from."""
        if record.digest is None:
            raise StateConflict(f"the artifact of {record.name} is not known yet", instance=record.name)
        return load(self.layout, record.digest)


def _require_snapshot(manifest: Manifest, options: RunOptions) -> None:
    if manifest.ram_snapshot is None and options.restore is RestorePolicy.REQUIRE:
        raise SnapshotIncompatible(
            f"{manifest.name} has no RAM snapshot to restore",
            hint="leave out --restore=require; 'ovm snapshot' makes one of a running instance",
            rule="RAM-50",
        )


def _why_cold(
    vmm: Vmm, manifest: Manifest, control: ramsnap.Needs, options: RunOptions, accel: Accel, disk_size: int | None
) -> str | None:
    """Why the RAM snapshot of an artifact is left aside in a start that may restore it; None: it is restored.

    Raises:
        SnapshotInvalid: it is damaged, or not one of this artifact.
        SnapshotIncompatible: the caller asks for what can't be done with it; or to restore it, and nothing else.
    """
    ram, header = manifest.ram_snapshot, control.header
    assert ram is not None
    ramsnap.check_codecs(control, ram.compression)
    ramheader.check_belongs(header, manifest, disk_size)
    compat.require_shape(header, memory=options.memory, vcpus=options.vcpus)
    attachments.require_none(options.volumes, options.seed, agent=header.device("virtio-serial") is not None)
    if options.keep_identity and options.seed is not None and options.seed.hostname is not None:
        raise UsageError("a guest that keeps its identity gets no host name", hint="leave out one of the two")
    why, unlocked = compat.why_not(vmm, header, accel), None
    if why is None:
        why = network.why_not(options.network, compat.network_of(header))
    if why is None and ram.mlock_required:
        why = unlocked = locking.why_not(header.memory)
    if why is None and manifest.bootstrap is not None:
        why = "its bootstrap config was on a disk that cannot be made again with the same bytes"
    if why is not None and options.restore is RestorePolicy.REQUIRE:
        raise SnapshotIncompatible(
            f"the RAM snapshot cannot be restored: {why}",
            hint="with --restore=auto it boots from the disk instead" if unlocked is None else locking.HINT,
            rule="RAM-50",
        )
    return why


def _check_supported(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.kernel is None and not manifest.disk_layers:
        raise InputError(f"{manifest.name} has neither a kernel nor a disk to boot from", rule="BIN-3")


def _identity(record: Record, hostname: str | None) -> identity.Wanted:
    # a user network gives every VM the same address, and no other VM is in it
    shared = record.network.kind in (network.Kind.TAP, network.Kind.BRIDGE, network.Kind.NETNS)
    return identity.Wanted(
        hostname or bootstrap.host_name(record.name, record.id),
        # as systemd makes that of a VM that boots: of the machine's UUID, which is the instance's
        record.id.replace("-", ""),
        asked=hostname is not None,
        renew_link=shared,
        # the same for the instance's life, as a guest's network manager may remember it
        mac=_mac(hashlib.sha256(record.id.encode()).digest()) if shared else None,
    )


def _mac(rest: bytes) -> str:
    # 52:54:00 is what QEMU and KVM use by custom: locally administered, unicast
    return ":".join(("52", "54", "00", *(f"{byte:02x}" for byte in rest[:3])))


def ms_since(began: float) -> float:
    """Milliseconds since a moment of the monotonic clock."""
    return round((time.monotonic() - began) * 1000, 1)


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
