"""The installed command line with real QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests
from support.cli import Ovm


@pytest.fixture(scope="session")
def echo_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guests.assemble(guests.SOURCE, tmp_path_factory.mktemp("guest") / "echo.elf")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qemu-cache")


@pytest.fixture
def ovm(tmp_path: Path, shared_cache: Path) -> Iterator[Ovm]:
    root, home = tmp_path / "root", tmp_path / "home"
    home.mkdir()
    root.mkdir()
    (root / "cache").symlink_to(shared_cache)
    ovm = Ovm(root, home)
    yield ovm
    names = ovm("ps", "-aq").out.split()
    if names:
        ovm("rm", "-f", *names)
    assert guests.qemu_children(root) == []


@pytest.fixture
def project(tmp_path: Path, echo_kernel: Path) -> Path:
    """A manifest of the echo guest, ready for ``ovm build``."""
    return guests.write_project(tmp_path / "project", echo_kernel)
