"""Fetch an artifact from a registry, or from an OCI layout on disk, into the local store. Every blob is checked.

REF is HOST[:PORT]/NAME[:TAG][@DIGEST], oci:DIR[:TAG] or oci-archive:FILE[:TAG]; the last two are what skopeo and podman
read and write. TAG is what the layout calls the artifact; it can be left out where there is only one. Several are fetched
four at a time, over sixteen connections at the most; after the first that fails, no other is begun.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

if TYPE_CHECKING:
    from ovms.oci.small import Pool

#: Artifacts that are pulled at once: while one begins, or is made durable, the others keep the registry busy.
_AT_ONCE: Final = 4
#: Connections for large blobs that they share out among them.
_LARGE: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "references", metavar="REF", nargs="+", help="a name in a registry, oci:DIR[:TAG], or oci-archive:FILE[:TAG]"
    )
    parser.add_argument(
        "-t", "--tag", metavar="NAME[:TAG]", help="what to call it here (default: as it is called there)"
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )
    parser.add_argument(
        "--referrers",
        action="store_true",
        help="also what belongs to it (signatures, SBOMs), but no snapshots: 'ovm referrers --local' shows it",
    )
    parser.add_argument(
        "--no-ram",
        action="store_true",
        help="without its RAM snapshot: what boots, and no more. 'ovm run' fetches it where it restores, 'ovm pull' always",
    )
    values.add_quiet(parser)
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.tag is not None and len(args.references) > 1:
        raise UsageError("-t names one artifact, and several are to be pulled", hint="pull them one by one")
    pulled: list[dict[str, Any]] = []
    with context.pulling():
        for one in _pull_all(args, context):
            pulled.append(one)
            if not args.json:
                name, digest = one["name"], one["digest"]
                output.answer(name if "@" in name else f"{name}@{digest}")
    if args.json:
        output.answer_json(pulled if len(pulled) > 1 else pulled[0])
    return Exit.OK


def _pull_all(args: argparse.Namespace, context: Context) -> Iterator[dict[str, Any]]:
    """What was pulled, in the order of the references. Raises what the first of them that failed raised, after those before it."""
    references: list[str] = args.references
    if len(references) == 1:
        yield _pull(references[0], args, context)
        return
    from ovms.oci.small import Pool

    at_once = min(_AT_ONCE, len(references))
    # made here, and not by each
    context.layout, context.guard, context.progress, context.connector  # noqa: B018
    todo: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    for numbered in enumerate(references):
        todo.put(numbered)
    done: queue.SimpleQueue[tuple[int, dict[str, Any] | BaseException | None]] = queue.SimpleQueue()
    failed = threading.Event()
    pool = Pool(_LARGE // at_once)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                number, reference = todo.get_nowait()
                try:
                    done.put((number, None if failed.is_set() else _pull(reference, args, context, pool)))
                except BaseException as exc:  # noqa: BLE001 - raised again where it can be seen
                    failed.set()
                    done.put((number, exc))

    for _ in range(at_once):
        threading.Thread(target=work, name="pull", daemon=True).start()
    came: dict[int, dict[str, Any] | BaseException | None] = {}
    error: BaseException | None = None
    for number in range(len(references)):
        while number not in came:
            at, result = done.get()
            came[at] = result
        if isinstance(result := came[number], BaseException):
            error = error or result
        elif result is not None:
            yield result
    if error is not None:
        raise error


def _pull(reference: str, args: argparse.Namespace, context: Context, pool: Pool | None = None) -> dict[str, Any]:
    from ovms.artifact import ram
    from ovms.artifact.resolve import pull
    from ovms.oci.download import Tally

    tally = Tally()
    found = pull(
        context.layout,
        context.connect,
        reference,
        context.progress,
        name=args.tag,
        platform=args.platform,
        gate=ram.unwanted if args.no_ram else None,
        tally=tally,
        guard=context.guard,
        pool=pool,
    )
    artifact = found.artifact
    value: dict[str, Any] = {
        "name": found.name,
        "digest": artifact.digest,
        "size": artifact.size,
        "fetched": tally.fetched,
        "reused": tally.reused,
        "left_out": [blob.digest for blob in ram.left_out(context.layout, artifact)],
    }
    if args.referrers:
        value["referrers"] = _pull_referrers(reference, context)
    return value


def _pull_referrers(text: str, context: Context) -> list[str]:
    from ovms.artifact import attach, resolve
    from ovms.oci.referrers import roots
    from ovms.trust import sources

    reference = resolve.pushable(text)
    top = attach.local_manifest(context.layout, text)
    client = context.connect(reference.registry or "")
    fetched, left_out = attach.pull_referrers(
        context.layout, client, reference.repository, top.digest, context.progress
    )
    # signatures under a tag are no referrers, but are kept like them
    for digest in roots(top):
        if context.layout.size(digest) is not None:
            subject = context.layout.manifest(digest).descriptor()
            sources.keep(context.layout, client, reference.repository, subject)
    if left_out:
        output.say(f"{left_out} of the referrers were not fetched; 'ovm referrers {reference}' lists all of them")
    return [referrer.digest for referrer in fetched]
