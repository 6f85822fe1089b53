"""Show what an instance's serial console printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.cli.values import count

_BLOCK = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    parser.add_argument("-n", "--tail", metavar="LINES", type=count, help="only the last lines")
    parser.add_argument("--vmm", action="store_true", help="what the VMM said, not the guest")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if context.has_server and not args.vmm:
        return _from_server(args, context)
    from ovms.cli.console import follow_log

    instances = context.runtime.instances
    record = instances.find(args.instance)
    files = instances.files(record)
    path = files.vmm_log if args.vmm else files.console_log
    if not path.exists():
        return Exit.OK  # the VM has not come so far
    start = 0 if args.tail is None else tail_offset(path, args.tail)
    buffer = _JsonLines() if args.json else None
    for data in follow_log(path, record.process if args.follow else None, start=start):
        if buffer is not None:
            buffer.feed(data)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    if buffer is not None:
        buffer.end()
    return Exit.OK


def _from_server(args: argparse.Namespace, context: Context) -> int:
    from ovms.cli import output

    for record in context.client.logs(args.instance, follow=args.follow, tail=args.tail):
        if record.get("stream") != "console":
            continue
        if args.json:
            output.answer_json({"line": record["text"]})
        else:
            sys.stdout.write(f"{record['text']}\n")
            sys.stdout.flush()
    return Exit.OK


def tail_offset(path: Path, lines: int) -> int:
    """Where the last *lines* lines of a file begin, read from its end."""
    with path.open("rb") as file:
        at = file.seek(0, 2)
        if lines == 0:
            return at
        found = 0
        first = True
        while at > 0:
            step = min(_BLOCK, at)
            at -= step
            file.seek(at)
            block = file.read(step)
            end = len(block)
            if first and block.endswith(b"\n"):
                end -= 1  # the newline that ends the last line begins none
            first = False
            while (end := block.rfind(b"\n", 0, end)) >= 0:
                found += 1
                if found == lines:
                    return at + end + 1
        return 0


class _JsonLines:
    """A JSON object for each line: ``{"line": …}``."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._print(line)
        if len(self._rest) > _BLOCK:  # a guest that never ends its line must not fill our memory
            self._print(self._rest)
            self._rest = b""

    def end(self) -> None:
        if self._rest:
            self._print(self._rest)

    def _print(self, line: bytes) -> None:
        from ovms.cli import output

        output.answer_json({"line": line.decode("utf-8", "replace").rstrip("\r")})
