"""A small file system of a test's own, that can be full."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovms.process import terminate


class Disk:
    """An empty file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fillers: list[Path] = []

    def take(self, size: int) -> None:
        """Somebody else writes *size* bytes."""
        path = self._filler()
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def fill(self) -> None:
        """Somebody else writes until nothing is free."""
        path = self._filler()
        with path.open("wb", buffering=0) as file, _until_full():
            while True:
                file.write(bytes(4096))

    def fill_inodes(self) -> None:
        """Somebody else makes files until no more can be made."""
        with _until_full():
            while True:
                self._filler().touch()

    def free(self) -> None:
        """Takes away what the others have written."""
        for path in self._fillers:
            path.unlink(missing_ok=True)
        self._fillers.clear()

    def _filler(self) -> Path:
        path = self.path / f"filler-{len(self._fillers)}"
        self._fillers.append(path)
        return path


@contextlib.contextmanager
def _until_full() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise


@contextlib.contextmanager
def small(directory: Path, *, size: int, inodes: int = 1000) -> Iterator[Disk]:
    """A tmpfs of *size* bytes on *directory*, in a mount namespace that ends with it; skips where mounting is not allowed."""
    directory.mkdir()
    # The namespace is a child's; its files are reached through /proc, so that everybody here sees them.
    script = 'mount -t tmpfs -o "size=$1,nr_inodes=$2,mode=0700" tmpfs "$3" && echo ready && exec sleep 600'
    as_root = () if os.geteuid() == 0 else ("--map-root-user",)
    argv = ["unshare", "--mount", *as_root, "sh", "-c", script, "sh", str(size), str(inodes), str(directory)]
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        assert child.stdout is not None
        said = child.stdout.readline() if select.select([child.stdout], [], [], 20)[0] else b"no answer"
        if said != b"ready\n":
            pytest.skip(f"no file system can be mounted here: {said.decode(errors='replace').strip()}")
        yield Disk(Path(f"/proc/{child.pid}/root{directory}"))
    finally:
        terminate(child)
        if child.stdout is not None:
            child.stdout.close()
