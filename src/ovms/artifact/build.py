"""``ovm build``: from a manifest that names local files, digests or registry references to an artifact in the store.

Every input is checked before anything is copied, and every problem is named with its JSON path.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from ovms import fsutil
from ovms.artifact import model, resolve
from ovms.artifact.document import read_document
from ovms.artifact.kernels import check_kernel
from ovms.disk.layers import check_layer
from ovms.errors import (
    FileProblem,
    InputError,
    ManifestInvalid,
    NotFound,
    OvmsError,
    Problem,
    RegistryError,
    SnapshotInvalid,
)
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.spec import bootstrap, limits, manifest, mediatypes, ramsnap
from ovms.spec.digest import Digest, is_digest, parse_digest
from ovms.spec.document import invalid
from ovms.spec.manifest import DiskFormat

_SIZE_LIMITS: Final = {
    "kernel": limits.KERNEL_MAX,
    "initrd": limits.INITRD_MAX,
    "disk": limits.DISK_LAYER_MAX,
    "ram": 2 * limits.RAM_MAX,
    "bootstrap": limits.BOOTSTRAP_MAX,
}
_LABELS: Final = {
    "kernel": "the kernel",
    "initrd": "the initrd",
    "disk": "disk layer",
    "ram": "the RAM snapshot",
    "bootstrap": "the bootstrap config",
}


@dataclass(frozen=True)
class _Input:
    """One ``ref``: where it stands, what it must be, and what it turned out to be."""

    kind: str
    path: str
    ref: str
    number: int = 0
    format: DiskFormat | None = None
    #: An open local file, or the blobs that a digest or another artifact gave.
    file: BinaryIO | None = None
    found: tuple[Descriptor, ...] = ()

    @property
    def label(self) -> str:
        return f"{_LABELS[self.kind]} {self.number}" if self.kind == "disk" else _LABELS[self.kind]


class Builder:
    """Builds artifacts into one store."""

    def __init__(self, layout: Layout, connect: resolve.Connect, progress: Progress = NULL) -> None:
        self._layout = layout
        self._connect = connect
        self._progress = progress

    def build(self, path: Path, *, name: str | None = None) -> model.Artifact:
        """Builds the artifact that the manifest file *path* describes, and lets *name* stand for it.

        Local paths count from the manifest's directory.

        Raises:
            FileProblem, JsonInvalid: the manifest file itself cannot be read.
            ManifestInvalid: one or more problems in it, or in the files that it names; all of them are named.
            DiskFull: said before anything is copied.
        """
        reference = None if name is None else Reference.parse(name)
        if reference is not None and reference.digest is not None:
            raise InputError(f"{reference}: a name for a new artifact has no digest", hint="leave out what follows '@'")
        document = read_document(path)
        checked = manifest.check(document, str(path))
        with self._layout.using(), contextlib.ExitStack() as files:
            inputs = self._open_inputs(checked, path.absolute().parent, files)
            self._require_space(inputs)
            parts = [replace(item, found=self._add(item)) for item in inputs]
            artifact = self._compose(document, parts)
            if reference is not None:
                self._layout.set_name(str(reference), artifact.image.descriptor())
        return artifact

    # --- inputs ------------------------------------------------------------------------------------------------

    def _open_inputs(self, checked: manifest.Manifest, directory: Path, files: contextlib.ExitStack) -> list[_Input]:
        problems: list[Problem] = []
        errors: list[OvmsError] = []
        answer: list[_Input] = []
        if checked.kernel is None and not checked.disk_layers:
            nothing = Problem("$", "there is nothing to boot: give a kernel, or a disk layer", "BIN-3")
            raise invalid([nothing], "the manifest")
        for item in _wanted(checked):
            try:
                answer.append(self._open_input(item, directory, files))
            except (InputError, NotFound) as exc:
                problems.append(Problem(item.path, _with_problems(exc)))
                errors.append(exc)
        if len(errors) == 1:
            error = errors[0]
            error.context.setdefault("json_path", problems[0][0])
            _prefix(error, f"{problems[0][0]}: ")
            raise error
        if errors:
            raise ManifestInvalid(
                f"{len(errors)} of the manifest's inputs cannot be used",
                problems=problems,
                hint=next((e.hint for e in errors if e.hint), None),
            )
        if problems := list(_wrong_sizes(checked, answer)):
            raise invalid(problems, "the manifest")
        return answer

    def _open_input(self, item: _Input, directory: Path, files: contextlib.ExitStack) -> _Input:
        if is_digest(item.ref):
            return replace(item, found=(self._check_blob(item, parse_digest(item.ref)),))
        local = directory / item.ref.removeprefix("file:")
        if item.ref.startswith((".", "/", "file:")) or os.path.lexists(local):
            file = files.enter_context(fsutil.open_input(local, item.label, max_size=_SIZE_LIMITS[item.kind]))
            _check_content(item, file.fileno())
            return replace(item, file=file)
        return replace(item, found=self._from_artifact(item, local))

    def _check_blob(self, item: _Input, digest: Digest) -> Descriptor:
        size = self._layout.size(digest)
        if size is None:
            raise NotFound(
                f"{item.label}: the store has no blob {digest}", hint="pull the artifact that holds it first"
            )
        with fsutil.open_input(self._layout.path(digest), item.label, max_size=_SIZE_LIMITS[item.kind]) as file:
            _check_content(item, file.fileno())
            return _descriptor(item, file.fileno(), digest, size)

    def _from_artifact(self, item: _Input, local: Path) -> tuple[Descriptor, ...]:
        try:
            Reference.parse(item.ref)
        except InputError:
            raise FileProblem(
                f"{item.label}: there is no file {local}, and {item.ref[:80]!a} is no reference",
                code="file-missing",
                path=str(local),
            ) from None
        try:
            other = resolve.resolve(self._layout, self._connect, item.ref, progress=self._progress).artifact
        except NotFound as exc:
            raise NotFound(
                f"{item.label}: there is neither a file {local} nor an artifact {item.ref}",
                hint="check the path or the reference",
            ) from exc
        except RegistryError as exc:
            # What was meant may well be a path: "v1.0/disk.img" reads as a reference.
            _prefix(exc, f"{item.label}: there is no file {local}, and as a reference: ")
            raise
        # What is in the store was checked for its digest when it came, and for nothing else.
        return tuple(self._check_blob(part, Digest(part.ref)) for part in _parts_of(other, item))

    # --- copying -----------------------------------------------------------------------------------------------

    def _require_space(self, inputs: list[_Input]) -> None:
        # A file of the size of a blob may be that blob, and need nothing. If it is not, add_file says so in time.
        infos = [os.fstat(item.file.fileno()) for item in inputs if item.file is not None]
        needed = sum(info.st_blocks * 512 for info in infos if not self._may_be_here(info.st_size))
        fsutil.require_space(self._layout.root, needed, "building the artifact")

    def _may_be_here(self, size: int) -> bool:
        with os.scandir(self._layout.blob_dir) as entries:
            return any(entry.stat().st_size == size for entry in entries)

    def _add(self, item: _Input) -> tuple[Descriptor, ...]:
        if item.file is None:
            return item.found
        fd = item.file.fileno()
        with self._progress.task(item.label.removeprefix("the "), os.fstat(fd).st_size) as task:
            digest, _, new = self._layout.add_file(fd, item.label, advance=task.advance)
            if not new:
                task.note("exists already")
        # What was checked was the user's file; what counts is the copy, and somebody may have written meanwhile.
        return (self._check_blob(item, digest),)

    def _compose(self, document: Any, inputs: list[_Input]) -> model.Artifact:
        final = copy.deepcopy(document)
        by_kind = {kind: [d for i in inputs if i.kind == kind for d in i.found] for kind in _LABELS}
        for item in inputs:
            if item.kind != "disk":
                key = {"ram": "ramSnapshot"}.get(item.kind, item.kind)
                final[key]["ref"] = item.found[0].digest
        if "diskLayers" in final:
            final["diskLayers"] = list(_disk_entries(document["diskLayers"], inputs))
        disks = tuple(
            replace(d, annotations={**d.annotations, mediatypes.TITLE_ANNOTATION: _disk_title(d, i)})
            for i, d in enumerate(by_kind["disk"])
        )
        parts = model.Parts(
            kernel=next(iter(by_kind["kernel"]), None),
            initrd=next(iter(by_kind["initrd"]), None),
            disks=disks,
            ram_snapshot=next(iter(by_kind["ram"]), None),
            bootstrap=next(iter(by_kind["bootstrap"]), None),
        )
        return model.compose(self._layout, final, parts)


def _wanted(checked: manifest.Manifest) -> Iterator[_Input]:
    if checked.kernel is not None:
        yield _Input("kernel", "$.kernel.ref", checked.kernel.ref)
    if checked.initrd is not None:
        yield _Input("initrd", "$.initrd.ref", checked.initrd.ref)
    for i, layer in enumerate(checked.disk_layers):
        yield _Input("disk", f"$.diskLayers[{i}].ref", layer.ref, i, layer.format)
    if checked.ram_snapshot is not None:
        yield _Input("ram", "$.ramSnapshot.ref", checked.ram_snapshot.ref)
    if checked.bootstrap is not None:
        yield _Input("bootstrap", "$.bootstrap.ref", checked.bootstrap.ref)


def _prefix(error: OvmsError, text: str) -> None:
    error.message = text + error.message
    error.args = (error.message,)


def _with_problems(error: OvmsError) -> str:
    if not isinstance(error, ManifestInvalid):  # of a bootstrap config
        return error.message
    return f"{error.message}: {'; '.join(f'{p.path} {p.message}' for p in error.problems)}"


def _wrong_sizes(checked: manifest.Manifest, inputs: list[_Input]) -> Iterator[Problem]:
    for item in inputs:
        if item.kind != "disk" or (said := checked.disk_layers[item.number].size) is None:
            continue
        size = os.fstat(item.file.fileno()).st_size if item.file else sum(d.size for d in item.found)
        if size != said:
            path = item.path.removesuffix(".ref") + ".size"
            yield Problem(path, f"says {said} bytes, but the layer has {size}", "MAN-14")


def _check_content(item: _Input, fd: int) -> None:
    if item.kind == "kernel":
        check_kernel(fd, item.label)
    elif item.kind == "disk":
        assert item.format is not None
        check_layer(fd, item.format, item.label)
    elif item.kind == "ram":
        prefix = ramsnap.parse_prefix(os.pread(fd, ramsnap.PREFIX_SIZE, 0))
        ramsnap.parse_control(os.pread(fd, prefix.data_offset, 0))
        size = os.fstat(fd).st_size
        if size != prefix.blob_size:
            raise SnapshotInvalid(f"{item.label} has {size} bytes, but should have {prefix.blob_size}")
    elif item.kind == "bootstrap":
        bootstrap.parse(os.pread(fd, limits.BOOTSTRAP_MAX, 0))


def _descriptor(item: _Input, fd: int, digest: Digest, size: int) -> Descriptor:
    annotations: dict[str, str] = {}
    if item.kind == "ram":
        annotations = ram_annotations(fd)
    return model.part_descriptor(
        item.kind, digest, size, format=item.format, number=item.number, annotations=annotations
    )


def ram_annotations(fd: int) -> dict[str, str]:
    """What the descriptor of a RAM snapshot says of its control part, so that it can be fetched by itself."""
    prefix = ramsnap.parse_prefix(os.pread(fd, ramsnap.PREFIX_SIZE, 0))
    from ovms.spec.digest import of_bytes

    return {
        mediatypes.RAM_CONTROL_ANNOTATION: of_bytes(os.pread(fd, prefix.data_offset, 0)),
        mediatypes.RAM_CONTROL_SIZE_ANNOTATION: str(prefix.data_offset),
    }


def _parts_of(other: model.Artifact, item: _Input) -> list[_Input]:
    """The part of another artifact that stands where *item* does; for a disk layer, that artifact's whole chain."""
    have = other.manifest
    refs = {
        "kernel": [have.kernel.ref] if have.kernel else [],
        "initrd": [have.initrd.ref] if have.initrd else [],
        "disk": [layer.ref for layer in have.disk_layers],
        "ram": [have.ram_snapshot.ref] if have.ram_snapshot else [],
        "bootstrap": [have.bootstrap.ref] if have.bootstrap else [],
    }[item.kind]
    if not refs:
        raise InputError(f"{item.label}: the artifact {item.ref} has none")
    if item.kind == "disk" and item.number > 0:
        raise InputError(
            f"{item.label}: {item.ref} is a whole artifact, which can only be the base",
            hint="put it first, or name one of its layers by digest",
        )
    if item.kind == "disk":
        return [replace(item, ref=layer.ref, format=layer.format) for layer in have.disk_layers]
    return [replace(item, ref=ref) for ref in refs]


def _disk_title(descriptor: Descriptor, number: int) -> str:
    return f"disk-{number}.{descriptor.annotations.get(mediatypes.DISK_FORMAT_ANNOTATION, 'img')}"


def _disk_entries(said: list[dict[str, Any]], inputs: list[_Input]) -> Iterator[dict[str, Any]]:
    for item in (i for i in inputs if i.kind == "disk"):
        for descriptor in item.found:
            # A layer of another artifact keeps its own format; for a file it is what the manifest said.
            format = descriptor.annotations.get(mediatypes.DISK_FORMAT_ANNOTATION, str(item.format))
            yield {**said[item.number], "ref": descriptor.digest, "format": format, "size": descriptor.size}
