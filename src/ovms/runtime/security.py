"""What confines a running VM, read from the kernel: not what we asked for, but what is in force."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ovms.errors import HostError, StateConflict
from ovms.runtime.record import Record
from ovms.vmm import virtiofs, watch
from ovms.vmm.extras import BY_VIRTIOFS, share_name
from ovms.vmm.jail import Namespace
from ovms.vmm.model import VmFiles

_SECCOMP: Final = {"0": "off", "1": "strict", "2": "filter"}
#: Lines of ``/proc/PID/limits`` that are worth showing: name there → name here.
_LIMITS: Final = {
    "Max open files": "open_files",
    "Max core file size": "core",
    "Max locked memory": "locked_memory",
    "Max processes": "processes",
}


def in_force(record: Record, files: VmFiles | None = None) -> dict[str, Any]:
    """What the kernel says of a VMM's confinement, and what of a whole jail is missing, and why.

    *files*: the VM's, in which the programs beside it are found that serve directories.

    Raises:
        StateConflict: it does not run.
        HostError: the kernel does not let us look.
    """
    process = record.process
    if process is None or not process.alive():
        raise StateConflict(f"the instance {record.name} does not run", hint="what confines a VM is read from it")
    directory = Path(f"/proc/{process.pid}")
    try:
        status = _status(directory)
        namespaces = {n.proc_name: _own_namespace(directory, n) for n in Namespace}
        return {
            "pid": process.pid,
            "user": {"uid": int(status["Uid"].split()[1]), "gid": int(status["Gid"].split()[1])},
            "groups": [int(group) for group in status.get("Groups", "").split()],
            "capabilities": {
                name: _capabilities(status[key])
                for key, name in (("CapEff", "effective"), ("CapPrm", "permitted"), ("CapBnd", "bounding"))
            },
            "no_new_privileges": status["NoNewPrivs"] == "1",
            "seccomp": {
                "mode": _SECCOMP.get(status["Seccomp"], status["Seccomp"]),
                "filters": int(status.get("Seccomp_filters", "0")),
            },
            "namespaces": namespaces,
            "own_root": namespaces[Namespace.MOUNT.proc_name] and record.jail.own_root,
            "directories": _directories(directory, record, files),
            "limits": _limits(directory),
            "cgroups": _cgroups(record),
            "memory": {"required": record.memory_locked, "locked_bytes": _locked(record)},
            "missing": _missing(record, namespaces),
        }
    except (OSError, KeyError, ValueError) as exc:
        raise HostError(f"what confines {record.name} cannot be read: {exc}", pid=process.pid) from exc


def _status(directory: Path) -> dict[str, str]:
    lines = (directory / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _own_namespace(directory: Path, namespace: Namespace) -> bool:
    own = Path("/proc/self/ns") / namespace.proc_name
    return (directory / "ns" / namespace.proc_name).readlink() != own.readlink()


def _capabilities(mask: str) -> list[int]:
    value = int(mask, 16)
    return [bit for bit in range(64) if value >> bit & 1]


def _limits(directory: Path) -> dict[str, int | None]:
    answer: dict[str, int | None] = {}
    for line in (directory / "limits").read_text().splitlines():
        for name, key in _LIMITS.items():
            if line.startswith(name):
                soft = line[len(name) :].split()[0]
                answer[key] = None if soft == "unlimited" else int(soft)
    return answer


def _directories(directory: Path, record: Record, files: VmFiles | None) -> list[dict[str, Any]]:
    # of each that is shared how it is mounted for who serves it; what is mounted in it is not listed
    answer = []
    for i, volume in enumerate(volume for volume in record.volumes if volume.format is None):
        options = list[str]()
        if volume.via != BY_VIRTIOFS:
            options = _mount_options(directory, share_name(i))
        elif files is not None and (serving := watch.find(virtiofs.files_of(files.directory, i))) is not None:
            options = _mount_options(Path(f"/proc/{serving.vmm.pid}"), share_name(0))
        about = {"name": volume.name, "path": str(volume.path), "via": volume.via}
        answer.append({**about, "writable": "rw" in options, "mount": sorted(options)})
    return answer


def _mount_options(process: Path, name: str) -> list[str]:
    for line in (process / "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split()
        if fields[4] == f"/{name}":
            return fields[5].split(",")
    return []


def _locked(record: Record) -> int:
    # of what it was restored from: its watcher has that locked
    if record.watcher is None or not record.watcher.alive():
        return 0
    return int(_status(Path(f"/proc/{record.watcher.pid}"))["VmLck"].split()[0]) * 1024


def _cgroups(record: Record) -> list[dict[str, Any]]:
    answer = []
    for procs in record.jail.cgroups:
        group: dict[str, Any] = {"path": str(procs.parent)}
        for name in ("memory.max", "memory.limit_in_bytes", "memory.swap.max", "memory.swappiness", "pids.max"):
            try:
                group[name] = (procs.parent / name).read_text().strip()
            except OSError:
                continue
        answer.append(group)
    return answer


def _missing(record: Record, namespaces: Mapping[str, bool]) -> dict[str, str]:
    missing = dict(record.jail.missing)
    # should the kernel not have done what the record says, that is the thing to know
    for namespace in record.jail.namespaces:
        if not namespaces[namespace.proc_name]:
            missing[f"namespace {namespace.proc_name}"] = "asked for, and not in force"
    if resource.RLIMIT_CORE not in record.jail.limits:
        missing.setdefault("limits", "left out by --security-opt")
    return missing
