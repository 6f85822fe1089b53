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
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=30.0,
        help="how long the guest gets before it is ended (default: 30; 0 ends it at once)",
    )
    parser.add_argument(
        "--agent",
        action="store_true",
        help="ask qemu-guest-agent in the guest first; the power button is pressed where that does not answer",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.cli.view import instance

    runtime = context.runtime
    records = [runtime.instances.find(text) for text in args.instances]
    answers = []
    for record in records:
        status = runtime.stop(record, grace=args.time, agent=args.agent)
        answers.append(instance(status))
        if not args.json:
            output.answer(record.name)
    if args.json:
        output.answer_json(answers)
    return Exit.OK
