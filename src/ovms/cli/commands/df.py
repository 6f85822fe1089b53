"""Show what takes room on disk, and how much of it could be freed.

Sizes are what the disk has given away: holes and zeroes cost nothing. Reclaimable is what 'ovm prune --all' would free ('ovm prune
--quarantine' of what repairs took out of the way), and of instances, what 'ovm rm' would free of those that do not run.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.oci.usage import Usage
    from ovms.runtime.usage import InstanceUsage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-v", "--verbose", action="store_true", help="also each artifact and each instance")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci import usage as stores
    from ovms.runtime import usage as runtimes

    instances = context.runtime.instances
    records = instances.records(damaged=lambda error: output.say(f"warning: {error.message}"))
    store = stores.usage(context.layout, instances.needs_of(records))
    row, each = runtimes.usage(instances, records)
    rows = [*store.rows, row]
    if args.json:
        output.answer_json(
            {
                "rows": [row.to_json() for row in rows],
                "artifacts": [artifact.to_json() for artifact in store.artifacts],
                "instances": [instance.to_json() for instance in each],
                "size": sum(row.size for row in rows),
                "reclaimable": sum(row.reclaimable for row in rows),
            }
        )
    else:
        output.table(
            ("TYPE", "TOTAL", "IN USE", "SIZE", "RECLAIMABLE"),
            (
                (r.kind, str(r.count), str(r.active), output.size(r.size), output.size(r.reclaimable))
                for r in rows
            ),
        )  # fmt: skip
        if args.verbose:
            _details(store, each)
    for digest in store.unread:
        output.say(f"the manifest {digest} cannot be read, so no blob can go; 'ovm fsck' tells more")
    return Exit.OK


def _details(store: Usage, instances: list[InstanceUsage]) -> None:
    output.answer("")
    output.table(
        ("ARTIFACT", "DIGEST", "BLOBS", "SHARED", "UNIQUE", "IN USE"),
        (
            (
                ", ".join(name or "<none>" for name in a.names),
                output.short(a.digest),
                str(a.blobs),
                output.size(a.shared),
                output.size(a.unique),
                "yes" if a.in_use else "no",
            )
            for a in store.artifacts
        ),
    )
    output.answer("")
    output.table(
        ("INSTANCE", "RUNS", "OVERLAYS", "LOGS", "MEMORY", "OTHER"),
        (
            (
                i.name,
                "yes" if i.alive else "no",
                output.size(i.overlays),
                output.size(i.logs),
                output.size(i.memory),
                output.size(i.other),
            )
            for i in instances
        ),
    )
