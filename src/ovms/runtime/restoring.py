"""What a restore is made of: the device state, and how the memory comes into the memfd that its clones share.

Of an encrypted snapshot the memory is decrypted into that memfd, and is in no file (:mod:`ovms.memory.template`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ovms.artifact.model import Artifact
from ovms.artifact.parts import check_encrypted
from ovms.lazy import dataclass
from ovms.memory import chain, locking, snapshot, template
from ovms.oci.layout import Layout
from ovms.progress import Progress
from ovms.runtime.instances import Instances
from ovms.spec import ramsnap
from ovms.spec.digest import Digest
from ovms.vmm.model import Restore

if TYPE_CHECKING:
    from ovms.trust.age import Identities


@dataclass(frozen=True)
class Prepared:
    """What is restored: the snapshot's blob, its unpacked memory, its device state; and whether the memory is locked, or read in.

    ``fill`` is there where it is encrypted: it decrypts the memory into a memfd, and ``image`` would refuse.
    """

    digest: Digest
    size: int
    image: Callable[[], Path]
    fill: Callable[[int], None] | None
    state: bytes
    lock: bool
    preload: bool

    @contextlib.contextmanager
    def opened(self, instances: Instances) -> Iterator[Restore]:
        """What the VMM is given. Raises like :func:`~ovms.memory.template.opened`."""
        holders = instances.holders(self.digest)
        memory = template.opened(self.image, self.size, self.digest, holders, preload=self.preload, fill=self.fill)
        with memory as ram:
            yield Restore(ram, self.state, self.lock)


def prepare(
    layout: Layout,
    instances: Instances,
    artifact: Artifact,
    control: ramsnap.Needs,
    identities: Sequence[Path],
    progress: Progress,
) -> Prepared:
    """Checks an artifact's RAM snapshot, all of which is in the store, and unpacks it where that goes to a file.

    Raises:
        SnapshotInvalid, JsonInvalid: it is damaged, or no chain.
        BlobNotFound: an ancestor is not in the store.
        IdentityMissing: it is encrypted, and *identities* (none: those of the environment) don't decrypt it.
        DiskFull: no room.
    """
    ram = artifact.manifest.ram_snapshot
    assert ram is not None
    digest, size, compression = Digest(ram.ref), control.prefix.memory_size, ram.compression
    links = chain.check(layout, digest, control, ram.parents)
    for link in links:
        check_encrypted(link.header, artifact.blob(link.digest).media_type)

    def image() -> Path:
        return snapshot.materialise(layout, digest, progress, compression=compression)

    if not any(link.header.encryption for link in links):
        held = template.find(digest, size, instances.holders(digest))
        if held is None:
            image()  # what is wrong with it is told before anything exists
        else:
            os.close(held)
        return Prepared(digest, size, image, None, control.state, ram.mlock_required, ram.preload_hint)
    ours = identities_of(identities)

    def fill(memory: int) -> None:
        snapshot.unpack(layout, digest, memory, progress, compression=compression, decrypt=ours.cipher)

    # what may be kept from being swapped out is; whether what must be can be was asked before
    lock = ram.mlock_required or locking.why_not(size) is None
    return Prepared(digest, size, image, fill, state_of(control, ours), lock, ram.preload_hint)


def identities_of(files: Sequence[Path]) -> Identities:
    """What the *files* of identities decrypt; without one, those of this process's environment."""
    from ovms.trust.age import Identities

    return Identities(files, os.environ)


def state_of(control: ramsnap.Needs, identities: Identities) -> bytes:
    """The device state of a snapshot, decrypted where it has to be.

    Raises:
        IdentityMissing: none of *identities* decrypts it.
        SnapshotInvalid: the control part was changed.
    """
    if control.encrypted is None:
        return control.state
    return ramsnap.decrypt_state(control, identities.cipher(control.header))
