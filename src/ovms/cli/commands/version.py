"""Show the versions of ovms and of what it uses, and whether guests run on KVM here."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from ovms import __version__
from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import OvmsError
from ovms.spec import ROLES, SPEC_VERSIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    value: dict[str, Any] = {
        "ovms": __version__,
        "spec": list(SPEC_VERSIONS),
        "roles": list(ROLES),
        "python": platform.python_version(),
        "root": str(context.named_root.path),
        "qemu": None,
        "accel": None,
        "accel_reason": None,
    }
    problem: OvmsError | None = None
    try:
        vmm = context.runtime.vmm("qemu")
        value["qemu"] = vmm.version
        choice = vmm.choose_accel(None)
        value.update(accel=str(choice.accel), accel_reason=choice.reason)
    except OvmsError as exc:
        problem = exc
        value["problem"] = exc.to_json()
    if args.json:
        output.answer_json(value)
        return Exit.OK
    output.answer(f"ovms    {value['ovms']} (specification {', '.join(SPEC_VERSIONS)}: {', '.join(ROLES)})")
    output.answer(f"python  {value['python']}")
    output.answer(f"qemu    {value['qemu'] or '-'}")
    output.answer(f"accel   {value['accel'] or '-'}{_because(value['accel_reason'])}")
    output.answer(f"root    {value['root']}")
    if problem is not None:
        output.complain(problem, as_json=False)
    return Exit.OK


def _because(reason: str | None) -> str:
    return "" if reason is None else f" (no KVM: {reason})"
