"""Give an artifact in the local store another name."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="an artifact's name or digest")
    parser.add_argument("target", metavar="TARGET", help="[HOST[:PORT]/]NAME[:TAG]")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import find
    from ovms.oci.reference import Reference
    from ovms.oci.transport import new_name
    from ovms.oci.whole import require_whole

    target = Reference.parse(args.target)
    if target.digest is not None:
        raise UsageError(f"{target}: a new name has no digest", hint="leave out what follows '@'")
    target = new_name(args.target)
    with context.layout.using():
        artifact = find(context.layout, args.source).artifact
        # What has no name may be what a clean-up that was killed has left.
        require_whole(context.layout, args.source, artifact.image.blobs)
        context.layout.set_name(str(target), artifact.image.descriptor())
    if args.json:
        output.answer_json({"name": str(target), "digest": artifact.digest})
    return Exit.OK
