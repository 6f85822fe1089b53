"""Several disk layers as one: what all of them together change of the layer below.

``qemu-img map`` tells which parts of the disk are in any of them, and whether as data or as zeroes (which hide what is below, as data
do); ``qemu-img convert`` puts the data together; :mod:`ovms.disk.diff` writes the layer. At the end qemu-img reads both disks, the one
of many layers and the one of two, and compares them byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.disk import qcow2
from ovms.disk.diff import DiffWriter
from ovms.errors import HostError
from ovms.progress import Progress
from ovms.runtime import images
from ovms.runtime.images import Open
from ovms.spec.manifest import DiskFormat

#: Bytes of one line of a map.
_LINE_MAX: Final = 4096
_UNIT_BITS: Final = 16


def layers(
    base: Open, pieces: Sequence[Open], directory: Path, held: contextlib.ExitStack, progress: Progress
) -> int | None:
    """Makes one layer on *base* of *pieces*, lowest first; scratch files are in *directory*, where they have no names.

    Returns the open layer, or None where they change nothing.

    Raises:
        Unsupported: their clusters are too small for one layer.
        ToolMissing, HostError, DiskFull: the host's reasons.
    """
    tool = process.find_tool(images.TOOL)
    top = qcow2.check_header(pieces[-1].fd, pieces[-1].what)
    units = [qcow2.check_header(piece.fd, piece.what).unit for piece in pieces]
    bits = min(_UNIT_BITS, min(units).bit_length() - 1)
    fds = [piece.fd for piece in pieces]
    alone = images.source(pieces)
    fsutil.require_space(directory, 2 * images.measure(tool, alone, fds, DiskFormat.QCOW2), "the layer")
    with tempfile.TemporaryFile(dir=directory, buffering=0) as data, progress.task("squash", top.virtual_size) as task:
        os.ftruncate(data.fileno(), top.virtual_size)
        with fsutil.noticing_full_disk("the layer", directory):
            images.convert(tool, alone, fds, data.fileno(), DiskFormat.RAW, top.virtual_size, task.advance)
            made = _scratch(directory, held)
            writer = DiffWriter(made, top.virtual_size, bits)
            for start, length, zero in _parts(tool, alone, fds):
                if start & ((1 << bits) - 1) or start + length > top.virtual_size:
                    raise HostError(f"qemu-img tells of a part at offset {start} that no cluster begins with")
                if zero:
                    writer.zero(start, length)
                else:
                    writer.data(start, length, data.fileno())
            if writer.empty:
                return None
            writer.finish()
    new = Open(made, DiskFormat.QCOW2, "the layer")
    _check(tool, base, pieces, new)
    return made


def _scratch(directory: Path, held: contextlib.ExitStack) -> int:
    file = held.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))  # noqa: SIM115 - held closes it
    return file.fileno()


def _parts(tool: Path, source: str, fds: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """What is in any layer of *source*: offset, length, and whether it is zero, in ascending order."""
    with tempfile.TemporaryFile() as said:
        argv: list[str | Path] = [tool, "map", "--output=json", source]
        child = process.spawn(argv, pass_fds=fds, stdout=subprocess.PIPE, stderr=said)
        assert child.stdout is not None
        try:
            while line := child.stdout.readline(_LINE_MAX):
                if (part := _part(line)) is not None:
                    yield part
            code = child.wait(60.0)
        finally:
            process.terminate(child)
            child.stdout.close()
        images.require_success(code, said)


def _part(line: bytes) -> tuple[int, int, bool] | None:
    # one object a line, in a list
    text = line.strip().strip(b"[],").strip()
    if not text:
        return None
    try:
        told = json.loads(text)
        if not told["present"]:
            return None
        return int(told["start"]), int(told["length"]), bool(told["zero"])
    except (ValueError, KeyError, TypeError) as exc:
        raise HostError(f"qemu-img map answered {process.tail(line)[:200]}") from exc


def _check(tool: Path, base: Open, pieces: Sequence[Open], new: Open) -> None:
    many, two = [base, *pieces], [base, new]
    images.run([tool, "check", "-q", images.source([new])], [new.fd], images.STALL)
    fds = [layer.fd for layer in (*many, new)]
    images.run([tool, "compare", "-p", images.source(many), images.source(two, "squashed")], fds, images.STALL)
