"""Snapshot a running instance: memory, devices and disk, as an artifact that 'ovm run' restores.

The instance goes on. With a name that has a registry in it, the artifact is pushed.
"""

from __future__ import annotations

import argparse

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("-t", "--tag", metavar="NAME[:TAG]", required=True, help="the name of the new artifact")
    parser.add_argument("--no-push", action="store_true", help="keep it in the local store only")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import push
    from ovms.oci.reference import Reference
    from ovms.oci.transport import new_name
    from ovms.runtime import snapshots

    name = Reference.parse(args.tag)
    if name.digest is not None:
        raise UsageError(f"{name}: a new name has no digest", hint="leave out what follows '@'")
    name = new_name(args.tag)
    runtime = context.runtime
    taken = snapshots.take(runtime, runtime.instances.find(args.instance), name, context.progress)
    if taken.user_data:
        output.say("the guest was given user data: whoever has the snapshot can read what secrets are in its memory")
    pushed = name.registry is not None and not args.no_push
    if pushed:
        push(runtime.layout, context.connect, str(name), context.progress)
    if args.json:
        output.answer_json(
            {
                "snapshot_ref": taken.artifact.digest,
                "name": str(name),
                "size": taken.artifact.size,
                "ram_bytes": taken.ram_size,
                "downtime_ms": taken.downtime_ms,
                "pushed": pushed,
                "user_data": taken.user_data,
            }
        )
    else:
        output.answer(taken.artifact.digest)
    return Exit.OK
