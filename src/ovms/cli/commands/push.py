"""Upload an artifact to the registry that its name says, or to DESTINATION. What is there already is not sent again.

DESTINATION is another name in a registry, or a place on disk: oci:DIR[:TAG], to which the artifact is added, or
oci-archive:FILE[:TAG], which is written anew. skopeo and podman read both.
"""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="HOST[:PORT]/NAME[:TAG], as 'ovm ls' shows it")
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        nargs="?",
        help="a name in a registry, oci:DIR[:TAG], or oci-archive:FILE[:TAG]",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import push

    descriptor = push(context.layout, context.connect, args.reference, context.progress, destination=args.destination)
    if args.json:
        where = {} if args.destination is None else {"destination": args.destination}
        output.answer_json({"name": args.reference, **where, "digest": descriptor.digest})
    elif args.destination is not None:
        output.answer(descriptor.digest)
    else:
        output.answer(f"{args.reference}@{descriptor.digest}")
    return Exit.OK
