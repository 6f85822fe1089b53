"""Fetch an artifact from a registry into the local store. Every blob is checked against its digest."""

from __future__ import annotations

import argparse

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="HOST[:PORT]/NAME[:TAG][@DIGEST]")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import pull

    found = pull(context.layout, context.connect, args.reference, context.progress)
    artifact = found.artifact
    if args.json:
        output.answer_json({"name": found.name, "digest": artifact.digest, "size": artifact.size})
    else:
        output.answer(f"{found.name}@{artifact.digest}" if "@" not in found.name else found.name)
    return Exit.OK
