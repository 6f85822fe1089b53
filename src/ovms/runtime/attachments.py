"""What a VM gets beside its artifact's disk, from the options of a start to what the VMM is told.

Neither volumes nor what is on the seed disk belong to an artifact. What that means for RAM snapshots is decided here (ADR 0014): a
snapshot of a VM with volumes is refused; one of a VM with a seed disk says that there is one, and the restored VM gets an empty
one of the same size, for what cloud-init was told is in the guest already.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ovms.errors import SnapshotIncompatible, Unsupported
from ovms.lazy import replace
from ovms.runtime import volumes as files
from ovms.runtime.record import Record
from ovms.runtime.volumes import Volume
from ovms.spec.manifest import DiskFormat
from ovms.vmm.extras import BY_VIRTIOFS, ExtraDisk, Extras
from ovms.vmm.model import Machine

if TYPE_CHECKING:
    from ovms.runtime.seeds import Seed

_SEED_NAME: Final = "seed"


def may_hold_secrets(machine: Machine, told: Seed | None) -> bool:
    """Whether the VM's guest knows user data: given now, or to the VM that it is restored from."""
    return machine.seed_size is not None or (told is not None and told.user_data is not None)


def require_none(volumes: Sequence[Volume], told: Seed | None, *, agent: bool) -> None:
    """Whether nothing is asked for that a VM of a RAM snapshot can't have. *agent*: it has a port for the guest's agent.

    Raises:
        SnapshotIncompatible: it is.
    """
    if volumes:
        wrong, option = "its machine has no volumes, and some are asked for", "--volume"
    elif told and (told.user_data is not None or told.ssh_keys):
        wrong, option = "its guest has booted, and user data is for one that boots", "--user-data and --ssh-key"
    elif told and not agent:
        wrong, option = "its machine has no port for the agent that would give its guest a host name", "--hostname"
    else:
        return
    raise SnapshotIncompatible(
        f"the RAM snapshot cannot be restored: {wrong}",
        hint=f"leave out {option}, or add --cold to boot from the disk instead",
        rule="RAM-31",
    )


def require_snapshot(record: Record) -> None:
    """Whether a RAM snapshot can be taken of an instance.

    Raises:
        Unsupported: it has what can't be part of one.
    """
    if record.volumes:
        names = ", ".join(volume.name for volume in record.volumes)
        raise Unsupported(
            f"{record.name} has volumes ({names}), which cannot be part of a RAM snapshot",
            hint="'ovm commit' makes an artifact of its own disk",
        )
    if record.workload:
        raise Unsupported(
            f"{record.name} runs a bootstrap config, whose disk a restored VM would need with the same bytes",
            hint="'ovm commit' makes an artifact of its disk",
            rule="BOOT-34",
        )
    if record.machine.seed_size is not None and record.machine.disk_size is None:
        raise Unsupported(f"{record.name} has a seed disk and no other, which cannot be part of a RAM snapshot")


@contextlib.contextmanager
def opened(volumes: Sequence[Volume], root: Path) -> Iterator[Extras]:
    """The *volumes*, open, and disks locked: once the VMM has them, the lock is its own. Raises like :mod:`.volumes`."""
    with contextlib.ExitStack() as held:
        shares = files.open_directories(volumes, root, held)
        yield Extras(None, files.open_disks(volumes, root, held), shares)


@contextlib.contextmanager
def seeded(directory: Path, record: Record, told: Seed | None) -> Iterator[tuple[Record, ExtraDisk | None]]:
    """The record of an instance with its seed disk in it, and that disk, where there is to be one.

    One that is there already, from an earlier start of the same instance, stays as it is.

    Raises:
        InputError: none can be made of what the guest is to be told.
        DiskFull: no room for it.
    """
    if not told and record.machine.seed_size is None:
        yield record, None
        return
    from ovms.runtime import seeds

    path = directory / seeds.FILE
    if path.exists():
        pass
    elif record.machine.seed_size is not None:
        seeds.write_empty(path, record.machine.seed_size)
    elif told:
        size = seeds.write(path, told, instance_id=record.id, name=record.name)
        record = replace(record, machine=replace(record.machine, seed_size=size))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield record, ExtraDisk(fd, path, DiskFormat.RAW, True, _SEED_NAME)
    finally:
        os.close(fd)


def extras(record: Record, seed: ExtraDisk | None, volumes: Extras) -> Extras:
    """All of it, for the VMM: the seed disk beside what is :func:`opened`.

    Raises:
        Unsupported: a directory is to be shared, and the jail lacks what keeps a guest inside it.
    """
    if volumes.shares and not record.jail.own_root:
        why = record.jail.missing.get("root") or record.jail.missing.get("namespaces") or "it is left out"
        raise Unsupported(
            f"{record.name}: a directory is shared only with a VM that sees nothing else of the host, and this one would: {why}",
            hint="'ovm doctor' tells what is missing",
        )
    written = next((share for share in volumes.shares if not share.read_only), None)
    if written is not None and not record.jail.seccomp:
        raise Unsupported(
            f"{record.name}: {written.path} is shared with a guest that writes to it only where seccomp keeps it from making"
            " files of set-user-ID and devices there, and seccomp is left out",
            hint="add ',ro', or leave out --security-opt seccomp=off",
            path=str(written.path),
        )
    served = next((share for share in volumes.shares if share.via == BY_VIRTIOFS), None)
    if served is not None and record.jail.user is None:
        raise Unsupported(
            f"{record.name}: {served.path} is shared by virtiofs only with a VM that has a user of its own, and this one runs as root",
            hint="leave out 'via=virtiofs', or --security-opt user=off",
            path=str(served.path),
        )
    return replace(volumes, seed=seed)
