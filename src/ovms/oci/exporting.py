"""Artifacts from the local store into a layout on disk: a directory, which may hold others, or a new archive.

What is written is hashed on the way: nothing that is corrupt in the store gets out of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import BlobNotFound, Conflict, FileProblem, InputError, StoreCorrupt
from ovms.lazy import dataclass, replace
from ovms.oci import absent, source, tar
from ovms.oci.descriptor import Descriptor, ImageIndex, label
from ovms.oci.layout import REPAIR, Layout
from ovms.oci.transport import Kind, Place
from ovms.progress import NULL, Progress
from ovms.spec import mediatypes, strictjson
from ovms.spec.digest import Digest, from_hasher, hex_of

_MARKER: Final = b'{"imageLayoutVersion": "1.0.0"}\n'
#: Of files in the making; what a killed export leaves is told by it.
_TEMPORARY: Final = ".ovms-"
#: Seconds after which a temporary file that nobody holds is an orphan.
_ORPHAN_AGE: Final = 60.0


def export(
    layout: Layout, digest: Digest, place: Place, name: str | None, progress: Progress = NULL
) -> tuple[Descriptor, str | None]:
    """Writes the artifact (or index) *digest* to *place*, under its tag or else *name*.

    A directory that is a layout keeps what else is in it; an archive appears whole or not at all, and has the same bytes
    for the same artifact and name. Of an index, the manifests that are in the store are written.

    Returns what the layout's index says of it, and its name there.

    Raises:
        BlobNotFound, StoreCorrupt: the store does not have all of it, or not as it should.
        FileProblem, InputError, Conflict: *place* is something else, which is left as it is.
        DiskFull: said before the first byte is written where it is known.
    """
    if place.digest is not None:
        raise InputError(f"{place}: what is written gets a name, not a digest", hint="leave out what follows '@'")
    with layout.using():
        parts = Parts.of(layout, digest)
        named = place.tag or name
        annotations = {} if named is None else {mediatypes.REF_NAME_ANNOTATION: named}
        entry = replace(parts.top, annotations=annotations)
        if place.kind is Kind.ARCHIVE:
            _write_archive(parts, entry, place.path, progress)
        else:
            _write_directory(parts, entry, place.path, progress)
        return entry, named


@dataclass(frozen=True)
class Parts:
    """Everything of an artifact: what is written, in the order of the digests."""

    layout: Layout
    top: Descriptor
    blobs: tuple[Descriptor, ...]

    @classmethod
    def of(cls, layout: Layout, digest: Digest) -> Parts:
        """What the manifest or index *digest* names. Raises BlobNotFound where it is not whole (OCI-29)."""
        manifest = layout.manifest(digest)
        blobs: dict[Digest, Descriptor] = {}
        if isinstance(manifest, ImageIndex):
            top = Descriptor(mediatypes.OCI_INDEX, digest, len(manifest.raw))
            images = [d.digest for d in manifest.manifests if layout.size(d.digest) is not None]
        else:
            top, images = manifest.descriptor(), [digest]
        blobs[digest] = top
        for child in images:
            image = layout.manifest(child)
            if not isinstance(image, ImageIndex):
                blobs[child] = image.descriptor()
                blobs |= {blob.digest: blob for blob in image.blobs}
        absent.require_here(layout, digest, blobs.values(), "only whole artifacts are written")
        for blob in blobs.values():
            if not layout.has(blob):
                raise BlobNotFound(
                    f"the store has lost the blob {blob.digest}",
                    hint="build or pull the artifact again",
                    digest=blob.digest,
                )
        return cls(layout, top, tuple(blobs[key] for key in sorted(blobs)))

    def allocated(self, blobs: tuple[Descriptor, ...]) -> int:
        """What *blobs* take on disk."""
        return sum(min(self.layout.path(b.digest).stat().st_blocks * 512, b.size) for b in blobs)

    def copy(self, blob: Descriptor, fd: int, at: int, advance: Callable[[int], None]) -> None:
        """Writes a blob to *fd* from *at* on, with its holes. Raises StoreCorrupt where it is not what it should be."""
        hasher = hashlib.sha256()
        size = 0
        with self.layout.path(blob.digest).open("rb", buffering=0) as file:
            if at == 0 and fsutil.reflink(file.fileno(), fd):
                size = fsutil.hash_file(fd, hasher, advance=advance)
            else:
                size = _copy(file.fileno(), fd, at, hasher, advance)
        if size != blob.size or from_hasher(hasher) != blob.digest:
            raise StoreCorrupt(
                f"the content of {self.layout.path(blob.digest)} is not what its name says",
                hint=REPAIR,
                digest=blob.digest,
            )


def _copy(source_fd: int, fd: int, at: int, hasher: Any, advance: Callable[[int], None]) -> int:
    done = 0
    while data := os.pread(source_fd, fsutil.COPY_BUFFER, done):
        hasher.update(data)
        if not fsutil.is_zero(data):
            fsutil.pwrite_all(fd, data, at + done)
        done += len(data)
        advance(len(data))
    return done


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the file system at *path*, as ours."""
    try:
        yield
    except OSError as exc:
        raise (
            fsutil.disk_full(exc, "exporting", path)
            or FileProblem(f"cannot write {path}: {exc.strerror}", path=str(path))
        ) from exc


def _index_of(entries: list[Any], others: dict[str, Any] | None = None) -> bytes:
    index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, **(others or {}), "manifests": entries}
    return strictjson.canonical(index)


# --- an archive ------------------------------------------------------------------------------------------------------


def _write_archive(parts: Parts, entry: Descriptor, path: Path, progress: Progress) -> None:
    path = Path(os.path.realpath(path))  # a link to an archive stays one
    _check_replaceable(path)
    with writing(path):
        _sweep_beside(path)
        fsutil.require_space(path.parent, parts.allocated(parts.blobs), f"writing {path}")
        temporary = path.with_name(f"{_TEMPORARY}{path.name[:200]}.{fsutil.unique(6)}.tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            _write_members(parts, entry, fd, progress)
            os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        fsutil.fsync_dir(path.parent)


def _write_members(parts: Parts, entry: Descriptor, fd: int, progress: Progress) -> None:
    at = 0

    def put(data: bytes) -> None:
        nonlocal at
        fsutil.pwrite_all(fd, data, at)
        at += len(data)

    # In the order of their names, as 'tar --sort=name' has them.
    for directory in ("blobs/", f"{source.BLOBS}/"):
        put(tar.header(directory, 0, directory=True))
    for blob in parts.blobs:
        put(tar.header(f"{source.BLOBS}/{hex_of(blob.digest)}", blob.size))
        with progress.task(label(blob), blob.size) as task:
            parts.copy(blob, fd, at, task.advance)
        at += blob.size
        put(bytes(tar.padding(blob.size)))
    for name, data in ((source.INDEX, _index_of([entry.to_json()])), (source.MARKER, _MARKER)):
        put(tar.header(name, len(data)) + data + bytes(tar.padding(len(data))))
    put(tar.TRAILER)


def _check_replaceable(path: Path) -> None:
    """Whether *path* is free, or an archive of the same kind: anything else is somebody's, and stays."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise FileProblem(f"cannot write {path}: {exc.strerror}", path=str(path)) from exc
    hint = "choose another name, or move it away"
    if not stat.S_ISREG(info.st_mode):
        raise FileProblem(f"{path} is no regular file", code="file-not-regular", path=str(path), hint=hint)
    if info.st_size:
        try:
            with source.opened(Place(Kind.ARCHIVE, path)):
                pass
        except InputError as exc:
            raise Conflict(f"{path} is there, and is no OCI archive", hint=hint, path=str(path)) from exc


def _sweep_beside(path: Path) -> None:
    """Removes what killed exports to the same *path* have left: nobody holds the lock of an orphan."""
    for name in os.listdir(path.parent):
        if not (name.startswith(f"{_TEMPORARY}{path.name[:200]}.") and name.endswith(".tmp")):
            continue
        with contextlib.suppress(OSError):
            orphan = path.parent / name
            fd = os.open(orphan, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if time.time() - os.fstat(fd).st_mtime > _ORPHAN_AGE:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    orphan.unlink()
            finally:
                os.close(fd)


# --- a directory -----------------------------------------------------------------------------------------------------


def _write_directory(parts: Parts, entry: Descriptor, path: Path, progress: Progress) -> None:
    with writing(path), _locked(path) as target:
        index = target.prepare()
        missing = tuple(blob for blob in parts.blobs if not target.has(blob))
        fsutil.require_space(path, parts.allocated(missing), f"writing {path}")
        for blob in parts.blobs:
            with progress.task(label(blob), blob.size) as task:
                if blob not in missing:
                    task.note("exists already")
                    continue
                with target.new(target.blobs, hex_of(blob.digest)) as fd:
                    parts.copy(blob, fd, 0, task.advance)
                    os.ftruncate(fd, blob.size)
        os.fsync(target.blobs)
        name = entry.annotations.get(mediatypes.REF_NAME_ANNOTATION)
        kept = [item for item in index.pop("manifests") if not _same_entry(item, name, entry.digest)]
        target.write(source.INDEX, _index_of([*kept, entry.to_json()], index))
        os.fsync(target.fd)


def _same_entry(item: Any, name: str | None, digest: Digest) -> bool:
    annotations = item.get("annotations") if isinstance(item, dict) else None
    said = annotations.get(mediatypes.REF_NAME_ANNOTATION) if isinstance(annotations, dict) else None
    return said == name and (name is not None or (isinstance(item, dict) and item.get("digest") == digest))


class _Target:
    """A layout that is written to, by file descriptors: no link in it leads us elsewhere."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.blobs = -1
        self._path = path
        self._files = source.Directory(fd, path)
        self._opened = [fd]

    def close(self) -> None:
        """Lets go of it."""
        while self._opened:
            os.close(self._opened.pop())

    def prepare(self) -> dict[str, Any]:
        """Makes an empty layout where there is nothing, and returns the index."""
        what = f"{Kind.DIRECTORY}:{self._path}"
        names = {name for name in os.listdir(self.fd) if not name.startswith(_TEMPORARY)}
        if names and source.MARKER not in names:
            raise Conflict(
                f"{self._path} is there, and is no OCI image layout",
                hint="choose another directory",
                path=str(self._path),
            )
        if "ovms.lock" in names:
            raise InputError(
                f"{self._path} is a local store of ovms, which has locks of its own",
                hint="export to another directory; a store fetches with 'ovm pull oci:DIR'",
                path=str(self._path),
            )
        if not names:
            self.write(source.MARKER, _MARKER)
        source.check_version(source.read_document(self._files, source.MARKER, what), what)
        raw = source.read_document(self._files, source.INDEX, what)
        self.blobs = self._directory(self._directory(self.fd, "blobs"), "sha256")
        for directory in (self.fd, self.blobs):
            _sweep(directory)
        return {"manifests": []} if raw is None else source.parse_index(raw, what)

    def has(self, blob: Descriptor) -> bool:
        """Whether there is a regular file of a blob's name and size."""
        try:
            info = os.stat(hex_of(blob.digest), dir_fd=self.blobs, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(info.st_mode) and info.st_size == blob.size

    def write(self, name: str, data: bytes) -> None:
        """Replaces a small file."""
        with self.new(self.fd, name) as fd:
            fsutil.pwrite_all(fd, data, 0)

    @contextlib.contextmanager
    def new(self, directory: int, name: str) -> Iterator[int]:
        """A file that appears as *name* when it is complete."""
        temporary = f"{_TEMPORARY}{fsutil.unique(8)}.tmp"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
        try:
            yield fd
            os.fsync(fd)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            raise
        finally:
            os.close(fd)

    def _directory(self, parent: int, name: str) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except NotADirectoryError:  # what a link gives, too
            raise FileProblem(
                f"{name!a} in {self._path} is a link or a file, where a directory belongs",
                code="file-not-regular",
                hint="a layout must hold its files itself",
                path=str(self._path),
            ) from None
        self._opened.append(fd)
        return fd


def _sweep(directory: int) -> None:
    """Removes what killed exports have left; for the holder of the lock."""
    for name in os.listdir(directory):
        if name.startswith(_TEMPORARY) and name.endswith(".tmp"):
            os.unlink(name, dir_fd=directory)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[_Target]:
    """The directory at *path*, made where it is missing, for us alone. The lock is on the directory itself."""
    while True:
        made = _make(path)
        target = _Target(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)
        try:
            fcntl.flock(target.fd, fcntl.LOCK_EX)
            if not _is_at(target.fd, path):  # whoever had it before has taken it away again
                continue
            ours = made and not os.listdir(target.fd)  # another may have been quicker to use it
            try:
                yield target
                return
            except BaseException:
                if ours:
                    fsutil.remove_tree(path)
                raise
        finally:
            target.close()


def _make(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
