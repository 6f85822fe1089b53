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
    from ovms.runtime.document import instance as document

    client = context.client
    found = [client.instance(text) for text in args.instances]
    answers = []
    for one in found:
        if args.agent:  # the contract has no word for that
            runtime = context.runtime
            record = runtime.instances.find(one["instance_id"])
            answers.append(document(runtime.stop(record, grace=args.time, agent=True)))
        else:
            answers.append(client.stop(one["instance_id"], args.time))
        if not args.json:
            output.answer(one["name"])
    if args.json:
        output.answer_json(answers)
    return Exit.OK
