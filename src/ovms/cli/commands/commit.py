"""Make an artifact of what an instance's guest wrote to its disk: the artifact's layers, and a new one on them.

The instance may run, and goes on: it stands still for a moment, and what the guest has not yet written to its disk is missing,
as after a power failure. Its memory is no part of it (that is 'ovm snapshot'), nor are volumes.
"""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument(
        "-t", "--tag", metavar="NAME[:TAG]", required=True, help="the name of the new artifact, in the local store"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci.transport import new_name
    from ovms.runtime import commit

    name = new_name(args.tag)
    runtime = context.runtime
    committed = commit.take(runtime, runtime.instances.find(args.instance), name, context.progress)
    if committed.user_data:
        output.say(
            "the guest was given user data, and cloud-init keeps it on the disk: secrets of it can be read there"
        )
    if args.json:
        output.answer_json(
            {
                "digest": committed.artifact.digest,
                "name": str(name),
                "size": committed.artifact.size,
                "new_layers": committed.layers,
                "downtime_ms": committed.downtime_ms,
                "user_data": committed.user_data,
            }
        )
    else:
        output.answer(committed.artifact.digest)
    return Exit.OK
