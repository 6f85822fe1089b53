"""Build an artifact from a manifest, and put it into the local store.

The manifest is JSON or YAML of the OVMS shape. Its refs may be local paths (from the manifest's directory), digests of
blobs in the store, or references to artifacts whose part is taken over.

How the artifact was made is kept beside it (SLSA provenance, an in-toto statement: 'ovm referrers NAME'), which changes nothing
of the artifact: the same input gives the same digest. 'ovm push --referrers' sends both. With SOURCE_DATE_EPOCH in the
environment the same input gives the same statement, too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("manifest", metavar="MANIFEST", type=Path, help="the manifest file")
    parser.add_argument("-t", "--tag", metavar="NAME[:TAG]", help="the name of the new artifact")
    parser.add_argument(
        "--provenance",
        metavar="true|false",
        type=values.truth,
        default=True,
        help="whether to tell how it was made (default: true)",
    )
    parser.add_argument(
        "--no-provenance", dest="provenance", action="store_false", help="the same as --provenance=false"
    )
    values.add_quiet(parser)
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.build import Builder
    from ovms.artifact.provenance import Times

    times = Times.of(os.environ) if args.provenance else None
    builder = Builder(context.layout, context.connect, context.progress, guard=context.guard)
    artifact = builder.build(args.manifest, name=args.tag, provenance=times)
    if args.json:
        output.answer_json({"digest": artifact.digest, "name": args.tag, "size": artifact.size})
    else:
        output.answer(artifact.digest)
    return Exit.OK
