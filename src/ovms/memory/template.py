"""The memory of a snapshot as clones map it: a memfd that nobody can write to any more.

QEMU before 8.2 opens its memory for writing even where it maps it privately, so a VMM that a guest has taken over could
write to what later clones start from. Seals deny that, whoever holds the descriptor. All clones of a snapshot share one: the
watcher of each keeps it open, and whoever starts another takes it from there. With the last clone it is gone. A VM that was
snapshot after a boot goes on from the memory of its snapshot, and so has it, too: its clones need no unpacking.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ovms import fsutil
from ovms.errors import ResourceError
from ovms.memory import sealing
from ovms.spec.digest import Digest, hex_of, is_digest, parse_digest
from ovms.vmm.model import TEMPLATE

# mman.h
_POPULATE_READ: Final = 22


class Holder(NamedTuple):
    """A process of ours (the watcher of a VM) that may have the memory of a snapshot already.

    ``inode``: of the memfd that is that memory, where its name does not say so: the one that was the VM's own, until it stood still.
    """

    pid: int
    inode: int | None = None


@contextlib.contextmanager
def opened(
    image: Callable[[], Path],
    size: int,
    digest: Digest,
    holders: Iterable[Holder],
    *,
    preload: bool = False,
    fill: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """A descriptor of the sealed memory of the snapshot *digest*, of *size* bytes; *image* unpacks it where no holder has it.

    Where it is not to be in any file, *fill* does so instead, into the empty memfd that it is given.

    A memfd is in memory once it is made; with *preload* what of it was swapped out since is read in again, and none of its holes
    is filled.

    Raises:
        ResourceError: too little memory for it.
    """
    fd = find(digest, size, holders)
    if fd is None:
        fd = _make(fill or _copying(image), digest)
    try:
        if preload:
            _read_in(fd)
        yield fd
    finally:
        os.close(fd)


def _read_in(fd: int) -> None:
    size = os.fstat(fd).st_size
    # MAP_PRIVATE: before Linux 6.7 a sealed file is not mapped shared; what is only read is the file's own all the same
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory:
        for start, end in fsutil.data_extents(fd, size):
            try:
                memory.madvise(_POPULATE_READ, start, end - start)
            except OSError:  # before Linux 5.14; a hint is a hint
                memory.madvise(mmap.MADV_WILLNEED, start, end - start)


def _name(digest: Digest) -> str:
    return f"{TEMPLATE}:{hex_of(digest)}"


def digest_of(fd: int) -> Digest | None:
    """Which snapshot's memory an open file is, as :func:`opened` gives it; None for any other file."""
    prefix, suffix = f"/memfd:{TEMPLATE}:", " (deleted)"
    name = str(Path(f"/proc/self/fd/{fd}").readlink())
    if not name.startswith(prefix) or not name.endswith(suffix):
        return None
    digest = f"sha256:{name[len(prefix) : -len(suffix)]}"
    return parse_digest(digest) if is_digest(digest) else None


def find(digest: Digest, size: int, holders: Iterable[Holder]) -> int | None:
    """A descriptor of it, from whoever has it; None where nobody has."""
    wanted = f"/memfd:{_name(digest)} (deleted)"
    for pid, inode in holders:
        try:
            entries = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue  # it has ended meanwhile
        for entry in entries:
            with contextlib.suppress(OSError):
                name = str(entry.readlink())
                own = inode is not None and name.startswith(f"/memfd:{TEMPLATE}:") and entry.stat().st_ino == inode
                if name == wanted or own:
                    fd = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
                    if sealing.is_sealed(fd) and os.fstat(fd).st_size == size:
                        return fd
                    os.close(fd)
    return None


def _copying(image: Callable[[], Path]) -> Callable[[int], None]:
    def fill(fd: int) -> None:
        with fsutil.open_input(image(), "the RAM image") as source:
            fsutil.copy_sparse(source.fileno(), fd)

    return fill


def _make(fill: Callable[[int], None], digest: Digest) -> int:
    fd = os.memfd_create(_name(digest), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fill(fd)
        sealing.seal(fd)
    except MemoryError:
        os.close(fd)
        raise ResourceError(
            "too little memory for the RAM snapshot", hint="stop other VMs, or boot it: --cold"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd
