"""Snapshot a running instance: memory, devices and disk, as an artifact that 'ovm run' restores.

The instance goes on, unless it is to be paused or stopped. With a name that has a registry in it, the artifact is pushed. A snapshot of an instance that was itself
restored from one is a diff on that: it holds the pages that were written since, and its artifact the blobs of the others, too.

'ovm snapshot flatten REF' makes an artifact with the whole memory in one blob of what is a chain of diffs. (With one word after
'snapshot' it is an instance, also if that is called "flatten".)
"""

from __future__ import annotations

import argparse
from typing import Final

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

#: Options may stand between the words.
INTERMIXED: Final = True

_FLATTEN: Final = "flatten"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.usage = (
        "ovm snapshot [-h] [--json] INSTANCE [-t NAME[:TAG]] [--pause|--stop] [--scrub] [--encrypt RECIPIENT|@FILE]... [--no-push] [--tls-verify true|false]\n"
        "       ovm snapshot flatten REF [-t NAME[:TAG]] [--no-push] [--tls-verify true|false]"
    )
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("reference", metavar="flatten REF", nargs="?", help="an artifact with a RAM snapshot")
    parser.add_argument(
        "-t", "--tag", metavar="NAME[:TAG]", help="the name of the new artifact; without one it has its digest alone"
    )
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
    parser.add_argument(
        "--encrypt",
        metavar="RECIPIENT|@FILE",
        action="append",
        default=[],
        help="encrypt memory and device state (not the disk) for an age recipient, or those of a file: they alone can restore it;"
        " may be repeated",
    )
    parser.add_argument("--no-push", action="store_true", help="keep it in the local store only")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.reference is None:
        return _take(args, context)
    if args.instance != _FLATTEN:
        raise UsageError(
            f"there is one word too many: {args.reference[:80]!a}",
            hint="'ovm snapshot INSTANCE -t NAME', or 'ovm snapshot flatten REF'",
        )
    if args.leave != "running" or args.scrub or args.encrypt:
        raise UsageError(
            "--pause, --stop, --scrub and --encrypt are for instances",
            hint="'ovm snapshot flatten REF' has none of them",
        )
    return _flatten(args, context)


def _take(args: argparse.Namespace, context: Context) -> int:
    from ovms.artifact.resolve import push
    from ovms.oci.reference import Reference
    from ovms.oci.transport import new_name
    from ovms.runtime import snapshots
    from ovms.spec.choices import Leave
    from ovms.trust.age import recipients

    name = None
    if args.tag is not None:
        if (wrong := Reference.parse(args.tag)).digest is not None:
            raise UsageError(f"{wrong}: a new name has no digest", hint="leave out what follows '@'")
        name = new_name(args.tag)
    runtime = context.runtime
    with runtime.layout.using():
        taken = snapshots.take(
            runtime,
            runtime.instances.find(args.instance),
            name,
            context.progress,
            leave=Leave(args.leave),
            scrub=args.scrub,
            encrypt=recipients(args.encrypt),
        )
        if name is None:
            runtime.layout.add_nameless(taken.artifact.image.descriptor())
    if taken.reseeds is False:
        output.say(
            "the guest's kernel does not notice that it was cloned (no CONFIG_VMGENID): clones may give the same random numbers for"
            " a while"
        )
    if taken.scrubbed is not None and not taken.scrubbed.zeroed:
        output.say("the guest dropped its caches, and could not zero its free memory")
    if taken.user_data and not taken.encrypted:
        output.say("the guest was given user data: whoever has the snapshot can read what secrets are in its memory")
    pushed = name is not None and name.registry is not None and not args.no_push
    if pushed:
        push(runtime.layout, context.connect, str(name), context.progress)
    if args.json:
        output.answer_json(
            {
                **taken.to_json(),
                "name": None if name is None else str(name),
                "pushed": pushed,
                "user_data": taken.user_data,
            }
        )
    else:
        output.answer(taken.artifact.digest)
    return Exit.OK


def _flatten(args: argparse.Namespace, context: Context) -> int:
    from ovms.artifact.resolve import find, push
    from ovms.memory.flatten import flatten
    from ovms.oci.transport import new_name

    layout = context.layout
    name = None if args.tag is None else new_name(args.tag)
    with layout.using():
        flattened = flatten(layout, find(layout, args.reference), context.progress)
        descriptor = flattened.artifact.image.descriptor()
        if name is None:
            layout.add_nameless(descriptor)
        else:
            layout.set_name(str(name), descriptor)
    if flattened.parents == 0:
        output.say("its RAM snapshot is a base already")
    pushed = name is not None and name.registry is not None and not args.no_push
    if pushed:
        push(layout, context.connect, str(name), context.progress)
    if args.json:
        output.answer_json(
            {
                "snapshot_ref": flattened.artifact.digest,
                "name": None if name is None else str(name),
                "size": flattened.artifact.size,
                "ram_bytes": flattened.ram_size,
                "flattened": flattened.parents,
                "pushed": pushed,
            }
        )
    else:
        output.answer(flattened.artifact.digest)
    return Exit.OK
