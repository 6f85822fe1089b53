"""Whether all of an artifact is here, as far as that can be known without reading its blobs."""

from __future__ import annotations

from collections.abc import Iterable

from ovms.errors import BlobNotFound, StoreCorrupt
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.spec.digest import Digest


def lacks(layout: Layout, blobs: Iterable[Descriptor]) -> list[Digest]:
    """Those of *blobs* that are not here, or of another size."""
    return [blob.digest for blob in blobs if layout.size(blob.digest) != blob.size]


def require_whole(layout: Layout, what: str, blobs: Iterable[Descriptor]) -> None:
    """Refuses an artifact that is not whole, before it is used.

    Raises:
        BlobNotFound: one is missing.
        StoreCorrupt: one has another size than its descriptor says.
    """
    for digest in lacks(layout, blobs):
        if layout.size(digest) is None:
            hint = "pull or build it again; 'ovm fsck' tells more"
            raise BlobNotFound(f"{what} is not whole: the store has no blob {digest}", hint=hint, digest=digest)
        raise StoreCorrupt(
            f"{what} is damaged: the blob {digest} has another size than its manifest says",
            hint="'ovm fsck --repair' takes it out of the way, and tells how to get it back",
            digest=digest,
        )
