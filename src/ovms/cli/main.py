"""From ``argv`` to a command, and from errors to exit codes.

Only the module of the command that runs is imported: a command line has to answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final, NoReturn

from ovms import __version__, coredump
from ovms.cli.exitcodes import Exit, exit_code
from ovms.errors import DiskFull, HostError, OvmsError, UsageError

#: Command → what it does, in the order of the help text. Each is a module of ``ovms.cli.commands``.
COMMANDS: Final = {
    "build": "Build an artifact from a manifest",
    "pull": "Fetch an artifact from a registry or a file",
    "push": "Upload an artifact to a registry, or write it to a file",
    "ls": "List the artifacts in the local store",
    "inspect": "Show what an artifact or an instance is made of",
    "validate": "Check a file or an artifact against the specification",
    "unpack": "Write an artifact's parts into a directory",
    "tag": "Give an artifact another name",
    "attach": "Attach a file to an artifact: a signature, an SBOM",
    "referrers": "Show what refers to an artifact: signatures, SBOMs, snapshots",
    "key": "Make and convert keys for signing",
    "sign": "Sign an artifact",
    "verify": "Check who signed an artifact",
    "policy": "Show the policies, or what they make of an artifact",
    "rmi": "Remove artifacts from the local store",
    "prune": "Remove what nothing needs from the local store",
    "df": "Show what takes room: artifacts, memories, downloads, instances",
    "fsck": "Check the local store, and repair it",
    "run": "Start a VM from an artifact",
    "warm": "Let clones of a RAM snapshot wait for the next starts",
    "ps": "List instances",
    "logs": "Show what an instance's console printed",
    "console": "Put the terminal on an instance's serial console",
    "exec": "Run a program in a guest that has qemu-guest-agent",
    "cp": "Copy a file to or from a guest that has qemu-guest-agent",
    "port": "List and change the forwarded ports of an instance",
    "events": "Show what happens to instances",
    "pause": "Let instances' CPUs stand still",
    "resume": "Let them go on",
    "stop": "Power instances down",
    "rm": "Remove instances",
    "inject": "Write into memory that an instance shares with the host",
    "snapshot": "Snapshot a running instance as an artifact",
    "fork": "Start clones of a running instance, or of a snapshot",
    "commit": "Make an artifact of what an instance wrote to its disk",
    "export": "Write a disk as one image",
    "login": "Log in to a registry",
    "logout": "Forget the login to a registry",
    "doctor": "Tell what this host can do for VMs",
    "serve": "Serve the runtime contract",
    "version": "Show the versions of ovms and of what it uses",
}

#: What ovms runs itself.
INTERNAL: Final = frozenset({"ended"})

#: What works on what is there: where there is nothing yet, nothing is made, lest a mistyped OVMS_ROOT becomes a new store.
LOOKING: Final = frozenset((
    "ls", "inspect", "push", "tag", "referrers", "sign", "verify", "policy", "rmi", "prune", "df", "fsck", "ps", "logs", "console",
    "exec", "cp", "port", "stop", "rm", "inject", "snapshot", "commit", "export", "unpack", "pause", "resume", "version",
))  # fmt: skip

#: How much a mistyped command has to have in common with one that is suggested: "bogus" is no "logs".
_NEAR: Final = 0.75

DEBUG_VARIABLE: Final = "OVMS_DEBUG"


class _Terminated(BaseException):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that nothing half-done is left."""

    def __init__(self, number: int) -> None:
        self.number = number


class Formatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal. argparse makes one for each argument; its own way there imports ``shutil``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    # shutil.get_terminal_size
    with contextlib.suppress(ValueError):
        if (said := int(os.environ.get("COLUMNS", "0"))) > 0:
            return said
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return 80


# argparse has each of its words translated; the first time, that takes as long as all the rest of a parser, and finds nothing.
argparse._ = str  # type: ignore[attr-defined]


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`UsageError`."""
        raise UsageError(message, hint=f"'{self.prog} --help' shows how it is used")

    def _print_message(self, message: str, file: Any = None) -> None:
        # of --help and --version: argparse hides that it could not be written, until Python's end
        print(message, end="", file=file or sys.stderr, flush=True)


def build_parser() -> Parser:
    """The parser of what stands before the command."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="ovm",
        usage="ovm [--root DIR] [--host unix:PATH] [--progress MODE] COMMAND ...",
        description="Build, ship and run virtual machines as OCI artifacts.",
        epilog=f"commands:\n{listing}\n\n'ovm COMMAND --help' tells more about each.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ovm {__version__}")
    parser.add_argument("--root", metavar="DIR", help="where artifacts and instances live (else: OVMS_ROOT)")
    parser.add_argument(
        "--host",
        metavar="unix:PATH",
        help="the server to ask, or 'local' for none (else: OVMS_SOCKET; else one on ovms.sock in the root, if it lives)",
    )
    parser.add_argument(
        "--progress",
        metavar="MODE",
        default="auto",
        choices=("auto", "bar", "json", "none"),
        help="how long work reports on stderr: auto, bar, json (lines), none",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def command_parser(name: str) -> tuple[Parser, Any]:
    """The parser of one command, and its module."""
    module = importlib.import_module(f"ovms.cli.commands.{name}")
    parser = Parser(
        prog=f"ovm {name}",
        description=module.__doc__,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="answer with one JSON document")
    module.add_arguments(parser)
    return parser, module


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``ovm`` and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    coredump.leave_no_core()
    try:
        return _run(arguments)
    except SystemExit as exc:  # --help and --version
        return exc.code if isinstance(exc.code, int) else 0
    except _Terminated as exc:
        return 128 + exc.number
    except KeyboardInterrupt:
        from ovms.cli import output

        output.say("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _say_no_more()  # whoever read our answer has gone
        return Exit.OK
    except OvmsError as exc:
        return _fail(exc, as_json)
    except OSError as exc:
        return _fail(_stdout_error() or _host_error(exc), as_json)
    except Exception as exc:  # noqa: BLE001 - no traceback reaches a user
        return _bug(exc)


def _run(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    if not options.command:
        raise UsageError("no command", hint="'ovm --help' lists them")
    name, *rest = options.command
    if name not in COMMANDS and name not in INTERNAL:
        raise UsageError(f"there is no command {name[:40]!a}", hint=_suggestion(name))
    parser, module = command_parser(name)
    # (the other way knows no subcommands, and takes no rest of the line as it is)
    args = (parser.parse_intermixed_args if getattr(module, "INTERMIXED", False) else parser.parse_args)(rest)

    from ovms.cli.context import Context

    tls_verify = getattr(args, "tls_verify", None)
    progress = "none" if getattr(args, "no_progress", False) else options.progress
    context = Context(options.root, progress, tls_verify, options.host, looking=name in LOOKING, quiet=args.json)
    try:
        code = int(module.run(args, context))
        sys.stdout.flush()
        return code
    except OSError as exc:
        # of a write; what was named by its path is told with that
        if exc.filename or exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        from ovms import fsutil

        raise (_stdout_error() or fsutil.disk_full(exc, f"ovm {name}", context.root.path) or exc) from exc
    finally:
        context.close()


def _open_streams() -> None:
    # Where we were started with one of them closed, the next file of ours would be it, and get what is printed.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _say_no_more() -> None:
    # also not when Python flushes at its end
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stdout_error() -> OvmsError | None:
    # what could not be written is still in the buffer, and meets the same error again
    try:
        sys.stdout.flush()
    except OSError as exc:
        _say_no_more()
        message = f"the answer cannot be written to stdout: {exc.strerror or exc}"
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(message, hint="free some space where stdout goes to, and try again")
        return HostError(message)
    return None


def _host_error(exc: OSError) -> OvmsError:
    if not exc.filename:
        return HostError(exc.strerror or str(exc))
    from pathlib import Path

    from ovms import fsutil

    place = str(exc.filename)
    full = fsutil.disk_full(exc, place, Path(place).parent)
    return full or HostError(f"{place}: {exc.strerror or exc}")


def _suggestion(name: str) -> str:
    import difflib

    # what Docker users type
    known = {
        "images": "ls",
        "image": "ls",
        "kill": "stop",
        "delete": "rm",
        "start": "run",
    }
    near = known.get(name) or next(iter(difflib.get_close_matches(name, COMMANDS, 1, _NEAR)), None)
    return f"did you mean 'ovm {near}'?" if near else "'ovm --help' lists the commands"


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated(number)


def _fail(error: OvmsError, as_json: bool) -> int:
    from ovms.cli import output

    output.complain(error, as_json=as_json)
    return exit_code(error)


def _bug(exc: Exception) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        from ovms.cli import output

        for line in traceback.format_exc().splitlines():
            print(output.safe(line), file=sys.stderr)
    print(
        f"ovm: internal error: {type(exc).__name__}: {str(exc)[:500]!a}\n"
        f"  hint: this is a bug in ovms; report it with the output of {DEBUG_VARIABLE}=1",
        file=sys.stderr,
    )
    return Exit.INTERNAL
