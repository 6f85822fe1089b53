"""Values on the command line."""

from __future__ import annotations

import argparse
import math
import re
from decimal import Decimal
from typing import Final

from ovms.spec import limits

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_FACTORS: Final = {"": 1, "k": limits.KIB, "m": limits.MIB, "g": limits.GIB, "t": limits.TIB}
MEMORY_MIN: Final = 16 * limits.MIB


def memory(text: str) -> int:
    """Memory in bytes, from ``512m``, ``1g``, ``2GiB`` or a number of bytes, as Docker has it."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no size; write 512m or 2g")
    exact = Decimal(match[1]) * _FACTORS[match[2].lower()]
    if exact % limits.MIB:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a whole number of MiB")
    size = int(exact)
    if not MEMORY_MIN <= size <= limits.RAM_MAX:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is out of range (16m to 1t)")
    return size


def cpus(text: str) -> int:
    """A number of CPUs."""
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= limits.VCPUS_MAX:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no number of CPUs (1 to {limits.VCPUS_MAX})")
    return int(text)


def seconds(text: str) -> float:
    """A time in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no number of seconds (0 to 86400)")
    return value


def count(text: str) -> int:
    """A number of things."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no number")
    return int(text)
