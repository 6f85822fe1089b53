"""Remove what nothing needs from the local store: blobs without a name, unpacked memories, broken-off work.

What a name or an instance (stopped ones, too) needs stays, and so does what a running command works on. A download that
was broken off is kept for a week, so that the next pull goes on with it.

With --all, artifacts go in spite of their names when no instance uses them, and when no artifact that stays is based on
them; also all broken-off downloads, and every unpacked memory that no VM has mapped. With --quarantine, what 'ovm fsck
--repair' or a pull took out of the way goes, too. Nothing is asked: see what would go with --dry-run.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Final

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

#: Instances that a message names; 'ovm ps -a' has all of them.
_NAMED_MAX: Final = 3

if TYPE_CHECKING:
    from ovms.oci.collector import Item, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-a", "--all", action="store_true", help="also artifacts that no instance uses")
    parser.add_argument("--quarantine", action="store_true", help="also damaged files that repairs took out of the way")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only tell what would be removed")
    parser.add_argument(
        "--filter",
        metavar="until=AGE",
        type=values.until,
        help="only with --all: keep artifacts that came into the store less than AGE ago (30m, 24h, 7d)",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci.collector import Options, collect

    if args.filter is not None and not args.all:
        raise UsageError("--filter is for --all", hint="without --all, no artifact with a name is removed")
    since = None if args.filter is None else time.time() - args.filter
    options = Options(args.all, since, args.quarantine)
    plan = collect(context.layout, context.runtime.instances.needs, options, dry_run=args.dry_run)
    if args.json:
        output.answer_json(_json(plan, dry_run=args.dry_run))
    else:
        _show(plan, dry_run=args.dry_run)
    if args.all and not plan.entries and not plan.broken:
        _say_what_is_kept(context, by_age=since is not None)
    for broken in plan.broken:
        what = ", ".join(name for name in broken.names if name) or broken.digest
        output.say(f"no blobs were removed: what {what} needs is not known ({broken.error.message})")
    if plan.broken:
        output.say("'ovm fsck' tells more, and how to get it back; 'ovm rmi' gives it up")
        return Exit.INTEGRITY
    return Exit.OK


def _say_what_is_kept(context: Context, *, by_age: bool) -> None:
    records = context.runtime.instances.records()
    used = len({record.digest for record in records})
    if records:
        names = ", ".join(record.name for record in records[:_NAMED_MAX])
        more = f" and {len(records) - _NAMED_MAX} more" if len(records) > _NAMED_MAX else ""
        what = "an artifact is" if used == 1 else f"{used} artifacts are"
        output.say(f"{what} used by instances, also stopped ones ({names}{more}): 'ovm rm' removes those")
    if by_age:
        output.say("--filter keeps what came lately")


def _show(plan: Plan, *, dry_run: bool) -> None:
    removed = "would remove" if dry_run else "removed"
    for entry in plan.entries:
        output.answer(f"{removed} artifact {entry.name or entry.descriptor.digest}")
    for item in plan.items:
        output.answer(f"{removed} {_name(item)} ({output.size(item.size)})")
    kinds = [
        f"{kind} {output.size(size)} ({count})" for kind, (count, size) in plan.by_kind().items() if count
    ]  # fmt: skip
    total = f"{'would free' if dry_run else 'freed'} {output.size(plan.size)}"
    output.answer(f"{total}: {', '.join(kinds)}" if kinds else total)


def _name(item: Item) -> str:
    from ovms.oci.collector import Kind

    if item.kind is Kind.BLOB:
        return f"blob sha256:{item.path.name}"
    return f"{item.path.parent.name}/{item.path.name}"


def _json(plan: Plan, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "freed": plan.size,
        "by_kind": {kind: {"count": count, "size": size} for kind, (count, size) in plan.by_kind().items()},
        "artifacts": [{"name": entry.name, "digest": entry.descriptor.digest} for entry in plan.entries],
        "items": [{"kind": item.kind, "path": str(item.path), "size": item.size} for item in plan.items],
        "broken": [
            {"digest": broken.digest, "names": list(broken.names), "error": broken.error.to_json()}
            for broken in plan.broken
        ],
    }
