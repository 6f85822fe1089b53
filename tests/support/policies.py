"""Policies for tests, and guards that ask them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovms.oci import origins
from ovms.oci.layout import Layout
from ovms.spec.digest import Digest, hex_of
from ovms.trust.files import Policies
from ovms.trust.guard import Guard
from ovms.trust.keys import PrivateKey

ACCEPT = {"type": "accept"}
REJECT = {"type": "reject"}
#: No system's policy.
NOWHERE = Path("/nowhere/policy.json")


def signed(*names: str, of: int | None = None) -> dict[str, Any]:
    """A rule: signed by any of *names*, or by *of* of them."""
    return {"type": "signed", "anyOf": list(names)} if of is None else {"type": "signed", "atLeast": of, "of": [*names]}


def document(default: dict[str, Any], keys: dict[str, PrivateKey] | None = None, **more: Any) -> dict[str, Any]:
    """A policy of inline keys; *more* are its further fields."""
    signers = {name: {"key": key.public.pem.decode()} for name, key in (keys or {}).items()}
    return {"version": 1, "signers": signers, "default": default, **more}


def write(path: Path, value: dict[str, Any]) -> Path:
    """Writes a policy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def guard(layout: Layout, path: Path, value: dict[str, Any]) -> Guard:
    """A guard that asks the policy *value*, written to *path*."""
    return Guard(layout, Policies(write(path, value), system=NOWHERE))


def came_from(layout: Layout, digest: Digest, *places: str) -> None:
    """Lets an artifact in the store be one that came from *places*, and was not made here."""
    (layout.origin_dir / hex_of(digest)).unlink(missing_ok=True)
    origins.add(layout, digest, origins.Origin(places=places))
