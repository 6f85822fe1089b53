"""Attach a file to an artifact: an SBOM, a statement of provenance, whatever belongs to it. 'ovm referrers' lists what is
attached.

SPDX, CycloneDX and in-toto documents are known by their content; other files need a --type. A statement is attached to an
artifact that it is about.

An artifact in a registry gets it there, and nothing is kept here; one with a local name gets it in the local store, from
where 'ovm push --referrers' sends both, and where the file goes when the artifact goes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("file", metavar="FILE", type=Path, help="what to attach")
    parser.add_argument("reference", metavar="REF", help="the artifact that it belongs to")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="what the file is: spdx, cyclonedx, provenance, in-toto, dsse (which it has to be then), or a media type, which is "
        "believed; without it the content tells",
    )
    parser.add_argument(
        "--artifact-type",
        metavar="MEDIATYPE",
        help="the type of the new artifact, by which it is found ('ovm referrers --type'); else that of the file",
    )
    parser.add_argument(
        "--annotation", metavar="KEY=VALUE", action="append", default=[], help="of the new artifact; any number of them"
    )
    parser.add_argument("--local", action="store_true", help="in the local store, also where REF names a registry")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact import kinds
    from ovms.artifact.attach import Attachment, attach_local, attach_remote
    from ovms.oci.reference import Reference

    attachment = Attachment.of(args.file, args.type, args.artifact_type, _annotations(args.annotation))
    reference = Reference.parse(args.reference)
    if reference.registry is None or args.local:
        added, subject = attach_local(context.layout, args.reference, attachment, context.progress)
    else:
        client = context.connect(reference.registry)
        added, subject = attach_remote(context.layout, client, reference, attachment, context.progress)
    if args.json:
        output.answer_json(
            {
                "digest": added.digest,
                "artifact_type": added.artifact_type,
                "kind": kinds.of_referrer(added),
                "subject": subject.digest,
                "pushed": reference.registry is not None and not args.local,
            }
        )
    else:
        output.answer(added.digest)
    return Exit.OK


def _annotations(texts: list[str]) -> dict[str, str]:
    answer: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--annotation {text[:60]!a} is not KEY=VALUE")
        if key in answer:
            raise UsageError(f"--annotation {key[:60]!a} is given twice")
        answer[key] = value
    return answer
