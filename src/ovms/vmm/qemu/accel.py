"""KVM that opens is not KVM that runs: a tiny guest is run on it before it is trusted.

Found on real hosts: a nested ``/dev/kvm`` on which QEMU aborts, and one on which unpaged code crawls, so that Linux
hangs in its first second. ``probe.S`` says what the guest does; the answer is kept for this boot of the host.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from ovms import process
from ovms.errors import AccelUnavailable, OvmsError
from ovms.spec.choices import Accel
from ovms.vmm.model import AccelChoice
from ovms.vmm.qemu.binary import Cache, QemuBinary, stamp_of

KVM_DEVICE: Final = Path("/dev/kvm")
#: Seconds for the whole probe. A healthy KVM takes 0.1 s, with QEMU's start.
DEADLINE: Final = 3.0
_GUEST: Final = Path(__file__).parent / "probe.elf"
_DONE: Final = b"ABCDE"
#: isa-debug-exit ends QEMU with (value << 1) | 1.
_EXIT: Final = 1
_CPUS: Final = {Accel.KVM: "host", Accel.TCG: "qemu64"}


def cpu_model(accel: Accel) -> str:
    """The CPU model that guests get. TCG's is the plainest, so that its snapshots run on every host."""
    return _CPUS[accel]


def choose(binary: QemuBinary, cache: Cache, wanted: Accel | None) -> AccelChoice:
    """The accelerator to use.

    Raises:
        AccelUnavailable: KVM is *wanted*, and does not run guests here.
    """
    if wanted is Accel.TCG:
        return AccelChoice(Accel.TCG, "asked for")
    reason = _why_not_kvm(binary, cache)
    if reason is None:
        return AccelChoice(Accel.KVM)
    if wanted is Accel.KVM:
        raise AccelUnavailable(f"KVM cannot be used: {reason}", hint="leave out --accel to run under TCG (slower)")
    return AccelChoice(Accel.TCG, reason)


def _why_not_kvm(binary: QemuBinary, cache: Cache) -> str | None:
    if not KVM_DEVICE.exists():
        return f"there is no {KVM_DEVICE} (no virtualisation, or the kvm module is not loaded)"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"no permission to use {KVM_DEVICE} (add the user to its group: kvm)"
    info = KVM_DEVICE.stat()
    stamp = f"{process.boot_id()}:{info.st_rdev}:{info.st_ino}:{stamp_of(binary.path)}"
    known = cache.get("kvm", stamp)
    if isinstance(known, dict) and isinstance(known.get("reason"), str | None):
        reason: str | None = known.get("reason")
        return reason
    reason = probe(binary, Accel.KVM)
    cache.put("kvm", stamp, {"reason": reason})
    return reason


def probe(binary: QemuBinary, accel: Accel, *, deadline: float = DEADLINE) -> str | None:
    """Runs the probe guest. Returns None when it came through in time, else why the accelerator is no good."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ovms-probe-") as scratch:
        said, errors = Path(scratch) / "said", Path(scratch) / "errors"
        with errors.open("wb") as stderr:
            try:
                running = process.spawn(_command(binary, accel, _GUEST, said), stderr=stderr)
            except OvmsError as exc:
                return exc.message
            end = time.monotonic() + deadline
            while running.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            in_time = running.poll() is not None
            code = process.terminate(running, grace=0.2)
        progress = said.read_bytes() if said.exists() else b""
        if in_time and code == _EXIT and progress == _DONE:
            return None
        if not in_time:
            return f"a test guest crawls on it (came {len(progress)} of {len(_DONE)} steps far in {deadline:g} s)"
        first = errors.read_bytes().strip().partition(b"\n")[0].removeprefix(f"{binary.path.name}: ".encode())
        return f"QEMU fails on it ({process.describe_exit(code)}: {process.tail(first)})"


def _command(binary: QemuBinary, accel: Accel, guest: Path, said: Path) -> list[str]:
    return [
        str(binary.path),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", f"{binary.default_machine},accel={accel}", "-cpu", cpu_model(accel), "-m", "64"),
        *("-kernel", str(guest), "-debugcon", f"file:{said}", "-device", "isa-debug-exit"),
    ]
