"""Show what an artifact (or an instance) is made of, as JSON."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InstanceNotFound, NotFound, ReferenceInvalid

if TYPE_CHECKING:
    from ovms.artifact.model import Artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("name", metavar="REF|INSTANCE", help="an artifact's name or digest, or an instance")
    parser.add_argument(
        "--security", action="store_true", help="what confines a running instance, read from the kernel"
    )
    parser.add_argument("--raw", action="store_true", help="the artifact's OCI manifest, byte for byte")
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.security:
        from ovms.runtime.security import in_force

        record = context.runtime.instances.find(args.name)
        _print(args, in_force(record, context.runtime.instances.files(record)))
        return Exit.OK
    try:
        return _artifact(args, context)
    except (NotFound, ReferenceInvalid) as no_artifact:
        if args.raw:
            raise
        try:
            record = context.runtime.instances.find(args.name)
        except InstanceNotFound:
            raise no_artifact from None
    from ovms.runtime.document import instance
    from ovms.runtime.figures import Usage

    instances = context.runtime.instances
    status = instances.status(record)
    metrics = Usage(instances).of(record) if status.state.alive else None
    _print(args, instance(status, files=instances.files(record), metrics=metrics, details=True))
    return Exit.OK


def _artifact(args: argparse.Namespace, context: Context) -> int:
    from ovms.artifact.resolve import find
    from ovms.spec import strictjson

    found = find(context.layout, args.name, args.platform)
    image = found.artifact.image
    if args.raw:
        output.answer_bytes(image.raw)
        return Exit.OK
    value: dict[str, Any] = {
        "name": found.name,
        "digest": found.artifact.digest,
        "size": found.artifact.size,
        "manifest": dict(found.artifact.manifest.document),
        "oci": strictjson.parse(image.raw, "the OCI manifest", max_size=len(image.raw)),
    }
    if found.artifact.manifest.ram_snapshot is not None:
        value["ram_snapshot"] = _ram_snapshot(context, found.artifact)
    _print(args, value)
    return Exit.OK


def _ram_snapshot(context: Context, artifact: Artifact) -> dict[str, Any]:
    from ovms.artifact import ram
    from ovms.memory.snapshot import read_control
    from ovms.oci import absent
    from ovms.spec import ramsnap
    from ovms.spec.digest import parse_digest

    named = artifact.manifest.ram_snapshot
    assert named is not None
    newest = parse_digest(named.ref)
    missing = ram.left_out(context.layout, artifact)
    left_out: dict[str, Any] = {"left_out": [blob.digest for blob in missing]} if missing else {}
    if any(blob.digest == newest for blob in missing):
        raw = absent.control_part(context.layout, artifact.blob(newest))
        if raw is None:
            return left_out
        control = ramsnap.parse_control(raw)
    else:
        control = read_control(context.layout, newest)
    return {
        **left_out,
        **control.header.to_json(),
        "chunks": len(control.chunks),
        "stored_pages": sum(chunk.pages for chunk in control.chunks if chunk.stored_size),
        "size": artifact.blob(named.ref).size,
        "parents": [{"digest": ref, "size": artifact.blob(ref).size} for ref in named.parents],
    }


def _print(args: argparse.Namespace, value: Any) -> None:
    if args.json:
        output.answer_json(value)
    else:
        output.answer_document(value)
