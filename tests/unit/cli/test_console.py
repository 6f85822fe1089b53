"""What the user types at a console, where the guest does not take it."""

from __future__ import annotations

from pathlib import Path

from ovms.cli.console import Visit
from ovms.cli.terminal import DetachKeys
from ovms.process import ProcessId
from ovms.vmm.model import VmFiles
from ovms.vmm.watch import Watched


def test_keys_that_nobody_takes_are_not_collected_without_end() -> None:
    nobody = ProcessId(2**31 - 1, 0, "")
    visit = Visit(VmFiles(Path()), Watched(nobody, nobody), DetachKeys(b"\x10\x11"))
    for _ in range(1000):
        assert not visit._type(b"k" * 4096, listening=True)
    assert len(visit._pending) <= 65536
    assert visit._type(b"\x10\x11", listening=True)
