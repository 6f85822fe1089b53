"""Make and convert keys for 'ovm sign' and 'ovm verify'. Cosign has the same files.

'ovm key generate' writes a new pair: ovm.key, encrypted with a password, and ovm.pub. 'ovm key public KEY' prints the public half
of a key. 'ovm key import PEM' writes a pair from a private key that something else made (PKCS #8, SEC 1).

KEY is a file, or exec:PROGRAM for a key that a program has. The password is asked for, or comes from --password-fd,
OVMS_KEY_PASSWORD or COSIGN_PASSWORD.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from ovms.cli import output, passwords
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import UsageError

if TYPE_CHECKING:
    from ovms.trust.keys import PublicKey

#: Options may stand between the words.
INTERMIXED: Final = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.usage = (
        "ovm key generate [-h] [--json] [--output-key-prefix PREFIX] [--password-fd N]\n"
        "       ovm key public [-h] [--json] [--password-fd N] KEY\n"
        "       ovm key import [-h] [--json] [--output-key-prefix PREFIX] [--password-fd N] PEM"
    )
    parser.add_argument("action", metavar="generate|public|import", choices=("generate", "public", "import"))
    parser.add_argument("key", metavar="KEY", nargs="?", help="a file; for 'public' also exec:PROGRAM")
    parser.add_argument(
        "--output-key-prefix", metavar="PREFIX", help="the new files are PREFIX.key and PREFIX.pub (default: ovm)"
    )
    passwords.add_password_fd(parser)


def run(args: argparse.Namespace, _context: Context) -> int:
    """Runs the command."""
    _check(args)
    if args.action == "public":
        return _public(args)
    from ovms.trust import keyfiles, keys

    paths = keyfiles.pair(args.output_key_prefix or "ovm")
    new = passwords.asker(args.password_fd, f"New password of {output.safe(str(paths[0]))}", twice=True)
    if args.action == "generate":
        key = keys.generate()
    else:
        # a descriptor is read once: then both have the same password
        typed = passwords.asker(None, f"Password of {output.safe(args.key)}")
        ask = typed if args.password_fd is None else new
        key = keys.load_private(keyfiles.read(args.key, "the private key"), f"the key {args.key[:200]!a}", ask)
    password = new()
    keyfiles.write_pair(paths, key, password)
    if not password:
        output.say(f"{paths[0]} has an empty password: whoever can read the file can sign")
    private, public = map(str, paths)
    if args.json:
        output.answer_json({"private": private, "public": public, **_described(key.public)})
    else:
        output.answer(private)
        output.answer(public)
    return Exit.OK


def _check(args: argparse.Namespace) -> None:
    if (args.action == "generate") != (args.key is None):
        raise UsageError(
            f"'ovm key {args.action}' takes {'no file' if args.action == 'generate' else 'one KEY'}",
            hint="'ovm key --help' shows how it is used",
        )
    if args.action == "public" and args.output_key_prefix is not None:
        raise UsageError("'ovm key public' writes no files: --output-key-prefix is of no use")


def _public(args: argparse.Namespace) -> int:
    from ovms.trust import keyfiles

    ask = passwords.asker(args.password_fd, f"Password of {output.safe(args.key)}")
    key = keyfiles.signing_key(args.key, ask).public
    if args.json:
        output.answer_json({"pem": key.pem.decode("ascii"), **_described(key)})
    else:
        for line in key.pem.decode("ascii").splitlines():
            output.answer(line)
    return Exit.OK


def _described(key: PublicKey) -> dict[str, str]:
    return {"fingerprint": f"sha256:{key.fingerprint}"}
