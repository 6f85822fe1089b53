"""Power instances down: press the power button, wait, then end what still runs. Of several, all at once."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.cli.values import seconds
from ovms.errors import OvmsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instances", metavar="INSTANCE", nargs="+", help="a name, an ID, or the first digits of one")
    parser.add_argument(
        "-t",
        "--time",
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=30.0,
        help="how long the guest gets before it is ended (default: 30; 0 ends it at once)",
    )
    parser.add_argument(
        "--agent",
        action="store_true",
        help="ask qemu-guest-agent in the guest first; the power button is pressed where that does not answer",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    stopper = _ByAgent(context) if args.agent else context.client
    found = [context.client.instance(text) for text in args.instances]
    asked: dict[str, float] = {}
    if len(found) > 1 and args.time > 0:
        # all at once: ten guests that do not listen take as long as one. What fails here is tried again below, and told there
        for one in found:
            with contextlib.suppress(OvmsError):
                stopper.ask_to_stop(one["instance_id"], args.time)
                asked[one["instance_id"]] = time.monotonic()
    answers, failed = [], None
    for one in found:
        instance_id = one["instance_id"]
        left = max(0.0, args.time - (time.monotonic() - asked[instance_id])) if instance_id in asked else args.time
        try:
            answers.append(stopper.stop(instance_id, left, asked=instance_id in asked))
        except OvmsError as exc:  # no reason to let the others run
            failed = failed or exc
            continue
        if not args.json:
            output.answer(one["name"])
    if failed is not None:
        raise failed
    if args.json:
        output.answer_json(answers)
    return Exit.OK


class _ByAgent:
    """The contract has no word for that: it is done beside a server."""

    def __init__(self, context: Context) -> None:
        self._runtime = context.runtime

    def ask_to_stop(self, instance_id: str, _grace: float) -> None:
        self._runtime.power_down(self._runtime.instances.find(instance_id), agent=True)

    def stop(self, instance_id: str, grace: float, *, asked: bool) -> dict[str, Any]:
        from ovms.runtime.document import instance

        record = self._runtime.instances.find(instance_id)
        return instance(self._runtime.stop(record, grace=grace, agent=True, asked=asked))
