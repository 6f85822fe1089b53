"""Files that appear whole or not at all, locks that die with their holder, copies that keep holes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from ovms.errors import DiskFull, FileProblem, Locked

#: Bytes moved at once. 256 KiB beat every other size when hashing and copying (it stays in the L2 cache).
COPY_BUFFER = 256 * 1024

#: Room left on a file system beyond what a copy needs, in bytes: a full disk harms more than ovms.
SPACE_RESERVE = 16 * 1024 * 1024
_FEW_INODES = 64
_FULL = (errno.ENOSPC, errno.EDQUOT)

#: Holes are made of whole blocks of this size, in bytes: smaller ones make more requests than they save disk.
HOLE = 64 * 1024

_FICLONE = 0x40049409
_ZEROES = bytes(COPY_BUFFER)


class Hasher(Protocol):
    """What :mod:`hashlib` objects offer."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Feeds *data*."""


def fsync_dir(path: Path) -> None:
    """Makes renames and links inside *path* durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(
    path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True, spare: Path | None = None
) -> None:
    """Replaces *path* by *data*: readers see the old or the new file, never a part.

    With ``durable=False`` the content may be lost (never torn) in a power failure: for what can be made again.

    *spare* is a file beside *path*, of the same mode, that is given up where the file system is full: *data* goes into the
    blocks that it has already. It is gone then, whether they were enough or not.
    """
    temporary = path.with_name(f".{path.name}.{unique(6)}.tmp")
    try:
        _write_and_rename(path, temporary, data, os.O_CREAT | os.O_EXCL, mode, durable)
    except OSError as exc:
        if exc.errno not in _FULL or spare is None:
            raise
        try:
            spare.rename(temporary)  # should we be killed, it is swept like any other
        except FileNotFoundError:
            raise exc from None
        _write_and_rename(path, temporary, data, os.O_NOFOLLOW, mode, durable)


def _write_and_rename(path: Path, temporary: Path, data: bytes, flags: int, mode: int, durable: bool) -> None:
    fd = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC | flags, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.truncate()  # what a spare file had more
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if durable:
        fsync_dir(path.parent)


def write_new(path: Path, data: bytes, what: str) -> None:
    """Writes a file that is not there yet: it appears whole. *what* names it for errors.

    Raises:
        FileProblem: something has this name already, or no file can be written there.
        DiskFull: there is no room.
    """
    temporary = path.with_name(f".{path.name[:200]}.{unique(6)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_dir(path.parent)
    except FileExistsError:
        raise FileProblem(f"{what}: {path} is there already", hint="name another file", path=str(path)) from None
    except (OSError, ValueError) as exc:
        if isinstance(exc, OSError) and (full := disk_full(exc, what, path.parent)):
            raise full from exc
        reason = exc.strerror if isinstance(exc, OSError) else "no file has such a name"
        raise FileProblem(f"{what}: cannot write {str(path)!a}: {reason}", path=str(path)) from exc


def reserve(path: Path, size: int, *, mode: int = 0o600) -> None:
    """Sees to it that there is a file of *size* bytes for :func:`atomic_write`'s *spare*, as far as there is room for it."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            path.unlink()
        finally:
            os.close(fd)


def sweep_temporaries(path: Path) -> None:
    """Removes what killed writers of *path* left beside it. For the holder of the lock under which *path* is written."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def open_input(path: Path, what: str, *, max_size: int | None = None) -> BinaryIO:
    """Opens a file that the user named as an input, for reading.

    *what* names its role for the error ("kernel", "disk layer 2"). Only regular, non-empty files of at most
    *max_size* bytes pass; a FIFO or a device is refused without waiting on it.

    Raises:
        FileProblem: missing, empty, a directory or another kind of file, unreadable, too large.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileProblem(
            f"{what}: there is no file {path}", code="file-missing", path=str(path), hint="check the path"
        ) from None
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # what opening a socket gives
            raise _not_regular(path, what, "not a regular file") from exc
        raise FileProblem(f"{what}: cannot read {path}: {exc.strerror}", path=str(path)) from exc
    except ValueError as exc:  # a NUL or half a surrogate pair in the name
        raise FileProblem(f"{what}: cannot read {str(path)!a}: no file has such a name", path=str(path)) from exc
    try:
        _check_input(fd, path, what, max_size)
        return os.fdopen(fd, "rb", buffering=0)
    except BaseException:
        os.close(fd)
        raise


def _check_input(fd: int, path: Path, what: str, max_size: int | None) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise _not_regular(path, what, "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file")
    if info.st_size == 0:
        raise FileProblem(f"{what}: {path} is empty", code="file-empty", path=str(path))
    if max_size is not None and info.st_size > max_size:
        raise FileProblem(
            f"{what}: {path} has {info.st_size} bytes; at most {max_size} are allowed",
            code="file-too-large",
            path=str(path),
            size=info.st_size,
            limit=max_size,
        )


def _not_regular(path: Path, what: str, kind: str) -> FileProblem:
    return FileProblem(f"{what}: {path} is {kind}, where a file is needed", code="file-not-regular", path=str(path))


def read_input(path: Path, what: str, *, max_size: int) -> bytes:
    """The content of a small input file. Raises like :func:`open_input`."""
    with open_input(path, what, max_size=max_size) as file:
        data = bytearray()
        while chunk := file.read(COPY_BUFFER):
            data += chunk
            if len(data) > max_size:
                raise FileProblem(f"{what}: {path} grows while it is read", code="file-too-large", path=str(path))
        return bytes(data)


def free_space(path: Path) -> int:
    """Bytes that we may still write to *path*'s file system."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raises :class:`DiskFull` unless *directory*'s file system has room for *needed* bytes more (and a reserve)."""
    free = free_space(directory)
    if needed > 0 and free < needed + SPACE_RESERVE:
        raise DiskFull(
            f"{what} needs {needed} bytes on the file system of {directory}, which has {free} free"
            + (f" ({SPACE_RESERVE} of them are to stay free)" if free >= needed else ""),
            hint="free some space ('ovm df' shows what takes it), or set OVMS_ROOT to a larger file system",
            needed=needed,
            available=free,
            path=str(directory),
        )


def disk_full(exc: OSError, what: str, path: Path) -> DiskFull | None:
    """The :class:`DiskFull` that an ``ENOSPC`` or ``EDQUOT`` stands for, or None for any other error."""
    if exc.errno not in _FULL:
        return None
    if exc.errno == errno.ENOSPC and _out_of_inodes(path):
        room, hint = "can hold no more files", "remove some files ('df -i' counts them), and try again"
    else:
        room, hint = "is full", "free some space and try again"
    return DiskFull(f"{what}: the file system of {path} {room}", hint=hint, path=str(path))


def _out_of_inodes(path: Path) -> bool:
    try:
        info = os.statvfs(next(place for place in (path, *path.parents) if place.exists()))
    except (OSError, StopIteration):
        return False
    # no f_files: a file system that counts none. Who failed may have cleaned up a few before he asks
    return info.f_files > 0 and info.f_favail < _FEW_INODES


@contextlib.contextmanager
def noticing_full_disk(what: str, path: Path) -> Iterator[None]:
    """Raises :class:`DiskFull` for an ``ENOSPC`` or ``EDQUOT`` of any step within; a lock file may be the first."""
    try:
        yield
    except OSError as exc:
        raise (disk_full(exc, what, path) or exc) from exc


def reflink(source_fd: int, target_fd: int) -> bool:
    """Makes the target share the source's extents (btrfs, XFS, …). False where the file system can't."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError:
        return False
    return True


def data_extents(fd: int, size: int, *, start: int = 0) -> Iterator[tuple[int, int]]:
    """The ``(start, end)`` ranges of *fd* that hold data, in order; a file system without holes gives one range.

    Looked for from the offset *start* up to *size*.
    """
    position = start
    while position < size:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole is left
                return
            yield position, size
            return
        try:
            end = min(os.lseek(fd, data, os.SEEK_HOLE), size)
        except OSError:  # it shrinks meanwhile, which the reader will meet and tell
            end = size
        if data >= end:
            return
        yield data, end
        position = end


def hash_zeroes(hasher: Hasher, count: int) -> None:
    """Feeds *count* zero bytes to *hasher*."""
    while count > 0:
        step = min(count, COPY_BUFFER)
        hasher.update(memoryview(_ZEROES)[:step])
        count -= step


def is_zero(data: bytes | memoryview) -> bool:
    """Whether *data* (at most :data:`COPY_BUFFER` bytes) is all zeroes."""
    # memcmp; two memoryviews would be compared byte by byte, 80 times slower
    return _ZEROES.startswith(data)


def copy_sparse(
    source_fd: int,
    target_fd: int,
    *,
    hasher: Hasher | None = None,
    advance: Callable[[int], None] | None = None,
) -> int:
    """Copies a whole file into an empty one, keeps its holes and makes new ones for runs of zeroes.

    The target's offset and content must be empty. Returns the size in bytes. *hasher* is fed the logical content.
    """
    size = os.fstat(source_fd).st_size
    buffer = bytearray(COPY_BUFFER)
    view = memoryview(buffer)
    at = 0
    for start, end in data_extents(source_fd, size):
        if hasher is not None:
            hash_zeroes(hasher, start - at)
        if advance is not None and start > at:
            advance(start - at)
        at = start
        while at < end:
            got = os.preadv(source_fd, [view[: min(COPY_BUFFER, end - at)]], at)
            if got == 0:
                raise FileProblem("a file shrinks while it is copied")
            piece = view[:got]
            if hasher is not None:
                hasher.update(piece)
            pwrite_sparse(target_fd, piece, at)
            at += got
            if advance is not None:
                advance(got)
    if hasher is not None:
        hash_zeroes(hasher, size - at)
    if advance is not None and size > at:
        advance(size - at)
    os.ftruncate(target_fd, size)
    return size


def pwrite_sparse(fd: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` of *data*, without its blocks of zeroes (of :data:`HOLE` bytes; shorter only at the ends of *data*).

    For a file that has nothing from *offset* on. It ends with *data*, also where that ends in a hole.
    """
    view = memoryview(data)
    end, at, began = len(view), 0, 0  # began: where the data begins that is yet to be written
    while at < end:
        # blocks are those of the file, whatever pieces it comes in
        step = min(HOLE - (offset + at) % HOLE, end - at)
        if is_zero(view[at : at + step]):
            pwrite_all(fd, view[began:at], offset + began)
            began = at + step
        at += step
    pwrite_all(fd, view[began:end], offset + began)
    if began == end:
        os.ftruncate(fd, offset + end)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` until all of *data* is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def hash_file(fd: int, hasher: Hasher, *, advance: Callable[[int], None] | None = None) -> int:
    """Feeds the whole of *fd* to *hasher*, holes without reading them. Returns the size in bytes."""
    size = os.fstat(fd).st_size
    buffer = bytearray(COPY_BUFFER)
    view = memoryview(buffer)
    at = 0
    for start, end in data_extents(fd, size):
        hash_zeroes(hasher, start - at)
        if advance is not None and start > at:
            advance(start - at)
        at = start
        while at < end:
            got = os.preadv(fd, [view[: min(COPY_BUFFER, end - at)]], at)
            if got == 0:
                raise FileProblem("a file shrinks while it is read")
            hasher.update(view[:got])
            at += got
            if advance is not None:
                advance(got)
    hash_zeroes(hasher, size - at)
    if advance is not None and size > at:
        advance(size - at)
    return size


def unique(size: int) -> str:
    """A name that nobody has, of *size* random bytes in hexadecimal (``secrets`` has it, and imports OpenSSL for it)."""
    return os.urandom(size).hex()


def remove_tree(path: Path) -> None:
    """Removes a directory tree (never following links out of it); fine when it is gone already."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: Path, *, shared: bool = False, timeout: float | None = None) -> Iterator[None]:
    """Holds ``flock`` on *path* (created when missing). The kernel drops it when the holder dies.

    Args:
        path: the lock file.
        shared: a reader's lock: any number of them, but none beside an exclusive one.
        timeout: seconds to wait; 0 tries once; None waits for ever.

    Raises:
        Locked: the lock was not to be had in time.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        if timeout is None:
            fcntl.flock(fd, operation)
        else:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(fd, operation | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise Locked(
                            f"another ovms process{shown_holders(path)} holds {path}",
                            hint="wait for it to end, then try again",
                            path=str(path),
                        ) from None
                    time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def lock_holders(path: Path) -> list[int]:
    """The processes that hold ``flock`` on *path*, as far as the kernel tells: not on every file system, none of other containers."""
    try:
        info = path.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
    # "1: FLOCK  ADVISORY  WRITE 1234 08:01:131 0 EOF"; with an arrow after the number: who waits
    file = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    fields = [line.split() for line in lines]
    return sorted({int(f[4]) for f in fields if f[1] == "FLOCK" and f[5] == file and f[4].isdigit() and f[4] != "0"})


def shown_holders(path: Path) -> str:
    """``" (PID 1234)"``, or nothing where that can't be told."""
    pids = lock_holders(path)
    return f" (PID {', '.join(map(str, pids))})" if pids else ""


@contextlib.contextmanager
def staging_dir(parent: Path) -> Iterator[Path]:
    """A private directory below *parent* that is gone afterwards, whatever happens.

    ``parent/<name>/.lock`` is locked as long as the holder lives, so that :func:`sweep_staging` can tell what a
    killed process left behind from what is in use.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = parent / unique(8)
        path.mkdir(mode=0o700)
        try:
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # a sweeper took it for one whose owner was killed right here
            continue
        except OSError:  # the file system is full
            path.rmdir()
            raise
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / ".lock").exists():  # a sweeper may have come between mkdir and flock
            break
        os.close(lock)
    try:
        yield path
    finally:
        try:
            _remove_staging(path)
        finally:
            os.close(lock)


def _remove_staging(path: Path) -> None:
    # The lock goes last: who is killed half-way leaves what the next sweep knows to be abandoned.
    for entry in _entries(path):
        if entry.name == ".lock":
            continue
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        else:
            with contextlib.suppress(OSError):
                Path(entry.path).unlink()
    remove_tree(path)


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def sweep_staging(parent: Path) -> int:
    """Removes what killed processes left below *parent* (see :func:`staging_dir`). Returns how many were removed."""
    try:
        entries = list(parent.iterdir())
    except FileNotFoundError:
        return 0
    return sum(remove_abandoned(path) for path in entries)


def is_abandoned(path: Path) -> bool:
    """Whether *path* is a :func:`staging_dir` whose owner was killed."""
    return _if_abandoned(path, lambda _: None, _check_empty)


def remove_abandoned(path: Path) -> bool:
    """Removes *path* if it is a :func:`staging_dir` whose owner was killed. Whether it was."""
    return _if_abandoned(path, _remove_staging, os.rmdir)


def _check_empty(path: Path) -> None:
    with os.scandir(path) as entries:
        if next(entries, None) is not None:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))


def _if_abandoned(path: Path, action: Callable[[Path], None], if_empty: Callable[[Path], None]) -> bool:
    if path.is_symlink():
        return False
    try:
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # No lock file yet, or no more. An owner that lives makes another directory when this one is taken from it:
        # rmdir takes none that has the lock file by now.
        try:
            if_empty(path)
        except NotADirectoryError:
            return False
        except OSError as exc:
            return exc.errno == errno.ENOTEMPTY and _if_old(path, action)
        return True
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        action(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _if_old(path: Path, action: Callable[[Path], None]) -> bool:
    # with files in it and without a lock: of nobody's that we know, and perhaps at work
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > 60:
            action(path)
            return True
    return False


def listen_unix(path: Path, *, backlog: int = 8) -> socket.socket:
    """A listening UNIX socket at *path*, mode 0600; a stale one is replaced.

    ``sun_path`` holds 107 bytes, and state directories are often deeper: the socket is bound through the
    directory's file descriptor, whose path is always short.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        path.chmod(0o600)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_unix(path: Path, *, timeout: float | None) -> socket.socket:
    """Connects to the UNIX socket at *path* (of any length). Raises OSError when nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _connect(sock, f"/proc/self/fd/{directory}/{path.name}", timeout)
        finally:
            os.close(directory)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, path: str, timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            # the listener's queue is full; with a timeout, the kernel does not wait
            if deadline is None or time.monotonic() >= deadline:
                raise
            time.sleep(0.005)
