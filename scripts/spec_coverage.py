"""Which tests and vectors cite which rule of the specification ('make spec-coverage').

A rule is a list item of ``spec/rfc/*.md`` that begins with its number, ``- **[MAN-1]** …``. It is cited by

- tests, with ``@pytest.mark.spec("MAN-1")``;
- vectors, in their list ``rules``, which the tests of this repository run;
- what waits: scenarios (in words), and what only a guest with an ivshmem device can show of the vectors in ``api``.

What waits proves nothing yet, and is counted by itself. Exits with 1 when a rule is cited by nothing, or something cites a
rule that does not exist.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

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


#: What a request's body shows of the runtime contract; for the rest an answer is needed.
OF_BODIES: Final = frozenset({"RUN-2", "RUN-3", "RUN-9", "RUN-10", "RUN-15", "BOOT-29", "LIM-1"})


def judged_by_body(case: dict[str, Any]) -> bool:
    """Whether a case of ``api/index.json`` can be judged without a server: what is expected follows from the body alone."""
    request, expected = case["request"], case["expect"]
    return (
        request["method"] == "POST"
        and (expected["status"] in (200, 400, 422) or bool(case.get("beyond_schema")))
        and ("body" in request or "raw_body" in request)
    )


def vector_citations() -> Iterator[tuple[str, str, bool]]:
    """(rule, vector, whether our tests run it) for each case."""
    vectors = ROOT / "spec" / "vectors"
    for path in sorted(
        [*vectors.glob("*/index.json"), vectors / "api" / "states.json", vectors / "bootstrap" / "mapping.json"]
    ):
        kind = path.parent.name
        for case in json.loads(path.read_bytes())["cases"]:
            name = case.get("name") or case.get("reference", "")[:30]
            for rule in case["rules"]:
                runs = kind != "scenarios"
                if path == vectors / "api" / "index.json":
                    # a living server answers them all, but those that need an ivshmem device
                    of_body = judged_by_body(case) and (rule in OF_BODIES or rule.startswith("DOC-"))
                    runs = of_body or "regions" not in case.get("given", {})
                yield rule, f"{path.relative_to(vectors)}: {name}", runs


def waiting() -> list[str]:
    """The rules that nothing proves that runs today, in the documents' order."""
    proven = {rule for rule, _ in test_citations()} | {rule for rule, _, runs in vector_citations() if runs}
    return [rule for rule in rules() if rule not in proven]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="name every test and vector, not three of each")
    args = parser.parse_args()
    known = rules()
    found: dict[str, tuple[list[str], list[str], list[str]]] = {rule: ([], [], []) for rule in known}
    unknown = []
    tests = ((rule, place, 0) for rule, place in test_citations())
    vectors = ((rule, place, 1 if runs else 2) for rule, place, runs in vector_citations())
    for rule, place, column in itertools.chain(tests, vectors):
        if rule not in known:
            unknown.append(f"{rule}: {place}")
        elif place not in found[rule][column]:
            found[rule][column].append(place)
    most = None if args.all else 3
    document = ""
    for rule, name in known.items():
        if name != document:
            document = name
            print(f"\n{name}\n  {'rule':<8} {'tests':>5} {'vectors':>7} {'waiting':>7}")
        columns = found[rule]
        cited = [place for column in columns for place in column[:most]]
        more = sum(map(len, columns)) - len(cited)
        counts = f"{len(columns[0]):>5} {len(columns[1]):>7} {len(columns[2]):>7}"
        print(f"  {rule:<8} {counts}  {'; '.join(cited)}{f' … {more} more' if more else ''}")
    none = [rule for rule, columns in found.items() if not any(columns)]
    alone = [rule for rule, columns in found.items() if not columns[0] and columns[1]]
    wait = [rule for rule, columns in found.items() if columns[2] and not columns[0] and not columns[1]]
    print(
        f"\n{len(known)} rules: {len(known) - len(none) - len(wait)} are proven by what runs, {len(alone)} of them by vectors alone"
    )
    print(f"{len(wait)} wait for a guest, with a scenario or an API case: {', '.join(wait) or 'none'}")
    print(f"{len(none)} are cited by nothing: {', '.join(none) or 'none'}")
    if unknown:
        print("cited, but not in the specification:\n  " + "\n  ".join(unknown))
    return 1 if none or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
