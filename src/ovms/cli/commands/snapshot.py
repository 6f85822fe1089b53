"""Snapshot a running instance: memory, devices and disk, as an artifact that 'ovm run' restores.

The instance goes on, unless it is to be paused or stopped. With a name that has a registry in it, the artifact is pushed.
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
    leave = parser.add_mutually_exclusive_group()
    leave.add_argument(
        "--pause",
        dest="leave",
        action="store_const",
        const="paused",
        help="leave it paused, at the moment of the snapshot",
    )
    leave.add_argument(
        "--stop", dest="leave", action="store_const", const="stopped", help="end it at the moment of the snapshot"
    )
    parser.set_defaults(leave="running")
    parser.add_argument(
        "--scrub",
        action="store_true",
        help="before, let the guest's agent write out and drop its caches, and zero its free memory: a smaller snapshot",
    )
    parser.add_argument("--no-push", action="store_true", help="keep it in the local store only")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import push
    from ovms.oci.reference import Reference
    from ovms.oci.transport import new_name
    from ovms.runtime import snapshots
    from ovms.spec.choices import Leave

    name = Reference.parse(args.tag)
    if name.digest is not None:
        raise UsageError(f"{name}: a new name has no digest", hint="leave out what follows '@'")
    name = new_name(args.tag)
    runtime = context.runtime
    taken = snapshots.take(
        runtime,
        runtime.instances.find(args.instance),
        name,
        context.progress,
        leave=Leave(args.leave),
        scrub=args.scrub,
    )
    if taken.reseeds is False:
        output.say(
            "the guest's kernel does not notice that it was cloned (no CONFIG_VMGENID): clones may give the same random numbers for"
            " a while"
        )
    if taken.scrubbed is not None and not taken.scrubbed.zeroed:
        output.say("the guest dropped its caches, and could not zero its free memory")
    if taken.user_data:
        output.say("the guest was given user data: whoever has the snapshot can read what secrets are in its memory")
    pushed = name.registry is not None and not args.no_push
    if pushed:
        push(runtime.layout, context.connect, str(name), context.progress)
    if args.json:
        output.answer_json(
            {
                **taken.to_json(),
                "name": str(name),
                "pushed": pushed,
                "user_data": taken.user_data,
            }
        )
    else:
        output.answer(taken.artifact.digest)
    return Exit.OK
