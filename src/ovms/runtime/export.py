"""The disk of an instance or an artifact as one image.

``qemu-img`` puts the layers together, each of which is an open file that was checked (:mod:`ovms.runtime.images`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.artifact.model import Artifact
from ovms.disk import qcow2
from ovms.disk.layers import check_layer
from ovms.errors import DiskInvalid, FileProblem, OvmsError, Unsupported
from ovms.lazy import dataclass, replace
from ovms.oci.layout import Layout
from ovms.progress import NULL, Progress
from ovms.runtime import disks, images
from ovms.runtime.images import Open
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.spec import limits
from ovms.spec.digest import Digest
from ovms.spec.manifest import DiskFormat

_NAMELESS: Final = os.O_TMPFILE


@dataclass(frozen=True)
class Target:
    """The image to write; ``replace``: also where there is a file already."""

    path: Path
    format: DiskFormat
    replace: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written: the size of the disk, and the bytes that the image takes. The rest as of a snapshot."""

    virtual_size: int
    size: int
    downtime_ms: float = 0.0
    user_data: bool = False
    not_quiesced: str | None = None


def of_artifact(layout: Layout, artifact: Artifact, target: Target, progress: Progress = NULL) -> Exported:
    """Writes the disk of an artifact in the store (which the caller is using).

    Raises:
        Unsupported: it has no disk.
        FileProblem: the target can't be written, or is there already.
        FileProblem, DiskInvalid: a layer is not one that a VM would be started with.
        ToolMissing, HostError, DiskFull: the host's reasons. Nothing is left of the image then.
    """
    with contextlib.ExitStack() as held:
        layers = _open_layers(layout, artifact, held)
        if not layers:
            raise Unsupported(f"{artifact.manifest.name} has no disk")
        return _write(layers, target, progress)


def of_instance(
    runtime: Runtime, record: Record, target: Target, progress: Progress = NULL, *, quiesce: bool = False
) -> Exported:
    """Writes the disk of an instance, which goes on if it runs. Raises like :func:`of_artifact`, and:

    Raises:
        StateConflict: it is just starting or stopping.
        VmmError: the guest goes on.
    """
    process.find_tool(images.TOOL)
    _check_target(target)
    instances, layout = runtime.instances, runtime.layout
    with layout.using(), contextlib.ExitStack() as held:
        with instances.locked(record, finish=True) as newest:
            layers, frozen = opened(runtime, newest, runtime.artifact(newest), held, quiesce=quiesce)
        # what follows takes its time, and needs nothing of the instance any more
        written = _write(layers, target, progress)
        return replace(
            written,
            downtime_ms=frozen.downtime_ms,
            user_data=newest.user_data,
            not_quiesced=frozen.not_quiesced,
        )


def opened(
    runtime: Runtime, record: Record, artifact: Artifact, held: contextlib.ExitStack, *, quiesce: bool
) -> tuple[list[Open], disks.Frozen[bool]]:
    """The layers of an instance's disk, lowest first, in a state that stays (under its lock; the caller is using the store).

    Raises: as :func:`ovms.runtime.disks.still`, and as :func:`of_artifact` of the layers.
    """
    layers = _open_layers(runtime.layout, artifact, held)
    frozen = disks.still(runtime.instances, record, len(layers), quiesce=quiesce)
    for number, path in enumerate(frozen.overlays, start=len(layers)):
        what = f"disk layer {number}"
        fd = held.enter_context(fsutil.open_input(path, what)).fileno()
        if frozen.seen:
            fd = _private_copy(fd, runtime.instances.directory(record.id), held)
        check_layer(fd, DiskFormat.QCOW2, what)
        layers.append(Open(fd, DiskFormat.QCOW2, what))
    return layers, frozen


def _private_copy(fd: int, directory: Path, held: contextlib.ExitStack) -> int:
    # the VMM still has it open to write
    fsutil.require_space(directory, os.fstat(fd).st_blocks * 512, "a copy of the overlay")
    file = held.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))  # noqa: SIM115 - held closes it
    copied = file.fileno()
    if not fsutil.reflink(fd, copied):
        with fsutil.noticing_full_disk("a copy of the overlay", directory):
            fsutil.copy_sparse(fd, copied)
    return copied


def _open_layers(layout: Layout, artifact: Artifact, held: contextlib.ExitStack) -> list[Open]:
    layers = []
    for number, layer in enumerate(artifact.manifest.disk_layers):
        what = f"disk layer {number}"
        if layer.format is DiskFormat.RAW and number > 0:
            raise DiskInvalid(f"{what} is raw: only the base layer can be", rule="MAN-13")
        file = held.enter_context(
            fsutil.open_input(layout.path(Digest(layer.ref)), what, max_size=limits.DISK_LAYER_MAX)
        )
        check_layer(file.fileno(), layer.format, what)
        layers.append(Open(file.fileno(), layer.format, what))
    return layers


def _check_target(target: Target) -> None:
    path = target.path
    if path.is_dir():
        raise FileProblem(
            f"{path} is a directory, where a file is to be written", code="file-not-regular", path=str(path)
        )
    if not path.parent.is_dir():
        raise FileProblem(f"there is no directory {path.parent}", code="file-missing", path=str(path.parent))
    if path.is_symlink() or path.exists():
        if not target.replace:
            raise FileProblem(f"{path} is there already", hint="name another file, or add --force", path=str(path))
        if path.is_symlink() or not path.is_file():
            raise FileProblem(f"{path} is not a regular file", code="file-not-regular", path=str(path))


def _write(layers: Sequence[Open], target: Target, progress: Progress) -> Exported:
    tool = process.find_tool(images.TOOL)
    _check_target(target)
    top = layers[-1]
    size = check_layer(top.fd, top.format, top.what)
    source = images.source(layers)
    fds = [layer.fd for layer in layers]
    directory = target.path.parent
    fsutil.require_space(directory, images.measure(tool, source, fds, target.format), "the image")
    with contextlib.ExitStack() as held:
        fd = _nameless(target, size, held)
        with progress.task(target.path.name, size) as task, fsutil.noticing_full_disk("the image", directory):
            images.convert(tool, source, fds, fd, target.format, size, task.advance)
            os.fsync(fd)
        written = os.fstat(fd).st_blocks * 512
        _publish(fd, target)
    return Exported(size, written)


def _nameless(target: Target, size: int, held: contextlib.ExitStack) -> int:
    """An empty image in the target's directory that has no name yet: a kill at any moment leaves nothing of it."""
    directory = target.path.parent
    try:
        fd = os.open(directory, os.O_RDWR | _NAMELESS | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise _no_image(exc, directory) from exc
        fd = _named(directory, held)
    held.callback(os.close, fd)
    if target.format is DiskFormat.QCOW2:
        qcow2.write_empty(fd, size)
    else:
        os.ftruncate(fd, size)
    return fd


def _named(directory: Path, held: contextlib.ExitStack) -> int:
    # a file system that knows no other files, such as NFS
    path = directory / f".{fsutil.unique(8)}.tmp"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        raise _no_image(exc, directory) from exc
    held.callback(path.unlink, missing_ok=True)
    return fd


def _no_image(exc: OSError, directory: Path) -> OvmsError:
    return fsutil.disk_full(exc, "the image", directory) or FileProblem(
        f"cannot write to {directory}: {exc.strerror}", path=str(directory)
    )


def _publish(fd: int, target: Target) -> None:
    directory = os.open(target.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if target.replace:
            # a name can't be given over another file's: for a moment it has one of its own
            name = f".{fsutil.unique(8)}.tmp"
            _link(fd, name, directory)
            os.rename(name, target.path.name, src_dir_fd=directory, dst_dir_fd=directory)
        else:
            _link(fd, target.path.name, directory)  # not over a file that came meanwhile
        os.fsync(directory)
    except FileExistsError:
        raise FileProblem(f"{target.path} has come meanwhile", path=str(target.path)) from None
    finally:
        os.close(directory)


def _link(fd: int, name: str, directory: int) -> None:
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
