"""Names of instances: given by the user, or made from the artifact's name."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Final

from ovms.errors import UsageError
from ovms.lazy import regex

_NAME: Final = regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")


def check(name: str) -> str:
    """A name that the user gave.

    Raises:
        UsageError: not of the grammar.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name[:80]!a} is no name for an instance",
            hint="use up to 63 letters, digits, '_', '.' and '-', and begin with a letter or digit",
        )
    return name


def make(artifact: str, instance_id: str, taken: Container[str]) -> str:
    """``<last part of the artifact's name>-<first digits of the ID>``, as many digits as it takes to be new."""
    base = re.sub(r"[^a-zA-Z0-9_.-]", "-", artifact.rpartition("/")[2])[:40].strip("-._") or "vm"
    digits = instance_id.replace("-", "")
    for count in range(4, len(digits)):
        name = f"{base}-{digits[:count]}"
        if name not in taken:
            return name
    return f"{base}-{digits}"
