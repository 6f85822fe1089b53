"""RAM snapshots: how soon a clone runs (warm, cold, by the command line), how long a snapshot lets its guest stand still,
what clones and diffs cost, and how fast a memory is unpacked.

The peers: the bare QEMU command line for the same restore, a boot of the same guest, and ``lz4 -d`` on the same data.
``OVMS_BENCH_STARTS`` (200), ``OVMS_BENCH_CLONES`` (100) and ``OVMS_BENCH_ROUNDS`` (15) make it larger or smaller;
``OVMS_BENCH_PLOTS=DIR`` writes plots there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import guests
from support.cli import OVM
from support.server import Server

from ovms import fsutil, process
from ovms.artifact.build import Builder
from ovms.artifact.resolve import Found, find
from ovms.disk import qcow2
from ovms.memory import snapshot
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registry import RegistryClient
from ovms.runtime import snapshots
from ovms.runtime.jail import SecurityOptions
from ovms.runtime.network import Wanted
from ovms.runtime.record import Record
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec import limits
from ovms.spec.choices import Accel, RestorePolicy
from ovms.spec.digest import Digest
from ovms.vmm import maps
from ovms.vmm.model import Network, Uplink, VmConfig
from ovms.vmm.qemu import cmdline
from ovms.vmm.qemu.qmp import Qmp

STARTS = int(os.environ.get("OVMS_BENCH_STARTS", "200"))
CLONES = int(os.environ.get("OVMS_BENCH_CLONES", "100"))
ROUNDS = int(os.environ.get("OVMS_BENCH_ROUNDS", "15"))
MIB: Final = limits.MIB
MEMORY: Final = 256 * MIB
POOL: Final = 16
BARE: Final = SecurityOptions.parse([f"{part}=off" for part in ("user", "namespaces", "root", "network", "seccomp", "cgroups", "limits")])  # fmt: skip


def no_registry(host: str) -> RegistryClient:
    raise AssertionError(host)


def say(text: str) -> None:
    print(text, flush=True)


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# --- guests ----------------------------------------------------------------------------------------------------------


def pages_of_memory(count: int, seed: int) -> bytes:
    """Pages as a guest has them: some are text, some are code, which lz4 makes half as large."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(3, 24)) for _ in range(400)]
    out = bytearray()
    while len(out) < count * 4096:
        out += rng.choice(words)
        out += rng.randbytes(6)
    return bytes(out[: count * 4096])


def fill(path: str, start: int, size: int, *, seed: int = 1) -> None:
    """Writes *size* bytes of memory at *start* of a file."""
    block = pages_of_memory(256, seed)
    with Path(path).open("r+b", buffering=0) as file:
        for at in range(0, size, len(block)):
            stamped = bytearray(block[: size - at])
            stamped[:8] = (start + at).to_bytes(8, "little")
            os.pwrite(file.fileno(), stamped, start + at)


def booted(runtime: Runtime, found: Found, memory: int, *, part: float = 0.5) -> Record:
    """A running echo guest whose memory is in use, to *part*."""
    record = runtime.start(found, RunOptions(memory=memory, accel=Accel.TCG)).record
    guests.Console(runtime.instances.directory(record.id)).wait_for("READY")
    with runtime.instances.control(record) as control:
        file = control.ram().file
    fill(str(file), 16 * MIB, int(memory * part) - 16 * MIB)
    return record


def dirty(record: Record, runtime: Runtime, size: int) -> None:
    """Lets a clone have written *size* bytes, of another content, to pages of its own."""
    with runtime.instances.control(record) as control:
        ram = control.ram()
    address = maps.find(ram.pid, ram.file, ram.size).address
    fill(f"/proc/{ram.pid}/mem", address + 16 * MIB, size, seed=2)


# --- warm ------------------------------------------------------------------------------------------------------------


def wait_ready(server: Server, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (pools := server.get("/warm")["pools"]) or pools[0]["ready"] < count:
        assert time.monotonic() < deadline, pools
        time.sleep(0.01)


def warm(server: Server, name: str) -> dict[str, Any]:
    """From the request until the guest runs, and until it has answered."""
    starts, replies, inside = [], [], []
    body = json.dumps({"manifest": name}).encode()
    head = f"POST /start HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = fsutil.connect_unix(server.socket, timeout=30)
    for _ in range(STARTS):
        wait_ready(server, POOL)
        time.sleep(0.1)
        began = time.perf_counter()
        connection.sendall(head.encode() + body)
        said = connection.recv(65536)
        starts.append((time.perf_counter() - began) * 1000)
        answer = json.loads(said.partition(b"\r\n\r\n")[2])
        assert answer["state"] == "running", answer
        with fsutil.connect_unix(
            server.root / "instances" / answer["instance_id"] / "console.sock", timeout=10
        ) as sock:
            sock.sendall(b"\n")
            got = b""
            while b"PONG" not in got:
                got += sock.recv(4096)
        replies.append((time.perf_counter() - began) * 1000)
        inside.append(answer["start_ms"])
        server.post("/remove", {"instance_id": answer["instance_id"], "force": True})
    connection.close()
    say(
        f"warm start          p50 {quantile(starts, 0.5):8.2f} ms   p99 {quantile(starts, 0.99):8.2f} ms   ({STARTS} starts)"
    )
    say(f"  of it in the pool p50 {quantile(inside, 0.5):8.2f} ms   p99 {quantile(inside, 0.99):8.2f} ms")
    say(f"first reply         p50 {quantile(replies, 0.5):8.2f} ms   p99 {quantile(replies, 0.99):8.2f} ms")
    return {
        "warm_start_p50_ms": round(quantile(starts, 0.5), 2),
        "warm_start_p99_ms": round(quantile(starts, 0.99), 2),
        "first_reply_p50_ms": round(quantile(replies, 0.5), 2),
        "_starts": starts,
        "_replies": replies,
    }


def by_command(server: Server, name: str) -> dict[str, Any]:
    """``ovm run -d`` of what waits."""
    environ = {**os.environ, "OVMS_ROOT": str(server.root)}
    times = []
    for _ in range(ROUNDS):
        wait_ready(server, POOL)
        time.sleep(0.1)
        began = time.perf_counter()
        done = subprocess.run(
            [OVM, "run", "-d", name], env=environ, capture_output=True, text=True, timeout=60, check=True
        )
        times.append((time.perf_counter() - began) * 1000)
        server.post("/remove", {"instance_id": done.stdout.strip(), "force": True})
    say(f"ovm run -d, warm    median {statistics.median(times):8.1f} ms")
    return {"cli_run_ms": round(statistics.median(times), 1)}


# --- cold ------------------------------------------------------------------------------------------------------------


def bare_restore(runtime: Runtime, found: Found, directory: Path) -> float:
    """Milliseconds of the same restore by QEMU's own command line: no jail, no records, from the spawn until it runs."""
    ram = found.artifact.manifest.ram_snapshot
    assert ram is not None
    vmm = runtime.vmm("qemu")
    control = snapshot.read_control(runtime.layout, Digest(ram.ref))
    from ovms.disk.layers import open_chain
    from ovms.memory import compat

    machine = compat.machine_of(control.header)
    image = snapshot.materialise(runtime.layout, Digest(ram.ref))
    overlay, sock = directory / "bare.qcow2", directory / "bare.sock"
    for path in (overlay, sock):
        path.unlink(missing_ok=True)
    layers = tuple(
        open_chain([(runtime.layout.path(Digest(d.ref)), d.format) for d in found.artifact.manifest.disk_layers])
    )
    with contextlib.ExitStack() as held:

        def opened(path: Path, flags: int) -> int:
            fd = os.open(path, flags)
            held.callback(os.close, fd)
            return fd

        state = os.memfd_create("state")
        held.callback(os.close, state)
        os.write(state, control.state)
        listen = held.enter_context(fsutil.listen_unix(sock))
        agent = held.enter_context(fsutil.listen_unix(directory / "agent.sock"))
        pairs = []
        import socket

        for _ in range(2):
            ours, theirs = socket.socketpair()
            held.callback(ours.close)
            held.callback(theirs.close)
            pairs.append(theirs.fileno())
        ram_fd = opened(image, os.O_RDWR)
        read_state = opened(Path(f"/proc/self/fd/{state}"), os.O_RDONLY)
        began = time.perf_counter()
        if machine.disk_size is not None:
            qcow2.create_overlay(overlay, machine.disk_size)
        fds = cmdline.Descriptors(
            listen.fileno(), pairs[0], pairs[1], ram_fd,
            layers=tuple(opened(layer.path, os.O_RDONLY) for layer in layers),
            overlay=None if machine.disk_size is None else (opened(overlay, os.O_RDWR), opened(overlay, os.O_RDONLY)),
            state=read_state,
            agent=agent.fileno() if machine.agent else None,
        )  # fmt: skip
        from ovms.vmm.model import Restore

        config = VmConfig(
            "bare", "00000000-0000-4000-8000-000000000000", machine, None, None, "", layers,
            None if machine.disk_size is None else overlay, network=Network(Uplink.NONE), restore=Restore(ram_fd, b""),
        )  # fmt: skip
        argv = cmdline.build(process.find_tool("qemu-system-x86_64"), config, fds, sandbox=True)
        running = subprocess.Popen(
            argv, pass_fds=fds.all(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            with Qmp.connect(sock, timeout=30) as qmp:
                while True:
                    answer = qmp.execute("query-status")
                    if answer["status"] != "inmigrate":
                        break
                    time.sleep(0.0005)
                qmp.execute("cont")
            took = (time.perf_counter() - began) * 1000
        finally:
            process.terminate(running)
    assert vmm.name == "qemu"
    return took


def cold(runtime: Runtime, base: Found, snap: Found, directory: Path) -> dict[str, Any]:
    """A restore without a pool beside the bare command line, and beside a boot."""

    def start(found: Found, options: RunOptions) -> float:
        began = time.perf_counter()
        record = runtime.start(found, options).record
        took = (time.perf_counter() - began) * 1000
        runtime.remove(record, force=True)
        return took

    def boot() -> float:
        began = time.perf_counter()
        record = runtime.start(base, RunOptions(memory=MEMORY, accel=Accel.TCG)).record
        guests.Console(runtime.instances.directory(record.id)).wait_for("READY")
        took = (time.perf_counter() - began) * 1000
        runtime.remove(record, force=True)
        return took

    # as the bare one: no network, and nothing is asked of the guest's agent once it runs
    restore = RunOptions(
        accel=Accel.TCG, restore=RestorePolicy.REQUIRE, network=Wanted.parse("none"), keep_identity=True
    )
    from dataclasses import replace

    measures: dict[str, Callable[[], float]] = {
        "bare QEMU": lambda: bare_restore(runtime, snap, directory),
        "restore, no jail": lambda: start(snap, replace(restore, security=BARE)),
        "restore": lambda: start(snap, RunOptions(accel=Accel.TCG)),
        "boot to READY": boot,
    }
    with kept(runtime, snap):  # the template is there, as it is with any other clone
        for measure in measures.values():
            measure()
        times: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(ROUNDS):
            for name, measure in measures.items():
                times[name].append(measure())
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        say(f"{name:20}median {value:8.1f} ms   minimum {min(times[name]):8.1f} ms")
    return {
        # round by round, for the machine is another from one to the next
        "cold_over_bare_ratio": round(
            statistics.median(
                ours / bare for ours, bare in zip(times["restore, no jail"], times["bare QEMU"], strict=True)
            ),
            2,
        ),
        "cold_ms": round(medians["restore"], 1),
        "restore_over_boot": round(medians["restore"] / medians["boot to READY"], 2),
    }


@contextlib.contextmanager
def kept(runtime: Runtime, snap: Found) -> Iterator[None]:
    record = runtime.start(snap, RunOptions(accel=Accel.TCG)).record
    try:
        yield
    finally:
        runtime.remove(record, force=True)


# --- snapshots -------------------------------------------------------------------------------------------------------


def blob_size(runtime: Runtime, found: Found) -> int:
    ram = found.artifact.manifest.ram_snapshot
    assert ram is not None
    return runtime.layout.path(Digest(ram.ref)).stat().st_size


def downtimes(runtime: Runtime, found: Found) -> dict[str, Any]:
    """How long the guest stands still, at three sizes, all of half full memories."""
    figures: dict[str, Any] = {}
    for size in (256, 1024, 4096):
        times = []
        for round_ in range(3):
            record = booted(runtime, found, size * MIB)
            taken = snapshots.take(runtime, record, Reference.parse(f"echo:down-{size}"))
            times.append(taken.downtime_ms)
            runtime.remove(runtime.instances.find(record.id), force=True)
            if size > 1024 and round_ == 0:
                break  # some GiB to compress
        figures[f"downtime_{size}_ms"] = round(statistics.median(times), 1)
        raw = blob_size(runtime, find(runtime.layout, f"echo:down-{size}")) / (size * MIB)
        say(f"downtime {size:5} MiB  median {statistics.median(times):8.1f} ms   artifact/memory {raw:.2f}")
    return figures


def diffs(runtime: Runtime, snap: Found) -> dict[str, Any]:
    """What a clone's snapshot is large, by what it wrote."""
    figures: dict[str, Any] = {}
    for size in (0, 8, 64):
        record = runtime.start(snap, RunOptions(accel=Accel.TCG)).record
        dirty(record, runtime, size * MIB)
        taken = snapshots.take(runtime, record, Reference.parse(f"echo:diff-{size}"))
        say(f"diff of {size:3} MiB      {taken.ram_size / 1e3:10.0f} kB   downtime {taken.downtime_ms:8.1f} ms")
        figures["idle_diff_kb" if size == 0 else f"_diff_{size}_kb"] = round(taken.ram_size / 1e3)
        figures[f"_diff_{size}_down_ms"] = taken.downtime_ms
        runtime.remove(runtime.instances.find(record.id), force=True)
    return figures


def pss(pid: int) -> tuple[int, int]:
    """Bytes of a process: its share of all, and what is its own and of no file."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+): +([0-9]+) kB", text, re.MULTILINE)}
    return found["Pss"], found["Private_Dirty"]


def clones(server: Server, name: str) -> dict[str, Any]:
    """Many clones of one snapshot at once."""
    environ = {**os.environ, "OVMS_ROOT": str(server.root)}
    before = process.memory_available()
    began = time.perf_counter()
    done = subprocess.run(
        [OVM, "fork", "-n", str(CLONES), name], env=environ, capture_output=True, text=True, timeout=300, check=True
    )
    took = time.perf_counter() - began
    ids = done.stdout.split()
    time.sleep(1.0)
    after = process.memory_available()
    pids = [int(server.get(f"/status/{one}")["pid"]) for one in ids]
    shares = [pss(pid)[0] for pid in pids]
    for one in ids:
        server.post("/remove", {"instance_id": one, "force": True}, timeout=60)
    say(
        f"{CLONES} clones         {took:8.1f} s    {statistics.mean(shares) / MIB:6.1f} MiB each (PSS)"
        f"   {(before - after) / len(ids) / MIB:6.1f} MiB less free memory each"
    )
    return {"clones100_s": round(took, 1), "clone_mib": round(statistics.mean(shares) / MIB, 1)}


# --- unpacking -------------------------------------------------------------------------------------------------------


def materialise(layout: Layout, directory: Path, runtime: Runtime, found: Found) -> dict[str, Any]:
    """1 GiB of memory, half of it in use, beside ``lz4 -d`` of the same: bytes for each second of a core."""
    record = booted(runtime, found, 1024 * MIB, part=1.0)
    snapshots.take(runtime, record, Reference.parse("echo:large"))
    runtime.remove(runtime.instances.find(record.id), force=True)
    ram = find(layout, "echo:large").artifact.manifest.ram_snapshot
    assert ram is not None
    image = snapshot.materialise(layout, Digest(ram.ref))
    packed = directory / "memory.lz4"
    subprocess.run(["lz4", "-q", "-f", "-1", image, packed], check=True, timeout=120)
    ours, theirs, walls = [], [], []
    for _ in range(5):
        image.unlink(missing_ok=True)
        began, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
        image = snapshot.materialise(layout, Digest(ram.ref))
        walls.append(time.perf_counter() - began)
        ours.append(_cpu(resource.RUSAGE_SELF) - cpu)
        out = directory / "memory"
        out.unlink(missing_ok=True)
        cpu = _cpu(resource.RUSAGE_CHILDREN)
        subprocess.run(["lz4", "-q", "-d", "-f", packed, out], check=True, timeout=120)
        theirs.append(_cpu(resource.RUSAGE_CHILDREN) - cpu)
        out.unlink()
    ratio = statistics.median(theirs) / statistics.median(ours)
    say(
        f"unpacking 1 GiB     ours {statistics.median(ours):6.2f} s of CPU, {statistics.median(walls):6.2f} s"
        f"   lz4 -d {statistics.median(theirs):6.2f} s of CPU   ratio {ratio:.2f}"
    )
    return {"materialise_vs_lz4": round(ratio, 2)}


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


# --- KVM -------------------------------------------------------------------------------------------------------------


def under_kvm(directory: Path, kernel: Path) -> dict[str, Any]:
    """The hand-out of a warm clone and its first reply under KVM, without HTTP; also where KVM runs no more than the bare guest."""
    from support import kvm

    from ovms.runtime import warm

    runtime = Runtime(Root(directory / "kvm"))
    Builder(runtime.layout, no_registry).build(guests.write_project(directory / "project", kernel), name="echo:1")
    starts, replies = [], []
    try:
        with kvm.running(runtime, find(runtime.layout, "echo:1"), MEMORY) as record:
            snapshots.take(runtime, record, Reference.parse("echo:snap"))
            runtime.remove(runtime.instances.find(record.id), force=True)
            with contextlib.closing(warm.opened(runtime)) as pools:
                pools.set("echo:snap", 8, no_registry)
                for _ in range(ROUNDS * 2):
                    while pools.work():
                        pass
                    time.sleep(0.1)
                    began = time.perf_counter()
                    handed = pools.take("echo:snap", RunOptions())
                    starts.append((time.perf_counter() - began) * 1000)
                    assert handed is not None
                    with fsutil.connect_unix(
                        runtime.instances.directory(handed.record.id) / "console.sock", timeout=10
                    ) as sock:
                        sock.sendall(b"\n")
                        got = b""
                        while b"PONG" not in got:
                            got += sock.recv(4096)
                    replies.append((time.perf_counter() - began) * 1000)
                    handed.finish()
                    runtime.remove(handed.record, force=True)
    except kvm.NoKvm as exc:
        say(f"KVM                 {exc}")
        return {}
    say(f"hand-out under KVM  p50 {quantile(starts, 0.5):8.2f} ms   p99 {quantile(starts, 0.99):8.2f} ms (no HTTP)")
    say(f"  first reply       p50 {quantile(replies, 0.5):8.2f} ms   p99 {quantile(replies, 0.99):8.2f} ms")
    return {
        "kvm_hand_out_p50_ms": round(quantile(starts, 0.5), 2),
        "kvm_first_reply_p50_ms": round(quantile(replies, 0.5), 2),
    }


# --- all of it -------------------------------------------------------------------------------------------------------


def plot(path: Path, title: str, series: dict[str, list[float]]) -> None:
    """A distribution as SVG: which part of the starts (up) took how many ms (right), on a logarithmic scale."""
    import math

    width, height, left, bottom = 640, 300, 50, 40
    most, least = 100.0, 0.5
    span = math.log10(most / least)

    def x(value: float) -> float:
        return left + (width - left - 20) * math.log10(min(max(value, least), most) / least) / span

    def y(part: float) -> float:
        return 30 + (height - bottom - 30) * (1 - part)

    colours = ("#1f6feb", "#d1242f", "#1a7f37")
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="18" font-size="14">{title}</text>',
    ]
    for tick in (0.5, 1, 2, 3, 5, 10, 20, 50, 100):
        out.append(f'<path d="M{x(tick):.1f} 30V{height - bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{height - 22}" text-anchor="middle">{tick:g}</text>')
    for part in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<path d="M{left} {y(part):.1f}H{width - 20}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y(part) + 4:.1f}" text-anchor="end">{part:.0%}</text>')
    out.append(f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">ms, logarithmic</text>')
    for number, (name, values) in enumerate(series.items()):
        points = [f"{x(v):.1f} {y((i + 1) / len(values)):.1f}" for i, v in enumerate(sorted(values))]
        out.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colours[number]}" stroke-width="2"/>')
        out.append(f'<text x="{width - 190}" y="{60 + 18 * number}" fill="{colours[number]}">{name}</text>')
    path.write_text("\n".join([*out, "</svg>", ""]))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ovms-bench-") as scratch:
        directory = Path(scratch)
        kernel = guests.assemble(guests.SOURCE, directory / "echo.elf")
        runtime = Runtime(Root(directory / "root"))
        Builder(runtime.layout, no_registry).build(guests.write_project(directory / "project", kernel), name="echo:1")
        base = find(runtime.layout, "echo:1")
        record = booted(runtime, base, MEMORY)
        snapshots.take(runtime, record, Reference.parse("echo:snap"))
        runtime.remove(runtime.instances.find(record.id), force=True)
        snap = find(runtime.layout, "echo:snap")
        figures: dict[str, Any] = {}
        server = Server(runtime.root.path)
        try:
            server.post("/warm", {"manifest": "echo:snap", "size": POOL}, timeout=60)
            figures |= warm(server, "echo:snap")
            figures |= by_command(server, "echo:snap")
            server.post("/warm", {"manifest": "echo:snap", "size": 0}, timeout=60)
            figures |= clones(server, "echo:snap")
        finally:
            with contextlib.suppress(OSError, AssertionError):
                for one in server.get("/instances")["instances"]:
                    server.post("/remove", {"instance_id": one["instance_id"], "force": True}, timeout=60)
            server.close()
        figures |= cold(runtime, base, snap, directory)
        figures |= downtimes(runtime, base)
        figures |= diffs(runtime, snap)
        figures |= materialise(runtime.layout, directory, runtime, base)
        figures |= under_kvm(directory, kernel)
    if plots := os.environ.get("OVMS_BENCH_PLOTS"):
        series = {"the guest runs": figures["_starts"], "its first reply": figures["_replies"]}
        plot(Path(plots) / "warm-start.svg", "From POST /start of a warm snapshot (TCG)", series)
    print(json.dumps({"bench": "snapshots", "figures": {k: v for k, v in figures.items() if not k.startswith("_")}}))


if __name__ == "__main__":
    main()
