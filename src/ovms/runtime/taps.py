"""Tap devices: made for one VM, in this network namespace or another one; or somebody else's.

A device that is made here is not persistent: it ends with its last descriptor, so with the VMM that has it. What a
redirect leaves behind (two filters of ``tc``) has a number that is the VM's own.

Source: the kernel's ``networking/tuntap.rst``, tc-u32(8), tc-mirred(8).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from ovms import process
from ovms.errors import HostError, InUse, OvmsError

_TUNSETIFF: Final = 0x400454CA
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCGIFINDEX: Final = 0x8933
_SIOCBRADDIF: Final = 0x89A2
_IFF_UP: Final = 1
_IFF_TAP: Final = 2
_IFF_NO_PI: Final = 0x1000
#: Never a device that is there already.
_IFF_TUN_EXCL: Final = 0x8000
_CLONE_NEWNET: Final = 0x40000000
_TUN: Final = Path("/dev/net/tun")
_CLASS: Final = Path("/sys/class/net")
_TIMEOUT: Final = 10.0
_PRIVILEGE: Final = "a tap device needs root, or one that was made for you: 'ip tuntap add NAME mode tap user YOU'"
_T = TypeVar("_T")


def name_of(instance_id: str) -> str:
    """What the tap device of an instance is called: at most 15 characters, and nobody else's."""
    return f"ovm{instance_id.replace('-', '')[:12]}"


def open_existing(name: str) -> int:
    """A descriptor of somebody else's tap device, which stays as it is.

    Raises:
        HostError: there is none, or it is not ours to use.
        InUse: another VM has it.
    """
    if not (_CLASS / name / "tun_flags").exists():
        raise HostError(
            f"there is no tap device {name}", hint=f"make it: 'ip tuntap add {name} mode tap', or use --network=tap"
        )
    return _open(name, _IFF_TAP | _IFF_NO_PI)


def make(name: str, bridge: str | None) -> int:
    """A descriptor of a new tap device, which is up, and a port of *bridge*.

    Raises:
        HostError: we may not, or there is no such bridge.
    """
    if bridge is not None and not (_CLASS / bridge / "bridge").exists():
        raise HostError(f"there is no bridge {bridge}", hint=f"make it: 'ip link add {bridge} type bridge'")
    fd = _open(name, _IFF_TAP | _IFF_NO_PI | _IFF_TUN_EXCL)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            if bridge is not None:
                request = _ifreq(bridge, struct.pack("i", socket.if_nametoindex(name)))
                fcntl.ioctl(control, _SIOCBRADDIF, request)
            flags = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, _ifreq(name)), 16)[0]
            fcntl.ioctl(control, _SIOCSIFFLAGS, _ifreq(name, struct.pack("H", flags | _IFF_UP)))
    except OSError as exc:
        os.close(fd)
        raise HostError(f"the tap device {name} cannot be set up: {exc.strerror}") from exc
    return fd


def make_in(path: Path, name: str, redirect: str | None) -> int:
    """The same in the network namespace at *path*; with *redirect*, the traffic of that interface there is the guest's.

    Raises:
        HostError: we may not, or it is no network namespace.
    """

    def work() -> int:
        fd = make(name, None)
        try:
            if redirect is not None:
                _add_redirect(redirect, name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    return inside(path, work)


def counts(name: str, path: Path | None) -> tuple[int, int]:
    """The bytes that came out of a tap device (a VM has sent them), and that went into it; *path*: the namespace that it is in.

    Raises:
        HostError: we may not look into the namespace, or it is gone.
        OSError, ValueError: the device is gone.
    """

    def work() -> tuple[int, int]:
        # of the thread, which may be in another namespace than the process
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            device, colon, figures = line.partition(":")
            if colon and device.strip() == name:
                words = figures.split()
                return int(words[0]), int(words[8])
        raise ValueError(f"there is no device {name}")

    return work() if path is None else inside(path, work)


def _open(name: str, flags: int) -> int:
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        hint: str | None = _PRIVILEGE if exc.errno == errno.EACCES else "load the module tun, or use --network=user"
        raise HostError(f"{_TUN} cannot be opened: {exc.strerror}", hint=hint) from exc
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _ifreq(name, struct.pack("H", flags)))
    except OSError as exc:
        os.close(fd)
        if exc.errno == errno.EBUSY:
            raise InUse(f"the tap device {name} is in use", hint="another VM has it; choose another") from exc
        hint = _PRIVILEGE if exc.errno == errno.EPERM else None
        raise HostError(f"the tap device {name} cannot be opened: {exc.strerror}", hint=hint) from exc
    return fd


def _ifreq(name: str, value: bytes = b"") -> bytes:
    return struct.pack("16s24s", name.encode("ascii"), value)


# --- another namespace -----------------------------------------------------------------------------------------------


def inside(path: Path, work: Callable[[], _T]) -> _T:
    """Does *work* in the network namespace at *path*: in a thread that enters it, and ends then.

    Raises:
        HostError: we may not enter it, or it is none.
    """
    try:
        # not O_NOFOLLOW: /proc/PID/ns/net is a link
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise HostError(f"the network namespace {path} cannot be opened: {exc.strerror}") from exc
    answer: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            _enter(namespace, path)
            answer.append(work())
        except BaseException as exc:  # noqa: BLE001 - raised again by who waits
            failed.append(exc)

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        os.close(namespace)
    if failed:
        raise failed[0]
    return answer[0]


def _enter(namespace: int, path: Path) -> None:
    import ctypes  # os.setns is there from Python 3.12 on

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        hint = "only root can" if number == errno.EPERM else "it is what 'ip netns add' makes, or /proc/PID/ns/net"
        raise HostError(f"the network namespace {path} cannot be entered: {os.strerror(number)}", hint=hint)


def _number(tap: str) -> str:
    # of our filters: of no two VMs the same
    return str(int(tap[-12:], 16) % 0x7FFF + 1)


def _add_redirect(interface: str, tap: str) -> None:
    for source, target in ((interface, tap), (tap, interface)):
        _tc("qdisc", "add", "dev", source, "ingress", check=False)  # one that is there will do
        _tc(
            *("filter", "add", "dev", source, "parent", "ffff:", "protocol", "all", "pref", _number(tap)),
            *("u32", "match", "u32", "0", "0", "action", "mirred", "egress", "redirect", "dev", target),
        )


def remove_redirect(path: Path, interface: str, tap: str) -> None:
    """Takes a redirect back; what went to the tap stays with the namespace again.

    Raises:
        HostError: the namespace, or the redirect, is no more.
    """

    def work() -> None:
        _tc("filter", "del", "dev", interface, "parent", "ffff:", "pref", _number(tap))

    inside(path, work)


def _tc(*words: str, check: bool = True) -> None:
    # started from the thread that is in the namespace, so it is there, too
    try:
        process.run([process.find_tool("tc"), *words], timeout=_TIMEOUT, check=check)
    except OvmsError as exc:
        raise HostError(f"the traffic cannot be redirected: {exc.message}", hint=exc.hint) from exc
