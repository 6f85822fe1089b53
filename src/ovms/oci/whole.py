"""Whether all of an artifact is here, as far as that can be known without reading its blobs."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from ovms.errors import BlobNotFound, DigestMismatch, StoreCorrupt
from ovms.oci import absent
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import REPAIR, Layout
from ovms.oci.quarantine import set_aside
from ovms.spec.digest import Digest


def lacks(layout: Layout, blobs: Iterable[Descriptor]) -> list[Digest]:
    """Those of *blobs* that are not here, or of another size. RAM snapshots that were left out on purpose don't count."""
    wrong = [blob for blob in blobs if layout.size(blob.digest) != blob.size]
    left_out = absent.left_out(layout, wrong)
    return [blob.digest for blob in wrong if blob not in left_out]


def require_whole(layout: Layout, what: str, blobs: Iterable[Descriptor]) -> None:
    """Refuses an artifact that is not whole, before it is used. Whoever needs a RAM snapshot asks :mod:`ovms.oci.absent`, too.

    Raises:
        BlobNotFound: one is missing.
        StoreCorrupt: one has another size than its descriptor says.
    """
    for digest in lacks(layout, blobs):
        if layout.size(digest) is None:
            hint = "pull or build it again; 'ovm fsck' tells more"
            raise BlobNotFound(f"{what} is not whole: the store has no blob {digest}", hint=hint, digest=digest)
        layout.file_size(digest)
        raise StoreCorrupt(
            f"{what} is damaged: the blob {digest} has another size than its manifest says",
            hint=REPAIR,
            digest=digest,
        )


def to_fetch(layout: Layout, blobs: Iterable[Descriptor], what: object) -> list[Descriptor]:
    """Those of *blobs*, of the manifest of *what*, that are not here. One whose size shows that it is damaged is set aside.

    The caller holds the store (``layout.using()``).

    Raises:
        DigestMismatch: a blob here is sound, and it is the manifest that says another size.
    """
    return [blob for blob in blobs if not _is_here(layout, blob, what)]


def _is_here(layout: Layout, blob: Descriptor, what: object) -> bool:
    size = layout.size(blob.digest)
    return size is not None and (size == blob.size or _is_sound(layout, blob, what))


def _is_sound(layout: Layout, blob: Descriptor, what: object) -> bool:
    from ovms.oci.fsck import damage

    path = layout.path(blob.digest)
    try:
        seen = path.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISREG(seen.st_mode) and damage(layout, blob.digest) is None:
        size = layout.size(blob.digest)
        if size in (None, blob.size):  # others have worked meanwhile
            return size is not None
        raise DigestMismatch(
            f"{what}: its manifest says that {blob.digest} has {blob.size} bytes, but the content of that digest has {size}",
            hint="the manifest is wrong, and was not believed: ask its owner",
            expected=blob.size,
            got=size,
            rule="OCI-21",
        )
    # One at a time, and only what was looked at: another pull may have fetched it anew.
    with layout.index_lock(), contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), seen):
            set_aside(layout.quarantine_dir, path)
    return layout.size(blob.digest) == blob.size
