"""Files that appear whole, locks that die with their holder, copies that keep holes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms import fsutil
from ovms.errors import DiskFull, FileProblem, Locked

MIB = 1 << 20


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Runs Python code in a process of its own, and waits until it says something."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


# --- atomic_write --------------------------------------------------------------------------------------------------


def test_atomic_write_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fsutil.atomic_write(path, b"old")
    fsutil.atomic_write(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        fsutil.atomic_write(path, b"new", durable=durable)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        calls.append(stat.S_IFMT(os.fstat(fd).st_mode))
        real_fsync(fd)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    fsutil.atomic_write(tmp_path / "file", b"x")
    assert calls == [stat.S_IFREG, "replace", stat.S_IFDIR]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {b"a" * 3_000_000, b"b" * 1_000_000}
    path.write_bytes(min(contents))
    code = """if True:
        import sys, pathlib
        from ovms import fsutil
        print("ready", flush=True)
        while True:
            for data in (b"a" * 3_000_000, b"b" * 1_000_000):
                fsutil.atomic_write(pathlib.Path(sys.argv[1]), data, durable=False)
        """
    child = start(code, path)
    try:
        for _ in range(60):
            assert path.read_bytes() in contents
    finally:
        kill(child)
    assert path.read_bytes() in contents  # kill -9 in the middle


def test_atomic_write_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(target)
    fsutil.atomic_write(tmp_path / "link", b"new")
    assert target.read_bytes() == b"mine"
    assert not (tmp_path / "link").is_symlink()


def test_what_a_killed_writer_left_can_be_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index[1].json"
    fsutil.atomic_write(path, b"whole")
    monkeypatch.setattr(os, "replace", lambda *_: None)  # killed before it
    fsutil.atomic_write(path, b"half")
    (tmp_path / ".index1.json.abc.tmp").touch()
    assert len(list(tmp_path.iterdir())) == 3
    fsutil.sweep_temporaries(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".index1.json.abc.tmp", path.name]


# --- inputs --------------------------------------------------------------------------------------------------------


def test_open_input_gives_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with fsutil.open_input(tmp_path / "x", "the kernel", max_size=3) as file:
        assert file.read(10) == b"abc"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with fsutil.listen_unix(path):
        pass


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda path: None, "file-missing", "there is no file"),
        (lambda path: path.symlink_to("nowhere"), "file-missing", "there is no file"),
        (lambda path: path.touch(), "file-empty", "is empty"),
        (lambda path: path.mkdir(), "file-not-regular", "is a directory"),
        (make_fifo, "file-not-regular", "not a regular file"),
        (make_socket, "file-not-regular", "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "file-not-regular", "not a regular file"),
        (lambda path: path.symlink_to(path.name), "file-unreadable", "cannot read"),
        (lambda path: path.write_bytes(b"12345"), "file-too-large", "has 5 bytes; at most 4"),
    ],
)
def test_open_input_refuses(tmp_path: Path, make: object, code: str, words: str) -> None:
    path = tmp_path / "x"
    make(path)  # type: ignore[operator]
    before = len(os.listdir("/proc/self/fd"))
    for call in (fsutil.open_input, fsutil.read_input):
        with pytest.raises(FileProblem, match=words) as info:
            call(path, "disk layer 2", max_size=4)
        assert info.value.code == code
        assert info.value.message.startswith("disk layer 2: ")
        assert info.value.context["path"] == str(path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "nul\0nul"])
def test_open_input_wraps_what_the_kernel_says(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileProblem, match="cannot read"):
        fsutil.open_input(tmp_path / name, "the kernel")


def test_open_input_says_that_it_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileProblem, match="Permission denied") as info:
        fsutil.open_input(tmp_path / "x", "the kernel")
    assert info.value.code == "file-unreadable"


def test_read_input_stops_at_the_limit_when_the_file_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 100)
    real = fsutil._check_input

    def grow(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        path.write_bytes(b"x" * MIB)

    monkeypatch.setattr(fsutil, "_check_input", grow)
    with pytest.raises(FileProblem, match="grows") as info:
        fsutil.read_input(path, "the manifest", max_size=1000)
    assert info.value.code == "file-too-large"


# --- space ---------------------------------------------------------------------------------------------------------


def test_require_space_keeps_a_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsutil, "free_space", lambda path: fsutil.SPACE_RESERVE + 100)
    fsutil.require_space(tmp_path, 100, "the copy")
    with pytest.raises(DiskFull, match="the copy needs 101 bytes") as info:
        fsutil.require_space(tmp_path, 101, "the copy")
    assert info.value.context["needed"] == 101
    assert f"({fsutil.SPACE_RESERVE} of them are to stay free)" in info.value.message, "else it seems to be enough"
    monkeypatch.setattr(fsutil, "free_space", lambda path: 0)
    fsutil.require_space(tmp_path, 0, "nothing")


def test_disk_full_knows_its_errors(tmp_path: Path) -> None:
    assert isinstance(fsutil.disk_full(OSError(28, "x"), "a copy", tmp_path), DiskFull)
    assert isinstance(fsutil.disk_full(OSError(122, "x"), "a copy", tmp_path), DiskFull)
    assert fsutil.disk_full(OSError(5, "x"), "a copy", tmp_path) is None


# --- sparse copies -------------------------------------------------------------------------------------------------


def sparse_file(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(size)
    with path.open("wb") as file:
        for at, data in pieces:
            file.seek(at)
            file.write(data)
            content[at : at + len(data)] = data
        file.truncate(size)
    return bytes(content)


PIECES = st.lists(
    st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=3) | st.just(bytes(8192)), st.integers(0, 4096)),
    max_size=6,
)


@given(PIECES, st.integers(0, 70 * 8192))
def test_copy_sparse_copies_and_hashes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bytes, int]], size: int
) -> None:
    directory = tmp_path_factory.mktemp("sparse")
    places = [(block * 8192 + at, data) for block, data, at in pieces if block * 8192 + at + len(data) <= size]
    content = sparse_file(directory / "in", size, places)
    copied, hashed = hashlib.sha256(), hashlib.sha256()
    progress: list[int] = []
    with (directory / "in").open("rb") as source, (directory / "out").open("wb") as target:
        assert fsutil.copy_sparse(source.fileno(), target.fileno(), hasher=copied, advance=progress.append) == size
        assert fsutil.hash_file(source.fileno(), hashed) == size
    assert (directory / "out").read_bytes() == content
    assert copied.digest() == hashed.digest() == hashlib.sha256(content).digest()
    assert sum(progress) == size


def test_copy_sparse_keeps_holes_and_makes_new_ones(tmp_path: Path) -> None:
    size = 64 * MIB
    sparse_file(tmp_path / "in", size, [(8 * MIB, b"x" * 4096), (32 * MIB, bytes(8 * MIB)), (50 * MIB, b"y")])
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        assert fsutil.copy_sparse(source.fileno(), target.fileno()) == size
    assert (tmp_path / "out").stat().st_size == size
    assert (tmp_path / "in").stat().st_blocks * 512 >= 8 * MIB
    assert (tmp_path / "out").stat().st_blocks * 512 < MIB


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 200_000)), max_size=6),
    st.integers(0, 70_000),
    st.integers(1, 300_000),
)
def test_pwrite_sparse_writes_what_it_is_given(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[bool, int]], start: int, piece: int
) -> None:
    content = b"".join((b"x" if filled else b"\0") * length for filled, length in runs)
    path = tmp_path_factory.mktemp("sparse") / "out"
    with path.open("wb") as target:
        os.ftruncate(target.fileno(), start)
        for at in range(0, len(content), piece):
            fsutil.pwrite_sparse(target.fileno(), content[at : at + piece], start + at)
            assert os.fstat(target.fileno()).st_size == start + min(at + piece, len(content))
    assert path.read_bytes() == bytes(start) + content


def test_pwrite_sparse_leaves_blocks_of_zeroes_out(tmp_path: Path) -> None:
    content = (b"x" * fsutil.HOLE + bytes(3 * fsutil.HOLE)) * 8
    with (tmp_path / "out").open("wb") as target:
        for at in range(0, len(content), 10_000):  # pieces of a network, which know nothing of blocks
            fsutil.pwrite_sparse(target.fileno(), content[at : at + 10_000], at)
        assert os.fstat(target.fileno()).st_blocks * 512 <= len(content) // 2
    assert (tmp_path / "out").read_bytes() == content


def test_a_file_that_shrinks_while_it_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(os.urandom(MIB))
    with source.open("rb") as file, (tmp_path / "out").open("wb") as target:

        def shrink(_: int) -> None:
            os.truncate(source, 1000)

        with pytest.raises(FileProblem, match="shrinks"):
            fsutil.copy_sparse(file.fileno(), target.fileno(), advance=shrink)


def test_a_file_that_shrinks_while_its_extents_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"x" * MIB)
    real = os.lseek

    def lseek(fd: int, at: int, how: int) -> int:
        if how == os.SEEK_HOLE:
            os.truncate(source, 0)
        return real(fd, at, how)

    monkeypatch.setattr(os, "lseek", lseek)
    with source.open("rb") as file, pytest.raises(FileProblem, match="shrinks"):
        fsutil.hash_file(file.fileno(), hashlib.sha256())


def test_a_file_system_that_knows_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(fd: int, at: int, how: int) -> int:
        raise OSError(22, "Invalid argument")

    path = tmp_path / "x"
    path.write_bytes(b"abc")
    monkeypatch.setattr(os, "lseek", lseek)
    with path.open("rb") as file:
        assert list(fsutil.data_extents(file.fileno(), 3)) == [(0, 3)]


def test_data_extents_from_the_middle(tmp_path: Path) -> None:
    sparse_file(tmp_path / "x", 4 * MIB, [(0, b"a" * 4096), (2 * MIB, b"b" * 8192)])
    with (tmp_path / "x").open("rb") as file:
        assert list(fsutil.data_extents(file.fileno(), 4 * MIB)) == [(0, 4096), (2 * MIB, 2 * MIB + 8192)]
        assert list(fsutil.data_extents(file.fileno(), 4 * MIB, start=2 * MIB + 4096)) == [
            (2 * MIB + 4096, 2 * MIB + 8192)
        ]
        assert list(fsutil.data_extents(file.fileno(), 4 * MIB, start=3 * MIB)) == []


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, fsutil.COPY_BUFFER])
def test_is_zero(size: int) -> None:
    data = bytes(size)
    assert fsutil.is_zero(data)
    assert fsutil.is_zero(memoryview(bytearray(data)))
    for at in {0, size // 2, size - 1} if size else set():
        other = bytearray(size)
        other[at] = 1
        assert not fsutil.is_zero(bytes(other))
        assert not fsutil.is_zero(memoryview(other))


def test_is_zero_is_quick() -> None:
    # memoryviews compare byte by byte in an interpreter's loop: 80 times slower than memcmp
    view = memoryview(bytearray(fsutil.COPY_BUFFER))
    best = min(_timed(lambda: fsutil.is_zero(view)) for _ in range(10))
    slow = min(_timed(lambda: view == memoryview(fsutil._ZEROES)) for _ in range(3))
    assert best < slow / 4


def _timed(call: object) -> float:
    begin = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - begin


@pytest.mark.parametrize("count", [0, 1, fsutil.COPY_BUFFER, 3 * fsutil.COPY_BUFFER + 5])
def test_hash_zeroes(count: int) -> None:
    hasher = hashlib.sha256()
    fsutil.hash_zeroes(hasher, count)
    assert hasher.digest() == hashlib.sha256(bytes(count)).digest()


def test_reflink_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    with (
        (tmp_path / "in").open("rb") as source,
        (tmp_path / "out").open("wb") as target,
        Path("/dev/null").open() as no,
    ):
        assert not fsutil.reflink(no.fileno(), target.fileno())
        if fsutil.reflink(source.fileno(), target.fileno()):
            assert (tmp_path / "out").read_bytes() == b"x"


# --- locks ---------------------------------------------------------------------------------------------------------


HOLD = """if True:
    import sys, pathlib
    from ovms import fsutil
    with fsutil.file_lock(pathlib.Path(sys.argv[1]), shared=len(sys.argv) > 2):
        print("ready", flush=True)
        sys.stdin.read()
    """


def test_a_lock_is_one_process_s(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = start(HOLD, path)
    try:
        for shared in (False, True):
            if fsutil.lock_holders(path) != []:  # not every file system's locks can be told
                assert fsutil.lock_holders(path) == [child.pid]
                assert fsutil.shown_holders(path) == f" (PID {child.pid})"
            with pytest.raises(Locked) as info, fsutil.file_lock(path, shared=shared, timeout=0):
                pass
            assert info.value.context["path"] == str(path)
    finally:
        kill(child)
    with fsutil.file_lock(path, timeout=5):  # the holder's death sets it free
        pass


def test_readers_share_and_keep_a_writer_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = start(HOLD, path, "shared")
    try:
        with fsutil.file_lock(path, shared=True, timeout=0):
            pass
        with pytest.raises(Locked), fsutil.file_lock(path, timeout=0):
            pass
    finally:
        kill(child)


def test_a_lock_waits_its_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with fsutil.file_lock(path):
        begin = time.monotonic()
        with pytest.raises(Locked), fsutil.file_lock(path, timeout=0.1):
            pass
        assert 0.1 <= time.monotonic() - begin < 5


@pytest.mark.parametrize("timeout", [None, 10])
def test_a_lock_is_had_when_its_holder_lets_go(tmp_path: Path, timeout: float | None) -> None:
    path = tmp_path / "lock"
    held, got = threading.Event(), threading.Event()

    def hold() -> None:
        with fsutil.file_lock(path):
            held.set()
            assert not got.wait(0.05)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    with fsutil.file_lock(path, timeout=timeout):
        got.set()
    thread.join()


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with fsutil.file_lock(tmp_path / "lock"), pytest.raises(Locked), fsutil.file_lock(tmp_path / "lock", timeout=0):
        pass
    with fsutil.staging_dir(tmp_path / "tmp"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


# --- staging -------------------------------------------------------------------------------------------------------


def test_a_staging_directory_goes_with_its_block(tmp_path: Path) -> None:
    parent = tmp_path / "deep" / "tmp"
    with pytest.raises(RuntimeError, match="on purpose"), fsutil.staging_dir(parent) as path:
        (path / "file").write_bytes(b"x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        raise RuntimeError("on purpose")
    assert list(parent.iterdir()) == []


STAGE = """if True:
    import sys, pathlib
    from ovms import fsutil
    with fsutil.staging_dir(pathlib.Path(sys.argv[1])) as path:
        (path / "blob").write_bytes(b"half")
        print("ready", flush=True)
        sys.stdin.read()
    """


def test_the_sweep_takes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    child = start(STAGE, tmp_path)
    try:
        with fsutil.staging_dir(tmp_path) as mine:
            assert fsutil.sweep_staging(tmp_path) == 0
            assert len(list(tmp_path.iterdir())) == 2
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert fsutil.sweep_staging(tmp_path) == 1
            assert list(tmp_path.iterdir()) == [mine]
    finally:
        kill(child)


def test_the_sweep_gives_what_holds_files_but_no_lock_a_minute(tmp_path: Path) -> None:
    for name in ("fresh", "stale"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "blob").touch()
    os.utime(tmp_path / "stale", (0, 0))
    (tmp_path / "file").touch()
    assert fsutil.sweep_staging(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "fresh"]
    assert fsutil.sweep_staging(tmp_path / "nowhere") == 0


def test_the_sweep_takes_what_was_made_but_not_yet_locked(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    assert fsutil.is_abandoned(tmp_path / "killed")
    assert fsutil.sweep_staging(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["mkdir", "open"])
def test_a_stager_whose_directory_is_swept_before_it_is_locked_makes_another(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[int] = []

    def sweep_once() -> None:
        if not swept:
            swept.append(0)
            swept[0] = fsutil.sweep_staging(tmp_path)

    flock, opens = fcntl.flock, os.open

    def open_late(path: str | Path, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_CREAT and which == "mkdir":
            sweep_once()
        return opens(path, flags, mode, **more)

    def flock_late(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and which == "open":
            sweep_once()
        flock(fd, operation)

    monkeypatch.setattr(os, "open", open_late)
    monkeypatch.setattr(fcntl, "flock", flock_late)
    with fsutil.staging_dir(tmp_path) as path:
        assert swept == [1]
        assert list(tmp_path.iterdir()) == [path]
        assert not fsutil.is_abandoned(path)


@pytest.mark.parametrize("calls", range(6))
def test_a_removal_that_is_killed_leaves_what_the_next_sweep_takes(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [calls]

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            if not left[0]:
                raise KeyboardInterrupt  # as good as a kill: nothing after it is done
            left[0] -= 1
            real(*args, **kwargs)

        return call

    with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch, fsutil.staging_dir(tmp_path) as path:
        (path / "a").touch()
        (path / "tree").mkdir()
        (path / "tree" / "leaf").touch()
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
    for path in tmp_path.iterdir():
        os.utime(path)
    fsutil.sweep_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".lock").touch()
    (tmp_path / "elsewhere" / "dear").touch()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "link").symlink_to(tmp_path / "elsewhere")
    fsutil.sweep_staging(tmp_path / "tmp")
    assert (tmp_path / "elsewhere" / "dear").exists()


def test_stagers_and_sweepers_at_once(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()

    def stage() -> None:
        try:
            for i in range(40):
                with fsutil.staging_dir(tmp_path) as path:
                    (path / "blob").write_bytes(b"x" * i)
                    assert (path / "blob").stat().st_size == i
        except (OSError, AssertionError) as exc:
            failures.append(exc)

    def sweep() -> None:
        while not stop.is_set():
            fsutil.sweep_staging(tmp_path)

    stagers = [threading.Thread(target=stage) for _ in range(3)]
    sweeper = threading.Thread(target=sweep)
    for thread in (*stagers, sweeper):
        thread.start()
    for thread in stagers:
        thread.join()
    stop.set()
    sweeper.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


# --- sockets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 30])
def test_sockets_in_directories_of_any_depth(tmp_path: Path, depth: int) -> None:
    directory = tmp_path.joinpath(*["a-long-name"] * depth)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "qmp.sock"
    with fsutil.listen_unix(path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with fsutil.connect_unix(path, timeout=5) as client:
            client.sendall(b"hello")
            accepted, _ = server.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    fsutil.listen_unix(path).close()
    with pytest.raises(ConnectionRefusedError):
        fsutil.connect_unix(path, timeout=1)
    with fsutil.listen_unix(path), fsutil.connect_unix(path, timeout=1):
        pass


@pytest.mark.parametrize("place", ["missing", "nowhere/missing"])
def test_a_socket_that_is_not_there_leaks_no_descriptor(tmp_path: Path, place: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        fsutil.connect_unix(tmp_path / place, timeout=1)
    if "/" in place:
        with pytest.raises(FileNotFoundError):
            fsutil.listen_unix(tmp_path / place)
    assert len(os.listdir("/proc/self/fd")) == before


def test_connect_has_its_timeout(tmp_path: Path) -> None:
    with fsutil.listen_unix(tmp_path / "s"), fsutil.connect_unix(tmp_path / "s", timeout=0.05) as client:
        assert client.family is socket.AF_UNIX
        with pytest.raises(TimeoutError):
            client.recv(1)
