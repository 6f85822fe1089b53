"""What we depend on is pinned and looked up; what we build is the same wherever it is built, and works from there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))
AUDIT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "audit.py"))


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_every_package_is_pinned_with_its_hashes(path: Path) -> None:
    text = path.read_text()
    pins = AUDIT["pins"](path)
    assert len(pins) == len(re.findall("==[0-9]", text)) > 0
    for entry in re.split(r"^(?=[A-Za-z])", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]
    assert "://" not in text, "a package comes from somewhere else than the index"


def tool(directory: Path, vulnerable: str = "", silent: bool = False, skipped: str = "") -> Path:
    """A program that answers as pip-audit does: of what it is asked about, *vulnerable* has a hole, *skipped* is not known."""
    path = directory / "pip-audit"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        f"vulnerable, skipped = {vulnerable!r}, {skipped!r}\n"
        "dependencies = []\n"
        "for line in open(sys.argv[2]):\n"
        "    name, _, version = line.strip().partition('==')\n"
        "    one = {'name': name, 'version': version}\n"
        "    if name == skipped:\n"
        "        dependencies.append({**one, 'skip_reason': 'not there'})\n"
        "    else:\n"
        "        vulns = [{'id': 'PYSEC-1', 'fix_versions': ['9']}] if name == vulnerable else []\n"
        "        dependencies.append({**one, 'vulns': vulns})\n"
        + ("sys.exit('no connection')\n" if silent else "print(json.dumps({'dependencies': dependencies}))\n")
        + "sys.exit(bool(vulnerable))\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("answers", "code", "line"),
    [
        ({}, 0, r"nothing is known of \d+ packages of \d files"),
        ({"vulnerable": "urllib3"}, 1, r"urllib3==[0-9.]+: PYSEC-1 \(fixed in 9\)"),
        ({"skipped": "urllib3"}, 3, r"1 could NOT be checked: urllib3==(.|\n)*says: not there"),
        (
            {"vulnerable": "h11", "skipped": "urllib3"},
            1,
            r"h11==[0-9.]+: PYSEC-1(.|\n)*1 could NOT be checked: urllib3",
        ),
        ({"silent": True}, 3, r"could NOT be checked(.|\n)*says: no connection"),
    ],
)
def test_what_an_audit_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: dict[str, Any], code: int, line: str
) -> None:
    assert AUDIT["main"](["--tool", str(tool(tmp_path, **answers))]) == code
    out = capsys.readouterr().out
    assert re.search(line, out), out
    assert ("nothing is known" in out) == (code == 0)


def test_an_audit_counts_all_files_and_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("One_x==1 ; sys_platform == 'win32' \\\n    --hash=sha256:0\ntwo[extra]==2\n")
    (tmp_path / "b.txt").write_text("# twice, and another version\none-X==1\none-x==2\n")
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    assert AUDIT["main"](["--tool", str(tool(tmp_path)), *files]) == 0
    assert "3 packages of 2 files" in capsys.readouterr().out
    # both versions are asked for
    assert AUDIT["main"](["--tool", str(tool(tmp_path, vulnerable="one-x")), *files]) == 1
    assert re.findall(r"one-x==\d", capsys.readouterr().out) == ["one-x==1", "one-x==2"]


@pytest.mark.parametrize(
    "line", ["one>=1", "one", "-r other.txt", "one @ https://example.org/one.whl", "--index-url x"]
)
def test_what_is_no_pin_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    (tmp_path / "a.txt").write_text(f"two==2\n{line}\n")
    assert AUDIT["main"](["--tool", str(tool(tmp_path)), str(tmp_path / "a.txt")]) == 2
    assert "a.txt, line 2" in capsys.readouterr().out


def test_an_audit_without_its_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert AUDIT["main"](["--tool", str(tmp_path / "none")]) == 3
    assert "could NOT be checked" in capsys.readouterr().out


# --- the wheel -------------------------------------------------------------------------------------------------------


def build(source: Path, out: Path, **environ: str) -> dict[str, Path]:
    """The wheel and the source archive of the last commit of *source*, by their suffixes."""
    subprocess.run(
        ["sh", "-c", f"umask {environ.pop('umask', '022')}; exec scripts/build-wheel.sh {sys.executable} {out}"],
        cwd=source, env={**os.environ, **environ}, check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "a clone"
    subprocess.run(["git", "clone", "--quiet", "--local", ROOT, path], check=True, timeout=100)
    return path


@pytest.mark.long
def test_two_builds_are_the_same_bytes(clone: Path, tmp_path: Path) -> None:
    first = build(ROOT, tmp_path / "first")
    # elsewhere, by somebody else, at another time; with files beside that no commit has
    (clone / "src/ovms/left.py").write_text("x")
    (clone / "src/ovms/errors.py").write_text("raise SystemExit")
    environ = {"TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1", "LC_ALL": "C", "HOME": str(tmp_path)}
    second = build(clone, tmp_path / "second", umask="077", **environ)
    assert first.keys() == second.keys() == {".whl", ".gz"}
    for suffix, path in first.items():
        assert path.name == second[suffix].name
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(second[suffix].read_bytes()).digest()
    names = set(zipfile.ZipFile(first[".whl"]).namelist())
    tracked = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD", "src"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name.removeprefix("src/") for name in tracked} <= names
    assert {name for name in names if ".dist-info/" not in name} == {name.removeprefix("src/") for name in tracked}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_wheel_works_where_nothing_else_is(clone: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "checkout", "--quiet", "--force", "HEAD"], cwd=clone, check=True)
    wheel = build(clone, tmp_path / "dist")[".whl"]
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=100)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--require-hashes", "-r", str(ROOT / "requirements/run.txt")], check=True, timeout=300)
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, timeout=100)
    subprocess.run([python, "-m", "pip", "check"], check=True, timeout=100, stdout=subprocess.DEVNULL)
    shutil.rmtree(clone)
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OVMS_ROOT": str(tmp_path / "root")}
    done = subprocess.run(
        [tmp_path / "venv/bin/ovm", "version", "--json"],
        env=environ, cwd="/", check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    assert json.loads(done.stdout)["ovms"] in wheel.name
    (tmp_path / "web.json").write_text("{}")
    done = subprocess.run(
        [tmp_path / "venv/bin/ovm", "validate", tmp_path / "web.json"],
        env=environ, cwd="/", check=False, capture_output=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
