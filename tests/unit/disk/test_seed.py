"""The seed disk, read back by a reader that follows ECMA-119 and not our writer, and by the system's."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.disk import seed
from ovms.errors import InputError

FILES = {"meta-data": b'{"instance-id": "x"}\n', "user-data": b"#cloud-config\n" + b"x" * 5000}


def sector(disk: bytes, number: int) -> bytes:
    return disk[number * 2048 : (number + 1) * 2048]


def both(data: bytes) -> int:
    little, big = int.from_bytes(data[: len(data) // 2], "little"), int.from_bytes(data[len(data) // 2 :], "big")
    assert little == big
    return little


def read(disk: bytes, kind: int) -> tuple[str, dict[str, bytes]]:
    """The label and the files as a descriptor of *kind* has them: 1 with Rock Ridge's names, 2 with Joliet's."""
    descriptors = []
    for number in range(16, 32):
        descriptors.append(sector(disk, number))
        assert descriptors[-1][1:6] == b"CD001"
        if descriptors[-1][0] == 255:
            break
    (found,) = [descriptor for descriptor in descriptors if descriptor[0] == kind]
    assert both(found[80:88]) * 2048 == len(disk)
    encoding = "ascii" if kind == 1 else "utf-16-be"
    label = found[40:72].decode(encoding).rstrip(" ")
    root = found[156:190]
    place, size = both(root[2:10]), both(root[10:18])
    for offset, order in ((140, "little"), (148, "big")):
        table = sector(disk, int.from_bytes(found[offset : offset + 4], order))  # type: ignore[arg-type]
        assert int.from_bytes(table[2:6], order) == place  # type: ignore[arg-type]
    directory = disk[place * 2048 : place * 2048 + size]
    files, at = {}, 0
    while directory[at]:
        record = directory[at : at + directory[at]]
        at += directory[at]
        name = record[33 : 33 + record[32]]
        if name in (b"\0", b"\1"):
            assert both(record[2:10]) == place
            continue
        start, length = both(record[2:10]) * 2048, both(record[10:18])
        shown = name.decode(encoding)
        if kind == 1:
            shown = alternate_name(record[33 + record[32] + (record[32] + 1) % 2 :])
        files[shown] = disk[start : start + length]
    return label, files


def alternate_name(entries: bytes) -> str:
    at, name = 0, ""
    while at + 4 <= len(entries) and entries[at + 2]:
        if entries[at : at + 2] == b"NM":
            name += entries[at + 5 : at + entries[at + 2]].decode()
        at += entries[at + 2]
    return name


@pytest.mark.spec("BOOT-43")
@pytest.mark.parametrize("kind", [1, 2], ids=["rock-ridge", "joliet"])
def test_the_files_are_there_and_nothing_else(kind: int) -> None:
    assert read(seed.image(FILES), kind) == ("cidata", FILES)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9-]{0,29}", fullmatch=True), st.binary(max_size=9000), min_size=1, max_size=8
    )
)
def test_any_files_come_back(files: dict[str, bytes]) -> None:
    disk = seed.image(files)
    assert len(disk) % seed.STEP == 0
    assert read(disk, 1) == read(disk, 2) == ("cidata", files)


def test_the_same_files_give_the_same_bytes() -> None:
    assert seed.image(FILES) == seed.image(dict(reversed(FILES.items())))
    # what a guest of ours mounted and cloud-init read (tests/e2e/test_cloud_init.py)
    digest = hashlib.sha256(seed.image({"meta-data": b"a", "user-data": b"b"})).hexdigest()
    assert digest == "f04bfa4a7b8bb2f674992e9c8319dbd0377aec982a947748e0ebe8fdc9d03fa3"


@pytest.mark.parametrize(
    "files",
    [{}, {f"f{i}": b"" for i in range(9)}, {"../x": b""}, {"A": b""}, {"a" * 31: b""}, {"a": bytes(seed.FILE_MAX + 1)}],
)
def test_what_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(InputError):
        seed.image(files)


def test_the_system_knows_it_by_its_label(tmp_path: Path) -> None:
    blkid = shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if blkid is None:
        pytest.skip("no blkid here")
    (tmp_path / "seed").write_bytes(seed.image(FILES))
    told = subprocess.run([blkid, "-p", "-o", "export", tmp_path / "seed"], capture_output=True, text=True, timeout=20)
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(told.stdout.splitlines())
