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
from support.rfc import MAIN, RAMSNAP, ROOT

from ovms.spec import limits, mediatypes, ramheader, ramsnap
from ovms.spec.manifest import Compression


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


def value(text: str) -> int:
    number, _, unit = text.partition(" ")
    return int(number) * {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]


#: Constants that are no limits of the format: units, and what we write ourselves.
OWN_LIMITS = {"KIB", "MIB", "GIB", "TIB", "IVSHMEM_DEFAULT", "RAM_CHUNK_PAGES"}


@pytest.mark.spec("LIM-1")
def test_the_limits_of_the_specification_are_those_of_the_code() -> None:
    stated = {name: value(number) for name, number, _ in rfc.table(MAIN, "name", "value")}
    ours = {name: number for name, number in vars(limits).items() if name.isupper() and name not in OWN_LIMITS}
    assert stated == ours


@pytest.mark.spec("OCI-10")
def test_the_media_types_of_the_specification_are_those_of_the_code() -> None:
    rows = {row[0]: (row[1], row[2]) for row in rfc.table(MAIN, "part", "write")}
    assert rows == {
        "OVMS manifest": (mediatypes.MANIFEST, ""),
        "kernel": (mediatypes.KERNEL, ""),
        "initrd": (mediatypes.INITRD, ""),
        "disk layer": (mediatypes.DISK_LAYER, mediatypes.DISK_LAYER_OVMS),
        "RAM snapshot, lz4": (mediatypes.RAM_SNAPSHOT_LZ4, ""),
        "RAM snapshot, zstd": (mediatypes.RAM_SNAPSHOT_ZSTD, ""),
        "bootstrap config": (mediatypes.BOOTSTRAP, ""),
    }


def test_the_prefix_of_the_specification_is_that_of_the_code() -> None:
    rows = rfc.table(RAMSNAP, "offset", "size", "field", "must be")
    at = 0
    for offset, size, *_ in rows:
        assert int(offset) == at
        at += int(size)
    assert at == ramsnap.PREFIX_SIZE
    assert bytes.fromhex(rows[0][3].replace(" ", "")) == ramsnap.MAGIC
    assert (int(rows[1][3]), int(rows[2][3])) == (ramsnap.VERSION, ramsnap.PREFIX_SIZE)


def test_the_index_of_the_specification_is_that_of_the_code() -> None:
    (rows,) = [rows for head, rows in rfc.tables(RAMSNAP) if head == ("offset", "size", "field")]
    assert sum(int(size) for _, size, _ in rows) == ramsnap.ENTRY_SIZE
    codecs = {name: int(number) for number, name, _ in rfc.table(RAMSNAP, "codec", "name")}
    assert codecs == {
        "stored": ramsnap.CODEC_STORED,
        "lz4": ramsnap.CODEC_LZ4,
        "zstd": ramsnap.CODEC_ZSTD,
        "zero": ramsnap.CODEC_ZERO,
    }
    assert set(ramsnap.CODECS) == set(Compression)


def test_the_header_s_fields_are_those_of_the_schema() -> None:
    schema = json.loads((ROOT / "spec" / "schemas" / "ramsnap.v1.json").read_bytes())
    stated: set[str] = set()
    for names, _ in rfc.table(RAMSNAP, "field", "content"):
        stated.update(name.strip().removesuffix("[]") for name in names.split(","))
    ours = set()
    for name, field in schema["properties"].items():
        inner = field.get("properties", {})
        ours.update({f"{name}.{key}" for key in inner} or {name})
    assert stated == ours
    types = {name.strip() for row in rfc.table(RAMSNAP, "type", "further fields") for name in row[0].split(",")}
    assert types == set(ramheader.DEVICE_TYPES)


def test_every_rule_is_cited() -> None:
    """``make spec-coverage`` is clean."""
    coverage = runpy.run_path(str(ROOT / "scripts" / "spec_coverage.py"))
    known = coverage["rules"]()
    cited = {rule for rule, _ in [*coverage["test_citations"](), *coverage["vector_citations"]()]}
    assert sorted(cited - set(known)) == [], "cited, but not in the specification"
    assert [rule for rule in known if rule not in cited] == [], "cited by nothing"


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
