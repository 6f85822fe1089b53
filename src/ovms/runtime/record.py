"""What is known about an instance: one JSON file in its directory, always whole.

::

    instances/<uuid>/
    ├── record.json             this module; replaced by rename
    ├── record.spare            room for the next one where the file system is full: stopping and removing need it
    ├── lock                    flock: whoever changes the instance, or talks to its VMM
    ├── overlay-<n>.qcow2       what the guest wrote; the one of the highest number in use takes the writes
    ├── stop                    somebody wants it ended, at the file's time at the latest; needs no lock
    ├── qmp.sock, console.sock  the VMM's control channel and the serial console
    ├── seed.img                what its cloud-init is told (ovms.runtime.seeds)
    ├── agent.sock, agent.lock  the guest's agent; flock: whoever talks to it (ovms.runtime.agent)
    ├── network.json            what runs outside the VMM for its network (ovms.runtime.network)
    └── …                       what its watcher writes (ovms.vmm.watch)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import JsonInvalid, OvmsError, StoreCorrupt
from ovms.lazy import asdict, dataclass, field, replace
from ovms.process import ProcessId
from ovms.runtime.identity import Identity
from ovms.runtime.network import Attachment, Kind
from ovms.runtime.volumes import Volume
from ovms.spec import limits, strictjson
from ovms.spec.digest import Digest, parse_digest
from ovms.vmm.jail import Jail
from ovms.vmm.model import Machine, PortForward
from ovms.vmm.watch import Watched

VERSION: Final = 2
FILE: Final = "record.json"
_SPARE: Final = "record.spare"
#: Bytes that are kept for the next record: several times what one has.
_SPARE_SIZE: Final = 16 * limits.KIB


@dataclass(frozen=True)
class Restart:
    """An instance is started again when its VM fails: *most* times at most (None: always); it was *count* times."""

    most: int | None = None
    count: int = 0

    @property
    def used_up(self) -> bool:
        """Whether it is not to be started again any more."""
        return self.most is not None and self.count >= self.most


@dataclass(frozen=True)
class StartKey:
    """The ``Idempotency-Key`` of the call that made an instance, and its body: the digests of both."""

    key: Digest
    body: Digest


@dataclass(frozen=True)
class Still:
    """A VM's memory that stands still in a snapshot of it: the VM goes on on a private copy of the memfd of this *inode*.

    Of the VM that was snapshot, and of clones that came from that memfd. ``ram`` is the RAM snapshot's blob, in ``artifact``, and
    ``encrypted`` whether it is.
    """

    inode: int
    artifact: Digest
    ram: Digest
    encrypted: bool = False


@dataclass(frozen=True)
class Record:
    """An instance. Times are RFC 3339, in UTC; ``start_ms`` is from the VMM's spawn until the guest ran.

    ``ram_image`` is what the VM was restored from (None: it was booted). ``overlays`` are file names, oldest first;
    the newest may not be in use yet when a snapshot was broken off. ``pausing`` says that a snapshot has paused the
    VM, or that it is being restored: whoever finds it so, and unlocked, lets it go on. ``watcher`` is the process that waits for ``process``;
    ``jail`` is how the latter is confined; ``network`` is how it is connected, ``ports`` what is forwarded now.
    ``user_data`` says that the guest was given some: its memory, and whatever it wrote, may hold secrets; ``injected`` that
    somebody wrote into memory that it shares, which it may have copied. ``workload`` says
    that the artifact's bootstrap config runs in it. ``warm`` says that it comes from a warm pool. ``still`` is the first snapshot
    of a VM that was booted, or what a clone of it came from.

    An instance has a record before its artifact is found: as long as it is not ``resolved``, ``machine`` is what was asked
    for, and ``digest`` None where nobody knows it yet. ``problem`` is why its start failed, as a problem document. ``paused``
    says that the user wants its CPUs to stand still; it is written before they do, and taken back after they run.
    ``timings`` are milliseconds of the phases of the start. ``identity`` is what a restored VM's guest has of its own by now; ``link_down``
    says that its network card's link was taken for a moment: whoever finds it so, and unlocked, gives it back; ``fs_frozen`` says the
    same of its guest's file systems, which are thawed (:mod:`ovms.runtime.quiesce`). ``memory_locked``
    says that the memory that it came from cannot be swapped out.
    """

    id: str
    name: str
    created: str
    reference: str
    digest: Digest | None
    vmm: str
    vmm_version: str
    machine: Machine
    accel_reason: str | None
    ports: tuple[PortForward, ...]
    overlays: tuple[str, ...]
    remove_on_exit: bool = False
    ram_image: Path | None = None
    process: ProcessId | None = None
    started: str | None = None
    start_ms: float | None = None
    stop_requested: bool = False
    pausing: bool = False
    watcher: ProcessId | None = None
    jail: Jail = field(default_factory=Jail)
    oom_killed: bool = False
    restart: Restart | None = None
    resolved: bool = True
    problem: Mapping[str, Any] | None = None
    paused: bool = False
    timings: Mapping[str, float] = field(default_factory=dict)
    not_restored: str | None = None
    start_key: StartKey | None = None
    network: Attachment = field(default_factory=lambda: Attachment(Kind.SLIRP))
    volumes: tuple[Volume, ...] = ()
    user_data: bool = False
    workload: bool = False
    identity: Identity | None = None
    link_down: bool = False
    fs_frozen: bool = False
    memory_locked: bool = False
    warm: bool = False
    injected: bool = False
    still: Still | None = None

    @property
    def half_done(self) -> bool:
        """Whether somebody is at work with its guest, or was killed at it: it has to go on then, or be thawed."""
        return self.pausing or self.link_down or self.fs_frozen

    @property
    def watched(self) -> Watched | None:
        """The VMM and its watcher."""
        if self.process is None or self.watcher is None:
            return None
        return Watched(self.process, self.watcher)

    @property
    def restored(self) -> bool:
        """Whether the VM came from a RAM snapshot."""
        return self.ram_image is not None

    def to_json(self) -> dict[str, Any]:
        """The content of the record's file."""
        return {
            "version": VERSION,
            "id": self.id,
            "name": self.name,
            "created": self.created,
            "reference": self.reference,
            "digest": self.digest,
            "vmm": {"name": self.vmm, "version": self.vmm_version},
            "machine": self.machine.to_json(),
            "accel_reason": self.accel_reason,
            "ports": [
                {"host_ip": p.host_ip, "host_port": p.host_port, "guest_port": p.guest_port, "protocol": p.protocol}
                for p in self.ports
            ],
            "network": self.network.to_json(),
            "overlays": list(self.overlays),
            "remove_on_exit": self.remove_on_exit,
            "ram_image": None if self.ram_image is None else str(self.ram_image),
            "process": None if self.process is None else asdict(self.process),
            "watcher": None if self.watcher is None else asdict(self.watcher),
            "jail": self.jail.to_json(),
            "oom_killed": self.oom_killed,
            "restart": None if self.restart is None else asdict(self.restart),
            "resolved": self.resolved,
            "problem": None if self.problem is None else dict(self.problem),
            "paused": self.paused,
            "timings": dict(self.timings),
            "not_restored": self.not_restored,
            "start_key": None if self.start_key is None else asdict(self.start_key),
            "volumes": [volume.to_json() for volume in self.volumes],
            "user_data": self.user_data,
            "workload": self.workload,
            "identity": None if self.identity is None else self.identity.to_json(),
            "link_down": self.link_down,
            "fs_frozen": self.fs_frozen,
            "memory_locked": self.memory_locked,
            "warm": self.warm,
            "injected": self.injected,
            "still": None if self.still is None else asdict(self.still),
            "started": self.started,
            "start_ms": self.start_ms,
            "stop_requested": self.stop_requested,
            "pausing": self.pausing,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Raises KeyError, TypeError, ValueError or an OvmsError on anything that :meth:`to_json` does not write."""
        if value["version"] != VERSION:
            raise ValueError(f"its version is {value['version']}, and this ovms knows {VERSION}")
        process, watcher, restart = value["process"], value["watcher"], value["restart"]
        return cls(
            id=str(value["id"]),
            name=str(value["name"]),
            created=str(value["created"]),
            reference=str(value["reference"]),
            digest=None if value["digest"] is None else parse_digest(value["digest"]),
            vmm=str(value["vmm"]["name"]),
            vmm_version=str(value["vmm"]["version"]),
            machine=Machine.from_json(value["machine"], "machine"),
            accel_reason=value["accel_reason"],
            ports=tuple(PortForward(**port) for port in value["ports"]),
            overlays=tuple(Path(str(name)).name for name in value["overlays"]),
            remove_on_exit=bool(value["remove_on_exit"]),
            ram_image=None if value["ram_image"] is None else Path(value["ram_image"]),
            process=None if process is None else ProcessId(**process),
            started=value["started"],
            start_ms=value["start_ms"],
            stop_requested=bool(value["stop_requested"]),
            pausing=bool(value["pausing"]),
            watcher=None if watcher is None else ProcessId(**watcher),
            jail=Jail.from_json(value["jail"]),
            oom_killed=bool(value["oom_killed"]),
            restart=None if restart is None else Restart(**restart),
            resolved=bool(value["resolved"]),
            problem=None if value["problem"] is None else dict(value["problem"]),
            paused=bool(value["paused"]),
            timings={str(phase): float(ms) for phase, ms in value["timings"].items()},
            not_restored=value["not_restored"],
            start_key=None if value["start_key"] is None else StartKey(**value["start_key"]),
            network=Attachment.from_json(value["network"]),
            volumes=tuple(Volume.from_json(volume) for volume in value["volumes"]),
            user_data=bool(value["user_data"]),
            workload=bool(value["workload"]),
            identity=None if value.get("identity") is None else Identity.from_json(value["identity"]),
            link_down=bool(value.get("link_down", False)),
            fs_frozen=bool(value.get("fs_frozen", False)),
            memory_locked=bool(value.get("memory_locked", False)),
            warm=bool(value.get("warm", False)),
            injected=bool(value.get("injected", False)),
            still=None
            if (still := value.get("still")) is None
            else Still(
                int(still["inode"]),
                parse_digest(still["artifact"]),
                parse_digest(still["ram"]),
                bool(still.get("encrypted", False)),
            ),
        )

    def with_overlay(self) -> Record:
        """The same with one overlay more, of a number that was never used."""
        numbers = [int(Path(name).stem.rpartition("-")[2]) for name in self.overlays]
        return replace(self, overlays=(*self.overlays, overlay_name(max(numbers, default=-1) + 1)))


def overlay_name(number: int) -> str:
    """The file name of an overlay."""
    return f"overlay-{number}.qcow2"


def save(directory: Path, record: Record, *, durable: bool = True) -> None:
    """Replaces the record of the instance in *directory*. What is not *durable* a power failure may take back.

    Raises:
        DiskFull: there is no room for it, not even what was kept.
    """
    # in one line: indented, Python writes it ten times as slowly
    data = json.dumps(record.to_json(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    spare = directory / _SPARE
    try:
        fsutil.atomic_write(directory / FILE, data, mode=0o600, durable=durable, spare=spare)
    except OSError as exc:
        raise (fsutil.disk_full(exc, f"writing the record of the instance {record.name}", directory) or exc) from exc
    if not spare.exists():
        fsutil.reserve(spare, _SPARE_SIZE)


def load(directory: Path) -> Record | None:
    """The record of the instance in *directory*; None when there is none (it is being made, or removed).

    Raises:
        StoreCorrupt: it can't be read.
    """
    path = directory / FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise _damaged(path, exc.strerror or "unreadable") from exc
    try:
        return Record.from_json(strictjson.parse(data, str(path), max_size=limits.MANIFEST_MAX))
    except JsonInvalid as exc:
        raise _damaged(path, exc.message) from exc
    except (KeyError, TypeError, ValueError, AttributeError, OvmsError) as exc:
        raise _damaged(path, f"{type(exc).__name__}: {exc}") from exc


def _damaged(path: Path, why: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"the record {path} cannot be read: {why}",
        hint=f"if the instance does not matter, remove {path.parent} (a VM that still runs is named in vmm.pid there)",
        path=str(path),
    )
