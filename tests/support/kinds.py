"""The kinds of registries that tests of referrers run over: without the referrers API, and with it.

A further kind is a class like :class:`~support.registry.Registry` (``host``, ``directory``, ``get``, ``close``), and a line in
:data:`KINDS`. Where its program is missing, its tests are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.registry import REPOSITORY, Registry, _free_port


class ReferrersRegistry(Registry):
    """go-containerregistry's registry, which has the referrers API."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        self.host = f"127.0.0.1:{self.port}"
        blobs = directory / "blobs"
        blobs.mkdir(parents=True)
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [find_tool("referrers-registry"), "-listen", self.host, "-blobs", blobs],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise


#: Name → what starts one in an empty directory.
KINDS: dict[str, Callable[[Path], Registry]] = {"docker-registry": Registry, "referrers-registry": ReferrersRegistry}


def find_tool(name: str) -> Path:
    """A program that ``make setup`` has put into the cache, or an installed one; else the test is skipped."""
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache")
    if (cache / "tools" / name).exists():
        return cache / "tools" / name
    if found := shutil.which(name):
        return Path(found)
    pytest.skip(f"there is no {name}")
