"""Looks every pinned package of requirements/*.txt up among the known vulnerabilities: audit.py [--tool PROGRAM] [FILE...]

The work is pip-audit's, in an environment of its own (``requirements/audit.txt``), and the knowledge that of the index's advisory
service. All pins are looked up, whatever platform they are for.

Exits with 0 (nothing is known of any), 1 (something is: each is listed), 2 (a file holds what is no pin), or 3 (it could not be found out, which is
no good news: without a network, say).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OK, FOUND, WRONG, UNKNOWN = 0, 1, 2, 3
#: Seconds for all of it, and for one answer of the service.
TIMEOUT, ANSWER = 600, 15
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)\s*(?:;[^\\]*)?\\?")


class Pin(NamedTuple):
    """A package and the only version of it that is taken."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class NoPinError(Exception):
    """A line that is neither a pin nor a hash."""


def pins(path: Path) -> list[Pin]:
    """The pins of a requirements file."""
    answer = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith(("#", "--hash=")):
            continue
        match = _PIN.fullmatch(text)
        if match is None:
            raise NoPinError(f"{path.name}, line {number}: {text[:100]!a} is no pin")
        answer.append(Pin(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]))
    return answer


def files_of(wanted: list[Pin], directory: Path) -> list[Path]:
    """Requirements files with all of *wanted*, none of which has a package twice: pip-audit takes no other."""
    rounds: list[dict[str, Pin]] = []
    for pin in wanted:
        place = next((one for one in rounds if pin.name not in one), None)
        if place is None:
            rounds.append(place := {})
        place[pin.name] = pin
    answer = []
    for number, one in enumerate(rounds):
        path = directory / f"{number}.txt"
        path.write_text("".join(f"{pin}\n" for pin in one.values()), encoding="utf-8")
        answer.append(path)
    return answer


def ask(tool: Path, wanted: list[Pin]) -> tuple[list[Any], str]:
    """What the tool says of each package, and what it complains of where it says nothing."""
    answers: list[Any] = []
    complaint = ""
    with tempfile.TemporaryDirectory() as directory:
        for path in files_of(wanted, Path(directory)):
            options = ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", f"--timeout={ANSWER}"]
            try:
                done = subprocess.run(
                    [str(tool), "-r", str(path), *options],
                    capture_output=True, text=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as exc:
                complaint = str(exc)
                continue
            try:
                answers += json.loads(done.stdout)["dependencies"]
            except (ValueError, KeyError, TypeError):
                complaint = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return answers, complaint


def installed() -> Path | None:
    """pip-audit, in an environment of its own, which is made where there is none; None where that can't be made."""
    cache = Path(os.environ.get("OVMS_CACHE") or ROOT / ".cache") / "audit"
    wanted = (ROOT / "requirements" / "audit.txt").read_text(encoding="utf-8")
    stamp, tool = cache / ".ovms-stamp", cache / "bin" / "pip-audit"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and tool.is_file():
        return tool
    pip = [str(cache / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", cache], check=True)
        subprocess.run(
            [*pip, "--require-hashes", "-r", str(ROOT / "requirements" / "audit.txt")], check=True, timeout=TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    stamp.write_text(wanted, encoding="utf-8")
    return tool


def main(arguments: list[str] | None = None) -> int:
    """Prints what is found, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", type=Path, help="the pip-audit to ask (default: one in .cache, which is made)")
    parser.add_argument("files", type=Path, nargs="*", help="requirements files (default: all of requirements/)")
    args = parser.parse_args(arguments)
    files = args.files or sorted((ROOT / "requirements").glob("*.txt"))
    try:
        wanted = list(dict.fromkeys(pin for path in files for pin in pins(path)))
    except (NoPinError, OSError) as exc:
        print(f"audit: {exc}")
        return WRONG
    what = f"{len(wanted)} packages of {len(files)} files"
    tool = args.tool or installed()
    if tool is None:
        print(f"audit: {what} could NOT be checked: pip-audit cannot be installed")
        return UNKNOWN
    answers, complaint = ask(tool, wanted)
    return tell(what, wanted, answers, complaint)


def tell(what: str, wanted: list[Pin], answers: list[Any], complaint: str) -> int:
    """Prints what was answered, and returns the exit code."""
    known = {Pin(one["name"], one["version"]): one["vulns"] for one in answers if "vulns" in one}
    found = [(pin, vulnerability) for pin in wanted for vulnerability in known.get(pin, ())]
    for pin, one in found:
        fixed = ", ".join(one.get("fix_versions") or ()) or "no version"
        print(f"audit: {pin}: {one.get('id')} (fixed in {fixed})")
    missing = [str(pin) for pin in wanted if pin not in known]
    if missing:
        print(
            f"audit: {what}: {len(missing)} could NOT be checked: {', '.join(missing[:5])}{', …' * (len(missing) > 5)}"
        )
        skipped = (str(one["skip_reason"]) for one in answers if "skip_reason" in one)
        print(f"audit: pip-audit says: {(complaint or next(skipped, 'nothing'))[:500]}")
    if found:
        return FOUND
    if missing:
        return UNKNOWN
    print(f"audit: nothing is known of {what}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
