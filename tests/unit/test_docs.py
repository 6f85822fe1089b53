"""Documents and code say the same: links lead somewhere, tables have the code's numbers, rules are cited."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import rfc
from support.rfc import ROOT

from ovms.cli.main import COMMANDS


def documents() -> list[Path]:
    # what is checked in: no one else's documents in .venv and .cache
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in names]


def links(path: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    for link in links(path):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in rfc.anchors(target), f"{link}: there is no such heading"


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (path.parent / link.partition("#")[0]).resolve()
        for path in documents()
        for link in links(path)
        if link[0] != "#"
    }
    assert [path for path in documents() if path.is_relative_to(ROOT / "docs") and path not in linked] == []


def test_the_readme_has_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`ovm {name}" not in text] == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_json_in_documents_is_json(path: Path) -> None:
    for block in re.findall(r"^```json\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        json.loads(block)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rules_that_documents_name_exist(path: Path) -> None:
    coverage = runpy.run_path(str(ROOT / "scripts" / "spec_coverage.py"))
    known = coverage["rules"]()
    families = {rule.partition("-")[0] for rule in known}
    named = re.findall(r"\b([A-Z]{3,4}-[0-9]+)\b", path.read_text(encoding="utf-8"))
    assert [rule for rule in named if rule.partition("-")[0] in families and rule not in known] == []


def test_every_rule_is_cited() -> None:
    """``make spec-coverage`` is clean."""
    coverage = runpy.run_path(str(ROOT / "scripts" / "spec_coverage.py"))
    known = coverage["rules"]()
    cited = {rule for rule, *_ in [*coverage["test_citations"](), *coverage["vector_citations"]()]}
    assert sorted(cited - set(known)) == [], "cited, but not in the specification"
    assert [rule for rule in known if rule not in cited] == [], "cited by nothing"


def test_the_threat_model_is_shown_by_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "which test shows it" not in line]
    assert len(rows) > 25
    for row in rows:
        cells = row.strip("|").split(" | ")
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", cells[-1])
        assert len(cells) == 3, row
        assert named, f"no test shows it: {row}"
        for path, name in named:
            file = ROOT / "tests" / path
            assert file.is_file(), f"there is no {path}"
            assert re.search(rf"^def {name}\(", file.read_text(encoding="utf-8"), re.MULTILINE), f"{path} has no {name}"


#: What a scenario or an API case may stand for until there is a server (RUN, STA, SEC, DEV), and a bootstrap in a guest.
MAY_WAIT = re.compile(r"(RUN|SEC|DEV|BOOT)-[0-9]+|STA-5|ERR-4|VER-[45]")


def test_what_waits_for_a_server_needs_one() -> None:
    """Whatever a test or a vector can prove today is proven by one that runs, not by a scenario in words."""
    coverage = runpy.run_path(str(ROOT / "scripts" / "spec_coverage.py"))
    assert [rule for rule in coverage["waiting"]() if not MAY_WAIT.fullmatch(rule)] == []


def test_no_traces_of_any_machine() -> None:
    """No path and no registry of the machine that the work was done on, in any file that is checked in."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = []
    for name in names:
        with contextlib.suppress(UnicodeDecodeError, FileNotFoundError):
            for number, line in enumerate(io.StringIO((ROOT / name).read_text(encoding="utf-8")), 1):
                if re.search(r"(^|[^\w.])/(work|root|home/[a-z]+)/[a-z]", line):
                    found.append(f"{name}:{number}")
    assert found == []
