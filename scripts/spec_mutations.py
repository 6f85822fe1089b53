"""Does a test notice it? Each number of the normative documents is changed once ('make spec-mutations').

What is changed, one at a time, in memory alone: every figure of a rule and of a table in ``spec/rfc``, every number that a
schema or the OpenAPI document limits something by, and every constant of ``ovms.spec.limits``. Then the tests that hold
documents and code together are called. A change that none of them notices is printed, and makes the exit status 1.

The worked example of the RAM snapshot format is not among them (``make vectors`` writes it, and a test compares), nor is
text that belongs to no rule.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

ROOT: Final = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "unit" / "spec")]

from support import rfc  # noqa: E402
from support.schemas import SPEC  # noqa: E402

from ovms.spec import limits  # noqa: E402

test_api, test_drift, test_states = map(importlib.import_module, ("test_api", "test_drift", "test_states"))

GOLDEN: Final = ROOT / "tests" / "vectors" / "golden" / "schema-keywords.txt"


def _golden() -> None:
    assert test_drift.keyword_lines() == GOLDEN.read_text(encoding="utf-8")


#: The tests that hold documents and code together; none of them takes long.
CHECKS: Final[tuple[Callable[[], None], ...]] = (
    test_drift.test_limits,
    test_drift.test_the_figures_of_each_rule,
    _golden,
    test_drift.test_media_types,
    test_drift.test_the_prefix,
    test_drift.test_the_index,
    test_drift.test_the_header_s_fields,
    test_drift.test_what_is_taken_where_nothing_is_said,
    test_drift.test_the_media_types_and_annotations_of_each_rule,
    test_drift.test_the_other_tables,
    test_states.test_calls_are_those_of_the_specification,
    test_api.test_the_codes_are_those_of_the_specification,
)


@dataclass(frozen=True)
class Mutation:
    """A document with one number changed, or (``path`` None) a constant with another value."""

    name: str
    path: Path | None
    text: str
    value: Any = None


def _changed(number: str) -> str:
    match = re.search(r"[0-9a-fA-F]+(?!.*[0-9a-fA-F])", number) if number.startswith(("0x", "U+", "`")) else None
    if match is None:
        match = re.search(r"[0-9]+(?![0-9])", number)
    assert match is not None
    digits = match[0]
    last = digits[-1]
    other = {"9": "8", "f": "e", "F": "E"}.get(last) or format(int(last, 16) + 1, "x" if last.islower() else "X")
    return number[: match.end() - 1] + other + number[match.end() :]


def in_rules(path: Path) -> Iterator[Mutation]:
    """Every figure of a rule or a table."""
    text = path.read_text(encoding="utf-8")
    example = text.find("<!-- example:"), text.find("<!-- end of example")
    at = 0
    in_rule = False
    for line in text.splitlines(keepends=True):
        if line.startswith("- **["):
            in_rule = True
        elif line.startswith(("- ", "#")) or not line.strip():
            in_rule = False
        row = line.startswith("|") and not set(line.strip()) <= set("|- ")
        if (in_rule or row) and not example[0] <= at < example[1]:
            for match in rfc.FIGURE.finditer(line):
                if any(start <= match.start() < end for start, end in (m.span() for m in rfc.CITED.finditer(line))):
                    continue
                start, end = at + match.start(), at + match.end()
                number = text.count("\n", 0, at) + 1
                changed = text[:start] + _changed(match[0]) + text[end:]
                yield Mutation(f"{path.name}:{number}: {match[0]} in: {line.strip()[:80]}", path, changed)
        at += len(line)


def in_schemas(path: Path) -> Iterator[Mutation]:
    """Every number that a schema limits something by, the numbers in patterns too."""
    text = path.read_text(encoding="utf-8")
    keyword = r"(?:minimum|maximum|minLength|maxLength|minItems|maxItems|const|default|pattern|enum)"
    for match in re.finditer(rf"^.*?\"?{keyword}\"?: (?!\{{).*$", text, re.MULTILINE):
        for found in re.finditer(rf"\"?{keyword}\"?: (\[[^\]]*\]|\"(?:[^\"\\]|\\.)*\"|[^,}}\n]*)", match[0]):
            for number in re.finditer(r"(?<![A-Za-z0-9\\])[0-9]+", found[1]):
                start = match.start() + found.start(1) + number.start()
                end = start + len(number[0])
                changed = text[:start] + _changed(number[0]) + text[end:]
                line = text.count("\n", 0, start) + 1
                yield Mutation(f"{path.name}:{line}: {number[0]} in: {found[0][:80]}", path, changed)


def in_constants() -> Iterator[Mutation]:
    """Every constant of the limits."""
    for name, value in vars(limits).items():
        if name.isupper() and name not in test_drift.UNITS:
            yield Mutation(f"limits.{name}", None, name, value + 1)


def mutations() -> Iterator[Mutation]:
    """All of them."""
    for path in (rfc.MAIN, rfc.RAMSNAP, rfc.BOOTSTRAP):
        yield from in_rules(path)
    for name in (*test_drift.SCHEMAS, test_drift.OPENAPI):
        yield from in_schemas(SPEC / name)
    yield from in_constants()


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """With the changed text, or the changed constant, in place."""
    if mutation.path is None:
        with mock.patch.object(limits, mutation.text, mutation.value):
            yield
        return
    original = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        return mutation.text if self == mutation.path else original(self, *args, **kwargs)

    def read_bytes(self: Path) -> bytes:
        return read_text(self, encoding="utf-8").encode()

    with mock.patch.object(Path, "read_text", read_text), mock.patch.object(Path, "read_bytes", read_bytes):
        yield


def noticed(mutation: Mutation) -> bool:
    """Whether a test fails."""
    with applied(mutation):
        for check in CHECKS:
            try:
                check()
            except Exception:  # noqa: BLE001 - any failure of a test is one
                return True
    return False


def survivors(every: int = 1) -> tuple[int, list[str]]:
    """How many were tried (each *every*-th), and which of them nothing noticed."""
    for check in CHECKS:
        check()
    tried = list(mutations())[::every]
    return len(tried), [mutation.name for mutation in tried if not noticed(mutation)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try each Nth alone")
    began = time.monotonic()
    tried, left = survivors(parser.parse_args().every)
    print("\n".join(left))
    print(f"{tried} numbers changed, {len(left)} of them unnoticed ({time.monotonic() - began:.0f} s)")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
