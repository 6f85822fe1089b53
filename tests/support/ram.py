"""RAM snapshots, small and right unless a test breaks them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from ovms.spec import limits, ramsnap
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Device, Header

DIGEST: Final = "sha256:" + "a" * 64

HEADER: Final = Header(
    created="2026-11-24T10:00:00Z",
    source=DIGEST,
    vmm="qemu",
    vmm_version="7.2.22",
    state_format="qemu-migration-3",
    machine_type="pc-i440fx-7.2",
    accel="tcg",
    cpu_model="max",
    cpu_flags=(),
    vcpus=1,
    memory=limits.RAM_MIN,
    devices=(
        Device("serial"),
        Device("vmgenid"),
        Device("virtio-rng"),
        Device("virtio-net", mac="52:54:00:12:34:56", backend="user"),
        Device("virtio-blk", size=1 << 20),
    ),
    kernel="sha256:" + "b" * 64,
    initrd=None,
    kernel_args="console=ttyS0",
    disks=("sha256:" + "c" * 64,),
)


def header(**changes: Any) -> Header:
    """:data:`HEADER` with fields changed."""
    return replace(HEADER, **changes)


def blob(
    pages: dict[int, bytes],
    header: Header = HEADER,
    *,
    state: bytes = b"state",
    chunk_pages: int = 2,
    compression: Compression = Compression.LZ4,
    cipher: Cipher | None = None,
) -> bytes:
    """A whole snapshot: *pages* are whole pages by the number of the first; ``b""`` is one page that is zero now.

    With *cipher* it is encrypted, which *header* has to say.
    """
    chunks: list[ramsnap.Chunk] = []
    data = b""
    for page, content in sorted(pages.items()):
        if content and cipher is not None:
            codec, stored, digest = ramsnap.encrypt(page, content, compression, cipher)
        elif content:
            codec, stored, digest = ramsnap.compress(content, compression)
        else:
            codec, stored, digest = ramsnap.CODEC_ZERO, b"", bytes(32)
        count = len(content) // ramsnap.PAGE or 1
        chunks.append(ramsnap.Chunk(page, count, len(data), len(stored), codec, digest))
        data += bytes(stored)
    return ramsnap.build_control(header, state, chunks, chunk_pages=chunk_pages, cipher=cipher) + data
