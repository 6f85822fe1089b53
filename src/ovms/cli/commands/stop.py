"""Power instances down: press the power button, wait, then end what still runs."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.cli.values import seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instances", metavar="INSTANCE", nargs="+", help="a name, an ID, or the first digits of one")
    parser.add_argument(
        "-t",
        "--time",
        metavar="SECONDS",
        type=seconds,
        default=30.0,
        help="how long the guest gets before it is ended (default: 30; 0 ends it at once)",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    client = context.client
    found = [client.instance(text) for text in args.instances]
    answers = []
    for one in found:
        answers.append(client.stop(one["instance_id"], args.time))
        if not args.json:
            output.answer(one["name"])
    if args.json:
        output.answer_json(answers)
    return Exit.OK
