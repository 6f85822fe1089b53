"""Write an artifact of the local store into a directory: its manifest, and each part as a file named by its digest.

DIR is made, or has to be empty. 'ovm validate DIR' checks what is there, and 'ovm build DIR' makes the artifact of it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="an artifact in the local store (by name or digest)")
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to")
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact import unpacked
    from ovms.artifact.resolve import allow, find

    layout = context.layout
    directory = args.directory.absolute()
    with layout.using():
        found = find(layout, args.reference, args.platform)
        # what is built of the files is one's own: a policy has to be met before
        allow(context.guard, found, args.reference, context.connect, ram=True)
        unpacked.unpack(layout, found, directory, context.progress)
    if args.json:
        output.answer_json({"path": str(directory), "name": found.name, "digest": found.artifact.digest})
    else:
        output.answer(str(args.directory))
    return Exit.OK
