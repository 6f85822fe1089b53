"""``ovm validate``: everything that is wrong with a file or an artifact, by the rules of the specification.

Unlike what reads for use, this goes on after the first error, and looks at every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final

from ovms import fsutil
from ovms.artifact import model, ram
from ovms.artifact.document import read_bytes, read_document
from ovms.artifact.parts import SIZE_LIMITS, check_content, check_encrypted, label, read_control
from ovms.disk.layers import check_layer
from ovms.errors import (
    DigestMismatch,
    FileProblem,
    InputError,
    IntegrityError,
    JsonInvalid,
    ManifestInvalid,
    NotFound,
    OvmsError,
    RegistryProtocol,
    SnapshotInvalid,
    UsageError,
)
from ovms.lazy import dataclass, field
from ovms.oci import absent
from ovms.oci.descriptor import Descriptor, ImageIndex
from ovms.oci.layout import Layout
from ovms.progress import NULL, Progress
from ovms.spec import bootstrap, limits, manifest, mediatypes, ramheader, ramsnap
from ovms.spec.digest import Digest, from_hasher, is_digest, of_bytes
from ovms.spec.manifest import Compression, DiskFormat, Manifest, Part, PartKind


class Kind(StrEnum):
    """What a file can be validated as."""

    MANIFEST = "manifest"
    BOOTSTRAP = "bootstrap"
    RAM_SNAPSHOT = "ramsnap"
    QCOW2 = "qcow2"
    RAW = "raw"
    KERNEL = "kernel"


#: What an empty file of a kind breaks. (A document is no JSON then, which its reader says.)
_EMPTY: Final = {Kind.RAM_SNAPSHOT: "RAM-1", Kind.QCOW2: "LAY-8", Kind.RAW: "LAY-6", Kind.KERNEL: "BIN-1"}


@dataclass(frozen=True)
class Problem:
    """One break of the specification. ``path`` is a JSON path, ``offset`` counts bytes; ``part`` is a part's name."""

    code: str
    message: str
    rule: str | None = None
    part: str | None = None
    path: str | None = None
    offset: int | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are known."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass()
class Report:
    """What was looked at (``kind`` is one of :class:`Kind`, ``unpacked``, ``artifact`` or ``file``: it can't be told what),
    and what is wrong.
    """

    name: str
    kind: str
    digest: Digest | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def note(self, error: OvmsError, part: str | None = None) -> None:
        """Adds what *error* says; each of its problems by itself where it has several."""
        problems = error.context.get("problems")
        if isinstance(problems, list) and problems:
            self.problems.extend(
                Problem(error.code, problem["message"], problem.get("rule"), part, problem["path"])
                for problem in problems
            )
            return
        rule, offset = error.context.get("rule"), error.context.get("offset")
        if error.code == "file-too-large":
            rule = rule or "LIM-1"
        self.problems.append(Problem(error.code, error.message, rule, part, None, offset, error.hint))

    @contextlib.contextmanager
    def noting(self, part: str | None = None) -> Iterator[None]:
        """Notes what is wrong with the input; faults of the host go through."""
        try:
            yield
        except (InputError, IntegrityError, NotFound, RegistryProtocol) as exc:
            self.note(exc, part)

    def to_json(self) -> dict[str, Any]:
        """As ``ovm validate --json`` prints it."""
        digest = {} if self.digest is None else {"digest": self.digest}
        problems = [problem.to_json() for problem in self.problems]
        return {"name": self.name, "kind": self.kind, **digest, "valid": self.valid, "problems": problems}


# --- files -------------------------------------------------------------------------------------------------------------


def validate_path(path: Path, kind: Kind | None = None, progress: Progress = NULL) -> Report:
    """Validates a file, or the directory of an unpacked artifact. *kind* None: found out from the content.

    Raises:
        FileProblem: it can't be read at all.
        UsageError: what it is can't be told.
    """
    if os.path.isdir(path):  # noqa: PTH112 - a name that no file can have is no directory
        return _validate_unpacked(path, progress)
    report = Report(str(path), "file" if kind is None else kind)
    try:
        if kind is None:
            report.kind = kind = _guess(path)
        return _validate_file(path, kind, report, progress)
    except FileProblem as exc:
        if exc.code not in ("file-empty", "file-too-large"):
            raise
        if exc.code == "file-empty" and kind in _EMPTY:
            exc.context["rule"] = _EMPTY[kind]
        report.note(exc)  # it is there, and it is what is wrong
        return report


def _validate_file(path: Path, kind: Kind, report: Report, progress: Progress) -> Report:
    if kind in (Kind.MANIFEST, Kind.BOOTSTRAP):
        try:
            _check_document(path, kind)
        except (ManifestInvalid, JsonInvalid) as exc:
            report.note(exc)
        return report
    part = _part_of(kind)
    with fsutil.open_input(path, f"the {kind} file", max_size=SIZE_LIMITS[part.kind]) as file, report.noting():
        if kind is Kind.RAM_SNAPSHOT:
            _check_ram(file, report, None, None, progress)
        else:
            check_content(part, file.fileno(), Compression.LZ4)
    return report


def _check_document(path: Path, kind: Kind) -> None:
    if kind is Kind.BOOTSTRAP:
        bootstrap.parse(read_bytes(path, "the bootstrap config", limits.BOOTSTRAP_MAX), str(path))
    else:
        manifest.check(read_document(path), str(path))


def _part_of(kind: Kind) -> Part:
    format = {Kind.QCOW2: DiskFormat.QCOW2, Kind.RAW: DiskFormat.RAW}.get(kind)
    part = {Kind.RAM_SNAPSHOT: PartKind.RAM, Kind.KERNEL: PartKind.KERNEL}.get(kind, PartKind.DISK)
    return Part(part, "$", "", format=format)


_DOCUMENTS: Final = (".json", ".yaml", ".yml")
#: Keys that make a JSON object a bootstrap config when it says nothing of its type.
_BOOTSTRAP_KEYS: Final = bootstrap.FIELDS


def _guess(path: Path) -> Kind:
    if path.suffix in _DOCUMENTS and path.is_file() and path.stat().st_size == 0:
        return Kind.MANIFEST
    with fsutil.open_input(path, "the file") as file:
        head = os.pread(file.fileno(), 0x206, 0)
    if head[:8] == ramsnap.MAGIC:
        return Kind.RAM_SNAPSHOT
    if head[:4] == b"QFI\xfb":
        return Kind.QCOW2
    if head[:4] == b"\x7fELF" or head[0x202:0x206] == b"HdrS":
        return Kind.KERNEL
    if path.suffix in _DOCUMENTS or head.lstrip()[:1] == b"{":
        with contextlib.suppress(OvmsError):
            document = read_document(path)
            keys = document.keys() if isinstance(document, dict) else set()
            if _BOOTSTRAP_KEYS & keys and not {"schemaVersion", "mediaType"} & keys:
                return Kind.BOOTSTRAP
        return Kind.MANIFEST
    raise UsageError(f"{path}: what kind of file this is can't be told", hint=f"say it with --type ({', '.join(Kind)})")


# --- artifacts ---------------------------------------------------------------------------------------------------------


def validate_artifact(layout: Layout, name: str, digest: Digest, progress: Progress = NULL) -> Report:
    """Validates the artifact *digest* in the store: both manifests, and every byte of every part."""
    report = Report(name, "artifact", digest)
    with report.noting("the OCI manifest"):
        image = layout.manifest(digest)
        if isinstance(image, ImageIndex):
            image = model.choose(layout, image)
            report.digest = image.digest
        with report.noting("the OCI manifest"):
            model.check_image(image)
        for blob in dict.fromkeys((blob.digest, blob.size) for blob in (image.config, *image.layers)):
            with report.noting("the OCI manifest"):
                model.check_size(layout, *blob)
        where = model.ovms_descriptor(image)
        raw = layout.read(where.digest, "the OVMS manifest", max_size=limits.MANIFEST_MAX)
        with report.noting("the OVMS manifest"):
            checked = manifest.parse(raw)
            with report.noting("the OVMS manifest"):
                model.check_parts(checked, image)
            for layer in image.layers:
                if layer.media_type in mediatypes.RAM_SNAPSHOTS:
                    with report.noting("the RAM snapshot"):
                        _check_media_type(layer, layout.path(layer.digest))
                if mediatypes.RAM_CONTROL_ANNOTATION in layer.annotations:
                    with report.noting("the RAM snapshot"):
                        _check_annotations(layer, layout.path(layer.digest))
            left_out = {blob.digest for blob in ram.left_out(layout, model.Artifact(image, checked))}
            for missing in sorted(left_out):
                report.note(absent.missing(layout, digest, missing, "it can't be validated"), "the RAM snapshot")
            here = {layer.digest for layer in image.layers} - left_out
            _check_parts(
                checked,
                {part.ref: layout.path(Digest(part.ref)) for part in checked.parts() if part.ref in here},
                report,
                progress,
            )
    return report


def _check_media_type(layer: Descriptor, path: Path) -> None:
    if (control := _control_part(path)) is None:
        return
    try:
        _, header = ramsnap.parse_head(control)
    except (SnapshotInvalid, JsonInvalid):
        return  # told there, too
    check_encrypted(header, layer.media_type)


def _control_part(path: Path) -> bytes | None:
    try:
        with path.open("rb") as blob:
            return read_control(blob.fileno(), "the RAM snapshot", whole=False)
    except (OSError, SnapshotInvalid):
        return None  # which is told where the part is looked at


def _check_annotations(layer: Descriptor, path: Path) -> None:
    # A reader that fetches the control part by itself believes them.
    if (control := _control_part(path)) is None:
        return
    said = layer.annotations.get(mediatypes.RAM_CONTROL_SIZE_ANNOTATION)
    if layer.annotations[mediatypes.RAM_CONTROL_ANNOTATION] != of_bytes(control) or said not in (
        None,
        str(len(control)),
    ):
        raise DigestMismatch("the annotations of its layer are not those of its control part", rule="RAM-46")


def _validate_unpacked(directory: Path, progress: Progress) -> Report:
    report = Report(str(directory), "unpacked")
    with report.noting("manifest.json"):
        data = fsutil.read_input(directory / "manifest.json", "manifest.json", max_size=limits.MANIFEST_MAX)
        checked = manifest.parse(data, "manifest.json")
        files = {}
        for part in checked.parts():
            if not is_digest(part.ref):
                text = f"must be a digest in an unpacked artifact, not {part.ref[:80]!a}"
                report.problems.append(Problem("manifest-invalid", text, "OCI-6", "manifest.json", part.path))
            else:
                files[part.ref] = directory / "blobs" / part.ref.replace(":", "-")
        _check_parts(checked, files, report, progress)
    return report


def _check_parts(checked: Manifest, files: dict[str, Path], report: Report, progress: Progress) -> None:
    compression = checked.ram_snapshot.compression if checked.ram_snapshot else Compression.LZ4
    chain: list[tuple[str, ramheader.Header]] = []
    entries: list[int] = []
    disk_size: int | None = None
    for part in checked.parts():
        if part.ref not in files:
            continue
        with (
            report.noting(label(part)),
            fsutil.open_input(files[part.ref], label(part), max_size=SIZE_LIMITS[part.kind]) as file,
        ):
            _check_digest(file, part, progress)
            if part.kind is PartKind.DISK:
                assert part.format is not None
                disk_size = check_layer(file.fileno(), part.format, label(part))
            elif part.kind is PartKind.RAM:
                header, count = _check_ram(file, report, label(part), compression, progress)
                chain.append((part.ref, header))
                entries.append(count)
            else:
                check_content(part, file.fileno(), compression)
    if len(chain) == len(checked.ram_snapshot.parents if checked.ram_snapshot else ()) + 1:
        with report.noting("the RAM snapshot"):
            ramheader.check_chain(chain)
            ramsnap.check_entries(entries)
            ramheader.check_belongs(chain[-1][1], checked, disk_size)


def _check_digest(file: BinaryIO, part: Part, progress: Progress) -> None:
    hasher = hashlib.sha256()
    with progress.task(f"checking {label(part).removeprefix('the ')}", os.fstat(file.fileno()).st_size) as task:
        while data := file.read(fsutil.COPY_BUFFER):
            hasher.update(data)
            task.advance(len(data))
    if from_hasher(hasher) != part.ref:
        raise DigestMismatch(
            f"{label(part)} does not have the digest {part.ref}",
            hint="remove the artifact and pull it again",
            rule="OCI-21",
        )


def _check_ram(
    file: BinaryIO, report: Report, name: str | None, compression: Compression | None, progress: Progress
) -> tuple[ramheader.Header, int]:
    # Every chunk; a damaged one does not hide the next.
    fd = file.fileno()
    control = ramsnap.parse_control(read_control(fd, name or "the RAM snapshot", whole=False))
    prefix = control.prefix
    if (size := os.fstat(fd).st_size) != prefix.blob_size:
        text = f"the blob has {size} bytes, and its prefix says {prefix.blob_size}"
        report.problems.append(Problem("snapshot-invalid", text, "RAM-1", name))
    with report.noting(name):
        if compression is None:  # a file says nothing of its media type: one of them must fit
            used = {chunk.codec & ~ramsnap.ENCRYPTED for chunk in control.chunks}
            compression = Compression.ZSTD if ramsnap.CODEC_LZ4 not in used else Compression.LZ4
        ramsnap.check_codecs(control, compression)
    with progress.task("checking the RAM snapshot", prefix.data_size) as task:
        for chunk in control.chunks:
            if chunk.codec != ramsnap.CODEC_ZERO:
                with report.noting(name):
                    stored = os.pread(fd, chunk.stored_size, prefix.data_offset + chunk.offset)
                    # of what is encrypted, all that can be told without a key
                    look = ramsnap.check_stored if chunk.encrypted else ramsnap.unpack_chunk
                    look(chunk, stored, prefix.data_offset)
            task.advance(chunk.stored_size)
            if len(report.problems) >= limits.PROBLEMS_MAX:
                break
    return control.header, len(control.chunks)
