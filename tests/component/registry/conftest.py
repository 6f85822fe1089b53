"""A real registry, and servers that misbehave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.close()
