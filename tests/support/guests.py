"""The bare guests: assembled here, packaged as an artifact, talked to over its console."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from ovms import fsutil
from ovms.disk import qcow2
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.vmm.model import VmFiles
from ovms.vmm.qemu.control import QemuControl

SOURCE = Path(__file__).parent.parent / "guests" / "echo.S"
AGENT = SOURCE.with_name("agent.c")
MEMORY = 32 << 20
DISK = 16 << 20


def assemble(source: Path, target: Path) -> Path:
    """Assembles a bare guest with binutils (the package ``binutils``)."""
    objects = target.with_suffix(".o")
    subprocess.run(["as", "--64", source, "-o", objects], check=True, timeout=30)
    link = ["ld", "-nostdlib", "-static", "-Ttext=0x200000", "--build-id=none", "-z", "noexecstack", "-s"]
    subprocess.run([*link, objects, "-o", target], check=True, timeout=30)
    objects.unlink()
    return target


def compile_agent(target: Path) -> Path:
    """Compiles the bare guest that has an agent (the package ``gcc``)."""
    objects = target.with_suffix(".o")
    options = ["-m32", "-O1", "-ffreestanding", "-fno-pic", "-mgeneral-regs-only", "-fno-stack-protector"]
    subprocess.run(["gcc", *options, "-c", AGENT, "-o", objects], check=True, timeout=60)
    link = ["ld", "-m", "elf_i386", "-nostdlib", "-static", "-Ttext=0x200000", "--build-id=none", "-z", "noexecstack"]
    subprocess.run([*link, "-s", objects, "-o", target], check=True, timeout=30)
    objects.unlink()
    return target


def write_project(directory: Path, kernel: Path, *, name: str = "echo", disk: bool = True, more: str = "") -> Path:
    """A directory that ``ovm build`` takes: kernel, empty disk, manifest (with *more* in it). Returns the latter's path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kernel").write_bytes(kernel.read_bytes())
    layers = ""
    if disk:
        if not (directory / "base.qcow2").exists():
            qcow2.create_overlay(directory / "base.qcow2", DISK)
        layers = "diskLayers: [{ref: base.qcow2, format: qcow2}]\n"
    manifest = directory / "ovms.yaml"
    manifest.write_text(
        "schemaVersion: 1\nmediaType: application/vnd.ovms.manifest.v1+json\n"
        f"name: {name}\nversion: '1'\nkernel: {{ref: kernel}}\n{layers}{more}"
    )
    return manifest


class Console:
    """The echo guest's console: what it printed, and what it is told."""

    def __init__(self, directory: Path) -> None:
        self.files = VmFiles(directory)

    def text(self) -> str:
        return self.files.console_log.read_text(errors="replace")

    def wait_for(self, text: str, *, count: int = 1, timeout: float = 20.0) -> str:
        """Waits until *text* was printed *count* times, and returns all that was printed."""
        deadline = time.monotonic() + timeout
        while (said := self.text()).count(text) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not come {count} times, only {said!r}")
            time.sleep(0.005)
        return said

    def send(self, keys: str) -> None:
        with fsutil.connect_unix(self.files.console, timeout=5) as sock:
            for key in keys:
                sock.sendall(key.encode())
                time.sleep(0.02)  # the guest's UART holds one byte
            # closing at once would drop what QEMU has not read yet
            time.sleep(0.05)

    def ping(self) -> int:
        """Sends a newline; returns the guest's count of them, which lives in its memory alone."""
        return self.ask("\n", "PONG ")

    def ask(self, key: str, answer: str) -> int:
        """Sends *key*; returns the number behind the *answer* that comes."""
        before = self.text().count(answer)
        self.send(key)
        said = self.wait_for(answer, count=before + 1)
        deadline = time.monotonic() + 5
        while not said.endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.005)
            said = self.text()
        return int(said.rstrip().rpartition(" ")[2], 16)


def hmp(runtime: Runtime, record: Record, command: str) -> str:
    """What QEMU's monitor for people answers: how tests write to the disks of a guest that has no drivers."""
    with runtime.instances.locked(record) as newest, runtime.instances.control(newest) as control:
        assert isinstance(control, QemuControl)
        return str(control._qmp.execute("human-monitor-command", {"command-line": command}))


def qemu_io(runtime: Runtime, record: Record, device: str, command: str) -> str:
    """Writes to a disk as its device does; *command* is one of qemu-io. Returns why not, or nothing."""
    return hmp(runtime, record, f'qemu-io -d /machine/peripheral/{device}/virtio-backend "{command}"')


def qemu_children(root: Path, *, timeout: float = 5.0) -> list[int]:
    """The processes but ours that still have something below *root* open: what a test must not leave behind."""
    deadline = time.monotonic() + timeout
    while (found := _holders(root)) and time.monotonic() < deadline:
        time.sleep(0.01)  # a watcher ends a moment after its VM
    return found


def _holders(root: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            opened = [os.readlink(fd) for fd in (entry / "fd").iterdir()]  # noqa: PTH115 - what it leads to may be gone
        except OSError:
            continue
        if any(target.startswith(f"{root}/") for target in opened):
            found.append(int(entry.name))
    return found
