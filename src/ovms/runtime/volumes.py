"""Volumes: disks and directories of the user's that a VM gets beside its artifact's disk.

A file's format is what the user says, and nothing in it is believed: the guest writes it, and could else make QEMU take a raw
disk for a qcow2 image that names a file of the host. Two VMs never write to one file, and none reads what another writes:
``flock`` on the descriptor that the VMM inherits says so, and goes when its last holder dies. (QEMU has locks of its own
beside that, which keep out ``qemu-img`` and other people's QEMU.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from ovms import fsutil
from ovms.disk.layers import check_layer
from ovms.errors import DiskInvalid, FileProblem, InputError, Locked, Unsupported, UsageError
from ovms.lazy import dataclass, regex
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat
from ovms.vmm.extras import BY_9P, BY_VIRTIOFS, SHARES_MAX, VOLUMES_MAX, ExtraDisk, Share

_NAME: Final = regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,19}")
#: A blank, a tab, a line's end and a backslash, as ``mountinfo`` has them.
_OCTAL: Final = regex(r"\\([0-7]{3})")
#: Seconds to wait for a lock: a watcher has the descriptors of its VM for some moments after it was started.
LOCK_WAIT: Final = 0.5
#: Where no files of the host are, but what the kernel makes up.
_NO_FILES: Final = ("/proc", "/sys", "/dev")
#: What a host runs, or believes, whoever wrote it: no guest writes to it, or to anything in it.
_TRAPS: Final = tuple(
    Path(path) for path in ("/bin", "/boot", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/run", "/sbin", "/usr")
)
_FORMATS: Final = (DiskFormat.RAW, DiskFormat.QCOW2)
_FORM: Final = "write FILE[,format=raw|qcow2][,ro][,serial=NAME], or DIRECTORY[,ro|rw][,tag=NAME][,via=9p|virtiofs]; a comma in a path is written twice"


@dataclass(frozen=True)
class Volume:
    """A file, or a directory (``format`` is None then); ``name`` is the serial number or tag that the guest sees, ``via`` how a
    directory is shared.

    ``stated`` says whether the user named the format: raw is meant then, whatever the file begins with.
    """

    path: Path
    format: DiskFormat | None
    read_only: bool
    name: str
    stated: bool = True
    via: str = BY_9P

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "path": str(self.path),
            "format": None if self.format is None else str(self.format),
            "read_only": self.read_only,
            "name": self.name,
            **({"via": self.via} if self.format is None else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError on anything that :meth:`to_json` does not write."""
        format = value["format"]
        return cls(
            Path(value["path"]),
            None if format is None else DiskFormat(format),
            bool(value["read_only"]),
            str(value["name"]),
            via=str(value.get("via", BY_9P)),
        )


def parse(texts: Sequence[str]) -> tuple[Volume, ...]:
    """Reads what follows each ``--volume``. Without a name, the first is ``vol0``, the second ``vol1``, ….

    Raises:
        UsageError: not of the form, too many, or two of one name.
        FileProblem: nothing is there.
    """
    volumes = tuple(_parse(text, f"vol{i}") for i, text in enumerate(texts))
    for kind, most, count in (
        ("disks", VOLUMES_MAX, sum(v.format is not None for v in volumes)),
        ("directories", SHARES_MAX, sum(v.format is None for v in volumes)),
    ):
        if count > most:
            raise UsageError(f"{count} {kind} are asked for with --volume; a VM has room for {most}")
    names = [volume.name for volume in volumes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two volumes have the name {twice}", hint="give one another, with serial= or tag=")
    return volumes


def _parse(text: str, default: str) -> Volume:
    # no path has a NUL
    path_text, *words = (word.replace("\0", ",") for word in text.replace(",,", "\0").split(","))
    if not path_text or "\0" in text:
        raise UsageError(f"--volume {text[:80]!a} names no file", hint=_FORM)
    options = dict[str, str]()
    for word in words:
        key, _, value = word.partition("=")
        if (
            key in options
            or key not in ("format", "ro", "rw", "serial", "tag", "via")
            or (key in ("ro", "rw")) != (word == key)
        ):
            raise UsageError(f"--volume {text[:80]!a}: there is no option {word[:40]!a} here", hint=_FORM)
        options[key] = value
    path = Path(path_text).absolute()
    directory = _is_directory(path, path_text)
    name = options.get("tag" if directory else "serial", default)
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"--volume {text[:80]!a}: {name[:40]!a} is no name",
            hint="up to 20 letters, digits, '.', '_' and '-', the first a letter or digit",
        )
    if {"ro", "rw"} <= options.keys():
        raise UsageError(f"--volume {text[:80]!a}: 'ro' is not beside 'rw'", hint=_FORM)
    if directory:
        if options.keys() & {"format", "serial"}:
            raise UsageError(f"--volume {text[:80]!a}: a directory has no format and no serial number", hint=_FORM)
        via = options.get("via", BY_9P)
        if via not in (BY_9P, BY_VIRTIOFS):
            raise UsageError(f"--volume {text[:80]!a}: {via[:40]!a} is no way to share a directory", hint=_FORM)
        return Volume(path, None, "rw" not in options, name, via=via)
    if options.keys() & {"tag", "via"}:
        raise UsageError(f"--volume {text[:80]!a}: 'tag' and 'via' are for directories", hint=_FORM)
    format = options.get("format", DiskFormat.RAW)
    if format not in _FORMATS:
        raise UsageError(f"--volume {text[:80]!a}: there is no format {format[:40]!a}", hint="raw (default) or qcow2")
    return Volume(path, DiskFormat(format), "ro" in options, name, stated="format" in options)


def _is_directory(path: Path, text: str) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        hint = "check the path"
        if ":" in text:
            hint = f"a guest mounts its volumes itself: no path in the guest follows. {_FORM}"
        raise FileProblem(f"volume: there is no file {path}", code="file-missing", path=str(path), hint=hint) from None
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or "no file has such a name"
        raise FileProblem(f"volume: cannot read {str(path)!a}: {reason}", path=str(path)) from exc


def open_disks(volumes: Sequence[Volume], root: Path, held: contextlib.ExitStack) -> tuple[ExtraDisk, ...]:
    """Opens, checks and locks the files among *volumes*, until *held* is closed and no VMM has them any more.

    *root*: where our own store is, which no guest gets to write to.

    Raises:
        FileProblem, DiskInvalid: it can't be used.
        Locked: another VM has it.
    """
    disks = []
    for volume in volumes:
        if volume.format is None:
            continue
        what = f"volume {volume.name}"
        fd = _open(volume, what)
        held.callback(os.close, fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if not volume.read_only and path.is_relative_to(root.resolve()):
            raise InputError(
                f"{what}: {volume.path} belongs to ovms, and no guest writes to it",
                hint="take a copy of it",
                path=str(root),
            )
        _check(fd, volume, what)
        _lock(fd, volume, what)
        disks.append(ExtraDisk(fd, path, volume.format, volume.read_only, volume.name))
    return tuple(disks)


def _open(volume: Volume, what: str) -> int:
    # what a file is told by: before it is opened to write, which can have effects on what is none
    fsutil.open_input(volume.path, what).close()
    flags = os.O_RDONLY if volume.read_only else os.O_RDWR
    try:
        fd = os.open(volume.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise FileProblem(
            f"{what}: cannot write to {volume.path}: {exc.strerror}",
            hint="add ',ro' if the guest shall only read it",
            path=str(volume.path),
        ) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileProblem(
            f"{what}: {volume.path} is not a regular file", code="file-not-regular", path=str(volume.path)
        )
    return fd


def _check(fd: int, volume: Volume, what: str) -> None:
    assert volume.format is not None
    if volume.format is DiskFormat.RAW and volume.stated:
        size = os.fstat(fd).st_size
        if size % 512 or not 0 < size <= limits.DISK_VIRTUAL_MAX:
            raise DiskInvalid(f"{what}: a raw disk has a multiple of 512 bytes, not {size}")
        return
    try:
        check_layer(fd, volume.format, f"{what} ({volume.path})")
    except DiskInvalid as exc:
        if volume.format is DiskFormat.RAW and exc.hint is not None:
            exc.hint = "add ',format=qcow2'; or ',format=raw', if the guest shall see these very bytes"
        raise


def _lock(fd: int, volume: Volume, what: str) -> None:
    operation = (fcntl.LOCK_SH if volume.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.flock(fd, operation)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Locked(
                    f"{what}: {volume.path} is in use by another VM",
                    hint="'ovm ps' lists them; several VMs can have it with ',ro'",
                    path=str(volume.path),
                ) from None
            time.sleep(0.01)


def open_directories(volumes: Sequence[Volume], root: Path, held: contextlib.ExitStack) -> tuple[Share, ...]:
    """Opens and checks the directories among *volumes*, until *held* is closed. It is these that the VM gets, whatever their
    names lead to later.

    *root*: as of :func:`open_disks`.

    Raises:
        FileProblem: it can't be used.
        InputError: the guest would write to what is ours.
        Unsupported: what a host has there is not shared, or not to be written to.
    """
    found = []
    for volume in volumes:
        if volume.format is not None:
            continue
        what = f"volume {volume.name}"
        try:
            fd = os.open(volume.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            reason = exc.strerror
            raise FileProblem(f"{what}: cannot use {volume.path}: {reason}", path=str(volume.path)) from exc
        held.callback(os.close, fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path == Path("/") or any(path.is_relative_to(top) for top in _NO_FILES):
            raise Unsupported(f"{what}: {path} is not shared with a guest", hint="name a directory of files")
        if not volume.read_only:
            _check_writable(fd, path, root, what)
        found.append(Share(fd, path, volume.read_only, volume.name, volume.via))
    return tuple(found)


def _mounted_in(directory: Path) -> Iterator[os.stat_result]:
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        point = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), line.split()[4]))
        if point != directory and point.is_relative_to(directory):
            with contextlib.suppress(OSError):
                yield point.stat()


def _is_any_of(path: Path, these: Sequence[os.stat_result]) -> bool:
    try:
        one = path.stat()
    except OSError:
        return False
    return any(os.path.samestat(one, other) for other in these)


def _check_writable(fd: int, path: Path, root: Path, what: str) -> None:
    trap = next((top for top in _TRAPS if path.is_relative_to(top.resolve())), None)
    # by what they are, too, and with what is mounted in there: a bind mount has other names
    shared = [os.fstat(fd), *_mounted_in(path)]
    trap = trap or next((top for top in _TRAPS if _is_any_of(top, shared)), None)
    if trap is not None:
        raise Unsupported(
            f"{what}: {path} is not shared with a guest that writes to it: this host runs, or believes, what is in {trap}",
            hint="add ',ro', or name another directory",
            path=str(path),
        )
    ours = root.resolve()
    above = any(_is_any_of(one, shared) for one in (ours, *ours.parents))
    if above or path.is_relative_to(ours) or ours.is_relative_to(path):
        raise InputError(
            f"{what}: {path} has files of ovms in it, and no guest writes to them",
            hint="add ',ro', or name a directory without them",
            path=str(root),
        )
    if not os.access(f"/proc/self/fd/{fd}", os.W_OK):
        raise FileProblem(
            f"{what}: cannot write to {path}", hint="add ',ro' if the guest shall only read it", path=str(path)
        )
