"""Copy a file to or from a guest that runs qemu-guest-agent: SOURCE or TARGET is INSTANCE:PATH.

    ovm cp nginx.conf web:/etc/nginx/
    ovm cp web:/var/log/nginx/access.log .

A target that is a directory gets the file under the source's name. The file appears when it is whole, with the source's
permissions. Directories are not copied; tar and 'ovm exec' do that for up to 16 MiB.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "--wait", metavar="SECONDS", type=values.seconds, help="wait for an agent that is yet to start, such as at boot"
    )
    parser.add_argument("source", metavar="SOURCE", help="a file, or INSTANCE:PATH")
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
        where = f"{record.name}:{_put(context, agent, Path(source), target)}"
    else:
        where = str(_get(context, agent, source, Path(target)))
    if args.json:
        output.answer_json({"source": args.source, "target": where})
    return Exit.OK


def _put(context: Context, agent: Agent, source: Path, target: str) -> str:
    from ovms.runtime import guest

    fd = _open(source)
    try:
        info = os.fstat(fd)
        with agent, context.progress.task(source.name, info.st_size) as task:
            return guest.put(agent, fd, target, name=source.name, mode=info.st_mode, advance=task.advance)
    finally:
        os.close(fd)


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
    if stat.S_ISDIR(mode):
        raise Unsupported(
            f"{source} is a directory, and only files are copied",
            hint=f"tar -C {source} -c . | ovm exec -i INSTANCE -- tar -C DIR -x",
        )
    raise FileProblem(f"{source} is not a regular file", code="file-not-regular", path=str(source))


def _get(context: Context, agent: Agent, source: str, target: Path) -> Path:
    from ovms.runtime import guest

    name = source.rstrip("/").rpartition("/")[2]
    if target.is_dir():
        if not name or name in (".", ".."):
            raise UsageError("the source has no name that its copy could have")
        target = target / name
    if target.is_dir() or (target.exists() and not target.is_file()):
        raise Unsupported(f"{target} is no file, and is not replaced")
    if not target.parent.is_dir():
        raise NotFound(f"there is no directory {target.parent}")
    with agent, context.progress.task(name) as task:
        guest.get(agent, source, target, advance=task.advance)
    return target
