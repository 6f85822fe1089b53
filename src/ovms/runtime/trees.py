"""Directories that are copied out of a guest and into one, as tar archives: what of them is done on the host.

A guest's archive is hostile. What is in it is made in a directory that is new and ours alone, every step of every path opened
without following links, so nothing of it can lead elsewhere; and only when all of it is there does it go where it belongs. Links
that would lead out of the copy, devices, pipes and sockets are left out. Permissions are kept as far as the umask allows them;
owners and set-user-ID bits are not.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self, cast

from ovms import fsutil
from ovms.errors import FileProblem, GuestError, InputError, Unsupported
from ovms.lazy import dataclass
from ovms.oci import tar
from ovms.text import printable

if TYPE_CHECKING:
    import tarfile

#: Files, directories and links of one copy.
ENTRIES_MAX: Final = 1_000_000
#: Directories in one another.
DEPTH_MAX: Final = 100
_COPIED: Final = 1 << 20
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LINK, _HARD_LINK, _DIRECTORY = b"2", b"1", b"5"


@dataclass(frozen=True)
class Copied:
    """What a copy has: how many files, and directories and links beside them; what was left out, by name (the first few), and how many."""

    files: int
    others: int
    left_out: tuple[str, ...] = ()
    left_out_count: int = 0


class _Count:
    def __init__(self) -> None:
        self.files = self.others = self.left_out = 0
        self._names: list[str] = []

    def leave_out(self, name: str) -> None:
        self.left_out += 1
        if len(self._names) < 10:
            self._names.append(printable(name)[:200])

    def done(self) -> Copied:
        return Copied(self.files, self.others, tuple(self._names), self.left_out)


# --- out of a guest --------------------------------------------------------------------------------------------------


def unpack(archive: int, directory: Path, advance: Callable[[int], None] = lambda _: None) -> Copied:
    """Makes what is in a guest's tar archive (an open file) in *directory*, which is empty and nobody else's.

    Raises:
        GuestError: it is no archive, or one that is made to harm.
        DiskFull: there is no room.
    """
    with _Unpacker(directory, ~umask() & 0o777) as unpacker:
        try:
            for entry in tar.entries(archive, "what the guest sent", most=ENTRIES_MAX):
                unpacker.make(entry, archive)
                advance(entry.content.size)
        except InputError as exc:
            raise GuestError(exc.message) from exc
        return unpacker.finish()


def umask() -> int:
    """The permissions that this process gives to nobody."""
    was = os.umask(0o077)
    os.umask(was)
    return was


class _Unpacker:
    def __init__(self, directory: Path, allowed: int) -> None:
        self._root = os.open(directory, _FOLDER)
        self._where = directory
        self._allowed = allowed
        self._count = _Count()
        self._modes: dict[tuple[str, ...], int] = {}
        #: The directory that was last used: most of what follows is in it, too.
        self._last: tuple[tuple[str, ...], int] | None = None
        self._room = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        os.close(self._root)

    def _forget(self) -> None:
        if self._last is not None:
            os.close(self._last[1])
            self._last = None

    def make(self, entry: tar.Entry, archive: int) -> None:
        parts = _parts(entry.name)
        if not parts:
            return  # the directory itself
        try:
            parent = self._parent(parts[:-1])
            name = parts[-1]
            if entry.kind == _DIRECTORY or (entry.name.endswith("/") and entry.kind in b"0\0"):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent)
                    self._count.others += 1
                self._modes[parts] = entry.mode
            elif entry.regular:
                self._file(parent, name, entry, archive)
            elif entry.kind == _LINK and _stays_inside(entry.link, len(parts) - 1):
                os.symlink(entry.link, name, dir_fd=parent)
                self._count.others += 1
            elif entry.kind == _HARD_LINK:
                self._hard_link(parent, name, _parts(entry.link))
            else:
                self._count.leave_out(entry.name)
        except OSError as exc:
            self._refuse(entry.name, exc)

    def _refuse(self, name: str, exc: OSError) -> None:
        if (full := fsutil.disk_full(exc, "the copy", self._where)) is not None:
            raise full from exc
        raise GuestError(f"what the guest sent cannot be made here: {printable(name)}: {exc.strerror}") from exc

    def _parent(self, parts: tuple[str, ...]) -> int:
        # A step that is a link, or no directory, is an error: GuestError by way of OSError. Missing ones are made.
        if self._last is not None and self._last[0] == parts:
            return self._last[1]
        fd = os.dup(self._root)
        for part in parts:
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
                below = os.open(part, _FOLDER, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        self._forget()
        self._last = parts, fd
        return fd

    def _file(self, parent: int, name: str, entry: tar.Entry, archive: int) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        try:
            at, end = entry.content.offset, entry.content.offset + entry.content.size
            while at < end:
                if self._room <= 0:
                    self._room = 16 * _COPIED
                    fsutil.require_space(self._where, 17 * _COPIED, "the copy")
                block = os.pread(archive, min(_COPIED, end - at), at)
                if not block:
                    raise GuestError("what the guest sent ends early")
                fsutil.pwrite_all(fd, block, at - entry.content.offset)
                at += len(block)
                self._room -= len(block)
            os.fchmod(fd, entry.mode & self._allowed)
        finally:
            os.close(fd)
        self._count.files += 1

    def _hard_link(self, parent: int, name: str, to: tuple[str, ...]) -> None:
        # to a file of this very copy: no step on the way is a link
        if not to:
            raise GuestError("what the guest sent has a link to nothing")
        held = os.dup(parent)
        try:
            source = self._parent(to[:-1])
            if not stat.S_ISREG(os.stat(to[-1], dir_fd=source, follow_symlinks=False).st_mode):
                self._count.leave_out(name)
                return
            os.link(to[-1], name, src_dir_fd=source, dst_dir_fd=held, follow_symlinks=False)
        finally:
            os.close(held)
        self._count.files += 1

    def finish(self) -> Copied:
        # deepest first: a directory without write permission takes nothing more
        for parts in sorted(self._modes, key=len, reverse=True):
            try:
                fd = self._parent(parts)
                os.fchmod(fd, self._modes[parts] & self._allowed | 0o700)
            except OSError as exc:
                self._refuse("/".join(parts), exc)
        return self._count.done()


def _parts(name: str) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts:
        raise GuestError(f"what the guest sent leads elsewhere: {printable(name)[:200]}")
    if len(parts) > DEPTH_MAX:
        raise GuestError(f"what the guest sent has more than {DEPTH_MAX} directories in one another")
    return parts


def _stays_inside(link: str, depth: int) -> bool:
    # Going up first, and not further than the copy's top, then down: so also through other links of the copy it stays inside.
    # 'a/..' may be elsewhere than it looks, where 'a' is a link.
    parts = [part for part in link.split("/") if part not in ("", ".")]
    up = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    return bool(link) and not link.startswith("/") and up <= depth and ".." not in parts[up:]


def settle(made: Path, target: Path) -> None:
    """Gives a copy that is whole its place: *target* is new, or a directory in which it replaces what has the same names.

    What was there as a link is replaced, never followed.

    Raises:
        Unsupported: a directory would take the place of something else, or the other way round. Nothing was done then.
        FileProblem: the host refused.
    """
    try:
        if not os.path.lexists(target):
            made.rename(target)
            return
        with _opened(made) as ours, _opened(target) as theirs:
            _check(ours, theirs, target)
            _merge(ours, theirs)
    except OSError as exc:
        raise FileProblem(f"the copy cannot be put to {target}: {exc.strerror}", path=str(target)) from exc


@contextlib.contextmanager
def _opened(path: Path | str, inside: int | None = None) -> Iterator[int]:
    fd = os.open(path, _FOLDER if inside is not None else _FOLDER & ~os.O_NOFOLLOW, dir_fd=inside)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_directory(fd: int, name: str) -> bool | None:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _check(ours: int, theirs: int, where: Path) -> None:
    for name in os.listdir(ours):
        new, old = _is_directory(ours, name), _is_directory(theirs, name)
        if old is not None and new != old:
            kind = "a directory" if old else "no directory"
            raise Unsupported(f"{where}/{printable(name)} is {kind}, and is not replaced")
        if new and old:
            with _opened(name, ours) as mine, _opened(name, theirs) as its:
                _check(mine, its, where / name)


def _merge(ours: int, theirs: int) -> None:
    for name in os.listdir(ours):
        if _is_directory(ours, name) and _is_directory(theirs, name):
            with _opened(name, ours) as mine, _opened(name, theirs) as its:
                _merge(mine, its)
        else:
            os.rename(name, name, src_dir_fd=ours, dst_dir_fd=theirs)


# --- into a guest ----------------------------------------------------------------------------------------------------


def pack(directory: Path, write: Callable[[bytes], object]) -> Copied:
    """Writes a tar archive of what is in *directory*, piece by piece. Links stay what they are; all belongs to the superuser.

    Raises:
        FileProblem: something of it cannot be read, or is another by now.
    """
    import tarfile

    stream = cast("IO[bytes]", _Stream(write))
    count = _Count()
    try:
        # GNU's way to write long names: busybox knows no other
        with tarfile.open(
            fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            _add(archive, directory, ".", count)
    except OSError as exc:
        place = str(exc.filename or directory)
        raise FileProblem(f"cannot read {place}: {exc.strerror or exc}", path=place) from exc
    return count.done()


class _Stream:
    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        self._write(data)
        return len(data)


def _add(archive: tarfile.TarFile, path: Path, name: str, count: _Count) -> None:
    kind = stat.S_IFMT(path.lstat().st_mode) if name != "." else stat.S_IFDIR
    if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        count.leave_out(name.removeprefix("./"))
        return
    member = archive.gettarinfo(path if name != "." else path / ".", name)
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode &= 0o777
    member.mtime = max(0, int(member.mtime))
    if member.isreg():
        with path.open("rb") as file:
            archive.addfile(member, file)
        count.files += 1
        return
    archive.addfile(member)
    if name != ".":
        count.files, count.others = count.files + member.islnk(), count.others + (not member.islnk())
    if member.isdir():
        if name.count("/") > DEPTH_MAX:
            raise FileProblem(f"{path} has more than {DEPTH_MAX} directories above it in the copy", path=str(path))
        for entry in sorted(os.listdir(path)):
            _add(archive, path / entry, f"{name}/{entry}", count)
