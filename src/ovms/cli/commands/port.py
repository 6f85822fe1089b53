"""List the ports of the host that lead to an instance's, and change them while it runs.

Where passt makes the network (see 'ovm run --network'), a change ends the connections through forwarded ports and those
of the guest to the outside; new ones work at once.
"""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("port", metavar="GUEST[/udp]", nargs="?", help="only where this port of the guest is reached")
    parser.add_argument(
        "--add",
        metavar="[[IP:]HOST:]GUEST[/udp]",
        action="append",
        default=[],
        help="forward a port, as 'ovm run -p' does; may be repeated",
    )
    parser.add_argument(
        "--rm",
        metavar="[[IP:]HOST:]GUEST[/udp]",
        action="append",
        default=[],
        help="end a forward; without HOST, all to that port of the guest; may be repeated",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.errors import NotFound
    from ovms.runtime import forwards, ports
    from ovms.runtime.document import forward

    runtime = context.runtime
    record = runtime.instances.find(args.instance)
    add, remove = [ports.parse(text) for text in args.add], [ports.parse(text) for text in args.rm]
    if add or remove:
        record = forwards.change(runtime, record, add, remove)
    # those of an instance that is no more are free
    shown = list(record.ports) if runtime.instances.status(record).state.alive else []
    if args.port is not None:
        wanted = ports.parse(args.port)
        shown = [p for p in shown if (p.guest_port, p.protocol) == (wanted.guest_port, wanted.protocol)]
        if not shown:
            raise NotFound(
                f"{record.name} has no forward to {wanted.guest_port}/{wanted.protocol}",
                hint=f"'ovm port {record.name}' lists those that it has",
            )
    if args.json:
        output.answer_json([forward(port) for port in shown])
        return Exit.OK
    for port in shown:
        output.answer(port.host if args.port is not None else f"{port.guest_port}/{port.protocol} -> {port.host}")
    return Exit.OK
