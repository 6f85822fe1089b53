"""What the commands share that take the disk of a running instance."""

from __future__ import annotations

import argparse

from ovms.cli import output


def add_freeze(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-freeze``."""
    parser.add_argument(
        "--no-freeze",
        dest="freeze",
        action="store_false",
        help="do not let the guest's agent freeze its file systems for the moment",
    )


def tell(*, asked: bool, not_quiesced: str | None, user_data: bool) -> None:
    """Says what whoever takes the disk should know."""
    if asked and not_quiesced is not None:
        output.say(f"the disk is as after a power failure, its file systems were not frozen: {not_quiesced}")
    if user_data:
        output.say(
            "the guest was given user data, and cloud-init keeps it on the disk: secrets of it can be read there"
        )
