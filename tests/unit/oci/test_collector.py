"""The garbage collector: what is needed stays, what is not goes, and a dry run says the same."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.stores import add, blobs, damage, files_of

from ovms import fsutil
from ovms.errors import Locked, OvmsError, StoreCorrupt
from ovms.oci.collector import Kind, Needs, Options, Plan, collect, reach
from ovms.oci.descriptor import Descriptor
from ovms.oci.layout import Layout
from ovms.process import boot_id
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, hex_of, of_bytes

ABSENT = of_bytes(b"not there")
ALL = Options(unused=True)
BOOT = boot_id()[:8]
DAY = 24 * 3600


def using(*digests: Digest, files: frozenset[str] = frozenset()) -> Needs:
    return Needs(frozenset(digests), files)


def names(layout: Layout) -> list[str]:
    return [entry.name for entry in layout.entries()]


# --- what nothing needs ----------------------------------------------------------------------------------------------


def test_what_a_name_reaches_is_kept(layout: Layout) -> None:
    kept = add(layout, b"config", b"shared", b"one", name="a")
    gone = add(layout, b"config2", b"shared", b"x" * 9000)
    done = collect(layout, Needs)
    assert done.size >= 9000
    assert blobs(layout) == files_of(kept)
    assert layout.size(gone.digest) is None
    assert collect(layout, Needs).items == ()


def test_what_is_in_use_without_a_name_is_kept(layout: Layout) -> None:
    used = add(layout, b"config", b"disk")
    collect(layout, lambda: using(used.digest))
    assert len(blobs(layout)) == 3
    collect(layout, Needs)
    assert blobs(layout) == set()


def test_a_dry_run_tells_what_a_run_does(layout: Layout) -> None:
    add(layout, b"config", b"disk", name="a")
    add(layout, b"config2", b"x" * 9000)
    (layout.partial_dir / f"{hex_of(ABSENT)}.0123").write_bytes(b"x" * 9000)
    (layout.root / ".index.json.0123456789ab.tmp").write_bytes(b"half an index")
    (layout.derived_dir / f"{hex_of(ABSENT)}.{BOOT}.ram").write_bytes(b"x")
    (layout.root / "ovms.lock").touch()
    layout.quarantine_dir.mkdir()
    (layout.quarantine_dir / f"{hex_of(ABSENT)}.20260101T000000Z").write_bytes(b"x" * 9000)
    before = sorted(layout.root.rglob("*"))
    assert {item.kind for item in collect(layout, Needs, dry_run=True).items} == set(Kind) - {Kind.QUARANTINE}
    everything = replace(ALL, quarantine=True)
    told = collect(layout, Needs, everything, dry_run=True)
    assert {item.kind for item in told.items} == set(Kind)
    assert sorted(layout.root.rglob("*")) == before
    assert told.entries == tuple(layout.entries())
    assert collect(layout, Needs, everything) == told
    after = set(layout.root.rglob("*"))
    assert {path for path in before if path not in after} == {item.path for item in told.items}
    assert told.size == sum(size for _, size in told.by_kind().values())


def test_an_index_is_followed_to_what_is_there(layout: Layout) -> None:
    image = add(layout, b"config", b"disk")
    here = image.descriptor().to_json()
    there = {**here, "digest": ABSENT}
    raw = json.dumps({"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [there, here]}).encode()
    digest = layout.add_bytes(raw)
    add(layout, b"unrelated")
    layout.set_name("a", Descriptor(mediatypes.OCI_INDEX, digest, len(raw)))
    assert collect(layout, Needs).broken == ()
    assert blobs(layout) == {hex_of(digest), *files_of(image)}
    assert ABSENT in reach(layout, [digest]).digests
    assert collect(layout, lambda: using(image.digest), ALL).entries == (), "an instance uses what it holds"


def test_an_index_that_goes_in_circles(layout: Layout) -> None:
    # no real digests make a circle, but a store may lie about its blobs: then it is the damage that is told
    raw = json.dumps({"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": ABSENT, "size": 1}]}).encode()
    layout.path(ABSENT).write_bytes(raw)
    assert isinstance(reach(layout, [ABSENT]).broken[ABSENT], StoreCorrupt)


def test_a_manifest_that_another_artifact_calls_its_blob_is_followed(layout: Layout) -> None:
    """Such an artifact may come from any registry, and must not take the blobs of another one with it."""
    victim = add(layout, b"config", b"disk", name="victim")
    hostile = add(layout, b"config2", victim.raw, name="hostile")
    for order in ([hostile.digest, victim.digest], [victim.digest, hostile.digest]):
        assert {hex_of(digest) for digest in reach(layout, order).digests} == files_of(victim, hostile)
    assert collect(layout, Needs).items == ()
    assert blobs(layout) == files_of(victim, hostile)


@pytest.mark.spec("OCI-23")
def test_derived_files_go_with_their_blob(layout: Layout) -> None:
    add(layout, b"config", b"ram", name="a")
    ram, gone = hex_of(of_bytes(b"ram")), hex_of(ABSENT)
    for name in (f"{ram}.{BOOT}.ram", f"{ram}.lock", f"{ram}.00000000.ram", f"{ram}.{BOOT}.tmp", f"{gone}.{BOOT}.ram",
                 f"{gone}.lock", "notes.txt"):  # fmt: skip
        (layout.derived_dir / name).write_bytes(b"x")
    collect(layout, lambda: Needs(files=frozenset({f"{gone}.{BOOT}.ram"})))
    left = {path.name for path in layout.derived_dir.iterdir()}
    assert left == {f"{ram}.{BOOT}.ram", f"{ram}.lock", f"{gone}.{BOOT}.ram", "notes.txt"}
    collect(layout, lambda: using(of_bytes(b"x"), files=frozenset({f"{ram}.{BOOT}.ram"})), ALL)
    assert (layout.derived_dir / f"{ram}.{BOOT}.ram").exists(), "a VM has it mapped"
    used = add(layout, b"config", b"ram", name="a")
    collect(layout, lambda: using(used.digest), ALL)
    assert not (layout.derived_dir / f"{ram}.{BOOT}.ram").exists()


def test_broken_off_downloads(layout: Layout) -> None:
    old, new, here = (hex_of(of_bytes(bytes([i]))) for i in range(3))
    layout.add_bytes(bytes([2]))
    for name in (old, f"{old}.lock", new, f"{new}.lock", f"{new}.0123abcd", here, f"{hex_of(ABSENT)}.lock", "notes"):
        (layout.partial_dir / name).write_bytes(b"x" * 5000)
    os.utime(layout.partial_dir / old, (0, time.time() - 8 * DAY))
    collect(layout, Needs)
    assert {path.name for path in layout.partial_dir.iterdir()} == {new, f"{new}.lock", "notes"}
    collect(layout, Needs, ALL)
    assert {path.name for path in layout.partial_dir.iterdir()} == {"notes"}


def test_what_is_not_known_is_left(layout: Layout, tmp_path: Path) -> None:
    (layout.blob_dir / "a-directory").mkdir()
    (layout.blob_dir / "a-directory" / "file").touch()
    (layout.blob_dir / "README").touch()
    outside = tmp_path / "outside"
    outside.write_bytes(b"dear")
    (layout.blob_dir / hex_of(ABSENT)).symlink_to(outside)
    collect(layout, Needs, ALL)
    assert outside.read_bytes() == b"dear"
    assert blobs(layout) == {"a-directory", "README"}


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["changed", "missing", "nonsense"])
def test_while_a_manifest_in_use_cannot_be_read_every_blob_is_kept(layout: Layout, how: str) -> None:
    image = add(layout, b"config", b"disk", name="a")
    add(layout, b"unrelated")
    add(layout, b"named", name="b")
    if how == "changed":
        damage(layout, image.digest)
    else:
        layout.path(image.digest).unlink()
    if how == "nonsense":
        (layout.root / "index.json").write_text(
            (layout.root / "index.json").read_text().replace(image.digest, layout.add_bytes(b"no manifest"))
        )
    (layout.partial_dir / f"{hex_of(ABSENT)}.0123").write_bytes(b"x")
    before = blobs(layout)
    done = collect(layout, Needs)
    assert [broken.names for broken in done.broken] == [("a",)]
    assert blobs(layout) == before
    assert list(layout.partial_dir.iterdir()) == [], "what killed commands left needs no manifest"
    broken = done.broken[0].digest
    assert collect(layout, lambda: using(broken), ALL).entries == (), "what it is based on is not known"
    layout.remove_name("a")
    assert collect(layout, Needs).broken == ()
    assert len(blobs(layout)) == 2


def test_an_index_that_cannot_be_read_is_no_reason_to_remove_everything(layout: Layout) -> None:
    add(layout, b"config", name="a")
    (layout.root / "index.json").write_bytes(b"")
    with pytest.raises(StoreCorrupt):
        collect(layout, Needs, ALL)
    assert len(blobs(layout)) == 2


def test_an_error_of_needs_is_not_swallowed(layout: Layout) -> None:
    def needs() -> Needs:
        raise OvmsError("the records cannot be read")

    add(layout, b"config")
    with pytest.raises(OvmsError, match="records"):
        collect(layout, needs)
    assert len(blobs(layout)) == 2


# --- artifacts that nothing uses -------------------------------------------------------------------------------------


def test_unused_artifacts_go_and_what_instances_are_based_on_stays(layout: Layout) -> None:
    base = add(layout, b"base", b"disk", name="base")
    middle = add(layout, b"middle", b"disk", b"diff", name="middle", subject=base.descriptor())
    top = add(layout, b"top", b"disk", b"diff", b"ram", name="top", subject=middle.descriptor())
    sibling = add(layout, b"sibling", b"disk", b"other", name="sibling", subject=base.descriptor())
    signature = add(layout, b"{}", b"sig", name="sig", subject=top.descriptor(), artifact_type="application/sig")
    add(layout, b"{ }", b"sig2", name="sig-2", subject=sibling.descriptor(), artifact_type="application/sig")
    done = collect(layout, lambda: using(top.digest), ALL)
    assert [entry.name for entry in done.entries] == ["sibling", "sig-2"]
    assert names(layout) == ["base", "middle", "top", "sig"]
    assert blobs(layout) == files_of(base, middle, top, signature)
    collect(layout, Needs, ALL)
    assert names(layout) == []
    assert blobs(layout) == set()


def test_what_is_young_stays_when_asked(layout: Layout) -> None:
    old, young = add(layout, b"old", name="old"), add(layout, b"young", name="young")
    past = time.time() - 2 * DAY
    os.utime(layout.path(old.digest), (past, past))
    collect(layout, Needs, Options(unused=True, since=time.time() - DAY))
    assert names(layout) == ["young"]
    assert blobs(layout) == files_of(young)


def test_entries_without_a_name_are_kept_until_all_that_is_unused_goes(layout: Layout) -> None:
    image = add(layout, b"config")
    index = {"schemaVersion": 2, "manifests": [image.descriptor().to_json()]}
    (layout.root / "index.json").write_text(json.dumps(index))
    assert collect(layout, Needs).items == ()
    collect(layout, Needs, ALL)
    assert blobs(layout) == set()


def test_what_belongs_to_another_artifact_lives_as_long_as_that(layout: Layout) -> None:
    base = add(layout, b"base", name="base")
    other = add(layout, b"other", name="other")
    signature = add(layout, b"{}", b"sig", subject=base.descriptor(), artifact_type="application/sig")
    deeper = add(layout, b"{}", b"deeper", subject=signature.descriptor(), artifact_type="application/sig")
    named = add(layout, b"{}", b"named", name="sig", subject=base.descriptor(), artifact_type="application/sig")
    snapshot = add(layout, b"snapshot", subject=base.descriptor())
    kept = add(layout, b"{}", b"kept", subject=other.descriptor(), artifact_type="application/sig")
    index = layout.read_index()
    index["manifests"] += [image.descriptor().to_json() for image in (deeper, signature, snapshot, kept)]
    layout.write_index(index)
    assert collect(layout, Needs) == Plan()
    layout.remove_name("base")
    assert collect(layout, lambda: using(base.digest)) == Plan(), "an instance uses it"
    gone = collect(layout, Needs)
    assert {entry.descriptor.digest for entry in gone.entries} == {signature.digest, deeper.digest}
    assert blobs(layout) == files_of(other, named, snapshot, kept)
    collect(layout, lambda: using(other.digest), ALL)
    assert blobs(layout) == files_of(other, kept)


def test_names_go_before_blobs_and_manifests_before_what_they_name(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = add(layout, *(bytes([i]) for i in range(20)), name="a")
    steps: list[str] = []
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        steps.append(path.name)
        assert names(layout) == []
        original(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    collect(layout, Needs, ALL)
    assert steps[0] == hex_of(image.digest)
    assert len(steps) == 21


# --- with others -----------------------------------------------------------------------------------------------------


def test_nobody_begins_to_use_a_blob_while_the_collector_works(layout: Layout) -> None:
    order: list[str] = []
    asked, use = threading.Event(), threading.Event()

    def needs() -> Needs:
        asked.set()
        assert not use.wait(0.1)
        order.append("collected")
        return Needs()

    def user() -> None:
        asked.wait(5)
        with layout.using():
            use.set()
            order.append("used")

    thread = threading.Thread(target=user)
    thread.start()
    collect(layout, needs)
    thread.join()
    assert order == ["collected", "used"]


def test_who_adds_blobs_is_told_of(layout: Layout) -> None:
    add(layout, b"config")
    with layout.using(), pytest.raises(Locked, match=r"another ovm process.* adds or uses blobs"):
        collect(layout, Needs, wait=0.05)
    assert len(blobs(layout)) == 2


def test_a_short_use_is_waited_for(layout: Layout) -> None:
    add(layout, b"config")
    entered = threading.Event()

    def user() -> None:
        with layout.using():
            entered.set()
            time.sleep(0.1)

    thread = threading.Thread(target=user)
    thread.start()
    entered.wait(5)
    collect(layout, Needs)
    thread.join()
    assert blobs(layout) == set()


def test_living_staging_is_left(layout: Layout) -> None:
    with fsutil.staging_dir(layout.staging_root) as staging:
        collect(layout, Needs, ALL)
        assert staging.exists()
