"""Check the local store: every blob against its digest, every name against what it stands for.

With --repair, what is damaged is moved into the store's directory ovms.quarantine, for you to look at and remove (nothing
is deleted but what can be made again), a damaged index is rebuilt, and each artifact that lacks something is named with what brings it back.
Others may work while the store is checked; the repair itself waits for them a moment, and gives up when they go on.

Exit code: 0 when the store is sound, or is so now; 10 when something is left.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.oci.fsck import Report, Uses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--repair", action="store_true", help="put right what can be put right")
    parser.add_argument("--quick", action="store_true", help="do not read the blobs: only sizes, manifests and names")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci.fsck import check, open_damaged
    from ovms.oci.repair import repair

    context.root.prepare()
    layout = open_damaged(context.root.store)
    work = repair if args.repair else check
    report = work(layout, lambda: _uses(context), quick=args.quick, progress=context.progress)
    if args.json:
        output.answer_json(
            {
                "sound": report.sound,
                "blobs": report.blobs,
                "hashed": report.hashed,
                "artifacts": report.artifacts,
                "busy": report.busy,
                "findings": [finding.to_json() for finding in report.findings],
            }
        )
    else:
        _show(report)
    return Exit.OK if report.sound else Exit.INTEGRITY


def _uses(context: Context) -> Uses:
    from ovms.errors import OvmsError
    from ovms.oci.fsck import User, Uses
    from ovms.runtime.instances import Instances
    from ovms.spec.digest import Digest

    damaged: list[OvmsError] = []
    # the runtime would open the store, which may be damaged; records need no VMM
    instances = Instances(context.root, _no_vmm)
    records = instances.records(damaged=damaged.append)
    users: dict[Digest, list[User]] = {}
    for record in records:
        if record.digest is not None:
            users.setdefault(record.digest, []).append(User(record.name, record.reference))
    return Uses(instances.needs_of(records), users, tuple(damaged))


def _no_vmm(name: str) -> NoReturn:
    raise AssertionError(name)


def _show(report: Report) -> None:
    for finding in report.findings:
        done = f": {finding.repaired}" if finding.repaired else ""
        output.answer(f"{finding.fault}: {finding.message}{done}")
        if finding.hint:
            output.answer(f"  {finding.hint}")
    left = sum(finding.left for finding in report.findings)
    checked = f"{report.blobs} blobs ({output.size(report.hashed)} read), {report.artifacts} artifacts"
    if report.sound:
        output.answer(f"{checked}: sound")
    else:
        mendable = any(finding.left and finding.fault.mendable for finding in report.findings)
        mend = "; 'ovm fsck --repair' puts right what can be put right" if mendable else ""
        output.answer(f"{checked}: {left} problem{'' if left == 1 else 's'}{mend}")
    if report.busy:
        output.say("another ovm process works on the store just now: what is left of killed ones was not looked for")
