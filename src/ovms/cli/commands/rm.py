"""Remove instances, with everything that their guests wrote."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instances", metavar="INSTANCE", nargs="+", help="a name, an ID, or the first digits of one")
    parser.add_argument("-f", "--force", action="store_true", help="end those that still run")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    client = context.client
    found = [client.instance(text) for text in args.instances]
    for one in found:
        client.remove(one["instance_id"], force=args.force)
        if not args.json:
            output.answer(one["name"])
    if args.json:
        output.answer_json({"removed": [one["name"] for one in found]})
    return Exit.OK
