"""The command line: values, output, exit codes, and what it costs to start."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import artifacts

from ovms import errors
from ovms.cli import exitcodes, main, output, progress, values
from ovms.cli.exitcodes import Exit
from ovms.cli.main import COMMANDS, command_parser
from ovms.oci.descriptor import rfc3339
from ovms.runtime.root import Root

REPOSITORY = Path(__file__).parents[3]


def all_errors(kind: type[errors.OvmsError] = errors.OvmsError) -> list[type[errors.OvmsError]]:
    return [kind, *(c for child in kind.__subclasses__() for c in all_errors(child))]


def test_every_error_has_an_exit_code() -> None:
    for kind in all_errors():
        if kind.__module__ != "ovms.errors" or kind is errors.OvmsError:
            continue
        error = kind("x", problems=[]) if kind is errors.ManifestInvalid else kind("x")
        assert exitcodes.exit_code(error) is not Exit.INTERNAL, kind


def test_the_docs_have_the_same_table() -> None:
    text = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert [int(code) for code in rows] == [int(code) for code in Exit]


def test_the_docs_have_every_error_code() -> None:
    text = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    documented = set(re.findall(r"`([a-z][a-z0-9-]+)`", text))
    for kind in all_errors():
        if kind.__module__ == "ovms.errors" and kind is not errors.OvmsError:
            assert {kind.code, *kind.more_codes} <= documented, kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512m", 512 << 20),
        ("2g", 2 << 30),
        ("1GiB", 1 << 30),
        ("1.5G", 3 << 29),
        ("33554432", 32 << 20),
        ("64 MB", 64 << 20),
    ],
)
def test_memory(text: str, expected: int) -> None:
    assert values.memory(text) == expected


@pytest.mark.parametrize("text", ["", "m", "-1g", "1k", "1x", "0", "8m", "2000t", "512.0000001m", "nan", "1e9"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.memory(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "256", ""])
def test_cpus_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.cpus(text)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x", ""])
def test_seconds_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.seconds(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (500 << 20, "500 MiB"), (1 << 50, "1024 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("then", "text"),
    [
        ("2026-01-01T00:00:00Z", "1 day"),
        ("2026-01-01T23:59:00Z", "1 minute"),
        ("2026-01-01T23:59:59.500Z", "less than a second"),
        ("nonsense", "?"),
        ("2026-01-01", "?"),
        (None, "?"),
    ],
)
def test_ages(then: str | None, text: str) -> None:
    assert output.ago(then, datetime(2026, 1, 2, tzinfo=UTC)) == text


@pytest.mark.spec("SEC-3")
def test_foreign_words_do_not_drive_the_terminal() -> None:
    assert "\x1b" not in output.safe("\x1b]0;owned\x07\u202e")
    assert "\u202e" not in output.safe("\u202e")


@pytest.mark.spec("GEN-2")
def test_an_error_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.ManifestInvalid(
        "the manifest has 2 problems",
        problems=[errors.Problem("$.b", "two", "MAN-1"), errors.Problem("$.a", "one")],
        hint="read",
    )
    output.complain(error, as_json=False)
    assert capsys.readouterr().err.splitlines() == [
        "ovm: error: the manifest has 2 problems",
        "  $.a: one",
        "  $.b: two [MAN-1]",
        "  hint: read",
    ]
    output.complain(error, as_json=True)
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "manifest-invalid"


def test_bars_stay_within_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    bars = progress._Bars(stream)
    monkeypatch.setenv("COLUMNS", "40")
    with bars.task("a label that is much longer than its column\x1b[31m", 1000) as task:
        task.advance(400)
        task.advance(10_000)
        task.note("exists already")
    lines = stream.getvalue().replace("\x1b[1A\x1b[J", "").splitlines()
    assert lines[-1].rstrip().endswith("exists already")
    assert all(len(line) < 40 and "\x1b" not in line for line in lines)


def test_bars_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("ovms.cli.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setenv("COLUMNS", "200")
    stream = io.StringIO()
    with progress._Bars(stream).task("disk", 1000 << 20) as task:
        task.advance(500 << 20)
        task.note("resumed")  # these are no rate
        for _ in range(5):
            clock[0] += 0.5
            task.advance(20 << 20)
        lines = stream.getvalue().splitlines()
        assert lines[-1].endswith("600 MiB / 1000 MiB  40.0 MiB/s  10 s left")
        assert "left" not in lines[1], "nothing is foretold from nothing"
        clock[0] += 100.0
        task.advance(1)
        clock[0] += 1.0
        task.advance(1)
        assert stream.getvalue().splitlines()[-1].endswith("  1 B/s"), "a stall shows"
    assert "left" not in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (100, r"disk\.qcow2 0123456 {7}\[=*> *\] 600 MiB / 1000 MiB  40\.0 MiB/s  10 s left"),
        (80, r"disk\.qcow2 0123456 {7}\[=+> *\] 600 MiB / 1000 MiB  40\.0 MiB/s  10 s left"),
        (72, r"disk\.qcow2 012345. *\[=+> *\] 600 MiB / 1000 MiB  40\.0 MiB/s  10 s left"),
        (60, r"disk\.qcow2 .* 600 MiB / 1000 MiB  40\.0 MiB/s  10 s left"),
        (50, r"disk\.qcow2 .* 600 MiB / 1000 MiB  10 s left"),
        (30, r"disk\.qcow2 .* 60 %  10 s left"),
        (20, r"disk\.qcow2 .* 60 %"),
    ],
)
def test_rate_and_time_left_are_the_last_to_go(monkeypatch: pytest.MonkeyPatch, columns: int, shown: str) -> None:
    clock = [100.0]
    monkeypatch.setattr("ovms.cli.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    with progress._Bars(stream).task("disk.qcow2 0123456", 1000 << 20) as task:
        task.advance(500 << 20)
        task.note("resumed")
        for _ in range(5):
            clock[0] += 0.5
            task.advance(20 << 20)
        line = stream.getvalue().splitlines()[-1].removeprefix("\x1b[1A\x1b[J")
    assert re.fullmatch(shown, line)
    assert len(line) < columns


def test_a_window_that_became_narrower_is_erased_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    bars = progress._Bars(stream)
    monkeypatch.setenv("COLUMNS", "120")
    with bars.task("disk", 1000), bars.task("memory", 1000):
        lines = stream.getvalue().splitlines()[-2:]
        monkeypatch.setenv("COLUMNS", "30")
        bars.say("news")
        rows = sum(-(-len(line.removeprefix("\x1b[1A\x1b[J")) // 30) for line in lines)
        assert rows == 6, "no line would have wrapped"
        assert f"\x1b[{rows}A\x1b[Jovm: news" in stream.getvalue()


def test_what_is_broken_off_tells_how_much_came(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress._Bars(stream).task("disk", 1 << 30) as task:
        task.advance(100 << 20)
        task.note("resumed")
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1].endswith("broken off  100 MiB of 1.0 GiB")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.2, "1 s"), (59.5, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


def test_news_stands_above_the_bars(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    bars = progress._Bars(stream)
    with bars.task("disk", 10):
        progress.say_beside(bars, "the mirror \x1b[2J is passed over")
    erased, said, drawn = stream.getvalue().partition("ovm: the mirror \N{REPLACEMENT CHARACTER}[2J is passed over\n")
    assert said
    assert erased.endswith("\x1b[1A\x1b[J"), "the bar was not taken away first"
    assert drawn.startswith("disk")
    progress.say_beside(progress.make("none"), "news")
    assert capsys.readouterr().err == "ovm: news\n"


def test_who_is_waited_for_shows_while_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with progress._Bars(stream).task("disk", 10) as task:
        task.waiting("waiting for r.example, try 4")
        assert stream.getvalue().splitlines()[-1].endswith("waiting for r.example, try 4 (0 B done)")
        task.waiting("")
        assert stream.getvalue().splitlines()[-1].endswith("0 B / 10 B")
    assert "done" in stream.getvalue().splitlines()[-1]
    with progress.make("json").task("disk", 10) as task:
        task.waiting("waiting for r.example, try 4")
        task.waiting("")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("waiting") for line in lines] == [None, "waiting for r.example, try 4", None, None]


def test_progress_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), progress.make("json").task("disk", 10) as task:
        task.advance(4)
        raise ValueError("x")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {"task": "disk", "done": 0, "total": 10, "state": "begin"}
    assert lines[-1] == {"task": "disk", "done": 4, "total": 10, "state": "end", "note": "broken off"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--nonsense"],
        ["nonsense"],
        ["--progress", "x", "ls"],
        ["run"],
        ["run", "--memory", "1k", "x"],
        ["run", "--cpus", "0", "x"],
        ["run", "--json", "x"],
        ["run", "-d", "-p", "x", "x"],
        ["run", "-d", "--runtime", "bochs", "x"],
        ["stop"],
        ["tag", "a"],
        ["tag", "a", f"b@sha256:{'0' * 64}"],
        ["logs", "-n", "x", "y"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--root", str(tmp_path / "root"), *arguments] if arguments else []) == Exit.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(("ovm: error: ", '{"error"'))
    assert "Traceback" not in said.err


def test_a_bug_shows_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("\x1b[31mred")

    monkeypatch.setattr(main, "_run", broken)
    assert main.main(["ls"]) == Exit.INTERNAL
    said = capsys.readouterr().err
    assert "internal error: RuntimeError" in said
    assert "Traceback" not in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(5, "Input/output error", "/x"), 9),
        (OSError(5, "Input/output error"), 9),
        (OSError(28, "No space left on device", "/x"), 8),
        (BrokenPipeError(), 0),
    ],
)
def test_what_ends_a_command_otherwise(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: list[str]) -> int:
        raise raised

    monkeypatch.setattr(main, "_run", broken)
    monkeypatch.setattr("os.dup2", lambda *args: None)
    assert main.main(["ls"]) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser, _ = command_parser(name)
    assert parser.format_help().startswith(f"usage: ovm {name}")
    assert main.main([name, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_docker_users_are_pointed_the_right_way(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["images"])
    assert "did you mean 'ovm ls'?" in capsys.readouterr().err
    main.main(["snapshto"])
    assert "did you mean 'ovm snapshot'?" in capsys.readouterr().err
    for far in ("bogus", "frobnicate"):
        main.main([far])
        assert "did you mean" not in capsys.readouterr().err


def test_looking_makes_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    root = tmp_path / "mistyped"
    assert set(main.LOOKING) < set(COMMANDS)
    for arguments, code, answer in (
        (["ls", "--json"], Exit.OK, "[]\n"),
        (["ps", "-a", "--json"], Exit.OK, "[]\n"),
        (["df"], Exit.OK, None),
        (["fsck"], Exit.OK, None),
        (["prune", "--all"], Exit.OK, None),
        (["version"], Exit.OK, None),
        (["inspect", "web:1"], Exit.NOT_FOUND, ""),
        (["logs", "web"], Exit.NOT_FOUND, ""),
        (["rm", "web"], Exit.NOT_FOUND, ""),
    ):
        assert main.main(["--root", str(root), *arguments]) == code, arguments
        said = capsys.readouterr()
        assert answer is None or said.out == answer
        # with --json, stderr is the error's
        news = "" if "--json" in arguments else f"ovm: {root} has no artifacts and no instances yet\n"
        assert said.err.startswith(news)
        assert news or not said.err
    assert not root.exists()
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_artifact_of_no_age_shows_when_it_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Root(tmp_path).layout()
    digest = artifacts.small(layout, "web:1").digest
    then = time.time() - 3 * 86400 - 60
    os.utime(layout.path(digest), (then, then))
    assert main.main(["--root", str(tmp_path), "ls"]) == Exit.OK
    assert "   3 days ago   " in capsys.readouterr().out
    assert main.main(["--root", str(tmp_path), "ls", "--json"]) == Exit.OK
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["created"], entry["added"]) == (None, rfc3339(then))


@pytest.mark.parametrize("arguments", [["--version"], ["ps"], ["ls"], ["run", "--help"]])
def test_a_command_imports_little(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; from ovms.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'urllib3', 'asyncio', 'yaml', 'ssl', 'lz4', 'http.client', 'dataclasses', 'inspect'} & set(sys.modules); "
        "sys.exit(code or (f'imports {sorted(heavy)}' if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--root", tmp_path, *arguments] if arguments != ["--version"] else
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.spec("REF-1")
@pytest.mark.parametrize("what", ["", "x" * 300, "x" * 5000, "x\0y"])
def test_validate_of_what_no_file_is_called(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the current directory (which is what ``Path("")`` is), nor a fault of the host."""
    assert main.main(["--root", str(tmp_path / "root"), "validate", "--json", "--pull", "never", what]) in (
        (Exit.NOT_FOUND,) if what == "x" * 300 else (Exit.INPUT,)
    )
    assert json.loads(capsys.readouterr().err)["error"]["code"] in ("reference-invalid", "reference-not-found")


def test_validate_of_a_path_that_no_file_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["./" + "x" * 300], ["--type", "manifest", "x" * 300], ["./x\0y"]):
        assert main.main(["--root", str(tmp_path), "validate", "--json", *arguments]) == Exit.INPUT
        assert json.loads(capsys.readouterr().err)["error"]["code"] == "file-unreadable"
    assert main.main(["--root", str(tmp_path), "validate", "--json", "--type", "manifest", ""]) == Exit.INPUT
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "reference-invalid"


def test_a_file_that_is_there_gets_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, code in (("x.json", "json-invalid"), ("x.bin", "file-empty")):
        (tmp_path / name).touch()
        assert main.main(["--root", str(tmp_path), "validate", "--json", str(tmp_path / name)]) == Exit.INPUT
        answer = json.loads(capsys.readouterr().out)
        assert [problem["code"] for problem in answer["problems"]] == [code]


@pytest.mark.spec("SEC-3")
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_text_can_be_said_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    output.answer("a\x1bb \N{SNOWMAN} \xe9")
    assert b"\x1b" not in raw.getvalue()
    assert raw.getvalue().startswith(b"a" + (b"\xef\xbf\xbd" if encoding == "utf-8" else b"?") + b"b ")
