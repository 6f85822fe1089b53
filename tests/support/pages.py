"""Pages with commands, which are run as they stand there: what each says is what the page says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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

    def __init__(self, real: Mapping[str, str]) -> None:
        """*real* has for names of the page what they are here."""
        self._real = real
        self._known: dict[str, str] = {}

    def command(self, step: Step) -> str:
        return self._here(SHORT.sub(lambda m: self._known[m[1]], step.command))

    def _here(self, text: str) -> str:
        for name, real in self._real.items():
            text = text.replace(name, real)
        return text

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
        return re.escape(self._here(text)).replace("…", ".*")


def follow(page: Path, work: Path, env: Mapping[str, str], real: Mapping[str, str]) -> int:
    """Runs every command of a page in its order, in *work*, and compares what each says. Returns how many there were."""
    reader = Reader(real)
    followed = steps(page.read_text(encoding="utf-8"))
    code = 0
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
    return len(followed)


def programs(directory: Path, **found: Path) -> str:
    """A ``PATH`` on which these programs come first."""
    directory.mkdir()
    for name, program in found.items():
        (directory / name).symlink_to(program)
    return f"{directory}:{os.environ['PATH']}"
