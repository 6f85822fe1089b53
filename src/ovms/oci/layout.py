r"""The local store: an OCI image layout that ``skopeo`` and ``oras`` read as it is.

::

    store/
    ├── oci-layout               {"imageLayoutVersion": "1.0.0"}
    ├── index.json               one descriptor for each name, in ``org.opencontainers.image.ref.name``
    ├── index.lock               flock, exclusive, around every read-modify-write of index.json
    ├── ovms.index.json          index.json as ovms wrote it last: what a damaged one is rebuilt from, and whose room the
    │                            next one takes where the file system is full
    ├── blobs/sha256/<hex>       complete and checked, mode 0444; named last, by rename
    ├── ovms.blobs/              derived data (RAM images ready to map), always possible to make again
    ├── ovms.partial/<hex>       blobs that are still coming (``partial.py``)
    ├── ovms.absent/<hex>        RAM snapshots that were left out (``absent.py``)
    ├── ovms.origins/<hex>       where artifacts came from (``origins.py``)
    ├── ovms.quarantine/         what a repair took out of the way (``quarantine.py``)
    ├── ovms.tmp/<random>/       work in progress; .lock is held while its owner lives, else it may be swept
    └── ovms.lock                flock: shared by whoever adds or uses blobs, exclusive for the garbage collector

An entry of index.json without a name whose manifest has a ``subject`` is a *referrer* (a signature, an SBOM), kept as
``oras`` keeps it: the collector leaves it as long as its subject is there, and takes it away with that.

A writer holds ``ovms.lock`` shared from its first blob until the name in ``index.json`` (or the instance's record) that
keeps the blobs alive, so the collector never takes what is not named *yet*.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import (
    BlobNotFound,
    DigestMismatch,
    FileProblem,
    JsonInvalid,
    OvmsError,
    RegistryProtocol,
    StoreCorrupt,
)
from ovms.lazy import dataclass, regex, replace
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, annotations_of, parse_manifest
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, from_hasher, hex_of, of_bytes

_LAYOUT: Final = b'{"imageLayoutVersion": "1.0.0"}\n'
_INDEX_MAX: Final = 64 * limits.MIB
_LOCK_TIMEOUT: Final = 60.0
#: The fields of an entry that says no more than that something is there.
BARE: Final = ("mediaType", "digest", "size")
#: What to do about a blob that is not what it should be.
REPAIR: Final = "'ovm fsck --repair' takes it out of the way, and tells how to get it back"
#: The "size" of what is no file but has a blob's name: a link, a directory. No blob has it.
NO_FILE: Final = -1
#: What ``fsutil.atomic_write`` leaves when it is killed.
_TEMPORARY: Final = regex(r"\.(index\.json|ovms\.index\.json|oci-layout)\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Entry:
    """A name in the store and what it stands for."""

    name: str
    descriptor: Descriptor


class BlobWriter:
    """Receives a blob's bytes in order; nothing is visible until :meth:`commit`.

    Runs of zeroes become holes. Hashing happens on the way.
    """

    def __init__(self, layout: Layout, fd: int, path: Path) -> None:
        self._layout = layout
        self._fd = fd
        self._path = path
        self._hasher = hashlib.sha256()
        self.size = 0
        #: Whether it has its name, and the file is no longer where it was made.
        self.shown = False
        self._durable = False

    def write(self, data: bytes | memoryview) -> None:
        """Appends *data*. Raises :class:`~ovms.errors.DiskFull` when the file system has no room."""
        self._hasher.update(data)
        try:
            fsutil.pwrite_sparse(self._fd, data, self.size)
        except OSError as exc:
            raise (fsutil.disk_full(exc, "writing a blob", self._path) or exc) from exc
        self.size += len(data)

    def clone(self, fd: int, advance: Callable[[int], None] | None = None) -> bool:
        """Takes over the whole of an open file by reflink, before anything else; False where the file system can't."""
        if not fsutil.reflink(fd, self._fd):
            return False
        self.size = fsutil.hash_file(self._fd, self._hasher, advance=advance)
        return True

    def commit(self, *, expected: Descriptor | None = None, durable: bool = True) -> Digest:
        """Checks the content against *expected*, makes it durable and visible, and returns its digest.

        *durable*: see :meth:`Layout.publish`.

        Raises:
            DigestMismatch: the size or the digest is not the expected one; nothing becomes visible.
        """
        digest = self.check(expected)
        os.ftruncate(self._fd, self.size)
        self._layout.publish(self._fd, self._path, digest, durable=durable)
        return digest

    def check(self, expected: Descriptor | None) -> Digest:
        """The digest of what came. Raises :class:`DigestMismatch` where it is not the *expected* one."""
        digest = from_hasher(self._hasher)
        if expected is not None and (digest != expected.digest or self.size != expected.size):
            raise DigestMismatch(
                f"a blob of {expected.size} bytes with digest {expected.digest} was expected; "
                f"{self.size} bytes with digest {digest} came",
                hint="the source is damaged or was tampered with; try again, or ask its owner",
                expected=expected.digest,
                got=digest,
            )
        return digest

    def finish(self, expected: Descriptor) -> None:
        """Checks what came, as :meth:`check`; :meth:`Layout.commit_all` makes it visible.

        The kernel begins to write it, and is not waited for: many files are durable sooner so than one by one.
        """
        self.check(expected)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def wait(self) -> None:
        """Until what came is durable; a second time it costs nothing. Raises as :meth:`write`."""
        if not self._durable:
            try:
                os.fsync(self._fd)  # where some file systems first find that they are full
            except OSError as exc:
                raise (fsutil.disk_full(exc, "adding a blob to the store", self._path) or exc) from exc
            self._durable = True

    def show(self) -> None:
        """Gives it its name."""
        os.replace(self._path, self._layout.path(from_hasher(self._hasher)))
        self.shown = True


class Layout:
    """An OCI image layout on disk (see the module's docstring for its files and locks)."""

    def __init__(self, root: Path, *, marked: bool = True) -> None:
        """Opens the layout at *root*, and makes an empty one where there is none.

        Not *marked*: ``oci-layout`` is not looked at, for whoever repairs it.

        Raises:
            StoreCorrupt: *root* holds a layout of another version.
        """
        self.root = root
        self.blob_dir = root / "blobs" / "sha256"
        self._blobs = f"{self.blob_dir}/"
        self.derived_dir = root / "ovms.blobs"
        self.staging_root = root / "ovms.tmp"
        self.partial_dir = root / "ovms.partial"
        self.absent_dir = root / "ovms.absent"
        self.quarantine_dir = root / "ovms.quarantine"
        self.origin_dir = root / "ovms.origins"
        self.marker = root / "oci-layout"
        self.index = root / "index.json"
        self.index_copy = root / "ovms.index.json"
        new = marked and self._check_version(self.marker)
        # also in a layout that another tool made
        for directory in (self.blob_dir, self.derived_dir, self.staging_root, self.partial_dir):
            directory.mkdir(parents=True, exist_ok=True)
        if new:
            self._create()

    def _create(self) -> None:
        with self.index_lock():
            # with a copy, names may be lost: then it is not for us to begin with none
            if not self.index.exists() and not self.index_copy.exists():
                self.write_index(empty_index())
            self.write_marker()

    def write_marker(self) -> None:
        """Makes ``oci-layout`` what it has to be."""
        fsutil.atomic_write(self.marker, _LAYOUT)

    def _check_version(self, marker: Path) -> bool:
        """Whether there is no layout yet."""
        version = None
        try:
            found = strictjson.parse(fsutil.read_input(marker, "the store", max_size=4096), "oci-layout", max_size=4096)
            version = found.get("imageLayoutVersion") if isinstance(found, dict) else None
        except FileProblem as exc:
            if exc.code == "file-missing":
                return True
            if exc.code == "file-unreadable":
                raise
        except JsonInvalid:
            pass
        if version != "1.0.0":
            raise StoreCorrupt(
                f"{self.root} is no OCI image layout of version 1.0.0",
                hint="set OVMS_ROOT to a directory of ovms's own; if it is one, 'ovm fsck --repair' mends it",
                path=str(self.root),
            )
        return False

    # --- locks -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keeps the garbage collector away while blobs are added, or used without a name of their own."""
        with fsutil.file_lock(self.root / "ovms.lock", shared=True, timeout=_LOCK_TIMEOUT):
            yield

    @contextlib.contextmanager
    def index_lock(self) -> Iterator[None]:
        """Held around every read-modify-write of ``index.json``."""
        with fsutil.file_lock(self.root / "index.lock", timeout=_LOCK_TIMEOUT):
            yield

    # --- blobs -------------------------------------------------------------------------------------------------

    def path(self, digest: Digest) -> Path:
        """Where a blob is, or would be."""
        return self.blob_dir / hex_of(digest)

    def size(self, digest: Digest) -> int | None:
        """A blob's size in bytes, None when it is not here; :data:`NO_FILE` for what is no file."""
        try:
            info = os.lstat(self._blobs + hex_of(digest))  # asked of each blob, many times
        except FileNotFoundError:
            return None
        return info.st_size if stat.S_ISREG(info.st_mode) else NO_FILE

    def file_size(self, digest: Digest) -> int | None:
        """Like :meth:`size`.

        Raises:
            StoreCorrupt: what has the blob's name is no file.
        """
        size = self.size(digest)
        if size == NO_FILE:
            raise StoreCorrupt(
                f"{self.path(digest)} is a link or a directory, where a blob belongs", hint=REPAIR, digest=digest
            )
        return size

    def came(self, digest: Digest) -> float | None:
        """When a blob came in, in seconds since 1970; None when it is not here."""
        try:
            return self.path(digest).stat().st_mtime
        except OSError:
            return None

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob is here.

        Raises:
            DigestMismatch: it is, but of another size than the descriptor says: one of the two lies.
            StoreCorrupt: what has its name is no file.
        """
        size = self.file_size(descriptor.digest)
        if size is not None and size != descriptor.size:
            raise DigestMismatch(
                f"{descriptor.digest} has {size} bytes, but its descriptor says {descriptor.size}",
                hint="'ovm fsck' tells which of the two is wrong",
                expected=descriptor.size,
                got=size,
            )
        return size is not None

    def read(self, digest: Digest, what: str, *, max_size: int) -> bytes:
        """A small blob's content, checked against its digest.

        Raises:
            BlobNotFound: it is not here.
            StoreCorrupt: its content is not what its digest says.
        """
        try:
            data = fsutil.read_input(self.path(digest), what, max_size=max_size)
        except OvmsError as exc:
            if exc.code == "file-missing":
                raise BlobNotFound(f"{what}: the store has no blob {digest}", digest=digest) from None
            raise
        if of_bytes(data) != digest:
            raise StoreCorrupt(
                f"{what}: the content of {self.path(digest)} is not what its name says",
                hint=REPAIR,
                digest=digest,
            )
        return data

    @contextlib.contextmanager
    def writer(self) -> Iterator[BlobWriter]:
        """A place for a new blob; what is not committed is gone at the end."""
        with fsutil.staging_dir(self.staging_root) as staging:
            path = staging / "blob"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                yield BlobWriter(self, fd, path)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def loose(self, digest: Digest) -> Iterator[BlobWriter]:
        """Like :meth:`writer`, for a small blob: one file, which the collector sweeps where its writer is killed."""
        path = self.partial_dir / f"{hex_of(digest)}.{fsutil.unique(4)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        writer = BlobWriter(self, fd, path)
        try:
            yield writer
        finally:
            os.close(fd)
            if not writer.shown:
                path.unlink(missing_ok=True)

    def add_bytes(self, data: bytes) -> Digest:
        """Adds a small blob."""
        digest = of_bytes(data)
        if not self._holds(digest, data):
            with self.loose(digest) as writer:
                writer.write(data)
                writer.commit()
        return digest

    def _holds(self, digest: Digest, data: bytes) -> bool:
        # looked at and not believed: it costs nothing, and a damaged one is mended on the way
        if self.size(digest) != len(data):
            return False
        try:
            return self.read(digest, "a blob", max_size=len(data)) == data
        except OvmsError:
            return not data

    def add_file(self, fd: int, what: str, *, advance: Callable[[int], None] | None = None) -> tuple[Digest, int, bool]:
        """Adds the content of an open file, by reflink where the file system can, else by a copy that keeps holes.

        Returns its digest, its size and whether it is new here. What is here already, and undamaged, is not copied. The bytes
        that are hashed are the bytes that are kept, even when somebody writes to the file meanwhile.

        Raises:
            DiskFull: said before the first byte is copied.
        """
        size = os.fstat(fd).st_size
        with fsutil.staging_dir(self.staging_root) as staging:
            path = staging / "blob"
            target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                hasher = hashlib.sha256()
                if fsutil.reflink(fd, target):
                    fsutil.hash_file(target, hasher, advance=advance)
                    size = os.fstat(target).st_size
                else:
                    known = self._known_content(fd, size, advance)
                    if known is not None:
                        return known, size, False
                    fsutil.require_space(self.root, _allocated(fd), f"adding {what} to the store")
                    try:
                        size = fsutil.copy_sparse(fd, target, hasher=hasher, advance=advance)
                    except OSError as exc:
                        raise (fsutil.disk_full(exc, f"adding {what} to the store", self.root) or exc) from exc
                digest = from_hasher(hasher)
                new = not self._is_intact(digest, size)
                if new:
                    self.publish(target, path, digest)
                return digest, size, new
            finally:
                os.close(target)

    def _known_content(self, fd: int, size: int, advance: Callable[[int], None] | None) -> Digest | None:
        # Hashing before copying pays only when the content may be here: when some blob has this very size.
        with os.scandir(self.blob_dir) as entries:
            if not any(entry.stat().st_size == size for entry in entries):
                return None
        hasher = hashlib.sha256()
        # Progress would run twice as far as the total when a copy follows; that is rare, and the bar clamps it.
        if fsutil.hash_file(fd, hasher, advance=advance) != size:
            return None
        digest = from_hasher(hasher)
        return digest if self._is_intact(digest, size) else None

    def _is_intact(self, digest: Digest, size: int) -> bool:
        # Read, and not believed: the good bytes are at hand, and may be nowhere else.
        if self.size(digest) != size:
            return False
        hasher = hashlib.sha256()
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fsutil.hash_file(fd, hasher)
            finally:
                os.close(fd)
        except (OSError, OvmsError):
            return False
        return from_hasher(hasher) == digest

    def publish(self, fd: int, path: Path, digest: Digest, *, durable: bool = True) -> None:
        """Makes the finished file *fd* at *path* durable and visible.

        Not *durable*: its name may be lost in a power failure, until :meth:`sync` was called.
        """
        try:
            os.fchmod(fd, 0o444)
            os.fsync(fd)  # where some file systems first find that they are full
            os.replace(path, self.path(digest))
            if durable:
                fsutil.fsync_dir(self.blob_dir)
        except OSError as exc:
            raise (fsutil.disk_full(exc, "adding a blob to the store", self.root) or exc) from exc

    def commit_all(self, writers: Collection[BlobWriter]) -> None:
        """Makes blobs visible that are finished (:meth:`BlobWriter.finish`); their names are durable after :meth:`sync`.

        First all of them are durable, then all get their names: where these came in between, each would wait for a
        transaction of the file system of its own.
        """
        try:
            for writer in writers:
                writer.wait()
            for writer in writers:
                writer.show()
        except OSError as exc:
            raise (fsutil.disk_full(exc, "adding a blob to the store", self.root) or exc) from exc

    def sync(self) -> None:
        """Makes the names of all blobs durable."""
        fsutil.fsync_dir(self.blob_dir)

    # --- names -------------------------------------------------------------------------------------------------

    def read_index(self, path: Path | None = None) -> dict[str, Any]:
        """The content of ``index.json``, or of a copy of it.

        Raises:
            StoreCorrupt: it is missing, or no index.
        """
        path = path or self.index
        try:
            data = fsutil.read_input(path, "index.json", max_size=_INDEX_MAX)
            value = strictjson.parse(data, str(path), max_size=_INDEX_MAX)
            if not isinstance(value, dict) or not isinstance(value.get("manifests"), list):
                raise JsonInvalid(f"{path} has no list of manifests")
        except (JsonInvalid, FileProblem) as exc:
            raise StoreCorrupt(
                f"the store's index cannot be read: {exc}",
                hint="'ovm fsck --repair' rebuilds it",
                path=str(path),
            ) from exc
        return value

    def write_index(self, value: dict[str, Any]) -> None:
        """Replaces ``index.json``, under its lock. One that is no longer than before finds room on a full disk, too."""
        data = strictjson.canonical(value)
        try:
            fsutil.atomic_write(self.index, data, spare=self.index_copy)
        except OSError as exc:
            if not self.index_copy.exists():
                with contextlib.suppress(OSError):
                    self._copy_index(self.index.read_bytes())
            raise (fsutil.disk_full(exc, "writing the store's index", self.root) or exc) from exc
        self._copy_index(data)

    def _copy_index(self, data: bytes) -> None:
        # One that a power failure makes of no use is as good as none: no reason to wait for the disk twice, or to fail.
        with contextlib.suppress(OSError):
            fsutil.atomic_write(self.index_copy, data, durable=False)

    def index_stamp(self) -> tuple[int, int, int] | None:
        """What changes whenever a name comes, goes, or stands for something else; None where that can't be told."""
        try:
            info = self.index.stat()
        except OSError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size

    def entries(self) -> list[Entry]:
        """Every name and what it stands for, in the order in which they were set. No name: the empty string."""
        return [self.entry(item, i) for i, item in enumerate(self.read_index()["manifests"])]

    def entry(self, item: Any, number: int) -> Entry:
        """An entry of the index from its JSON.

        Raises:
            StoreCorrupt: it is none.
        """
        try:
            descriptor = Descriptor.from_json(item, f"index.json: manifests[{number}]")
            return Entry(annotations_of(item, "index.json").get(mediatypes.REF_NAME_ANNOTATION, ""), descriptor)
        except RegistryProtocol as exc:
            raise StoreCorrupt(
                f"the store's index is damaged: {exc}", hint="'ovm fsck --repair' rebuilds it", path=str(self.index)
            ) from exc

    def find(self, name: str) -> Descriptor | None:
        """What *name* stands for."""
        for entry in self.entries():
            if entry.name == name:
                return entry.descriptor
        return None

    def set_name(self, name: str, descriptor: Descriptor) -> None:
        """Lets *name* stand for *descriptor*, whatever it stood for before. An entry that says nothing else of it goes."""
        annotations = {**descriptor.annotations, mediatypes.REF_NAME_ANNOTATION: name}
        item = replace(descriptor, annotations=annotations).to_json()
        with self.index_lock():
            index = self.read_index()
            bare = {key: item[key] for key in BARE}
            kept = [m for m in index["manifests"] if _name_of(m) != name and m != bare]
            index["manifests"] = [*kept, item]
            self.write_index(index)

    def add_nameless(self, *descriptors: Descriptor) -> None:
        """Lists *descriptors* without a name, unless they are listed so."""
        with self.index_lock():
            index = self.read_index()
            listed = {_key_of(m) for m in index["manifests"]}
            new = {descriptor.digest: descriptor for descriptor in descriptors if ("", descriptor.digest) not in listed}
            if new:
                index["manifests"] += [descriptor.to_json() for descriptor in new.values()]
                self.write_index(index)

    def remove_name(self, name: str) -> bool:
        """Takes *name* away; the blobs stay until :meth:`collect`. False when there was no such name."""
        with self.index_lock():
            index = self.read_index()
            kept = [m for m in index["manifests"] if _name_of(m) != name]
            if len(kept) == len(index["manifests"]):
                return False
            index["manifests"] = kept
            self.write_index(index)
            return True

    def remove_entries(self, entries: Collection[Entry]) -> None:
        """Takes *entries* away, as far as they still stand for the same."""
        if not entries:
            return
        going = {(entry.name, entry.descriptor.digest) for entry in entries}
        with self.index_lock():
            index = self.read_index()
            index["manifests"] = [m for m in index["manifests"] if _key_of(m) not in going]
            self.write_index(index)

    # --- manifests ---------------------------------------------------------------------------------------------

    def manifest(self, digest: Digest) -> ImageManifest | ImageIndex:
        """A manifest or index that is here, checked against its digest.

        Raises:
            BlobNotFound, StoreCorrupt, JsonInvalid, RegistryProtocol: see :func:`parse_manifest`.
        """
        what = f"manifest {digest}"
        return parse_manifest(self.read(digest, what, max_size=limits.OCI_MANIFEST_MAX), what)

    def reachable(self, digest: Digest) -> set[Digest]:
        """The manifest *digest*, and every blob and manifest that it names. What is missing here counts too."""
        answer: set[Digest] = set()
        pending = [digest]
        while pending:
            current = pending.pop()
            if current in answer:
                continue
            answer.add(current)
            try:
                manifest = self.manifest(current)
            except BlobNotFound:
                continue
            if isinstance(manifest, ImageIndex):
                pending.extend(m.digest for m in manifest.manifests)
            else:
                answer.update(blob.digest for blob in manifest.blobs)
        return answer

    def is_temporary(self, name: str) -> bool:
        """Whether a file of this name, beside ``index.json``, is what a killed writer has left."""
        return _TEMPORARY.fullmatch(name) is not None


def empty_index() -> dict[str, Any]:
    """What ``index.json`` begins as."""
    return {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": []}


def _name_of(item: Any) -> str:
    if isinstance(item, dict) and isinstance(item.get("annotations"), dict):
        return str(item["annotations"].get(mediatypes.REF_NAME_ANNOTATION, ""))
    return ""


def _key_of(item: Any) -> tuple[str, Any]:
    return _name_of(item), item.get("digest") if isinstance(item, dict) else None


def _allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512
