"""qcow2 headers made by hand: sound ones, and hostile ones with what each of them tries.

Source: ``docs/interop/qcow2.txt`` of QEMU, written down here independently of ``ovms.disk.qcow2``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

CLUSTER: Final = 65536
SIZE: Final = 1 << 30

#: Offset and form of every number in the header.
FIELDS: Final = {
    "version": (4, ">I"),
    "backing_offset": (8, ">Q"),
    "backing_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "encryption": (32, ">I"),
    "l1_entries": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "refcount_offset": (48, ">Q"),
    "refcount_clusters": (56, ">I"),
    "snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
}
_PLAIN: Final = {
    "version": 3,
    "cluster_bits": 16,
    "size": SIZE,
    "l1_entries": 2,
    "l1_offset": 3 * CLUSTER,
    "refcount_offset": CLUSTER,
    "refcount_clusters": 1,
    "refcount_order": 4,
    "header_length": 104,
}


def image(
    *, extensions: tuple[tuple[int, bytes], ...] = (), text: tuple[int, bytes] = (0, b""), **fields: int
) -> bytes:
    """An empty image of four clusters; *fields* change the header, *text* puts bytes at an offset."""
    data = bytearray(4 * CLUSTER)
    data[:4] = b"QFI\xfb"
    values = {**_PLAIN, **fields}
    for name, value in values.items():
        offset, form = FIELDS[name]
        if values["version"] == 3 or offset < 72:
            struct.pack_into(form, data, offset, value)
    at = values["header_length"] if values["version"] == 3 else 72
    for kind, content in extensions:
        data[at : at + 8] = struct.pack(">II", kind, len(content))
        data[at + 8 : at + 8 + len(content)] = content
        at += 8 + -(-len(content) // 8) * 8
    data[text[0] : text[0] + len(text[1])] = text[1]
    struct.pack_into(">Q", data, CLUSTER, 2 * CLUSTER)
    struct.pack_into(">4H", data, 2 * CLUSTER, 1, 1, 1, 1)
    return bytes(data)


@dataclass(frozen=True)
class Hostile:
    """A header, and words of the error that refuses it."""

    data: bytes
    words: str


_SECRET: Final = b"/etc/shadow"
_DATA_FILE: Final = 0x44415441

HOSTILE: Final = {
    # reads any file of the host as the disk below this one
    "backing file": Hostile(
        image(backing_offset=4096, backing_size=len(_SECRET), text=(4096, _SECRET)), r"backing file \('/etc/shadow'\)"
    ),
    # the same, in the older header
    "backing file, version 2": Hostile(
        image(version=2, backing_offset=4096, backing_size=len(_SECRET), text=(4096, _SECRET)), "backing file"
    ),
    # a name that would write to the terminal
    "backing file with control characters": Hostile(
        image(backing_offset=4096, backing_size=9, text=(4096, b"\x1b[2J\n\xff\0ab")), r"backing file \('\\x1b\[2J"
    ),
    # a name outside of the file, or where no file can reach
    "backing file far away": Hostile(image(backing_offset=2**63, backing_size=1023), "backing file"),
    "backing file without a size": Hostile(image(backing_offset=4096), "backing file"),
    "backing file without a place": Hostile(image(backing_size=5), "backing file"),
    # a network address that QEMU would connect to
    "backing file on the network": Hostile(
        image(backing_offset=4096, backing_size=20, text=(4096, b"nbd://169.254.169.254")), "nbd://169"
    ),
    # reads and writes any file of the host as this image's own clusters; no command line forbids it
    "data file": Hostile(image(incompatible=4, extensions=((_DATA_FILE, _SECRET),)), "uses an external data file"),
    # the extension alone: an implementation may believe it without the bit
    "data file without its feature bit": Hostile(
        image(extensions=((_DATA_FILE, _SECRET),)), "names an external data file"
    ),
    "data file behind other extensions": Hostile(
        image(extensions=((0x6803F857, bytes(48)), (1, b"x"), (_DATA_FILE, _SECRET))), "names an external data file"
    ),
    "data file in a version 2 header": Hostile(
        image(version=2, extensions=((_DATA_FILE, _SECRET),)), "names an external data file"
    ),
    "data file at the end of a long header": Hostile(
        image(header_length=4096, extensions=((_DATA_FILE, _SECRET),)), "names an external data file"
    ),
    # waits for a key that nobody gives, or holds a host's secrets
    "AES": Hostile(image(encryption=1), "is encrypted"),
    "LUKS": Hostile(image(encryption=2), "is encrypted"),
    "encryption header alone": Hostile(image(extensions=((0x0537BE77, bytes(16)),)), "is encrypted"),
    # content that no reader of the chain looks at
    "internal snapshots": Hostile(image(snapshots=1, snapshots_offset=CLUSTER), "1 internal snapshots"),
    "bitmaps": Hostile(image(extensions=((0x23852875, bytes(24)),)), "persistent bitmaps"),
    # makes QEMU write to it before use
    "dirty": Hostile(image(incompatible=1), "dirty"),
    "corrupt": Hostile(image(incompatible=2), "corrupt"),
    # asks for code that does not exist
    "an unknown feature": Hostile(image(incompatible=1 << 5), "unknown feature 5"),
    "the last feature": Hostile(image(incompatible=1 << 63), "unknown feature 63"),
    "version 1": Hostile(image(version=1), "version 1 is not supported"),
    "version 4": Hostile(image(version=4), "version 4 is not supported"),
    # takes memory: an L1 table of 16 GiB, a refcount table of 256 TiB, clusters of 4 GiB
    "a huge L1 table": Hostile(image(l1_entries=2**31), "L1 entries do not fit"),
    "a huge refcount table": Hostile(image(refcount_clusters=2**32 - 1), "refcount table"),
    "huge clusters": Hostile(image(cluster_bits=32), r"clusters of 2\^32 bytes"),
    "tiny clusters": Hostile(image(cluster_bits=0), r"clusters of 2\^0 bytes"),
    "a huge disk": Hostile(image(size=2**63, l1_entries=2**22), "out of range"),
    "no disk at all": Hostile(image(size=0), "a disk of 0 bytes"),
    "wide refcounts": Hostile(image(refcount_order=7), "refcounts"),
    # tables over the header, outside of the file, between clusters
    "too few L1 entries": Hostile(image(l1_entries=1), "L1 entries do not fit"),
    "an L1 table in the header": Hostile(image(l1_offset=0), "L1 table at offset 0"),
    "an L1 table beyond the end": Hostile(image(l1_offset=4 * CLUSTER), "L1 table"),
    "an L1 table far away": Hostile(image(l1_offset=2**64 - CLUSTER), "L1 table"),
    "an L1 table across clusters": Hostile(image(l1_offset=CLUSTER + 8), "L1 table"),
    "a refcount table beyond the end": Hostile(image(refcount_offset=8 * CLUSTER), "refcount table"),
    "no refcount table": Hostile(image(refcount_clusters=0), "refcount table"),
    # hides extensions from a reader that believes the length
    "a short header": Hostile(image(header_length=72), "header of 72 bytes"),
    "a crooked header": Hostile(image(header_length=105), "header of 105 bytes"),
    "a long header": Hostile(image(header_length=1 << 20, text=(200, b"x")), "header of 1048576 bytes"),
    "a header longer than its cluster": Hostile(
        image(cluster_bits=9, header_length=4096, size=1 << 20, l1_entries=32), "header of 4096 bytes"
    ),
    "an extension without an end": Hostile(image(text=(104, struct.pack(">II", 1, 2**32 - 1))), "beyond the first"),
    "a hundred extensions": Hostile(image(extensions=((1, b""),) * 100), "more than 64 header extensions"),
    # not what it says
    "compression of a kind that does not exist": Hostile(
        image(incompatible=8, header_length=112, text=(104, b"\x07")), "compression type 7"
    ),
    "zstd without a compression type": Hostile(image(incompatible=8), "compression type 0"),
    # an entry of twice the size covers half of the disk
    "too few L1 entries for extended L2 entries": Hostile(image(incompatible=16), "L1 entries do not fit"),
    "a compression type without its feature bit": Hostile(
        image(header_length=112, text=(104, b"\x01")), "compression type 1"
    ),
}
