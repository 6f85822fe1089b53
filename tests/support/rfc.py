"""The normative documents as data: their tables and their rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.schemas import SPEC

ROOT: Final = SPEC.parent
MAIN: Final = SPEC / "rfc" / "ovms-v0.1.md"
RAMSNAP: Final = SPEC / "rfc" / "ramsnap-v1.md"


def tables(path: Path) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(head, rows) of each table of a document; cells without the marks of code."""
    head: tuple[str, ...] | None = None
    rows: list[tuple[str, ...]] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            cells = tuple(cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|"))
            if head is None:
                head = cells
            elif not set("".join(cells)) <= set("-: "):
                rows.append(cells)
        elif head is not None:
            yield head, rows
            head, rows = None, []


def table(path: Path, *head: str) -> list[tuple[str, ...]]:
    """The rows of the table whose head begins with *head*."""
    found = [rows for columns, rows in tables(path) if columns[: len(head)] == head]
    assert len(found) == 1, f"{len(found)} tables of {path.name} begin with {head}"
    return found[0]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    answer: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        name = slug
        while name in answer:
            number += 1
            name = f"{slug}-{number}"
        answer.add(name)
    return answer
