"""The instances on this machine: found, locked, told apart from what is left of dead ones.

Any number of commands and servers work here at once. Whoever changes an instance, or talks to its VMM, holds the lock in
its directory; reading needs none. Nothing is believed that a killed command may have left behind: a VM lives when its
very process does, and what was half done is finished or taken back by the next who looks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import (
    GuestError,
    InputError,
    InstanceNotFound,
    Interrupted,
    Locked,
    NameTaken,
    OvmsError,
    StateConflict,
)
from ovms.lazy import dataclass, regex, replace
from ovms.memory.template import Holder
from ovms.oci.collector import Needs
from ovms.runtime import cgroups, names, network, workload
from ovms.runtime.record import FILE, Record, load, save
from ovms.runtime.root import Root
from ovms.spec import api
from ovms.spec.digest import Digest
from ovms.spec.states import State
from ovms.vmm import virtiofs, watch
from ovms.vmm.model import Ending, VmFiles
from ovms.vmm.protocol import Control, Vmm
from ovms.vmm.watch import Exit

#: Seconds to wait for another command that works on the same instance. A snapshot of a large VM takes its time.
LOCK_TIMEOUT: Final = 120.0
LOCK: Final = "lock"
#: Seconds that a watcher gets to write down how its VMM ended.
_LAST_WORDS: Final = 1.0

#: Seconds that a watcher gets to end after its VMM.
_WATCHER_END: Final = 5.0

#: Marks an instance as one to be ended.
STOP: Final = "stop"
#: Held, as a lock, by whoever waits until an instance is started again; its time is when that will be, by the clock that nobody sets.
RESTART: Final = "restart"
_ID: Final = regex(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

#: The VMM of a name.
Vmms = Callable[[str], Vmm]


@dataclass(frozen=True)
class Status:
    """An instance and what it does now; for one that is no more ``ending``, and ``exit`` where its end was seen.

    ``exit_status`` is the workload's, by the guest's own word, where it powered off. ``restarts_in``: seconds until it is started
    again, where somebody waits for that.
    """

    record: Record
    state: State
    ending: Ending | None = None
    exit: Exit | None = None
    exit_status: int | None = None
    restarts_in: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the VM ended otherwise than by its guest's or its user's will."""
        return self.state is State.ERROR

    @property
    def ran_s(self) -> float | None:
        """For how many seconds a VM ran that is no more; None where nobody saw its end."""
        if self.exit is None or self.record.started is None:
            return None
        return self.exit.time_ns / 1e9 - datetime.fromisoformat(self.record.started).timestamp()


class Instances:
    """All instances below one root; or (*parked*) those that wait in the warm pool of a server, and are nobody's yet."""

    def __init__(self, root: Root, vmms: Vmms, *, parked: bool = False) -> None:
        root.prepare()
        self.root = root
        #: Where their directories are, and those of the others, which use the same store and the same host.
        self.place, self._beside = (root.parked, root.instances) if parked else (root.instances, root.parked)
        #: Held while an instance is added: no two get the same name, or run as the same user.
        self.lock_path = root.instances / ".lock"
        self._vmms = vmms
        self.lock_timeout = LOCK_TIMEOUT
        #: What was read of records, by directory: a file that is replaced whole is known by its inode and times.
        self._read: dict[str, tuple[tuple[int, int, int], Record]] = {}

    # --- looking -----------------------------------------------------------------------------------------------

    def directory(self, instance_id: str) -> Path:
        """The directory of an instance."""
        return self.place / instance_id

    def files(self, record: Record) -> VmFiles:
        """The files of an instance's VM."""
        return VmFiles(self.directory(record.id))

    def records(self, *, damaged: Callable[[OvmsError], None] | None = None) -> list[Record]:
        """Every record, oldest instance first. One that can't be read is told to *damaged*, and left out."""
        return self._records(self.place, damaged)

    def everyone(self, *, damaged: Callable[[OvmsError], None] | None = None) -> list[Record]:
        """:meth:`records`, and those of the warm pool: all that use the store, and users and memories of this host."""
        return [*self.records(damaged=damaged), *self._records(self._beside, damaged)]

    def _records(self, place: Path, damaged: Callable[[OvmsError], None] | None) -> list[Record]:
        answer = []
        for directory in _directories(place):
            try:
                record = self._load(directory)
            except OvmsError as exc:
                if damaged is not None:
                    damaged(exc)
                continue
            if record is not None:
                answer.append(record)
        return sorted(answer, key=lambda record: (record.created, record.id))

    def _load(self, directory: Path) -> Record | None:
        try:
            stamp = _stamp(f"{directory}/{FILE}")
        except OSError:
            self._read.pop(directory.name, None)
            return load(directory)
        known = self._read.get(directory.name)
        if known is not None and known[0] == stamp:
            return known[1]
        record = load(directory)
        if record is not None:  # should it have been replaced meanwhile, the stamp is of the one before: read again
            self._read[directory.name] = (stamp, record)
        return record

    def known(self, text: str) -> Record | None:
        """The instance of a whole ID whose record was read before and has not changed; None where it has to be looked for."""
        known = self._read.get(text)
        with contextlib.suppress(OSError):
            if known is not None and known[0] == _stamp(f"{self.place}/{text}/{FILE}"):
                return known[1]
        return None

    def by_id(self, text: str) -> Record | None:
        """The instance of a whole ID; None where there is none, or *text* is none."""
        return self._load(self.directory(text)) if _ID.fullmatch(text) else None

    def find(self, text: str) -> Record:
        """The instance of a name, an ID, or the first digits of one.

        Raises:
            InstanceNotFound: there is none.
            InputError: the digits fit several.
        """
        # the usual case of a program's calls: no need to read all others
        if (record := self.by_id(text)) is not None:
            return record
        records = self.records()
        exact = [r for r in records if text in (r.name, r.id, r.id.replace("-", ""))]
        fitting = exact or [r for r in records if len(text) >= 3 and r.id.startswith(text)]
        if len(fitting) > 1:
            raise InputError(f"{text!a} fits {len(fitting)} instances; give more digits of the ID")
        if not fitting:
            raise InstanceNotFound(
                f"there is no instance {text[:80]!a}", hint="'ovm ps -a' lists all of them", instance=text[:80]
            )
        return fitting[0]

    def status(self, record: Record) -> Status:
        """What an instance does now."""
        if record.process is None:
            # what is noted holds; else somebody works on it as long as they have its lock
            if record.problem is not None or record.stop_requested:
                return Status(record, State.ERROR if record.problem is not None else State.STOPPED)
            asked = self.stop_asked(record)
            if self.held(record):
                return Status(record, State.STOPPING if asked else State.STARTING)
            if (newer := self._newer(record)) is not None:
                return self.status(newer)
            return Status(record, State.STOPPED if asked else State.ERROR)
        if record.process.alive():
            return self.living(record)
        files = self.files(record)
        seen = None if record.watcher is None else watch.wait_exit(files, record.watcher, _LAST_WORDS)
        ending = self._vmms(record.vmm).ending(files)
        if ending is Ending.KILLED and seen is None and record.process.boot_id != process.boot_id():
            return Status(record, State.STOPPED, Ending.HOST_REBOOTED)
        if ending is Ending.KILLED and (record.oom_killed or cgroups.oom_killed(_groups(record))):
            ending = Ending.OUT_OF_MEMORY
        failed = ending in (Ending.KILLED, Ending.OUT_OF_MEMORY, Ending.PANICKED) and not record.stop_requested
        said = record.workload and ending is Ending.POWERED_OFF
        status = workload.exit_status(files) if said else None
        restarts_in = self._restarts_in(record) if failed and record.restart is not None else None
        return Status(record, State.ERROR if failed else State.STOPPED, ending, seen, status, restarts_in)

    def living(self, record: Record) -> Status:
        """What an instance does now whose VM lives; unlike :meth:`status` it waits for nobody."""
        if record.stop_requested or self.stop_asked(record):
            return Status(record, State.STOPPING)
        # a snapshot that goes on is no change of state (STA-2); one that was killed has left it paused
        paused = record.paused or (record.pausing and not self.held(record))
        if paused and record.pausing and (newer := self._newer(record)) is not None:
            return self.status(newer)
        return Status(record, State.PAUSED if paused else State.RUNNING)

    def _newer(self, record: Record) -> Record | None:
        # Whoever had the lock may have been done between the reading of the record and the look at the lock.
        newest = self.newest(record)
        return None if newest == record else newest

    def held(self, record: Record) -> bool:
        """Whether somebody has an instance's lock."""
        try:
            with fsutil.file_lock(self.directory(record.id) / LOCK, timeout=0):
                return False
        except Locked:
            return True
        except FileNotFoundError:
            return False

    def needs(self) -> Needs:
        """What instances need of the store: their artifacts, and the memories that living VMs have mapped.

        Raises:
            StoreCorrupt: a record can't be read: then nobody knows what its instance needs.
        """

        def refuse(error: OvmsError) -> None:
            raise error

        return self.needs_of(self.everyone(damaged=refuse))

    def needs_of(self, records: Collection[Record]) -> Needs:
        """What the instances of *records* need of the store."""
        images = {
            record.ram_image.name
            for record in records
            if record.ram_image is not None and (record.process is None or record.process.alive())
        }
        return Needs(frozenset(record.digest for record in records if record.digest is not None), frozenset(images))

    def holders(self, ram: Digest) -> list[Holder]:
        """Who may hold the memory of the RAM snapshot *ram*: the watchers of its clones, and of the VM that it was taken of."""
        found = []
        for record in self.everyone():
            if record.watcher is not None:
                still = record.still is not None and record.still.ram == ram
                if still or record.restored:
                    inode = record.still.inode if still and record.still is not None else None
                    found.append(Holder(record.watcher.pid, inode))
        return found

    def users(self) -> set[int]:
        """The users that VMs of instances run as, or ran."""
        return {record.jail.user.uid for record in self.everyone() if record.jail.user is not None}

    # --- changing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, record: Record, *, timeout: float | None = None, finish: bool = False) -> Iterator[Record]:
        """Holds an instance's lock, and gives its newest record.

        With *finish* what is half done with its guest is finished first (:meth:`finish`): who had the lock before may have been
        killed while we waited for it, and what is noted of the guest now would be taken for the user's will.

        Raises:
            Locked: another command has it.
            InstanceNotFound: it was removed meanwhile.
            VmmError: it cannot be finished.
        """
        directory = self.directory(record.id)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(
                    fsutil.file_lock(directory / LOCK, timeout=self.lock_timeout if timeout is None else timeout)
                )
            except FileNotFoundError:
                raise self._gone(record) from None
            newest = load(directory)
            if newest is None:
                raise self._gone(record)
            yield self.finish(newest) if finish else newest

    def _gone(self, record: Record) -> InstanceNotFound:
        return InstanceNotFound(f"the instance {record.name} was removed meanwhile", instance=record.name)

    def save(self, record: Record) -> Record:
        """Writes a record (under its lock). Returns it."""
        save(self.directory(record.id), record)
        return record

    @contextlib.contextmanager
    def create(self, make: Callable[[str, str], Record], artifact: str, name: str | None) -> Iterator[Record]:
        """Makes an instance's directory and first record, and holds its lock; takes all back on an error.

        Args:
            make: from the new ID and name to the record.
            artifact: what the name is made from when none is given.
            name: the name that the user gave.

        Raises:
            NameTaken: another instance has it.
        """
        record, lock = self.add(make, artifact, name)
        assert lock is not None
        with lock:
            try:
                yield record
            except BaseException:
                # Ctrl-C comes at any moment, also twice: what is removed has no VM any more. Should one come here, it has.
                self.end_unnoted(record)
                self.remove(record)
                raise

    def end_unnoted(self, record: Record) -> None:
        """Ends the VM of a start that failed, or was interrupted, before anybody noted it (under its lock)."""
        if (left := watch.find(self.files(record))) is not None:
            left.vmm.kill()
            left.watcher.wait(_WATCHER_END)

    def add(
        self,
        make: Callable[[str, str], Record],
        artifact: str,
        name: str | None,
        *,
        known: Callable[[Record], bool] | None = None,
    ) -> tuple[Record, contextlib.ExitStack | None]:
        """As :meth:`create`, for a start that others go on with: its lock is the caller's to close.

        Where *known* knows an instance already, that is returned, and no lock.
        """
        instance_id = _new_id()
        directory = self.directory(instance_id)
        with contextlib.ExitStack() as lock:
            with fsutil.file_lock(self.lock_path):
                taken = {r.name: r for r in self.records()}
                if known is not None and (there := next(filter(known, taken.values()), None)) is not None:
                    return there, None
                if name is not None and names.check(name) in taken:
                    raise NameTaken(
                        f"the name {name} is taken by the instance {taken[name].id}",
                        hint=f"choose another, or remove that one: 'ovm rm {name}'",
                        instance=taken[name].id,
                    )
                record = make(instance_id, name or names.make(artifact, instance_id, taken))
                directory.mkdir(mode=0o700)
                lock.enter_context(fsutil.file_lock(directory / LOCK))
                try:
                    # until there is a VM, a power failure may have it all
                    save(directory, record, durable=False)
                except BaseException:
                    fsutil.remove_tree(directory)
                    raise
            return record, lock.pop_all()

    @contextlib.contextmanager
    def settle(self, pending: Record, make: Callable[[str, str], Record]) -> Iterator[Record]:
        """Gives an instance that was added before its artifact was known (under its lock) its whole record."""
        with fsutil.file_lock(self.lock_path):
            if load(self.directory(pending.id)) is None:
                raise self._gone(pending)
            record = make(pending.id, pending.name)
            record = replace(
                record,
                created=pending.created,
                # what came from a place on disk may have no name
                reference=pending.reference if record.reference == record.digest else record.reference,
                timings=pending.timings,
                start_key=pending.start_key,
                ports=pending.ports,
            )
            save(self.directory(record.id), record, durable=False)
        yield record

    def gone(self, record: Record) -> bool:
        """Whether an instance was removed meanwhile; cheaper than :meth:`newest`."""
        return not (self.directory(record.id) / FILE).exists()

    def newest(self, record: Record) -> Record | None:
        """What the record of an instance says now (under its lock); None when it was removed."""
        return load(self.directory(record.id))

    def ask_to_stop(self, record: Record, grace: float = 0.0) -> None:
        """Marks an instance as one to be ended, *grace* seconds from now at the latest. Needs no lock.

        Whoever starts it breaks that off; a server sees to the end of a VM that runs. It is never started again.
        """
        mark = self._stop_mark(record)
        # by a clock that nobody sets; after the next boot, there is nothing to be ended
        deadline = time.monotonic() + grace
        temporary = mark.with_name(f".{mark.name}.{fsutil.unique(8)}.tmp")
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            temporary.touch(mode=0o600)
            os.utime(temporary, (deadline, deadline))
            temporary.replace(mark)

    def stop_left(self, record: Record) -> float | None:
        """How many seconds an instance still has until it is to be ended; None where nobody has marked it."""
        try:
            return os.stat(f"{self.place}/{record.id}/{STOP}").st_mtime - time.monotonic()
        except OSError:
            return None

    def stop_asked(self, record: Record) -> bool:
        """Whether an instance is marked as one to be ended."""
        return self.stop_left(record) is not None

    @contextlib.contextmanager
    def restarting(self, record: Record, seconds: float) -> Iterator[None]:
        """Says that *record* is started again in so many seconds, while the context lasts, or its process."""
        mark = self.directory(record.id) / RESTART
        with contextlib.ExitStack() as held:
            # what only tells others is in nobody's way: a full disk, or an instance that is removed just now
            with contextlib.suppress(OSError, Locked):
                held.enter_context(fsutil.file_lock(mark, timeout=0.5))  # others look at it
                at = time.monotonic() + seconds
                os.utime(mark, (at, at))
            yield

    def _restarts_in(self, record: Record) -> float | None:
        mark = self.directory(record.id) / RESTART
        try:
            at = mark.stat().st_mtime
        except OSError:
            return None
        if self.stop_asked(record):
            return None
        try:
            with fsutil.file_lock(mark, timeout=0):
                return None  # whoever waited is gone
        except Locked:
            return max(0.0, at - time.monotonic())
        except OSError:
            return None

    def _stop_mark(self, record: Record) -> Path:
        return self.directory(record.id) / STOP

    def clear(self, record: Record) -> None:
        """Removes what a start has made that failed; the instance stays (under its lock)."""
        virtiofs.sweep(self.directory(record.id))
        cgroups.remove(_groups(record))
        network.sweep(self.directory(record.id))
        for name in record.overlays:
            (self.directory(record.id) / name).unlink(missing_ok=True)

    def remove(self, record: Record) -> None:
        """Removes what is left of an instance whose VM is no more (under its lock)."""
        directory = self.directory(record.id)
        self._read.pop(record.id, None)
        network.sweep(directory)
        virtiofs.sweep(directory)
        cgroups.remove(_groups(record))
        # The record goes first: what a kill leaves from here on is no instance any more, and is swept.
        (directory / FILE).unlink(missing_ok=True)
        fsutil.remove_tree(directory)

    def remove_unresolved(self, record: Record) -> bool:
        """Removes an instance whose artifact is not found yet, without its lock: whoever starts it may wait for a registry.

        That start can't come further: :meth:`settle` finds no record. False where the artifact has been found.
        """
        with fsutil.file_lock(self.lock_path):
            newest = load(self.directory(record.id))
            if newest is None or newest.resolved:
                return False
            self.remove(newest)
            return True

    def sweep_network(self, record: Record) -> None:
        """Sees to it that nothing of the network of a VM is left that has just ended: its ports are free then."""
        with contextlib.suppress(InstanceNotFound), self.locked(record) as newest:
            if _ended(newest):
                network.sweep(self.directory(newest.id))
                virtiofs.sweep(self.directory(newest.id))

    @contextlib.contextmanager
    def control(self, record: Record) -> Iterator[Control]:
        """The control channel of an instance's living VM (under its lock)."""
        with self._connect(record) as control:
            yield control

    def _connect(self, record: Record) -> AbstractContextManager[Control]:
        if record.process is None or not record.process.alive():
            raise StateConflict(
                f"the instance {record.name} does not run", hint="'ovm ps -a' tells its state", instance=record.name
            )
        watched = record.watched
        assert watched is not None
        vmm = self._vmms(record.vmm)
        return vmm.connect(self.files(record), record.machine, watched)

    # --- recovery ----------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Finishes or takes back what killed commands left half done. Leaves alone whatever is locked."""
        cgroups.sweep({directory.name for place in (self.place, self._beside) for directory in _directories(place)})
        for directory in _directories(self.place):
            if not directory.is_dir():
                continue
            with contextlib.suppress(OvmsError, OSError):
                self._recover(directory)

    def recover_one(self, instance_id: str) -> None:
        """The same for one instance."""
        with contextlib.suppress(OvmsError, OSError):
            self._recover(self.directory(instance_id))

    def finish(self, record: Record) -> Record:
        """Lets a guest go on that whoever was killed has left standing still, gives its link back and thaws it (under its lock).

        Returns its record. A guest whose agent does not thaw stays noted, and so does one that the user has paused.

        Raises:
            VmmError: the VMM refuses.
        """
        if not record.half_done or record.process is None:
            return record
        if not record.process.alive():
            return self.save(replace(record, fs_frozen=False)) if record.fs_frozen else record
        with self.control(record) as control:
            if record.pausing:
                if not record.paused:  # by the user's will it goes on standing still
                    control.resume()
                record = self.save(replace(record, pausing=False))
            if record.link_down:
                control.set_link(True)
                record = self.save(replace(record, link_down=False))
            # one whose agent is gone has perhaps been booted anew; one that is paused cannot answer yet
            if record.fs_frozen and not record.paused and control.agent_listens():
                from ovms.runtime import quiesce

                with contextlib.suppress(GuestError, Locked):
                    quiesce.thaw(self.files(record), control, quiesce.THAW_FOUND)
                    record = self.save(replace(record, fs_frozen=False))
        return record

    def _recover(self, directory: Path) -> None:
        record = load(directory)
        if record is not None and record.process is not None and record.half_done:
            # not under the lock that every start needs: a guest's agent may keep us waiting
            with self.locked(record, timeout=0, finish=True) as newest:
                record = newest
        if record is not None and not self._needs_recovery(record):
            return
        # A directory without a record is just being made or removed: both happen under this lock.
        with (
            fsutil.file_lock(self.lock_path, timeout=0 if record is None else None),
            fsutil.file_lock(directory / LOCK, timeout=0),
        ):
            record = load(directory)
            if record is None:
                fsutil.remove_tree(directory)
                return
            if record.process is None:
                record = self.finish(self._adopt(record))
            if _ended(record):
                network.sweep(directory)
                virtiofs.sweep(directory)
            elif self._is_cut_off(record):
                self.reconnect(record)
            if _ended(record) and any(group.exists() for group in _groups(record)):
                record = self.save(replace(record, oom_killed=cgroups.oom_killed(_groups(record))))
                cgroups.remove(_groups(record))
            # a start that failed is kept: else nobody would learn why
            if record.remove_on_exit and record.process is not None and not self.status(record).state.alive:
                self.remove(record)

    def _needs_recovery(self, record: Record) -> bool:
        if record.process is None and record.problem is None and not record.stop_requested:
            return True
        if not _ended(record):
            return self._is_cut_off(record)
        left_over = network.left_over(self.directory(record.id)) or any(group.exists() for group in _groups(record))
        return record.remove_on_exit or left_over

    def _is_cut_off(self, record: Record) -> bool:
        if record.process is None or record.stop_requested:
            return False
        return network.is_broken(record.network, record.ports, self.directory(record.id))

    def reconnect(self, record: Record) -> None:
        """Makes the network of a living VM anew, with the ports of *record* (under its lock).

        Raises:
            PortInUse, HostError, VmmError: it failed; the VM has no network then, until the next try.
        """
        with self.control(record) as control:
            network.rewire(
                control, record.ports, self.directory(record.id), mac=record.machine.mac, user=record.jail.user
            )

    def _adopt(self, record: Record) -> Record:
        found = watch.find(self.files(record))
        if found is not None:
            began = datetime.fromtimestamp(found.vmm.began(), UTC).isoformat(timespec="milliseconds")
            return self.save(
                replace(record, process=found.vmm, watcher=found.watcher, started=began.replace("+00:00", "Z"))
            )
        if record.problem is not None or record.stop_requested:
            return record
        # noted, so that it is no start again when its lock is held for something else
        self.clear(record)
        if self.stop_asked(record):
            return self.save(replace(record, stop_requested=True))
        broken_off = Interrupted("the start was broken off", hint="whoever worked on it was killed: start anew")
        return self.save(replace(record, problem=api.problem(broken_off)))


def _directories(place: Path) -> list[Path]:
    try:
        return [path for path in place.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return []


def _stamp(path: str) -> tuple[int, int, int]:
    info = os.stat(path)
    return info.st_ino, info.st_mtime_ns, info.st_size


def _ended(record: Record) -> bool:
    return record.process is not None and not record.process.alive()


def _groups(record: Record) -> list[Path]:
    return [procs.parent for procs in record.jail.cgroups]


def _new_id() -> str:
    # a random UUID; Python's own module for them costs a command three milliseconds to import
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    text = data.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
