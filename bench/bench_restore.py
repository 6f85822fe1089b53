"""Boot against restore, side by side in one run: the same bare guest, from ``start`` until it answers on its console.

The peer is the boot of the same artifact on the same machine: a ratio says something on a noisy machine, a time does not.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import guests

from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime import snapshots
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel

ROUNDS = 15
BOOT = RunOptions(memory=guests.MEMORY, accel=Accel.TCG)
RESTORE = RunOptions(accel=Accel.TCG)


def no_registry(host: str) -> RegistryClient:
    raise AssertionError(host)


def once(runtime: Runtime, found: Found, options: RunOptions) -> float:
    """Milliseconds until the guest has answered."""
    began = time.perf_counter()
    record = runtime.start(found, options).record
    console = guests.Console(runtime.instances.directory(record.id))
    if not record.restored:
        console.wait_for("READY")
    console.ping()
    took = (time.perf_counter() - began) * 1000
    runtime.remove(record, force=True)
    return took


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ovms-bench-") as scratch:
        directory = Path(scratch)
        kernel = guests.assemble(guests.SOURCE, directory / "echo.elf")
        runtime = Runtime(Root(directory / "root"))
        Builder(runtime.layout, no_registry).build(guests.write_project(directory / "project", kernel), name="echo:1")
        booted = find(runtime.layout, "echo:1")
        record = runtime.start(booted, BOOT).record
        guests.Console(runtime.instances.directory(record.id)).wait_for("READY")
        downtime = snapshots.take(runtime, record, Reference.parse("echo:warm")).downtime_ms
        runtime.remove(record, force=True)
        warm = find(runtime.layout, "echo:warm")
        once(runtime, warm, RESTORE)  # unpacks the memory
        boots, restores = [], []
        for _ in range(ROUNDS):  # in turn, so that noise falls on both
            boots.append(once(runtime, booted, BOOT))
            restores.append(once(runtime, warm, RESTORE))
    boot, restore = statistics.median(boots), statistics.median(restores)
    print(f"{'':12}{'median ms':>12}{'minimum ms':>12}")
    print(f"{'boot':12}{boot:12.1f}{min(boots):12.1f}")
    print(f"{'restore':12}{restore:12.1f}{min(restores):12.1f}")
    figures = {
        "boot_ms": round(boot, 1),
        "restore_ms": round(restore, 1),
        "restore_over_boot": round(restore / boot, 3),
        "snapshot_downtime_ms": downtime,
    }
    print(json.dumps({"bench": "restore", "figures": figures}))


if __name__ == "__main__":
    main()
