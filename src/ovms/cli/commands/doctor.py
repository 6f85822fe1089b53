"""Tell what this host can do for VMs, what is lost where it can't, and what to do about it.

With registries as arguments, also whether they answer. Exits with 0 when VMs can be run at all, else with 9.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit

if TYPE_CHECKING:
    from ovms.oci.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "registries", metavar="REGISTRY", nargs="*", help="a registry to ask, such as registry.example:5000"
    )
    values.add_tls_verify(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci.credentials import Credentials
    from ovms.runtime.doctor import Finding, Host, Verdict, examine

    host = Host(context.root, Credentials.from_environment())
    findings: list[Finding] = []
    for finding in examine(host, partial(_session, context), args.registries):
        findings.append(finding)
        if not args.json:
            output.answer(f"{finding.verdict:<4}  {finding.check:<13}  {finding.found}")
            for label, text in (("lost", finding.lost), ("do", finding.remedy)):
                if text is not None and finding.verdict is not Verdict.OK:
                    output.answer(f"{'':21}{label}: {text}")
    able = not any(finding.verdict is Verdict.FAIL for finding in findings)
    if args.json:
        output.answer_json({"able": able, "findings": [finding.to_json() for finding in findings]})
    elif not able:
        output.say("no VM can be run on this host")
    return Exit.OK if able else Exit.HOST


def _session(context: Context, name: str) -> Session:
    # not made before one is asked for: the configuration may be what is wrong
    return context.connector.session(name)
