"""Write into memory that an instance shares with the host, or read it.

The bytes come from stdin, or from a file. DEVICE is the name of an ivshmem device of the artifact. All is written, or
nothing. The guest may read at the same time: write what tells it that something is there last, by a call of its own.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("device", metavar="DEVICE", help="the name of an ivshmem device")
    parser.add_argument(
        "offset", metavar="OFFSET", type=values.offset, help="where in it: bytes, such as 4096 or 0x1000"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("-f", "--file", metavar="FILE", type=Path, help="write this file's content, not stdin's")
    way.add_argument("--read", metavar="COUNT", type=values.offset, help="read so many bytes to stdout instead")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.runtime import regions

    instances = context.runtime.instances
    record = instances.find(args.instance)
    answer = {"instance_id": record.id, "device": args.device, "offset": args.offset}
    if args.read is not None:
        data = regions.read(instances, record, args.device, args.offset, args.read)
        if args.json:
            output.answer_json({**answer, "bytes": len(data), "data": base64.b64encode(data).decode("ascii")})
        else:
            output.answer_bytes(data)
        return Exit.OK
    # what can't be done is said before anybody waits for input
    context.runtime.inject(record, args.device, args.offset, b"")
    room = next(region.size for region in record.machine.regions if region.name == args.device)
    data = _input(args.file, room - args.offset + 1)  # one byte more than fits tells that it does not
    context.runtime.inject(record, args.device, args.offset, data)
    if args.json:
        output.answer_json({**answer, "bytes": len(data)})
    return Exit.OK


def _input(path: Path | None, most: int) -> bytes:
    from ovms import fsutil

    if path is None:
        return sys.stdin.buffer.read(most)
    with fsutil.open_input(path, "the data") as file:
        return file.read(most)
