"""Which tests and vectors cite which rule of the specification ('make spec-coverage').

A rule is a list item of ``spec/rfc/*.md`` that begins with its number, ``- **[MAN-1]** …``. A test cites it with
``@pytest.mark.spec("MAN-1")``, a vector in its list ``rules``. Exits with 1 when a rule is cited by nothing, or something
cites a rule that does not exist.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent

RULE: Final = re.compile(r"^- \*\*\[([A-Z]+-[0-9]+)\]\*\*", re.MULTILINE)


def rules() -> dict[str, str]:
    """Rule → the document that sets it, in the documents' order."""
    answer: dict[str, str] = {}
    for name in ("ovms-v0.1.md", "ramsnap-v1.md", "ovms-bootstrap.md"):
        for rule in RULE.findall((ROOT / "spec" / "rfc" / name).read_text(encoding="utf-8")):
            if rule in answer:
                raise SystemExit(f"{rule} is set twice: in {answer[rule]} and in {name}")
            answer[rule] = name
    return answer


def test_citations() -> Iterator[tuple[str, str]]:
    """(rule, test) for each mark."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        place = path.relative_to(ROOT / "tests")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for mark in node.decorator_list:
                    yield from ((rule, f"{place}::{node.name}") for rule in _cited(mark))
            elif isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets
            ):
                yield from ((rule, str(place)) for mark in ast.walk(node.value) for rule in _cited(mark))


def _cited(mark: ast.AST) -> Iterator[str]:
    if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "spec":
        for argument in mark.args:
            if isinstance(argument, ast.Constant):
                yield str(argument.value)


def vector_citations() -> Iterator[tuple[str, str]]:
    """(rule, vector) for each case."""
    for path in sorted((ROOT / "spec" / "vectors").rglob("*.json")):
        if path.parent.name in ("valid", "invalid"):
            continue
        for case in json.loads(path.read_bytes())["cases"]:
            name = case.get("name") or case.get("reference", "")[:30]
            for rule in case["rules"]:
                yield rule, f"{path.relative_to(ROOT / 'spec' / 'vectors')}: {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="name every test and vector, not three of each")
    args = parser.parse_args()
    known = rules()
    tests: dict[str, list[str]] = {rule: [] for rule in known}
    vectors: dict[str, list[str]] = {rule: [] for rule in known}
    unknown = []
    for found, citations in ((tests, test_citations()), (vectors, vector_citations())):
        for rule, place in citations:
            if rule not in known:
                unknown.append(f"{rule}: {place}")
            elif place not in found[rule]:
                found[rule].append(place)
    most = None if args.all else 3
    document = ""
    for rule, name in known.items():
        if name != document:
            document = name
            print(f"\n{name}")
        cited = [*tests[rule][:most], *vectors[rule][:most]]
        more = len(tests[rule]) + len(vectors[rule]) - len(cited)
        print(
            f"  {rule:<8} {len(tests[rule]):>3} tests {len(vectors[rule]):>3} vectors  {'; '.join(cited)}{f' … {more} more' if more else ''}"
        )
    none = [rule for rule in known if not tests[rule] and not vectors[rule]]
    alone = [rule for rule in known if not tests[rule] and vectors[rule]]
    print(f"\n{len(known)} rules; by vectors alone: {len(alone)}; by nothing: {', '.join(none) or 'none'}")
    if unknown:
        print("cited, but not in the specification:\n  " + "\n  ".join(unknown))
    return 1 if none or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
