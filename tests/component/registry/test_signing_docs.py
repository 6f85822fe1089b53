"""docs/signing/README.md is run from its top: each command in its order, and what it says is what the page says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import guests, tools
from support.cli import OVM
from support.registry import Registry
from support.rfc import ROOT
from support.tls import Authority

PAGE = ROOT / "docs" / "signing" / "README.md"
HOST = "registry.example"
#: A digest as the page has it: its first digits, which stand for the same digest everywhere; or none, for any.
SHORT = re.compile(r"sha256:([0-9a-f]*)…")


@dataclass
class Step:
    """A command with its continuation lines, and what the page shows of its answer."""

    command: str
    expected: list[str] = field(default_factory=list)


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(line[2:]))
            elif line.startswith("> "):
                found[-1].command += f"\n{line[2:]}"
            else:
                found[-1].expected.append(line)
    return found


class Reader:
    """A shell in which the page is followed, and the digests that it met."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._known: dict[str, str] = {}

    def command(self, step: Step) -> str:
        return SHORT.sub(lambda m: self._known[m[1]], step.command).replace(HOST, self._host)

    def compare(self, step: Step, said: str) -> None:
        """What a page shows may leave out lines or their ends (…), and the rest of a digest."""
        pattern = ""
        names: list[str] = []
        for line in step.expected:
            if line == "…":
                pattern += r"(?:.*\n)*?"
                continue
            at = 0
            for found in SHORT.finditer(line):
                pattern += self._plain(line[at : found.start()])
                if found[1] in self._known:
                    pattern += self._known[found[1]]
                elif found[1]:
                    pattern += "(sha256:[0-9a-f]{64})"
                    names.append(found[1])
                else:
                    pattern += "sha256:[0-9a-f]+…?"
                at = found.end()
            pattern += self._plain(line[at:]) + r"\n"
        match = re.fullmatch(pattern, said)
        assert match, f"$ {step.command}\n--- the page says\n" + "\n".join(step.expected) + f"\n--- it said\n{said}"
        self._known.update(zip(names, match.groups(), strict=True))

    def _plain(self, text: str) -> str:
        return re.escape(text.replace(HOST, self._host)).replace("…", ".*")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    authority = Authority(tmp_path / "ca")
    registry = Registry(tmp_path / "registry", tls=authority.issue("server"))
    yield registry
    registry.close()


@pytest.mark.long
def test_the_page_can_be_followed(registry: Registry, tmp_path: Path, echo_kernel: Path) -> None:
    work, programs = tmp_path / "work", tmp_path / "bin"
    for directory in (work, programs, tmp_path / "home"):
        directory.mkdir()
    for name, program in (("ovm", OVM), ("cosign", tools.find("cosign"))):
        (programs / name).symlink_to(program)
    guests.write_project(work / "web", echo_kernel, name="web")
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "OVMS_ROOT": str(tmp_path / "root"),
        "SSL_CERT_FILE": str(tmp_path / "ca" / "ca.crt"),
        "COSIGN_PASSWORD": "correct horse",
        "LC_ALL": "C.UTF-8",
    }
    reader = Reader(registry.host)
    followed = steps(PAGE.read_text(encoding="utf-8"))
    assert len(followed) > 20
    code = 0
    try:
        for step in followed:
            # the last exit code is where 'echo $?' looks for it
            script = f"(exit {code})\n{reader.command(step)}"
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=60, check=False,
            )  # fmt: skip
            code = done.returncode
            reader.compare(step, done.stdout.decode())
    finally:
        subprocess.run(["bash", "-c", "ovm rm -f $(ovm ps -aq)"], env=env, capture_output=True, timeout=60, check=False)
    assert guests.qemu_children(tmp_path / "root") == []
