"""What the fuzzer starts from: the test vectors, and small files of ``corpus/TARGET`` (what once was a crash is there, too)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from support.layouts import archive, member

REPOSITORY = Path(__file__).parents[2]
VECTORS = REPOSITORY / "spec" / "vectors"
CORPUS = Path(__file__).parent / "corpus"
#: Larger files say nothing that smaller ones don't, and slow everything down.
SIZE_MAX = 64 * 1024


def of(target: str, vectors: tuple[str, ...]) -> Iterator[bytes]:
    """The seeds of a target; *vectors* are patterns below ``spec/vectors``."""
    for path in sorted((CORPUS / target).glob("*")):
        yield path.read_bytes()
    for pattern in vectors:
        for path in sorted(VECTORS.glob(pattern)):
            if path.stat().st_size <= SIZE_MAX:
                yield path.read_bytes()
    yield from {"tar-archive": archives, "reference": references}.get(target, tuple)()


def archives() -> Iterator[bytes]:
    """Archives of a layout, in each format."""
    files = [member("oci-layout", b"{}"), member("blobs/sha256/" + "a" * 64, b"x" * 600), member("d/" * 60 + "x", b"y")]
    for format in (0, 1, 2):
        yield archive(files, format=format)


def references() -> Iterator[bytes]:
    """The references of the vectors."""
    for case in json.loads((VECTORS / "reference" / "index.json").read_bytes())["cases"]:
        yield case["reference"].encode()
