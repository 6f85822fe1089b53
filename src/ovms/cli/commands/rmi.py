"""Remove artifacts from the local store. A blob goes when nothing needs it any more."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InUse, ReferenceNotFound

if TYPE_CHECKING:
    from ovms.oci.layout import Entry

#: Seconds to wait for others: the names are gone already, and the room can wait.
_WAIT: Final = 1.0


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
    freed = _collect(context)
    if args.json:
        output.answer_json({"removed": removed, "freed": freed})
    else:
        for name in removed:
            output.answer(f"removed {name}")
    return Exit.OK


def _collect(context: Context) -> int | None:
    from ovms.errors import Locked
    from ovms.oci.collector import collect

    try:
        plan = collect(context.layout, context.runtime.instances.needs, wait=_WAIT)
    except Locked:
        # the names are gone, which is what was asked for
        output.say("another ovm process uses the store just now: 'ovm prune' frees the room when it has ended")
        return None
    for broken in plan.broken:
        what = ", ".join(name for name in broken.names if name) or broken.digest
        output.say(f"no blobs were removed, because {what} cannot be read; 'ovm fsck' tells more")
    return plan.size


def _remove(context: Context, text: str, *, force: bool) -> list[str]:
    entries = _entries(context, text)
    digest = entries[0].descriptor.digest
    users = [r.name for r in context.runtime.instances.records() if r.digest == digest]
    left = [e for e in context.layout.entries() if e.descriptor.digest == digest and e not in entries]
    if users and not left and not force:
        raise InUse(
            f"{text} is used by the instance {users[0]}",
            hint=f"remove that first ('ovm rm -f {users[0]}'), or take only the name away ('ovm rmi -f')",
            instances=users,
        )
    context.layout.remove_entries(entries)
    return [entry.name or entry.descriptor.digest for entry in entries]


def _entries(context: Context, text: str) -> list[Entry]:
    from ovms.artifact.resolve import lookup
    from ovms.spec.digest import is_digest

    # by its digest also when its manifest is lost
    whole = f"sha256:{text.removeprefix('sha256:')}"
    name, digest = (None, whole) if is_digest(whole) else lookup(context.layout, text) or (None, None)
    found = [e for e in context.layout.entries() if e.descriptor.digest == digest and (name is None or e.name == name)]
    if not found:
        raise ReferenceNotFound(
            f"there is no artifact {text[:120]!a} in the local store", hint="'ovm ls' lists what is there"
        )
    return found
