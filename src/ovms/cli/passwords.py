"""Passwords of keys: from a descriptor, the environment, or a prompt; never from the command line, which others can read."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Final

from ovms.errors import InputError, UsageError
from ovms.trust.external import PASSWORD_VARIABLES

if TYPE_CHECKING:
    from ovms.trust.keys import AskPassword

#: Bytes of a password.
_MAX: Final = 4096


def add_password_fd(parser: argparse.ArgumentParser) -> None:
    """Adds ``--password-fd``."""
    parser.add_argument(
        "--password-fd",
        metavar="N",
        type=int,
        help="read the key's password from this file descriptor, up to its end or the first newline "
        f"(else: {', '.join(PASSWORD_VARIABLES)}; else it is asked for)",
    )


def asker(fd: int | None, prompt: str, *, twice: bool = False) -> AskPassword:
    """What gives the password when it is needed. *twice*: a new one, which is asked for again if it is typed.

    It raises :class:`UsageError` where there is nobody to ask, :class:`InputError` for what is no password.
    """
    given: list[bytes] = []

    def ask() -> bytes:
        # a descriptor can be read once alone
        if not given:
            given.append(_get(fd, prompt, twice))
        return given[0]

    return ask


def _get(fd: int | None, prompt: str, twice: bool) -> bytes:
    if fd is not None:
        return _of_descriptor(fd)
    for name in PASSWORD_VARIABLES:
        if (value := os.environb.get(name.encode())) is not None:
            return _checked(value)
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            "a password is needed, and there is no terminal to ask on",
            hint=f"use --password-fd, or set {PASSWORD_VARIABLES[0]}",
        )
    import getpass

    try:
        password = getpass.getpass(f"{prompt}: ")
        if twice and getpass.getpass("Again: ") != password:
            raise InputError("the two passwords are not the same")
    except EOFError:
        raise UsageError("no password was typed") from None
    return _checked(password.encode("utf-8", "surrogateescape"))


def _of_descriptor(fd: int) -> bytes:
    if fd < 0:
        raise UsageError(f"--password-fd {fd} is no file descriptor")
    data = b""
    try:
        while b"\n" not in data and len(data) <= _MAX and (more := os.read(fd, _MAX + 1)):
            data += more
    except OSError as exc:
        raise UsageError(f"--password-fd {fd} can't be read: {exc.strerror}") from None
    return _checked(data.partition(b"\n")[0].removesuffix(b"\r"))


def _checked(password: bytes) -> bytes:
    if len(password) > _MAX:
        raise InputError(f"a password has at most {_MAX} bytes")
    return password
