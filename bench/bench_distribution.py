"""Pull and push beside skopeo, oras and crane, against Debian's docker-registry on loopback; all in one run.

Each round runs every tool once, in turn, so that noise falls on all alike. ``skopeo`` is on the PATH; ``oras`` and ``crane`` are
taken from there too, or from ``$OVMS_CACHE/tools``, and left out where they are not. The floor is a copy of the same bytes
and their SHA-256 on this machine. OVMS_BENCH_MIB (512) and OVMS_BENCH_ROUNDS (5) make it shorter.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.artifacts import of_layers
from support.registry import Registry

from ovms.artifact import model
from ovms.oci.layout import Layout
from ovms.spec import mediatypes
from ovms.spec.manifest import DiskFormat, PartKind

OVM = Path(sys.executable).parent / "ovm"
BLOB_MIB = int(os.environ.get("OVMS_BENCH_MIB", "512"))
ROUNDS = int(os.environ.get("OVMS_BENCH_ROUNDS", "5"))
LARGE_GIB = int(os.environ.get("OVMS_BENCH_LARGE_GIB", "8"))


#: As a user's: compiled modules are kept.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Took:
    """Wall and CPU seconds, and the most memory in MB, of one command."""

    wall: float
    cpu: float
    rss: float


def run(argv: Sequence[object], **env: str) -> Took:
    """Runs a command to its end; it has to succeed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [str(a) for a in argv], env={**ENVIRONMENT, **env}, stdout=subprocess.DEVNULL, stderr=said
        )
        watching = threading.Thread(target=watch, args=(child.pid, most := [0.0]), daemon=True)
        watching.start()
        _, status, usage = os.wait4(child.pid, 0)
        took = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        watching.join()
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{argv}: {said.read().decode(errors='replace')}")
    return Took(took, usage.ru_utime + usage.ru_stime, most[0])


def watch(pid: int, most: list[float]) -> None:
    """The most memory of a process, in MB. What wait4 tells is at least that of whoever started it."""
    try:
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            most[0] = max(most[0], *(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0.0)
            time.sleep(0.05)
    except OSError:
        return


def noise(path: Path, mib: int) -> str:
    """A file of bytes that can't be compressed. Returns its digest."""
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(mib):
            data = os.urandom(1 << 20)
            hasher.update(data)
            file.write(data)
    return "sha256:" + hasher.hexdigest()


def make(layout: Layout, scratch: Path, sizes: Sequence[int], name: str) -> None:
    """An artifact of raw layers, which a build would refuse as a chain: what is measured is transfer alone."""
    disks = []
    for i, mib in enumerate(sizes):
        path = scratch / f"noise-{i}"
        noise(path, mib)
        with path.open("rb") as file:
            digest, size, _ = layout.add_file(file.fileno(), "noise")
        path.unlink()
        disks.append(model.part_descriptor(PartKind.DISK, digest, size, format=DiskFormat.QCOW2, number=i))
    document = {
        "schemaVersion": 1,
        "mediaType": mediatypes.MANIFEST,
        "name": "bench",
        "version": "1",
        "diskLayers": [{"ref": d.digest, "format": "qcow2"} for d in disks],
    }
    artifact = model.compose(layout, document, model.Parts(disks=tuple(disks)))
    layout.set_name(name, artifact.image.descriptor())


def floor(source: Path, target: Path) -> Took:
    """Copy, SHA-256 and fsync of every blob: what any client has to do."""
    began, cpu = time.perf_counter(), time.process_time()
    target.mkdir()
    buffer = bytearray(256 * 1024)
    view = memoryview(buffer)
    for path in source.iterdir():
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as file, (target / path.name).open("wb", buffering=0) as out:
            while count := file.readinto(buffer):
                hasher.update(view[:count])
                out.write(view[:count])
            os.fsync(out.fileno())
    return Took(time.perf_counter() - began, time.process_time() - cpu, 0.0)


def find(name: str) -> str | None:
    cache = Path(os.environ.get("OVMS_CACHE") or Path(__file__).parents[1] / ".cache") / "tools" / name
    return str(cache) if cache.exists() else shutil.which(name)


def clean(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    os.sync()  # nobody pays for what another has left to be written
    return path


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ovms-bench-", dir=os.environ.get("OVMS_BENCH_DIR")) as directory:
        scratch = Path(directory)
        registry = Registry(scratch / "registry")
        try:
            figures = measure(scratch, registry)
        finally:
            registry.close()
    print(json.dumps({"bench": "distribution", "figures": figures}))


def measure(scratch: Path, registry: Registry) -> dict[str, float]:
    root = scratch / "root"
    layout = Layout(root / "store")
    make(layout, scratch, [BLOB_MIB] * 4, f"{registry.host}/bench:1")
    env = {"OVMS_ROOT": str(root)}
    store, total = layout.root, BLOB_MIB * 4
    ref = f"{registry.host}/bench:1"

    def pull_ovm() -> Took:
        return run([OVM, "pull", ref], OVMS_ROOT=str(clean(scratch / "pull")))

    pulls: dict[str, Callable[[], Took]] = {
        "ovm": pull_ovm,
        "skopeo": lambda: run(
            ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{ref}", f"oci:{clean(scratch / 'skopeo')}:1"]
        ),
    }

    def push_ovm(host: str) -> Took:
        run([OVM, "tag", ref, f"{host}/bench:1"], **env)
        return run([OVM, "push", f"{host}/bench:1"], **env)

    # each to a registry of its own: nothing can be mounted, whatever a tool remembers
    pushes: dict[str, Callable[[str], Took]] = {
        "ovm": push_ovm,
        "skopeo": lambda host: run(
            ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{store}:{ref}", f"docker://{host}/bench:1"]
        ),
    }

    if oras := find("oras"):
        pulls["oras"] = lambda: run(
            [oras, "copy", "--from-plain-http", "--to-oci-layout", ref, f"{clean(scratch / 'oras')}:1"]
        )
    if crane := find("crane"):
        pulls["crane"] = lambda: run([crane, "pull", "--insecure", "--format=oci", ref, clean(scratch / "crane")])
    run([OVM, "push", ref], **env)
    table: dict[str, dict[str, list[Took]]] = {"pull": {}, "push": {}}
    floors = []
    for _ in range(ROUNDS):
        for tool, action in pulls.items():
            table["pull"].setdefault(tool, []).append(action())
        floors.append(floor(layout.blob_dir, clean(scratch / "floor")))
        for tool, send in pushes.items():
            target = Registry(clean(scratch / "target"))
            try:
                table["push"].setdefault(tool, []).append(send(target.host))
            finally:
                target.close()
    repull = [run([OVM, "pull", ref], **env).wall * 1000 for _ in range(5)]
    wall = {
        what: {tool: statistics.median(took.wall for took in runs) for tool, runs in tools.items()}
        for what, tools in table.items()
    }
    print(f"{total} MiB in 4 blobs; medians of {ROUNDS} rounds\n")
    print(f"{'':16}{'MB/s':>8}{'wall s':>8}{'CPU s':>8}{'RSS MB':>8}")
    for what, tools in [*table.items(), ("floor", {"copy+sha256": floors})]:
        for tool, runs in tools.items():
            middle = statistics.median(took.wall for took in runs)
            cpu = statistics.median(took.cpu for took in runs)
            rss = max(took.rss for took in runs)
            print(f"{what + ' ' + tool:16}{total * 1.048576 / middle:8.0f}{middle:8.2f}{cpu:8.2f}{rss:8.0f}")
    bottom = statistics.median(took.wall for took in floors)
    figures = {
        **{f"pull_vs_{tool}": wall["pull"][tool] / wall["pull"]["ovm"] for tool in wall["pull"] if tool != "ovm"},
        "push_vs_skopeo": wall["push"]["skopeo"] / wall["push"]["ovm"],
        "pull_vs_floor": bottom / wall["pull"]["ovm"],
        "repull_ms": statistics.median(repull),
    }
    figures.update(small(scratch, registry))
    figures.update(large(scratch, registry))
    return {name: round(value, 2) for name, value in figures.items()}


def small(scratch: Path, registry: Registry) -> dict[str, float]:
    """200 blobs of 4 KiB, in four artifacts of 50: a disk has at most 64 layers."""
    layout = Layout(scratch / "small" / "store")
    name = f"{registry.host}/small"
    env = {"OVMS_ROOT": str(scratch / "small")}
    for number in range(4):
        of_layers(layout, f"{name}:{number}", [os.urandom(4096) for _ in range(50)])
        run([OVM, "push", f"{name}:{number}"], **env)
    names = [f"{name}:{number}" for number in range(4)]
    crane = find("crane")
    times: dict[str, list[float]] = {}

    def pulls(tool: str, argv: list[object], target: Path) -> None:
        """All by one command, and by one command each."""
        env = {"OVMS_ROOT": str(target)}
        last = [target] if tool == "crane" else []
        clean(target)
        times.setdefault(f"{tool}, one command", []).append(run([*argv, *names, *last], **env).wall)
        clean(target)
        each = sum(run([*argv, one, *last], **env).wall for one in names)
        times.setdefault(f"{tool}, a command each", []).append(each)

    for _ in range(2 * ROUNDS + 1):
        pulls("ovm", [OVM, "pull"], scratch / "small-pull")
        if crane:
            pulls("crane", [crane, "pull", "--insecure", "--format=oci"], scratch / "small-crane")
    medians = {what: statistics.median(walls) for what, walls in times.items()}
    print("\n200 blobs of 4 KiB in 4 artifacts")
    for what, wall in medians.items():
        print(f"{what:24}{wall:8.2f} s")
    figures = {"small_s": medians["ovm, one command"]}
    if crane:
        figures["small_vs_crane"] = medians["crane, one command"] / medians["ovm, one command"]
        figures["small_each_vs_crane"] = medians["crane, a command each"] / medians["ovm, a command each"]
    return figures


def large(scratch: Path, registry: Registry) -> dict[str, float]:
    """One blob that grows: time should be linear, and memory flat."""
    print(f"\n{'GiB':>8}{'wall s':>8}{'s/GiB':>8}{'RSS MB':>8}")
    rss = 0.0
    for tenths in (1, 10, LARGE_GIB * 10):
        clean(scratch / "large")
        layout = Layout(scratch / "large" / "store")
        name = f"{registry.host}/large{tenths}:1"
        make(layout, scratch, [tenths * 1024 // 10], name)
        run([OVM, "push", name], OVMS_ROOT=str(scratch / "large"))
        clean(scratch / "large")
        took = run([OVM, "pull", name], OVMS_ROOT=str(clean(scratch / "large-pull")))
        rss = max(rss, took.rss)
        print(f"{tenths / 10:8.1f}{took.wall:8.2f}{took.wall / tenths * 10:8.2f}{took.rss:8.0f}")
        clean(scratch / "large-pull")
    return {f"rss_mb_{LARGE_GIB}gib": rss}


if __name__ == "__main__":
    main()
