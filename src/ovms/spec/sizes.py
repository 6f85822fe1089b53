"""Sizes as people write them: ``512m``, ``2GiB``. The units are powers of 1024."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ovms.spec import limits

if TYPE_CHECKING:
    from decimal import Decimal

_SIZE: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([KMGTkmgt]?)(?:[Ii]?[Bb])?")
_FACTORS: Final = {"": 1, "k": limits.KIB, "m": limits.MIB, "g": limits.GIB, "t": limits.TIB}


def parse(text: str) -> Decimal | None:
    """The number of bytes; None when *text* is no size."""
    from decimal import Decimal

    match = _SIZE.fullmatch(text)
    return None if match is None else Decimal(match[1]) * _FACTORS[match[2].lower()]


def memory_problem(size: Decimal | int) -> str | None:
    """What is wrong with *size* bytes as the memory of an instance; None when nothing is."""
    if size % limits.MIB:
        return "is not a whole number of MiB"
    if not limits.MEMORY_MIN <= size <= limits.RAM_MAX:
        return "is out of range (16 MiB to 1 TiB)"
    return None
