"""List instances: those that run or are about to be started again, or all of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

_ENDED = ("stopped", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-a", "--all", action="store_true", help="also those that are stopped")
    parser.add_argument("-q", "--quiet", action="store_true", help="IDs only")


def _goes_on(one: Mapping[str, Any]) -> bool:
    return one["state"] not in _ENDED or one.get("restarts_in_ms") is not None


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.cli.view import port_text, state_text

    shown = [one for one in reversed(context.client.instances()) if args.all or _goes_on(one)]
    if args.json:
        output.answer_json(shown)
    elif args.quiet:
        for one in shown:
            output.answer(one["instance_id"])
    else:
        output.table(
            ("INSTANCE ID", "NAME", "ARTIFACT", "CREATED", "STATUS", "PORTS"),
            (
                (
                    one["instance_id"][:8],
                    one["name"],
                    one["reference"],
                    f"{output.ago(one['created'])} ago",
                    state_text(one),
                    ", ".join(map(port_text, one["ports"])),
                )
                for one in shown
            ),
        )
    return Exit.OK
