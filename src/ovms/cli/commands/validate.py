"""Check a manifest, a part or a whole artifact against the specification, and name every problem with its rule.

WHAT is a file (a manifest in JSON or YAML, a bootstrap config, a RAM snapshot, a qcow2 or raw disk, a kernel), the
directory of an unpacked artifact, or an artifact's name or digest, oci:DIR[:TAG] or oci-archive:FILE[:TAG]. Of an artifact
every byte is checked; one that is not in the local store is pulled, or copied there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.artifact.validate import Problem, Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("what", metavar="WHAT", help="a file, a directory, or an artifact's name or digest")
    parser.add_argument(
        "--type",
        choices=("manifest", "bootstrap", "ramsnap", "qcow2", "raw", "kernel"),
        help="what the file is (default: found out from its content)",
    )
    values.add_tls_verify(parser)
    parser.add_argument(
        "--pull", choices=("missing", "always", "never"), default="missing", help="when to pull (default: missing)"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    report = _report(args, context)
    if args.json:
        output.answer_json(report.to_json())
    else:
        count = len(report.problems)
        verdict = "valid" if report.valid else "1 problem" if count == 1 else f"{count} problems"
        output.answer(f"{report.name}: {report.kind}: {verdict}")
        for problem in report.problems:
            output.answer(f"  {_line(problem)}")
    return Exit.OK if report.valid else Exit.INPUT


def _report(args: argparse.Namespace, context: Context) -> Report:
    from ovms.artifact.resolve import lookup, resolve
    from ovms.artifact.validate import Kind, Report, validate_artifact, validate_path
    from ovms.errors import (
        DigestMismatch,
        JsonInvalid,
        ManifestInvalid,
        ReferenceInvalid,
        RegistryProtocol,
        Unsupported,
    )
    from ovms.oci.transport import parse_place

    if not args.what:
        raise ReferenceInvalid("an empty text names nothing", hint="give a file, a directory, or an artifact's name")
    # like 'docker build': what begins like a path is one, and a file that is there is meant
    if args.type is not None or args.what.startswith((".", "/")) or os.path.exists(args.what):  # noqa: PTH110
        return validate_path(Path(args.what), None if args.type is None else Kind(args.type), context.progress)
    with context.layout.using():
        on_disk = parse_place(args.what) is not None
        known = None if on_disk or args.pull == "always" else lookup(context.layout, args.what)
        if known is None:
            try:
                found = resolve(
                    context.layout,
                    context.connect,
                    args.what,
                    policy=args.pull,
                    progress=context.progress,
                    guard=context.guard,
                )
            except (DigestMismatch, JsonInvalid, ManifestInvalid, RegistryProtocol, Unsupported) as exc:
                if isinstance(exc, DigestMismatch | RegistryProtocol) and "rule" not in exc.context:
                    raise  # the transfer, not what was transferred
                # its manifests; the bulk was not fetched
                report = Report(args.what, "artifact")
                report.note(exc)
                return report
            known = found.name, found.artifact.digest
        name, digest = known
        return validate_artifact(context.layout, name or digest, digest, context.progress)


def _line(problem: Problem) -> str:
    where = [problem.part, problem.path, None if problem.offset is None else f"offset {problem.offset}"]
    rule = "" if problem.rule is None else f" [{problem.rule}]"
    said = problem.message
    places = [place for place in where if place is not None and place not in said]
    return f"{': '.join([*places, said])}{rule}"
