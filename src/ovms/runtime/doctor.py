"""What this host can do for VMs, what is lost where it can't, and what to do about it.

Each check looks at the real thing: it runs a program in the jail, makes a cgroup, reads a process's memory. None changes
anything that stays, and none that fails stops the others.
"""

from __future__ import annotations

import email.utils
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Final

import ovms
from ovms import fsutil, process
from ovms.errors import OvmsError, RegistryDenied, ToolMissing
from ovms.lazy import dataclass
from ovms.oci.credentials import Credentials
from ovms.oci.session import Session
from ovms.runtime import cgroups, hostkernel
from ovms.runtime import jail as jails
from ovms.runtime.root import Root
from ovms.spec import limits
from ovms.spec.choices import Accel
from ovms.vmm.jail import Jail
from ovms.vmm.model import VmFiles
from ovms.vmm.qemu import binary, features, versions
from ovms.vmm.qemu.vmm import QemuVmm

#: Bytes of disk below which it is said.
DISK_LOW: Final = 2 * limits.GIB
#: Seconds that the clock may be off from a registry's: tokens are of some minutes.
CLOCK_SKEW: Final = 60.0
_NETWORK_DISKS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph"})
_VIRTIOFSD: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")


class Verdict(StrEnum):
    """What a check comes to: all there, something lost, or no VM runs here."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found; where it is not all well, what is lost by it, and what to do."""

    check: str
    verdict: Verdict
    found: str
    lost: str | None = None
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        fields = {"check": self.check, "verdict": str(self.verdict), "found": self.found}
        more = {"lost": self.lost, "remedy": self.remedy}
        return {**fields, **{key: value for key, value in more.items() if value is not None}}


@dataclass(frozen=True)
class Host:
    """What is looked at. *proc* and *credentials* are others in tests alone."""

    root: Root
    credentials: Credentials
    proc: Path = Path("/proc")

    @property
    def cache(self) -> binary.Cache:
        """Where facts about this host are remembered."""
        return binary.Cache(self.root.cache / "host.json")


def examine(host: Host, sessions: Callable[[str], Session], registries: Iterable[str] = ()) -> Iterator[Finding]:
    """All findings, each as soon as it is there; *registries* are asked last."""
    for check, look in _CHECKS.items():
        yield from _guarded(check, partial(look, host))
    for name in registries:
        yield from _guarded("registry", partial(_registry, sessions, name))


def _guarded(check: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except OvmsError as exc:
        return [Finding(check, Verdict.WARN, f"cannot be looked at: {exc.message}", remedy=exc.hint)]
    except OSError as exc:
        return [Finding(check, Verdict.WARN, f"cannot be looked at: {exc.strerror or exc}")]


def _install(package: str) -> str:
    return f"Debian, Ubuntu: apt-get install {package}"


# --- QEMU ------------------------------------------------------------------------------------------------------------


def _qemu(host: Host) -> list[Finding]:
    try:
        found = binary.find(binary.Cache(host.root.cache / "qemu.json"))
    except OvmsError as exc:
        return [Finding("qemu", Verdict.FAIL, exc.message, "no VM can be run", exc.hint)]
    text = f"{found.version}, {found.default_machine}"
    if versions.number(found.version) < versions.OLDEST:
        oldest = ".".join(map(str, versions.OLDEST))
        yours = Finding("qemu", Verdict.WARN, text, f"nobody has tried versions before {oldest}", "install a newer one")
    else:
        yours = Finding("qemu", Verdict.OK, text)
    return [yours, *_built_with(found), _accel(QemuVmm(host.root.cache))]


def _built_with(found: binary.QemuBinary) -> Iterator[Finding]:
    lacking = features.lacking(found.path)
    for needed, verdict in ((True, Verdict.FAIL), (False, Verdict.WARN)):
        these = [item for item in lacking if item.needed is needed]
        if these:
            names = ", ".join(item.name for item in these)
            lost = ", ".join(dict.fromkeys(item.purpose for item in these))
            yield Finding("qemu-features", verdict, f"built without {names}", lost, _install("qemu-system-x86"))
    if not lacking:
        yield Finding("qemu-features", Verdict.OK, "all devices, memory backends and networks that ovms uses")
    if found.sandbox:
        yield Finding("seccomp", Verdict.OK, "QEMU has its sandbox")
    else:
        lost = "a second filter of system calls, of QEMU's own"
        yield Finding("seccomp", Verdict.WARN, "QEMU was built without -sandbox", lost, _install("qemu-system-x86"))


def _accel(vmm: QemuVmm) -> Finding:
    choice = vmm.choose_accel(None)
    if choice.accel is Accel.KVM:
        return Finding("kvm", Verdict.OK, "a test guest runs on it")
    reason = choice.reason or ""
    if "permission" in reason:
        remedy = "add yourself to its group, and log in anew: usermod -aG kvm USER"
    elif "no /dev/kvm" in reason:
        remedy = "modprobe kvm-intel, or kvm-amd; turn virtualisation on in the firmware (in a VM: nested, on its host)"
    else:
        remedy = "look at 'dmesg' for kvm; in a VM, nested virtualisation of its host may be broken"
    return Finding("kvm", Verdict.WARN, reason, "speed: VMs run under TCG, ten times slower and more", remedy)


# --- confinement -----------------------------------------------------------------------------------------------------


def _jail(host: Host) -> list[Finding]:
    jail, missing = jails.able(host.cache, process.is_root())
    if not missing:
        kinds = ", ".join(sorted(namespace.name.lower() for namespace in jail.namespaces))
        return [Finding("jail", Verdict.OK, f"whole: a user and a root of its own, namespaces ({kinds})")]
    reason = "; ".join(f"{part}: {why}" for part, why in missing.items())
    if jail == Jail():
        lost = "VMs: the watcher that starts them can't be run"
        return [Finding("jail", Verdict.FAIL, reason, lost, "install ovms again, from a wheel for this machine")]
    lost = "confinement: a guest that breaks out of QEMU gets farther"
    return [Finding("jail", Verdict.WARN, reason, lost, _user_namespaces(host.proc))]


def _user_namespaces(proc: Path) -> str:
    """What most likely forbids user namespaces, and how it is changed."""
    sysctls = (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),  # Ubuntu from 23.10 on
        ("kernel/unprivileged_userns_clone", "0", "1"),  # Debian before 11
        ("user/max_user_namespaces", "0", "15000"),
    )
    for name, bad, good in sysctls:
        if _read(proc / "sys" / name) == bad:
            return f"sysctl -w {name.replace('/', '.')}={good} (to keep it: a file in /etc/sysctl.d), or run as root"
    return "in a container: let it make namespaces (podman, docker: --privileged); else run as root"


def _cgroups(host: Host) -> list[Finding]:
    groups = cgroups.make(f"doctor-{os.getpid()}", cgroups.Limits(64 * limits.MIB, 64), proc=host.proc / "self")
    cgroups.remove(groups.directories)
    if not groups.missing:
        version = "v2" if any((group.parent / "cgroup.controllers").exists() for group in groups.directories) else "v1"
        return [Finding("cgroups", Verdict.OK, f"{version}: {', '.join(cgroups.CONTROLLERS)}")]
    reason = "; ".join(f"{name}: {why}" for name, why in groups.missing.items())
    remedy = (
        "in a container: mount the cgroups writable"
        if os.geteuid() == 0
        else "log in by a session of systemd with cgroups v2, or: systemd-run --user --scope -p Delegate=yes ovm …"
    )
    return [Finding("cgroups", Verdict.WARN, reason, "bounds for what a VM uses, and word of an out-of-memory", remedy)]


def _memory_access(host: Host) -> list[Finding]:
    jail, _ = jails.able(host.cache, process.is_root())
    reason = _why_unreadable(jail)
    if reason is None:
        return [Finding("ptrace", Verdict.OK, "the memory of VMs can be read")]
    scope = _read(host.proc / "sys/kernel/yama/ptrace_scope")
    remedy = "run as root"
    if scope not in (None, "0"):
        remedy = f"sysctl -w kernel.yama.ptrace_scope=0 (it is {scope}), or run as root"
    return [Finding("ptrace", Verdict.WARN, reason, "snapshots of VMs that were restored", remedy)]


def _why_unreadable(jail: Jail) -> str | None:
    with tempfile.TemporaryDirectory(prefix="ovms-doctor-") as scratch:
        # a sleep that nobody's child is, in the jail of a VM
        watched = jails.run(jail, VmFiles(Path(scratch)), ("/usr/bin/sleep", "10"))
        try:
            pid = watched.vmm.pid
            start = int(Path(f"/proc/{pid}/maps").read_text().partition("-")[0], 16)
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                return None if len(os.pread(memory.fileno(), 16, start)) == 16 else "a VM's memory cannot be read"
        except (OSError, ValueError) as exc:
            return f"a VM's memory cannot be read: {getattr(exc, 'strerror', None) or exc}"
        finally:
            watched.vmm.kill()
            watched.watcher.wait(5.0)


def _memlock() -> list[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)  # who needs more than the soft limit raises it
    if process.is_root() or hard == resource.RLIM_INFINITY:
        return [Finding("memlock", Verdict.OK, "no limit")]
    lost = "snapshots whose memory must be locked (mlock_required)"
    remedy = "a line 'USER - memlock unlimited' in /etc/security/limits.d/ovms.conf, and log in anew"
    return [Finding("memlock", Verdict.WARN, f"{hard >> 20} MiB", lost, remedy)]


# --- programs beside QEMU --------------------------------------------------------------------------------------------


def _programs() -> list[Finding]:
    programs = (
        ("passt", "passt", "a network outside QEMU: VMs share the host's network namespace", ()),
        ("virtiofsd", "virtiofsd", "shared directories by virtiofs (9p is slower)", _VIRTIOFSD),
        ("qemu-img", "qemu-utils", "conversion of disks", ()),
    )
    findings = []
    for name, package, lost, places in programs:
        path = next((place for place in places if os.access(place, os.X_OK)), None) or _which(name)
        if path is None:
            findings.append(Finding(name, Verdict.WARN, "not installed", lost, _install(package)))
        else:
            findings.append(Finding(name, Verdict.OK, path))
    return findings


def _which(name: str) -> str | None:
    try:
        return str(process.find_tool(name))
    except ToolMissing:
        return None


# --- the root, the user's files, the clock ---------------------------------------------------------------------------


def _root(host: Host) -> list[Finding]:
    try:
        host.root.prepare()
        probe = tempfile.TemporaryDirectory(prefix=".doctor-", dir=host.root.path)
    except (OvmsError, OSError) as exc:
        reason = exc.message if isinstance(exc, OvmsError) else f"{host.root.path}: {exc.strerror}"
        remedy = "choose another with OVMS_ROOT or --root, or make it writable for you"
        return [Finding("root", Verdict.FAIL, reason, "no VM can be run", remedy)]
    with probe as directory:
        holes, reflinks = _holes(Path(directory)), _reflinks(Path(directory))
    kind, free = _file_system(host), fsutil.free_space(host.root.path)
    text = f"{host.root.path} ({kind}), {free / limits.GIB:.1f} GiB free"
    lost: list[str] = []
    remedies: list[str] = []
    if free < DISK_LOW:
        lost.append("room")
        remedies.append("ovm prune, or another disk: OVMS_ROOT")
    if kind in _NETWORK_DISKS:
        lost.append("speed, and locks that hold between hosts")
        remedies.append("a disk of this host: OVMS_ROOT")
    if not holes:
        lost.append("holes: disks and memory take their whole size")
        remedies.append("ext4, xfs or btrfs")
    if lost:
        return [Finding("root", Verdict.WARN, text, "; ".join(lost), "; ".join(dict.fromkeys(remedies)))]
    return [Finding("root", Verdict.OK, f"{text}, {'' if reflinks else 'no '}reflinks")]


def _holes(directory: Path) -> bool:
    with (directory / "sparse").open("xb") as file:
        os.ftruncate(file.fileno(), limits.MIB)
        return os.fstat(file.fileno()).st_blocks * 512 < limits.MIB


def _reflinks(directory: Path) -> bool:
    (directory / "source").write_bytes(b"x" * 65536)
    with (directory / "source").open("rb") as source, (directory / "target").open("xb") as target:
        return fsutil.reflink(source.fileno(), target.fileno())


def _file_system(host: Host) -> str:
    # the longest mount point that the path is below
    path, best, kind = host.root.path.resolve(), -1, "unknown"
    for line in (_read(host.proc / "self/mountinfo") or "").splitlines():
        fields = line.split()
        if "-" in fields[6:]:
            point = Path(fields[4].replace("\\040", " "))
            if path.is_relative_to(point) and len(point.parts) >= best:
                best, kind = len(point.parts), fields[fields.index("-", 6) + 1]
    return kind


def _credentials(host: Host) -> list[Finding]:
    try:
        readable = host.credentials.check()
    except OvmsError as exc:
        remedy = exc.hint or "correct that file, or log in anew: ovm login HOST"
        return [Finding("credentials", Verdict.WARN, exc.message, "registries that need a login", remedy)]
    return [
        Finding("credentials", Verdict.OK, ", ".join(map(str, readable)) or "none, and none needed for public ones")
    ]


def _clock() -> list[Finding]:
    now, least = time.time(), Path(ovms.__file__).stat().st_mtime
    if now < least:
        text = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC: before ovms was installed"
        lost = "TLS certificates and tokens look invalid; snapshots get wrong times"
        return [Finding("clock", Verdict.WARN, text, lost, "timedatectl set-ntp true")]
    return [Finding("clock", Verdict.OK, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)))]


def _kernel() -> list[Finding]:
    missing = hostkernel.missing()
    if not missing:
        return [Finding("kernel", Verdict.OK, f"Linux {platform.release()}: all that ovms uses")]
    remedy = "a newer kernel (Debian: from backports; Ubuntu: linux-generic-hwe); in a container: its seccomp profile"
    return [
        Finding(
            "kernel", Verdict.FAIL if feature.needed else Verdict.WARN, f"{feature.name}: {why}", feature.lost, remedy
        )
        for feature, why in missing
    ]


# --- registries ------------------------------------------------------------------------------------------------------


def _registry(sessions: Callable[[str], Session], name: str) -> list[Finding]:
    lost = f"artifacts of {name}"
    try:
        session = sessions(name)
        try:
            with session.request("GET", "", "", "", {}) as answer:
                status, date = answer.status, answer.header("date")
        finally:
            session.close()
    except RegistryDenied as exc:
        return [Finding("registry", Verdict.WARN, f"{name}: {exc.message}", lost, f"log in: ovm login {name}")]
    except OvmsError as exc:
        return [Finding("registry", Verdict.WARN, f"{name}: {exc.message}", lost, exc.hint)]
    if status not in (200, 401, 403):
        return [Finding("registry", Verdict.WARN, f"{name} answers with {status}: it is no registry", lost)]
    if status != 200:
        text = f"{name} answers, and asks for a login"
        return [Finding("registry", Verdict.WARN, text, f"private {lost}", f"log in: ovm login {name}")]
    findings = [Finding("registry", Verdict.OK, f"{name} answers")]
    skew = _skew(date)
    if skew is not None and abs(skew) > CLOCK_SKEW:
        text = f"this host's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {name}"
        findings.append(Finding("clock", Verdict.WARN, text, "tokens look expired", "timedatectl set-ntp true"))
    return findings


def _skew(date: str | None) -> float | None:
    try:
        return time.time() - email.utils.parsedate_to_datetime(date or "").timestamp()
    except (TypeError, ValueError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


#: In the order in which they are told: what a VM can't do without comes first.
_CHECKS: Final[dict[str, Callable[[Host], list[Finding]]]] = {
    "root": _root,
    "qemu": _qemu,
    "kernel": lambda _: _kernel(),
    "jail": _jail,
    "cgroups": _cgroups,
    "ptrace": _memory_access,
    "memlock": lambda _: _memlock(),
    "programs": lambda _: _programs(),
    "credentials": _credentials,
    "clock": lambda _: _clock(),
}
