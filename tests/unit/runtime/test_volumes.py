"""What follows --volume, and the files behind it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovms.disk import qcow2
from ovms.errors import DiskInvalid, FileProblem, InputError, Locked, OvmsError, Unsupported, UsageError
from ovms.runtime import volumes
from ovms.runtime.volumes import Volume
from ovms.spec.manifest import DiskFormat
from ovms.vmm.extras import Share


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "LOCK_WAIT", 0.0)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").write_bytes(bytes(4096))
    return tmp_path / "raw"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    qcow2.create_overlay(tmp_path / "image", 1 << 20)
    return tmp_path / "image"


@contextlib.contextmanager
def opened(*texts: object, root: Path = Path("/nowhere")) -> Iterator[list[int]]:
    with contextlib.ExitStack() as held:
        yield [disk.fd for disk in volumes.open_disks(volumes.parse([str(t) for t in texts]), root, held)]


def test_names_and_defaults(raw: Path, image: Path, tmp_path: Path) -> None:
    texts = [str(raw), f"{image},format=qcow2,ro,serial=data", str(tmp_path), f"{tmp_path},tag=src,ro"]
    assert volumes.parse(texts) == (
        Volume(raw, DiskFormat.RAW, False, "vol0", stated=False),
        Volume(image, DiskFormat.QCOW2, True, "data"),
        Volume(tmp_path, None, True, "vol2"),
        Volume(tmp_path, None, True, "src"),
    )


def test_a_comma_in_a_path_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / "a,b").write_bytes(bytes(512))
    (volume,) = volumes.parse([f"{tmp_path}/a,,b,ro"])
    assert (volume.path, volume.read_only) == (tmp_path / "a,b", True)


def test_a_record_keeps_all_of_it(raw: Path, tmp_path: Path) -> None:
    for volume in volumes.parse([f"{raw},format=raw,ro", str(tmp_path), f"{tmp_path},rw,via=virtiofs"]):
        assert Volume.from_json(volume.to_json()) == volume


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (",format=vmdk", UsageError),
        (",format", UsageError),
        (",ro=1", UsageError),
        (",ro,ro", UsageError),
        (",ro,rw", UsageError),
        (",tag=x", UsageError),
        (",serial=", UsageError),
        (",serial=a/b", UsageError),
        (",serial=123456789012345678901", UsageError),
        (",backing=/etc/passwd", UsageError),
        (":/mnt", FileProblem),
    ],
)
def test_what_is_no_volume(raw: Path, options: str, error: type[OvmsError]) -> None:
    with pytest.raises(error):
        volumes.parse([f"{raw}{options}"])


@contextlib.contextmanager
def directories(*texts: object, root: Path = Path("/nowhere")) -> Iterator[tuple[Share, ...]]:
    with contextlib.ExitStack() as held:
        yield volumes.open_directories(volumes.parse([str(t) for t in texts]), root, held)


def test_directories_are_for_reading_unless_it_is_said(tmp_path: Path) -> None:
    texts = (tmp_path, f"{tmp_path},ro", f"{tmp_path},rw,tag=work")
    assert [volume.read_only for volume in volumes.parse([str(text) for text in texts])] == [True, True, False]
    with directories(*texts) as found:
        assert [(share.path, share.read_only, share.name) for share in found] == [
            (tmp_path, True, "vol0"),
            (tmp_path, True, "vol1"),
            (tmp_path, False, "work"),
        ]
        assert all(os.path.samestat(os.fstat(share.fd), tmp_path.stat()) for share in found)
    for option in ("format=raw", "serial=x"):
        with pytest.raises(UsageError, match="no format"):
            volumes.parse([f"{tmp_path},{option}"])
    assert [volume.via for volume in volumes.parse([str(tmp_path), f"{tmp_path},via=virtiofs"])] == ["9p", "virtiofs"]
    for option in ("via", "via=nfs", "via=9p,via=9p"):
        with pytest.raises(UsageError):
            volumes.parse([f"{tmp_path},{option}"])
    with pytest.raises(UsageError, match="not beside"):
        volumes.parse([f"{tmp_path},ro,rw"])


def test_what_is_no_directory_of_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    for place in ("/", "/proc", "/sys/kernel", f"{tmp_path}/link"):
        for option in ("", ",rw"):
            with pytest.raises(Unsupported, match="not shared"), directories(f"{place}{option}"):
                pass


@pytest.mark.parametrize("place", ["/etc", "/usr", "/usr/share", "/bin", "/run"])
def test_what_a_host_believes_is_not_written_to(place: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    for path in (place, tmp_path / "link"):
        with pytest.raises(Unsupported, match="runs, or believes"), directories(f"{path},rw"):
            pass
        with directories(f"{path},ro"):
            pass


def test_no_directory_with_our_own_files_is_written_to(tmp_path: Path) -> None:
    root = tmp_path / "a" / "root"
    (root / "store").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    (tmp_path / "a" / "root2").mkdir()
    (tmp_path / "link").symlink_to(root / "store")
    for path in (root, root / "store", tmp_path / "a", tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match="files of ovms"), directories(f"{path},rw", root=root):
            pass
        with directories(path, root=root):
            pass
    with directories(f"{tmp_path}/beside,rw", f"{tmp_path}/a/root2,rw", root=root):
        pass


def test_a_directory_that_went(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    parsed = volumes.parse([f"{tmp_path}/dir,rw"])
    (tmp_path / "dir").rmdir()
    (tmp_path / "dir").touch()
    with pytest.raises(FileProblem, match="Not a directory"), contextlib.ExitStack() as held:
        volumes.open_directories(parsed, tmp_path, held)


def test_too_many_and_two_of_one_name(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="room for 8"):
        volumes.parse([str(raw)] * 9)
    with pytest.raises(UsageError, match="room for 4"):
        volumes.parse([str(tmp_path)] * 5)
    with pytest.raises(UsageError, match="two volumes have the name vol1"):
        volumes.parse([f"{raw},serial=vol1", str(raw)])


def test_one_writer_or_any_number_of_readers(raw: Path) -> None:
    with opened(f"{raw},ro"), opened(f"{raw},ro"), pytest.raises(Locked, match="in use by another VM"), opened(raw):
        pass
    with opened(raw):
        for text in (str(raw), f"{raw},ro"):
            with pytest.raises(Locked), opened(text):
                pass
    with opened(raw) as (fd,):
        kept = os.dup(fd)  # as the VMM inherits it
    try:
        with pytest.raises(Locked), opened(raw):
            pass
    finally:
        os.close(kept)
    with opened(raw):
        pass
    with pytest.raises(Locked), opened(raw, f"{raw},ro"):
        pass


def test_no_format_is_guessed(raw: Path, image: Path) -> None:
    with pytest.raises(DiskInvalid, match="is a qcow2 image") as caught, opened(image):
        pass
    assert "format=qcow2" in str(caught.value.hint)
    with opened(f"{image},format=raw"), pytest.raises(DiskInvalid), opened(f"{raw},format=qcow2"):
        pass


def test_a_qcow2_volume_names_no_file(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(72)
        file.write((1 << 2).to_bytes(8, "big"))
    with pytest.raises(DiskInvalid, match="external data file"), opened(f"{image},format=qcow2"):
        pass


def test_what_is_no_disk(tmp_path: Path, raw: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "odd").write_bytes(bytes(513))
    (tmp_path / "empty").touch()
    for name, error in (
        ("fifo", FileProblem),
        ("odd", DiskInvalid),
        ("odd,format=raw", DiskInvalid),
        ("empty", FileProblem),
    ):
        with pytest.raises(error), opened(f"{tmp_path}/{name}"):
            pass
    with pytest.raises(FileProblem, match="not a regular file"), opened("/dev/null,format=raw"):
        pass


def test_a_guest_never_writes_to_our_own_files(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(raw)
    with pytest.raises(InputError, match="belongs to ovms"), opened(link, root=tmp_path):
        pass
    with opened(f"{link},ro", root=tmp_path):
        pass
