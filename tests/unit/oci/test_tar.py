"""Tar archives: what other writers make is read, what is made to confuse is refused, what we write others read."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from support.layouts import archive, member

from ovms.errors import InputError
from ovms.oci import tar
from ovms.oci.tar import Member

NAME = "blobs/sha256/" + "a" * 64
FILE = member("index.json", b"{}")
LARGE = (1 << 33) + 5


def counts(name: str) -> bool:
    return name in ("index.json", NAME)


def read(path: Path) -> dict[str, Member]:
    with path.open("rb") as file:
        return tar.members(file.fileno(), "oci-archive:x", counts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.tar"


def refused(file: Path, data: bytes) -> InputError:
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"^oci-archive:x is ") as caught:
        read(file)
    return caught.value


@pytest.mark.spec("OCI-27")
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_what_others_write(file: Path, format: Literal[0, 1, 2], prefix: str) -> None:
    long = "other/" + "/".join("x" * 90 for _ in range(2))
    members = [
        member("./", type=tarfile.DIRTYPE),
        member("blobs/", type=tarfile.DIRTYPE),
        member(long, b"passed over", mtime=1.5 if format == tarfile.PAX_FORMAT else 1),
        member(prefix + NAME, b"blob" * 200, uname="ü"),
        member("/index.json", b"no"),
        member("../index.json", b"no"),
        member("x/index.json", b"no"),
        member("link", type=tarfile.SYMTYPE, linkname="index.json"),
        member("hard", type=tarfile.LNKTYPE, linkname="y" * 150 if format != tarfile.USTAR_FORMAT else "y"),
        member("fifo", type=tarfile.FIFOTYPE),
        member("null", type=tarfile.CHRTYPE),
        member(prefix + "index.json", b"{}"),
    ]
    data = archive(members, format=format)
    file.write_bytes(data)
    found = read(file)
    assert set(found) == {NAME, "index.json"}
    assert {name: data[m.offset : m.offset + m.size] for name, m in found.items()} == {
        NAME: b"blob" * 200,
        "index.json": b"{}",
    }


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE])
def test_files_of_old_formats(file: Path, kind: bytes) -> None:
    file.write_bytes(archive([member(NAME, b"blob", type=kind)]))
    assert set(read(file)) == {NAME}


def pax(*records: tuple[str, str]) -> tuple[tarfile.TarInfo, bytes]:
    """An extended header of the next member."""
    return member("PaxHeader", b"".join(tar._record(*record) for record in records), type=tarfile.XHDTYPE)


def raw(data: bytes, kind: bytes = tarfile.XHDTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member("PaxHeader", data, type=kind)


def changed(data: bytes, at: int, new: bytes) -> bytes:
    """With other bytes in the first header, and the checksum that goes with them."""
    block = bytearray(data[:512])
    block[at : at + len(new)] = new
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[512:]


END = bytes(1024)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty blocks only are fine, but not less": (bytes(511), "ends early"),
    "no tar": (b"something else" * 100, "does not begin like a tar"),
    "a short text": (b'{"spdxVersion": "SPDX-2.3"}', "does not begin like a tar"),
    "cut in the first header": (archive([FILE])[:300], "ends early"),
    "no end": (archive([FILE])[:1024], "ends early"),
    "cut in a member": (archive([member(NAME, bytes(2000))])[:1500], "in the middle of a member"),
    "cut in a header": (archive([FILE, FILE])[:1300], "ends early"),
    "cut in an extended header": (archive([pax(("path", "x"))])[:600], "ends early"),
    "a size beyond the end": (changed(archive([FILE]), 124, b"77777777777\0"), "in the middle of a member"),
    "a size without end": (changed(archive([FILE]), 124, b"\x80" + b"\xff" * 11), "a size that is none"),
    "a negative size": (changed(archive([FILE]), 124, b"\xff" * 12), "a size that is none"),
    "a size in words": (changed(archive([FILE]), 124, b"lots\0"), "a size that is none"),
    "a size with a sign": (changed(archive([FILE]), 124, b"-1\0"), "a size that is none"),
    "a wrong checksum": (archive([FILE])[:1024] + b"x" * 512 + END, "wrong checksum"),
    "a name twice": (archive([FILE, member("./index.json", b"[]")]), "index.json is in it twice"),
    "a symbolic link": (archive([member(NAME, type=tarfile.SYMTYPE, linkname="/etc/shadow")]), "no regular file"),
    "a hard link": (archive([member(NAME, type=tarfile.LNKTYPE, linkname="index.json")]), "no regular file"),
    "a device": (archive([member(NAME, type=tarfile.CHRTYPE, devmajor=1, devminor=5)]), "no regular file"),
    "a FIFO": (archive([member("./index.json", type=tarfile.FIFOTYPE)]), "no regular file"),
    "a directory": (archive([member(NAME + "/", type=tarfile.DIRTYPE)]), "no regular file"),
    "a file that is called a directory": (archive([member(NAME + "/", b"x")]), "no regular file"),
    "a link with content": (archive([member("x", b"x" * 600, type=tarfile.SYMTYPE, linkname="y")]), "have content"),
    "a directory with content": (archive([member("x", b"x" * 600, type=tarfile.DIRTYPE)]), "have content"),
    "GNU's sparse file": (archive([member("x", b"x", type=tarfile.GNUTYPE_SPARSE)]), "sparse"),
    "a multi-volume member": (archive([member("x", b"x", type=b"M")]), "of the type"),
    "PAX's sparse file": (archive([pax(("GNU.sparse.realsize", "9")), FILE]), "GNU.sparse.realsize"),
    "star's sparse file": (archive([pax(("SCHILY.realsize", "9")), FILE]), "SCHILY.realsize"),
    "two sizes": (archive([pax(("size", "1")), FILE]), "two sizes, 2 and 1"),
    "two large sizes": (archive([pax(("size", str(LARGE))), FILE]), "two sizes"),
    "a large size that is not there": (archive([pax(("size", str(LARGE))), member(NAME)]), "middle of a member"),
    "two records of a size": (archive([pax(("size", "2"), ("size", "2")), FILE]), "size that is none"),
    "a size with a plus": (archive([pax(("size", "+2")), FILE]), "size that is none"),
    "a size without end in PAX": (archive([pax(("size", "9" * 19)), FILE]), "size that is none"),
    "two names": (archive([pax(("path", "a"), ("path", NAME)), FILE]), "two names"),
    "two names in two ways": (
        archive([raw(b"index.json\0", tarfile.GNUTYPE_LONGNAME), pax(("path", NAME)), FILE]),
        "two names",
    ),
    "a name with a NUL": (archive([pax(("path", "index.json\0x")), FILE]), "two names"),
    "a name by PAX, twice": (archive([FILE, pax(("path", "index.json")), member("y", b"")]), "in it twice"),
    "a link by PAX": (archive([pax(("path", NAME)), member("y", type=tarfile.SYMTYPE, linkname="z")]), "no regular"),
    "a global name": (archive([raw(tar._record("path", NAME), b"g"),
                               FILE]), "PAX record b'path'"),
    "a global size": (archive([raw(tar._record("size", "2"), b"g"), FILE]), "PAX record b'size'"),
    "an extended header at the end": (archive([FILE, pax(("path", "x"))]), "where a member belongs"),
    "too many extended headers": (archive([*[pax(("a", "b"))] * 9, FILE]), "extended header that is too large"),
    "an extended header that is too large": (archive([raw(bytes(65537))]), "extended header that is too large"),
    "PAX without a length": (archive([raw(b"x path=y\n"), FILE]), "PAX records that are none"),
    "PAX with a length beyond the end": (archive([raw(b"99 path=y\n"), FILE]), "PAX records that are none"),
    "PAX with a length of nothing": (archive([raw(b"1 path=y\n"), FILE]), "PAX records that are none"),
    "PAX without a newline": (archive([raw(b"9 path=yy"), FILE]), "PAX records that are none"),
    "PAX without a key": (archive([raw(b"5 =y\n"), FILE]), "PAX records that are none"),
    "PAX without a value": (archive([raw(b"5 yy\n"), FILE]), "PAX records that are none"),
}  # fmt: skip


@pytest.mark.spec("OCI-27")
@pytest.mark.parametrize(("data", "problem"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archives(file: Path, data: bytes, problem: str) -> None:
    error = refused(file, data)
    assert re.search(re.escape(problem), error.message), error.message
    assert error.hint


@pytest.mark.parametrize(
    ("magic", "program"),
    [(b"\x1f\x8b\x08", "gunzip"), (b"\x28\xb5\x2f\xfd", "zstd -d"), (b"BZh9", "bunzip2"), (b"\xfd7zXZ\0", "unxz")],
)
@pytest.mark.parametrize("size", [20, 5000])
def test_a_compressed_archive_is_told_from_rubbish(file: Path, magic: bytes, program: str, size: int) -> None:
    error = refused(file, magic + bytes(size))
    assert "compressed" in error.message
    assert program in (error.hint or "")


def test_members_are_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MEMBERS_MAX", 3)
    file.write_bytes(archive([member(f"x{i}") for i in range(3)]))
    assert read(file) == {}
    assert "more than 3 members" in refused(file, archive([member(f"x{i}") for i in range(4)])).message


def test_an_archive_that_grows_for_ever_is_read_to_where_it_ends(file: Path) -> None:
    file.write_bytes(archive([FILE]))
    with file.open("r+b") as out:
        out.truncate(1 << 40)
    assert set(read(file)) == {"index.json"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_large_members_of_others(file: Path, format: Literal[1, 2]) -> None:
    info = tarfile.TarInfo(NAME)
    info.size = LARGE
    head = info.tobuf(format)
    file.write_bytes(head)
    end = len(head) + LARGE + -LARGE % 512
    with file.open("r+b") as out:
        out.seek(end)
        out.write(archive([FILE]))
    assert read(file)[NAME] == Member(len(head), LARGE)
    assert read(file)["index.json"].offset == end + 512


@pytest.mark.parametrize("size", [0, 1, 512, tar.OCTAL_SIZE_MAX, tar.OCTAL_SIZE_MAX + 1, 1 << 43])
def test_what_we_write_others_read(file: Path, size: int) -> None:
    head = tar.header(NAME, size)
    assert len(head) % 512 == 0
    file.write_bytes(head)
    with file.open("r+b") as out:
        out.truncate(len(head) + size + tar.padding(size))
        if size <= 512:
            out.seek(0, os.SEEK_END)
            out.write(tar.TRAILER)
            out.flush()
            assert read(file) == {NAME: Member(len(head), size)}
    with tarfile.open(fileobj=io.BytesIO(head + bytes(1024))) as other:
        info = other.next()
    assert info is not None
    assert (info.name, info.size, info.mtime, info.mode, info.uid, info.uname) == (NAME, size, 0, 0o644, 0, "")


def test_whatever_the_bytes_the_error_is_ours(file: Path) -> None:
    rng = random.Random(1)
    good = archive([pax(("path", NAME), ("size", "3")), member("x", b"abc"), FILE])
    changes: list[Callable[[bytearray], Any]] = [
        lambda data: data.__setitem__(rng.randrange(len(data)), rng.randrange(256)),
        lambda data: data.__delitem__(slice(rng.randrange(len(data)), None)),
        lambda data: data.insert(rng.randrange(len(data)), rng.randrange(256)),
    ]
    refusals = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            rng.choice(changes)(data)
            if not data:
                break
        if rng.random() < 0.7 and len(data) >= 512:
            data = bytearray(changed(bytes(data), 0, b""))
        file.write_bytes(data)
        try:
            found = read(file)
        except InputError:
            refusals += 1
        else:
            assert all(m.offset + m.size <= len(data) for m in found.values())
    assert refusals > 100
