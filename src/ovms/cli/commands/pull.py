"""Fetch an artifact from a registry, or from an OCI layout on disk, into the local store. Every blob is checked.

REF is HOST[:PORT]/NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]; the last two are what skopeo and podman
read and write. TAG is what the layout calls the artifact; it can be left out where there is only one. Several are fetched
one after the other, over the same connections, up to the first that fails.
"""

from __future__ import annotations

import argparse
from typing import Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "references", metavar="REF", nargs="+", help="a name in a registry, oci:DIR[:TAG], or oci-archive:FILE[:TAG]"
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
    if args.tag is not None and len(args.references) > 1:
        raise UsageError("-t names one artifact, and several are to be pulled", hint="pull them one by one")
    pulled: list[dict[str, Any]] = []
    with context.pulling():
        for reference in args.references:
            pulled.append(_pull(reference, args, context))
            if not args.json:
                name, digest = pulled[-1]["name"], pulled[-1]["digest"]
                output.answer(name if "@" in name else f"{name}@{digest}")
    if args.json:
        output.answer_json(pulled if len(pulled) > 1 else pulled[0])
    return Exit.OK


def _pull(reference: str, args: argparse.Namespace, context: Context) -> dict[str, Any]:
    from ovms.artifact import ram
    from ovms.artifact.resolve import pull
    from ovms.oci.transfer import Tally

    tally = Tally()
    found = pull(
        context.layout,
        context.connect,
        reference,
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
        value["referrers"] = _pull_referrers(reference, context)
    return value


def _pull_referrers(text: str, context: Context) -> list[str]:
    from ovms.artifact import attach, resolve
    from ovms.oci.referrers import roots
    from ovms.trust import sources

    reference = resolve.pushable(text)
    top = attach.local_manifest(context.layout, text)
    client = context.connect(reference.registry or "")
    fetched, left_out = attach.pull_referrers(
        context.layout, client, reference.repository, top.digest, context.progress
    )
    # signatures under a tag are no referrers, but are kept like them
    for digest in roots(top):
        if context.layout.size(digest) is not None:
            subject = context.layout.manifest(digest).descriptor()
            sources.keep(context.layout, client, reference.repository, subject)
    if left_out:
        output.say(f"{left_out} of the referrers were not fetched; 'ovm referrers {reference}' lists all of them")
    return [referrer.digest for referrer in fetched]
