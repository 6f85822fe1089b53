"""Chunks of a RAM snapshot that other snapshots in the store have: they are copied, and not fetched again.

The index of the wanted blob tells the digest of each chunk's *pages*; how they are compressed is each writer's own matter. A
chunk of ours is taken where codec, stored size and digest are the same, and whether its bytes are the same is known when
all of the blob is together: it has its digest, or it is fetched plainly. Nobody has to be believed: not the registry's
index, and not that of the snapshot that is copied from.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import OvmsError
from ovms.lazy import dataclass
from ovms.oci import ranges
from ovms.oci.layout import Layout
from ovms.spec import limits, ramsnap
from ovms.spec.digest import Digest, hex_of

#: What has to be saved at least, in bytes and as a part of the blob: each range costs a round trip.
SAVED_MIN: Final = 1 * limits.MIB
SAVED_SHARE: Final = 0.25
#: Fewer bytes between two ranges are fetched with them: a request costs more.
GAP: Final = 128 * limits.KIB
#: Snapshots that are searched for chunks, the newest first: the index of a large one takes a tenth of a second to read.
SEARCHED_MAX: Final = 16


@dataclass(frozen=True)
class Piece:
    """*size* bytes of the blob from *offset* on: of another blob (*source*, *at*) here, or to be fetched (None)."""

    offset: int
    size: int
    source: Digest | None = None
    at: int = 0


@dataclass(frozen=True)
class Plan:
    """A blob in pieces, in order: its control part, which is at hand, and what follows."""

    control: bytes
    pieces: tuple[Piece, ...]

    @property
    def reused(self) -> int:
        """The bytes that are here."""
        return sum(piece.size for piece in self.pieces if piece.source is not None)

    def rest(self, start: int) -> list[Piece]:
        """The pieces from *start* on, which lies behind the control part; those to be fetched of :data:`ranges.SEGMENT` at most."""
        answer: list[Piece] = []
        for piece in self.pieces:
            skip = max(0, start - piece.offset)
            step = ranges.SEGMENT if piece.source is None else max(1, piece.size)
            answer += [
                Piece(piece.offset + done, min(step, piece.size - done), piece.source, piece.at + done)
                for done in range(skip, piece.size, step)
            ]
        return answer


def others(layout: Layout, digest: Digest) -> list[Path]:
    """The RAM snapshots in the store but *digest*, the newest first, and no more than are worth a search."""
    found: list[tuple[float, Path]] = []
    with os.scandir(layout.blob_dir) as entries:
        for entry in entries:
            if entry.name != hex_of(digest) and entry.is_file(follow_symlinks=False):
                info = entry.stat(follow_symlinks=False)
                if info.st_size >= SAVED_MIN and _is_ram(entry.path):
                    found.append((info.st_mtime, Path(entry.path)))
    return [path for _, path in sorted(found, reverse=True)[:SEARCHED_MAX]]


def _is_ram(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.pread(fd, len(ramsnap.MAGIC), 0) == ramsnap.MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)


def plan(control: bytes, candidates: Sequence[Path]) -> Plan | None:
    """How the blob with this control part is put together with chunks of *candidates*; None where that saves too little.

    Raises:
        SnapshotInvalid, JsonInvalid: the control part is none.
    """
    parsed = ramsnap.parse_control(control)
    if parsed.header.encryption is not None:
        return None  # each blob has a key of its own: no other has equal chunks
    wanted: dict[tuple[bytes, int, int], tuple[Digest, int] | None] = {
        _key(chunk): None for chunk in parsed.chunks if chunk.stored_size
    }
    missing = len(wanted)
    for path in candidates:
        if not missing:
            break
        for key, at in _chunks(path):
            if key in wanted and wanted[key] is None:
                wanted[key] = (Digest(f"sha256:{path.name}"), at)
                missing -= 1
    start = parsed.prefix.data_offset
    pieces = [
        Piece(start + chunk.offset, chunk.stored_size, *(wanted[_key(chunk)] or ()))
        for chunk in parsed.chunks
        if chunk.stored_size
    ]
    answer = Plan(control, tuple(_merged(_without_small(_merged(pieces)))))
    if answer.reused < max(SAVED_MIN, SAVED_SHARE * parsed.prefix.blob_size):
        return None
    return answer


def _key(chunk: ramsnap.Chunk) -> tuple[bytes, int, int]:
    return chunk.digest, chunk.codec, chunk.stored_size


def _chunks(path: Path) -> Iterator[tuple[tuple[bytes, int, int], int]]:
    # The chunks of a snapshot here, and where they are in its file. One that is damaged has none.
    with contextlib.suppress(OvmsError, OSError), fsutil.open_input(path, "a RAM snapshot") as file:
        fd = file.fileno()
        prefix = ramsnap.parse_prefix(os.pread(fd, ramsnap.PREFIX_SIZE, 0))
        if prefix.blob_size == os.fstat(fd).st_size:
            parsed = ramsnap.parse_control(os.pread(fd, prefix.data_offset, 0))
            for chunk in parsed.chunks:
                if chunk.stored_size:
                    yield _key(chunk), prefix.data_offset + chunk.offset


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    # neighbours that are fetched, or that are neighbours in the same file, too
    answer: list[Piece] = []
    for piece in pieces:
        last = answer[-1] if answer else None
        if (
            last is not None
            and last.source == piece.source
            and (piece.source is None or last.at + last.size == piece.at)
        ):
            answer[-1] = Piece(last.offset, last.size + piece.size, last.source, last.at)
        else:
            answer.append(piece)
    return answer


def _without_small(pieces: Sequence[Piece]) -> list[Piece]:
    # Runs of what is here that are too short to be worth two requests are fetched, unless they are at an end.
    answer: list[Piece] = []
    runs = [list(run) for _, run in itertools.groupby(pieces, key=lambda piece: piece.source is None)]
    for number, run in enumerate(runs):
        size = sum(piece.size for piece in run)
        inside = 0 < number < len(runs) - 1
        if run[0].source is not None and inside and size < GAP:
            answer.append(Piece(run[0].offset, size))
        else:
            answer.extend(run)
    return answer
