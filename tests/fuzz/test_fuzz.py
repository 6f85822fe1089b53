"""Every parser of foreign bytes under a fuzzer, in a process of its own with limits: an error of ours, or nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import seeds

TESTS = Path(__file__).parents[1]
#: Seconds for each target. 'make fuzz' gives more.
SECONDS = int(os.environ.get("FUZZ_SECONDS", "2"))
CHILD = ("-m", "fuzz.child")
#: Where 'make fuzz' keeps what reached new code; what it found is beside it.
KEPT = os.environ.get("FUZZ_CORPUS")

TARGETS = re.findall(r"^@target\(.*\)\ndef (\w+)", (TESTS / "fuzz" / "targets.py").read_text(), re.MULTILINE)
NAMES = [name.replace("_", "-") for name in TARGETS]


def fuzz(directory: Path, *words: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": "0", "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def test_the_targets_are_those_that_there_are() -> None:
    from fuzz.targets import TARGETS as REAL

    assert list(REAL) == NAMES
    assert {path.name for path in seeds.CORPUS.iterdir()} <= set(NAMES)


def test_what_is_known_harms_no_parser(tmp_path: Path) -> None:
    """The vectors, the small files of ``corpus``, and what once was a finding."""
    done = fuzz(tmp_path, *CHILD, "all", "--found", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(line.split(": ") for line in done.stderr.splitlines())
    assert list(counts) == NAMES
    assert all(int(count.split()[0]) > 1 for count in counts.values()), "a target has no seeds"


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_harms(tmp_path: Path, name: str) -> None:
    words: list[str | Path] = []
    found = tmp_path
    if KEPT:
        found = Path(KEPT, "found", name)
        corpus = Path(KEPT, name)
        for directory in (found, corpus):
            directory.mkdir(parents=True, exist_ok=True)
        words = ["--corpus", corpus]
    done = fuzz(tmp_path, *CHILD, name, "--seconds", str(SECONDS), "--found", found, *words, timeout=SECONDS + 100)
    assert done.returncode == 0, f"{done.stderr[-6000:]}\nsee {found}"


@pytest.mark.long
@pytest.mark.parametrize("broken", ["raise ValueError", "pass", "bytearray(1 << 31)"])
def test_a_finding_is_found(tmp_path: Path, broken: str) -> None:
    """A fuzzer that notices nothing would pass all of this."""
    script = (
        "import sys; from fuzz import child, targets\n"
        "child.INPUT_SECONDS = 1\n"
        "def run(data):\n"
        f"    while data[:2] == b'no': {broken}\n"
        "targets.TARGETS['broken'] = targets.Target(run)\n"
        f"(child.Path({str(tmp_path)!r}) / 'x').write_bytes(b'noo')\n"
        f"sys.argv = ['x', 'broken', '--found', {str(tmp_path)!r}, '--inputs', {str(tmp_path / 'x')!r}]\n"
        "sys.exit(child.main())\n"
    )
    done = fuzz(tmp_path, "-c", script)
    assert done.returncode == 1
    assert re.search(r"^a (crash|hang): ", done.stderr, re.MULTILINE), done.stderr
    assert [path.read_bytes() for path in tmp_path.glob("crash-*")] == [b"noo"]
