"""Check who signed an artifact. What is signed is printed with its digest: run that, not the tag, which may move.

It needs a good signature by one of the keys, or with --all by each of them, in any of Cosign's forms: a Sigstore bundle, a
referrer, or one under the tag sha256-….sig. Of an index it is the index that has to be signed. No log and no online service is
asked. Exit code 14: there is none.

An identity stands beside the keys, or alone: who it is, who says so, and the file that tells which authorities and logs are
trusted for it. It is read from bundles with a certificate; the package 'sigstore' has to be installed (ovms[keyless]).

A REF with a registry is looked at there; one with a local name, and any with --local, in the local store.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ovms.cli import output, subjects, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

if TYPE_CHECKING:
    from ovms.trust.model import Signer, Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    subjects.add_arguments(parser)
    parser.add_argument(
        "--key",
        metavar="KEY",
        action="append",
        default=[],
        help="a public key as PEM, or exec:PROGRAM for one that a program has; any number of them",
    )
    parser.add_argument(
        "--certificate-identity", metavar="NAME", help="the address or the URI that the certificate is for"
    )
    parser.add_argument(
        "--certificate-oidc-issuer", metavar="URL", help="the OpenID Connect provider who knows it by that"
    )
    parser.add_argument(
        "--trusted-root",
        metavar="FILE",
        type=Path,
        help="a Sigstore trusted_root.json: the authorities, logs and clocks that are trusted",
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--any", action="store_false", dest="all", default=False, help="one of them is enough (default)")
    many.add_argument("--all", action="store_true", help="each of them has to have signed")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.trust import verifying

    signers = _signers(args)
    subject = subjects.find(args, context)
    digest = subject.manifest.digest
    verdict = verifying.check(_source(subject, context).signatures(digest), digest, signers)
    name = subject.pinned()
    verifying.require(verdict, len(signers) if args.all else 1, name)
    if args.json:
        output.answer_json({"name": name, **verdict.to_json()})
        return Exit.OK
    for one in verdict.good:
        when = "" if one.signed_at is None else f" at {one.signed_at:%Y-%m-%dT%H:%M:%SZ}"
        output.say(f"{one.found} is good: made by {one.signer}{when}")
    for line in verdict.details():
        output.say(f"does not count: {line}")
    output.answer(name)
    return Exit.OK


def _signers(args: argparse.Namespace) -> list[Signer]:
    from ovms.trust import keyfiles

    identity = args.certificate_identity, args.certificate_oidc_issuer, args.trusted_root
    signers: list[Signer] = [*keyfiles.signers(args.key)]
    if any(one is not None for one in identity):
        if not all(identity):
            raise UsageError(
                "an identity needs --certificate-identity, --certificate-oidc-issuer and --trusted-root",
                hint="anybody may have an identity of that name with another provider, or of another authority's",
            )
        from ovms.trust.identity import IdentitySigner, TrustRoot

        root = TrustRoot.load(args.trusted_root)
        signers.append(IdentitySigner(ascii(f"{identity[0]} of {identity[1]}")[1:-1][:200], root, *identity[:2]))
    if not signers:
        raise UsageError("whose signature is looked for?", hint="name a --key, or an identity")
    return signers


def _source(subject: subjects.Subject, context: Context) -> Source:
    from ovms.trust.sources import LocalSource, RegistrySource

    if subject.client is not None and subject.reference is not None:
        return RegistrySource(subject.client, subject.reference.repository)
    return LocalSource(context.layout)
