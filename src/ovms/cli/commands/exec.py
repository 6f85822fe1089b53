"""Run a program in a guest, where that runs qemu-guest-agent. The program's exit code is ours.

    ovm exec web -- systemctl is-active nginx
    ovm exec -i web -- sh -c 'cat > /etc/motd' < motd

What the agent can do is less than what 'docker exec' does: there is no terminal (use 'ovm console', or ssh); stdin (-i)
is handed over whole before the program starts, and what the program says is shown when it has ended, at most 16 MiB of
each. On Ctrl-C the program is asked to end (SIGTERM). With 126 the program could not be run, with 127 there is none;
128 + N means that signal N ended it. ovm's own errors have the codes that they always have, and are said on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.errors import InputError, Unsupported, UsageError

if TYPE_CHECKING:
    from ovms.runtime.guest import Finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("-i", "--interactive", action="store_true", help="hand over stdin (whole, at most 16 MiB)")
    parser.add_argument("-t", "--tty", action="store_true", help="not possible: the agent has no terminal")
    parser.add_argument(
        "-e", "--env", metavar="NAME=VALUE", action="append", default=[], help="set a variable; may be repeated"
    )
    parser.add_argument("-w", "--workdir", metavar="DIR", help="run it in this directory of the guest")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=values.seconds, help="end the program after this time (default: never)"
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=values.seconds, help="wait for an agent that is yet to start, such as at boot"
    )
    parser.add_argument("--raw", action="store_true", help="on a terminal: let escape sequences of the guest through")
    parser.add_argument("instance", metavar="INSTANCE", help="a name, an ID, or the first digits of one")
    parser.add_argument("argv", metavar="PROGRAM", nargs=argparse.REMAINDER, help="-- PROGRAM [ARGUMENT...]")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv or not argv[0]:
        raise UsageError("there is no program to run", hint="ovm exec INSTANCE -- PROGRAM [ARGUMENT...]")
    if argv[0].startswith("-"):
        raise UsageError(
            f"{argv[0][:40]!a} stands after INSTANCE, where the program begins", hint="options come before it"
        )
    if args.tty:
        raise Unsupported(
            "-t: the guest's agent gives a program no terminal",
            hint="'ovm console' is the guest's own terminal; ssh to a forwarded port gives another one",
        )
    from ovms.runtime import guest
    from ovms.runtime.agent import AgentRefused

    env = _environment(args.env)
    instances = context.runtime.instances
    agent = guest.agent_of(instances, instances.find(args.instance), wait=args.wait)
    stdin = _stdin() if args.interactive else b""
    with agent:
        try:
            done = guest.run(agent, argv, stdin=stdin, env=env, directory=args.workdir, timeout=args.timeout)
        except AgentRefused as exc:
            code = guest.refusal_code(exc)
            if code is None:
                raise
            output.complain(exc, as_json=args.json)
            return code
    _show(args, done)
    return done.code


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    answer = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-e {pair[:40]!a} is not of the form NAME=VALUE")
        answer[name] = value
    return answer


def _stdin() -> bytes:
    from ovms.runtime.guest import STREAM_MAX

    data = sys.stdin.buffer.read(STREAM_MAX + 1)
    if len(data) > STREAM_MAX:
        raise InputError(
            f"stdin has more than {STREAM_MAX} bytes, which is what the guest's agent takes",
            hint="copy it into the guest as a file: ovm cp",
        )
    return data


def _show(args: argparse.Namespace, done: Finished) -> None:
    from ovms.cli.terminal import writer
    from ovms.runtime.guest import STREAM_MAX

    if args.json:
        output.answer_json(
            {
                "exit_code": done.code,
                "stdout": done.stdout.decode("utf-8", "replace"),
                "stderr": done.stderr.decode("utf-8", "replace"),
                "truncated": done.truncated,
            }
        )
        return
    for stream, said in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
        write = writer(stream, raw=args.raw)
        write(said)
        write.end()
    if done.truncated:
        output.say(f"the program said more than {STREAM_MAX} bytes, which the guest's agent did not keep")
