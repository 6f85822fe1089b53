"""Which pages of a private mapping a process has written to, asked in both ways."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Iterator

import pytest

from ovms.memory import capture
from ovms.memory.capture import PAGE, Run

PAGES = 65536


@pytest.fixture
def mapped() -> Iterator[tuple[mmap.mmap, int]]:
    """256 MiB of a memfd, mapped private, and their address."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, PAGES * PAGE)
    memory = mmap.mmap(fd, PAGES * PAGE, flags=mmap.MAP_PRIVATE)
    os.close(fd)
    view = ctypes.c_char.from_buffer(memory)
    yield memory, ctypes.addressof(view)
    del view
    memory.close()


def ways(address: int) -> Iterator[list[Run]]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        yield list(capture.read_pagemap(fd, address, PAGES * PAGE))
        try:
            yield list(capture.scan_pagemap(fd, address, PAGES * PAGE))
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
    finally:
        os.close(fd)


def pages(runs: list[Run]) -> list[int]:
    return [page for run in runs for page in range(run.start // PAGE, run.end // PAGE)]


@pytest.mark.parametrize("count", [0, 1, 500, 512, 513, 4000, 9000, 20000])
def test_each_page_once_and_in_order(count: int, mapped: tuple[mmap.mmap, int]) -> None:
    memory, address = mapped
    written = sorted(random.Random(count).sample(range(PAGES), count))
    for page in written:
        memory[page * PAGE] = 1
    slow, fast = ways(address)
    assert pages(slow) == written
    # Linux tells the last of many regions twice, if one goes by how far it says that it has come
    assert pages(fast) == written
