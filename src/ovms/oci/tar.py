"""Tar archives: read in place, without unpacking anything; those of OCI layouts are written the same way every time.

Read are the POSIX and GNU formats, as far as files, directories and links need them. Of a layout's archive only exact names
count, with or without ``./`` before them; every other member is passed over, whatever it is. A member that would mean one thing
to us and another to the next reader (a link under a name that counts, a name twice, two sizes) is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Final

from ovms.errors import InputError
from ovms.lazy import dataclass, regex

BLOCK: Final = 512
#: Members of an archive, of any kind.
MEMBERS_MAX: Final = 65536
#: Bytes of one extended header (a long name, PAX records).
EXTENDED_MAX: Final = 64 * 1024
#: Extended headers before one member.
EXTENDED_COUNT_MAX: Final = 8
#: What a size in octal digits ends at; beyond, it takes a PAX record.
OCTAL_SIZE_MAX: Final = 8**11 - 1
SIZE_MAX: Final = 2**63 - 1

_ZEROES: Final = bytes(BLOCK)
_COMPRESSED: Final = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}
_NO_TAR: Final = "it does not begin like a tar archive"
_REGULAR: Final = b"0\x007"
#: Links, devices, directories, FIFOs: they have no content.
_EMPTY: Final = b"123456"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_PAX_RECORD: Final = regex(rb"([1-9][0-9]{0,8}) ")


@dataclass(frozen=True)
class Member:
    """Where a regular file's content is in the archive."""

    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A member of any kind: its *kind* is the letter of its header, *link* what a link names, *mode* its permissions.

    Names hold bytes that are no UTF-8 as surrogates.
    """

    name: str
    kind: bytes
    link: str
    mode: int
    content: Member

    @property
    def regular(self) -> bool:
        """Whether it is a file, which has content."""
        return self.kind in _REGULAR and not self.name.endswith("/")


def members(fd: int, what: str, counts: Callable[[str], bool]) -> dict[str, Member]:
    """The regular files whose name *counts*, by their name without ``./``.

    Raises:
        InputError: *what* is no tar archive, ends early, is compressed, or is made to confuse.
    """
    found: dict[str, Member] = {}
    reader = _Reader(fd, what, MEMBERS_MAX)
    for entry in reader.read():
        name = entry.name.removeprefix("./")
        if not counts(name.rstrip("/")):
            continue
        if not entry.regular:
            raise reader.wrong(f"{name} is no regular file")
        if name in found:
            raise reader.wrong(f"{name} is in it twice")
        found[name] = entry.content
    return found


def entries(fd: int, what: str, *, most: int) -> Iterator[Entry]:
    """All members in their order, *most* at the most.

    Raises: as :func:`members`, while it goes on.
    """
    return _Reader(fd, what, most).read()


class _Reader:
    def __init__(self, fd: int, what: str, most: int) -> None:
        self._fd = fd
        self._what = what
        self._most = most
        self._end = os.fstat(fd).st_size
        self._at = 0
        #: What extended headers say of the next member.
        self._name: bytes | None = None
        self._link: bytes | None = None
        self._size: int | None = None
        self._extended = 0

    def read(self) -> Iterator[Entry]:
        for _ in range(self._most + 1):
            header = self._pread(BLOCK)
            if header == _ZEROES:
                if self._extended:
                    raise self.wrong("the archive ends where a member belongs")
                return
            yield from self._member(header)
        raise self.wrong(f"more than {self._most} members")

    def _member(self, header: bytes) -> Iterator[Entry]:
        # one, or none of a header that belongs to the next
        if not _sum_is_right(header):
            if self._at == 0:
                self._refuse_compressed(header)
                raise self.wrong(_NO_TAR)
            raise self.wrong("a header with a wrong checksum")
        kind, size = header[156:157], self._number(header[124:136], "size")
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            self._extend(kind, size)
            return
        said, name, link = self._size, self._name, self._link
        self._size, self._name, self._link, self._extended = None, None, None, 0
        if said is not None:
            if said != size and not (said > OCTAL_SIZE_MAX and size == 0):
                raise self.wrong(f"a member of two sizes, {size} and {said}")
            size = said
        if kind in _EMPTY and size:
            raise self.wrong("a link, device or directory that claims to have content")
        if kind not in _REGULAR and kind not in _EMPTY:
            raise self.wrong(f"a member of the type {kind!a}, such as a sparse file")
        offset = self._at + BLOCK
        if size > self._end - offset:
            raise self.wrong("it ends in the middle of a member", truncated=True)
        yield Entry(
            _text(_name_of(header) if name is None else name),
            kind,
            _text(header[157:257].partition(b"\0")[0] if link is None else link),
            _mode(header[100:108]),
            Member(offset, size),
        )
        self._at = offset + _padded(size)

    # --- extended headers --------------------------------------------------------------------------------------

    def _extend(self, kind: bytes, size: int) -> None:
        self._extended += 1
        if self._extended > EXTENDED_COUNT_MAX or size > EXTENDED_MAX:
            raise self.wrong("an extended header that is too large")
        self._at += BLOCK
        data = self._pread(size)
        self._at += _padded(size)
        if kind == _LONG_NAME:
            self._set_name(data.rstrip(b"\0"))
        elif kind == _LONG_LINK:
            self._set_link(data.rstrip(b"\0"))
        elif kind in (_PAX, _PAX_GLOBAL):
            for key, value in self._records(data):
                self._record(kind, key, value)

    def _record(self, kind: bytes, key: bytes, value: bytes) -> None:
        if key.startswith((b"GNU.sparse.", b"SCHILY.realsize")) or (
            kind == _PAX_GLOBAL and key in (b"path", b"size", b"linkpath")
        ):
            raise self.wrong(f"the PAX record {key[:40]!a}")
        if key == b"path":
            self._set_name(value)
        elif key == b"linkpath":
            self._set_link(value)
        elif key == b"size":
            if self._size is not None or not re.fullmatch(rb"0|[1-9][0-9]{0,18}", value) or int(value) > SIZE_MAX:
                raise self.wrong("a PAX record of a size that is none")
            self._size = int(value)

    def _set_name(self, name: bytes) -> None:
        if self._name is not None or b"\0" in name:
            raise self.wrong("a member of two names")
        self._name = name

    def _set_link(self, name: bytes) -> None:
        if self._link is not None or b"\0" in name:
            raise self.wrong("a link to two things")
        self._link = name

    def _records(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        at = 0
        while at < len(data):
            match = _PAX_RECORD.match(data, at)
            end = at + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
                raise self.wrong("PAX records that are none")
            key, equals, value = data[match.end() : end - 1].partition(b"=")
            if not key or not equals:
                raise self.wrong("PAX records that are none")
            yield key, value
            at = end

    # --- bytes -------------------------------------------------------------------------------------------------

    def _pread(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self._at)
        if len(data) != size:
            if self._at == 0:
                self._refuse_compressed(data)
                if data.strip(b"\0") and data[257:262] != b"ustar":
                    raise self.wrong(_NO_TAR)
            raise self.wrong("it ends early", truncated=True)
        return data

    def _number(self, field: bytes, what: str) -> int:
        if field[0] == 0x80:  # GNU's way to write large ones
            value = int.from_bytes(field[1:], "big")
        elif re.fullmatch(rb" *[0-7]*[ \0]*", field):
            value = int(field.strip(b" \0") or b"0", 8)
        else:
            value = -1
        if not 0 <= value <= SIZE_MAX:
            raise self.wrong(f"a {what} that is none")
        return value

    def _refuse_compressed(self, data: bytes) -> None:
        for magic, program in _COMPRESSED.items():
            if data.startswith(magic):
                raise InputError(
                    f"{self._what} is compressed",
                    hint=f"uncompress it first, with '{program}'; the parts have no use of it",
                )

    def wrong(self, problem: str, *, truncated: bool = False) -> InputError:
        return InputError(
            f"{self._what} is no archive that can be read: {problem}, at offset {self._at}",
            hint="copy it again: it is not complete" if truncated else "make it anew, with 'ovm push' or 'skopeo copy'",
            offset=self._at,
        )


def _sum_is_right(header: bytes) -> bool:
    field = header[148:156].strip(b" \0")
    # Old writers added the bytes up as signed numbers; a name in ASCII gives the same sum both ways.
    actual = sum(header) - sum(header[148:156]) + 8 * 0x20
    return re.fullmatch(rb"[0-7]{1,8}", field) is not None and int(field, 8) == actual


def _name_of(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _mode(field: bytes) -> int:
    # nobody is confused by permissions that make no sense: they are a file's usual ones then
    text = field.strip(b" \0")
    return int(text, 8) & 0o7777 if re.fullmatch(rb"[0-7]{1,8}", text) else 0o644


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# --- writing ---------------------------------------------------------------------------------------------------------


def padding(size: int) -> int:
    """How many zeroes follow a content of *size* bytes."""
    return _padded(size) - size


def header(name: str, size: int, *, directory: bool = False) -> bytes:
    """What stands before a member's content: nothing of the time, the user or the machine is in it."""
    if size <= OCTAL_SIZE_MAX:
        return _header(name, size, b"5" if directory else b"0", 0o755 if directory else 0o644)
    record = _record("size", str(size))
    extended = _header("././@PaxHeader", len(record), _PAX, 0o644) + record + bytes(padding(len(record)))
    return extended + _header(name, 0, b"0", 0o644)


#: What an archive ends with.
TRAILER: Final = bytes(2 * BLOCK)


def _record(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    while len(f"{length} {key}={value}\n") != length:
        length += 1
    return f"{length} {key}={value}\n".encode()


def _header(name: str, size: int, kind: bytes, mode: int) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)] = name.encode("ascii")
    for at, text in ((100, b"%07o\0" % mode), (108, b"0000000\0"), (116, b"0000000\0"), (124, b"%011o\0" % size)):
        block[at : at + len(text)] = text
    block[136:156] = b"00000000000\0" + b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
