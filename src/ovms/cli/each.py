"""Commands that do one thing to each of the instances named."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_instances(parser: argparse.ArgumentParser) -> None:
    """Adds the instances."""
    parser.add_argument("instances", metavar="INSTANCE", nargs="+", help="a name, an ID, or the first digits of one")


def do(args: argparse.Namespace, context: Context, call: Callable[[str], Mapping[str, Any]]) -> int:
    """Calls *call* with the ID of each, once all of them are found. Prints the name of each that is done."""
    answers = []
    for one in [context.client.instance(text) for text in args.instances]:
        answers.append(call(one["instance_id"]))
        if not args.json:
            output.answer(one["name"])
    if args.json:
        output.answer_json(answers)
    return Exit.OK
