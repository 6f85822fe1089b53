"""Encrypted RAM snapshots as parts of artifacts: nobody here has a key."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

import pytest
from support import ram
from support.artifacts import with_ram, write_inputs, write_manifest

from ovms.artifact.build import Builder
from ovms.artifact.parts import check_encrypted
from ovms.artifact.validate import validate_artifact, validate_path
from ovms.errors import SnapshotInvalid, Unsupported
from ovms.memory import snapshot
from ovms.oci import reuse
from ovms.oci.layout import Layout
from ovms.spec import limits, mediatypes, ramsnap
from ovms.spec.manifest import Compression
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Encryption

HEADER = ram.header(encryption=Encryption(("age1" + "q" * 58,), b"wrapped"))
PAGES = {0: b"a" * ramsnap.PAGE, 4: hashlib.shake_128(b"noise").digest(2 * ramsnap.PAGE)}


def encrypted(compression: Compression = Compression.LZ4) -> bytes:
    return ram.blob(PAGES, HEADER, compression=compression, cipher=Cipher(bytes(32)))


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


@pytest.mark.spec("RAM-57", "RAM-45", "OCI-10")
@pytest.mark.parametrize("compression", Compression)
def test_a_build_takes_one_for_what_it_is(layout: Layout, tmp_path: Path, compression: Compression) -> None:
    write_inputs(tmp_path)
    (tmp_path / "ram.ovmr").write_bytes(encrypted(compression))
    manifest = write_manifest(tmp_path, ramSnapshot={"ref": "ram.ovmr", "compression": str(compression)})
    built = Builder(layout, no_registry).build(manifest, name="web:1")
    types = [layer.media_type for layer in built.image.layers if layer.media_type in mediatypes.RAM_SNAPSHOTS]
    assert types == [f"application/vnd.ovms.ramsnap.v1+{compression}+age"]
    assert built.encrypted
    # and so does one that takes it from there
    again = write_manifest(tmp_path, ramSnapshot={"ref": "web:1"})
    other = Builder(layout, no_registry).build(again)
    assert other.encrypted
    assert other.manifest.ram_snapshot is not None
    assert other.manifest.ram_snapshot.compression is compression


@pytest.mark.spec("RAM-57", "OCI-11")
def test_a_media_type_that_says_otherwise(layout: Layout) -> None:
    for blob, suffix in ((encrypted(), b""), (ram.blob(PAGES), b"+age")):
        raw = with_ram(layout, "web:1", blob).image.raw.replace(b"ramsnap.v1+lz4", b"ramsnap.v1+lz4" + suffix)
        report = validate_artifact(layout, "web:1", layout.add_bytes(raw))
        assert "RAM-57" in {problem.rule for problem in report.problems}
    _, header = ramsnap.parse_head(encrypted())
    check_encrypted(header, "application/vnd.ovms.ramsnap.v1+lz4+age")
    with pytest.raises(SnapshotInvalid):
        check_encrypted(header, "application/vnd.ovms.ramsnap.v1+lz4")


@pytest.mark.spec("RAM-61")
def test_what_validate_tells_without_a_key(tmp_path: Path) -> None:
    for compression in Compression:
        (tmp_path / "ram.ovmr").write_bytes(encrypted(compression))
        assert validate_path(tmp_path / "ram.ovmr").problems == []
    damaged = bytearray(encrypted())
    damaged[-1] ^= 1
    (tmp_path / "ram.ovmr").write_bytes(damaged)
    assert [problem.rule for problem in validate_path(tmp_path / "ram.ovmr").problems] == ["RAM-16"]


@pytest.mark.spec("RAM-64")
def test_no_image_is_made_of_one(layout: Layout) -> None:
    digest = layout.add_bytes(encrypted())
    with pytest.raises(Unsupported, match="only unpacked into memory"):
        snapshot.materialise(layout, digest)
    assert list(layout.derived_dir.glob("*.ram*")) == list(layout.derived_dir.glob("*.tmp")) == []


def test_its_chunks_are_looked_for_nowhere(layout: Layout) -> None:
    noise = hashlib.shake_128(b"large").digest(limits.RAM_MIN)
    pages = {at: noise[at * ramsnap.PAGE :][: 2 * ramsnap.PAGE] for at in range(0, 256, 2)}
    for header, cipher, found in ((ram.HEADER, None, True), (HEADER, Cipher(bytes(32)), False)):
        blob = ram.blob(pages, header, cipher=cipher)
        path = layout.path(layout.add_bytes(blob))
        control = blob[: ramsnap.parse_prefix(blob).data_offset]
        assert (reuse.plan(control, [path]) is not None) == found
