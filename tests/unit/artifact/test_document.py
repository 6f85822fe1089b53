"""Manifest files that people write: the JSON subset of YAML, and nothing that YAML has beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.artifact.document import read_document
from ovms.errors import FileProblem, JsonInvalid
from ovms.spec import limits, strictjson


def read(directory: Path, text: str | bytes, name: str = "ovms.yaml") -> Any:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_document(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 'y']\n", {"a": 1, "b": ["x", "y"]}),
        ("{a: 1.5, b: true, c: null, d: ~, e: }", {"a": 1.5, "b": True, "c": None, "d": None, "e": None}),
        ("# a comment alone", None),
        ("---\na: b\n", {"a": "b"}),
        ("created: 2026-01-31T12:00:00Z", {"created": "2026-01-31T12:00:00Z"}),
        ("created: 2026-01-31", {"created": "2026-01-31"}),
        ("version: '1.0'", {"version": "1.0"}),
        ("address: '0xfe000000'", {"address": "0xfe000000"}),
        ("args: >-\n  console=ttyS0\n  quiet\n", {"args": "console=ttyS0 quiet"}),
        ("a: é", {"a": "é"}),
        ('a: "\\ud83d\\ude00"', {"a": "\U0001f600"}),
        ("a: !!str 1", {"a": "1"}),
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        ("a: .5\nb: 1e3\nc: 1_000", {"a": 0.5, "b": "1e3", "c": 1000}),
    ],
)
def test_yaml(tmp_path: Path, text: str, value: Any) -> None:
    assert read(tmp_path, text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "key twice in one object: 'a', in line 2"),
        ("a: {b: 1, b: 2}", "key twice"),
        ("a: &x 1\nb: *x", "aliases are not allowed, in line 2"),
        ("a: &x {}\nb:\n  <<: *x", "merge"),
        ("b:\n  <<: {a: 1}", "merge"),
        ("1: x", "the key 1 in line 1 is no string"),
        ("yes: x", "the key True in line 1 is no string"),
        ("? [a]\n: x", "no string"),
        ("? {a: b}\n: x", "no string"),
        ("null: x", "no string"),
        ("a: !!python/object/apply:os.system ['touch owned']", "python/object"),
        ("a: !!python/name:os.system", "python/name"),
        ("!!python/object/new:object []", "python/object"),
        ("a: !custom x", "!custom"),
        ("a: !!timestamp 2026-01-31", "timestamp"),
        ("a: !!binary aGVsbG8=", "binary"),
        ("a: !!set {x: null}", "set"),
        ("a: !!omap [x: 1]", "omap"),
        ("a: !!pairs [x: 1]", "pairs"),
        ("a: !!str {b: c}", "line 1"),
        ("a: !!int x", "not YAML that we read"),
        ("a: !!map x", "type 'map' in line 1"),
        ("a: !!map ''", "type 'map' in line 1"),
        ("a: !!seq x", "type 'seq' in line 1"),
        ("a: !!null [x]", "type 'null' in line 1"),
        ("a: !!bool maybe", "not YAML"),
        ("a: !!int ''", "not YAML"),
        ("a: !" + "x" * 10_000, "type '!xxx"),
        ("a: !" + "x" * 10_000 + "!y z", "undefined tag handle"),
        ("k" * 900 + ": 1\n" + "k" * 900 + ": 2", "key twice"),
        ("a: .nan", "holds nan, which JSON does not know, in line 1"),
        ("a: -.inf", "holds -inf"),
        ("a: 1.0e+999", "holds inf"),
        (f"a: 0x{'f' * 5000}", "number that is too long"),
        ("a: " + "1:" * 3000 + "1", "number that is too long"),
        ("a: " + "9" * 5000, "number that is too long"),
        ('a: "\\ud800"', "surrogate"),
        ('"\\udc00": 1', "surrogate"),
        ("a: [", "not YAML: .* in line 1"),
        ("a: b: c", "not YAML: .* in line 1, column 5"),
        ("a: 1\n--- \nb: 2", "another document"),
        ("%YAML 9.9\n---\na: 1", "not YAML"),
        ("a: \x01", "not YAML"),
        (b"a: \xff\xfe", "not YAML"),
        ("[" * 40 + "]" * 40, "deeper than 32 levels"),
        ("[" * 100_000, "deeper than 32 levels"),
        ("".join(f"{' ' * i}a:\n" for i in range(40)), "deeper than 32 levels"),
        ("- " * 40 + "x", "deeper than 32 levels"),
        ("? " * 40 + "x", "deeper than 32 levels"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(JsonInvalid, match=words) as info:
        read(tmp_path, text)
    assert len(info.value.message) < 500
    assert str(tmp_path / "ovms.yaml") in info.value.message
    assert not (tmp_path / "owned").exists()


def test_a_bomb_of_aliases(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    begin = time.process_time()
    with pytest.raises(JsonInvalid, match="aliases"):
        read(tmp_path, "\n".join(lines))
    assert time.process_time() - begin < 1


def test_json_files_are_json(tmp_path: Path) -> None:
    assert read(tmp_path, '{"a": 1}', "ovms.json") == {"a": 1}
    with pytest.raises(JsonInvalid, match="is not JSON"):
        read(tmp_path, "a: 1", "ovms.json")
    with pytest.raises(JsonInvalid, match="key twice"):
        read(tmp_path, '{"a": 1, "a": 1}', "ovms.json")


@pytest.mark.parametrize("name", ["ovms.json", "ovms.yaml"])
def test_the_file_itself(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(FileProblem, match="the manifest: there is no file"):
        read_document(path)
    path.touch()
    with pytest.raises(JsonInvalid, match="is empty") as info:
        read_document(path)
    assert info.value.context["rule"] == "DOC-1"
    with path.open("wb") as file:
        file.truncate(limits.MANIFEST_MAX + 1)
    with pytest.raises(JsonInvalid, match="at most") as info:
        read_document(path)
    assert info.value.context["rule"] == "DOC-5"
    with pytest.raises(FileProblem, match="is a directory"):
        read_document(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False).map(lambda f: round(f, 3)).filter(lambda f: abs(f) < 1e15)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(alphabet="abc-_ é", max_size=5), v, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_yaml_says_the_same_as_json(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    directory = tmp_path_factory.mktemp("document")
    text = json.dumps(value, indent=1)
    assert read(directory, text, "x.json") == value
    assert read(directory, text, "x.yaml") == value


@given(st.text(alphabet="ab:-[]{},&*!|>?%@ \n\"'#0123.<=~\\u", max_size=60))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = tmp_path_factory.mktemp("document")
    try:
        value = read(directory, text or " ")
    except JsonInvalid:
        return
    # what was read can be written, and says the same
    assert strictjson.parse(strictjson.canonical(value), "x", max_size=1 << 20) == value
