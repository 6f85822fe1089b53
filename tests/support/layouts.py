"""OCI layouts as others make them, in directories and archives, and archives that no honest tool makes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ovms.oci.layout import Layout
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of

MARKER = b'{"imageLayoutVersion":"1.0.0"}'


def index(*entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": entries}).encode()


def entry(layout: Layout, digest: Digest, tag: str | None = None, **more: Any) -> dict[str, Any]:
    """What an index says of a manifest that is in *layout*."""
    annotations = {} if tag is None else {"annotations": {mediatypes.REF_NAME_ANNOTATION: tag}}
    size = layout.size(digest)
    return {"mediaType": mediatypes.OCI_MANIFEST, "digest": digest, "size": size, **annotations, **more}


def files(layout: Layout, *entries: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a layout with everything that the *entries* reach in *layout*."""
    answer = {"oci-layout": MARKER, "index.json": index(*entries)}
    for item in entries:
        for digest in layout.reachable(item["digest"]):
            if layout.size(digest) is not None:
                answer[f"blobs/sha256/{hex_of(digest)}"] = layout.path(digest).read_bytes()
    return answer


def write_directory(path: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive; *fields* are those of :class:`tarfile.TarInfo`."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(
    members: Iterable[tuple[tarfile.TarInfo, bytes]], *, format: Literal[0, 1, 2] = tarfile.PAX_FORMAT
) -> bytes:
    """An archive of these members, with whatever they claim."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in members:
            out.write(info.tobuf(format, "utf-8", "surrogateescape"))
            out.write(data + bytes(-len(data) % 512))
        tar.offset = out.tell()
    return out.getvalue()


def write_archive(path: Path, content: Mapping[str, bytes], *, format: Literal[0, 1, 2] = tarfile.PAX_FORMAT) -> Path:
    path.write_bytes(archive((member(name, data) for name, data in content.items()), format=format))
    return path
