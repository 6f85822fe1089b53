"""An artifact as files in a directory (OCI-24), for people and for tools that know no registries.

::

    DIR/
    ├── manifest.json              the OVMS manifest's bytes
    ├── blobs/sha256-<hex>         the parts
    └── metadata/provenance.json   where it comes from: {"digest", "reference", "statements"}

Every name is one of these or a digest: none comes out of the artifact. What is built of the directory (``ovm build DIR``) has the
digest that was unpacked, where ``ovm build`` made the artifact.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.artifact import model
from ovms.artifact.parts import UNPACKED_MANIFEST, blob_name
from ovms.artifact.resolve import Found
from ovms.errors import FileProblem, OvmsError
from ovms.oci import exporting
from ovms.oci.descriptor import Descriptor, ImageManifest, label
from ovms.oci.layout import Layout
from ovms.oci.referrers import local_lister
from ovms.progress import NULL, Progress
from ovms.spec import limits, mediatypes, strictjson
from ovms.spec.digest import Digest, is_digest

_PROVENANCE: Final = "metadata/provenance.json"
#: Statements that are told of one artifact; which is for people.
_STATEMENTS_MAX: Final = 16


def unpack(layout: Layout, found: Found, directory: Path, progress: Progress = NULL) -> None:
    """Writes an artifact of the store into *directory*, which appears whole or not at all. The caller uses the store.

    Raises:
        FileProblem: there is something of this name that is no empty directory, or nothing can be written there.
        BlobNotFound: the artifact lacks a part.
        StoreCorrupt: a part is not what its digest says.
        DiskFull: said before the first byte is copied, wherever the need is known.
    """
    artifact = found.artifact
    parts = exporting.Parts.of(layout, artifact.digest)
    by_digest = {blob.digest: blob for blob in parts.blobs}
    wanted = tuple(by_digest[Digest(ref)] for ref in dict.fromkeys(part.ref for part in artifact.manifest.parts()))
    _require_free(directory)
    fsutil.require_space(directory.parent, parts.allocated(wanted), f"unpacking into {directory}")
    begun = directory.with_name(f".{directory.name[:200]}.{fsutil.unique(6)}.tmp")
    with exporting.writing(directory):
        begun.mkdir()
        try:
            _write(parts, found, wanted, begun, progress)
            _publish(begun, directory)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise


def _require_free(directory: Path) -> None:
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        if directory.is_symlink() or not directory.parent.is_dir():
            raise FileProblem(f"there is no directory {directory.parent}", code="file-missing") from None
        return
    except (OSError, ValueError):
        raise _taken(directory, "is no directory that can be read") from None
    if directory.is_symlink():
        raise _taken(directory, "is a symbolic link")
    if entries:
        raise _taken(directory, "is not empty")


def _taken(directory: Path, why: str) -> FileProblem:
    return FileProblem(f"{str(directory)!a} {why}", hint="name a directory that is not there yet", path=str(directory))


def _write(
    parts: exporting.Parts, found: Found, wanted: tuple[Descriptor, ...], directory: Path, progress: Progress
) -> None:
    layout, artifact = parts.layout, found.artifact
    (directory / "blobs").mkdir()
    for blob in wanted:
        with (
            (directory / blob_name(blob.digest)).open("xb", buffering=0) as file,
            progress.task(label(blob), blob.size) as task,
        ):
            parts.copy(blob, file.fileno(), 0, task.advance)
            os.ftruncate(file.fileno(), blob.size)  # where it ends with a hole
            os.fsync(file.fileno())
    where = model.ovms_descriptor(artifact.image).digest
    raw = layout.read(where, "the OVMS manifest", max_size=limits.MANIFEST_MAX)
    fsutil.write_new(directory / UNPACKED_MANIFEST, raw, "the manifest")
    if not is_digest(found.name):
        (directory / _PROVENANCE).parent.mkdir()
        statements = _statements(layout, artifact.digest)
        document = {
            "digest": artifact.digest,
            "reference": found.name,
            **({"statements": statements} if statements else {}),
        }
        fsutil.write_new(directory / _PROVENANCE, strictjson.canonical(document), "the provenance")
    fsutil.fsync_dir(directory / "blobs")


def _statements(layout: Layout, digest: Digest) -> list[Any]:
    answer = []
    for referrer in local_lister(layout)(digest, mediatypes.IN_TOTO).descriptors[:_STATEMENTS_MAX]:
        try:
            image = layout.manifest(referrer.digest)
            if not isinstance(image, ImageManifest):
                continue
            data = layout.read(image.layers[0].digest, "a statement", max_size=limits.MANIFEST_MAX)
            answer.append(strictjson.parse(data, "a statement", max_size=limits.MANIFEST_MAX))
        except (OvmsError, IndexError):
            continue  # it is for people: what is damaged is left out
    return answer


def _publish(begun: Path, directory: Path) -> None:
    try:
        begun.rename(directory)  # takes the place of an empty directory, and of nothing else
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(directory, "is there by now") from None
        raise
    fsutil.fsync_dir(directory.parent)
