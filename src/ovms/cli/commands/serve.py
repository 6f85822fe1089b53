"""Serve the runtime contract: on a UNIX socket, and over TCP with TLS and a token.

Root, this user and the members of --group may call over the socket. The server keeps no state of its own: VMs live on when it
ends, and commands work beside it. SIGHUP reads token and certificates again, SIGTERM ends it when what it is at is done.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ovms.cli import output
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--socket", metavar="PATH", type=Path, help="where to listen (default: ovms.sock in the root)")
    parser.add_argument("--group", metavar="GROUP", help="whose members may call, too; the socket becomes theirs")
    parser.add_argument("--tcp", metavar="HOST:PORT", help="listen there as well; needs the next three")
    parser.add_argument("--tls-cert", metavar="FILE", type=Path, help="the server's certificate, with its chain (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", type=Path, help="its key (PEM)")
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="the bearer token; nobody else may read it")
    parser.add_argument("--tls-client-ca", metavar="FILE", type=Path, help="only clients with a certificate of this CA")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.runtime.server.gate import TlsFiles, group_id
    from ovms.runtime.server.serve import Options, serve

    tls = None
    given = (args.tls_cert, args.tls_key, args.token_file)
    if all(given):
        tls = TlsFiles(args.tls_cert, args.tls_key, args.token_file, args.tls_client_ca)
    elif any((*given, args.tls_client_ca, args.tcp)):
        raise UsageError("--tcp needs --tls-cert, --tls-key and --token-file", hint="without TLS there is the socket")
    options = Options(
        socket=(args.socket or context.root.socket).absolute(),
        group=None if args.group is None else group_id(args.group),
        tcp=None if args.tcp is None else _address(args.tcp),
        tls=tls,
    )

    def ready(places: list[str]) -> None:
        if args.json:
            output.answer_json({"listening": places})
        else:
            for place in places:
                output.say(f"listening on {place}")

    if not serve(context.runtime, options, ready=ready):
        # its lock goes with us, and so the next command sees that the start was broken off
        os._exit(Exit.OK)
    return Exit.OK


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text[:80]!a} is no HOST:PORT", hint="such as 127.0.0.1:8443 or [::1]:8443")
    return host.strip("[]"), int(port)
