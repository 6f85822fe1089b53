"""Programs of others: those that ``make setup`` and ``make setup-interop`` put into the cache, or installed ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
#: What is built by Go, where there is Go, or unpacked from packages of other releases.
_INTEROP = frozenset({"oras", "crane", "referrers-registry", "cosign", "cosign-2"})


def find(name: str) -> Path:
    """The program *name*; a test that needs one that is not here is skipped, and says how to get it."""
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache")
    own = os.environ.get(f"OVMS_{name.upper().replace('-', '_')}")
    for candidate in (own, cache / "tools" / name):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    if found := shutil.which(name):
        return Path(found)
    target = "setup-interop' (most of it needs Go 1.25 or later)" if name in _INTEROP else "setup'"
    pytest.skip(f"there is no {name}: run 'make {target}")


def lend_virtiofsd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ovms find that of a later release, where the cache has it: what this release has may be of no use."""
    cache = Path(os.environ.get("OVMS_CACHE") or REPOSITORY / ".cache")
    program = cache / "tools" / "virtiofsd"
    place = program.resolve().parent if program.exists() else "/nonexistent"
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")


def attempt(
    name: str, *arguments: object, home: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs a program, whose settings are looked for in *home*."""
    path = os.environ["PATH"]
    return subprocess.run(
        [find(name), *map(str, arguments)],
        env={"PATH": path, "HOME": str(home), "DOCKER_CONFIG": str(home / ".docker"), "LC_ALL": "C", **(env or {})},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


def run(name: str, *arguments: object, home: Path, env: Mapping[str, str] | None = None) -> bytes:
    """Runs a program that has to succeed. Returns what it printed."""
    done = attempt(name, *arguments, home=home, env=env)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout
