"""What the command line prints: answers on stdout, talk on stderr, nothing that drives the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TextIO

from ovms.errors import ManifestInvalid, OvmsError
from ovms.text import printable

if TYPE_CHECKING:
    from datetime import datetime

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def safe(text: str) -> str:
    """*text* without anything that a terminal would act on: artifacts and registries choose their own words."""
    text = printable(text, None, mark="\N{REPLACEMENT CHARACTER}")
    # what the terminal's encoding lacks becomes '?', the replacement character too
    encoding = sys.stdout.encoding or "ascii"
    return text if encoding == "utf-8" else text.encode(encoding, "replace").decode(encoding)


def dumps(value: Any, indent: int | None = None) -> str:
    """*value* as JSON in which nothing drives a terminal: in ASCII, and without the one control character that JSON leaves."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")


def say(text: str) -> None:
    """One line on stderr: news that is no answer."""
    talk(f"ovm: {safe(text)}\n")


def talk(text: str) -> None:
    """Text on stderr. Where whoever read it has gone, or its disk is full, the work goes on without a word."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # also not by Python at its end, which would make an exit code of its own of it
        hush(sys.stderr)


def hush(stream: TextIO) -> None:
    """Lets what is written to *stream* from now on, and what could not be, go nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def answer(text: str) -> None:
    """One line on stdout."""
    print(safe(text), flush=True)


def answer_bytes(data: bytes) -> None:
    """Bytes of a stranger on stdout: as they are, and on a terminal what of them is harmless text."""
    from ovms.cli.terminal import writer

    write = writer(sys.stdout, raw=False)
    write(data)
    write.end()


def answer_json(value: Any) -> None:
    """One JSON document on stdout, in one line."""
    print(dumps(value), flush=True)


def answer_document(value: Any) -> None:
    """One JSON document on stdout, for people to read."""
    print(dumps(value, indent=2), flush=True)


def complain(error: OvmsError, *, as_json: bool) -> None:
    """An error on stderr: what is wrong, each problem of a manifest, and what to do."""
    if as_json:
        talk(dumps({"error": error.to_json()}) + "\n")
        return
    lines = [f"ovm: error: {safe(error.message)}"]
    if isinstance(error, ManifestInvalid):
        lines += [f"  {safe(p.path)}: {safe(p.message)}" + (f" [{p.rule}]" if p.rule else "") for p in error.problems]
    if error.hint:
        lines.append(f"  hint: {safe(error.hint)}")
    talk("\n".join(lines) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, three blanks between them, as Docker prints them."""
    cells = [list(head), *([safe(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()


def size(count: int) -> str:
    """``1.5 MiB``"""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def ago(timestamp: str | None, now: datetime | None = None) -> str:
    """``3 minutes`` since an RFC 3339 time; ``?`` when it can't be read."""
    from datetime import UTC, datetime

    try:
        then = datetime.fromisoformat(timestamp or "")
        seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    except (ValueError, TypeError):
        return "?"
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a second"


def duration(seconds: float) -> str:
    """``9 s``, ``3 min 20 s``, ``2 h 5 min``: two units at most."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short(digest: str) -> str:
    """The first twelve digits of a digest."""
    return digest.removeprefix("sha256:")[:12]
