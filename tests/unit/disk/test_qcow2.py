"""qcow2 headers: each attack that a header can carry, and any header at all."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import qcow2_images as images

from ovms.disk import qcow2
from ovms.disk.layers import Layer, check_layer, open_chain
from ovms.errors import DiskInvalid, FileProblem, Unsupported
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat

CLUSTER = images.CLUSTER


@contextmanager
def opened(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("image")
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


def check(data: bytes) -> qcow2.Qcow2Info:
    with opened(data) as fd:
        return qcow2.check_header(fd, "disk layer 0")


def test_a_plain_image_passes() -> None:
    assert check(images.image()) == qcow2.Qcow2Info(3, images.SIZE, CLUSTER, CLUSTER)
    assert check(images.image(version=2)) == qcow2.Qcow2Info(2, images.SIZE, CLUSTER, CLUSTER)


@pytest.mark.spec("LAY-9", "LAY-10", "LAY-11", "LAY-12", "LAY-13", "LAY-14", "LAY-15", "LAY-16")
@pytest.mark.parametrize(("name", "hostile"), images.HOSTILE.items())
def test_hostile_headers_are_refused(name: str, hostile: images.Hostile) -> None:
    with pytest.raises(DiskInvalid, match=hostile.words) as info:
        check(hostile.data)
    assert info.value.message.startswith("disk layer 0")
    assert info.value.message.isprintable()


@pytest.mark.parametrize(
    "fields",
    [
        {"incompatible": 1 << 3, "header_length": 112, "text": (104, b"\x01")},
        {"incompatible": 1 << 4, "l1_entries": 4},
        {"compatible": 1},
        {"compatible": (1 << 64) - 1},
        {"autoclear": (1 << 64) - 1},
        {"refcount_order": 0},
        {"refcount_order": 6},
        {"l1_entries": CLUSTER // 8},
        {"extensions": ((0x6803F857, b"x" * 144), (0x12345678, b"unknown"))},
        {"extensions": ((0xE2792ACA, b"qcow2"),)},
    ],
)
def test_what_harms_nobody_passes(fields: dict[str, object]) -> None:
    check(images.image(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(9, 22))
def test_every_cluster_size(bits: int, tmp_path: Path) -> None:
    qcow2.create_overlay(tmp_path / "x", 1 << 20, cluster_bits=bits)
    with (tmp_path / "x").open("rb") as file:
        assert qcow2.check_header(file.fileno(), "x") == qcow2.Qcow2Info(3, 1 << 20, 1 << bits, 1 << bits)


@pytest.mark.parametrize("size", [0, 3, 4, 71, 72, 103, 104, 111, 112, 1000, CLUSTER, 3 * CLUSTER])
def test_cut_short(size: int) -> None:
    with pytest.raises(DiskInvalid):
        check(images.image()[:size])


def test_not_a_qcow2_image() -> None:
    with pytest.raises(DiskInvalid, match="it begins with nothing"):
        check(b"")
    with pytest.raises(DiskInvalid, match="it begins with 4b444d56") as info:
        check(b"KDMV" + bytes(600))
    assert "raw" in (info.value.hint or "")


NUMBERS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])


@pytest.mark.spec("SEC-1")
@given(
    st.dictionaries(st.sampled_from(sorted(images.FIELDS)), NUMBERS, min_size=1, max_size=4),
    st.sampled_from([2, 3]),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=3),
)
def test_any_header_is_refused_or_sound(
    fields: dict[str, int], version: int, extensions: list[tuple[int, int]]
) -> None:
    data = bytearray(images.image(version=version))
    for name, value in fields.items():
        at, form = images.FIELDS[name]
        struct.pack_into(form, data, at, value & (1 << 8 * struct.calcsize(form)) - 1)
    for i, (kind, length) in enumerate(extensions):
        struct.pack_into(">II", data, 104 + 8 * i, kind, length)
    try:
        info = check(bytes(data))
    except DiskInvalid:
        return
    found = {name: struct.unpack_from(form, data, at)[0] for name, (at, form) in images.FIELDS.items()}
    assert 0 < info.virtual_size <= limits.DISK_VIRTUAL_MAX
    assert found["backing_offset"] == found["backing_size"] == found["encryption"] == found["snapshots"] == 0
    assert found["version"] == 2 or not found["incompatible"] & ~0b11000
    assert found["l1_entries"] * 8 <= limits.QCOW2_L1_MAX
    assert found["l1_offset"] + 8 * found["l1_entries"] <= len(data)


@given(st.binary(max_size=300), st.sampled_from([b"", qcow2.MAGIC, images.image()[:72], images.image()[:104]]))
def test_any_bytes(data: bytes, start: bytes) -> None:
    with pytest.raises(DiskInvalid):
        check(start + data)


# --- overlays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 30) + 512, 512 << 20, limits.DISK_VIRTUAL_MAX])
def test_an_overlay_passes_our_own_check(tmp_path: Path, size: int) -> None:
    path = tmp_path / "overlay"
    qcow2.create_overlay(path, size)
    with path.open("rb") as file:
        assert qcow2.check_header(file.fileno(), "x").virtual_size == size
    assert path.stat().st_size % CLUSTER == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_overlay_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"dear")
    with pytest.raises(FileExistsError):
        qcow2.create_overlay(tmp_path / "x", 512)
    assert (tmp_path / "x").read_bytes() == b"dear"


@pytest.mark.parametrize("size", [0, -512, limits.DISK_VIRTUAL_MAX + 512, 2**64])
def test_an_overlay_of_an_impossible_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(DiskInvalid):
        qcow2.create_overlay(tmp_path / "x", size)
    assert list(tmp_path.iterdir()) == []


def test_an_overlay_too_large_for_its_clusters(tmp_path: Path) -> None:
    with pytest.raises(DiskInvalid, match="too large"):
        qcow2.create_overlay(tmp_path / "x", 1 << 40, cluster_bits=9)
    assert list(tmp_path.iterdir()) == []


# --- layers --------------------------------------------------------------------------------------------------------


def layer(data: bytes, format: DiskFormat) -> int:
    with opened(data) as fd:
        return check_layer(fd, format, "disk layer 1")


def test_a_layer_of_each_format() -> None:
    assert layer(bytes(1024), DiskFormat.RAW) == 1024
    assert layer(images.image(), DiskFormat.QCOW2) == images.SIZE
    with pytest.raises(Unsupported, match="'ovfms'"):
        layer(images.image(), DiskFormat.OVFMS)


@pytest.mark.spec("LAY-6")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (images.image(), "is a qcow2 image, but is said to be raw"),
        (bytes(511), "multiple of 512"),
        (bytes(513), "multiple of 512"),
        (b"", "multiple of 512"),
    ],
)
def test_a_raw_layer_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(DiskInvalid, match=words):
        layer(data, DiskFormat.RAW)


@pytest.mark.spec("LAY-5")
def test_a_chain(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(4096))
    (tmp_path / "diff").write_bytes(images.image())
    chain = open_chain([(tmp_path / "base", DiskFormat.RAW), (tmp_path / "diff", DiskFormat.QCOW2)])
    assert chain == [
        Layer(tmp_path / "base", DiskFormat.RAW, 4096),
        Layer(tmp_path / "diff", DiskFormat.QCOW2, images.SIZE),
    ]
    assert open_chain([]) == []


def test_a_chain_is_refused_with_the_layer_s_number(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(4096))
    base = (tmp_path / "base", DiskFormat.RAW)
    with pytest.raises(DiskInvalid, match="disk layer 1 is raw"):
        open_chain([base, base])
    with pytest.raises(FileProblem, match="disk layer 1: there is no file"):
        open_chain([base, (tmp_path / "gone", DiskFormat.QCOW2)])
    with pytest.raises(DiskInvalid, match="disk layer 1 is not a qcow2 image"):
        open_chain([base, (tmp_path / "base", DiskFormat.QCOW2)])


@pytest.mark.spec("LAY-15", "LIM-1")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"refcount_clusters": limits.QCOW2_REFCOUNTS_MAX // CLUSTER}, CLUSTER + limits.QCOW2_REFCOUNTS_MAX),
        ({"l1_entries": limits.QCOW2_L1_MAX // 8}, 3 * CLUSTER + limits.QCOW2_L1_MAX),
    ],
)
def test_the_largest_tables(fields: dict[str, Any], size: int) -> None:
    """In files that hold them (and nothing but holes there)."""
    ((name, most),) = fields.items()
    for number, good in ((most, True), (most + 1, False)):
        fields[name] = number
        with opened(images.image(**fields)) as fd:
            os.ftruncate(fd, size + CLUSTER)
            if good:
                qcow2.check_header(fd, "x")
            else:
                with pytest.raises(DiskInvalid) as info:
                    qcow2.check_header(fd, "x")
                assert info.value.context["rule"] == "LAY-15"


@pytest.mark.spec("LAY-14")
def test_the_smallest_and_the_largest_clusters() -> None:
    for bits, good in ((8, False), (9, True), (21, True), (22, False)):
        cluster = 1 << bits
        image = images.image(
            cluster_bits=bits, size=1 << 20, refcount_offset=cluster, l1_offset=3 * cluster, l1_entries=32
        )
        with opened(image) as fd:
            os.ftruncate(fd, 4 * cluster + 65536)
            if good:
                assert qcow2.check_header(fd, "x").cluster_size == cluster
            else:
                with pytest.raises(DiskInvalid, match="clusters of"):
                    qcow2.check_header(fd, "x")
