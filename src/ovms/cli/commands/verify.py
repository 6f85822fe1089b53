"""Check who signed an artifact. What is signed is printed with its digest: run that, not the tag, which may move.

It needs a good signature by one of the keys, or with --all by each of them, in any of Cosign's forms: a Sigstore bundle, a
referrer, or one under the tag sha256-….sig. Of an index it is the index that has to be signed. No log and no online service is
asked. Exit code 14: there is none.

A REF with a registry is looked at there; one with a local name, and any with --local, in the local store.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ovms.cli import output, subjects, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.trust.model import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    subjects.add_arguments(parser)
    parser.add_argument(
        "--key",
        metavar="KEY",
        action="append",
        required=True,
        help="a public key as PEM, or exec:PROGRAM for one that a program has; any number of them",
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--any", dest="all", action="store_false", default=False, help="one of the keys is enough (default)"
    )
    many.add_argument("--all", action="store_true", help="each of the keys has to have signed")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.trust import keyfiles, verifying

    signers = keyfiles.signers(args.key)
    subject = subjects.find(args, context)
    digest = subject.manifest.digest
    verdict = verifying.check(_source(subject, context).signatures(digest), digest, signers)
    name = subject.pinned()
    verifying.require(verdict, len(signers) if args.all else 1, name)
    if args.json:
        output.answer_json({"name": name, **verdict.to_json()})
        return Exit.OK
    for one in verdict.good:
        output.say(f"{one.found} is good: made by {one.signer}")
    for line in verdict.details():
        output.say(f"does not count: {line}")
    output.answer(name)
    return Exit.OK


def _source(subject: subjects.Subject, context: Context) -> Source:
    from ovms.trust.sources import LocalSource, RegistrySource

    if subject.client is not None and subject.reference is not None:
        return RegistrySource(subject.client, subject.reference.repository)
    return LocalSource(context.layout)
