"""Fetch an artifact from a registry, or from an OCI layout on disk, into the local store. Every blob is checked.

REF is HOST[:PORT]/NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]; the last two are what skopeo and podman
read and write. TAG is what the layout calls the artifact; it can be left out where there is only one.
"""

from __future__ import annotations

import argparse

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


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.resolve import pull

    found = pull(
        context.layout, context.connect, args.reference, context.progress, name=args.tag, platform=args.platform
    )
    artifact = found.artifact
    if args.json:
        output.answer_json({"name": found.name, "digest": artifact.digest, "size": artifact.size})
    else:
        output.answer(f"{found.name}@{artifact.digest}" if "@" not in found.name else found.name)
    return Exit.OK
