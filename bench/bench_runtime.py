"""The runtime beside the bare QEMU command line, from its start until the guest's CPUs run: by ``ovm run -d``, and through the API.

Then many VMs at once on one server: how many come up, what each costs beside QEMU, and how long a question takes under load.
``OVMS_BENCH_VMS`` (100), ``OVMS_BENCH_ROUNDS`` (15) and ``OVMS_BENCH_CYCLES`` (100) make it larger or smaller.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import guests
from support.cli import Ovm
from support.server import Server

from ovms import fsutil, process
from ovms.artifact.build import Builder
from ovms.disk import qcow2
from ovms.errors import VmmError
from ovms.oci.registry import RegistryClient
from ovms.runtime.root import Root
from ovms.vmm.qemu.qmp import Qmp

VMS = int(os.environ.get("OVMS_BENCH_VMS", "100"))
ROUNDS = int(os.environ.get("OVMS_BENCH_ROUNDS", "15"))
CYCLES = int(os.environ.get("OVMS_BENCH_CYCLES", "100"))
MEMORY = "64M"
CLIENTS = 50
LOAD_SECONDS = 10.0
TIMEOUT = 300.0


def no_registry(host: str) -> RegistryClient:
    raise AssertionError(host)


# --- one VM ----------------------------------------------------------------------------------------------------------


def bare(directory: Path, kernel: Path) -> float:
    """Milliseconds of the same machine from a bare command line, until QEMU says that it runs."""
    overlay = directory / "bare.qcow2"
    overlay.unlink(missing_ok=True)
    qcow2.create_overlay(overlay, guests.DISK)
    base = directory / "project" / "base.qcow2"
    socket = directory / "bare.sock"
    socket.unlink(missing_ok=True)
    command: list[str | Path] = [
        process.find_tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none",
        "-machine", "pc", "-accel", "tcg", "-m", MEMORY, "-smp", "1", "-kernel", kernel,
        "-blockdev", f"driver=qcow2,node-name=base,read-only=on,file.driver=file,file.filename={base}",
        "-blockdev", f"driver=qcow2,node-name=disk,backing=base,file.driver=file,file.filename={overlay}",
        "-device", "virtio-blk-pci,drive=disk", "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net",
        "-device", "virtio-rng-pci", "-serial", f"file:{directory}/bare.log",
        "-qmp", f"unix:{socket},server=on,wait=off", "-sandbox", "on",
    ]  # fmt: skip
    began = time.perf_counter()
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                with Qmp.connect(socket, timeout=10) as qmp:
                    if qmp.execute("query-status")["status"] == "running":
                        return (time.perf_counter() - began) * 1000
            except VmmError:
                if running.poll() is not None or time.perf_counter() - began > 30:
                    raise
            time.sleep(0.0005)
    finally:
        process.terminate(running)


def run(ovm: Ovm) -> float:
    """Milliseconds of ``ovm run -d``, without a server."""
    began = time.perf_counter()
    done = ovm("--host", "local", "run", "-d", "-m", MEMORY, "--accel", "tcg", "echo:1")
    took = (time.perf_counter() - began) * 1000
    assert done.code == 0, done.err
    assert ovm("--host", "local", "rm", "-f", done.out.strip()).code == 0
    return took


def start(server: Server) -> float:
    """Milliseconds from POST /start until the server tells that the guest runs, as ``ovm`` waits for it.

    Asking for its status all the time instead would keep the server from its work, which has the other half of this machine.
    """
    began = time.perf_counter()
    started = server.post("/start", {"manifest": "echo:1", "overrides": {"memory": MEMORY, "accel": "tcg"}})
    instance_id = started["instance_id"]
    events = server.stream(f"/events?follow=true&since={started['event_seq']}")
    runs = any(event.get("instance_id") == instance_id and event.get("state") == "running" for event in events)
    took = (time.perf_counter() - began) * 1000
    assert runs
    server.post("/remove", {"instance_id": instance_id, "force": True})
    return took


def in_turn(*measures: Callable[[], float]) -> list[list[float]]:
    """Each measure ROUNDS times, in turn, so that noise falls on all of them."""
    for measure in measures:
        measure()
    times: list[list[float]] = [[] for _ in measures]
    for _ in range(ROUNDS):
        for kept, measure in zip(times, measures, strict=True):
            kept.append(measure())
    return times


# --- many VMs --------------------------------------------------------------------------------------------------------


def pss(pid: int) -> int:
    """Bytes of a process, with its share of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss: +([0-9]+) kB", text, re.MULTILINE)[0]) * 1024


def many(server: Server) -> dict[str, Any]:
    """Starts them all, asks for their states under load, and stops them."""
    before = server.rss()
    began = time.perf_counter()
    body = {"manifest": "echo:1", "overrides": {"memory": MEMORY, "accel": "tcg"}}
    ids = [server.post("/start", body, timeout=60)["instance_id"] for _ in range(VMS)]
    while True:
        states = [one["state"] for one in server.get("/instances")["instances"]]
        if "starting" not in states or time.perf_counter() - began > TIMEOUT:
            break
        time.sleep(0.05)
    up, took = states.count("running"), time.perf_counter() - began
    watchers = [watcher_of(server, instance_id) for instance_id in ids]
    ours = [pss(pid) for pid in watchers if pid is not None]
    of_server = (server.rss() - before) / max(1, up)
    latencies, count = load(server, ids)
    began = time.perf_counter()
    for instance_id in ids:
        server.post("/remove", {"instance_id": instance_id, "force": True}, timeout=60)
    latencies.sort()
    return {
        "vms_up": up,
        "vms_up_s": round(took, 1),
        "vms_down_s": round(time.perf_counter() - began, 1),
        "ovm_mb_per_vm": round((statistics.mean(ours or [0]) + of_server) / 1e6, 2),
        "watcher_mb_per_vm": round(statistics.mean(ours or [0]) / 1e6, 2),
        "server_rss_mb": round(server.rss() / 1e6, 1),
        "status_p50_ms": round(latencies[len(latencies) // 2] * 1000, 2),
        "status_p99_ms": round(latencies[len(latencies) * 99 // 100] * 1000, 2),
        "status_per_s": round(count / LOAD_SECONDS),
    }


def watcher_of(server: Server, instance_id: str) -> int | None:
    record = json.loads((server.root / "instances" / instance_id / "record.json").read_bytes())
    return None if record["watcher"] is None else int(record["watcher"]["pid"])


def load(server: Server, ids: list[str]) -> tuple[list[float], int]:
    """CLIENTS connections that ask for the status of one VM after the other, without a pause; each answer's seconds."""
    latencies: list[float] = []
    with contextlib.ExitStack() as held, selectors.DefaultSelector() as selector:
        sent: dict[int, float] = {}

        def ask(sock: Any) -> None:
            path = f"/status/{ids[len(latencies) % len(ids)]}"
            sent[sock.fileno()] = time.perf_counter()
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

        for _ in range(CLIENTS):
            sock = held.enter_context(fsutil.connect_unix(server.socket, timeout=30))
            selector.register(sock, selectors.EVENT_READ, sock)
            ask(sock)
        end = time.perf_counter() + LOAD_SECONDS
        while time.perf_counter() < end:
            for key, _ in selector.select(1.0):
                data = key.data.recv(65536)
                assert data.startswith(b"HTTP/1.1 200"), data[:200]
                latencies.append(time.perf_counter() - sent[key.fd])
                ask(key.data)
    return latencies, len(latencies)


def cycles(server: Server) -> dict[str, Any]:
    """Whether the server grows over many starts."""

    def times(count: int) -> None:
        for _ in range(count):
            start(server)

    times(20)
    rss, fds = server.rss(), server.fds()
    times(CYCLES)
    return {
        "cycles": CYCLES,
        "server_growth_kb": (server.rss() - rss) // 1024,
        "server_fds_growth": server.fds() - fds,
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ovms-bench-") as scratch:
        directory = Path(scratch)
        kernel = guests.assemble(guests.SOURCE, directory / "echo.elf")
        root = Root(directory / "root")
        root.prepare()
        Builder(root.layout(), no_registry).build(guests.write_project(directory / "project", kernel), name="echo:1")
        ovm = Ovm(root.path, directory)
        server = Server(root.path)
        try:
            bares, runs, starts = in_turn(lambda: bare(directory, kernel), lambda: run(ovm), lambda: start(server))
            figures: dict[str, Any] = {
                "bare_ms": round(statistics.median(bares), 1),
                "run_ms": round(statistics.median(runs), 1),
                "start_ms": round(statistics.median(starts), 1),
                "run_over_bare_ms": round(statistics.median(runs) - statistics.median(bares), 1),
                "start_over_bare_ms": round(statistics.median(starts) - statistics.median(bares), 1),
                **cycles(server),
                **many(server),
            }
        finally:
            with contextlib.suppress(OSError, AssertionError):
                for one in server.get("/instances")["instances"]:
                    server.post("/remove", {"instance_id": one["instance_id"], "force": True}, timeout=60)
            server.close()
    for name, kept in (("bare QEMU", bares), ("ovm run -d", runs), ("POST /start", starts)):
        print(f"{name:14}{statistics.median(kept):10.1f} ms (median){min(kept):10.1f} ms (minimum)")
    print(json.dumps({"bench": "runtime", "figures": figures}))


if __name__ == "__main__":
    main()
