"""Pull and push beside skopeo, oras and crane, against Debian's docker-registry on loopback; all in one run.

Each round runs every tool once, so that noise falls on all alike, and in another order, for a run pays for the one before it:
memory that this machine's own host has taken back costs whoever asks for it first up to two seconds for each GiB. So a
first round, which brings it all back, doesn't count, and with the number of rounds a multiple of the tools' every tool comes
as often in each place and after each other tool. ``skopeo`` is on the PATH; ``oras`` and ``crane`` are taken from there too,
or from ``$OVMS_CACHE/tools``, and left out where they are not. The floor is a copy of the same bytes and their SHA-256 on this
machine. OVMS_BENCH_MIB (512) and OVMS_BENCH_ROUNDS (8) make it shorter.
"""

from __future__ import annotations

import functools
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
from collections.abc import Callable, Mapping, Sequence
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
ROUNDS = int(os.environ.get("OVMS_BENCH_ROUNDS", "8"))
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
    floors = [floor(layout.blob_dir, clean(scratch / "floor")) for _ in range(ROUNDS // 2)]
    table = {"pull": in_turn(pulls)}
    for name in ("floor", "pull", *pulls):
        clean(scratch / name)
    table["push"] = in_turn(
        {tool: functools.partial(to_new_registry, scratch / "target", send) for tool, send in pushes.items()}
    )
    repull = [run([OVM, "pull", ref], **env).wall * 1000 for _ in range(5)]
    wall = {
        what: {tool: statistics.median(took.wall for took in runs) for tool, runs in tools.items()}
        for what, tools in table.items()
    }
    print(f"{total} MiB in 4 blobs; medians of {ROUNDS} rounds\n")
    print(f"{'':16}{'MB/s':>8}{'wall s':>8}{'from':>8}{'to':>8}{'CPU s':>8}{'RSS MB':>8}")
    for what, tools in [*table.items(), ("floor", {"copy+sha256": floors})]:
        for tool, runs in tools.items():
            walls = sorted(took.wall for took in runs)
            middle = statistics.median(walls)
            cpu = statistics.median(took.cpu for took in runs)
            rss = max(took.rss for took in runs)
            print(
                f"{what + ' ' + tool:16}{total * 1.048576 / middle:8.0f}{middle:8.2f}{walls[0]:8.2f}{walls[-1]:8.2f}"
                f"{cpu:8.2f}{rss:8.0f}"
            )
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


def to_new_registry(directory: Path, send: Callable[[str], Took]) -> Took:
    target = Registry(clean(directory))
    try:
        return send(target.host)
    finally:
        target.close()


def in_turn(actions: Mapping[str, Callable[[], Took]], rounds: int = ROUNDS) -> dict[str, list[Took]]:
    """What each action took in each round that counts."""
    table: dict[str, list[Took]] = {tool: [] for tool in actions}
    orders = balanced(list(actions))
    for number in range(-1, rounds):
        for tool in orders[number % len(orders)]:
            took = actions[tool]()
            if number >= 0:
                table[tool].append(took)
    return table


def balanced(items: Sequence[str]) -> list[list[str]]:
    """Orders in which every item is as often in each place, and as often right after each other one (a Williams design)."""
    size = len(items)
    steps = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(size)]
    orders = [[items[(start + step) % size] for step in steps] for start in range(size)]
    return orders if size % 2 == 0 else orders + [order[::-1] for order in orders]


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

    def pulls(tool: str, argv: list[object], last: list[object]) -> dict[str, Callable[[], Took]]:
        """All by one command, and by one command each."""
        target = scratch / f"small-{tool}"
        env = {"OVMS_ROOT": str(target)}

        def each() -> Took:
            clean(target)
            took = [run([*argv, one, *last], **env) for one in names]
            return Took(sum(t.wall for t in took), sum(t.cpu for t in took), max(t.rss for t in took))

        def together() -> Took:
            clean(target)
            return run([*argv, *names, *last], **env)

        return {f"{tool}, one command": together, f"{tool}, a command each": each}

    tools = pulls("ovm", [OVM, "pull"], [])
    if crane:
        tools |= pulls("crane", [crane, "pull", "--insecure", "--format=oci"], [scratch / "small-crane"])
    took = in_turn(tools, 2 * ROUNDS)
    medians = {what: statistics.median(t.wall for t in runs) for what, runs in took.items()}
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
