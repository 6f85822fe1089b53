"""Whatever way a blob is written, the file is what came."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms import fsutil
from ovms.oci import appending
from ovms.oci.appending import ALIGNMENT, BUFFER, Appender
from ovms.oci.descriptor import Descriptor
from ovms.spec import mediatypes
from ovms.spec.digest import of_bytes

SIZES = st.one_of(
    st.integers(1, 3 * ALIGNMENT),
    st.sampled_from([ALIGNMENT, BUFFER // 4, BUFFER, BUFFER + 1, BUFFER - 1, 2 * BUFFER]),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blob"


def write(path: Path, pieces: list[bytes | memoryview], *, direct: bool = True, start: bytes = b"") -> Appender:
    path.write_bytes(start)
    fd = os.open(path, os.O_RDWR)
    file = Appender(fd, path, direct=direct)
    try:
        file.start(len(start))
        for piece in pieces:
            file.write(piece)
        file.flush()
    finally:
        file.close()
        os.close(fd)
    return file


def pieces_of(sizes: list[int], zero: list[bool], seed: int) -> list[bytes | memoryview]:
    source = random.Random(seed)
    return [bytes(size) if empty else source.randbytes(size) for size, empty in zip(sizes, zero, strict=False)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(SIZES, max_size=8),
    zero=st.lists(st.booleans(), min_size=8, max_size=8),
    start=st.integers(0, 2 * ALIGNMENT),
    direct=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pieces_of_any_size_make_the_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], zero: list[bool], start: int, direct: bool, seed: int
) -> None:
    pieces = pieces_of(sizes, zero, seed)
    first = random.Random(seed + 100).randbytes(start)
    path = tmp_path_factory.mktemp("appending") / "blob"
    file = write(path, pieces, direct=direct, start=first)
    whole = first + b"".join(pieces)
    assert path.read_bytes() == whole
    assert file.size == len(whole)


def aligned(size: int) -> memoryview:
    view = appending.pages(size)
    view[:] = random.Random(size).randbytes(size)
    return view


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(past the cache?, bytes) of every write."""
    seen: list[tuple[bool, int]] = []
    real = fsutil.pwrite_sparse

    def spy(fd: int, data: bytes | memoryview, offset: int) -> None:
        import fcntl

        seen.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), len(data)))
        real(fd, data, offset)

    monkeypatch.setattr(fsutil, "pwrite_sparse", spy)
    return seen


def needs_direct(path: Path) -> None:
    path.touch()
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system knows no O_DIRECT")


def test_pages_go_past_the_cache_as_they_are(path: Path, writes: list[tuple[bool, int]]) -> None:
    needs_direct(path)
    view = aligned(BUFFER)
    write(path, [view, view, view[:100]])
    assert writes == [(True, BUFFER), (True, BUFFER), (False, 100)]


def test_after_an_odd_piece_whole_blocks_follow_again(path: Path, writes: list[tuple[bool, int]]) -> None:
    needs_direct(path)
    view = aligned(BUFFER)
    write(path, [view[:100], view, view, view], start=b"x" * 77)
    assert path.read_bytes() == b"x" * 77 + bytes(view[:100]) + bytes(view) * 3
    # what is before the first whole block and after the last goes through the cache, the rest does not
    assert [direct for direct, _ in writes] == [False, True, True, False]
    assert sum(count for direct, count in writes if direct) == 2 * BUFFER


def test_where_the_file_system_takes_no_direct_write_it_is_written_as_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fsutil.pwrite_sparse
    refused = 0

    def refuse(fd: int, data: bytes | memoryview, offset: int) -> None:
        import fcntl

        nonlocal refused
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd, data, offset)

    needs_direct(path)
    monkeypatch.setattr(fsutil, "pwrite_sparse", refuse)
    view = aligned(BUFFER)
    write(path, [view, view[:5000], view])
    assert path.read_bytes() == bytes(view) + bytes(view[:5000]) + bytes(view)
    assert refused == 2  # as it came, and from memory of our own; then it was clear


def test_a_full_disk_is_an_error_and_what_came_before_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fsutil.pwrite_sparse

    def full(fd: int, data: bytes | memoryview, offset: int) -> None:
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, data, offset)

    monkeypatch.setattr(fsutil, "pwrite_sparse", full)
    view = aligned(BUFFER)
    with pytest.raises(OSError, match="No space"):
        write(path, [view, view])
    assert path.read_bytes() == bytes(view)


def test_runs_of_zeroes_take_no_disk(path: Path) -> None:
    write(path, [aligned(BUFFER), bytes(8 * BUFFER), aligned(BUFFER)])
    info = path.stat()
    assert info.st_size == 10 * BUFFER
    assert info.st_blocks * 512 <= 3 * BUFFER


def test_what_goes_past_the_cache() -> None:
    large, small = 64 << 20, 1 << 20
    digest = of_bytes(b"")
    assert appending.past_cache(Descriptor(mediatypes.DISK_LAYER_OVMS, digest, large))
    assert not appending.past_cache(Descriptor(mediatypes.DISK_LAYER_OVMS, digest, small))
    assert not appending.past_cache(Descriptor(mediatypes.RAM_SNAPSHOT_LZ4, digest, large))
