"""Show what happens to instances: made, started, stopped, removed, and how far long work is.

A server remembers the latest events. Where none runs, -f shows those that come.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.cli.values import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    parser.add_argument("--since", metavar="SEQ", type=count, help="begin after the event of this number")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if not args.follow and not context.has_server:
        output.say("no server runs, so nobody remembers events: -f shows those that come")
    for event in context.client.events(follow=args.follow, since=args.since):
        if args.json:
            output.answer_json(event)
        else:
            output.answer(_line(event))
    return Exit.OK


def _line(event: Mapping[str, Any]) -> str:
    words = [str(event["time"]), str(event["seq"]), str(event["type"]), str(event.get("instance_id", ""))]
    if "state" in event:
        words.append(str(event["state"]))
    if isinstance(progress := event.get("progress"), dict):
        total = "" if progress.get("total") is None else f" of {output.size(progress['total'])}"
        words.append(f"{progress['label']} {output.size(progress['done'])}{total}")
    if isinstance(error := event.get("error"), dict):
        words.append(str(error.get("detail")))
    return " ".join(word for word in words if word)
