"""A record of an instance, for tests that need one and no VM."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ovms.process import ProcessId
from ovms.runtime.record import Record
from ovms.spec.choices import Accel
from ovms.spec.digest import of_bytes
from ovms.vmm.model import Machine, PortForward, Region

MACHINE: Final = Machine(
    "pc-i440fx-7.2",
    Accel.KVM,
    "host",
    ("sse", "avx"),
    1 << 29,
    2,
    "52:54:00:00:00:01",
    1 << 30,
    regions=(Region("mail", 4096),),
)
RECORD: Final = Record(
    id="11111111-2222-3333-4444-555555555555",
    name="web-1",
    created="2026-01-02T03:04:05.678Z",
    reference="registry.example:5000/web:1",
    digest=of_bytes(b"x"),
    vmm="qemu",
    vmm_version="7.2.22",
    machine=MACHINE,
    accel_reason=None,
    ports=(PortForward("127.0.0.1", 8080, 80),),
    overlays=("overlay-0.qcow2",),
    ram_image=Path("/store/x.ram"),
    process=ProcessId(12, 3456, "boot"),
    started="2026-01-02T03:04:06.000Z",
    start_ms=12.5,
)
