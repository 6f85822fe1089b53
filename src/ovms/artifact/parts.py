"""What a file must be to be a part of an artifact: checked when it is built, validated, and run."""

from __future__ import annotations

import os
from typing import Final

from ovms.artifact.kernels import check_kernel
from ovms.disk.layers import check_layer
from ovms.errors import SnapshotInvalid
from ovms.spec import bootstrap, limits, mediatypes, ramsnap
from ovms.spec.digest import of_bytes
from ovms.spec.manifest import Compression, Part, PartKind
from ovms.spec.ramheader import Header

#: The most bytes that a part of a kind may have.
SIZE_LIMITS: Final = {
    PartKind.KERNEL: limits.KERNEL_MAX,
    PartKind.INITRD: limits.INITRD_MAX,
    PartKind.DISK: limits.DISK_LAYER_MAX,
    PartKind.RAM: 2 * limits.RAM_MAX,
    PartKind.BOOTSTRAP: limits.BOOTSTRAP_MAX,
}


def label(part: Part) -> str:
    """What a part is called in messages."""
    names = {
        PartKind.KERNEL: "the kernel",
        PartKind.INITRD: "the initrd",
        PartKind.DISK: f"disk layer {part.number}",
        # a diff's ancestors by their number, base first
        PartKind.RAM: "the RAM snapshot" if part.path.endswith(".ref") else f"RAM snapshot {part.number}",
        PartKind.BOOTSTRAP: "the bootstrap config",
    }
    return names[part.kind]


def check_content(part: Part, fd: int, compression: Compression) -> None:
    """Whether the open file is what a part of its kind must be. *compression* is that of a RAM snapshot.

    Raises:
        KernelInvalid, DiskInvalid, SnapshotInvalid, ManifestInvalid, JsonInvalid: it is not.
        Unsupported: a disk format that no runtime takes.
    """
    what = label(part)
    if part.kind is PartKind.KERNEL:
        check_kernel(fd, what)
    elif part.kind is PartKind.DISK:
        assert part.format is not None
        check_layer(fd, part.format, what)
    elif part.kind is PartKind.RAM:
        ramsnap.check_codecs(ramsnap.parse_control(read_control(fd, what)), compression)
    elif part.kind is PartKind.BOOTSTRAP:
        bootstrap.parse(os.pread(fd, limits.BOOTSTRAP_MAX, 0))


def read_control(fd: int, what: str, *, whole: bool = True) -> bytes:
    """The control part of an open RAM snapshot; nothing is allocated that the file does not hold.

    Raises:
        SnapshotInvalid: the prefix is wrong, or (without *whole*: only where the control part is cut short) the file
            has another size than it says.
    """
    prefix = ramsnap.parse_prefix(os.pread(fd, ramsnap.PREFIX_SIZE, 0))
    size = os.fstat(fd).st_size
    if size < prefix.data_offset or (whole and size != prefix.blob_size):
        raise SnapshotInvalid(
            f"{what} has {size} bytes, and its prefix says {prefix.blob_size}", rule="RAM-1", offset=size
        )
    return os.pread(fd, prefix.data_offset, 0)


def ram_encrypted(fd: int) -> bool:
    """Whether an open RAM snapshot is encrypted: what its layer's media type has to say, too."""
    _, header = ramsnap.parse_head(read_control(fd, "the RAM snapshot"))
    return header.encryption is not None


def check_encrypted(header: Header, media_type: str) -> None:
    """Whether the media type of a RAM snapshot's layer says of its encryption what its *header* does.

    Raises:
        SnapshotInvalid: it does not.
    """
    if (header.encryption is not None) != media_type.endswith(mediatypes.RAM_ENCRYPTED_SUFFIX):
        text = "is encrypted" if header.encryption is not None else "is not encrypted"
        raise SnapshotInvalid(f"the RAM snapshot {text}, and its layer's media type says otherwise", rule="RAM-57")


def ram_annotations(fd: int) -> dict[str, str]:
    """What the descriptor of a RAM snapshot says of its control part, so that it can be fetched by itself."""
    control = read_control(fd, "the RAM snapshot")
    return {
        mediatypes.RAM_CONTROL_ANNOTATION: of_bytes(control),
        mediatypes.RAM_CONTROL_SIZE_ANNOTATION: str(len(control)),
    }
