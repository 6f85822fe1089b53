"""List the artifacts in the local store.

CREATED is when an artifact's manifest says that it was made; where it does not say, when it came into the store. RAM SNAPSHOT
says "left out" where there is one that was not fetched ('ovm pull' fetches it), and "encrypted" where an identity is needed to restore it.
"""

from __future__ import annotations

import argparse
from typing import Any

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.spec import mediatypes

    entries = [
        _describe(context, entry.name, entry.descriptor.digest)
        for entry in context.layout.entries()
        # signatures and the like, which 'ovm referrers' shows
        if entry.name or entry.descriptor.artifact_type in (None, mediatypes.MANIFEST)
    ]
    if args.json:
        output.answer_json(entries)
    elif args.quiet:
        for entry in entries:
            output.answer(entry["name"] or entry["digest"])
    else:
        output.table(
            ("NAME", "DIGEST", "CREATED", "SIZE", "RAM SNAPSHOT"),
            (
                (
                    entry["name"] or "<none>",
                    output.short(entry["digest"]),
                    f"{output.ago(when)} ago" if (when := entry["created"] or entry["added"]) else "-",
                    output.size(entry["size"]) if entry["size"] is not None else f"? ({entry['problem']})",
                    _ram(entry),
                )
                for entry in entries
            ),
        )
    return Exit.OK


def _ram(entry: dict[str, Any]) -> str:
    if entry["ram_left_out"]:
        return "left out"
    if entry["ram_encrypted"]:
        return "encrypted"
    return "yes" if entry["ram_snapshot"] else "no"


def _describe(context: Context, name: str, digest: str) -> dict[str, Any]:
    from ovms.artifact import ram
    from ovms.artifact.model import load_any
    from ovms.errors import OvmsError
    from ovms.spec.digest import Digest

    came = context.layout.came(Digest(digest))
    answer: dict[str, Any] = {
        "name": name,
        "digest": digest,
        "size": None,
        "created": None,
        "added": None if came is None else output.rfc3339(came),
        "ram_snapshot": False,
        "ram_encrypted": False,
        "ram_left_out": False,
    }
    try:
        artifact = load_any(context.layout, Digest(digest))
    except OvmsError as exc:
        # one damaged artifact must not hide the others
        return {**answer, "problem": exc.code}
    return {
        **answer,
        "size": artifact.size,
        "created": artifact.manifest.metadata.created,
        "ram_snapshot": artifact.manifest.ram_snapshot is not None,
        "ram_encrypted": artifact.encrypted,
        "ram_left_out": bool(ram.left_out(context.layout, artifact)),
    }
