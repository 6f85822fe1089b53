"""The local store as its user sees it: room, clean-up, check and repair, beside instances."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import stores
from support.cli import Ovm
from support.guests import Console

from ovms.oci.layout import Layout
from ovms.spec.digest import Digest, hex_of

RUN = ("run", "-d", "--accel", "tcg", "--memory", "32m")


@pytest.fixture
def built(ovm: Ovm, project: Path) -> str:
    return ovm.ok("build", project, "-t", "echo:1", "--no-provenance").out.strip()


@pytest.fixture
def store(ovm: Ovm, built: str) -> Layout:
    return Layout(ovm.root / "store")


def kernel_of(ovm: Ovm) -> Digest:
    return Digest(ovm.ok("inspect", "echo:1").json["manifest"]["kernel"]["ref"])


def names(ovm: Ovm) -> set[str]:
    return {entry["name"] for entry in ovm.ok("ls", "--json").json}


@pytest.mark.long
def test_prune_knows_snapshots_their_bases_and_instances(ovm: Ovm, store: Layout, project: Path) -> None:
    instance = ovm.ok(*RUN, "--name", "vm", "echo:1").out.strip()
    Console(ovm.root / "instances" / instance).wait_for("READY")
    ovm.ok("snapshot", "vm", "-t", "echo:snap")
    ovm.ok("rm", "-f", "vm")
    clone = ovm.ok(*RUN[:2], "--accel", "tcg", "--name", "clone", "echo:snap").out.strip()
    stores.add(store, b"config", b"disk", name="unused:1")
    stores.add(store, b"config", b"garbage" * 1000)
    assert ovm("prune", "--filter", "until=1h", "--json").code == 2

    before = sorted(store.root.rglob("*"))
    told = ovm.ok("prune", "--all", "--dry-run", "--json").json
    assert sorted(store.root.rglob("*")) == before
    assert [entry["name"] for entry in told["artifacts"]] == ["unused:1"]
    assert told["by_kind"]["blobs"]["count"] == 5
    assert "freed" in ovm.ok("prune").out
    assert names(ovm) == {"echo:1", "echo:snap", "unused:1"}
    ovm.ok("prune", "--all", "--filter", "until=1h")
    assert names(ovm) == {"echo:1", "echo:snap", "unused:1"}
    shown = ovm.ok("prune", "--all").out.splitlines()
    assert shown[0] == "removed artifact unused:1"
    assert shown[-1].startswith("freed ")
    assert names(ovm) == {"echo:1", "echo:snap"}
    (memory,) = store.derived_dir.glob("*.ram")
    assert Console(ovm.root / "instances" / clone).ping() == 1
    ovm.ok("snapshot", "clone", "-t", "echo:again")

    ovm.ok("stop", "-t", "0", "clone")
    ovm.ok("prune", "--all")
    assert names(ovm) == {"echo:1", "echo:snap"}, "a stopped instance needs its artifact, too"
    assert not memory.exists()
    ovm.ok("rm", "clone")
    ovm.ok("prune", "-a")
    assert stores.blobs(store) == set()


def test_df_tells_what_could_be_freed(ovm: Ovm, store: Layout) -> None:
    ovm.ok(*RUN, "--name", "vm", "echo:1")
    stores.add(store, b"config", os.urandom(20_000), name="unused:1")
    stores.add(store, b"config", os.urandom(30_000))
    value = ovm.ok("df", "--json").json
    rows = {row["kind"]: row for row in value["rows"]}
    assert (rows["artifacts"]["count"], rows["artifacts"]["active"]) == (2, 1)
    assert 20_000 <= rows["artifacts"]["reclaimable"] < rows["artifacts"]["size"]
    assert rows["unnamed blobs"]["reclaimable"] == rows["unnamed blobs"]["size"] >= 30_000
    assert (rows["instances"]["count"], rows["instances"]["active"], rows["instances"]["reclaimable"]) == (1, 1, 0)
    assert [one["name"] for one in value["instances"]] == ["vm"]
    assert value["instances"][0]["overlays"] > 0
    table = ovm.ok("df", "-v").out
    assert table.splitlines()[0].split() == ["TYPE", "TOTAL", "IN", "USE", "SIZE", "RECLAIMABLE"]
    assert "unused:1" in table
    freed = ovm.ok("prune", "--all", "--json").json["freed"]
    assert freed == value["reclaimable"]
    assert ovm.ok("df", "--json").json["reclaimable"] == 0


def test_what_keeps_what_is_told(ovm: Ovm, store: Layout) -> None:
    ovm.ok(*RUN, "--name", "vm", "echo:1")
    count = len(stores.blobs(store))
    done = ovm.ok("prune", "-a")
    assert "an artifact is used by instances, also stopped ones (vm)" in done.err
    ovm.ok("rmi", "-f", "echo:1")
    row = {row["kind"]: row for row in ovm.ok("df", "--json").json["rows"]}["unnamed blobs"]
    assert (row["count"], row["active"], row["reclaimable"]) == (count, count, 0)
    assert "vm" in ovm.ok("prune", "-a").err
    ovm.ok("rm", "-f", "vm")
    assert ovm.ok("prune", "-a").err == ""


def test_the_quarantine_can_be_emptied(ovm: Ovm, store: Layout, built: str) -> None:
    stores.damage(store, store.add_bytes(b"x" * 5000))
    bad = store.path(kernel_of(ovm))
    bad.unlink()
    bad.mkdir()
    (bad / "file").write_bytes(b"in it")
    ovm("fsck", "--repair")
    row = {row["kind"]: row for row in ovm.ok("df", "--json").json["rows"]}["quarantine"]
    assert (row["count"], row["reclaimable"]) == (2, row["size"])
    ovm.ok("prune", "-a")
    assert len(list(store.quarantine_dir.iterdir())) == 2, "nobody asked for it"
    told = ovm.ok("prune", "--quarantine", "-n", "--json").json
    assert told["by_kind"]["quarantine"] == {"count": 2, "size": row["size"]}
    assert len(list(store.quarantine_dir.iterdir())) == 2
    assert ovm.ok("prune", "--quarantine").out.count("removed ovms.quarantine/") == 2
    assert list(store.quarantine_dir.iterdir()) == []


def test_fsck_finds_repairs_and_says_what_is_left(ovm: Ovm, store: Layout, built: str, project: Path) -> None:
    assert ovm.ok("fsck").out.splitlines()[-1].endswith(": sound")
    ovm.ok(*RUN, "--name", "vm", "echo:1")
    kernel = kernel_of(ovm)
    stores.damage(store, kernel)
    done = ovm("fsck", "--json")
    assert (done.code, done.json["sound"]) == (10, False)
    assert [f["fault"] for f in done.json["findings"]] == ["blob-corrupt", "artifact-incomplete"]
    assert ovm.ok("fsck", "--quick", "--json").json["hashed"] == 0
    done = ovm("fsck", "--repair")
    assert done.code == 10
    assert "ovm build … -t echo:1" in done.out
    assert "the instance vm needs" in done.out
    assert {path.name.partition(".")[0] for path in store.quarantine_dir.iterdir()} == {hex_of(kernel)}
    assert ovm("tag", built, "other:1").code == 4, "what is not whole gets no name"
    done = ovm(*RUN, "--json", "echo:1")
    assert (done.code, done.error["code"]) == (4, "blob-not-found")
    store.path(kernel).write_bytes(b"cut")
    done = ovm(*RUN, "--json", "echo:1")
    assert (done.code, done.error["code"]) == (10, "digest-mismatch"), "the file or its descriptor: only hashing tells"
    assert "ovm fsck" in done.error["hint"]
    ovm("fsck", "--repair", "--quick")
    ovm.ok("build", project, "-t", "echo:1", "--no-provenance")
    ovm.ok("fsck")


def test_a_damaged_index_and_marker(ovm: Ovm, store: Layout, built: str) -> None:
    ovm.ok("prune")
    store.index.write_bytes(b"damaged")
    store.index_copy.write_bytes(b"damaged")
    done = ovm("ls", "--json")
    assert (done.code, "ovm fsck --repair" in done.error["hint"]) == (10, True)
    store.marker.write_bytes(b"")
    assert ovm("ls").code == 10
    assert ovm("fsck").code == 10
    shown = ovm.ok("fsck", "--repair").out
    assert f"ovm tag {built} NAME" in shown
    ovm.ok("prune")
    ovm.ok("tag", built, "echo:1")
    assert [entry["name"] for entry in ovm.ok("ls", "--json").json] == ["echo:1"]
    ovm.ok("fsck")


def test_a_lost_manifest_is_given_up_by_its_name_or_digest(ovm: Ovm, store: Layout, built: str) -> None:
    store.path(Digest(built)).unlink()
    done = ovm("prune")
    assert done.code == 10
    assert "what echo:1 needs is not known" in done.err
    assert len(stores.blobs(store)) == 3
    ovm.ok("rmi", built)
    assert stores.blobs(store) == set()


@pytest.mark.long
def test_others_at_work(ovm: Ovm, store: Layout, built: str) -> None:
    stores.add(store, b"garbage")
    with store.using():
        done = ovm("prune", "--json")
        assert (done.code, done.error["code"]) == (5, "locked")
        assert "nothing was changed" in done.error["message"]
        done = ovm("rmi", "echo:1", "--json")
        assert (done.code, done.json["freed"]) == (0, None)
        assert "ovm prune" in done.err
        assert ovm.ok("fsck").out
        assert len(stores.blobs(store)) == 6
    ovm.ok("prune")
    assert stores.blobs(store) == set()


def test_an_instance_s_record_that_cannot_be_read(ovm: Ovm, store: Layout) -> None:
    instance = ovm.ok(*RUN, "--name", "vm", "echo:1").out.strip()
    record = ovm.root / "instances" / instance / "record.json"
    whole = record.read_bytes()
    record.write_bytes(b"damaged")
    stores.add(store, b"garbage")
    try:
        assert ovm("prune", "-a").code == 10
        assert len(stores.blobs(store)) == 6
        done = ovm("fsck", "--json")
        assert [f["fault"] for f in done.json["findings"]] == ["record-damaged"]
        assert done.code == 10
        ovm.ok("df")
    finally:
        record.write_bytes(whole)
