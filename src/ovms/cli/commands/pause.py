"""Let instances' CPUs stand still, until 'ovm resume'. Their memory stays where it is."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instances", metavar="INSTANCE", nargs="+", help="a name, an ID, or the first digits of one")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    client = context.client
    found = [client.instance(text) for text in args.instances]
    answers = []
    for one in found:
        answers.append(client.pause(one["instance_id"]))
        if not args.json:
            output.answer(one["name"])
    if args.json:
        output.answer_json(answers)
    return Exit.OK
