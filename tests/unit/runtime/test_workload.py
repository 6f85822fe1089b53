"""The exit status of a workload, by the guest's own word."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms.runtime import workload
from ovms.vmm.model import VmFiles


@pytest.mark.spec("BOOT-23")
@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\r\novms-exit: 7\r\n", 7),
        (b"\novms-exit: 7\n\novms-exit: 0\nreboot: Power down\n", 0),
        (b"ovms-exit: 255\n", 255),
        (b"\novms-exit: 256\n", None),
        (b"\novms-exit: 3\n\novms-exit: 999\n", None),
        (b"\novms-exit: -1\n", None),
        (b"\novms-exit: 12x\n", None),
        (b"see ovms-exit: 12\n", None),
        (b"\novms-exit: 1", None),
        (b"\novms-exit: 4\n" + b"x" * 100_000, None),
        (b"", None),
    ],
)
def test_the_last_line_counts(tmp_path: Path, said: bytes, status: int | None) -> None:
    files = VmFiles(tmp_path)
    files.console_log.write_bytes(said)
    assert workload.exit_status(files) == status


def test_no_console_is_no_status(tmp_path: Path) -> None:
    assert workload.exit_status(VmFiles(tmp_path)) is None
