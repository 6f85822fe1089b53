"""Values on the command line."""

from __future__ import annotations

import argparse
import math
import re
from typing import TYPE_CHECKING, Final, NoReturn

from ovms.spec import limits, sizes

if TYPE_CHECKING:
    from ovms.oci.platform import Platform


def truth(text: str) -> bool:
    """``true`` or ``false``."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is neither true nor false")
    return text == "true"


def add_tls_verify(parser: argparse.ArgumentParser) -> None:
    """Adds ``--tls-verify``, for a command that talks to registries."""
    parser.add_argument(
        "--tls-verify",
        metavar="true|false",
        type=truth,
        help="false: take any certificate of the registry, and plain HTTP; true: neither, also on loopback"
        " (default: as registries.conf says)",
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds ``-q``, for a command that tells of its progress."""
    parser.add_argument(
        "-q", "--quiet", dest="no_progress", action="store_true", help="tell no progress, as --progress none does"
    )


def memory(text: str) -> int:
    """Memory in bytes, from ``512m``, ``1g``, ``2GiB`` or a number of bytes, as Docker has it."""
    exact = sizes.parse(text.strip())
    if exact is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no size; write 512m or 2g")
    if wrong := sizes.memory_problem(exact):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} {wrong}")
    return int(exact)


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


def platform(text: str) -> Platform:
    """A platform, ``OS/ARCH[/VARIANT]``."""
    from ovms.errors import InputError
    from ovms.oci.platform import Platform

    try:
        return Platform.parse(text)
    except InputError as exc:
        raise argparse.ArgumentTypeError(f"{exc.message}; {exc.hint}") from None


def tail(text: str) -> int | None:
    """A number of lines; ``all`` is None, as Docker has it."""
    return None if text == "all" else count(text)


def moment(text: str) -> int:
    """A time in microseconds since the epoch: RFC 3339, seconds since then, or how long ago (``1h30m``), as Docker has it."""
    import time
    from datetime import datetime

    if re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,9})?", text):
        return round(float(text) * 1_000_000)
    if parts := re.fullmatch(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})s)?", text):
        ago = sum(int(part or 0) * unit for part, unit in zip(parts.groups(), (86400, 3600, 60, 1), strict=True))
        return (time.time_ns() // 1000 - ago * 1_000_000) if text else _no_moment(text)
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1_000_000)
    except (ValueError, OverflowError, OSError):
        return _no_moment(text)


def _no_moment(text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(
        f"{text[:40]!a} is no time; write 2026-11-25T10:00:00Z, or 10m for ten minutes ago"
    )


def count(text: str) -> int:
    """A number of things."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no number")
    return int(text)


def offset(text: str) -> int:
    """A number of bytes, decimal or ``0x…``."""
    if not re.fullmatch(r"[0-9]{1,16}|0[xX][0-9a-fA-F]{1,12}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no number of bytes; write 4096 or 0x1000")
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def depth(text: str) -> int:
    """Levels of a tree of referrers."""
    if text not in map(str, range(1, 9)):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no depth (1 to 8)")
    return int(text)


_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def until(text: str) -> float:
    """An age in seconds, from ``until=24h`` (also ``until=1h30m``), as Docker's filters have it."""
    match = re.fullmatch(r"until=((?:[0-9]{1,6}[smhdw])+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no filter; write until=24h or until=7d")
    return float(sum(int(part[:-1]) * _UNITS[part[-1]] for part in re.findall(r"[0-9]+[a-z]", match[1])))
