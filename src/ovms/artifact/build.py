"""``ovm build``: from a manifest that names local files, digests or registry references to an artifact in the store.

Every input is checked before anything is copied, and every problem is named with its JSON path.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ovms import fsutil
from ovms.artifact import model, resolve
from ovms.artifact.document import read_document
from ovms.artifact.parts import SIZE_LIMITS, check_content, label, ram_annotations, ram_encrypted, read_control
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
from ovms.lazy import dataclass, replace
from ovms.oci import transport
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.progress import NULL, Progress
from ovms.spec import manifest, mediatypes, ramheader, ramsnap
from ovms.spec.digest import Digest, is_digest, parse_digest
from ovms.spec.document import invalid
from ovms.spec.manifest import Compression, Part, PartKind


@dataclass(frozen=True)
class _Input:
    """One ``ref``, and what it turned out to be."""

    part: Part
    compression: Compression = Compression.LZ4
    #: An open local file, or the blobs that a digest or another artifact gave.
    file: BinaryIO | None = None
    found: tuple[Descriptor, ...] = ()

    @property
    def label(self) -> str:
        return label(self.part)


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
        reference = None if name is None else transport.new_name(name)
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
        compression = checked.ram_snapshot.compression if checked.ram_snapshot else Compression.LZ4
        for item in (_Input(part, compression) for part in checked.parts()):
            try:
                answer.append(self._open_input(item, directory, files))
            except (InputError, NotFound) as exc:
                problems.append(Problem(item.part.path, _with_problems(exc)))
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
        if problems := list(_wrong_sizes(answer)):
            raise invalid(problems, "the manifest")
        return answer

    def _open_input(self, item: _Input, directory: Path, files: contextlib.ExitStack) -> _Input:
        if is_digest(item.part.ref):
            return replace(item, found=(self._check_blob(item, parse_digest(item.part.ref)),))
        local = directory / item.part.ref.removeprefix("file:")
        if item.part.ref.startswith((".", "/", "file:")) or os.path.lexists(local):
            file = files.enter_context(fsutil.open_input(local, item.label, max_size=SIZE_LIMITS[item.part.kind]))
            check_content(item.part, file.fileno(), item.compression)
            return replace(item, file=file)
        return replace(item, found=self._from_artifact(item, local, directory))

    def _check_blob(self, item: _Input, digest: Digest) -> Descriptor:
        size = self._layout.size(digest)
        if size is None:
            raise NotFound(
                f"{item.label}: the store has no blob {digest}", hint="pull the artifact that holds it first"
            )
        with fsutil.open_input(self._layout.path(digest), item.label, max_size=SIZE_LIMITS[item.part.kind]) as file:
            check_content(item.part, file.fileno(), item.compression)
            return _descriptor(item, file.fileno(), digest, size)

    def _from_artifact(self, item: _Input, local: Path, directory: Path) -> tuple[Descriptor, ...]:
        try:
            place = transport.parse_place(item.part.ref)
            if place is None:
                Reference.parse(item.part.ref)
        except InputError:
            raise FileProblem(
                f"{item.label}: there is no file {local}, and {item.part.ref[:80]!a} is no reference",
                code="file-missing",
                path=str(local),
            ) from None
        try:
            whole = item.part.ref if place is None else place.below(directory)
            other = resolve.resolve(self._layout, self._connect, whole, progress=self._progress).artifact
        except NotFound as exc:
            raise NotFound(
                f"{item.label}: there is neither a file {local} nor an artifact {item.part.ref}",
                hint="check the path or the reference",
            ) from exc
        except RegistryError as exc:
            # What was meant may well be a path: "v1.0/disk.img" reads as a reference.
            _prefix(exc, f"{item.label}: there is no file {local}, and as a reference: ")
            raise
        # What is in the store was checked for its digest when it came, and for nothing else.
        return tuple(self._check_blob(part, Digest(part.part.ref)) for part in _parts_of(other, item))

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
        by_kind = {kind: [d for i in inputs if i.part.kind is kind for d in i.found] for kind in PartKind}
        for kind in (PartKind.KERNEL, PartKind.INITRD, PartKind.BOOTSTRAP):
            if by_kind[kind]:
                final[str(kind)]["ref"] = by_kind[kind][0].digest
        if "diskLayers" in final:
            final["diskLayers"] = list(_disk_entries(document["diskLayers"], inputs))
        rams = [_titled(d, f"ram-{i}.ovmr") for i, d in enumerate(by_kind[PartKind.RAM])]
        if rams:
            self._check_chain(rams)
            if rams[-1].media_type.startswith(mediatypes.RAM_SNAPSHOT_ZSTD):  # what another artifact has, this one has
                final["ramSnapshot"].setdefault("compression", str(Compression.ZSTD))
            final["ramSnapshot"]["ref"] = rams[-1].digest
            if len(rams) > 1:
                final["ramSnapshot"]["parents"] = [ram.digest for ram in rams[:-1]]
        parts = model.Parts(
            kernel=next(iter(by_kind[PartKind.KERNEL]), None),
            initrd=next(iter(by_kind[PartKind.INITRD]), None),
            disks=tuple(_titled(d, f"disk-{i}.{_format_of(d)}") for i, d in enumerate(by_kind[PartKind.DISK])),
            ram_snapshots=tuple(rams),
            bootstrap=next(iter(by_kind[PartKind.BOOTSTRAP]), None),
        )
        return model.compose(self._layout, final, parts)

    def _check_chain(self, rams: list[Descriptor]) -> None:
        chain = []
        for ram in rams:
            with fsutil.open_input(self._layout.path(Digest(ram.digest)), "the RAM snapshot") as blob:
                chain.append((ram.digest, ramsnap.parse_head(read_control(blob.fileno(), "the RAM snapshot"))[1]))
        try:
            ramheader.check_chain(chain)
        except SnapshotInvalid as exc:
            exc.hint = exc.hint or "$.ramSnapshot.parents names all ancestors of $.ramSnapshot.ref, base first"
            raise


def _prefix(error: OvmsError, text: str) -> None:
    error.message = text + error.message
    error.args = (error.message,)


def _with_problems(error: OvmsError) -> str:
    if not isinstance(error, ManifestInvalid):  # of a bootstrap config
        return error.message
    return f"{error.message}: {'; '.join(f'{p.path} {p.message}' for p in error.problems)}"


def _wrong_sizes(inputs: list[_Input]) -> Iterator[Problem]:
    for item in inputs:
        if (said := item.part.size) is None:
            continue
        size = os.fstat(item.file.fileno()).st_size if item.file else sum(d.size for d in item.found)
        if size != said:
            path = item.part.path.removesuffix(".ref") + ".size"
            yield Problem(path, f"says {said} bytes, but the layer has {size}", "MAN-14")


def _descriptor(item: _Input, fd: int, digest: Digest, size: int) -> Descriptor:
    part = item.part
    return model.part_descriptor(
        part.kind,
        digest,
        size,
        format=part.format,
        compression=item.compression,
        encrypted=part.kind is PartKind.RAM and ram_encrypted(fd),
        number=part.number,
        annotations=ram_annotations(fd) if part.kind is PartKind.RAM else None,
    )


def _parts_of(other: model.Artifact, item: _Input) -> list[_Input]:
    """The part of another artifact that stands where *item* does; for disks and RAM snapshots, the whole chain."""
    wanted = item.part
    have = [part for part in other.manifest.parts() if part.kind is wanted.kind]
    if not have:
        raise InputError(f"{item.label}: the artifact {wanted.ref} has none")
    if wanted.number > 0:
        raise InputError(
            f"{item.label}: {wanted.ref} is a whole artifact, which can only be the base",
            hint="put it first, or name one of its layers by digest",
        )
    ram = other.manifest.ram_snapshot
    compression = item.compression if ram is None else ram.compression
    return [
        replace(item, part=replace(wanted, ref=part.ref, format=part.format), compression=compression) for part in have
    ]


def _titled(descriptor: Descriptor, title: str) -> Descriptor:
    return replace(descriptor, annotations={**descriptor.annotations, mediatypes.TITLE_ANNOTATION: title})


def _format_of(descriptor: Descriptor) -> str:
    return descriptor.annotations[mediatypes.DISK_FORMAT_ANNOTATION]


def _disk_entries(said: list[dict[str, Any]], inputs: list[_Input]) -> Iterator[dict[str, Any]]:
    for item in (i for i in inputs if i.part.kind is PartKind.DISK):
        for descriptor in item.found:
            # A layer of another artifact keeps its own format; for a file it is what the manifest said.
            yield {
                **said[item.part.number],
                "ref": descriptor.digest,
                "format": _format_of(descriptor),
                "size": descriptor.size,
            }
