"""Log in to a registry: the credentials are tried there, then kept where podman and skopeo keep theirs.

They share the file, so one login does for all. The password comes from a prompt, or with --password-stdin from stdin;
never from the command line, which others can read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InputError, NotFound, UsageError

if TYPE_CHECKING:
    from ovms.oci.authfile import AuthFile

_SECRET_MAX: Final = 64 * 1024


class _Password(argparse.Action):
    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            "a password on the command line can be read by others",
            hint="leave it out to be asked for it, or use --password-stdin",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("host", metavar="HOST[:PORT][/REPOSITORY]", help="the registry, or a part of it")
    parser.add_argument("-u", "--username", metavar="USER", help="else it is asked for")
    parser.add_argument("--password-stdin", action="store_true", help="read the password from stdin")
    parser.add_argument("-p", "--password", action=_Password, nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--get-login", action="store_true", help="print the user who is logged in, and do nothing else")
    add_authfile(parser)
    values.add_tls_verify(parser)


def add_authfile(parser: argparse.ArgumentParser) -> None:
    """Adds ``--authfile``."""
    parser.add_argument(
        "--authfile",
        metavar="FILE",
        type=Path,
        help="the file of credentials (default: REGISTRY_AUTH_FILE, or podman's)",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.oci.credentials import Credential

    key = registry_key(args.host)
    file = auth_file(args.authfile)
    if args.get_login:
        return _show(args, file, key)
    credential = Credential(*_ask(args))
    session = context.connector.session(key.partition("/")[0])
    try:
        asked = session.log_in(credential)
    finally:
        session.close()
    file.store(key, credential)
    if not asked:
        output.say(f"{key} asks for no credentials; they are stored all the same")
    if args.json:
        output.answer_json({"registry": key, "username": credential.username, "authfile": str(file.path)})
    else:
        output.answer(f"logged in to {key} as {credential.username}")
    return Exit.OK


def registry_key(text: str) -> str:
    """``HOST[:PORT][/REPOSITORY]``, checked; a scheme before it and a slash after it are taken off.

    Raises:
        ReferenceInvalid, InputError: it is none.
    """
    from ovms.oci.reference import Reference

    bare = text.removeprefix("https://").removeprefix("http://").rstrip("/")
    host, slash, repository = bare.partition("/")
    known = host if "." in host or ":" in host or host == "localhost" else f"{host}:443"
    reference = Reference.parse(f"{known}/{repository or 'x'}")
    if reference.registry is None or reference.digest or ":" in repository or not host:
        raise InputError(f"{text[:120]!a} is no HOST[:PORT][/REPOSITORY]", hint="write it like registry.example:5000")
    return f"{host}{slash}{repository}"


def auth_file(path: Path | None) -> AuthFile:
    """The file that is worked on."""
    import os

    from ovms.oci.authfile import AuthFile

    return AuthFile.from_environment() if path is None else AuthFile(path, os.environ)


def _show(args: argparse.Namespace, file: AuthFile, key: str) -> int:
    # whatever file it is in, as a pull would find it
    from ovms.oci.credentials import Credentials

    host, _, repository = key.partition("/")
    found = file.get(key) if args.authfile else Credentials.from_environment().get(host, repository)
    if found is None:
        raise NotFound(f"nobody is logged in to {key}", hint=f"log in with: ovm login {key}")
    if args.json:
        output.answer_json({"registry": key, "username": found.username})
    else:
        output.answer(found.username)
    return Exit.OK


def _ask(args: argparse.Namespace) -> tuple[str, str]:
    if args.password_stdin:
        if not args.username:
            raise UsageError("--password-stdin needs --username")
        data = sys.stdin.buffer.read(_SECRET_MAX + 1)
        try:
            password = data.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError("the password is not UTF-8") from None
        password = password.removesuffix("\n").removesuffix("\r")
        username = args.username
    else:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask on", hint="use --username and --password-stdin")
        import getpass

        username = args.username or _line("Username: ")
        try:
            password = getpass.getpass()
        except EOFError:
            raise UsageError("no password was typed") from None
    if not username or ":" in username or not username.isprintable():
        raise InputError("a user name must not be empty, and holds no ':' and no control characters")
    if not password or len(password) > _SECRET_MAX or not password.isprintable():
        raise InputError(
            f"a password has 1 to {_SECRET_MAX} characters, and no control characters",
            hint="--password-stdin takes one line",
        )
    return username, password


def _line(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline(_SECRET_MAX).strip()
