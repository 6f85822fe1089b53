"""Forget the login to a registry: from the file that 'ovm login' stores to, and from its credential helper."""

from __future__ import annotations

import argparse

from ovms.cli import output
from ovms.cli.commands.login import add_authfile, auth_file, registry_key
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import NotFound, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("host", metavar="HOST[:PORT][/REPOSITORY]", nargs="?", help="as it was logged in to")
    parser.add_argument("-a", "--all", action="store_true", help="forget every login in the file")
    add_authfile(parser)


def run(args: argparse.Namespace, _context: Context) -> int:
    """Runs the command."""
    if args.all == (args.host is not None):
        raise UsageError("name a registry, or --all")
    file = auth_file(args.authfile)
    if args.all:
        gone = file.erase_all()
    else:
        key = registry_key(args.host)
        gone = [key]
        if not file.erase(key):
            raise NotFound(f"nobody is logged in to {key} by {file.path}", hint=_elsewhere(key))
    if args.json:
        output.answer_json({"registries": gone, "authfile": str(file.path)})
    else:
        for key in gone:
            output.answer(f"logged out of {key}")
    return Exit.OK


def _elsewhere(key: str) -> str | None:
    # a login that Docker has made, say
    from ovms.oci.credentials import Credentials

    host, _, repository = key.partition("/")
    if Credentials.from_environment().get(host, repository) is None:
        return None
    return "another file has one for it (docker login made it?): log out with the tool that stored it"
