"""Upload an artifact to the registry that its name says. What the registry has already is not sent again."""

from __future__ import annotations

import argparse

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="HOST[:PORT]/NAME[:TAG], as 'ovm ls' shows it")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import push

    descriptor = push(context.layout, context.connect, args.reference, context.progress)
    if args.json:
        output.answer_json({"name": args.reference, "digest": descriptor.digest})
    else:
        output.answer(f"{args.reference}@{descriptor.digest}")
    return Exit.OK
