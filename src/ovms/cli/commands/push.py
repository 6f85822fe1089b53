"""Upload an artifact to the registry that its name says. What the registry has already is not sent again."""

from __future__ import annotations

import argparse
from typing import Any

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="HOST[:PORT]/NAME[:TAG], as 'ovm ls' shows it")
    parser.add_argument(
        "--subject",
        metavar="SUBJECT",
        help="what it belongs to: a digest, or a reference of the same repository, which has to be there. This changes "
        "the manifest, so the artifact gets another digest, for which REF stands here, too; what was attached to it before "
        "belongs to the old one",
    )
    parser.add_argument(
        "--referrers",
        action="store_true",
        help="also what was attached to it here ('ovm attach'), and has no name of its own",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact import attach, resolve

    if args.subject is None:
        descriptor = resolve.push(context.layout, context.connect, args.reference, context.progress)
    else:
        descriptor = attach.push_with_subject(
            context.layout, context.connect, args.reference, args.subject, context.progress
        )
    value: dict[str, Any] = {"name": args.reference, "digest": descriptor.digest}
    if args.referrers:
        reference = resolve.pushable(args.reference)
        client = context.connect(reference.registry or "")
        sent = attach.push_referrers(context.layout, client, reference.repository, descriptor.digest, context.progress)
        value["referrers"] = [referrer.digest for referrer in sent]
    if args.json:
        output.answer_json(value)
    else:
        output.answer(f"{args.reference}@{descriptor.digest}")
    return Exit.OK
