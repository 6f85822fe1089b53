"""Port forwards: what the user writes, and whether the host's port is free."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from typing import Final

from ovms.errors import HostError, PortInUse, UsageError
from ovms.lazy import regex, replace
from ovms.vmm.model import PortForward

#: Where ports are bound when nothing else is said: reaching a VM from outside this machine is a decision.
DEFAULT_IP: Final = "127.0.0.1"
_FORM: Final = regex(
    r"(?:(?:(?P<ip>[0-9.]+|\[[0-9A-Fa-f:.]+\]):)?(?P<host>[0-9]{0,5}):)?(?P<guest>[0-9]{1,5})(?:/(?P<proto>tcp|udp))?"
)
_HINT: Final = "write [[IP:]HOST:]GUEST[/udp], such as 8080:80 or 0.0.0.0:8080:80 or [::1]:8080:80; without HOST a free port is taken"


def parse(text: str) -> PortForward:
    """Reads what follows ``-p``; a host port of 0 stands for any free one.

    Raises:
        UsageError: not of the form.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(f"{text[:80]!a} is no port forward", hint=_HINT)
    host_ip = match["ip"] or DEFAULT_IP
    try:
        if host_ip.startswith("["):
            address = ipaddress.IPv6Address(host_ip[1:-1])
            if address.ipv4_mapped is not None:
                raise ValueError(host_ip)
            host_ip = str(address)
        else:
            ipaddress.IPv4Address(host_ip)
    except ValueError:
        raise UsageError(f"{text[:80]!a}: {host_ip} is no IP address", hint=_HINT) from None
    host, guest = int(match["host"] or 0), int(match["guest"])
    if host > 65535 or not 1 <= guest <= 65535:
        raise UsageError(f"{text[:80]!a}: ports are from 1 to 65535", hint=_HINT)
    return PortForward(host_ip, host, guest, match["proto"] or "tcp")


def settle(ports: Sequence[PortForward]) -> tuple[PortForward, ...]:
    """The same with a free port wherever any would do, and each one checked to be free now.

    Raises:
        UsageError: the same host port twice.
        PortInUse: taken.
        HostError: not ours to take (a low port, an address of another machine).
    """
    answer: list[PortForward] = []
    held: list[socket.socket] = []
    try:
        for port in ports:
            sock = _bind(port)
            held.append(sock)
            answer.append(replace(port, host_port=sock.getsockname()[1]))
    finally:
        for sock in held:
            sock.close()
    return tuple(answer)


def _bind(port: PortForward) -> socket.socket:
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET6 if port.ipv6 else socket.AF_INET, kind)
    try:
        if port.ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port.protocol == "tcp":
            # As the VMM will do it: a connection of a VM before that lingers in TIME_WAIT is no obstacle.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((port.host_ip, port.host_port))
        if port.protocol == "tcp":
            sock.listen(1)
    except OSError as exc:
        sock.close()
        place = f"port {port.host_port}/{port.protocol} of {port.host_ip}"
        if exc.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"{place} is in use",
                hint=f"choose another: -p HOST:{port.guest_port} ('-p {port.guest_port}' takes any free one)",
                port=port.host_port,
            ) from exc
        raise HostError(f"{place} cannot be used: {exc.strerror}", hint="choose another port or address") from exc
    return sock
