"""Ports of a running instance: which are forwarded, and changing that.

QEMU's own user network changes single forwards, and leaves the rest alone. passt takes its ports when it starts (up to
the versions of today), so another one takes its place: connections through the one before end, new ones go on at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from ovms.errors import NotFound, OvmsError, StateConflict, Unsupported
from ovms.lazy import replace
from ovms.runtime import ports as port_forwards
from ovms.runtime.network import Kind, check_ports
from ovms.runtime.record import Record
from ovms.runtime.runtime import Runtime
from ovms.vmm.model import PortForward
from ovms.vmm.protocol import Control


def change(runtime: Runtime, record: Record, add: Sequence[PortForward], remove: Sequence[PortForward]) -> Record:
    """Forwards further ports of a running instance, and ends forwards: all of it, or nothing. Returns its new record.

    *remove* names forwards as ``-p`` does; without a host port it is every one to that port of the guest.

    Raises:
        StateConflict: the instance does not run.
        Unsupported: its network forwards no ports, or not these.
        NotFound: no such forward.
        PortInUse, UsageError, HostError: a port is taken, or not ours to take.
        VmmError: the VMM failed.
    """
    instances = runtime.instances
    with instances.locked(record) as newest:
        if newest.process is None or not newest.process.alive():
            raise StateConflict(
                f"the instance {newest.name} does not run", hint="'ovm ps -a' tells its state", instance=newest.name
            )
        if not newest.network.kind.forwards:
            raise Unsupported(
                f"the network of {newest.name} is {newest.network}, where no ports are forwarded",
                hint="the guest has an address of its own there; or run it with --network=user",
            )
        going = [port for pattern in remove for port in _matching(newest, pattern)]
        check_ports(newest.network.kind, add)
        coming = _settled(add, going)
        wanted = replace(newest, ports=(*(port for port in newest.ports if port not in going), *coming))
        if wanted.ports == newest.ports:
            return newest
        if newest.network.kind is Kind.SLIRP:
            with instances.control(newest) as control:
                _change_slirp(control, coming, going)
        else:
            try:
                instances.reconnect(wanted)
            except OvmsError:
                with contextlib.suppress(OvmsError):  # the next command tries again
                    instances.reconnect(newest)
                raise
        return instances.save(wanted)


def _settled(add: Sequence[PortForward], going: Sequence[PortForward]) -> tuple[PortForward, ...]:
    # a port of the host that is let go may lead elsewhere in the same breath
    freed = {(port.host_ip, port.host_port, port.protocol) for port in going}
    kept = [(port.host_ip, port.host_port, port.protocol) in freed for port in add]
    settled = iter(port_forwards.settle([port for port, free in zip(add, kept, strict=True) if not free]))
    return tuple(port if free else next(settled) for port, free in zip(add, kept, strict=True))


def _matching(record: Record, pattern: PortForward) -> list[PortForward]:
    def fits(port: PortForward) -> bool:
        return (port.guest_port, port.protocol) == (pattern.guest_port, pattern.protocol) and (
            pattern.host_port == 0 or (port.host_port, port.host_ip) == (pattern.host_port, pattern.host_ip)
        )

    found = [port for port in record.ports if fits(port)]
    if not found:
        what = f"{pattern.guest_port}/{pattern.protocol}" if pattern.host_port == 0 else str(pattern)
        raise NotFound(f"{record.name} has no forward {what}", hint=f"'ovm port {record.name}' lists those that it has")
    return found


def _change_slirp(control: Control, coming: Sequence[PortForward], going: Sequence[PortForward]) -> None:
    with contextlib.ExitStack() as undo:
        for port in going:
            control.remove_forward(port)
            undo.callback(_quietly, control.add_forward, port)
        for port in coming:
            control.add_forward(port)
            undo.callback(_quietly, control.remove_forward, port)
        undo.pop_all()


def _quietly(call: Callable[[PortForward], None], port: PortForward) -> None:
    with contextlib.suppress(OvmsError):
        call(port)
