"""passt: the user network in a process of its own, outside the jail, behind a fence (``fence/fence.c``).

Guests see what QEMU's own user network shows them, so that snapshots go from the one to the other: the guest is
10.0.2.15, the router 10.0.2.2, the resolver 10.0.2.3, and fec0::/64 for IPv6; frames have at most 1500 bytes.

passt forwards what is sent to 10.0.2.3 to the host's resolver, also to one on the host's loopback (systemd-resolved,
dnsmasq). But it tells a guest that asks by DHCP of resolvers only that are somewhere else; where there is none, it is
shown a resolv.conf that names 10.0.2.3, too.

Source: passt(1), of 2023-03-09 (Debian 12) and later.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import HostError, PortInUse
from ovms.lazy import dataclass, regex
from ovms.process import ProcessId
from ovms.vmm.jail import User
from ovms.vmm.model import PortForward

FENCE: Final = Path(__file__).parent / "fence" / "fence"
_NAME: Final = "passt"
#: Seconds that it gets to bind its ports. A loaded machine takes its time.
_TIMEOUT: Final = 15.0
_SAID_MAX: Final = 16384
_ADDRESSES: Final = ("-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "--dns-forward", "10.0.2.3")
_PREFIX_6: Final = "fec0::"
_RESOLVER_6: Final = "fec0::3"
#: The router's hardware address: QEMU's own user network has the same.
_RESOLVER: Final = "10.0.2.3"
_ROUTER: Final = "52:55:0a:00:02:02"
_MTU: Final = 1500
#: Bytes of frames from the guest, and to it.
COUNTS: Final = struct.Struct("<QQ")
_FILTERS: Final = regex(r"^Seccomp_filters:\s+([0-9]+)$", re.MULTILINE)
_PORT: Final = regex(r"'-([tu]) ([0-9a-f.:]+)/([0-9]+):")


def installed() -> bool:
    """Whether there is a passt, and our fence."""
    return _which() is not None and FENCE.exists()


def _which() -> str | None:
    return shutil.which(_NAME, path=process.CLEAN_ENV["PATH"]) or shutil.which(_NAME)


def find() -> Path:
    """The installed passt.

    Raises:
        ToolMissing: there is none; the hint names the package.
    """
    return process.find_tool(_NAME)


@dataclass(frozen=True)
class Routes:
    """By which interface this host reaches the world: None where it does not."""

    ipv4: str | None
    ipv6: str | None


def routes(proc: Path = Path("/proc/net")) -> Routes:
    """The default routes, from ``/proc/net``."""
    ipv4 = ipv6 = None
    with contextlib.suppress(OSError):
        for line in (proc / "route").read_text().splitlines()[1:]:
            words = line.split()
            # up, and no route that rejects
            if len(words) > 7 and words[1] == words[7] == "00000000" and int(words[3], 16) & 0x201 == 1:
                ipv4 = ipv4 or words[0]
    with contextlib.suppress(OSError):
        for line in (proc / "ipv6_route").read_text().splitlines():
            words = line.split()
            if len(words) == 10 and words[0] == "0" * 32 and words[1] == "00" and int(words[8], 16) & 0x201 == 1:
                ipv6 = ipv6 or words[9]
    return Routes(ipv4, ipv6)


def address_6(mac: str) -> str:
    """The address that a guest gives itself on the network, and gets when it asks by DHCPv6."""
    octets = bytes.fromhex(mac.replace(":", ""))
    interface = bytes([octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]])
    return _PREFIX_6 + interface.hex(":", 2)


def command(program: Path, ports: Sequence[PortForward], user: User | None, host: Routes, mac: str) -> list[str]:
    """The command line; its end of the connection is descriptor 3. *user*: whom it becomes (None: it stays)."""
    argv = [str(program), "--fd", "3", "-f", "-q", "-m", str(_MTU), "-M", _ROUTER, *_ADDRESSES]
    # the gateway's address is no way to the host's own loopback
    argv.append("--no-map-gw")
    if host.ipv6 is None:
        argv.append("-4")
    else:
        argv += ["-a", address_6(mac), "--dns-forward", _RESOLVER_6]
    if host.ipv4 is None:
        # without a default route it would take IPv4 for missing, and forwarded ports with it
        argv += ["-i", host.ipv6 or "lo"]
    if user is not None:
        argv += ["--runas", f"{user.uid}:{user.gid}"]
    for port in ports:
        argv += ["-t" if port.protocol == "tcp" else "-u", f"{port.host_ip}/{port.host_port}:{port.guest_port}"]
    return argv


def resolvers(text: str) -> str | None:
    """What passt is shown for a resolv.conf of *text*; None where it is to read that itself."""
    lines = text.splitlines()
    servers = [words[1] for line in lines if len(words := line.split()) > 1 and words[0] == "nameserver"]
    local = [server for server in servers if server.startswith("127.")]
    if not local or any("." in server and server not in local for server in servers):
        return None
    others = [line for line in lines if line.startswith(("search ", "domain "))]
    return "\n".join([*others, f"nameserver {local[0]}", f"nameserver {_RESOLVER}", ""])


def _resolv_conf(directory: Path) -> list[str]:
    path = directory / "resolv.conf"
    try:
        shown = resolvers(Path("/etc/resolv.conf").read_text(errors="replace")[:_SAID_MAX])
    except OSError:
        shown = None
    if shown is None:
        return []
    fsutil.atomic_write(path, shown.encode(), durable=False)
    return [f"resolv={path}"]


def start(
    fd: int, ports: Sequence[PortForward], directory: Path, *, mac: str, user: User, count: int | None = None
) -> Passt:
    """Starts passt for a VM at the other end of *fd*. It ends when that does. *directory* is the instance's.

    *count*: a file into which the fence writes what has passed (:data:`COUNTS`).

    Raises:
        ToolMissing, HostError: it can't be started, or not with these ports.
    """
    host = routes()
    if host.ipv6 is None and any(port.ipv6 for port in ports):
        raise HostError(
            "ports of IPv6 addresses cannot be forwarded: this host has no route for IPv6", hint="use an IPv4 address"
        )
    argv = command(find(), ports, user if process.is_root() else None, host, mac)
    words = [
        f"guest={fd}",
        f"user={user.uid}:{user.gid}",
        f"mac={mac.replace(':', '')}",
        *_resolv_conf(directory),
        *([] if count is None else [f"count={count}"]),
        "--",
    ]
    try:
        fence = subprocess.Popen(
            [str(FENCE), *words, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd] if count is None else [fd, count],
            start_new_session=True,
            # SIGPIPE stays ignored: nobody reads what passt says later
            restore_signals=False,
            env=dict(process.CLEAN_ENV),
            cwd="/",
        )
    except OSError as exc:
        raise HostError(
            f"cannot run {FENCE}: {exc.strerror}", hint="install ovms again: a part of it is missing"
        ) from exc
    assert fence.stdout is not None
    with fence.stdout:
        line = fence.stdout.readline(32)
    if not line.strip().isdigit():
        raise HostError(f"the fence of the network does not start: {_said(fence)}")
    pid = int(line)
    return Passt(fence, pid, tuple(ProcessId.of(p) or ProcessId(p, 0, process.boot_id()) for p in (fence.pid, pid)))


def _said(fence: subprocess.Popen[bytes]) -> str:
    assert fence.stderr is not None
    os.set_blocking(fence.stderr.fileno(), False)
    return process.tail(fence.stderr.read(_SAID_MAX) or b"")


@dataclass()
class Passt:
    """A passt that was started, and its fence."""

    fence: subprocess.Popen[bytes]
    pid: int
    processes: tuple[ProcessId, ...]

    def settle(self) -> None:
        """Waits until it has bound its ports and forwards.

        Raises:
            PortInUse: a port is taken.
            HostError: it failed, or took too long.
        """
        deadline = time.monotonic() + _TIMEOUT
        ours = _filters(os.getpid()) or 0
        # the last thing that it does before it works is to forbid itself all else
        while (theirs := _filters(self.pid)) is not None and theirs <= ours:
            if time.monotonic() > deadline:
                raise HostError(f"passt was not ready within {_TIMEOUT:g} s")
            time.sleep(0.001)
        if theirs is None:
            raise failure(_said(self.fence))

    def forget(self) -> None:
        """Lets it run by itself from here on."""
        if self.fence.stderr is not None:
            self.fence.stderr.close()
        # so that a server that has started it does not keep it as a zombie, and nobody is warned
        _children.append(self.fence)
        _children[:] = [child for child in _children if child.poll() is None]


def failure(said: str) -> PortInUse | HostError:
    """What passt's last words mean."""
    if match := _PORT.search(said):
        protocol = "tcp" if match[1] == "t" else "udp"
        return PortInUse(
            f"port {match[3]}/{protocol} of {match[2]} cannot be bound",
            hint="choose another port with -p",
            port=int(match[3]),
        )
    if "Overlapping port specifier" in said:
        return HostError(
            "this version of passt forwards a port number of the host from one of its addresses only",
            hint="use another port for each address, or --network=user:slirp",
        )
    return HostError(f"passt does not start: {said}", hint="--network=user:slirp does without it")


_children: list[subprocess.Popen[bytes]] = []


def _filters(pid: int) -> int | None:
    """How many seccomp filters a process has; None when it is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "\nState:\tZ" in status or "\nState:\tX" in status:
        return None
    match = _FILTERS.search(status)
    return 0 if match is None else int(match[1])
