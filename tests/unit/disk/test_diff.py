"""Layers that are written by ourselves, read by qemu-img."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms.disk import qcow2
from ovms.disk.diff import DiffWriter
from ovms.errors import Unsupported


def write(path: Path, size: int, bits: int, parts: list[tuple[int, int, bool]], source: Path) -> None:
    """*parts*: first cluster, number of clusters, whether they are data."""
    cluster = 1 << bits
    fd, data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), os.open(source, os.O_RDONLY)
    try:
        writer = DiffWriter(fd, size, bits)
        for first, count, is_data in parts:
            start = first * cluster
            length = min(size, start + count * cluster) - start
            if is_data:
                writer.data(start, length, data)
            else:
                writer.zero(start, length)
        assert writer.empty == (not parts)
        writer.finish()
        qcow2.check_header(fd, "the layer")
        assert qcow2.is_empty(fd, "the layer") == (not parts)
    finally:
        os.close(fd)
        os.close(data)


def read(layer: Path, base: Path, out: Path) -> bytes:
    graph = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{layer}"}},"backing":{{"driver":"raw","file":{{"driver":"file","filename":"{base}"}}}}}}'
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", layer], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", graph, out], check=True)
    return out.read_bytes()


@settings(max_examples=15)
@given(
    bits=st.sampled_from([9, 10, 12, 16]),
    clusters=st.integers(1, 200),
    rest=st.integers(0, 127),
    data=st.data(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, bits: int, clusters: int, rest: int, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("diff")
    cluster = 1 << bits
    size = clusters * cluster - rest * 512 % cluster
    marks = sorted(data.draw(st.sets(st.integers(0, clusters - 1), max_size=20)))
    parts = []
    for at, after in itertools.pairwise([*marks, clusters]):
        parts.append((at, data.draw(st.integers(1, after - at)), data.draw(st.booleans())))
    base, content = os.urandom(size), os.urandom(size)
    (tmp_path / "base").write_bytes(base)
    (tmp_path / "content").write_bytes(content)
    write(tmp_path / "layer", size, bits, parts, tmp_path / "content")
    expected = bytearray(base)
    for first, count, is_data in parts:
        start, end = first * cluster, min(size, (first + count) * cluster)
        expected[start:end] = content[start:end] if is_data else bytes(end - start)
    assert read(tmp_path / "layer", tmp_path / "base", tmp_path / "out") == bytes(expected)


def test_a_large_disk_has_several_tables_of_refcounts(tmp_path: Path) -> None:
    size = 10 << 20
    content = os.urandom(size)
    (tmp_path / "content").write_bytes(content)
    (tmp_path / "base").write_bytes(bytes(size))
    write(tmp_path / "layer", size, 9, [(0, size >> 9, True)], tmp_path / "content")
    assert read(tmp_path / "layer", tmp_path / "base", tmp_path / "out") == content


def test_clusters_too_small_for_the_disk(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as file, pytest.raises(Unsupported, match="too small"):
        DiffWriter(file.fileno(), 1 << 44, 9)
