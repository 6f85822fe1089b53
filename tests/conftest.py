"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ovms.oci.layout import Layout

# The same examples in every run: a test that fails for one person fails for all. No deadline: machines are shared.
settings.register_profile(
    "ovms", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100
)
# For hours when nobody waits: other examples in each run, and far more of them. 'make test-long', or OVMS_TEST_PROFILE=long.
settings.register_profile(
    "long", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=5000, print_blob=True
)
settings.load_profile(os.environ.get("OVMS_TEST_PROFILE", "ovms"))

# In the background of a shell without job control SIGINT is ignored, and so by all that the tests start: some of them send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "vectors" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the golden files anew instead of comparing")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OVMS_ROOT", "OVMS_DEBUG", "OVMS_TOKEN_SERVICES", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG",
        "CONTAINERS_REGISTRIES_CONF", "SSL_CERT_FILE", "SSL_CERT_DIR", "OVMS_IDENTITY",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An empty store."""
    return Layout(tmp_path / "store")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the golden file of a name (``pytest --regenerate`` writes it)."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    return compare
