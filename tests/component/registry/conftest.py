"""A real registry, and servers that misbehave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.registry import KINDS, Registry

from ovms.oci import cosign, referrers


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of referrers are looked at again at once, as no other client writes them here."""
    monkeypatch.setattr(referrers, "_SETTLE", 0.001)
    monkeypatch.setattr(referrers, "_SETTLE_TIMES", 0)
    monkeypatch.setattr(cosign, "_SETTLE", 0.001)


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
