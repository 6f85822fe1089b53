"""Put the terminal on an instance's serial console. Ctrl-P Ctrl-Q leaves it; the VM goes on.

Every other key goes to the guest, Ctrl-C too. Up to eight may look and type at the same time: whoever may use this
instance may type, and the guest can't tell them apart. What the guest prints is not changed (it can set colours, move the
cursor, and whatever else your terminal lets a program do); 'ovm logs' shows it without that. The terminal is put right
afterwards. Of the past only an unfinished line, such as a prompt, is shown.
"""

from __future__ import annotations

import argparse
import os
import sys

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.cli.terminal import DETACH_KEYS, DetachKeys, parse_keys
from ovms.errors import StateConflict, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument(
        "--detach-keys",
        metavar="KEYS",
        type=_keys,
        default=parse_keys(DETACH_KEYS),
        help=f"what leaves the console: characters or ctrl-X, with commas between them (default: {DETACH_KEYS})",
    )
    parser.add_argument("--no-stdin", action="store_true", help="look, and type nothing")


def _keys(text: str) -> bytes:
    try:
        return parse_keys(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.json:
        raise UsageError("--json makes no sense here: stdout is the console", hint="'ovm logs --json' gives records")
    from ovms.cli.console import Visit

    instances = context.runtime.instances
    record = instances.find(args.instance)
    watched = record.watched
    if watched is None or not instances.status(record).state.alive:
        raise StateConflict(
            f"the instance {record.name} does not run",
            hint=f"'ovm logs {record.name}' shows what it printed",
            instance=record.name,
        )
    stdin = None if args.no_stdin else sys.stdin.fileno()
    welcome = None
    if stdin is not None and os.isatty(stdin) and args.detach_keys:
        welcome = f"at the console of {record.name}; {_shown(args.detach_keys)} leaves it"
    left = Visit(instances.files(record), watched, DetachKeys(args.detach_keys)).run(stdin, welcome=welcome)
    if sys.stdout.isatty():
        print()
    output.say(f"left the console; {record.name} goes on" if left else f"{record.name} has ended")
    return Exit.OK


def _shown(keys: bytes) -> str:
    return " ".join(f"Ctrl-{chr(key + 64)}" if key < 32 else chr(key) for key in keys)
