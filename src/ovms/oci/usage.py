"""What takes room in a store: on disk, as it is allocated, and how much of it a clean-up would free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ovms.lazy import asdict, dataclass
from ovms.oci import collector
from ovms.oci.collector import Needs, Options
from ovms.oci.layout import Layout
from ovms.spec.digest import Digest, hex_of


@dataclass(frozen=True)
class Row:
    """One kind of thing: how many there are and how many are in use; bytes on disk, and how many of them can go."""

    kind: str
    count: int
    active: int
    size: int
    reclaimable: int

    def to_json(self) -> dict[str, Any]:
        """As ``ovm df --json`` lists it."""
        return asdict(self)


@dataclass(frozen=True)
class ArtifactUsage:
    """An artifact's bytes on disk: those of blobs that other artifacts need, too, and those that go with it alone."""

    names: tuple[str, ...]
    digest: Digest
    shared: int
    unique: int
    blobs: int
    in_use: bool

    def to_json(self) -> dict[str, Any]:
        """As ``ovm df --json`` lists it."""
        return {**asdict(self), "names": list(self.names)}


@dataclass(frozen=True)
class Usage:
    """A store's rooms. ``unread`` are manifests that can't be read: while there are any, no blob can go."""

    rows: tuple[Row, ...]
    artifacts: tuple[ArtifactUsage, ...]
    unread: tuple[Digest, ...]


def usage(layout: Layout, needs: Needs) -> Usage:
    """What takes room now. Others may work meanwhile: then it is a good guess."""
    plan = collector.plan(layout, needs, Options(unused=True, quarantine=True))
    going = {item.path for item in plan.items}
    room = {path.name: collector.allocated(path) for path in _list(layout.blob_dir)}
    names: dict[Digest, list[str]] = {}
    for entry in layout.entries():
        names.setdefault(entry.descriptor.digest, []).append(entry.name)
    of = {digest: collector.reach(layout, [digest]) for digest in {*names, *needs.artifacts}}
    users = Counter(blob for reached in of.values() for blob in reached.digests)

    artifacts = []
    for digest, called in names.items():
        here = {blob: room[hex_of(blob)] for blob in of[digest].digests if hex_of(blob) in room}
        shared = sum(size for blob, size in here.items() if users[blob] > 1)
        in_use = bool({digest, *of[digest].images} & needs.artifacts)
        artifacts.append(
            ArtifactUsage(tuple(called), digest, shared, sum(here.values()) - shared, len(here), in_use)
        )  # fmt: skip

    reached = {hex_of(blob) for digest in names for blob in of[digest].digests} & set(room)
    others = set(room) - reached
    held = {hex_of(blob) for digest in needs.artifacts for blob in of[digest].digests}
    active = sum(artifact.in_use for artifact in artifacts)
    rows = (
        Row("artifacts", len(artifacts), active, *_sizes(layout.blob_dir, reached, room, going)),
        Row("unnamed blobs", len(others), len(others & held), *_sizes(layout.blob_dir, others, room, going)),
        _row("memories", _list(layout.derived_dir), going, needs.files),
        _row("partial downloads", [*_list(layout.partial_dir), *_list(layout.absent_dir)], going),
        _row("work in progress", [*_list(layout.staging_root), *_temporaries(layout)], going),
        _row("quarantine", _list(layout.quarantine_dir), going),
    )
    return Usage(rows, tuple(artifacts), tuple(broken.digest for broken in plan.broken))


def _sizes(directory: Path, names: Iterable[str], room: dict[str, int], going: set[Path]) -> tuple[int, int]:
    names = list(names)
    return sum(room[name] for name in names), sum(room[name] for name in names if directory / name in going)


def _row(kind: str, paths: list[Path], going: set[Path], used: frozenset[str] = frozenset()) -> Row:
    paths = [path for path in paths if path.suffix != ".lock"]
    room = {path: collector.allocated(path) for path in paths}
    reclaimable = sum(size for path, size in room.items() if path in going)
    return Row(kind, len(paths), sum(path.name in used for path in paths), sum(room.values()), reclaimable)


def _temporaries(layout: Layout) -> list[Path]:
    return [path for path in _list(layout.root) if layout.is_temporary(path.name)]


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
