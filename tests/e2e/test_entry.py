"""How the process of ``ovm`` begins and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

#: What stands for a command, as it would be run by ``ovm``.
SCRIPT = """
import sys, types
fake = types.ModuleType("ovms.cli.main")
exec({body!r}, fake.__dict__)
import ovms.cli
sys.modules["ovms.cli.main"] = fake
from ovms.cli.entry import entry
entry()
"""


#: In which Python keeps what is printed until the end.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


def run(body: str, stdout: int | IO[str] = subprocess.PIPE, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
        env=ENVIRONMENT,
    )


def test_what_was_said_is_written_and_the_code_is_the_exit_code() -> None:
    done = run("import sys\ndef main():\n print('x' * 70000)\n print('said', file=sys.stderr, end='')\n return 7")
    assert (done.returncode, len(done.stdout), done.stderr) == (7, 70001, "said")


def test_what_was_to_be_done_at_the_end_is_done(tmp_path: Path) -> None:
    done = run(
        "import atexit, tempfile\n"
        "def main():\n"
        f" kept.append(tempfile.TemporaryDirectory(dir={str(tmp_path)!r}))\n"
        " atexit.register(lambda: print('end'))\n"
        " return 0\n"
        "kept = []"
    )
    assert (done.returncode, done.stdout) == (0, "end\n")
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_works_is_waited_for() -> None:
    done = run(
        "import threading, time\n"
        "def work():\n time.sleep(0.3)\n print('done')\n"
        "def main():\n threading.Thread(target=work).start()\n return 3"
    )
    assert (done.returncode, done.stdout) == (3, "done\n")


def test_a_thread_that_is_nobodys_is_not() -> None:
    done = run(
        "import threading, time\n"
        "def main():\n threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n return 3",
        timeout=20,
    )
    assert done.returncode == 3


def test_an_answer_that_cannot_be_written_at_the_end_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("def main():\n print('x')\n return 0", full)
    assert done.returncode == 120
    assert "No space left" in done.stderr


@pytest.mark.parametrize("when", ["import", "end"])
def test_no_traceback_of_an_interrupt(when: str) -> None:
    slow = "import sys, time\nsys.stdout.write('here\\n')\nsys.stdout.flush()\ntime.sleep(30)\n"
    if when == "import":
        # the module of main is still being imported
        script = f"""
import importlib.abc, sys
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ovms.cli.main":
            exec({slow!r})
sys.meta_path.insert(0, Slow())
from ovms.cli.entry import entry
entry()
"""
    else:
        at_end = "\n ".join(slow.splitlines())
        script = SCRIPT.format(
            body=f"import atexit\ndef end():\n {at_end}\ndef main():\n atexit.register(end)\n return 0"
        )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == (130 if when == "import" else -signal.SIGINT)
    assert said == ""


def test_help_that_cannot_be_written_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ovms.cli", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
            env=ENVIRONMENT,
        )
    assert done.returncode == 8
    assert "stdout" in done.stderr
    assert "Exception" not in done.stderr
