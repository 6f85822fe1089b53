"""Several layers as one: qemu-img's own layers of every kind, and what a running guest wrote."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from pathlib import Path

import pytest
from support.guests import MEMORY, Console, qemu_io

from ovms.artifact.resolve import Found, find
from ovms.disk import qcow2
from ovms.disk.diff import DiffWriter
from ovms.errors import HostError
from ovms.oci.reference import Reference
from ovms.progress import NULL
from ovms.runtime import commit, export, images, squash
from ovms.runtime.images import Open
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel
from ovms.spec.manifest import DiskFormat

SIZE = 4 << 20
SECTOR = 512
KINDS = {
    "usual": [""] * 3,
    "small clusters": ["", "cluster_size=4k", "cluster_size=512"],
    "large clusters": ["cluster_size=2M", ""],
    "parts of clusters": ["extended_l2=on,cluster_size=16k", "extended_l2=on"],
    "old": ["compat=0.10", ""],
}


def layer(path: Path, options: str, rng: random.Random, below: bytearray) -> None:
    """Makes a qcow2 file of random writes, zeroes and discards, and does the same to *below*."""
    chosen = ["-o", options] if options else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *chosen, str(path), str(SIZE)], check=True)
    commands = []
    for _ in range(20):
        start, count = rng.randrange(SIZE // SECTOR), rng.randrange(1, 200)
        start, length = start * SECTOR, min(SIZE - start * SECTOR, count * SECTOR)
        if rng.random() < 0.5:
            byte = rng.randrange(1, 256)
            commands.append(f"write -P {byte} {start} {length}")
            below[start : start + length] = bytes([byte]) * length
        else:
            commands.append(f"write -z {start} {length}")
            below[start : start + length] = bytes(length)
    subprocess.run(
        ["qemu-io", *(word for command in commands for word in ("-c", command)),
         f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{path}"}},"backing":{_below(path)}}}'],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _below(path: Path) -> str:
    # what is under the layer of that number, as JSON
    number = int(path.name)
    if number == 0:
        return f'{{"driver":"raw","read-only":true,"file":{{"driver":"file","filename":"{path.with_name("base")}"}}}}'
    under = path.with_name(str(number - 1))
    return f'{{"driver":"qcow2","read-only":true,"file":{{"driver":"file","filename":"{under}"}},"backing":{_below(under)}}}'


@pytest.mark.parametrize("kind", KINDS)
def test_the_disk_reads_as_before(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    content = bytearray(rng.randbytes(SIZE))
    (tmp_path / "base").write_bytes(content)
    for number, options in enumerate(KINDS[kind]):
        layer(tmp_path / str(number), options, rng, content)
    with contextlib.ExitStack() as held:
        pieces = [Open(_opened(tmp_path / str(n), held), DiskFormat.QCOW2, str(n)) for n in range(len(KINDS[kind]))]
        base = Open(_opened(tmp_path / "base", held), DiskFormat.RAW, "base")
        made = squash.layers(base, pieces, tmp_path, held, NULL)
        assert made is not None
        qcow2.check_header(made, "the layer")
        new = Open(made, DiskFormat.QCOW2, "new")
        out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        held.callback(os.close, out)
        os.ftruncate(out, SIZE)
        images.convert(
            Path("qemu-img"), images.source([base, new]), [base.fd, made], out, DiskFormat.RAW, SIZE, lambda _: None
        )
    assert (tmp_path / "out").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["base", "out", *map(str, range(len(KINDS[kind])))]
    )


def _opened(path: Path, held: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY)
    held.callback(os.close, fd)
    return fd


def test_a_layer_that_is_wrong_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    content = bytearray(rng.randbytes(SIZE))
    (tmp_path / "base").write_bytes(content)
    layer(tmp_path / "0", "", rng, content)
    monkeypatch.setattr(DiffWriter, "zero", lambda self, start, length: None)
    with contextlib.ExitStack() as held, pytest.raises(HostError, match="qemu-img failed"):
        base = Open(_opened(tmp_path / "base", held), DiskFormat.RAW, "base")
        squash.layers(base, [Open(_opened(tmp_path / "0", held), DiskFormat.QCOW2, "0")], tmp_path, held, NULL)


@pytest.mark.parametrize("line", [b"{}", b"x", b'{"present": true, "start": "y", "length": 1, "zero": true}', b"[[[["])
def test_a_map_that_is_none(line: bytes) -> None:
    if line == b"[[[[":
        assert squash._part(line) is None
        return
    with pytest.raises(HostError, match="map answered"):
        squash._part(line)


def test_what_a_guest_wrote_and_what_was_committed_before_become_one_layer(
    runtime: Runtime, echo: Found, tmp_path: Path
) -> None:
    def take(name: str, *, squash: bool) -> commit.Committed:
        newest = runtime.instances.find(record.id)
        return commit.take(runtime, newest, Reference.parse(name), squash=squash)

    def disk(name: str) -> bytes:
        target = export.Target(tmp_path / "out", DiskFormat.RAW, replace=True)
        with runtime.layout.using():
            export.of_artifact(runtime.layout, find(runtime.layout, name).artifact, target)
        return target.path.read_bytes()

    options = RunOptions(memory=MEMORY, accel=Accel.TCG)
    record = runtime.start(echo, options).record
    assert take("echo:none", squash=True).layers == 0
    qemu_io(runtime, record, "disk0", "write -P 1 0 192k")
    take("echo:1-a", squash=False)
    record = runtime.start(find(runtime.layout, "echo:1-a"), options).record
    for number in range(3):
        qemu_io(runtime, record, "disk0", f"write -P {number + 2} {(number + 1) * 64}k 64k")
        take(f"echo:1-b{number}", squash=False)
    qemu_io(runtime, record, "disk0", "write -z 0 64k")
    taken = take("echo:1-c", squash=True)
    old, new = echo.artifact.manifest.disk_layers, taken.artifact.manifest.disk_layers
    assert (taken.layers, new[:1], len(new)) == (1, old[:1], 2)
    assert taken.artifact.image.layers[-1].annotations.get("org.opencontainers.image.title") == "disk-1.qcow2"
    expected = bytes(65536) + b"\2" * 65536 + b"\3" * 65536 + b"\4" * 65536
    plain = take("echo:1-d", squash=False)
    assert len(plain.artifact.manifest.disk_layers) > 3
    assert disk("echo:1-c") == disk("echo:1-d")
    assert disk("echo:1-c").startswith(expected)
    again = runtime.start(find(runtime.layout, "echo:1-c"), options).record
    assert Console(runtime.instances.directory(again.id)).wait_for("READY")
    left = [path.name for path in runtime.instances.directory(record.id).iterdir() if "tmp" in path.name]
    assert left == []
