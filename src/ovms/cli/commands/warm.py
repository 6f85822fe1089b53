"""Let clones of an artifact's RAM snapshot wait, loaded and paused, so that the next starts take some milliseconds.

Without arguments: what waits. The server holds the pools ('ovm serve'); they are there again after its restart.
"""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError
from ovms.spec import limits

_HEAD = ("ARTIFACT", "DIGEST", "SIZE", "READY", "HANDED OUT", "PROBLEM")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "artifact", nargs="?", metavar="REF", help="an artifact with a RAM snapshot; pulled where missing"
    )
    parser.add_argument("--size", type=int, metavar="N", help="how many are to wait; 0 ends the pool")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.artifact is None:
        if args.size is not None:
            raise UsageError("--size needs an artifact", hint="'ovm warm REF --size N'")
        pools = context.client.pools()
        if args.json:
            output.answer_json({"pools": pools})
        else:
            output.table(_HEAD, [_row(pool) for pool in pools])
        return Exit.OK
    if args.size is None:
        raise UsageError("how many are to wait?", hint="'ovm warm REF --size N'; 0 ends the pool")
    if not 0 <= args.size <= limits.WARM_MAX:
        raise UsageError(f"a pool of {args.size} is out of range", hint=f"0 to {limits.WARM_MAX}; 0 ends the pool")
    pool = context.client.warm(args.artifact, args.size)
    if args.json:
        output.answer_json(pool)
    elif args.size == 0:
        output.say(f"nothing waits for {pool['manifest']} any more")
    else:
        output.say(f"{args.size} of {pool['manifest']} are to wait; 'ovm warm' tells how many do")
    return Exit.OK


def _row(pool: dict[str, object]) -> tuple[str, ...]:
    digest = str(pool["digest"]).removeprefix("sha256:")[:12]
    numbers = (str(pool[key]) for key in ("size", "ready", "handed_out"))
    return (str(pool["manifest"]), digest, *numbers, str(pool["problem"] or ""))
