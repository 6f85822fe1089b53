"""Our qcow2 reader and writer against the real qemu-img: what it makes we judge, what we make it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support import qcow2_images as images

from ovms import process
from ovms.disk import qcow2
from ovms.disk.layers import check_layer, open_chain
from ovms.errors import DiskInvalid, HostError, OvmsError
from ovms.spec import limits
from ovms.spec.manifest import DiskFormat

GIB = 1 << 30
Tool = Callable[..., str]


@pytest.fixture
def img(tmp_path: Path) -> Tool:
    """Runs ``qemu-img``, without locks, so that it also looks at what another has open."""
    tool = process.find_tool("qemu-img")

    def run(*arguments: str | Path) -> str:
        return process.run([tool, *arguments], timeout=60).stdout.decode(errors="replace")

    return run


def info(img: Tool, path: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(img("info", "--output=json", "-f", "qcow2", path))
    return answer


def check(path: Path, format: DiskFormat = DiskFormat.QCOW2) -> int:
    with path.open("rb") as file:
        return check_layer(file.fileno(), format, "disk layer 0")


# --- what we write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 1 << 20, GIB + 512, 512 * GIB, limits.DISK_VIRTUAL_MAX])
def test_qemu_img_finds_nothing_wrong_with_an_overlay(img: Tool, tmp_path: Path, size: int) -> None:
    path = tmp_path / "overlay"
    qcow2.create_overlay(path, size)
    report = json.loads(img("check", "--output=json", "-f", "qcow2", path))
    assert report["check-errors"] == 0
    assert not {"leaks", "corruptions"} & set(report)
    facts = info(img, path)
    assert facts["virtual-size"] == size
    assert facts["cluster-size"] == 65536
    assert "backing-filename" not in facts
    assert facts["format-specific"]["data"]["compat"] == "1.1"


@pytest.mark.parametrize("bits", [9, 12, 21])
def test_overlays_of_other_clusters(img: Tool, tmp_path: Path, bits: int) -> None:
    qcow2.create_overlay(tmp_path / "overlay", 1 << 20, cluster_bits=bits)
    assert json.loads(img("check", "--output=json", tmp_path / "overlay"))["check-errors"] == 0


def test_an_overlay_over_a_base_takes_writes(img: Tool, tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(b"base" * (1 << 18))
    qcow2.create_overlay(overlay, 1 << 20)
    node = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(overlay)},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(base)}, "read-only": True},
    }
    tool = process.find_tool("qemu-io")
    said = process.run(
        [tool, "-c", "write -P 0x41 65536 4096", "-c", "read -v 0 4", "-c", "flush", f"json:{json.dumps(node)}"],
        timeout=60,
    ).stdout.decode()
    assert "base" in said
    img("check", "-f", "qcow2", overlay)
    img("convert", "-O", "raw", f"json:{json.dumps(node)}", tmp_path / "whole")
    whole = bytearray(base.read_bytes())
    whole[65536 : 65536 + 4096] = b"A" * 4096
    assert (tmp_path / "whole").read_bytes() == whole
    assert check(overlay) == 1 << 20


# --- what qemu-img writes ------------------------------------------------------------------------------------------


SOUND = [
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4096,refcount_bits=1",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "compression_type=zstd",
    "extended_l2=on",
    "extended_l2=on,cluster_size=32k,lazy_refcounts=on,compression_type=zstd",
]


@pytest.mark.parametrize("options", SOUND)
def test_sound_images_pass(img: Tool, tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    img("create", "-q", "-f", "qcow2", "-o", options, path, "1G")
    assert check(path) == GIB
    assert qcow2.check_header(os.open(path, os.O_RDONLY), "x").cluster_size == info(img, path)["cluster-size"]


@pytest.mark.parametrize("arguments", [(), ("-c",), ("-c", "-o", "compression_type=zstd"), ("-o", "compat=0.10")])
def test_converted_images_pass(img: Tool, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(200_000) + bytes(312_000))
    img("convert", "-f", "raw", "-O", "qcow2", *arguments, tmp_path / "raw", tmp_path / "image")
    assert check(tmp_path / "image") == 512_000
    assert check(tmp_path / "raw", DiskFormat.RAW) == 512_000


def test_the_largest_disk(img: Tool, tmp_path: Path) -> None:
    img("create", "-q", "-f", "qcow2", tmp_path / "image", "16T")
    assert check(tmp_path / "image") == limits.DISK_VIRTUAL_MAX
    img("create", "-q", "-f", "qcow2", tmp_path / "larger", "17T")
    with pytest.raises(DiskInvalid, match="out of range"):
        check(tmp_path / "larger")


def test_the_hint_for_a_backing_file_works(img: Tool, tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    base.write_bytes(bytes(1 << 20))
    img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    with pytest.raises(DiskInvalid, match=f"names a backing file .*{base}") as caught:
        check(path)
    assert "qemu-img rebase -u -b" in (caught.value.hint or "")
    img("rebase", "-u", "-b", "", path)
    assert check(path) == 1 << 20
    chain = open_chain([(base, DiskFormat.RAW), (path, DiskFormat.QCOW2)])
    assert [layer.virtual_size for layer in chain] == [1 << 20, 1 << 20]


@pytest.mark.spec("LAY-9")
def test_a_backing_file_on_the_network(img: Tool, tmp_path: Path) -> None:
    img("create", "-q", "-f", "qcow2", "-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw", tmp_path / "image", "1M")
    with pytest.raises(DiskInvalid, match="nbd://127"):
        check(tmp_path / "image")


@pytest.mark.spec("LAY-10")
@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_data_file(img: Tool, tmp_path: Path, raw: str) -> None:
    options = f"data_file={tmp_path / 'data'},data_file_raw={raw}"
    img("create", "-q", "-f", "qcow2", "-o", options, tmp_path / "image", "1M")
    with pytest.raises(DiskInvalid, match="uses an external data file"):
        check(tmp_path / "image")


@pytest.mark.spec("LAY-11")
@pytest.mark.parametrize("format", ["aes", "luks"])
@pytest.mark.long
def test_encryption(img: Tool, tmp_path: Path, format: str) -> None:
    speed = ",encrypt.iter-time=10" if format == "luks" else ""
    options = f"encrypt.format={format},encrypt.key-secret=s{speed}"
    for last in (False, False, False, True):
        try:
            img(
                "create",
                "-q",
                "-f",
                "qcow2",
                "--object",
                "secret,id=s,data=secret",
                "-o",
                options,
                tmp_path / "image",
                "1M",
            )
            break
        except HostError as exc:  # what it measures its own speed by is too coarse now and then
            if last or "accurate CPU usage" not in exc.message:
                raise
    with pytest.raises(DiskInvalid, match="is encrypted"):
        check(tmp_path / "image")


@pytest.mark.spec("LAY-12")
def test_an_internal_snapshot_and_its_hint(img: Tool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    img("create", "-q", "-f", "qcow2", path, "1M")
    img("snapshot", "-c", "before", path)
    with pytest.raises(DiskInvalid, match="1 internal snapshots"):
        check(path)
    img("snapshot", "-d", "before", path)
    assert check(path) == 1 << 20


@pytest.mark.spec("LAY-12")
def test_a_bitmap_and_its_hint(img: Tool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    img("create", "-q", "-f", "qcow2", path, "1M")
    img("bitmap", "--add", path, "b0")
    with pytest.raises(DiskInvalid, match="persistent bitmaps"):
        check(path)
    img("convert", "-O", "qcow2", path, tmp_path / "copy")
    assert check(tmp_path / "copy") == 1 << 20


@pytest.mark.spec("LAY-13")
def test_an_image_that_was_not_closed(img: Tool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "1M")
    tool = process.find_tool("qemu-io")
    process.run([tool, "-c", "write 0 4096", "-c", "sigraise 9", path], timeout=60, check=False)
    with pytest.raises(DiskInvalid, match="dirty"):
        check(path)


@pytest.mark.spec("LAY-3")
@pytest.mark.parametrize("format", ["vmdk", "vdi", "vpc", "vhdx", "qed"])
def test_other_formats_are_not_probed(img: Tool, tmp_path: Path, format: str) -> None:
    img("create", "-q", "-f", format, tmp_path / "image", "1M")
    with pytest.raises(DiskInvalid, match="is not a qcow2 image"):
        check(tmp_path / "image")


# --- both on the same header ---------------------------------------------------------------------------------------


def test_the_header_that_the_attacks_begin_with_is_sound(img: Tool, tmp_path: Path) -> None:
    """Else each attack might be refused for another reason than its own."""
    for version in (2, 3):
        path = tmp_path / f"v{version}"
        path.write_bytes(images.image(version=version))
        assert info(img, path)["virtual-size"] == images.SIZE == check(path)


@pytest.mark.spec("LAY-2", "LAY-9", "LAY-10")
@pytest.mark.parametrize("name", ["backing file", "backing file, version 2"])
def test_the_attacks_are_real(img: Tool, tmp_path: Path, name: str) -> None:
    """qemu-img itself would follow these names: that is why they are refused."""
    path = tmp_path / "image"
    path.write_bytes(images.HOSTILE[name].data)
    assert info(img, path)["full-backing-filename"] == "/etc/shadow"


@pytest.mark.spec("LAY-2", "SEC-2")
def test_nothing_that_we_accept_reaches_outside(img: Tool, tmp_path: Path) -> None:
    """Damaged headers of real images: whatever passes our check opens no second file in QEMU."""
    path = tmp_path / "image"
    # a name that waits in the file for an offset that a changed byte makes
    sources = [images.image(text=(4096, b"/etc/shadow")), images.image(version=2)]
    for options in ("compression_type=zstd", "extended_l2=on", "lazy_refcounts=on"):
        path.unlink(missing_ok=True)
        img("create", "-q", "-f", "qcow2", "-o", options, path, "1G")
        sources.append(path.read_bytes())
    random = Random(2)  # the same damage in every run
    accepted = 0
    for round in range(400):
        data = bytearray(sources[round % len(sources)])
        for _ in range(random.choice((1, 1, 2))):
            data[random.randrange(8, 160)] = random.choice((0, 1, 2, 4, 8, 16, 255, random.randrange(256)))
        path.write_bytes(data)
        try:
            check(path)
        except DiskInvalid:
            continue
        accepted += 1
        try:
            facts = info(img, path)
        except OvmsError:
            continue  # QEMU finds more damage than we look for
        assert "backing-filename" not in facts
        assert "snapshots" not in facts
        assert not facts.get("encrypted")
        assert "data-file" not in facts["format-specific"]["data"]
    assert 20 < accepted < 380
