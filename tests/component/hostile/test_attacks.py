"""Every attack of ``spec/vectors/hostile``, wherever it can come in: it meets its error, and nothing is left of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import hostile
from support.hostile import Attack
from support.schemas import SPEC

from ovms.cli.main import main

FILES = ("qcow2", "raw", "kernel", "bootstrap", "ramsnap", "manifest")


def each(*forms: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("attack", hostile.attacks(*forms), ids=str)


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return hostile.load_script("make_hostile_vectors")


class Cli:
    """``ovm`` in this process, over a root of the test's own."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.root = directory / "root"
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, dict[str, Any]]:
        """The exit code, what stands on stdout, and the error."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            code = main(["--root", str(self.root), "--progress", "none", *map(str, arguments), "--json"])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        said = self._capsys.readouterr()
        assert "internal error" not in said.err
        # what is an answer to a program is one to a terminal, too
        for text in (said.out, said.err):
            assert all(c.isprintable() or c == "\n" for c in text), text
        lines = said.err.splitlines()
        return code, said.out, json.loads(lines[-1])["error"] if code and lines else {}

    def left(self) -> set[str]:
        """Every file that is there, but for what is always in a root."""
        return {
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.is_file() and "cache" not in path.parts and path.name not in KEPT
        }


#: What a root and a store have when there is nothing in them.
KEPT = frozenset({".lock", "oci-layout", "index.lock", "ovms.lock", "index.json", "ovms.index.json"})


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, capsys)


def meets(attack: Attack, code: int, error: dict[str, Any]) -> None:
    """Whether the attack met the error that the index says."""
    if attack.code is None:
        assert code == 0, error
        return
    assert error, "it was taken"
    assert error["code"] == attack.code, error
    assert error["message"].isprintable()
    problems = error.get("problems") or []
    rules = {error.get("rule"), *(problem.get("rule") for problem in problems)} - {None}
    assert not rules or rules & set(attack.rules), error


#: What is seen when chunks are unpacked, which a build leaves to whoever restores them.
UNPACKED = ("RAM-16",)


@each(*FILES, "initrd")
def test_build(cli: Cli, tmp_path: Path, attack: Attack) -> None:
    manifest = hostile.project(tmp_path / "project", attack)
    before = cli.left()
    code, _, error = cli("build", manifest, "-t", "web:1")
    if attack.rules == UNPACKED:
        assert code == 0, error
        return
    meets(attack, code, error)
    if attack.code is not None:
        assert cli.left() == before


@each(*FILES)
def test_validate(cli: Cli, tmp_path: Path, attack: Attack) -> None:
    path = tmp_path / "attack.json"
    path.write_bytes(attack.data)
    code, out, _ = cli("validate", "--type", attack.form, path)
    report = json.loads(out)
    assert (code == 0) == report["valid"] == (attack.code is None)
    for problem in report["problems"]:
        assert problem["code"] == attack.code, report
        assert problem["rule"] in attack.rules, report


RESTORE = ("--restore", "require")
#: What no document may have is not fetched at all.
TOO_LARGE = ("a megabyte and more",)


@pytest.mark.long
@each(*FILES, "oci-archive")
def test_pull_and_run(cli: Cli, tmp_path: Path, script: ModuleType, attack: Attack) -> None:
    (tmp_path / "secret").write_bytes(hostile.SECRET)
    archive = tmp_path / "attack.tar"
    archive.write_bytes(hostile.oci_archive(attack, script))
    before = cli.left()
    code, _, error = cli("pull", f"oci-archive:{archive}", "-t", "web:1")
    if code:
        if attack.name not in TOO_LARGE or error["code"] != "registry-protocol":
            meets(attack, code, error)
        assert json.loads(cli("ls")[1]) == []
    elif attack.code is not None:
        code, _, error = cli("run", "-d", "web:1", "--pull", "never", *(RESTORE if attack.form == "ramsnap" else ()))
        if error.get("code") != "snapshot-incompatible":
            meets(attack, code, error)
        assert json.loads(cli("ps", "-a")[1]) == []
        code, out, _ = cli("validate", "web:1")
        assert code
        assert attack.code in {problem["code"] for problem in json.loads(out)["problems"]}, out
    elif attack.form == "kernel":  # which the specification takes, and no VMM
        code, _, error = cli("run", "-d", "web:1", "--pull", "never", "--memory", "32M", "--accel", "tcg")
        assert error.get("code") == "vmm-failed", error
        assert json.loads(cli("ps", "-a")[1]) == []
    # what came before it was refused, and a note of where it came from
    its = ("root/store/blobs/", "root/store/ovms.origins/")
    assert {path for path in cli.left() - before if not path.startswith(its)} == set(), "it left something behind"
    assert cli("rmi", "web:1")[0] == 0 or code
    assert cli("prune")[0] == 0
    assert cli.left() - before == set(), "it left something for good"
    assert hostile.SECRET not in {
        path.read_bytes() for path in (cli.root / "store" / "blobs").rglob("*") if path.is_file()
    }


def test_the_files_are_what_the_script_makes(script: ModuleType) -> None:
    files: dict[str, bytes] = script.generate()
    for path, data in files.items():
        assert (SPEC / path).read_bytes() == data, f"{path} is out of date: run 'make vectors'"
    there = {str(path.relative_to(SPEC)) for path in hostile.VECTORS.rglob("*") if path.is_file()}
    assert there == set(files)
