"""Let instances' CPUs stand still, until 'ovm resume'. Their memory stays where it is."""

from __future__ import annotations

import argparse

from ovms.cli import each
from ovms.cli.context import Context

add_arguments = each.add_instances


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    return each.do(args, context, context.client.pause)
