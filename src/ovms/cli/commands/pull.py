"""Fetch an artifact from a registry, or from an OCI layout on disk, into the local store. Every blob is checked.

REF is HOST[:PORT]/NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]; the last two are what skopeo and podman
read and write. TAG is what the layout calls the artifact; it can be left out where there is only one.
"""

from __future__ import annotations

import argparse
from typing import Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "reference", metavar="REF", help="a name in a registry, oci:DIR[:TAG], or oci-archive:FILE[:TAG]"
    )
    parser.add_argument(
        "-t", "--tag", metavar="NAME[:TAG]", help="what to call it here (default: as it is called there)"
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )
    parser.add_argument(
        "--referrers",
        action="store_true",
        help="also what belongs to it (signatures, SBOMs), but no snapshots: 'ovm referrers --local' shows it",
    )
    parser.add_argument(
        "--no-ram",
        action="store_true",
        help="without its RAM snapshot: what boots, and no more. 'ovm run' fetches it where it restores, 'ovm pull' always",
    )
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact import ram
    from ovms.artifact.resolve import pull
    from ovms.oci.transfer import Tally

    tally = Tally()
    with context.pulling():
        found = pull(
            context.layout,
            context.connect,
            args.reference,
            context.progress,
            name=args.tag,
            platform=args.platform,
            gate=ram.unwanted if args.no_ram else None,
            tally=tally,
        )
    artifact = found.artifact
    value: dict[str, Any] = {
        "name": found.name,
        "digest": artifact.digest,
        "size": artifact.size,
        "fetched": tally.fetched,
        "reused": tally.reused,
        "left_out": [blob.digest for blob in ram.left_out(context.layout, artifact)],
    }
    if args.referrers:
        value["referrers"] = _pull_referrers(args.reference, context)
    if args.json:
        output.answer_json(value)
    else:
        output.answer(f"{found.name}@{artifact.digest}" if "@" not in found.name else found.name)
    return Exit.OK


def _pull_referrers(text: str, context: Context) -> list[str]:
    from ovms.artifact import attach, resolve

    reference = resolve.pushable(text)
    top = attach.local_manifest(context.layout, text)
    client = context.connect(reference.registry or "")
    fetched, left_out = attach.pull_referrers(
        context.layout, client, reference.repository, top.digest, context.progress
    )
    if left_out:
        output.say(f"{left_out} of the referrers were not fetched; 'ovm referrers {reference}' lists all of them")
    return [referrer.digest for referrer in fetched]
