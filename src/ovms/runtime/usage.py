"""What instances take on disk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ovms.lazy import asdict, dataclass
from ovms.oci.collector import allocated
from ovms.oci.usage import Row
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record


@dataclass(frozen=True)
class InstanceUsage:
    """An instance's bytes on disk: what its guest wrote, what was logged, snapshots in the making, the rest."""

    id: str
    name: str
    alive: bool
    overlays: int
    logs: int
    memory: int
    other: int

    @property
    def size(self) -> int:
        """All of it."""
        return self.overlays + self.logs + self.memory + self.other

    def to_json(self) -> dict[str, Any]:
        """As ``ovm df --json`` lists it."""
        return {**asdict(self), "size": self.size}


def usage(instances: Instances, records: Collection[Record]) -> tuple[Row, list[InstanceUsage]]:
    """What the instances of *records* take: in all, and each. What is of no living VM goes with ``ovm rm``."""
    each = [_usage(instances, record) for record in records]
    living = [one for one in each if one.alive]
    size = sum(one.size for one in each)
    return Row("instances", len(each), len(living), size, size - sum(one.size for one in living)), each


def _usage(instances: Instances, record: Record) -> InstanceUsage:
    room = {"overlays": 0, "logs": 0, "memory": 0, "other": 0}
    directory = instances.directory(record.id)
    try:
        paths = list(directory.iterdir())
    except FileNotFoundError:  # removed meanwhile
        paths = []
    for path in paths:
        if path.name.startswith("overlay-"):
            kind = "overlays"
        elif path.suffix in (".log", ".out"):
            kind = "logs"
        else:
            kind = "memory" if path.name.startswith("capture-") else "other"
        room[kind] += allocated(path)
    return InstanceUsage(record.id, record.name, instances.status(record).state.alive, **room)
