"""Copy files and directories to or from a guest that runs qemu-guest-agent: SOURCE or TARGET is INSTANCE:PATH.

    ovm cp nginx.conf web:/etc/nginx/
    ovm cp web:/var/log/nginx/access.log .
    ovm cp site web:/srv            # becomes /srv/site
    ovm cp site/. web:/srv          # what is in it goes to /srv
    ovm cp web:/etc/nginx backup    # 'backup' where it is not there yet, else backup/nginx

A target that is a directory gets the source under its name. A directory whose path ends in '/.' stands for what is in it. What is
new appears when it is whole; in a directory that is there already, what has the same names is replaced. Permissions are kept, owners
are not. Links out of the directory, devices, pipes and sockets that a guest sends are left out. Directories need tar in the guest,
and room for them twice.
"""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import FileProblem, NotFound, Unsupported, UsageError

if TYPE_CHECKING:
    from ovms.runtime.agent import Agent
    from ovms.runtime.trees import Copied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "--wait", metavar="SECONDS", type=values.seconds, help="wait for an agent that is yet to start, such as at boot"
    )
    parser.add_argument("source", metavar="SOURCE", help="a file or directory, or INSTANCE:PATH")
    parser.add_argument("target", metavar="TARGET", help="a file or directory, or INSTANCE:PATH")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    from ovms.runtime import guest

    (source_vm, source), (target_vm, target) = guest.place(args.source), guest.place(args.target)
    if (source_vm is None) == (target_vm is None):
        raise UsageError("one of SOURCE and TARGET has to be INSTANCE:PATH, and the other a file of this host")
    instances = context.runtime.instances
    record = instances.find(source_vm or target_vm or "")
    agent = guest.agent_of(instances, record, wait=args.wait)
    if target_vm is not None:
        where, tree = _put(context, agent, source, target)
        where = f"{record.name}:{where}"
    else:
        path, tree = _get(context, agent, source, Path(target))
        where = str(path)
    if tree is not None and tree.left_out_count:
        names = ", ".join(tree.left_out)
        more = ", …" if tree.left_out_count > len(tree.left_out) else ""
        output.say(
            f"left out, as links that lead elsewhere, devices, pipes or sockets: {tree.left_out_count} ({names}{more})"
        )
    if args.json:
        counts = {} if tree is None else {"files": tree.files, "left_out": tree.left_out_count}
        output.answer_json({"source": args.source, "target": where, **counts})
    return Exit.OK


def _put(context: Context, agent: Agent, source: str, target: str) -> tuple[str, Copied | None]:
    from ovms.runtime import guest, guesttrees

    path = Path(source)
    if path.is_dir():
        with agent, context.progress.task(path.name or source) as task:
            return guesttrees.put(agent, path, target, name=_name(source), advance=task.advance)
    fd = _open(path)
    try:
        info = os.fstat(fd)
        with agent, context.progress.task(path.name, info.st_size) as task:
            return guest.put(agent, fd, target, name=path.name, mode=info.st_mode, advance=task.advance), None
    finally:
        os.close(fd)


def _name(source: str) -> str | None:
    # the name that a directory's copy gets in another; None: it is its content that is copied
    name = source.rstrip("/").rpartition("/")[2]
    return None if name in ("", ".", "..") else name


def _open(source: Path) -> int:
    # like fsutil.open_input, but an empty file is as good as another
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileProblem(f"there is no file {source}", code="file-missing", path=str(source)) from None
    except OSError as exc:
        raise FileProblem(f"cannot read {source}: {exc.strerror}", path=str(source)) from exc
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise FileProblem(f"{source} is not a regular file", code="file-not-regular", path=str(source))


def _get(context: Context, agent: Agent, source: str, target: Path) -> tuple[Path, Copied | None]:
    from ovms.runtime import guest, guesttrees

    name = _name(source)
    with agent:
        if guest.kind(agent, source) is guest.Kind.DIRECTORY:
            with context.progress.task(name or source) as task:
                return guesttrees.get(agent, source, target, name=name, advance=task.advance)
        if target.is_dir():
            if name is None:
                raise UsageError("the source has no name that its copy could have")
            target = target / name
        if target.is_dir() or (target.exists() and not target.is_file()):
            raise Unsupported(f"{target} is no file, and is not replaced")
        if not target.parent.is_dir():
            raise NotFound(f"there is no directory {target.parent}")
        with context.progress.task(name or source) as task:
            guest.get(agent, source, target, advance=task.advance)
    return target, None
