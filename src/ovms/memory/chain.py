"""Chains of RAM snapshots, a base and diffs on it: who is whose parent, and which pages come from whom.

Source: ``spec/rfc/ramsnap-v1.md``, section 9. A chain is listed base first, everywhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Final

from ovms import fsutil
from ovms.errors import BlobNotFound, JsonInvalid, SnapshotInvalid
from ovms.lazy import dataclass
from ovms.oci.layout import Layout
from ovms.spec import limits, ramheader, ramsnap
from ovms.spec.digest import Digest
from ovms.spec.ramheader import Header

#: The most ancestors that a snapshot of ours gets: with more of them it becomes a base. A reader takes RAM_PARENTS_MAX. Each
#: one costs a restore on another host an index to read, and the chain keeps pages that nobody sees any more.
PARENTS: Final = 8


@dataclass(frozen=True)
class Link:
    """A member of a chain: its blob, the header in it, and how many entries its index has."""

    digest: Digest
    header: Header
    entries: int


@dataclass(frozen=True)
class Part:
    """What is seen of a chunk: ``runs`` of (first page, pages) that no newer member has."""

    chunk: ramsnap.Chunk
    runs: tuple[tuple[int, int], ...]

    @property
    def whole(self) -> bool:
        """Whether that is all of it."""
        return self.runs == ((self.chunk.page, self.chunk.pages),)


def opened(layout: Layout, digest: Digest, child: Digest | None = None) -> BinaryIO:
    """The blob of a RAM snapshot; *child* is the diff whose parent it is, if any.

    Raises:
        BlobNotFound: it is not in the store.
    """
    if layout.size(digest) is None:
        what = "the RAM snapshot" if child is None else f"the parent of the RAM snapshot {child},"
        raise BlobNotFound(
            f"{what} {digest} is not in the store",
            hint="pull the artifact again: it holds the whole chain",
            rule="RAM-40",
        )
    return fsutil.open_input(layout.path(digest), "the RAM snapshot")


@contextlib.contextmanager
def naming(digest: Digest, child: Digest | None) -> Iterator[None]:
    """Errors within are about the snapshot *digest*: they say so where it is a *child*'s parent."""
    try:
        yield
    except (SnapshotInvalid, JsonInvalid) as exc:
        if child is not None:
            exc.message = f"in the parent {digest}: {exc.message}"
            exc.args = (exc.message,)
        raise


def read(layout: Layout, digest: Digest) -> list[Link]:
    """The chain of the snapshot *digest*, as its members name each other; every rule of a chain holds for it.

    The headers alone are looked at, and the digests that vouch for them: not the indexes.

    Raises:
        SnapshotInvalid, JsonInvalid: a member is malformed, or they are no chain (RAM-40 to RAM-42).
        BlobNotFound: one is not in the store.
    """
    links: list[Link] = []
    wanted: Digest | None = digest
    while wanted is not None:
        child = links[-1].digest if links else None
        if any(link.digest == wanted for link in links):
            raise SnapshotInvalid(f"the RAM snapshot {wanted} is its own ancestor", rule="RAM-40")
        if len(links) > limits.RAM_PARENTS_MAX:
            raise _too_long(digest)
        with opened(layout, wanted, child) as blob, naming(wanted, child):
            links.append(_read_link(blob, wanted))
        parent = links[-1].header.parent
        wanted = None if parent is None else Digest(parent)
    links.reverse()
    _check(links)
    return links


def _check(links: Sequence[Link]) -> None:
    ramheader.check_chain([(link.digest, link.header) for link in links])
    ramsnap.check_entries(link.entries for link in links)


def check(layout: Layout, digest: Digest, newest: ramsnap.Needs, parents: Sequence[str]) -> list[Link]:
    """Whether a manifest's *parents*, base first, are the ancestors of the snapshot *digest*. Returns the chain.

    Raises like :func:`read`.
    """
    if len(parents) > limits.RAM_PARENTS_MAX:
        raise _too_long(digest)
    links = []
    for parent, child in zip(parents, [*parents, digest][1:], strict=True):
        with opened(layout, Digest(parent), Digest(child)) as blob, naming(Digest(parent), Digest(child)):
            links.append(_read_link(blob, Digest(parent)))
    links.append(Link(digest, newest.header, newest.prefix.chunks))
    _check(links)
    return links


def _too_long(digest: Digest) -> SnapshotInvalid:
    return SnapshotInvalid(
        f"the RAM snapshot {digest} has more than {limits.RAM_PARENTS_MAX} ancestors",
        hint="whoever made it has to flatten it ('ovm snapshot flatten')",
        rule="RAM-41",
    )


def _read_link(blob: BinaryIO, digest: Digest) -> Link:
    fd = blob.fileno()
    prefix, header = ramsnap.parse_head(os.pread(fd, read_prefix(fd).index_end, 0))
    return Link(digest, header, prefix.chunks)


def read_prefix(fd: int) -> ramsnap.Prefix:
    """The prefix of an open blob, whose size is the one that it says.

    Raises:
        SnapshotInvalid: it is not.
    """
    prefix = ramsnap.parse_prefix(os.pread(fd, ramsnap.PREFIX_SIZE, 0))
    size = os.fstat(fd).st_size
    if prefix.blob_size != size:
        raise SnapshotInvalid(
            f"the RAM snapshot has {size} bytes, but says that it has {prefix.blob_size}", rule="RAM-1"
        )
    return prefix


def visible(indexes: Sequence[Sequence[ramsnap.Chunk]]) -> list[list[Part]]:
    """For the indexes of a chain, base first: what is seen of each one's chunks where the newest member wins (RAM-43)."""
    answer: list[list[Part]] = []
    covered: list[tuple[int, int]] = []  # (first page, page behind the last), sorted, not touching
    for chunks in reversed(indexes):
        parts = list(_uncovered(chunks, covered))
        answer.append(parts)
        if len(answer) < len(indexes):
            covered = _joined(covered, ((chunk.page, chunk.page + chunk.pages) for chunk in chunks))
    answer.reverse()
    return answer


def _uncovered(chunks: Iterable[ramsnap.Chunk], covered: Sequence[tuple[int, int]]) -> Iterator[Part]:
    i = 0
    for chunk in chunks:
        at, end = chunk.page, chunk.page + chunk.pages
        while i < len(covered) and covered[i][1] <= at:
            i += 1
        if i == len(covered) or covered[i][0] >= end:
            yield Part(chunk, ((at, chunk.pages),))
            continue
        runs = []
        j = i
        while at < end:
            first, behind = covered[j] if j < len(covered) else (end, end)
            if at < first:
                runs.append((at, min(first, end) - at))
            at = behind
            j += 1
        if runs:
            yield Part(chunk, tuple(runs))


def _joined(one: Sequence[tuple[int, int]], other: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    import heapq

    answer: list[tuple[int, int]] = []
    for first, behind in heapq.merge(one, other):
        if answer and first <= answer[-1][1]:
            answer[-1] = (answer[-1][0], max(behind, answer[-1][1]))
        else:
            answer.append((first, behind))
    return answer
