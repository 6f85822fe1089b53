"""The library that makes a guest's memory stand still, in a process that is no VMM."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ovms.memory import sealing
from ovms.vmm import freeze, maps

SOURCE: Final = freeze.LIBRARY.with_name("freeze.c")
SIZE: Final = 64 * 4096
#: Maps its memory shared, and answers a line with what page 3 holds after it wrote that to it.
PROGRAM: Final = """if True:
    import mmap, sys
    memory = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        memory[3 * 4096 : 3 * 4096 + 1] = line[:1].encode()
        print(memory[3 * 4096 : 3 * 4096 + 2].decode(), flush=True)
    """


class Child:
    def __init__(self, fd: int, running: subprocess.Popen[str]) -> None:
        self.fd = fd
        self.running = running
        self.file = Path(f"/proc/{running.pid}/fd/{fd}")

    def write(self, letter: str) -> str:
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        self.running.stdin.write(f"{letter}\n")
        self.running.stdin.flush()
        return self.running.stdout.readline().strip()


@contextlib.contextmanager
def child(*, preload: bool = True) -> Iterator[Child]:
    fd = os.memfd_create("ovms-template:test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"ab", 3 * 4096)
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(fd), str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[fd],
        text=True,
        env={**os.environ, **({"LD_PRELOAD": str(freeze.LIBRARY)} if preload else {})},
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield Child(fd, running)
    finally:
        running.kill()
        running.communicate(timeout=20)
        os.close(fd)


def test_the_binary_is_what_its_source_says() -> None:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert f"freeze.c sha256:{digest}".encode() in freeze.LIBRARY.read_bytes(), "run scripts/build-native.sh"


def test_the_source_builds(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    script = Path(__file__).parents[3] / "scripts" / "build-native.sh"
    subprocess.run([script, *(tmp_path / name for name in ("watch", "fence", "freeze.so"))], check=True, timeout=60)
    assert (tmp_path / "freeze.so").stat().st_size < 8192


def test_the_file_stays_as_it_is_and_the_process_goes_on() -> None:
    with child() as there:
        assert there.write("c") == "cb"
        assert os.pread(there.fd, 2, 3 * 4096) == b"cb"
        at = maps.find(there.running.pid, there.file, SIZE)
        assert not at.private
        assert freeze.freeze(there.running.pid, there.file, SIZE)
        assert maps.find(there.running.pid, there.file, SIZE) == maps.Mapped(at.address, private=True)
        sealing.seal(there.fd)
        assert there.write("d") == "db"
        assert os.pread(there.fd, 2, 3 * 4096) == b"cb"
        # for good
        assert not freeze.freeze(there.running.pid, there.file, SIZE)
        with pytest.raises(PermissionError):
            os.pwrite(there.fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(there.fd, SIZE)


def test_a_process_without_the_library_is_left_alone() -> None:
    with child(preload=False) as there:
        assert not freeze.able(there.running.pid)
        assert not freeze.freeze(there.running.pid, there.file, SIZE)
        assert there.write("c") == "cb"
        assert os.pread(there.fd, 2, 3 * 4096) == b"cb"


def test_one_that_is_still_mapped_shared_is_not_sealed() -> None:
    from ovms.errors import VmmError

    with child() as there:
        with pytest.raises(VmmError, match="can still write"):
            sealing.seal(there.fd)
        assert not sealing.is_sealed(there.fd)


def test_a_process_that_is_no_more_cannot_be_frozen() -> None:
    assert not freeze.able(2**22 - 1)
