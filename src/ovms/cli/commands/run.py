"""Start a VM from an artifact: restored from its RAM snapshot where it has one, booted otherwise.

The artifact is pulled when it is not in the local store. In the foreground the console is on the terminal: Ctrl-C asks
the guest to power down, a second one ends it. With -d the VM runs on by itself, and its ID is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovms.cli import output, values
from ovms.cli.context import Context
from ovms.cli.exitcodes import Exit
from ovms.errors import InstanceNotFound, UsageError

if TYPE_CHECKING:
    from ovms.runtime.record import Record
    from ovms.runtime.runtime import Started
    from ovms.runtime.seeds import Seed

#: Seconds that a guest in the foreground gets to power down after the first Ctrl-C.
GRACE = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.set_defaults(parser=parser)
    parser.add_argument(
        "reference", metavar="REF", help="an artifact's name or digest, oci:DIR[:TAG], or oci-archive:FILE[:TAG]"
    )
    parser.add_argument("-d", "--detach", action="store_true", help="run in the background, and print the ID")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="send stdin to the console also when it is no terminal"
    )
    parser.add_argument("--name", metavar="NAME", help="the instance's name (default: made from the artifact's)")
    parser.add_argument("-m", "--memory", metavar="SIZE", type=values.memory, help="such as 512m or 2g (default: 512m)")
    parser.add_argument("--cpus", metavar="N", type=values.cpus, help="virtual CPUs (default: 1)")
    parser.add_argument(
        "-p",
        "--publish",
        metavar="[[IP:]HOST:]GUEST[/udp]",
        action="append",
        default=[],
        help="forward a port of the host (127.0.0.1 unless IP says otherwise) to the guest; may be repeated",
    )
    parser.add_argument(
        "--network",
        metavar="NETWORK",
        default="user",
        help="user (default): outwards by passt, else by QEMU itself (user:passt, user:slirp: that one); none: no "
        "network; tap, tap:NAME: a tap device of its own, or one that is there; bridge:NAME: a tap device that is a port "
        "of a bridge; netns:PATH[,redirect=NAME]: a tap device in a network namespace, with the traffic of an interface "
        "there",
    )
    parser.add_argument(
        "-v",
        "--volume",
        metavar="FILE|DIR[,OPTION...]",
        action="append",
        default=[],
        help="a disk more: raw, or with format=qcow2; ro: the guest only reads it; serial=NAME: in the guest it is"
        " /dev/disk/by-id/virtio-NAME (default: vol0, vol1, ...). Of a directory: to be read by the guest, or with rw also"
        " written to, after 'mount -t 9p -o trans=virtio NAME /mnt', with tag=NAME (default as above); via=virtiofs: after"
        " 'mount -t virtiofs NAME /mnt'. May be repeated",
    )
    told = parser.add_argument_group("for a guest with cloud-init, by a NoCloud seed disk")
    told.add_argument("--user-data", metavar="FILE|-", help="its user data, from a file or stdin")
    told.add_argument(
        "--ssh-key",
        metavar="FILE",
        action="append",
        default=[],
        help="public keys that may log in as the guest's first user; may be repeated",
    )
    told.add_argument(
        "--hostname",
        metavar="NAME",
        help="the guest's host name (default: the instance's name); also for a restored guest that has an agent",
    )
    parser.add_argument("--rm", action="store_true", help="remove the instance when it has ended")
    restore = parser.add_mutually_exclusive_group()
    restore.add_argument(
        "--restore",
        choices=("auto", "require", "never"),
        default="auto",
        help="a RAM snapshot: restore it where this host can (default), or fail, or leave it aside",
    )
    restore.add_argument(
        "--cold", dest="restore", action="store_const", const="never", help="the same as --restore=never"
    )
    parser.add_argument(
        "--identity",
        metavar="FILE",
        action="append",
        default=[],
        help="age identities that decrypt its RAM snapshot (default: those of OVMS_IDENTITY, else"
        " ~/.config/ovms/identities.txt); may be repeated",
    )
    parser.add_argument(
        "--keep-identity",
        action="store_true",
        help="a restored guest keeps the clock, host name, machine ID and addresses of the snapshot (default: its agent gives it"
        " its own)",
    )
    parser.add_argument(
        "--pull", choices=("missing", "always", "never"), default="missing", help="when to pull (default: missing)"
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", type=values.platform, help="of an index (default: this host's)"
    )
    parser.add_argument(
        "--restart",
        metavar="POLICY",
        default="no",
        help="no (default), on-failure, or on-failure:N: boot it again when its VM fails",
    )
    parser.add_argument(
        "--security-opt",
        metavar="PART=off",
        action="append",
        default=[],
        help="leave out a part of the jail: user, namespaces, root, network, seccomp, cgroups, limits; may be repeated",
    )
    values.add_quiet(parser)
    values.add_tls_verify(parser)
    parser.add_argument("--accel", choices=("kvm", "tcg"), help="default: KVM where guests really run on it, else TCG")
    parser.add_argument("--runtime", metavar="IMPL", default="qemu", help="the VMM: qemu (default)")


def run(args: argparse.Namespace, context: Context) -> int:
    """Runs the command."""
    if args.json and not args.detach:
        raise UsageError("--json needs -d: in the foreground, stdout is the console")
    if args.detach:
        instance = _detached(args, context)
        if args.json:
            output.answer_json(instance)
        else:
            output.answer(instance["instance_id"])
        return Exit.OK
    return _foreground(args, context)


#: What the runtime contract can say of a start; with any other option, this process does it, beside the server.
_CONTRACT = frozenset(
    {
        "reference",
        "detach",
        "interactive",
        "json",
        "name",
        "memory",
        "cpus",
        "publish",
        "rm",
        "restore",
        "accel",
        "keep_identity",
    }
)


def _detached(args: argparse.Namespace, context: Context) -> dict[str, Any]:
    if _fits_contract(args) and context.has_server:
        return _ask_server(args, context)
    from ovms.runtime.document import instance

    return instance(context.runtime.instances.status(_start(args, context).record))


def _ask_server(args: argparse.Namespace, context: Context) -> dict[str, Any]:
    from ovms.runtime import names
    from ovms.runtime.remote import Remote

    if args.name is not None:
        names.check(args.name)  # as without a server
    client = context.client
    assert isinstance(client, Remote)
    reference = args.reference
    if ":" in reference and reference.partition(":")[0] in ("oci", "oci-archive"):
        from ovms.oci.transport import parse_place

        place = parse_place(reference)
        reference = reference if place is None else str(place.below(Path.cwd()))
    instance = client.ask_to_start(reference, _overrides(args), context.progress)
    _tell(str(instance.get("accel")), instance.get("accel_reason"), instance.get("not_restored"))
    return instance


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    # without what a start in this process needs: most of the time that the command takes goes into its imports
    values: dict[str, Any] = {
        "memory": args.memory,
        "cpus": args.cpus,
        "name": args.name,
        "accel": args.accel,
        "restore": args.restore,
        "remove_on_exit": args.rm or None,
        "keep_identity": args.keep_identity or None,
    }
    if args.publish:
        from ovms.runtime import ports
        from ovms.runtime.remote import port_override

        values["ports"] = [port_override(ports.parse(text)) for text in args.publish]
    return {key: value for key, value in values.items() if value is not None}


def _tell(accel: str, accel_reason: str | None, not_restored: str | None) -> None:
    if accel_reason is not None:
        output.say(f"running under {accel.upper()}, not KVM: {accel_reason}")
    if not_restored is not None:
        output.say(f"booted from the disk, not restored from the RAM snapshot: {not_restored}")


def _fits_contract(args: argparse.Namespace) -> bool:
    default = args.parser.get_default
    return all(value == default(name) for name, value in vars(args).items() if name not in _CONTRACT)


def _start(args: argparse.Namespace, context: Context) -> Started:
    from ovms.runtime import cgroups

    # the kernel gets it ready beside our imports; where it is not wanted, it does no harm
    with cgroups.at_hand():
        return _started(args, context)


def _started(args: argparse.Namespace, context: Context) -> Started:
    from ovms.artifact.resolve import resolve
    from ovms.oci.platform import check_runnable
    from ovms.runtime import ports, restart, volumes
    from ovms.runtime.jail import SecurityOptions
    from ovms.runtime.network import Wanted
    from ovms.runtime.runtime import RunOptions
    from ovms.spec.choices import Accel, RestorePolicy

    options = RunOptions(
        name=args.name,
        memory=args.memory,
        vcpus=args.cpus,
        ports=tuple(ports.parse(text) for text in args.publish),
        accel=None if args.accel is None else Accel(args.accel),
        restore=RestorePolicy(args.restore),
        remove_on_exit=args.rm,
        runtime=args.runtime,
        restart=restart.parse(args.restart),
        security=SecurityOptions.parse(args.security_opt),
        network=Wanted.parse(args.network),
        volumes=volumes.parse(args.volume),
        seed=_seed(args),
        keep_identity=args.keep_identity,
        identities=tuple(Path(path) for path in args.identity),
    )
    runtime = context.runtime
    runtime.vmm(args.runtime)
    check_runnable(args.platform)
    with runtime.layout.using():
        with context.pulling():
            found = resolve(
                runtime.layout,
                context.connect,
                args.reference,
                policy=args.pull,
                progress=context.progress,
                platform=args.platform,
                gate=runtime.gate(options),
                guard=runtime.guard,
            )
        started = runtime.start(found, options, context.progress)
    record = started.record
    _tell(record.machine.accel, record.accel_reason, started.not_restored)
    return started


def _seed(args: argparse.Namespace) -> Seed | None:
    if args.user_data is None and not args.ssh_key and args.hostname is None:
        return None
    import os
    from pathlib import Path

    from ovms.runtime import seeds

    stdin = 0
    if args.user_data == "-" and (args.interactive or os.isatty(stdin)):
        raise UsageError("--user-data - reads stdin, which is the console's here", hint="name a file")
    source = stdin if args.user_data == "-" else Path(args.user_data or "")
    told = seeds.Seed(
        None if args.user_data is None else seeds.read_user_data(source),
        tuple(key for path in args.ssh_key for key in seeds.read_keys(Path(path))),
        args.hostname,
    )
    seeds.check(told)
    return told


def _foreground(args: argparse.Namespace, context: Context) -> int:
    from ovms.cli.console import Attachment, Interrupts

    # Until the VM runs, Ctrl-C breaks the start off; from then on it is the guest's.
    started = _start(args, context)
    assert not isinstance(started, dict)
    record = started.record
    interrupts = Interrupts()
    with interrupts.caught():
        Attachment(context.runtime, record, interrupts, pipes=args.interactive).run(GRACE)
    return _ending(args, context, record)


def _ending(args: argparse.Namespace, context: Context, record: Record) -> int:
    from ovms.vmm.model import Ending

    instances = context.runtime.instances
    try:
        status = instances.status(instances.find(record.id))
    except InstanceNotFound:
        return Exit.KILLED  # 'ovm rm -f' took it away
    if args.rm:
        context.runtime.remove(status.record)
    if status.ending is Ending.POWERED_OFF:
        return Exit.OK
    if status.ending is Ending.PANICKED:
        output.say(f"the guest of {record.name} panicked")
        return Exit.VMM
    output.say(f"{record.name} was ended" if status.record.stop_requested else f"the VMM of {record.name} died")
    return Exit.KILLED if status.record.stop_requested else Exit.VMM
