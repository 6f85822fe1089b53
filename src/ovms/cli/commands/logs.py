"""Show what an instance's serial console printed: the last 16 to 32 MiB of it.

A line's time is when its first byte came. TIME is RFC 3339 (2026-11-25T10:00:00Z; without a zone: of this host), seconds
since 1970, or how long ago: 90s, 10m, 1h30m.

On a terminal, escape sequences of the guest are left out, because they could drive it, and other control characters are
shown as a replacement; --raw lets them through. What goes to a file or a pipe is what the guest printed, byte by byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.cli.terminal import Writer
    from ovms.runtime.logs import Console, LogRecord
    from ovms.vmm.watch import Watched


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    parser.add_argument("-n", "--tail", metavar="LINES", type=values.tail, help="only the last lines (all: every one)")
    parser.add_argument("-t", "--timestamps", action="store_true", help="each line's time before it")
    parser.add_argument("--since", metavar="TIME", type=values.moment, help="only what came after this time")
    parser.add_argument("--until", metavar="TIME", type=values.moment, help="only what came up to this time")
    parser.add_argument("--raw", action="store_true", help="on a terminal: let escape sequences of the guest through")
    parser.add_argument("--vmm", action="store_true", help="what the VMM said, not the guest")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    # what the contract can't say is read from the files, beside the server
    if context.has_server and not (args.vmm or args.since is not None or args.until is not None):
        return _from_server(args, context)
    from ovms.cli.terminal import writer
    from ovms.runtime import logs

    instances = context.runtime.instances
    record = instances.find(args.instance)
    files = instances.files(record)
    write = writer(sys.stdout, raw=args.raw)
    watched = record.watched if args.follow else None
    with logs.Console(files) as console:
        if args.vmm:
            _lines(args, write, logs.said_by_vmm(files, tail=args.tail, watched=watched))
        elif args.json or args.timestamps or args.since is not None or args.until is not None:
            found = logs.records(console, since=args.since, until=args.until, tail=args.tail, watched=watched)
            _lines(args, write, found)
        else:
            _bytes(args, write, console, watched)
        if console.lost:
            output.say(f"{console.lost} bytes were overwritten by later ones before they could be shown")
    return Exit.OK


def _from_server(args: argparse.Namespace, context: Context) -> int:
    from ovms.cli.terminal import writer

    write = writer(sys.stdout, raw=args.raw)
    for record in context.client.logs(args.instance, follow=args.follow, tail=args.tail):
        if record.get("stream") != "console":
            continue
        if args.json:
            output.answer_json(record)
            continue
        before = f"{record['time']} " if args.timestamps else ""
        write(f"{before}{record['text']}\n".encode())
    write.end()
    return Exit.OK


def _lines(args: argparse.Namespace, write: Writer, records: Iterator[LogRecord]) -> None:
    from ovms.runtime.logs import timestamp

    for record in records:
        if args.json:
            output.answer_json(record.to_json())
            continue
        before = f"{timestamp(record.time)} " if args.timestamps else ""
        write(f"{before}{record.text}\n".encode())
    write.end()


def _bytes(args: argparse.Namespace, write: Writer, console: Console, watched: Watched | None) -> None:
    from ovms.runtime.logs import pieces

    at = console.first() if args.tail is None else console.tail(args.tail)
    for _, data in pieces(console, at, watched):
        write(data)
    write.end()
