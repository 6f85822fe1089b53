"""What makes a clone itself: its clock, its host name, its machine ID, its MAC address, and addresses asked for anew (ADR 0021).

A clone wakes up as the VM that the snapshot was taken of. The host gives it a VM generation ID and a real-time clock of its own
(RAM-37); the rest is in the guest, and changes only where that has an agent. It is done by whoever starts the VM, once the guest
runs: within bounds, so that one that does not answer holds up nobody for long. What was not
done is said (:class:`Identity`), and is no failure unless it was asked for.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ovms.errors import AgentUnavailable, GuestError, Locked, OvmsError, VmmError
from ovms.lazy import dataclass, replace
from ovms.runtime import agent
from ovms.runtime.agent import Agent, AgentRefused
from ovms.text import printable
from ovms.vmm.model import VmFiles
from ovms.vmm.protocol import Control

#: Seconds until an agent that has its port open must answer at all, and until all is to be done.
FIRST: Final = 1.0
TOTAL: Final = 3.0
#: The first for a host name that was asked for: then the start fails without it.
ASKED: Final = 10.0
#: Seconds before each look whether the guest has its agent's port open. The VMM notes it as the guest goes on, so that the first
#: look has always seen it; a guest without an agent costs as much as the second one.
_LOOKS: Final = (0.0, 0.003)
#: Seconds that the link is down at least: the guest has to see it.
_LINK_DOWN: Final = 0.2
_POLL: Final = (0.005, 0.1)
_RANDOM: Final = 64

#: Says what it did, a word a line. Files are written in place: they may be links, mounts, or have labels. A machine ID that is
#: empty or "uninitialized" is one that the next boot makes. What is stirred into the random numbers counts from the next reseed on: a
#: kernel that does not do that for a clone is told to (RNDRESEEDCRNG), by what can make the call; so is the network card its address
#: (SIOCSIFHWADDR).
_SCRIPT: Final = """\
name=$1 id=$2 now=$3 mac=$4
if date -u -s "@$now" >/dev/null 2>&1 || date -u -s "@${now%.*}" >/dev/null 2>&1; then echo clock; fi
cat >/dev/urandom
if [ -d /sys/bus/acpi/drivers/vmgenid ] ||
    perl -e 'open(my $f, ">", "/dev/urandom") or exit 1; ioctl($f, 0x5207, 0) or exit 1' ||
    python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)'; then
    echo random
fi 2>/dev/null
if echo "$name" >/proc/sys/kernel/hostname; then
    echo hostname
    [ ! -f /etc/hostname ] || echo "$name" >/etc/hostname
fi
f=/etc/machine-id
if [ -s $f ] && read -r old <$f && [ "$old" != uninitialized ] && echo "$id" >$f; then
    echo machine-id
    f=/var/lib/dbus/machine-id
    if [ -f $f ] && [ ! -L $f ] && read -r other <$f && [ "$other" = "$old" ]; then echo "$id" >$f; fi
fi
for card in /sys/class/net/*; do
    [ -n "$mac" ] && [ -e "$card/device" ] || continue
    card=${card##*/}
    if ip link set dev "$card" address "$mac" || ifconfig "$card" hw ether "$mac" ||
        perl -e '
            my ($card, $mac) = @ARGV;
            $mac =~ s/://g;
            socket(my $s, 2, 2, 0) or exit 1;
            ioctl($s, 0x8924, pack("a16 S H12 x16", $card, 1, $mac)) or exit 1;
        ' "$card" "$mac" ||
        python3 -c '
import fcntl, socket, struct, sys
address = struct.pack("16sH6s16x", sys.argv[1].encode(), 1, bytes.fromhex(sys.argv[2].replace(":", "")))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8924, address)
        ' "$card" "$mac"
    then
        echo mac
    fi 2>/dev/null
    break
done
"""


@dataclass(frozen=True)
class Wanted:
    """Who a clone is to be: its host name, its machine ID (32 hexadecimal digits). ``asked``: it must get that name.

    ``renew_link``: its network is one in which others give addresses. ``mac``: the address of its network card there.
    """

    hostname: str
    machine_id: str
    asked: bool = False
    renew_link: bool = False
    mac: str | None = None


@dataclass(frozen=True)
class Identity:
    """What became of it.

    Attributes:
        clock: the guest's clock was set to the host's.
        random: its kernel's random numbers are its own, whether the kernel saw to that (CONFIG_VMGENID) or the agent.
        hostname: its new host name; None: it has the one of the snapshot.
        machine_id: ``/etc/machine-id`` holds one of its own.
        mac: the new address of its network card; None: it has the one of the snapshot.
        link: its network card lost and found its link, so that it asks for its addresses again.
        note: why not all was done.
    """

    clock: bool = False
    random: bool = False
    hostname: str | None = None
    machine_id: bool = False
    mac: str | None = None
    link: bool = False
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "clock": self.clock,
            "random": self.random,
            "hostname": self.hostname,
            "machine_id": self.machine_id,
            "mac": self.mac,
            "link": self.link,
            "note": self.note,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Identity:
        """Raises KeyError, TypeError or ValueError on anything that :meth:`to_json` does not write."""
        return cls(
            clock=bool(value["clock"]),
            random=bool(value["random"]),
            hostname=None if value["hostname"] is None else str(value["hostname"]),
            machine_id=bool(value["machine_id"]),
            mac=None if value.get("mac") is None else str(value["mac"]),
            link=bool(value["link"]),
            note=None if value["note"] is None else str(value["note"]),
        )


def become(control: Control, files: VmFiles, wanted: Wanted, *, port: bool) -> Identity:
    """Makes a clone that has just begun to run itself. *port*: its VM has one for an agent.

    Raises:
        AgentUnavailable, GuestError: a host name was asked for, and the guest did not take it.
    """
    with _renewing(control) if wanted.renew_link else contextlib.nullcontext():
        done = _in_guest(control, files, wanted) if port else Identity(note="its VM has no port for an agent")
    if wanted.asked and done.hostname is None:
        raise AgentUnavailable(
            f"the guest did not take the host name {wanted.hostname}: {done.note}",
            hint="its agent has to run when the snapshot is taken; leave out --hostname, or add --cold to boot from the disk",
        )
    return replace(done, link=wanted.renew_link)


@contextlib.contextmanager
def _renewing(control: Control) -> Iterator[None]:
    # The host can do this without the guest's help, and the guest's network manager does what it does for a cable.
    control.set_link(False)
    began = time.monotonic()
    try:
        yield
    finally:
        time.sleep(max(0.0, began + _LINK_DOWN - time.monotonic()))
        control.set_link(True)


def _in_guest(control: Control, files: VmFiles, wanted: Wanted) -> Identity:
    if not _listens(control, _LOOKS):
        return Identity(note="no agent runs in the guest")
    deadline = time.monotonic() + (ASKED if wanted.asked else TOTAL)
    # nobody else has to be let in between: it is over soon
    with Agent(files, listens=lambda: True, wait=ASKED if wanted.asked else FIRST) as there:
        try:
            return _by_script(there, wanted, deadline)
        except AgentRefused as exc:
            return Identity(clock=_set_clock(there, deadline), note=exc.message)
        except (GuestError, Locked) as exc:
            return Identity(note=exc.message)


def _listens(control: Control, looks: tuple[float, ...]) -> bool:
    for pause in looks:
        time.sleep(pause)
        with contextlib.suppress(VmmError):
            if control.agent_listens():
                return True
    return False


def _by_script(there: Agent, wanted: Wanted, deadline: float) -> Identity:
    # Opens the session: from here on an answer takes one round trip, and so does the time that we tell.
    there.execute("guest-ping")
    words = [wanted.hostname, wanted.machine_id, f"{time.time():.3f}", wanted.mac or ""]
    arguments = {
        "path": "/bin/sh",
        "arg": ["-c", _SCRIPT, "sh", *words],
        "input-data": base64.b64encode(os.urandom(_RANDOM)).decode(),
        "capture-output": True,
    }
    pid = agent.field(there.execute("guest-exec", arguments), "pid", int)
    pause, longest = _POLL
    while True:
        status = there.execute("guest-exec-status", {"pid": pid})
        if agent.field(status, "exited", bool):
            break
        if time.monotonic() > deadline:
            return Identity(note="the guest's agent has not come to the end of it in time, and goes on with it")
        time.sleep(pause)
        pause = min(pause * 1.5, longest)
    done = agent.data(status, "out-data", agent.ANSWER_MAX).split()
    clock, hostname = b"clock" in done, b"hostname" in done
    said = agent.data(status, "err-data", agent.ANSWER_MAX).decode("utf-8", "replace").strip()
    notes = []
    if said or not (clock and hostname):
        notes.append(f"the guest refused a part of it: {printable(said, 300) or 'it does not say why'}")
    if b"random" not in done:
        notes.append("its random numbers may be those of another clone until its kernel reseeds by itself")
    if wanted.mac is not None and b"mac" not in done:
        notes.append("its network card has the address of the snapshot's, as every clone of that")
    return Identity(
        clock=clock,
        random=b"random" in done,
        hostname=wanted.hostname if hostname else None,
        machine_id=b"machine-id" in done,
        mac=wanted.mac if b"mac" in done else None,
        note="; ".join(notes) or None,
    )


def _set_clock(there: Agent, deadline: float) -> bool:
    # What an agent may do that may run no programs. It writes the real-time clock, too, and waits for a second to begin.
    with contextlib.suppress(OvmsError):
        there.execute("guest-set-time", {"time": time.time_ns()}, timeout=max(0.1, deadline - time.monotonic()))
        return True
    return False
