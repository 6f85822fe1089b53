"""That the attacks are some: what happens to tools that believe what they read. The same files are refused in ``test_attacks``."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

import lz4.block
import pytest
from support import hostile
from support.hostile import SECRET

from ovms.spec import limits

ATTACKS = {str(attack): attack for attack in hostile.attacks()}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with the secret in it, two levels below one that nobody should write to."""
    directory = tmp_path / "outside" / "here"
    directory.mkdir(parents=True)
    (directory / "secret").write_bytes(SECRET)
    return directory


def read_by_qemu(directory: Path, attack: str, *options: str) -> bytes:
    (directory / "disk").write_bytes(ATTACKS[attack].data)
    subprocess.run(
        ["qemu-img", "convert", *options, "-O", "raw", "disk", "out"],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )
    return (directory / "out").read_bytes()


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ("qcow2: a backing file", ()),
        ("qcow2: a backing file", ("-f", "qcow2")),
        ("qcow2: a backing file in version 2", ()),
        ("qcow2: a backing file by its options", ()),
        ("qcow2: a data file", ("-f", "qcow2")),
        ("raw: a qcow2 image", ()),
        ("raw: a VMDK descriptor", ()),
    ],
)
def test_qemu_img_reads_the_secret(here: Path, attack: str, options: tuple[str, ...]) -> None:
    # of a data file, the first cluster is mapped
    assert SECRET[:512] in read_by_qemu(here, attack, *options)


def test_what_is_said_to_be_raw_is_not_looked_into(here: Path) -> None:
    attack = "raw: a VMDK descriptor"
    assert read_by_qemu(here, attack, "-f", "raw") == ATTACKS[attack].data


@pytest.mark.parametrize(
    "attack", ["oci-archive: a name that climbs", "oci-archive: a link that others are written through"]
)
@pytest.mark.parametrize("tool", ["python", "tar"])
def test_unpacking_writes_outside(here: Path, attack: str, tool: str) -> None:
    (here / "x.tar").write_bytes(ATTACKS[attack].data)
    below = here / "unpacked"
    below.mkdir()
    if tool == "python":
        with tarfile.open(here / "x.tar") as archive:
            archive.extractall(below, filter="fully_trusted")
    else:
        subprocess.run(["tar", "-xPf", here / "x.tar"], cwd=below, check=True, timeout=60)
    assert (here / "escaped").read_bytes() == b"x"


def test_what_tar_unpacks_is_not_what_is_in_the_archive(here: Path) -> None:
    (here / "x.tar").write_bytes(ATTACKS["oci-archive: a name that is absolute"].data)
    subprocess.run(["tar", "-xf", "x.tar"], cwd=here, check=True, capture_output=True, timeout=60)
    with tarfile.open(here / "x.tar") as archive:
        honest = archive.extractfile("index.json")
        assert honest is not None
        assert (here / "index.json").read_bytes() != honest.read()


def test_a_blob_that_is_a_link_is_the_secret_once_unpacked(here: Path) -> None:
    (here / "x.tar").write_bytes(ATTACKS["oci-archive: a blob that is a link"].data)
    below = here / "unpacked"
    below.mkdir()
    with tarfile.open(here / "x.tar") as archive:
        archive.extractall(below, filter="fully_trusted")
    (link,) = (path for path in below.rglob("*") if path.is_symlink())
    assert link.read_bytes() == SECRET


@pytest.mark.parametrize("attack", ["manifest: a name twice", "manifest: a name twice, once escaped"])
def test_the_last_key_wins_elsewhere(attack: str) -> None:
    assert json.loads(ATTACKS[attack].data)["name"] == "other"


def test_a_deep_document_breaks_a_parser() -> None:
    with pytest.raises(RecursionError):
        json.loads(ATTACKS["manifest: a hundred thousand levels"].data)


def test_a_digest_that_climbs_is_a_path(here: Path) -> None:
    digest = json.loads(ATTACKS["manifest: a digest that climbs"].data)["kernel"]["ref"]
    blobs = here / "blobs" / "sha256" / "x"
    blobs.mkdir(parents=True)
    assert Path(os.path.normpath(blobs / digest.partition(":")[2])).read_bytes() == SECRET


def test_a_chunk_unpacks_to_far_more_than_it_says() -> None:
    data = ATTACKS["ramsnap: a chunk that unpacks to 15 MiB"].data
    stored = data[-int.from_bytes(data[88:96], "little") :]
    assert len(lz4.block.decompress(stored, uncompressed_size=16 << 20)) >= 15 * limits.MIB
    assert len(stored) < limits.RAM_CHUNK_PAGES * limits.RAM_PAGE


@pytest.mark.parametrize("attack", [name for name in ATTACKS if "escapes" in name or name.startswith("console: a ")])
def test_what_is_printed_as_it_is_drives_the_terminal(attack: str) -> None:
    data = ATTACKS[attack].data
    text = data.decode("utf-8", "replace")
    if data.lstrip()[:1] == b"{":
        text = " ".join(map(str, json.loads(data).values()))
    assert not all(c.isprintable() or c == "\n" for c in text)
