"""RAM snapshots that were left out of the store: an artifact is whole without them, as far as booting goes (ADR 0020).

::

    store/ovms.absent/
    └── <hex>       named after a blob that was left out: its control part where the layer's annotation vouches for that, else
                    nothing. It stands before the artifact gets its name, and goes when the blob has come

So what was left out is told from what was lost: a blob that is neither here nor noted is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from ovms import fsutil
from ovms.errors import BlobNotFound, OvmsError, StoreCorrupt
from ovms.oci import control
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of, of_bytes

if TYPE_CHECKING:
    from pathlib import Path

RAM_TYPES: Final = mediatypes.RAM_SNAPSHOTS


def left_out(layout: Layout, blobs: Iterable[Descriptor]) -> list[Descriptor]:
    """Those of *blobs* that are not here because somebody wanted it so: RAM snapshots, and nothing else."""
    return [
        blob
        for blob in blobs
        if blob.media_type in RAM_TYPES and layout.size(blob.digest) is None and _path(layout, blob.digest).is_file()
    ]


def note(layout: Layout, blob: Descriptor, raw: bytes | None) -> None:
    """Notes that *blob* was left out. *raw*: its control part, where it is known; kept where the layer vouches for it.

    Raises:
        DiskFull: no room for that.
    """
    path = _path(layout, blob.digest)
    if layout.size(blob.digest) is not None:
        return
    content = b"" if raw is None or not _vouched(blob, raw) else raw
    if not content and path.exists():
        return
    layout.absent_dir.mkdir(exist_ok=True)
    try:
        fsutil.atomic_write(path, content, mode=0o444)
    except OSError as exc:
        raise (fsutil.disk_full(exc, "noting what was left out", path) or exc) from exc


def control_part(layout: Layout, blob: Descriptor) -> bytes | None:
    """The control part of a RAM snapshot that was left out, as far as it is here and *blob*'s annotation vouches for it."""
    try:
        raw = fsutil.read_input(_path(layout, blob.digest), "a control part", max_size=control.SIZE_MAX)
    except OvmsError:
        return None
    return raw if _vouched(blob, raw) else None


def forget(layout: Layout, blobs: Iterable[Descriptor]) -> None:
    """*blobs* have come, durably, or what had come was lost: they do not count as left out any more."""
    for blob in blobs:
        if blob.media_type in RAM_TYPES:
            _path(layout, blob.digest).unlink(missing_ok=True)


def require_here(layout: Layout, artifact: Digest, blobs: Iterable[Descriptor], why: str) -> None:
    """Refuses what needs RAM snapshots that were left out. *artifact* is the manifest that names *blobs*.

    Raises:
        BlobNotFound: some were, and *why* tells what needs them.
    """
    for blob in left_out(layout, blobs):
        raise missing(layout, artifact, blob.digest, why)


def missing(layout: Layout, artifact: Digest, digest: Digest, why: str, *, more: str = "") -> BlobNotFound:
    """The error for a RAM snapshot that was left out and is needed. *more*: what can be done instead."""
    return BlobNotFound(
        f"{why}: the RAM snapshot {digest} was left out when the artifact was pulled",
        hint=how_to_get(layout, artifact) + more,
        digest=digest,
    )


def how_to_get(layout: Layout, artifact: Digest) -> str:
    """What fetches the RAM snapshot of an artifact."""
    names = [str(reference) for reference in sources(layout, artifact)]
    return f"'ovm pull {names[0]}' fetches it" if names else "pull the artifact again from where it came"


def sources(layout: Layout, artifact: Digest, names: Collection[str] = ()) -> list[Reference]:
    """The names with a registry that an artifact has: *names* first, then those in the store."""
    with contextlib.suppress(StoreCorrupt):
        names = [*names, *(e.name for e in layout.entries() if e.descriptor.digest == artifact)]
    answer: list[Reference] = []
    for name in names:
        with contextlib.suppress(OvmsError):
            if (reference := Reference.parse(name)).registry is not None and reference not in answer:
                answer.append(reference)
    return answer


def _path(layout: Layout, digest: Digest) -> Path:
    return layout.absent_dir / hex_of(digest)


def _vouched(blob: Descriptor, raw: bytes) -> bool:
    return bool(raw) and blob.annotations.get(mediatypes.RAM_CONTROL_ANNOTATION) == of_bytes(raw)
