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
BOOTSTRAP: Final = SPEC / "rfc" / "ovms-bootstrap.md"


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


#: A number as the rules write it, with what makes it another number: a sign of hexadecimal, a power, a unit.
FIGURE: Final = re.compile(
    r"`(?:[0-9A-F]{2} )+[0-9A-F]{2}`|\b[0-9a-f]{4}:[0-9a-f]{4}\b"
    r"|(?<![\w.-])(?:0x[0-9a-fA-F]+|U\+[0-9A-F]{4}|2[\u2070-\u2079\u00b9\u00b2\u00b3]+|[0-9]+(?:\.[0-9]+)*)"
    r"(?: (?:KiB|MiB|GiB|TiB|bytes?|bits?|characters|s|hours)\b)?(?!\w)"
)
#: Where other documents are named, a number is no figure: a rule, a section, an RFC.
CITED: Final = re.compile(
    r"\b[A-Z]{3,4}-[0-9]+(?: to [A-Z]{3,4}-[0-9]+)?\b|\b[sS]ections? [0-9]+(?:\.[0-9]+)*(?:(?:,| and| to) [0-9]+)*|\bRFC [0-9]+|\]\([^)]*\)"
)


def rules(path: Path) -> dict[str, str]:
    """Rule → its text, in one line."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^- \*\*\[([A-Z]+-[0-9]+)\]\*\* (.*?)(?=^- |^\n|^#|^\||\Z)", text, re.MULTILINE | re.DOTALL)
    return {rule: " ".join(content.split()) for rule, content in found}


def figures(text: str) -> list[str]:
    """The numbers in a rule's text, in their order."""
    return FIGURE.findall(CITED.sub("", text))


def names(text: str) -> list[str]:
    """The media types and annotations in a rule's text, in their order."""
    return re.findall(r"`((?:application/|ovms\.|org\.)[A-Za-z0-9.+/-]+)`", text)


def limit_names(path: Path) -> set[str]:
    """The names in a document that look like those of limits."""
    return set(
        re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_(?:MAX|MIN|DEFAULT|PAGES?))`", path.read_text(encoding="utf-8"))
    )
