"""Sizes as people write them: ``512m``, ``2GiB``. The units are powers of 1024."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ovms.lazy import regex
from ovms.spec import limits

if TYPE_CHECKING:
    from decimal import Decimal

_SIZE: Final = regex(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([KMGTkmgt]?)(?:[Ii]?[Bb])?")
_FACTORS: Final = {"": 1, "k": limits.KIB, "m": limits.MIB, "g": limits.GIB, "t": limits.TIB}


def parse(text: str) -> Decimal | int | None:
    """The number of bytes; None when *text* is no size."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    if "." not in match[1]:
        return int(match[1]) * _FACTORS[match[2].lower()]
    from decimal import Decimal

    return Decimal(match[1]) * _FACTORS[match[2].lower()]


def memory_problem(size: Decimal | int) -> str | None:
    """What is wrong with *size* bytes as the memory of an instance; None when nothing is."""
    if size % limits.MIB:
        return "is not a whole number of MiB"
    if not limits.MEMORY_MIN <= size <= limits.RAM_MAX:
        return "is out of range (16 MiB to 1 TiB)"
    return None
