"""Real QEMU with the bare echo guest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests

from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.runtime.root import Root
from ovms.runtime.runtime import Runtime


def no_registry(host: str) -> object:
    raise AssertionError(f"a test of the runtime asks for the registry {host}")


@pytest.fixture(scope="session")
def echo_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guests.assemble(guests.SOURCE, tmp_path_factory.mktemp("guest") / "echo.elf")


@pytest.fixture(scope="session")
def agent_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare guest whose agent freezes and thaws."""
    if shutil.which("gcc") is None:
        pytest.skip("the bare guest with an agent is compiled by gcc")
    return guests.compile_agent(tmp_path_factory.mktemp("guest") / "agent.elf")


@pytest.fixture(scope="session")
def qemu_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What QEMU can do is found out once for all tests, not once for each."""
    return tmp_path_factory.mktemp("qemu-cache")


@pytest.fixture
def runtime(tmp_path: Path, qemu_cache: Path) -> Iterator[Runtime]:
    yield from _runtime(tmp_path / "root", qemu_cache)


@pytest.fixture
def away(tmp_path: Path, qemu_cache: Path) -> Iterator[Runtime]:
    """A runtime whose store has nothing yet: another host, as far as that goes."""
    yield from _runtime(tmp_path / "away", qemu_cache)


def _runtime(path: Path, qemu_cache: Path) -> Iterator[Runtime]:
    root = Root(path)
    root.prepare()
    root.cache.symlink_to(qemu_cache)
    runtime = Runtime(root)
    yield runtime
    for record in runtime.instances.records():
        runtime.remove(record, force=True)
    assert guests.qemu_children(root.path) == []


@pytest.fixture
def echo(runtime: Runtime, echo_kernel: Path, tmp_path: Path) -> Found:
    manifest = guests.write_project(tmp_path / "project", echo_kernel)
    Builder(runtime.layout, no_registry).build(manifest, name="echo:1")  # type: ignore[arg-type]
    return find(runtime.layout, "echo:1")
