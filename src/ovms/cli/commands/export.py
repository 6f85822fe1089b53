"""Write the disk of an instance, or of an artifact, as one image: all layers, and what the guest wrote, in one.

A running instance goes on: it stands still for a moment, and the image is what its disk was then. Where it runs qemu-guest-agent, its
file systems are frozen for that, and whole; else they are as after a power failure. The work is qemu-img's. The file appears whole or
not at all, with holes where the disk is empty.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ovms.cli import disks, output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InstanceNotFound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "name", metavar="INSTANCE|REF", help="an instance, or else an artifact in the local store (by name or digest)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the image to write")
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="its format (default: raw)")
    parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it is there already")
    disks.add_freeze(parser)
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import allow, find
    from ovms.runtime import export
    from ovms.spec.manifest import DiskFormat

    target = export.Target(Path(args.output).absolute(), DiskFormat(args.format), args.force)
    runtime = context.runtime
    try:
        record = runtime.instances.find(args.name)
    except InstanceNotFound:
        with runtime.layout.using():
            found = find(runtime.layout, args.name, args.platform)
            allow(runtime.guard, found, args.name, context.connect)
            artifact = found.artifact
            written = export.of_artifact(runtime.layout, artifact, target, context.progress)
    else:
        written = export.of_instance(runtime, record, target, context.progress, quiesce=args.freeze)
    disks.tell(asked=args.freeze, not_quiesced=written.not_quiesced, user_data=written.user_data)
    if args.json:
        output.answer_json(
            {
                "path": str(target.path),
                "format": str(target.format),
                "virtual_size": written.virtual_size,
                "size": written.size,
                "downtime_ms": written.downtime_ms,
                "user_data": written.user_data,
                "not_frozen": written.not_quiesced,
            }
        )
    else:
        output.answer(str(target.path))
    return Exit.OK
