"""The demo on a real Debian guest: what the README promises, whole, side by side, and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "demo" / "demo.py"
FIGURES = {
    *("build_s", "push_s", "pull_s", "boot_ms", "snapshot_ms", "restore_ms"),
    *("accel", "artifact_bytes", "snapshot_bytes", "ok"),
}

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


def start(scratch: Path) -> subprocess.Popen[bytes]:
    scratch.mkdir()
    with (scratch / "talk").open("wb") as talk:
        return subprocess.Popen(
            [sys.executable, DEMO],
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=talk,
            start_new_session=True,
        )


def left_behind(scratch: Path) -> list[str]:
    """Processes that name the demo's directory in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(scratch) in words:
                found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_two_demos_side_by_side(tmp_path: Path) -> None:
    demos = [(tmp_path / name, start(tmp_path / name)) for name in ("one", "two")]
    for scratch, demo in demos:
        out, _ = demo.communicate(timeout=500)
        talk = (scratch / "talk").read_text(errors="replace")
        assert demo.returncode == 0, talk
        figures = json.loads(out.splitlines()[-1])
        assert set(figures) == FIGURES
        assert figures["ok"] is True
        assert figures["restore_ms"] < figures["boot_ms"]
        assert left_behind(scratch) == []


@pytest.mark.parametrize("seconds", [1.0, 4.0, 12.0])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    scratch = tmp_path / "demo"
    demo = start(scratch)
    time.sleep(seconds)
    os.killpg(demo.pid, signal.SIGINT)
    out, _ = demo.communicate(timeout=120)
    assert demo.returncode != 0
    assert json.loads(out.splitlines()[-1])["ok"] is False
    assert left_behind(scratch) == []
    assert [path.name for path in scratch.iterdir()] == ["talk"]
