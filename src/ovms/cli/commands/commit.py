"""Make an artifact of what an instance's guest wrote to its disk: the artifact's layers, and a new one on them.

The instance may run, and goes on: it stands still for a moment. Where it runs qemu-guest-agent, its file systems are frozen then, and
whole; else what the guest has not yet written to its disk is missing, as after a power failure. Its memory is no part of it (that is
'ovm snapshot'), nor are volumes. With --squash all layers but the lowest become one; qemu-img reads both disks then, and compares them.
"""

from __future__ import annotations

import argparse

from ovms.cli import disks, output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument(
        "-t", "--tag", metavar="NAME[:TAG]", required=True, help="the name of the new artifact, in the local store"
    )
    parser.add_argument(
        "--squash", action="store_true", help="make one layer of all above the lowest, those of the artifact among them"
    )
    disks.add_freeze(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci.transport import new_name
    from ovms.runtime import commit

    name = new_name(args.tag)
    runtime = context.runtime
    committed = commit.take(
        runtime, runtime.instances.find(args.instance), name, context.progress, quiesce=args.freeze, squash=args.squash
    )
    disks.tell(asked=args.freeze, not_quiesced=committed.not_quiesced, user_data=committed.user_data)
    if args.json:
        output.answer_json(
            {
                "digest": committed.artifact.digest,
                "name": str(name),
                "size": committed.artifact.size,
                "new_layers": committed.layers,
                "downtime_ms": committed.downtime_ms,
                "user_data": committed.user_data,
                "not_frozen": committed.not_quiesced,
            }
        )
    else:
        output.answer(committed.artifact.digest)
    return Exit.OK
