"""Do what is to be done after the end of an instance's VM. Its watcher runs this; nobody else has to."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InstanceNotFound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("instance", metavar="ID", help="the instance's ID")
    parser.add_argument(
        "--policy", metavar="FILE", type=Path, help="where the policy is of whoever started it, if there is one"
    )
    parser.add_argument("--policy-needed", action="store_true", help="there has to be one")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.runtime.restart import ended
    from ovms.trust.files import Policies
    from ovms.trust.guard import Guard

    runtime = context.runtime
    if args.policy is not None:
        runtime.guard = Guard(runtime.layout, Policies(args.policy, needed=args.policy_needed))
    # gone already: with --rm, whoever looked first has removed it
    with contextlib.suppress(InstanceNotFound):
        again = ended(runtime, args.instance)
        if again is not None:
            output.answer(again.id)
    return Exit.OK
