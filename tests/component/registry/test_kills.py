"""Pull, push, build and prune are killed at random points: the store is sound every time, and a retry works.

``OVMS_KILLS`` sets how often each is killed, ``OVMS_SEED`` repeats the times of a run (which a machine repeats roughly).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ram
from support.artifacts import with_ram, write_inputs, write_manifest
from support.killed import Killer
from support.registry import Registry
from support.stores import add, blobs, files_of

from ovms.artifact.build import Builder
from ovms.artifact.model import Artifact
from ovms.errors import ReferenceNotFound
from ovms.oci import transfer
from ovms.oci.collector import Needs, Options, collect
from ovms.oci.fsck import Uses, check
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient

KILLS = int(os.environ.get("OVMS_KILLS", "200"))
#: Runs that ended before they were killed are repeated, up to so many times the number of kills.
TRIES = 10
#: Runs that are not killed, to know how long one takes: so many at first, and then one for every so many.
MEASURED = 5
MEASURE_EVERY = 20

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as killer:
        yield killer


@pytest.fixture
def times() -> random.Random:
    seed = int(os.environ.get("OVMS_SEED") or random.randrange(2**32))
    print(f"OVMS_SEED={seed}")
    return random.Random(seed)


def no_registry(host: str) -> RegistryClient:
    raise AssertionError(host)


def make(directory: Path, layout: Layout, name: str) -> Artifact:
    """An artifact of eight blobs, from 22 bytes to 1.5 MB."""
    write_inputs(directory)
    (directory / "base.img").write_bytes(random.Random(1).randbytes(1_536_000))
    (directory / "initrd.img").write_bytes(random.Random(2).randbytes(300_000))
    return Builder(layout, no_registry).build(write_manifest(directory), name=name)


def content(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in layout.blob_dir.iterdir()}


def is_sound(layout: Layout) -> None:
    """Nothing is wrong but what the next command sweeps."""
    report = check(layout, Uses)
    assert [finding.to_json() for finding in report.findings if not finding.fault.harmless] == []
    assert not report.busy, "nobody is left who works"


def is_clean(layout: Layout) -> None:
    """Nothing at all is wrong, after a clean-up that keeps what has a name."""
    collect(layout, Needs)
    assert check(layout, Uses).findings == []


def kill_often(
    killer: Killer,
    times: random.Random,
    operation: str,
    prepare: Callable[[int], dict[str, Any]],
    after: Callable[[int, dict[str, Any]], None],
) -> None:
    """Kills an operation at times that are spread evenly over how long it takes; *after* looks, and tries again."""
    took: list[float] = []

    def measure() -> None:
        # Now and again: others work on this machine, too.
        number = -1 - len(took)
        arguments = prepare(number)
        outcome = killer.run(operation, **arguments)
        assert (outcome.killed, outcome.code) == (False, 0)
        took.append(outcome.took)
        after(number, arguments)

    for _ in range(MEASURED):
        measure()
    kills = tries = 0
    while kills < KILLS:
        tries += 1
        assert tries <= TRIES * KILLS, f"of {tries} runs, only {kills} could be killed in time: {took}"
        if tries % MEASURE_EVERY == 0:
            measure()
        arguments = prepare(tries)
        outcome = killer.run(operation, times.uniform(0, statistics.median(took[-MEASURED:])), **arguments)
        assert outcome.killed or outcome.code == 0
        kills += outcome.killed
        after(tries, arguments)
    typical = statistics.median(took) * 1000
    print(f"{operation}: {kills} kills over {typical:.1f} ms, {tries - kills} runs ended before")


@pytest.mark.spec("OCI-22")
def test_pulls(killer: Killer, times: random.Random, registry: Registry, tmp_path: Path) -> None:
    source = Layout(tmp_path / "source")
    artifact = make(tmp_path / "project", source, "web:1")
    ref = Reference(registry.host, "kills/pull", "1")
    with RegistryClient(registry.host) as client:
        transfer.push(source, client, ref, artifact.digest)
    wanted = content(source)

    def prepare(number: int) -> dict[str, Any]:
        return {"root": str(tmp_path / "store"), "reference": str(ref), "name": "web:1"}

    def after(number: int, arguments: dict[str, Any]) -> None:
        layout = Layout(tmp_path / "store")
        is_sound(layout)
        assert set(blobs(layout)) <= set(wanted)
        if number % 4 == 0:
            collect(layout, Needs)
        assert killer.run("pull", **arguments).code == 0
        is_sound(layout)
        assert [entry.name for entry in layout.entries()] == ["web:1"]
        assert content(layout) == wanted
        is_clean(layout)
        assert list(layout.partial_dir.iterdir()) == []
        shutil.rmtree(layout.root)

    kill_often(killer, times, "pull", prepare, after)


@pytest.mark.spec("OCI-22", "OCI-29", "RAM-56")
@pytest.mark.parametrize("ram_snapshot", ["reused", "left out"])
def test_pulls_of_ram_snapshots(
    ram_snapshot: str, killer: Killer, times: random.Random, registry: Registry, tmp_path: Path
) -> None:
    """One whose chunks are partly here, and one that is left out; whatever is killed, the next pull brings all of it."""
    source, template = Layout(tmp_path / "source"), Layout(tmp_path / "template")
    pages = {at: random.Random(at).randbytes(65536) for at in range(0, 1024, 16)}
    header = ram.header(memory=4 << 20)
    with_ram(template, "old:1", ram.blob(pages, header, chunk_pages=16))
    changed = {at: data if at % 128 else data[::-1] for at, data in pages.items()}
    new = with_ram(source, "new:1", ram.blob(changed, header, chunk_pages=16), disk=random.Random(1).randbytes(300_000))
    ref = Reference(registry.host, f"kills/ram-{ram_snapshot.replace(' ', '-')}", "1")
    with RegistryClient(registry.host) as client:
        transfer.push(source, client, ref, new.digest)
    wanted = {**content(template), **{k: v for k, v in content(source).items() if k in files_of(new.image)}}

    def prepare(number: int) -> dict[str, Any]:
        shutil.copytree(template.root, tmp_path / "store", copy_function=os.link)
        return {
            "root": str(tmp_path / "store"), "reference": str(ref), "name": "new:1", "ram": ram_snapshot != "left out"
        }  # fmt: skip

    def after(number: int, arguments: dict[str, Any]) -> None:
        layout = Layout(tmp_path / "store")
        is_sound(layout)
        if number % 4 == 0:
            collect(layout, Needs)
            is_sound(layout)
        assert killer.run("pull", **{**arguments, "ram": True}).code == 0
        assert content(layout) == wanted
        is_clean(layout)
        assert list(layout.partial_dir.iterdir()) == []
        shutil.rmtree(layout.root)

    kill_often(killer, times, "pull", prepare, after)


def test_pushes(killer: Killer, times: random.Random, registry: Registry, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    artifact = make(tmp_path / "project", layout, "web:1")
    wanted = content(layout)

    def prepare(number: int) -> dict[str, Any]:
        name = f"kills/push-{'m' if number < 0 else 'k'}{abs(number)}"
        return {"root": str(layout.root), "reference": f"{registry.host}/{name}:1", "digest": artifact.digest}

    def after(number: int, arguments: dict[str, Any]) -> None:
        is_sound(layout)
        ref = Reference.parse(arguments["reference"])
        there = Layout(tmp_path / "there")
        with RegistryClient(registry.host) as client:
            try:
                transfer.pull(there, client, ref)
            except ReferenceNotFound:
                pass  # not yet visible; what is visible is whole
            else:
                assert content(there) == wanted
            assert killer.run("push", **arguments).code == 0
            transfer.pull(there, client, ref)
        assert content(there) == wanted
        is_sound(there)
        shutil.rmtree(there.root)
        assert content(layout) == wanted

    kill_often(killer, times, "push", prepare, after)
    is_clean(layout)


def test_builds(killer: Killer, times: random.Random, tmp_path: Path) -> None:
    """The name stands for an artifact before: it stands for that one or for the new one, and never for less."""
    layout = Layout(tmp_path / "store")
    project = tmp_path / "project"
    current = [make(project, layout, "web:1").digest]

    def prepare(number: int) -> dict[str, Any]:
        version = f"{'m' if number < 0 else 'k'}{abs(number)}"
        (project / "base.img").write_bytes(random.Random(version).randbytes(614_400))
        (project / "initrd.img").write_bytes(random.Random(version).randbytes(200_000))
        return {"root": str(layout.root), "manifest": str(write_manifest(project, version=version)), "name": "web:1"}

    def after(number: int, arguments: dict[str, Any]) -> None:
        is_sound(layout)
        names = [entry.name for entry in layout.entries()]
        assert names == ["web:1"]
        found = layout.find("web:1")
        assert found is not None
        version = json.loads(layout.read(layout.manifest(found.digest).config.digest, "x", max_size=1 << 20))["version"]  # type: ignore[union-attr]
        assert found.digest == current[0] or version == json.loads(Path(arguments["manifest"]).read_text())["version"]
        if number % 4 == 0:
            collect(layout, Needs)
        assert killer.run("build", **arguments).code == 0
        is_sound(layout)
        found = layout.find("web:1")
        assert found is not None
        current[0] = found.digest
        is_clean(layout)
        image = layout.manifest(found.digest)
        assert blobs(layout) == files_of(image)  # type: ignore[arg-type]

    kill_often(killer, times, "build", prepare, after)


def test_prunes(killer: Killer, times: random.Random, tmp_path: Path) -> None:
    template = Layout(tmp_path / "template")
    used = make(tmp_path / "project", template, "web:1").image
    base = add(template, b"base", b"disk", name="base:1")
    child = add(template, b"child", b"disk", b"diff", name="child:1", subject=base.descriptor())
    for i in range(20):
        add(template, b"config", bytes([i]) * 1000, b"disk", name=f"unused:{i}" if i % 2 else None)
    kept = files_of(used)
    layout = Layout(tmp_path / "store")
    needs = Needs(frozenset({used.digest}))

    def prepare(number: int) -> dict[str, Any]:
        shutil.rmtree(layout.root)
        # blobs and indexes are replaced and never written to, so links to them will do
        shutil.copytree(template.root, layout.root, copy_function=os.link)
        (layout.staging_root / "0123").mkdir()
        (layout.staging_root / "0123" / ".lock").touch()
        (layout.partial_dir / ("0" * 64)).touch()
        return {"root": str(layout.root), "used": used.digest}

    def after(number: int, arguments: dict[str, Any]) -> None:
        is_sound(layout)
        assert kept <= blobs(layout)
        names = {entry.name for entry in layout.entries()}
        assert "web:1" in names
        if "child:1" in names:
            assert files_of(base, child) <= blobs(layout)
        told = collect(layout, lambda: needs, Options(unused=True), dry_run=True)
        before = blobs(layout)
        assert killer.run("prune", **arguments).code == 0
        assert before - blobs(layout) == {item.path.name for item in told.items if item.kind == "blobs"}
        assert [entry.name for entry in layout.entries()] == ["web:1"]
        assert blobs(layout) == kept
        assert check(layout, Uses).findings == []

    kill_often(killer, times, "prune", prepare, after)
