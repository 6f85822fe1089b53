"""Makes what the demo's VM is built of: kernel, initrd, a Debian (or Ubuntu) base layer and a service layer on it.

    make_images.py [--force] [--agent]

Needs no root and no mounts; talks on stderr; the last line on stdout is the directory with the result. In
``$OVMS_CACHE`` (by default ``.cache`` of the repository):

    demo/
      .lock                 one maker at a time
      base-KEY/base.qcow2   the root file system as mmdebstrap makes it from the host's own apt sources
      KEY/                  KEY: a hash of all that goes in, so a change of any of it makes the images anew
        vmlinuz             the distribution's kernel for VMs
        initrd.img          busybox, the modules of virtio and ext4, guest/initrd-init
        base.qcow2          hard link
        service.qcow2       the clusters that differ from base: busybox as init, guest/service; names no backing file
        manifest.yaml       an OVMS manifest with these files as its refs
      current               -> KEY
      agent                 -> KEY of the images with qemu-guest-agent (--agent): for tests, the demo has none

Every directory appears whole or not at all. The same packages and the same tools give the same bytes: all times are
clamped to SOURCE_DATE_EPOCH (by default the time of the kernel's build).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

HERE: Final = Path(__file__).resolve().parent
FETCH_TOOLS: Final = HERE.parent / "scripts" / "fetch-tools.sh"

DISK_SIZE: Final = 1 << 30
INODES: Final = 16384
JOURNAL_MIB: Final = 4
KERNEL_ARGS: Final = "console=ttyS0 root=/dev/vda rw quiet panic=-1 init_on_free=1 random.trust_cpu=on"
KEEP_S: Final = 14 * 24 * 3600  # images that nobody has used for so long are removed
LOCK_TIMEOUT_S: Final = 900
MMDEBSTRAP_TIMEOUT_S: Final = 600
TOOL_TIMEOUT_S: Final = 180

#: Where each file of guest/ goes in the service layer, and its mode.
SERVICE_FILES: Final = {
    "inittab": ("/etc/inittab", 0o644),
    "inputrc": ("/etc/inputrc", 0o644),
    "start": ("/usr/lib/ovms-demo/start", 0o755),
    "stop": ("/usr/lib/ovms-demo/stop", 0o755),
    "service": ("/usr/lib/ovms-demo/service", 0o755),
    "power-button": ("/etc/acpi/PWRF/00000080", 0o755),
}
#: The same for a guest with an agent.
AGENT_FILES: Final = {
    **SERVICE_FILES,
    "inittab-agent": ("/etc/inittab", 0o644),
    "agent": ("/usr/lib/ovms-demo/agent", 0o755),
    "shutdown": ("/usr/sbin/shutdown", 0o755),
}
SERVICE_DIRECTORIES: Final = ("/usr/lib/ovms-demo", "/etc/acpi", "/etc/acpi/PWRF")
SERVICE_LINKS: Final = {
    "/usr/sbin/init": "/bin/busybox",
    # for whoever looks around on the console: the base has none of these
    **{
        f"/usr/local/bin/{name}": "/bin/busybox"
        for name in ("free", "ip", "less", "mount", "netstat", "ping", "poweroff", "ps", "top", "umount", "vi", "wget")
    },
}

#: Left out of the base layer: what nobody reads in a VM, what tells of the machine that made it, what differs each time.
LEFT_OUT: Final = re.compile(
    r"usr/share/(doc|man|info|locale|lintian|bug)/.+|usr/lib/x86_64-linux-gnu/gconv/(?!gconv-modules|UTF|ISO8859-1).*"
    r"|var/(cache|log|backups)/.+|var/lib/apt/.+|var/lib/dpkg/.*-old|dev/.+|run/.+|tmp/.+"
    r"|etc/(resolv\.conf|hostname|machine-id|mtab|\.pwd\.lock)|etc/apt/(sources\.list.*/.+|sources\.list|apt\.conf\.d/99mmdebstrap)"
    r"|etc/dpkg/dpkg\.cfg\.d/99mmdebstrap"
)
LEFT_OUT_KEPT: Final = re.compile(r"usr/share/doc/[^/]+/copyright|usr/share/doc/[^/]+")


class MakeError(Exception):
    """Something that the user must know; its text says all."""


def say(text: str) -> None:
    """One line of talk."""
    print(f"make-images: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    say(f"{text} …")
    start = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - start:.1f} s")


@contextlib.contextmanager
def started(arguments: Sequence[str | Path], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A child that never outlives the block: it and its own children are asked to end, given time to clean up, killed.

    It has a process group of its own, so that a Ctrl-C reaches it once, and from us.
    """
    try:
        child: subprocess.Popen[str] = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            text=True,
            process_group=0,
            **options,  # type: ignore[call-overload]
        )
    except (FileNotFoundError, PermissionError):
        raise MakeError(f"there is no {arguments[0]} here: run scripts/setup-system.sh --demo") from None
    try:
        yield child
    finally:
        if child.poll() is None:
            signal_group(child, signal.SIGTERM)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                signal_group(child, signal.SIGKILL)
                child.wait(10)
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()


def signal_group(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """To the child and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def run(arguments: Sequence[str | Path], *, env: Mapping[str, str] | None = None, ok: Sequence[int] = (0,)) -> str:
    """Runs a tool. Returns its stdout.

    Raises:
        MakeError: it failed; with what it said.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(env)}
    with started(arguments, **options) as child:
        try:
            out, err = child.communicate(timeout=TOOL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise MakeError(f"{arguments[0]} did not end within {TOOL_TIMEOUT_S} s") from None
    if child.returncode not in ok:
        raise MakeError(f"{arguments[0]} failed with exit code {child.returncode}: {(err or out).strip()[-2000:]}")
    return out


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment with the system's directories in PATH and plain messages."""
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "LC_ALL": "C", **(extra or {})}


# --- the initrd -------------------------------------------------------------------------------------------------------


def cpio_entry(inode: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a cpio archive in the "newc" form that the kernel reads (its initramfs buffer format document)."""
    raw = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
    entry = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    entry += bytes(-len(entry) % 4) + data
    return entry + bytes(-len(entry) % 4)


def make_initrd(busybox: Path, modules: Path, init: Path) -> bytes:
    """The initrd, compressed."""
    entries: list[tuple[str, int, bytes, tuple[int, int]]] = [
        (name, stat.S_IFDIR | 0o755, b"", (0, 0)) for name in ("bin", "dev", "modules", "proc", "root", "sys")
    ]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes(), (0, 0)))
    entries.append(("init", stat.S_IFREG | 0o755, init.read_bytes(), (0, 0)))
    entries += [
        (f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes(), (0, 0))
        for path in sorted(modules.glob("*.ko"))
    ]
    archive = b"".join(
        cpio_entry(i, name, mode, data, device) for i, (name, mode, data, device) in enumerate(entries, start=1)
    )
    archive += cpio_entry(0, "TRAILER!!!", 0)
    return gzip.compress(archive, 9, mtime=0)


# --- the root file system ---------------------------------------------------------------------------------------------


def os_release() -> dict[str, str]:
    """``/etc/os-release`` as a dictionary."""
    text = Path("/etc/os-release").read_text()
    return {m[1]: m[2].strip("\"'") for m in re.finditer(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)}


def apt_sources(distribution: str, codename: str, lists: Path) -> list[str]:
    """The lines of the host's apt sources that name the distribution itself, in either form of source files.

    *lists* are the package lists that fetch-tools.sh got where the host has none.
    """
    fields = ("ORIGIN", "RELEASE", "COMPONENT", "REPO_URI")
    form = "|".join(f"$({field})" for field in fields)
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages", "Target-Of: deb"]
    # apt tells of what it has a list of, and of nothing else
    out = run(command) or run([*command, "-o", f"Dir::State::Lists={lists}"])
    keyring = Path(f"/usr/share/keyrings/{distribution}-archive-keyring.gpg")
    option = f" [signed-by={keyring}]" if keyring.exists() else ""
    suites = (codename, f"{codename}-updates", f"{codename}-security")
    lines: list[str] = []
    for row in out.splitlines():
        origin, release, component, uri = row.split("|", 3)
        line = f"deb{option} {uri} {release} {component}"
        if origin.lower() == distribution and release in suites and component == "main" and line not in lines:
            lines.append(line)
    if not any(f" {codename} main" in line for line in lines):
        raise MakeError(
            f"the package lists of this machine have no {distribution} {codename} main: run 'apt-get update' as root"
        )
    return lines


def apt_options() -> list[str]:
    """How the host's apt reaches its mirrors (a proxy, say), for the apt that fills the root file system."""
    wanted = re.compile(
        r"Acquire::(https?::.*|Check-Valid-Until|Check-Date|ForceIPv4|AllowInsecureRepositories) \"[^\"]+\";"
    )
    lines = run(["apt-config", "dump"]).splitlines()
    return [line for line in lines if wanted.fullmatch(line)]


def debootstrap(work: Path, epoch: int, lists: Path, *, include: Sequence[str]) -> Path:
    """A tar of the smallest Debian with the packages *include*, made by mmdebstrap."""
    release = os_release()
    distribution, codename = release.get("ID", ""), release.get("VERSION_CODENAME", "")
    if distribution not in {"debian", "ubuntu"} or not codename:
        raise MakeError(f"this is {release.get('PRETTY_NAME', 'an unknown system')}, not Debian or Ubuntu")
    sources = work / "sources.list"
    sources.write_text("\n".join(apt_sources(distribution, codename, lists)) + "\n")
    arguments: list[str | Path] = ["mmdebstrap", "--variant=essential", "--architectures=amd64", "--format=tar"]
    # the small package that says that /usr is merged, in place of the one that merges it and brings all of Perl
    hook = Path("/usr/share/mmdebstrap/hooks/maybe-merged-usr")
    if hook.is_dir():
        arguments.append(f"--hook-dir={hook}")
    arguments += [f"--include={','.join(include)}", "--dpkgopt=force-unsafe-io", '--aptopt=Acquire::Languages "none"']
    arguments += [f"--aptopt={line}" for line in apt_options()]
    arguments += [codename, "-", sources]
    variables = {"SOURCE_DATE_EPOCH": str(epoch)}
    prefix: list[str | Path] = []
    if os.geteuid() == 0:
        prefix = contained([])
        if prefix:
            variables["TMPDIR"] = str(work)
    elif not can_unshare():
        if not works(["sudo", "-n", "true"]):
            raise MakeError(
                "mmdebstrap needs root, or user namespaces with ranges in /etc/subuid and /etc/subgid (package uidmap)"
            )
        say("no user namespaces here: running mmdebstrap with sudo")
        prefix = [*contained(["sudo", "-n"]), "env", f"SOURCE_DATE_EPOCH={epoch}"]
    tar = work / "root.tar"
    log: list[str] = []
    with tar.open("wb") as out:
        options = {"stdout": out, "stderr": subprocess.PIPE, "env": environment(variables)}
        with alarm(MMDEBSTRAP_TIMEOUT_S, "mmdebstrap"), started([*prefix, *arguments], **options) as child:
            assert child.stderr is not None
            for line in child.stderr:
                log.append(line)
                if re.match(r"I: (running apt-get|downloading|extracting|installing|creating)", line):
                    say(f"  mmdebstrap: {line[3:].strip()}")
            code = child.wait()
    if code != 0:
        raise MakeError(f"mmdebstrap failed with exit code {code}:\n{''.join(log[-30:])}")
    return tar


def contained(root: list[str | Path]) -> list[str | Path]:
    """What to put before a command that is to run as root in namespaces of its own, where that is possible.

    mmdebstrap as root mounts /proc, /sys and /dev/shm of the host into its work, and killed at the wrong moment it
    leaves them there. In a mount namespace they go with the last process, and in a PID namespace all go with the first.
    """
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    return [*root, *command] if works([*root, *command, "true"]) else root


def can_unshare() -> bool:
    """Whether mmdebstrap can work in a user namespace, with a range of user numbers of our own."""
    if shutil.which("newuidmap") is None or not works(["unshare", "--user", "--map-root-user", "true"]):
        return False
    us = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
    return all(
        any(line.partition(":")[0] in us for line in path.read_text().splitlines()) if path.exists() else False
        for path in (Path("/etc/subuid"), Path("/etc/subgid"))
    )


def works(command: Sequence[str | Path]) -> bool:
    """Whether the command is there and succeeds."""
    try:
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
        with started(command, **options) as child:
            return child.wait(20) == 0
    except (MakeError, subprocess.TimeoutExpired):
        return False


@dataclass(frozen=True)
class Member:
    """What the owner of a file system must set on one path, whoever unpacked it."""

    path: str
    mode: int
    uid: int
    gid: int
    mtime: int


def extract(tar: Path, root: Path) -> list[Member]:
    """Unpacks the archive without the parts that are left out, as whoever we are. Returns what is to be set right."""
    members: list[Member] = []
    root.mkdir()
    with tarfile.open(tar, "r|") as archive:
        for item in archive:
            name = item.name.removeprefix("./").strip("/")
            if name in {"", "."} or (LEFT_OUT.fullmatch(name) and not LEFT_OUT_KEPT.fullmatch(name)):
                continue
            if ".." in name.split("/") or '"' in name or "\n" in name:
                raise MakeError(f"the root file system holds a file with a strange name: {name!r}")
            path = root / name
            if item.isdir():
                path.mkdir(mode=0o700)
                kind = stat.S_IFDIR
            elif item.issym():
                path.symlink_to(item.linkname)
                kind = stat.S_IFLNK
            elif item.islnk():
                # the modes and times are those of the first name
                (path).hardlink_to(root / item.linkname.removeprefix("./"))
                continue
            elif item.isreg():
                source = archive.extractfile(item)
                assert source is not None
                with path.open("xb") as file:
                    shutil.copyfileobj(source, file)
                kind = stat.S_IFREG
            else:
                continue  # devices: the guest's kernel makes them
            members.append(Member(name, kind | item.mode, item.uid, item.gid, int(item.mtime)))
    return members


def make_base(work: Path, tar: Path, epoch: int) -> Path:
    """The ext4 image of the base, raw and sparse: a whole disk without partitions."""
    root = work / "root"
    members = extract(tar, root)
    (root / "etc/hostname").write_text("localhost\n")
    members.append(Member("etc/hostname", stat.S_IFREG | 0o644, 0, 0, epoch))
    image = work / "base.raw"
    with image.open("wb") as file:
        file.truncate(DISK_SIZE)
    name = str(uuid.uuid5(uuid.NAMESPACE_OID, "ovms-demo"))
    run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", str(INODES), "-J", f"size={JOURNAL_MIB}",
         "-L", "ovms-demo", "-U", name, "-E", f"hash_seed={name},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0",
         "-d", root, image],
        env={"E2FSPROGS_FAKE_TIME": str(epoch)},
    )  # fmt: skip
    commands = []
    for path in ("/", "/lost+found"):
        commands += [f"sif {path} {field} {value}" for field, value in (*times(epoch), ("mode", "040755"))]
    for member in members:
        fields = (
            ("mode", f"0{member.mode:o}"),
            ("uid", str(member.uid)),
            ("gid", str(member.gid)),
            *times(member.mtime),
        )
        commands += [f'sif "/{member.path}" {field} {value}' for field, value in fields]
    debugfs(work, image, commands, epoch)
    shutil.rmtree(root)
    return image


def times(value: int) -> tuple[tuple[str, str], ...]:
    """All the times of an inode, with their fractions of a second."""
    names = ("atime", "ctime", "mtime", "crtime")
    return (*((name, f"@{value}") for name in names), *((f"{name}_extra", "0") for name in names))


def debugfs(work: Path, image: Path, commands: Sequence[str], epoch: int) -> None:
    """Changes a file system without mounting it; checks that it is clean afterwards."""
    script = work / "debugfs.commands"
    script.write_text("\n".join(commands) + "\n")
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    env = environment({"E2FSPROGS_FAKE_TIME": str(epoch), "DEBUGFS_PAGER": "cat"})
    with started(["debugfs", "-w", "-f", script, image], env=env, **options) as child:
        _, err = child.communicate(timeout=TOOL_TIMEOUT_S)
    # its exit code does not tell of failed commands; all that it says beside its version is a complaint
    complaints = [line for line in err.splitlines() if line and not re.match(r"debugfs \d", line)]
    if child.returncode != 0 or complaints:
        raise MakeError("debugfs failed: " + "; ".join(complaints[:5]))
    run(["e2fsck", "-f", "-n", image], env={"E2FSPROGS_FAKE_TIME": str(epoch)})


# --- the layers -------------------------------------------------------------------------------------------------------


def make_service(work: Path, base: Path, epoch: int, *, agent: bool) -> Path:
    """The service layer: what differs from the base after the service's files were written into a copy of it."""
    raw = work / "service.raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", base, raw])
    commands = [f"mkdir {path}" for path in SERVICE_DIRECTORIES]
    commands += [f"symlink {path} {target}" for path, target in SERVICE_LINKS.items()]
    # the later of two files for one path is meant
    files = {path: (name, mode) for name, (path, mode) in (AGENT_FILES if agent else SERVICE_FILES).items()}
    commands += [f'write "{HERE / "guest" / name}" {path}' for path, (name, _) in files.items()]
    modes = {path: mode for path, (_, mode) in files.items()}
    for path in (*SERVICE_DIRECTORIES, *SERVICE_LINKS, *modes):
        kind = (
            0o040755 if path in SERVICE_DIRECTORIES else 0o120777 if path in SERVICE_LINKS else 0o100000 | modes[path]
        )
        fields = (("mode", f"0{kind:o}"), ("uid", "0"), ("gid", "0"), *times(epoch))
        commands += [f"sif {path} {field} {value}" for field, value in fields]
    parents = {path.rpartition("/")[0] for path in (*SERVICE_DIRECTORIES, *SERVICE_LINKS, *modes)}
    for path in sorted(parents - set(SERVICE_DIRECTORIES)):
        commands += [f"sif {path} {field} {value}" for field, value in times(epoch)]
    debugfs(work, raw, commands, epoch)
    # An overlay on the new image, moved over to the base: that stores each cluster in which the two differ.
    layer = work / "service.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, layer])
    run(["qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", base.resolve(), layer])
    # A layer names nothing: the manifest gives the order.
    run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", layer])
    run(["qemu-img", "check", "-q", "-f", "qcow2", layer])
    raw.unlink()
    return layer


def manifest(created: int) -> str:
    """The OVMS manifest, with paths relative to itself."""
    return f"""\
# A VM in two disk layers: a plain Debian, and the demo's service on it.
schemaVersion: 1
mediaType: application/vnd.ovms.manifest.v1+json
name: ovms-demo
version: "1"
kernel:
  ref: vmlinuz
  args: {KERNEL_ARGS}
initrd:
  ref: initrd.img
diskLayers:
  - ref: base.qcow2
    format: qcow2
  - ref: service.qcow2
    format: qcow2
metadata:
  author: ovms
  created: "{datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z")}"
  platform:
    arch: x86_64
    uefi: false
"""


# --- putting it together ----------------------------------------------------------------------------------------------


def digest(*parts: bytes) -> str:
    """A short key of all that goes in."""
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock; waits for another maker."""
    with path.open("a") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say("waiting for another run to end")
                    told = True
                if time.monotonic() > deadline:
                    raise MakeError(f"another run has held {path} for {LOCK_TIMEOUT_S} s") from None
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def alarm(seconds: int, what: str) -> Iterator[None]:
    """Ends what is done inside after some time."""

    def expired(_number: int, _frame: object) -> NoReturn:
        raise MakeError(f"{what} did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def publish(staging: Path, target: Path) -> None:
    """The finished directory appears under its name."""
    shutil.rmtree(target, ignore_errors=True)
    staging.replace(target)


def fetch_tools(cache: Path) -> None:
    """Kernel, modules and busybox into the cache."""
    env = environment({"OVMS_CACHE": str(cache)})
    with started([FETCH_TOOLS], env=env, stdout=sys.stderr) as child:
        code = child.wait()
    if code != 0:
        raise MakeError(f"{FETCH_TOOLS.name} failed")


def make(cache: Path, *, force: bool, agent: bool = False) -> Path:
    """Makes what is missing. Returns the directory."""
    fetch_tools(cache)
    tools, demo = cache / "tools", cache / "demo"
    kernel, busybox = tools / "kernel", tools / "busybox"
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or (kernel / "vmlinuz").stat().st_mtime)
    recipe = Path(__file__).read_bytes() + str(epoch).encode()
    base_key = digest(recipe, Path("/etc/os-release").read_bytes(), *([b"agent"] if agent else []))
    guest = [path.read_bytes() for path in sorted((HERE / "guest").iterdir())]
    parts = (
        kernel.resolve().name.encode(),
        busybox.resolve().parent.name.encode(),
        FETCH_TOOLS.with_name("pick_modules.py").read_bytes(),
    )
    base, target = demo / f"base-{base_key}", demo / digest(base_key.encode(), *parts, *guest)
    demo.mkdir(exist_ok=True)
    with locked(demo / ".lock"):
        for left in demo.glob(".work-*"):  # of a run that was killed
            shutil.rmtree(left)
        if force or not (base / "base.qcow2").exists():
            with staging(demo) as work:
                with step("making a root file system with mmdebstrap"):
                    packages = ("busybox-static", *(("qemu-guest-agent",) if agent else ()))
                    tar = debootstrap(work, epoch, cache / "apt/lists", include=packages)
                with step("making the base layer"):
                    image = make_base(work, tar, epoch)
                    (work / "new").mkdir()
                    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, work / "new/base.qcow2"])
                publish(work / "new", base)
                force = True
        if force or not (target / "manifest.yaml").exists():
            with staging(demo) as work:
                new = work / "new"
                new.mkdir()
                with step("making the initrd"):
                    shutil.copy2(kernel / "vmlinuz", new / "vmlinuz")
                    initrd = make_initrd(busybox, kernel / "modules", HERE / "guest" / "initrd-init")
                    (new / "initrd.img").write_bytes(initrd)
                with step("making the service layer"):
                    make_service(work, base / "base.qcow2", epoch, agent=agent).rename(new / "service.qcow2")
                (new / "base.qcow2").hardlink_to(base / "base.qcow2")
                (new / "manifest.yaml").write_text(manifest(epoch))
                publish(new, target)
        link = demo / (".agent" if agent else ".current")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(demo / link.name.removeprefix("."))
        os.utime(base)
        os.utime(target)
        prune(demo)
    return target


def prune(demo: Path) -> None:
    """Removes what no demo has asked for since long."""
    for path in demo.iterdir():
        if path.is_dir() and not path.is_symlink() and path.stat().st_mtime < time.time() - KEEP_S:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def staging(demo: Path) -> Iterator[Path]:
    """A directory for what is half made, beside the finished ones."""
    with tempfile.TemporaryDirectory(prefix=".work-", dir=demo) as name:
        yield Path(name)


def terminated(number: int, _frame: object) -> NoReturn:
    """SIGTERM unwinds as SIGINT does."""
    raise SystemExit(128 + number)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Makes the images of the demo's VM.")
    parser.add_argument("--force", action="store_true", help="make them even if they are in the cache")
    parser.add_argument("--agent", action="store_true", help="those with qemu-guest-agent, for tests")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGHUP, terminated)
    cache = Path(os.environ.get("OVMS_CACHE") or HERE.parent / ".cache").resolve()
    try:
        directory = make(cache, force=arguments.force, agent=arguments.agent)
    except (MakeError, OSError, tarfile.TarError, subprocess.SubprocessError) as error:
        print(f"make-images: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make-images: interrupted", file=sys.stderr)
        return 130
    say(", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(directory.iterdir())))
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
