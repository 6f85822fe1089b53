"""Sign an artifact with a key, in a form that 'cosign verify' takes. 'ovm verify' checks it.

What is signed is the digest that REF stands for at this moment, and with it all that the artifact names by digest. Of an index it
is the index; with --recursive also each manifest that it lists, for whoever pulls one of them by its own digest.

A REF with a registry is signed there, and nothing is kept here; one with a local name, and any with --local, is signed in the
local store, from where 'ovm push' sends both. What was signed is printed with its digest.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from ovms.cli import output, passwords, subjects, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.spec.digest import Digest
    from ovms.trust.signing import Key, Signed

_FORMATS: Final = ("bundle", "referrer", "classic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    subjects.add_arguments(parser)
    parser.add_argument(
        "--key",
        metavar="KEY",
        required=True,
        help="a private key: a file of 'ovm key' or of Cosign, or PEM; or exec:PROGRAM for a key that a program has",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help="bundle: a Sigstore bundle, as cosign 3 makes it (default); referrer: the same signature as cosign 2 makes it, "
        "with a subject; classic: under the tag sha256-….sig, which every cosign reads",
    )
    parser.add_argument("--recursive", action="store_true", help="also each manifest of an index")
    passwords.add_password_fd(parser)
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.trust import keyfiles

    # what is not there is told before anybody types a password
    subject = subjects.find(args, context)
    ask = passwords.asker(args.password_fd, f"Password of {output.safe(args.key)}")
    key = keyfiles.signing_key(args.key, ask)
    digests = subject.digests if args.recursive else [subject.manifest.digest]
    made = [_sign(subject, digest, key, args.format, context) for digest in digests]
    if args.json:
        output.answer_json(
            {
                "digest": subject.manifest.digest,
                "format": args.format,
                "key": f"sha256:{key.public.fingerprint}",
                "signatures": [{"digest": one.subject, "manifest": one.manifest} for one in made],
                "pushed": subject.client is not None,
            }
        )
        return Exit.OK
    for one in made:
        output.answer(subject.pinned(one.subject))
    return Exit.OK


def _sign(subject: subjects.Subject, digest: Digest, key: Key, kind: str, context: Context) -> Signed:
    from ovms.trust import signing
    from ovms.trust.model import Format

    reference = subject.reference
    if subject.client is not None and reference is not None:
        return signing.sign_remote(subject.client, subject.pin(reference, digest), key, Format(kind))
    name = digest if reference is None else reference.name
    return signing.sign_local(context.layout, digest, name, key, Format(kind))
