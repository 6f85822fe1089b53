"""A real registry, and servers that misbehave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.registry import KINDS, Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.close()


@pytest.fixture(scope="module", params=sorted(KINDS))
def each_registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry without the referrers API, and one with it (skipped where that could not be built)."""
    registry = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    yield registry
    registry.close()
