"""Show what refers to an artifact (signatures, SBOMs, snapshots), and what refers to that, as a tree.

A name with a registry in it is looked up there, a local name in the local store. Of an index, what refers to one of its
manifests is shown, too.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.oci.referrers import Node

#: Annotations of one referrer that are shown to people, and how much of each.
_ANNOTATIONS_SHOWN = 8
_TEXT_SHOWN = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="the artifact that others refer to")
    parser.add_argument(
        "--type", metavar="MEDIATYPE", help="only referrers of this artifact type, and all that refers to them"
    )
    parser.add_argument("--depth", metavar="N", type=values.depth, help="levels to show (1 to 8, the default)")
    parser.add_argument("--local", action="store_true", help="look in the local store, also where REF names a registry")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact.attach import local_manifest, remote_manifest
    from ovms.oci import referrers
    from ovms.oci.reference import Reference

    reference = Reference.parse(args.reference)
    if reference.registry is None or args.local:
        manifest = local_manifest(context.layout, args.reference)
        listed = referrers.local_lister(context.layout)
    else:
        client = context.connect(reference.registry)
        manifest = remote_manifest(client, reference)
        listed = referrers.lister(client, reference.repository)
    depth = args.depth or referrers.DEPTH_MAX
    nodes, complete = referrers.tree(referrers.roots(manifest), listed, artifact_type=args.type, depth=depth)
    if not complete:
        output.say("there are more referrers than are shown")
    if args.json:
        output.answer_json(
            {
                "name": args.reference,
                "digest": manifest.digest,
                "complete": complete,
                "referrers": [_to_json(node) for node in nodes],
            }
        )
    else:
        output.answer(args.reference if "sha256:" in args.reference else f"{args.reference}@{manifest.digest}")
        _print(nodes, "", manifest.digest)
    return Exit.OK


def _created(node: Node) -> str | None:
    from ovms.spec import mediatypes

    return node.descriptor.annotations.get(mediatypes.CREATED_ANNOTATION)


def _to_json(node: Node) -> dict[str, Any]:
    found = node.descriptor
    value: dict[str, Any] = {
        "digest": found.digest,
        "media_type": found.media_type,
        "artifact_type": found.artifact_type,
        "size": found.size,
        "subject": node.subject,
        "created": _created(node),
        "annotations": dict(found.annotations),
    }
    if node.repeated:
        return {**value, "repeated": True}
    return {**value, "referrers": [_to_json(child) for child in node.children]}


def _print(nodes: list[Node], indent: str, subject: str) -> None:
    from ovms.spec import mediatypes

    for i, node in enumerate(nodes):
        last = i == len(nodes) - 1
        found = node.descriptor
        created = _created(node)
        facts = [_cut(found.artifact_type or "(no type)"), found.digest, output.size(found.size)]
        if created is not None:
            age = output.ago(created)
            facts.append(f"{age} ago" if age != "?" else "?")
        if node.subject != subject:
            facts.append(f"(of {node.subject} in the index)")
        if node.repeated:
            facts.append("(see above)")
        output.answer(f"{indent}{'└──' if last else '├──'} {'  '.join(facts)}")
        deeper = indent + ("    " if last else "│   ")
        shown = [(k, v) for k, v in sorted(found.annotations.items()) if k != mediatypes.CREATED_ANNOTATION]
        for key, text in shown[:_ANNOTATIONS_SHOWN] if not node.repeated else ():
            output.answer(f"{deeper}{'│' if node.children else ' '}   {_cut(key)}: {_cut(text)}")
        _print(node.children, deeper, found.digest)


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "…"
