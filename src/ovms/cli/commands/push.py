"""Upload an artifact to the registry that its name says, or to DESTINATION. What is there already is not sent again.

DESTINATION is another name in a registry, or a place on disk: oci:DIR[:TAG], to which the artifact is added, or
oci-archive:FILE[:TAG], which is written anew. skopeo and podman read both.

Signatures of it that the local store has go with it to a registry.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError
from ovms.lazy import replace

if TYPE_CHECKING:
    from ovms.oci.descriptor import Descriptor
    from ovms.spec.digest import Digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="HOST[:PORT]/NAME[:TAG], as 'ovm ls' shows it")
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        nargs="?",
        help="a name in a registry, oci:DIR[:TAG], or oci-archive:FILE[:TAG]",
    )
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
    parser.add_argument("--remove-signatures", action="store_true", help="leave the signatures behind")
    values.add_quiet(parser)
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact import attach, resolve

    target = args.reference if args.destination is None else args.destination
    _check(args, target)
    if args.subject is None:
        descriptor = resolve.push(
            context.layout, context.connect, args.reference, context.progress, destination=args.destination
        )
    else:
        descriptor = attach.push_with_subject(
            context.layout, context.connect, args.reference, args.subject, context.progress
        )
    where = {} if args.destination is None else {"destination": args.destination}
    value: dict[str, Any] = {"name": args.reference, **where, "digest": descriptor.digest}
    value |= _push_referrers(args, context, target, descriptor.digest)
    if args.json:
        output.answer_json(value)
    else:
        output.answer(_pinned(target, descriptor.digest))
    return Exit.OK


def _push_referrers(args: argparse.Namespace, context: Context, target: str, digest: Digest) -> dict[str, Any]:
    from ovms.artifact import attach, resolve
    from ovms.oci import cosign, transport

    if isinstance(transport.parse(target), transport.Place):
        return {}
    reference = resolve.pushable(target)

    def wanted(referrer: Descriptor) -> bool:
        return not args.remove_signatures if cosign.may_sign(referrer) else bool(args.referrers)

    client = context.connect(reference.registry or "")
    sent = attach.push_referrers(context.layout, client, reference.repository, digest, context.progress, wanted=wanted)
    signatures = {"signatures": [referrer.digest for referrer in sent if cosign.may_sign(referrer)]}
    return signatures | ({"referrers": [referrer.digest for referrer in sent]} if args.referrers else {})


def _pinned(target: str, digest: Digest) -> str:
    # what names just this, there; both kinds can be pulled again
    from ovms.oci import transport

    place = transport.parse_place(target)
    if place is not None:
        return str(replace(place, tag=None, digest=digest))
    return target if "@" in target else f"{target}@{digest}"


def _check(args: argparse.Namespace, target: str) -> None:
    from ovms.oci import transport

    if args.subject is not None and args.destination is not None:
        raise UsageError("--subject changes what REF stands for: it does not go with a DESTINATION")
    option = "--subject" if args.subject is not None else "--referrers" if args.referrers else None
    if option is not None and isinstance(transport.parse(target), transport.Place):
        raise UsageError(f"{option} needs a registry to push to, not a place on disk")
