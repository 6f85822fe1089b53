"""``qemu-img`` over layers that are open and checked.

It opens nothing by a name of ours or of an image's: every layer is an open file, every node says its format and what is below it, so
that what stands in the images about files is never looked at.
"""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

from ovms import process
from ovms.errors import HostError
from ovms.lazy import dataclass, regex
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat

TOOL: Final = "qemu-img"
#: Seconds without any progress (it is told at each hundredth) after which qemu-img is given up: a hundredth of 16 TiB takes its time.
STALL: Final = 3600.0
_MEASURE_TIMEOUT: Final = 600.0
_OUTPUT_MAX: Final = 64 * limits.KIB
_PERCENT: Final = regex(rb"\(([0-9]{1,3}\.[0-9]{2})/100%\)")


@dataclass(frozen=True)
class Open:
    """An open layer; *what* names it in errors."""

    fd: int
    format: DiskFormat
    what: str


def source(layers: Sequence[Open], name: str = "layer") -> str:
    """The disk of *layers*, lowest first, as qemu-img takes it for an image; *name* is what its nodes are called."""
    return "json:" + json.dumps(_graph(layers, name))


def _graph(layers: Sequence[Open], prefix: str = "layer") -> dict[str, Any]:
    below: dict[str, Any] | None = None
    for number, layer in enumerate(layers):
        name = f"{prefix}{number}"
        file = {"driver": "file", "node-name": f"{name}-file", "filename": f"/proc/self/fd/{layer.fd}"}
        node: dict[str, Any] = {"driver": str(layer.format), "node-name": name, "file": {**file, "read-only": True}}
        if layer.format is DiskFormat.QCOW2:
            node["backing"] = below
        below = {**node, "read-only": True}
    assert below is not None
    return below


def convert(
    tool: Path, source: str, fds: Sequence[int], fd: int, format: DiskFormat, size: int, advance: Callable[[int], None]
) -> None:
    """Writes a disk of *size* bytes into the image *fd*, of *format* and empty; *fds* are what *source* opens."""
    options = f"driver={format},discard=unmap,file.driver=file,file.filename=/proc/self/fd/{fd}"
    argv: list[str | Path] = [tool, "convert", "-p", "-n", "--target-is-zero", "--target-image-opts", source, options]
    done = 0

    def tell(percent: float) -> None:
        nonlocal done
        now = min(size, int(size * percent / 100))
        advance(max(0, now - done))
        done = max(done, now)

    run(argv, [*fds, fd], STALL, tell)


def measure(tool: Path, source: str, fds: Sequence[int], format: DiskFormat) -> int:
    """The bytes that an image of *format* would take."""
    answer = run([tool, "measure", "--output=json", "-O", str(format), source], fds, _MEASURE_TIMEOUT)
    try:
        return int(json.loads(answer)["required"])
    except (ValueError, KeyError, TypeError) as exc:
        raise HostError(f"qemu-img measure answered {process.tail(answer)[:200]}") from exc


def run(
    argv: Sequence[str | Path], fds: Sequence[int], stall: float, tell: Callable[[float], None] | None = None
) -> bytes:
    """Runs qemu-img; returns what it printed. *stall*: seconds that it may say nothing.

    Raises:
        HostError: it failed. An OSError where the disk is full.
    """
    with tempfile.TemporaryFile() as said:
        child = process.spawn(argv, pass_fds=fds, stdout=subprocess.PIPE, stderr=said)
        assert child.stdout is not None
        output = b""
        try:
            deadline = time.monotonic() + stall
            while True:
                ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise HostError(f"qemu-img made no progress for {stall:g} s, and was ended")
                piece = os.read(child.stdout.fileno(), 4096)
                if not piece:
                    break
                output = (output + piece)[-_OUTPUT_MAX:]
                if tell is not None and (found := _PERCENT.findall(output[-256:])):
                    tell(float(found[-1]))
                    deadline = time.monotonic() + stall
            code = child.wait(60.0)
        finally:
            process.terminate(child)
            child.stdout.close()
        require_success(code, said)
        return output


def require_success(code: int, said: IO[bytes]) -> None:
    """Raises as :func:`run` where qemu-img ended with another code than 0; *said* is the file with what it said then."""
    if code == 0:
        return
    said.seek(0)
    words = said.read(_OUTPUT_MAX)
    if b"No space left on device" in words:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise HostError(f"qemu-img failed ({process.describe_exit(code)}): {process.tail(words)}")
