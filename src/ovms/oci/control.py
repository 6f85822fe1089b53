"""The control part of a RAM snapshot, read by itself from wherever the blob is: what is decided by before the bulk comes.

Source: ``spec/rfc/ramsnap-v1.md``, RAM-46.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ovms.errors import DigestMismatch, SnapshotInvalid
from ovms.oci.descriptor import Descriptor
from ovms.spec import limits, mediatypes, ramsnap
from ovms.spec.digest import of_bytes

#: No control part is larger.
SIZE_MAX: Final = (
    ramsnap.PREFIX_SIZE
    + limits.RAM_HEADER_MAX
    + limits.RAM_STATE_MAX
    + limits.RAM_CHUNKS_MAX * ramsnap.ENTRY_SIZE
    + ramsnap.PAGE
)
#: Bytes of the first read where an annotation says that there are as many: most control parts are no larger.
_FIRST: Final = 256 * limits.KIB

#: Gives *size* bytes of the blob from *offset* on: ``read(offset, size)``.
Read = Callable[[int, int], bytes]


def fetch(blob: Descriptor, read: Read) -> bytes:
    """The control part of *blob*: its bytes up to the data region, none of which is read.

    Its digest and size are compared with the annotations where there are some. That it is one of this blob is known
    only where the digest is among them, or when all of the blob has come.

    Raises:
        DigestMismatch: the annotations are not those of the control part.
        SnapshotInvalid: its prefix is none, or of a blob of another size.
        whatever *read* raises.
    """
    said = _said(blob)
    raw = read(0, min(blob.size, _FIRST, max(said or 0, ramsnap.PREFIX_SIZE)))
    prefix = ramsnap.parse_prefix(raw)
    if said is not None and said != prefix.data_offset:
        raise _mismatch(blob, said, prefix.data_offset)
    if prefix.blob_size != blob.size:
        raise SnapshotInvalid(
            f"the RAM snapshot has {blob.size} bytes, but says that it has {prefix.blob_size}", rule="RAM-1"
        )
    if len(raw) < prefix.data_offset:
        raw += read(len(raw), prefix.data_offset - len(raw))
    raw = raw[: prefix.data_offset]
    promised = blob.annotations.get(mediatypes.RAM_CONTROL_ANNOTATION)
    if promised is not None and promised != of_bytes(raw):
        raise _mismatch(blob, promised, of_bytes(raw))
    return raw


def _said(blob: Descriptor) -> int | None:
    text = blob.annotations.get(mediatypes.RAM_CONTROL_SIZE_ANNOTATION)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= min(SIZE_MAX, blob.size)):
        raise _mismatch(blob, text[:40], "a control part")
    return int(text)


def _mismatch(blob: Descriptor, expected: object, got: object) -> DigestMismatch:
    return DigestMismatch(
        f"the annotations of the RAM snapshot {blob.digest} are not those of its control part",
        hint="the registry is damaged or was tampered with, or the artifact was built wrong: ask its owner",
        expected=expected,
        got=got,
        rule="RAM-46",
    )
