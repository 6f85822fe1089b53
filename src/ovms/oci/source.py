"""OCI layouts of others on disk, read: a directory or a tar archive. Nothing in them is believed.

Only regular files count. No symbolic link below the directory is followed, and a FIFO or a device keeps nobody waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from ovms import fsutil
from ovms.errors import BlobNotFound, DigestMismatch, FileProblem, InputError, ReferenceNotFound
from ovms.lazy import dataclass, regex
from ovms.oci import tar
from ovms.oci.descriptor import Descriptor, ImageIndex, ImageManifest, annotations_of, parse_manifest
from ovms.oci.transport import Kind, Place, name_in
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import hex_of, of_bytes

MARKER: Final = "oci-layout"
INDEX: Final = "index.json"
BLOBS: Final = "blobs/sha256"
LAYOUT_VERSION: Final = "1.0.0"
#: The ``index.json`` of a layout that is no store of ours.
INDEX_MAX: Final = 16 * limits.MIB
_MARKER_MAX: Final = 4096
#: So many artifacts of a layout are named in an error.
_LISTED_MAX: Final = 20
_COUNTS: Final = regex(rf"{MARKER}|{re.escape(INDEX)}|{BLOBS}/[0-9a-f]{{64}}")


@dataclass(frozen=True)
class Content:
    """Where the bytes of a document or blob are: *size* bytes of an open file, from *offset* on."""

    fd: int
    offset: int
    size: int

    @property
    def whole(self) -> bool:
        """Whether they are all of the file."""
        return self.offset == 0 and os.fstat(self.fd).st_size == self.size

    @property
    def allocated(self) -> int:
        """What they take on disk, at most."""
        return min(self.size, os.fstat(self.fd).st_blocks * 512)


class Files(Protocol):
    """The files of a layout, by their names in it."""

    def open(self, name: str) -> contextlib.AbstractContextManager[Content | None]:
        """A file's content; None where there is no such file. Raises InputError for what is no regular file."""


class Directory:
    """The files of a layout that is a directory. The descriptor stays the caller's."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Content | None]:
        """See :class:`Files`."""
        with contextlib.ExitStack() as opened:
            fd = self._fd
            *directories, last = name.split("/")
            flags = [os.O_DIRECTORY] * len(directories) + [os.O_NONBLOCK]
            for part, flag in zip([*directories, last], flags, strict=True):
                try:
                    fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flag, dir_fd=fd)
                except FileNotFoundError:
                    yield None
                    return
                except OSError as exc:
                    raise self._wrong(name, exc) from None
                opened.callback(os.close, fd)
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise self._wrong(name)
            yield Content(fd, 0, info.st_size)

    def _wrong(self, name: str, exc: OSError | None = None) -> InputError:
        # A link gives ELOOP, or ENOTDIR where a directory belongs; a socket gives ENXIO.
        if exc is None or exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            return FileProblem(
                f"{self._path / name} is, or is below, a link or another thing that is no regular file",
                code="file-not-regular",
                hint="a layout must hold its files itself",
                path=str(self._path / name),
            )
        return FileProblem(f"cannot read {self._path / name}: {exc.strerror}", path=str(self._path / name))


class _Archive:
    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._members = tar.members(fd, what, lambda name: _COUNTS.fullmatch(name) is not None)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Content | None]:
        member = self._members.get(name)
        yield None if member is None else Content(self._fd, member.offset, member.size)


@contextlib.contextmanager
def opened(place: Place) -> Iterator[Source]:
    """The layout at *place*, open for reading.

    Raises:
        FileProblem: there is nothing, or nothing of that kind.
        InputError: it is no OCI image layout.
    """
    what = f"{place.kind}:{place.path}"
    with contextlib.ExitStack() as stack:
        files: Files
        if place.kind is Kind.ARCHIVE:
            file = stack.enter_context(fsutil.open_input(place.path, "the archive"))
            files = _Archive(file.fileno(), what)
        else:
            fd = _open_directory(place.path)
            stack.callback(os.close, fd)
            files = Directory(fd, place.path)
        yield Source(files, what)


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileProblem(
            f"there is no directory {path}", code="file-missing", path=str(path), hint="check the path"
        ) from None
    except NotADirectoryError:
        raise FileProblem(
            f"{path} is no directory",
            code="file-not-regular",
            path=str(path),
            hint="an archive is read with oci-archive:",
        ) from None
    except OSError as exc:
        raise FileProblem(f"cannot read {path}: {exc.strerror}", path=str(path)) from exc


@dataclass(frozen=True)
class Entry:
    """An artifact of a layout, and what its index calls it."""

    tag: str | None
    descriptor: Descriptor

    def __str__(self) -> str:
        return self.tag or f"@{self.descriptor.digest}"


class Source:
    """A layout whose version is right (see :func:`opened`)."""

    def __init__(self, files: Files, what: str) -> None:
        self._files = files
        self.what = what
        check_version(read_document(files, MARKER, what), what)

    def index(self) -> dict[str, Any]:
        """``index.json``, whose ``manifests`` is a list. Raises InputError where it is missing or something else."""
        return parse_index(read_document(self._files, INDEX, self.what), self.what)

    def entries(self) -> list[Entry]:
        """What the layout holds, in the order of its index."""
        answer = []
        for i, item in enumerate(self.index()["manifests"]):
            where = f"{self.what}: {INDEX}: manifests[{i}]"
            descriptor = Descriptor.from_json(item, where)
            answer.append(Entry(annotations_of(item, where).get(mediatypes.REF_NAME_ANNOTATION), descriptor))
        return answer

    def select(self, place: Place) -> Entry:
        """The one that *place* names; without a tag, the only one.

        Raises:
            ReferenceNotFound: there is none like this.
            InputError: there are several.
        """
        entries = self.entries()
        if place.digest is not None:
            fitting = [e for e in entries if e.descriptor.digest == place.digest]
        elif place.tag is not None:
            fitting = [e for e in entries if e.tag == place.tag]
        else:
            fitting = entries
        listing = ", ".join(map(ascii, map(str, entries[:_LISTED_MAX]))) + (", …" if entries[_LISTED_MAX:] else "")
        if not fitting:
            raise ReferenceNotFound(
                f"there is no artifact {str(place)!a}",
                hint=f"it holds {listing}" if entries else "the layout is empty",
                artifacts=[str(e) for e in entries[:_LISTED_MAX]],
            )
        if len({e.descriptor.digest for e in fitting}) > 1:
            raise InputError(
                f"{str(place)!a} may be one of several artifacts: {listing}",
                hint=f"name one, as in {place.kind}:{place.path}:{entries[0]}",
                artifacts=[str(e) for e in entries[:_LISTED_MAX]],
            )
        return next((e for e in fitting if name_in(e.tag)), fitting[0])

    def manifest(self, descriptor: Descriptor) -> ImageManifest | ImageIndex:
        """A manifest or index, checked against its digest.

        Raises:
            BlobNotFound, DigestMismatch: it is not there, or is another.
            JsonInvalid, RegistryProtocol: see :func:`parse_manifest`.
        """
        with self.blob(descriptor) as content:
            raw = _read(content, limits.OCI_MANIFEST_MAX, f"{self.what}: the manifest {descriptor.digest}")
        if of_bytes(raw) != descriptor.digest:
            raise DigestMismatch(
                f"{self.what}: the content of {descriptor.digest} has another digest",
                hint="the source is damaged or was tampered with",
                expected=descriptor.digest,
                got=of_bytes(raw),
                rule="OCI-21",
            )
        return parse_manifest(raw, f"{self.what}: the manifest {descriptor.digest}")

    @contextlib.contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[Content]:
        """Where a blob's bytes are, which nobody has checked yet.

        Raises:
            BlobNotFound: it is not there.
            DigestMismatch: it is of another size.
        """
        with self._files.open(f"{BLOBS}/{hex_of(descriptor.digest)}") as content:
            if content is None:
                raise BlobNotFound(
                    f"{self.what} lacks the blob {descriptor.digest}",
                    hint="it is not complete; copy it again",
                    digest=descriptor.digest,
                )
            if content.size != descriptor.size:
                raise DigestMismatch(
                    f"{self.what}: the blob {descriptor.digest} has {content.size} bytes, not {descriptor.size}",
                    hint="the source is damaged or was tampered with",
                    expected=descriptor.size,
                    got=content.size,
                    rule="OCI-21",
                )
            yield content


def read_document(files: Files, name: str, what: str) -> bytes | None:
    """The content of :data:`MARKER` or :data:`INDEX`, None where there is none."""
    with files.open(name) as content:
        max_size = INDEX_MAX if name == INDEX else _MARKER_MAX
        return None if content is None else _read(content, max_size, f"{what}: {name}")


def check_version(marker: bytes | None, what: str) -> None:
    """Whether the content of ``oci-layout`` is that of a layout we know. Raises InputError where it is not."""
    value = None if marker is None else strictjson.parse(marker, f"{what}: {MARKER}", max_size=_MARKER_MAX)
    if marker is None or not isinstance(value, dict) or value.get("imageLayoutVersion") != LAYOUT_VERSION:
        problem = f"there is no {MARKER} in it" if marker is None else f"its {MARKER} says another version"
        raise InputError(f"{what} is no OCI image layout of version {LAYOUT_VERSION}: {problem}", hint="check the path")


def parse_index(raw: bytes | None, what: str) -> dict[str, Any]:
    """The content of ``index.json``. Raises InputError where it is not one."""
    value = None if raw is None else strictjson.parse(raw, f"{what}: {INDEX}", max_size=INDEX_MAX)
    if not isinstance(value, dict) or not isinstance(value.get("manifests"), list):
        raise InputError(f"{what} has no {INDEX} with a list of manifests", hint="it is damaged; copy it again")
    return value


def _read(content: Content, max_size: int, what: str) -> bytes:
    if content.size > max_size:
        raise FileProblem(
            f"{what} has {content.size} bytes; at most {max_size} are allowed",
            code="file-too-large",
            size=content.size,
            limit=max_size,
        )
    return b"".join(pieces(content, what))


def pieces(content: Content, what: str) -> Iterator[bytes]:
    """The bytes of *content*, some at a time. Raises FileProblem when there are fewer than there were."""
    at, end = content.offset, content.offset + content.size
    while at < end:
        data = os.pread(content.fd, min(fsutil.COPY_BUFFER, end - at), at)
        if not data:
            raise FileProblem(f"{what} shrinks while it is read")
        yield data
        at += len(data)
