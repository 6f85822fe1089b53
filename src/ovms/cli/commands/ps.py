"""List instances: those that run, or all of them."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-a", "--all", action="store_true", help="also those that are stopped")
    parser.add_argument("-q", "--quiet", action="store_true", help="IDs only")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.cli.view import instance, state_text

    instances = context.runtime.instances
    records = instances.records(damaged=lambda error: output.say(f"warning: {error.message}"))
    statuses = [instances.status(record) for record in records]
    shown = [s for s in reversed(statuses) if args.all or s.state.alive]
    if args.json:
        output.answer_json([instance(status) for status in shown])
    elif args.quiet:
        for status in shown:
            output.answer(status.record.id)
    else:
        output.table(
            ("INSTANCE ID", "NAME", "ARTIFACT", "CREATED", "STATUS", "PORTS"),
            (
                (
                    s.record.id[:8],
                    s.record.name,
                    s.record.reference,
                    f"{output.ago(s.record.created)} ago",
                    state_text(s),
                    ", ".join(map(str, s.record.ports)),
                )
                for s in shown
            ),
        )
    return Exit.OK
