"""Operations on a store in a process of their own, which is killed after a given time.

``python -m support.killed`` reads one JSON object a line, forks for each (all modules are imported already, so that a run
costs what the operation costs), and answers with one: was it killed, its exit code, the seconds that it took.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ovms.artifact.build import Builder
from ovms.artifact.ram import Choice, unwanted
from ovms.errors import OvmsError
from ovms.oci import registry, transfer
from ovms.oci.collector import Needs, Options, collect
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.spec.digest import Digest

TESTS = Path(__file__).parents[1]
#: Seconds for an operation that is not killed.
TIMEOUT = 60


def pull(root: str, reference: str, name: str, *, ram: bool = True) -> None:
    where = Reference.parse(reference)
    assert where.registry is not None
    layout = Layout(Path(root))
    leave = None if ram else Choice(layout, unwanted)
    with RegistryClient(where.registry) as client:
        transfer.pull(layout, client, where, name=name, leave=leave)


def push(root: str, reference: str, digest: str) -> None:
    # the largest blob of the test goes in several chunks
    registry.CHUNKED_FROM = 1 << 20  # type: ignore[misc]
    registry.CHUNK = 512 << 10  # type: ignore[misc]
    where = Reference.parse(reference)
    assert where.registry is not None
    with RegistryClient(where.registry) as client:
        transfer.push(Layout(Path(root)), client, where, Digest(digest))


def build(root: str, manifest: str, name: str) -> None:
    def connect(host: str) -> RegistryClient:
        raise AssertionError(host)

    Builder(Layout(Path(root)), connect).build(Path(manifest), name=name)


def prune(root: str, used: str) -> None:
    collect(Layout(Path(root)), lambda: Needs(frozenset({Digest(used)})), Options(unused=True))


OPERATIONS: dict[str, Callable[..., None]] = {"pull": pull, "push": push, "build": build, "prune": prune}


@dataclass(frozen=True)
class Outcome:
    killed: bool
    code: int
    took: float


class Killer:
    """Runs operations in children, and kills them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.killed"],
            cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def run(self, operation: str, after: float | None = None, **arguments: Any) -> Outcome:
        """Runs an operation, and kills it *after* so many seconds (None: it may end)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"operation": operation, "after": after, "arguments": arguments}) + "\n")
        line = self._process.stdout.readline()
        assert line, "the killer has died"
        return Outcome(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _child(task: dict[str, Any]) -> int:
    signal.alarm(TIMEOUT)
    try:
        OPERATIONS[task["operation"]](**task["arguments"])
        return 0
    except OvmsError as exc:
        print(f"{task['operation']}: {exc.code}: {exc}", file=sys.stderr, flush=True)
        return 1


def main() -> None:
    """Answers until nobody asks any more."""
    for line in sys.stdin:
        task = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = _child(task)
            finally:
                os._exit(code)
        if task["after"] is not None:
            time.sleep(task["after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        took = time.monotonic() - began
        killed = os.WIFSIGNALED(status)
        code = os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
        print(json.dumps({"killed": killed, "code": code, "took": took}), flush=True)


if __name__ == "__main__":
    main()
