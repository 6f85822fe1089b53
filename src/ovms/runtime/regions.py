"""Memory that the host and one guest share: made for a start, found again while the VM lives, written and read.

A region is a memfd without a name in any directory, of a size that is sealed: a VMM that a guest has taken over can
write to it, but not make it smaller under us. The VM's watcher holds it, so it needs no daemon, and with the VM it is gone.
It begins as zeroes, in a restore too (DEV-5).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import InputError, NotFound, ResourceError, StateConflict, VmmError
from ovms.lazy import replace
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record
from ovms.spec.document import shown
from ovms.spec.manifest import Manifest
from ovms.spec.states import Call, after
from ovms.vmm.model import Machine, Region

#: What the memfds are called; the region's place in the machine's list follows.
_NAME: Final = "ovms-region"
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_TYPE: Final = "ivshmem"
_NO_MEMORY: Final = frozenset({errno.ENOSPC, errno.ENOMEM})


def of(manifest: Manifest) -> tuple[Region, ...]:
    """The regions of a manifest, in its order. Its ``mmio_addr`` is not looked at: firmware places them (DEV-4)."""
    return tuple(Region(device.name, device.region_size) for device in manifest.devices if device.type == _TYPE)


@contextlib.contextmanager
def made(machine: Machine) -> Iterator[tuple[int, ...]]:
    """Descriptors of new regions for a VM that is started; its watcher has its own by the end of this.

    Raises:
        ResourceError: a region is larger than this host can have.
    """
    with contextlib.ExitStack() as held:
        fds = []
        for i, region in enumerate(machine.regions):
            fd = os.memfd_create(f"{_NAME}:{i}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            held.callback(os.close, fd)
            try:
                os.ftruncate(fd, region.size)
            except OSError as exc:
                raise ResourceError(
                    f"no memory for {region.name}, a region of {region.size >> 20} MiB: {exc.strerror}"
                ) from exc
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            fds.append(fd)
        yield tuple(fds)


def inject(instances: Instances, record: Record, device: str, offset: int, data: bytes) -> None:
    """Writes *data* at *offset* (bytes) of the region of *device*: all of it, or nothing where this raises.

    The guest may read while it is written: whoever needs order writes a flag after the rest, by a call of its own. A
    snapshot is never taken in between.

    Raises:
        NotFound: the instance has no such device.
        InputError: it does not fit into the region.
        StateConflict: the instance neither runs nor is paused.
        ResourceError: the host has no memory for it.
    """
    with _opened(instances, record, device, offset, len(data)) as (newest, fd):
        if not data:
            return
        try:
            os.posix_fallocate(fd, offset, len(data))  # what fails does so before a byte is written
        except OSError as exc:
            if exc.errno in _NO_MEMORY:
                raise ResourceError(f"no memory for {len(data)} bytes of {device}", hint="stop other VMs") from exc
            raise
        if not newest.injected:
            instances.save(replace(newest, injected=True))
        fsutil.pwrite_all(fd, data, offset)


def read(instances: Instances, record: Record, device: str, offset: int, count: int) -> bytes:
    """The *count* bytes at *offset* of the region of *device*, as the guest or the host left them.

    Raises:
        NotFound, InputError, StateConflict: as :func:`inject`.
    """
    with _opened(instances, record, device, offset, count) as (_, fd):
        data = bytearray()
        while len(data) < count:
            data += os.pread(fd, count - len(data), offset + len(data))
        return bytes(data)


@contextlib.contextmanager
def _opened(instances: Instances, record: Record, device: str, offset: int, count: int) -> Iterator[tuple[Record, int]]:
    with instances.locked(record) as newest:
        number = _place(newest, device, offset, count)
        after(instances.status(newest).state, Call.INJECT, newest.name)
        fd = _find(newest, number)
        try:
            yield newest, fd
        finally:
            os.close(fd)


def _place(record: Record, device: str, offset: int, count: int) -> int:
    regions = record.machine.regions
    number = next((i for i, region in enumerate(regions) if region.name == device), None)
    if number is None:
        names = ", ".join(region.name for region in regions)
        hint = f"it has {names}" if names else "its artifact has no devices of this type"
        raise NotFound(f"{record.name} has no ivshmem device {shown(device)}", hint=hint, rule="RUN-15")
    size = regions[number].size
    if offset < 0 or count < 0 or offset + count > size:
        raise InputError(
            f"{count} bytes at offset {offset} do not lie within the {size} bytes of {device}", rule="RUN-15"
        )
    return number


def _find(record: Record, number: int) -> int:
    # in the watcher, which no guest gets at, and not in the VMM
    assert record.watcher is not None
    wanted = f"/memfd:{_NAME}:{number} (deleted)"
    try:
        for entry in Path(f"/proc/{record.watcher.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(entry.readlink()) == wanted:
                    fd = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
                    if os.fstat(fd).st_size == record.machine.regions[number].size:
                        return fd
                    os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        raise StateConflict(f"the instance {record.name} has just ended", instance=record.name) from None
    except OSError as exc:
        raise VmmError(f"the shared memory of {record.name} cannot be opened: {exc.strerror}") from exc
    raise VmmError(f"the watcher of {record.name} has no shared memory {number}")
