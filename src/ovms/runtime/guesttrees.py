"""Directories that are copied into a guest and out of it, by its agent and its ``tar``: what of them is done in the guest.

The archive is a file in the guest while it lasts, for a program's output there ends at 16 MiB. Going in it is unpacked beside its
target, so that what breaks off leaves the target as it was; what takes a new name appears whole.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import GuestError, NotFound, Unsupported
from ovms.runtime import guest, trees
from ovms.runtime.agent import Agent
from ovms.runtime.guest import Kind
from ovms.text import printable

#: Makes an archive of the directory $0, as a file that is new and nobody else's, and gives out its name.
_PACK: Final = """\
at=$(mktemp /var/tmp/ovm-cp.XXXXXX 2>/dev/null || mktemp /tmp/ovm-cp.XXXXXX) || exit 1
trap 'rm -f "$at"; exit 1' TERM
tar -C "$0" -cf "$at" . || { code=$?; [ $code -eq 1 ] && echo changed || { rm -f "$at"; exit $code; }; }
printf '%s' "$at"
"""
#: What GNU's tar says, and ends with 1, of a file that grew meanwhile: what it has of it is as good as at any other moment.
_CHANGED: Final = (b"file changed as we read it", b"File removed before we read it", b"socket ignored")
#: Unpacks the archive $0 in the new directory $1, and gives that the name $2, or puts what is in it into that directory.
_UNPACK: Final = """\
trap 'rm -rf -- "$0" "$1"' EXIT
trap 'exit 1' TERM
mkdir -m 700 -- "$1" && tar -C "$1" -xpf "$0" && rm -f -- "$0" || exit 1
[ -d "$2" ] || { mv -- "$1" "$2"; exit; }
for one in "$1"/* "$1"/.[!.]* "$1"/..?*; do
    [ -e "$one" ] || [ -L "$one" ] || continue
    cp -a -- "$one" "$2/" || exit 1
done
"""


def put(
    agent: Agent, source: Path, path: str, *, name: str | None, advance: Callable[[int], None] = lambda _: None
) -> tuple[str, trees.Copied]:
    """Copies a directory into the guest: as *path* where nothing is there, else into it under *name* (None: its content).

    What is there already under the same names is replaced, and all else stays. Returns its path there, and what was copied.

    Raises:
        NotFound: there is no directory for it in the guest.
        Unsupported: what is there is no directory; or the guest has no tar.
        FileProblem: the source cannot be read.
        GuestError: the agent refused, or the guest has no room: what was there is as it was, unless that was while it was replaced.
    """
    target = _target(agent, path, name)
    parent, _, base = target.rpartition("/")
    beside = f"{parent}/.{base[:100]}.{fsutil.unique(6)}"
    archive, made = f"{beside}.tar.tmp", f"{beside}.tmp"
    try:
        with guest.opened(agent, archive, "w") as handle:
            buffer = bytearray()

            def write(data: bytes) -> None:
                buffer.extend(data)
                if len(buffer) >= guest.BLOCK:
                    flush()

            def flush() -> None:
                while buffer:
                    guest.write(agent, handle, bytes(buffer[: guest.BLOCK]), advance)
                    del buffer[: guest.BLOCK]

            copied = trees.pack(source, write)
            flush()
        done = guest.run(agent, ["sh", "-c", _UNPACK, archive, made, target])
        if done.code != 0:
            raise _no_tar(done) or GuestError(f"the guest does not unpack {printable(target)}: {guest.said(done)}")
    except BaseException:
        with contextlib.suppress(GuestError):
            guest.run(agent, ["rm", "-rf", "--", archive, made], timeout=guest.TIDY)
        raise
    return target, copied


def _target(agent: Agent, path: str, name: str | None) -> str:
    found = guest.kind(agent, path)
    if found is Kind.DIRECTORY and name is not None:
        path = f"{path.rstrip('/')}/{name}"
        found = guest.kind(agent, path)
    path = path.rstrip("/") or "/"
    if found not in (Kind.DIRECTORY, Kind.NOTHING):
        raise Unsupported(f"{printable(path)} in the guest is no directory, and is not replaced by one")
    parent = path.rpartition("/")[0] or "/"
    if found is Kind.NOTHING and guest.kind(agent, parent) is not Kind.DIRECTORY:
        raise NotFound(f"there is no directory {printable(parent)} in the guest")
    return path


def get(
    agent: Agent, path: str, target: Path, *, name: str | None, advance: Callable[[int], None] = lambda _: None
) -> tuple[Path, trees.Copied]:
    """Copies a directory of the guest: as *target* where nothing is there, else into it under *name* (None: its content).

    Nothing outside of the target is touched, whatever the guest sends; see :mod:`ovms.runtime.trees`. Raises like :func:`put`, and:

    Raises:
        DiskFull: the guest gives more than there is room for. Nothing was done, as with any other error but one while files are replaced.
    """
    if target.is_dir() and name is not None:
        target = target / name
    if target.exists() and not target.is_dir():
        raise Unsupported(f"{target} is no directory, and is not replaced by one")
    if not target.parent.is_dir():
        raise NotFound(f"there is no directory {target.parent}")
    parent = target if target.is_dir() else target.parent
    with contextlib.ExitStack() as scratch, fsutil.noticing_full_disk("the copy", parent):
        archive = scratch.enter_context(tempfile.TemporaryFile(dir=parent, buffering=0))
        _fetch(agent, path, archive.fileno(), parent, advance)
        made = parent / f".{target.name[:100]}.{fsutil.unique(6)}.tmp"
        made.mkdir(mode=0o700)
        scratch.callback(fsutil.remove_tree, made)
        copied = trees.unpack(archive.fileno(), made)
        made.chmod(0o777 & ~trees.umask())
        trees.settle(made, target)
    return target, copied


def _fetch(agent: Agent, path: str, fd: int, where: Path, advance: Callable[[int], None]) -> None:
    done = guest.run(agent, ["sh", "-c", _PACK, path])
    text = done.stdout.decode("utf-8", "replace")
    changed = text.startswith("changed\n")
    archive = text.removeprefix("changed\n")
    if done.code != 0 or not archive.startswith("/") or len(archive) > 100:
        raise _no_tar(done) or GuestError(f"the guest does not pack {printable(path)}: {guest.said(done)}")
    try:
        lines = done.stderr.splitlines()
        if changed and not all(line.endswith(_CHANGED) for line in lines):
            raise GuestError(f"the guest does not pack all of {printable(path)}: {guest.said(done)}")
        with guest.opened(agent, archive, "r") as handle:
            # from here on the guest keeps it as long as it is open, and no longer
            guest.run(agent, ["rm", "-f", "--", archive], timeout=guest.SMALL)
            guest.read(agent, handle, fd, where, advance)
    except BaseException:
        with contextlib.suppress(GuestError):
            guest.run(agent, ["rm", "-f", "--", archive], timeout=guest.TIDY)
        raise


def _no_tar(done: guest.Finished) -> Unsupported | None:
    if done.code == guest.NO_PROGRAM or b"tar: not found" in done.stderr or b"tar: command not found" in done.stderr:
        return Unsupported("the guest has no tar, which copying directories needs", hint="single files need none")
    return None
