"""Start clones of a running instance, as it is in this moment, or of an artifact's RAM snapshot: all of them, or none.

The instance goes on. Each clone is an instance of its own, with a disk, a network and a console of its own; their IDs are printed.
"""

from __future__ import annotations

import argparse
import contextlib

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

_MOST = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("what", metavar="INSTANCE|REF", help="a running instance, or an artifact with a RAM snapshot")
    parser.add_argument("-n", "--count", metavar="N", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--name", metavar="NAME", help="what they are called; several are NAME-1, NAME-2, ...")
    parser.add_argument(
        "-p",
        "--publish",
        metavar="GUEST[/udp]",
        action="append",
        default=[],
        help="forward a port of the host, another one for each, to this one of the guest; may be repeated",
    )
    parser.add_argument("-t", "--tag", metavar="NAME[:TAG]", help="a name for the snapshot of the instance")
    parser.add_argument("--rm", action="store_true", help="remove each when it has ended")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.runtime import ports
    from ovms.runtime.fork import fork
    from ovms.runtime.runtime import RunOptions
    from ovms.spec.choices import RestorePolicy

    if not 1 <= args.count <= _MOST:
        raise UsageError(f"{args.count} clones are out of range", hint=f"1 to {_MOST}")
    forwards = tuple(ports.parse(text) for text in args.publish)
    if args.count > 1 and any(port.host_port for port in forwards):
        raise UsageError(
            "several clones can't have the same port of the host", hint="'-p GUEST' gives each one of its own"
        )
    options = RunOptions(name=args.name, ports=forwards, remove_on_exit=args.rm, restore=RestorePolicy.REQUIRE)
    # without a server, nothing takes the snapshot away before a clone needs it
    held = contextlib.nullcontext() if context.has_server else context.layout.using()
    with held:
        clones = fork(context.client, args.what, args.count, options, args.tag, context.progress)
    if args.json:
        output.answer_json({"instances": clones})
    else:
        for clone in clones:
            output.answer(clone["instance_id"])
    return Exit.OK
