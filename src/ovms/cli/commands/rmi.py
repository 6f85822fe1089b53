"""Remove artifacts from the local store. A blob goes when nothing needs it any more."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InUse, ReferenceNotFound
from ovms.spec.digest import Digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("names", metavar="REF", nargs="+", help="an artifact's name; or a digest, for all of its names")
    parser.add_argument(
        "-f", "--force", action="store_true", help="also when an instance uses it (which keeps its blobs)"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    removed: list[str] = []
    for text in args.names:
        removed += _remove(context, text, force=args.force)
    freed = context.layout.collect(context.runtime.instances.artifacts)
    if args.json:
        output.answer_json({"removed": removed, "freed": freed})
    else:
        for name in removed:
            output.answer(f"removed {name}")
    return Exit.OK


def _remove(context: Context, text: str, *, force: bool) -> list[str]:
    names, digest = _names(context, text)
    users = [r.name for r in context.runtime.instances.records() if r.digest == digest]
    left = [e for e in context.layout.entries() if e.descriptor.digest == digest and e.name not in names]
    if users and not left and not force:
        raise InUse(
            f"{text} is used by the instance {users[0]}",
            hint=f"remove that first ('ovm rm -f {users[0]}'), or take only the name away ('ovm rmi -f')",
            instances=users,
        )
    for name in names:
        if name:
            context.layout.remove_name(name)
        else:
            context.layout.remove_nameless({digest})
    return [name or digest for name in names]


def _names(context: Context, text: str) -> tuple[list[str], Digest]:
    from ovms.artifact.resolve import lookup

    entry = lookup(context.layout, text)
    if entry is None:
        raise ReferenceNotFound(
            f"there is no artifact {text[:120]!a} in the local store", hint="'ovm ls' lists what is there"
        )
    name, digest = entry
    if name is not None:
        return [name], digest
    return [e.name for e in context.layout.entries() if e.descriptor.digest == digest], digest
