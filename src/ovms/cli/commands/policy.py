"""Show the policies that hold, or tell what they make of an artifact.

'ovm policy show' tells which files hold and what they ask for. 'ovm policy check REF' tells what they make of an artifact in the
local store, in a registry (of which only the manifest and the signatures are fetched), oci:DIR or oci-archive:FILE: the rule, who
has signed, and what else was found. It ends with 14 where the artifact, or its RAM snapshot, is refused. docs/policy.md tells
what a policy holds.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import ReferenceNotFound, UsageError

if TYPE_CHECKING:
    from ovms.trust.judge import Verdict

_HEAD = ("SCOPE", "ASKS FOR", "RAM SNAPSHOTS", "MAXIMUM AGE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("what", metavar="check|show", choices=("check", "show"), help="what to do")
    parser.add_argument("artifact", metavar="REF", nargs="?", help="with check: an artifact")
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.what == "show":
        if args.artifact is not None:
            raise UsageError("'ovm policy show' takes no artifact", hint="'ovm policy check REF'")
        return _show(args, context)
    if args.artifact is None:
        raise UsageError("which artifact?", hint="'ovm policy check REF'")
    return _check(args, context)


def _show(args: argparse.Namespace, context: Context) -> int:
    policies = [one.policy for one in context.guard.policies.in_force().policies]
    if args.json:
        output.answer_json({"policies": [policy.to_json() for policy in policies]})
        return Exit.OK
    if not policies:
        output.answer("no policy: every artifact is accepted whose digests fit")
    for policy in policies:
        output.answer(f"{policy.where}" + (" (enforced: a user's policy can only ask for more)" * policy.enforced))
        if policy.registries is not None:
            output.answer(f"allowed registries: {', '.join(policy.registries) or 'none'}")
        rules = [policy.default, *(policy.scopes[scope] for scope in sorted(policy.scopes))]
        output.table(_HEAD, [(r.scope, str(r.requirement), str(r.ram or "-"), r.age or "-") for r in rules])
    return Exit.OK


def _check(args: argparse.Namespace, context: Context) -> int:
    digest, cold, warm = _verdicts(args, context)
    allowed = all(verdict.allowed for verdict in cold)
    ram_allowed = None if warm is None else all(verdict.allowed for verdict in warm)
    if args.json:
        document: dict[str, Any] = {"digest": digest, "allowed": allowed, "ram_allowed": ram_allowed}
        document["verdicts"] = [verdict.to_json() for verdict in cold]
        document["ram_verdicts"] = None if warm is None else [verdict.to_json() for verdict in warm]
        output.answer_json(document)
    else:
        output.answer(f"{args.artifact}@{digest}" if "@" not in args.artifact else args.artifact)
        if not cold:
            output.answer("no policy: every artifact is accepted whose digests fit")
        _tell(cold)
        if warm is not None and cold and (not ram_allowed or any(verdict.rule.ram is not None for verdict in warm)):
            output.answer("with its RAM snapshot:")
            _tell(warm)
    return Exit.OK if allowed and ram_allowed is not False else Exit.UNTRUSTED


def _tell(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        output.answer(f"rule: {verdict.rule.scope} in {verdict.policy}: {verdict.rule.requirement}")
        for line in verdict.found:
            output.answer(f"  {line}")
        if verdict.refusal is None:
            output.answer("accepted" + (f": signed by {', '.join(verdict.signed)}" if verdict.signed else ""))
        else:
            output.answer(f"refused: {verdict.refusal.message}")


def _verdicts(args: argparse.Namespace, context: Context) -> tuple[str, list[Verdict], list[Verdict] | None]:
    # of the artifact without its RAM snapshot, and with it (None: it has none)
    from ovms.artifact.resolve import find
    from ovms.oci import importing, source, transfer, transport
    from ovms.trust.guard import has_ram

    guard = context.guard
    where = transport.parse(args.artifact)
    try:
        if isinstance(where, transport.Place):
            raise ReferenceNotFound(str(where))
        found = find(context.layout, args.artifact, args.platform)
    except ReferenceNotFound:
        client = None
        if isinstance(where, transport.Place):
            with source.opened(where) as files:
                image, top, _ = importing.manifests(files, files.select(where), where, args.platform)
        elif where.registry is None:
            raise
        else:
            client = context.connect(where.registry)
            image, top, _ = transfer.manifests(client, where, args.platform)
        cold = guard.arriving(image, top, where, client, ram=False)
        warm = guard.arriving(image, top, where, client, ram=True) if has_ram(image) else None
        return image.digest, cold, warm
    digest, asked = found.artifact.digest, args.artifact
    cold = guard.using(digest, found.name, asked=asked, connect=context.connect)
    if not has_ram(found.artifact.image):
        return digest, cold, None
    return digest, cold, guard.using(digest, found.name, asked=asked, connect=context.connect, ram=True)
