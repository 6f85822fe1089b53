"""Show what refers to an artifact (signatures, SBOMs, provenance, snapshots), and what refers to that, as a tree; or fetch
the file that was attached as one of them (--get).

A name with a registry in it is looked up there, a local name in the local store. Of an index, what refers to one of its
manifests is shown, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

if TYPE_CHECKING:
    from ovms.artifact.attached import AttachedFile
    from ovms.oci.referrers import Node

#: Annotations of one referrer that are shown to people, and how much of each.
_ANNOTATIONS_SHOWN = 8
_TEXT_SHOWN = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("reference", metavar="REF", help="the artifact that others refer to")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="only referrers of this artifact type, or kind (spdx, cyclonedx, provenance, in-toto, dsse, signature, artifact), "
        "and all that refers to them",
    )
    parser.add_argument(
        "--get",
        metavar="DIGEST|KIND",
        help="write the file that was attached as this referrer: its digest, the first digits of it, or the kind of the only one",
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to, with --get (else stdout)")
    parser.add_argument("--depth", metavar="N", type=values.depth, help="levels to show (1 to 8, the default)")
    parser.add_argument("--local", action="store_true", help="look in the local store, also where REF names a registry")
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.artifact import attached, kinds
    from ovms.artifact.attach import local_manifest, remote_manifest
    from ovms.oci import referrers
    from ovms.oci.reference import Reference

    if args.output is not None and args.get is None:
        raise UsageError("-o is for --get", hint="'ovm referrers REF --get DIGEST -o FILE'")
    if args.type is not None and "/" not in args.type and args.type not in set(kinds.Kind):
        raise UsageError(f"{args.type[:60]!a} is neither a media type nor one of {', '.join(kinds.Kind)}")
    reference = Reference.parse(args.reference)
    source: attached.Source
    if reference.registry is None or args.local:
        manifest = local_manifest(context.layout, args.reference)
        listed = referrers.local_lister(context.layout)
        source = attached.Local(context.layout)
    else:
        client = context.connect(reference.registry)
        manifest = remote_manifest(client, reference)
        listed = referrers.lister(client, reference.repository)
        source = attached.Remote(client, reference.repository)
    depth = args.depth or referrers.DEPTH_MAX
    artifact_type = args.type if args.type is not None and "/" in args.type else None
    nodes, complete = referrers.tree(referrers.roots(manifest), listed, artifact_type=artifact_type, depth=depth)
    if args.type is not None and artifact_type is None:
        nodes = [node for node in nodes if kinds.of_referrer(node.descriptor) == args.type]
    if not complete:
        output.say("there are more referrers than are shown")
    if args.get is not None:
        return _get(args, attached.read(source, attached.choose(nodes, args.get)))
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


def _get(args: argparse.Namespace, file: AttachedFile) -> int:
    if args.output is not None:
        from ovms import fsutil

        fsutil.write_new(args.output.absolute(), file.data, "the attached file")
        if not args.json:
            output.answer(str(args.output))
    elif args.json:
        raise UsageError("--json and a file do not both go to stdout", hint="say where the file goes to, with -o FILE")
    elif sys.stdout.isatty() and not _harmless(file.data):
        raise UsageError("the file holds what drives a terminal", hint="say where it goes to, with -o FILE")
    else:
        sys.stdout.buffer.write(file.data)
        sys.stdout.buffer.flush()
    if args.json:
        output.answer_json(
            {
                "digest": file.digest,
                "media_type": file.media_type,
                "size": len(file.data),
                "referrer": file.referrer,
                "path": str(args.output.absolute()),
            }
        )
    return Exit.OK


def _harmless(data: bytes) -> bool:
    try:
        return all(c.isprintable() or c in "\n\t" for c in data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _created(node: Node) -> str | None:
    from ovms.spec import mediatypes

    return node.descriptor.annotations.get(mediatypes.CREATED_ANNOTATION)


def _to_json(node: Node) -> dict[str, Any]:
    from ovms.artifact import kinds

    found = node.descriptor
    value: dict[str, Any] = {
        "digest": found.digest,
        "media_type": found.media_type,
        "artifact_type": found.artifact_type,
        "kind": kinds.of_referrer(found),
        "size": found.size,
        "subject": node.subject,
        "created": _created(node),
        "annotations": dict(found.annotations),
    }
    if node.repeated:
        return {**value, "repeated": True}
    return {**value, "referrers": [_to_json(child) for child in node.children]}


def _print(nodes: list[Node], indent: str, subject: str) -> None:
    from ovms.artifact import kinds
    from ovms.spec import mediatypes

    for i, node in enumerate(nodes):
        last = i == len(nodes) - 1
        found = node.descriptor
        created = _created(node)
        facts = [_cut(found.artifact_type or "(no type)"), found.digest, output.size(found.size)]
        if created is not None:
            age = output.ago(created)
            facts.append(f"{age} ago" if age != "?" else "?")
        if (kind := kinds.of_referrer(found)) is not None:
            facts.append(kind.text)
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
