"""Makes a guest's memory small before a snapshot: its caches dropped, and what it has freed zeroed, by its agent.

A guest keeps whatever it has read from its disk, and Linux leaves what it frees as it is, unless it was booted with
``init_on_free=1``. So, after the caches, nearly all memory that is free then is filled with zeroes, as a file in a tmpfs that goes
away again. Some is left, so that nobody in the guest is killed for want of memory; the host must have room for all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ovms.errors import GuestError, ResourceError
from ovms.lazy import dataclass
from ovms.memory import content
from ovms.runtime import guest
from ovms.runtime.instances import Instances
from ovms.runtime.record import Record
from ovms.spec import limits
from ovms.text import printable

#: Seconds that the guest gets. An emulated one fills some 100 MB a second.
TIMEOUT: Final = 300.0
#: Bytes of the host's memory that stay free.
_HOST_KEPT: Final = 256 * limits.MIB

#: Says what it did, a word a line. A sixteenth of the guest's memory, and 16 MiB at least, stay free all the time.
_SCRIPT: Final = """\
sync
echo 3 >/proc/sys/vm/drop_caches || exit 1
echo dropped
case " $(cat /proc/cmdline) " in *" init_on_free=1 "*) echo zeroed; exit 0 ;; esac
total=0 free=0
while read -r key kib rest; do
    case $key in MemTotal:) total=$kib ;; MemFree:) free=$kib ;; esac
done </proc/meminfo
keep=$((total / 16))
[ $keep -ge 16384 ] || keep=16384
[ $free -gt $keep ] || exit 0
at=$(mktemp -d /run/ovms-scrub.XXXXXX) || exit 1
tool=
command -v mount >/dev/null && command -v umount >/dev/null || tool=busybox
trap '$tool umount $at; rmdir $at' EXIT
trap 'exit 1' TERM
$tool mount -t tmpfs -o size=$((free - keep))k,mode=0700 ovms-scrub $at || exit 1
dd if=/dev/zero of=$at/zeroes bs=1M 2>/dev/null
echo zeroed
"""


@dataclass(frozen=True)
class Scrubbed:
    """Bytes of the guest's memory that were not zero, before and after. ``zeroed``: free memory was, too, as far as it went."""

    before: int
    after: int
    zeroed: bool


def check(instances: Instances, record: Record) -> None:
    """Whether a scrub can begin: an agent answers, and the host has the room.

    Raises: as :func:`scrub`.
    """
    _require_room(record)
    with guest.agent_of(instances, record) as agent:
        agent.execute("guest-ping")


def measure(instances: Instances, record: Record) -> int:
    """The bytes of a living guest's memory that are not zero.

    Raises:
        HostError, VmmError: it cannot be read.
    """
    with instances.locked(record) as newest, instances.control(newest) as control:
        return content.nonzero_of(control.ram())


def scrub(instances: Instances, record: Record) -> bool:
    """Makes the guest drop and zero what it can. Returns whether free memory was zeroed (without the instance's lock).

    Raises:
        AgentUnavailable, Unsupported: the guest has no agent.
        ResourceError: the host has no room for all of the guest's memory.
        GuestError: the guest refused.
    """
    with guest.agent_of(instances, record) as agent:
        done = guest.run(agent, ["sh", "-c", _SCRIPT], timeout=TIMEOUT)
    said = done.stdout.split()
    if b"dropped" not in said:
        why = printable(done.stderr[-300:].decode("utf-8", "replace").strip())
        raise GuestError(f"the guest does not drop its caches: {why or f'exit code {done.code}'}")
    return b"zeroed" in said


def _require_room(record: Record) -> None:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            if free < record.machine.memory + _HOST_KEPT:
                raise ResourceError(
                    f"a scrub may fill all {record.machine.memory >> 20} MiB of the guest's memory, and the host has {free >> 20} MiB",
                    hint="stop other VMs, or leave out --scrub",
                )
