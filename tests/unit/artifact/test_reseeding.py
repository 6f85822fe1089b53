"""What a kernel's image tells of its random numbers: images made here, packed in each way, damaged, and hostile."""

from __future__ import annotations

import gzip
import lzma
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support import kernels

from ovms.artifact import reseeding
from ovms.artifact.reseeding import reseeds

LINUX = b"Linux version 6.1.0 (x)\0" + bytes(5000) + b"random: crng init done\n\0"
CAN = LINUX + bytes(70_000) + b"\x015random: crng reseeded due to virtual machine fork\n\0"
BUILT_IN = CAN + bytes(3_000_000) + b"VMGENCTR\0"


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = bytes(lz4.block.compress(data[at : at + (8 << 20)], store_size=False))
        out += len(block).to_bytes(4, "little") + block
    return out


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "zstd": lambda data: zstandard.ZstdCompressor(level=3).compress(data),
    "lz4": lz4_legacy,
}


def image(
    unpacked: bytes,
    pack: str,
    *,
    payload: bytes | None = None,
    version: int = 0x020F,
    length: int | None = None,
    size: int | None = None,
) -> bytes:
    """A bzImage. Behind what is packed stands the size of what was, which gzip writes itself."""
    payload = PACKERS[pack](unpacked) if payload is None else payload
    setup = bytearray(kernels.bzimage(version=version, size=5 * 512))
    setup[0x1F1] = 4
    payload += (len(unpacked) if size is None else size).to_bytes(4, "little") if pack != "gzip" else b""
    struct.pack_into("<II", setup, 0x248, 0x100, len(payload) if length is None else length)
    return bytes(setup) + bytes(0x100) + payload + bytes(512)


def look(tmp_path: Path, data: bytes) -> bool | None:
    path = tmp_path / "kernel"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return reseeds(fd)
    finally:
        os.close(fd)


@pytest.mark.spec("SEC-9")
@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize(
    ("kernel", "can"),
    [(LINUX, False), (BUILT_IN, True), (CAN, None), (BUILT_IN[len(LINUX) :], None), (b"no Linux" * 999, None)],
    ids=["lacks-it", "built-in", "module", "no-banner", "other"],
)
def test_each_way_of_packing(tmp_path: Path, pack: str, kernel: bytes, can: bool | None) -> None:
    assert look(tmp_path, image(kernel, pack)) is can


@pytest.mark.parametrize(("kernel", "can"), [(LINUX, False), (BUILT_IN, True), (CAN, None)])
def test_an_elf_kernel_is_not_packed(tmp_path: Path, kernel: bytes, can: bool | None) -> None:
    assert look(tmp_path, kernels.elf() + kernel) is can


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_words_across_the_pieces_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    monkeypatch.setattr(reseeding, "_INPUT", cut)
    monkeypatch.setattr(reseeding, "_OUTPUT", cut)
    kernel = LINUX.replace(bytes(5000), b"") + CAN[-60:] + b"VMGENCTR"
    assert look(tmp_path, kernels.elf() + kernel) is True
    assert look(tmp_path, image(kernel, "xz")) is True
    assert look(tmp_path, image(kernel, "gzip")) is True


@pytest.mark.parametrize("pack", PACKERS)
def test_what_is_damaged_tells_nothing(tmp_path: Path, pack: str) -> None:
    kernel = LINUX + os.urandom(200_000)
    packed = PACKERS[pack](kernel)
    assert look(tmp_path, image(kernel, pack)) is False
    # the half that is not there may have had it
    assert look(tmp_path, image(kernel, pack, payload=packed[: len(packed) // 2])) is None
    if pack != "gzip":
        assert look(tmp_path, image(kernel, pack, size=len(kernel) + 1)) is None
    if pack in ("gzip", "xz"):  # the others have no checksum that anybody reads
        assert look(tmp_path, image(kernel, pack, payload=packed[:9000] + bytes(64) + packed[9064:])) is None
    whole = image(kernel, pack)
    assert look(tmp_path, image(kernel, pack, length=2**32 - 1)) is None
    assert look(tmp_path, image(kernel, pack, version=0x0207)) is None
    assert look(tmp_path, whole[:700]) is None
    assert look(tmp_path, b"") is None


@pytest.mark.parametrize("pack", PACKERS)
def test_one_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: str) -> None:
    monkeypatch.setattr(reseeding, "UNPACKED_MAX", 1 << 20)
    assert look(tmp_path, image(bytes(20 << 20) + BUILT_IN, pack)) is None


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.long
def test_a_bomb_takes_little_memory(tmp_path: Path, pack: str) -> None:
    (tmp_path / "bomb").write_bytes(image(bytes(150 << 20), pack))
    code = "import os, sys; from ovms.artifact.reseeding import reseeds; print(reseeds(os.open(sys.argv[1], 0)))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bomb"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (100 << 20, 100 << 20)),
    )
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


@given(st.sampled_from(sorted(PACKERS)), st.binary(max_size=200), st.integers(0, 5000))
def test_nothing_makes_it_fail(pack: str, noise: bytes, at: int) -> None:
    data = bytearray(image(LINUX, pack))
    at %= len(data)
    data[at : at + len(noise)] = noise
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, data)
        assert reseeds(fd) in (None, False, True)
    finally:
        os.close(fd)
