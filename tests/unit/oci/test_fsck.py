"""The check of the store finds what is wrong, and the repair loses nothing."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support import ram
from support.stores import add, blobs, damage, files_of

from ovms.errors import Locked, StoreCorrupt
from ovms.oci import origins
from ovms.oci.collector import Needs, collect
from ovms.oci.descriptor import Descriptor, build_manifest
from ovms.oci.fsck import Fault, Finding, Report, User, Uses, check, open_damaged
from ovms.oci.layout import Layout
from ovms.oci.origins import Origin
from ovms.oci.repair import repair
from ovms.process import boot_id
from ovms.spec import mediatypes, ramsnap
from ovms.spec.digest import Digest, hex_of, of_bytes

ABSENT = of_bytes(b"not there")
NAME = "registry.example/vms/web:1"


def faults(report: Report) -> list[Fault]:
    return [finding.fault for finding in report.findings]


def one(report: Report, fault: Fault) -> Finding:
    (finding,) = (finding for finding in report.findings if finding.fault is fault)
    return finding


def quarantined(layout: Layout) -> list[Path]:
    return sorted(layout.quarantine_dir.iterdir()) if layout.quarantine_dir.exists() else []


def is_sound(layout: Layout) -> bool:
    return check(layout, Uses).findings == []


def test_a_sound_store(layout: Layout) -> None:
    add(layout, b"config", b"disk", name="a")
    add(layout, b"unnamed")
    report = check(layout, Uses)
    assert report.sound
    assert (report.findings, report.blobs, report.artifacts, report.busy) == ([], 5, 1, False)
    assert report.hashed == sum(path.stat().st_size for path in layout.blob_dir.iterdir())
    quick = check(layout, Uses, quick=True)
    assert (quick.findings, quick.hashed) == ([], 0)
    assert repair(layout, Uses).findings == []


# --- blobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("OCI-21", "OCI-22")
def test_a_corrupt_blob_is_quarantined_and_what_it_hits_is_told(layout: Layout) -> None:
    add(layout, b"config", b"disk", name=NAME)
    add(layout, b"config", b"disk", b"diff", name="local:1")
    bad = damage(layout, of_bytes(b"disk"))
    content = bad.read_bytes()
    assert faults(check(layout, Uses, quick=True)) == [], "it was not read"
    found = check(layout, Uses)
    assert not found.sound
    assert one(found, Fault.BLOB).digest == of_bytes(b"disk")
    assert bad.exists(), "a check changes nothing"
    report = repair(layout, Uses)
    (kept,) = quarantined(layout)
    assert kept.read_bytes() == content
    assert kept.name.startswith(bad.name + ".")
    assert one(report, Fault.BLOB).repaired == f"moved to {kept}"
    hit = {finding.names: finding for finding in report.findings if finding.fault is Fault.ARTIFACT}
    assert f"ovm pull {NAME}" in (hit[NAME,].hint or "")
    assert "ovm build … -t local:1" in (hit["local:1",].hint or "")
    assert hit[NAME,].missing == (of_bytes(b"disk"),)
    assert not report.sound, "the artifacts are still not whole"
    layout.add_bytes(b"disk")
    assert is_sound(layout)


def test_a_corrupt_blob_that_nothing_needs_is_repaired_for_good(layout: Layout) -> None:
    damage(layout, layout.add_bytes(b"unneeded"))
    report = repair(layout, Uses)
    assert faults(report) == [Fault.BLOB]
    assert report.sound
    assert blobs(layout) == set()


def test_derived_files_go_with_a_corrupt_blob(layout: Layout) -> None:
    digest = layout.add_bytes(b"ram")
    derived = layout.derived_dir / f"{hex_of(digest)}.{boot_id()[:8]}.ram"
    derived.write_bytes(b"x")
    damage(layout, digest)
    bad = layout.path(digest).read_bytes()
    used = Uses(Needs(files=frozenset({derived.name})))
    repair(layout, lambda: used)
    assert derived.exists(), "a VM has it mapped, and needs it for its next snapshot"
    layout.path(digest).write_bytes(bad)
    repair(layout, Uses)
    assert not derived.exists()


@pytest.mark.parametrize("quick", [False, True])
def test_a_corrupt_manifest(layout: Layout, quick: bool) -> None:
    image = add(layout, b"config", b"disk", name=NAME)
    damage(layout, image.digest)
    found = check(layout, Uses, quick=quick)
    assert faults(found) == [Fault.BLOB, Fault.ARTIFACT]
    report = repair(layout, Uses, quick=quick)
    assert "is missing" in one(report, Fault.ARTIFACT).message
    assert layout.find(NAME) is not None, "the name stays, so that it can be pulled again"
    assert collect(layout, Needs).broken[0].names == (NAME,)
    assert blobs(layout) == files_of(image) - {hex_of(image.digest)}, "what it needs is kept, too"
    layout.add_bytes(image.raw)
    assert is_sound(layout)


@pytest.mark.parametrize("quick", [False, True])
def test_a_cut_blob(layout: Layout, quick: bool) -> None:
    add(layout, b"config", b"disk", name="a")
    path = layout.path(of_bytes(b"disk"))
    path.chmod(0o644)
    path.write_bytes(b"dis")
    path.chmod(0o444)
    assert faults(check(layout, Uses, quick=quick)) == [Fault.BLOB, Fault.ARTIFACT]
    repair(layout, Uses, quick=quick)
    assert [kept.read_bytes() for kept in quarantined(layout)] == [b"dis"]


def test_a_manifest_that_lies_of_a_size(layout: Layout) -> None:
    layout.add_bytes(b"disk")
    image = build_manifest(
        artifact_type=mediatypes.MANIFEST, config=Descriptor("application/x", of_bytes(b"disk"), 5), layers=()
    )
    layout.add_bytes(image.raw)
    layout.set_name("a", image.descriptor())
    report = repair(layout, Uses)
    assert faults(report) == [Fault.ARTIFACT]
    assert "has 5 bytes; it has 4" in report.findings[0].message
    assert quarantined(layout) == []


def test_an_artifact_that_only_an_instance_needs(layout: Layout) -> None:
    image = add(layout, b"config", b"disk")
    damage(layout, of_bytes(b"disk"))
    uses = Uses(Needs(frozenset({image.digest})), {image.digest: [User("web-1", NAME)]})
    finding = one(repair(layout, lambda: uses), Fault.ARTIFACT)
    assert "the instance web-1 needs" in finding.message
    assert f"ovm pull {NAME}" in (finding.hint or "")


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_is_no_file_under_a_blob_s_name(layout: Layout, tmp_path: Path, kind: str) -> None:
    path = layout.path(of_bytes(b"disk"))
    add(layout, b"config", b"disk", name="a")
    path.unlink()
    if kind == "link":
        (tmp_path / "disk").write_bytes(b"disk")
        path.symlink_to(tmp_path / "disk")
    elif kind == "directory":
        path.mkdir()
        (path / "dear").touch()
    else:
        os.mkfifo(path)
    report = repair(layout, Uses)
    assert one(report, Fault.NO_FILE).repaired
    assert not os.path.lexists(path)
    assert len(quarantined(layout)) == 1
    layout.add_bytes(b"disk")
    assert is_sound(layout)


def test_foreign_files_and_open_permissions(layout: Layout) -> None:
    digest = layout.add_bytes(b"disk")
    layout.path(digest).chmod(0o666)
    (layout.blob_dir / "README").write_bytes(b"dear")
    report = repair(layout, Uses)
    assert sorted(faults(report)) == [Fault.FOREIGN, Fault.MODE]
    assert report.sound
    assert layout.path(digest).stat().st_mode & 0o777 == 0o444
    assert (layout.blob_dir / "README").exists()


def test_a_memory_of_the_wrong_size_is_dropped(layout: Layout) -> None:
    digest = layout.add_bytes(ram.blob({0: b"a" * ramsnap.PAGE * 2}))
    path = layout.derived_dir / f"{hex_of(digest)}.{boot_id()[:8]}.ram"
    path.write_bytes(b"x")
    used = Uses(Needs(files=frozenset({path.name})))
    assert check(layout, lambda: used).sound
    report = repair(layout, Uses)
    assert faults(report) == [Fault.DERIVED]
    assert report.sound
    assert not path.exists()


# --- names -----------------------------------------------------------------------------------------------------------


def ruin(layout: Layout, content: bytes | None) -> None:
    layout.index.unlink()
    if content is not None:
        layout.index.write_bytes(content)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"[]", b'{"manifests": 1}'])
def test_a_damaged_index_is_rebuilt(
    layout: Layout, content: bytes | None, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(1, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    images = [add(layout, b"config", bytes([i]), name=f"{i}:1") for i in range(3)]
    before = layout.entries()
    ruin(layout, content)
    assert faults(check(layout, Uses)) == [Fault.INDEX]
    report = repair(layout, Uses)
    assert report.sound
    assert layout.entries() == before
    assert [kept.read_bytes() for kept in quarantined(layout)] == ([] if content is None else [content])
    assert is_sound(layout)
    assert collect(layout, Needs).items == ()
    assert blobs(layout) == files_of(*images)


def test_an_index_that_is_a_directory(layout: Layout) -> None:
    add(layout, b"config", name="a")
    layout.index.unlink()
    layout.index.mkdir()
    assert repair(layout, Uses).sound
    assert [e.name for e in layout.entries()] == ["a"]
    assert quarantined(layout)[0].is_dir()


def test_names_are_not_forgotten_when_index_and_marker_are_lost(layout: Layout) -> None:
    add(layout, b"config", name="a")
    layout.marker.unlink()
    ruin(layout, None)
    again = Layout(layout.root)
    with pytest.raises(StoreCorrupt):
        again.entries()
    assert repair(again, Uses).sound
    assert [e.name for e in again.entries()] == ["a"]


def test_artifacts_without_a_name_are_listed_and_kept(layout: Layout) -> None:
    image = add(layout, b"config", b"disk", name="a")
    add(layout, b"half", b"lost")
    layout.path(of_bytes(b"lost")).unlink()
    layout.add_bytes(b'{"json": "but no manifest"}')
    ruin(layout, b"damaged")
    layout.index_copy.write_bytes(b"damaged, too")
    report = repair(layout, Uses)
    (finding,) = (f for f in report.findings if f.digest == image.digest)
    assert f"ovm tag {image.digest} NAME" in (finding.hint or "")
    assert [(e.name, e.descriptor.digest) for e in layout.entries()] == [("", image.digest)]
    collect(layout, Needs)
    assert blobs(layout) == files_of(image)
    layout.set_name("a", image.descriptor())
    assert [e.name for e in layout.entries()] == ["a"]


def test_an_old_copy_gives_back_no_name_whose_artifact_is_gone(layout: Layout) -> None:
    add(layout, b"config", name="a")
    old = layout.index_copy.read_bytes()
    layout.remove_name("a")
    collect(layout, Needs)
    layout.index_copy.write_bytes(old)
    ruin(layout, b"damaged")
    repair(layout, Uses)
    assert layout.entries() == []


def test_bad_entries_and_names_that_stand_twice(layout: Layout) -> None:
    one_, two = (add(layout, b"config", bytes([i]), name="a") for i in range(2))

    def named(digest: str, name: str = "a") -> dict[str, Any]:
        annotations = {mediatypes.REF_NAME_ANNOTATION: name, "kept": "yes"}
        return {"mediaType": mediatypes.OCI_MANIFEST, "digest": digest, "size": 5, "annotations": annotations}

    items = [named(one_.digest), 1, named("sha256:../../x", "b"), named(two.digest)]
    layout.index.write_text(json.dumps({"schemaVersion": 2, "manifests": items, "other": "kept"}))
    found = check(layout, Uses)
    assert faults(found) == [Fault.ENTRY, Fault.ENTRY, Fault.NAME_TWICE]
    report = repair(layout, Uses)
    assert report.sound
    assert [(e.name, e.descriptor.digest) for e in layout.entries()] == [("a", one_.digest), ("", two.digest)]
    assert json.loads(layout.index.read_bytes())["other"] == "kept"
    assert json.loads(quarantined(layout)[0].read_bytes())["manifests"] == items
    assert is_sound(layout)


def test_a_name_without_a_manifest(layout: Layout) -> None:
    image = add(layout, b"config", name="a")
    layout.path(image.digest).unlink()
    report = check(layout, Uses)
    assert faults(report) == [Fault.ARTIFACT]
    assert "a has no manifest" in report.findings[0].message


# --- oci-layout ------------------------------------------------------------------------------------------------------


def test_a_damaged_oci_layout_of_ours(layout: Layout) -> None:
    add(layout, b"config", name="a")
    with layout.using():
        pass
    layout.marker.write_bytes(b"")
    with pytest.raises(StoreCorrupt, match="no OCI image layout") as info:
        Layout(layout.root)
    assert "ovm fsck --repair" in (info.value.hint or "")
    again = open_damaged(layout.root)
    assert faults(check(again, Uses)) == [Fault.LAYOUT]
    assert repair(again, Uses).sound
    assert [e.name for e in Layout(layout.root).entries()] == ["a"]


@pytest.mark.parametrize("marker", [b'{"imageLayoutVersion": "2.0.0"}', b"nonsense"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, marker: bytes) -> None:
    (tmp_path / "oci-layout").write_bytes(marker)
    if marker != b"nonsense":
        (tmp_path / "ovms.lock").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StoreCorrupt):
        open_damaged(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_record_of_an_origin_that_cannot_be_read(layout: Layout) -> None:
    image = add(layout, b"config", name=NAME)
    origins.add(layout, image.digest, Origin(places=("registry.example/vms/web",)))
    assert is_sound(layout)
    record = layout.origin_dir / hex_of(image.digest)
    record.write_bytes(b"damaged")
    found = one(check(layout, Uses), Fault.ORIGIN)
    assert (found.path, found.digest, found.left) == (record, image.digest, True)
    report = repair(layout, Uses)
    assert report.sound
    assert one(report, Fault.ORIGIN).repaired == f"moved to {quarantined(layout)[0]}"
    assert origins.read(layout, image.digest) is None
    assert is_sound(layout)


# --- with others -----------------------------------------------------------------------------------------------------


def test_what_killed_commands_left(layout: Layout) -> None:
    (layout.partial_dir / f"{hex_of(ABSENT)}.0123").write_bytes(b"x")
    (layout.root / ".index.json.0123456789ab.tmp").write_bytes(b"half an index")
    (layout.derived_dir / f"{hex_of(ABSENT)}.lock").touch()
    found = check(layout, Uses)
    assert found.sound
    assert faults(found) == [Fault.STALE] * 3
    with layout.using():
        busy = check(layout, Uses)
    assert (busy.busy, busy.findings) == (True, [])
    assert all(finding.repaired for finding in repair(layout, Uses).findings)
    assert is_sound(layout)


def test_what_a_killed_writer_of_an_origin_left(layout: Layout) -> None:
    image = add(layout, b"config", name=NAME)
    origins.add(layout, image.digest, Origin(made=True))
    (layout.origin_dir / f".{hex_of(image.digest)}.0123456789ab.tmp").write_bytes(b"half a record")
    collect(layout, Needs)
    assert [path.name for path in layout.origin_dir.iterdir()] == [hex_of(image.digest)]


def test_no_repair_beside_a_writer(layout: Layout) -> None:
    damage(layout, layout.add_bytes(b"x"))
    before = blobs(layout)
    with layout.using(), pytest.raises(Locked):
        repair(layout, Uses, wait=0.05)
    assert blobs(layout) == before


def test_writers_may_work_while_the_store_is_checked(layout: Layout) -> None:
    add(layout, b"config", name="a")
    done = threading.Event()

    def uses() -> Uses:
        def write() -> None:
            with layout.using():
                add(layout, b"new", name="b")
            done.set()

        if not done.is_set():
            threading.Thread(target=write).start()
            assert done.wait(10)
        return Uses()

    assert check(layout, uses).findings == []


def test_what_was_mended_meanwhile_is_left(layout: Layout) -> None:
    """What is suspect is hashed again under the lock: it may have been mended meanwhile."""
    digest = Digest(layout.add_bytes(b"x"))
    damage(layout, digest)
    calls = []

    def uses() -> Uses:
        calls.append(1)
        if len(calls) == 2:
            layout.add_bytes(b"x")
        return Uses()

    assert repair(layout, uses).findings == []
    assert layout.path(digest).read_bytes() == b"x"
