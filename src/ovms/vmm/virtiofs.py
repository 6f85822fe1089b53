"""Directories shared by virtiofs: for each a virtiofsd beside the VMM, in a jail like the VMM's.

::

    instances/<uuid>/
    └── share<N>/               of the directory of that number: what ovms.vmm.watch keeps of a VMM (vmm.pid, vmm.log, exit)

The two meet on a socket that is connected before either of them runs, so neither has a name for it. A virtiofsd ends by itself
when its VMM has closed that; one that does not is killed by its watcher, which waits for the VMM's end, too.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ovms import fsutil, process
from ovms.errors import HostError, ToolMissing, Unsupported
from ovms.lazy import replace
from ovms.process import ProcessId
from ovms.vmm import watch
from ovms.vmm.extras import BY_VIRTIOFS, SHARES_MAX, Share, share_name
from ovms.vmm.jail import INSIDE, Jail, Namespace
from ovms.vmm.model import VmFiles

_NAME: Final = "virtiofsd"
#: Where distributions put it, beside what is on the PATH.
_PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
#: An option of those that can do without privileges: the ones in Rust, from 1.13 on.
_NEEDED: Final = b"squash-guest"
#: Descriptors that it may have open: it has one for each file that the guest's kernel knows of.
_NOFILE_MAX: Final = 1_000_000
_INSTALL: Final = "Debian from 13 on: apt-get install virtiofsd"
_EVERYBODY: Final = 0xFFFF_FFFF
_DIRECTORY: Final = "share"


def find() -> Path:
    """The virtiofsd of this host.

    Raises:
        ToolMissing: none is installed.
        Unsupported: it is one that can't run in a jail.
    """
    paths = [Path(place) for place in _PLACES if os.access(place, os.X_OK)]
    with contextlib.suppress(ToolMissing):
        paths.append(process.find_tool(_NAME))
    if not paths:
        raise ToolMissing(
            "virtiofsd is not installed",
            hint=f"{_INSTALL}; or leave out 'via=virtiofs'",
            tool=_NAME,
            package=_NAME,
        )
    for path in paths:
        with contextlib.suppress(HostError):
            if _NEEDED in process.run([path, "--help"], timeout=20, check=False).stdout:
                return path.resolve()
    raise Unsupported(
        f"{paths[0]} works with privileges alone, and none are given to what a guest talks to",
        hint=f"{_INSTALL}, the one in Rust, 1.13 or newer; or leave out 'via=virtiofs'",
        path=str(paths[0]),
    )


def files_of(directory: Path, number: int) -> VmFiles:
    """The files of the virtiofsd of a VM's directory of that number; *directory* is the instance's."""
    return VmFiles(directory / f"{_DIRECTORY}{number}")


def connect(shares: Sequence[Share], files: VmFiles, held: contextlib.ExitStack) -> Mapping[int, tuple[int, int]]:
    """Makes the sockets: number of a directory → what its virtiofsd listens on, and the VMM's end. Closed with *held*."""
    ends = {}
    for number, share in enumerate(shares):
        if share.via != BY_VIRTIOFS:
            continue
        path = files_of(files.directory, number).directory / "fs.sock"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        listener = held.enter_context(fsutil.listen_unix(path, backlog=1))
        end = held.enter_context(fsutil.connect_unix(path, timeout=5.0))
        end.setblocking(True)
        path.unlink()  # nobody else comes in
        ends[number] = (listener.fileno(), end.fileno())
    return ends


def start(program: Path, number: int, share: Share, listener: int, files: VmFiles, jail: Jail, vmm: ProcessId) -> None:
    """Starts a virtiofsd that ends with the process *vmm*, and is told of by :func:`lost` if it ends before.

    Raises:
        JailRefused, VmmError, VmmTimeout: see :func:`ovms.vmm.watch.start`.
    """
    own = files_of(files.directory, number)
    place = share_name(0)
    with contextlib.ExitStack() as held:
        listen = held.enter_context(fsutil.listen_unix(own.console))
        held.callback(own.console.unlink, missing_ok=True)
        _, console = watch.socket_pair(held)
        _, events = watch.socket_pair(held)
        try:
            until = os.pidfd_open(vmm.pid)
        except ProcessLookupError:
            return  # who waits for the VMM tells why
        held.callback(os.close, until)
        if not vmm.alive():  # then the number may have been another's
            return
        launch = watch.Launch(
            argv=_argv(program, share, listener, f"/{place}", jail),
            keep=[listener],
            console=console,
            listen=listen.fileno(),
            events=events,
            until=until,
            trees={**watch.program_trees(program), **({place: share.path} if share.read_only else {})},
            shares={} if share.read_only else {place: (share.fd, share.path)},
        )
        watch.start(launch, _jail(jail), own)


def _argv(program: Path, share: Share, listener: int, place: str, jail: Jail) -> list[str]:
    # whoever makes a file in the guest makes it as the one user that there is
    assert jail.user is not None, "as root it would want capabilities"
    user, group = (INSIDE, INSIDE) if Namespace.USER in jail.namespaces else (jail.user.uid, jail.user.gid)
    return [
        str(program),
        f"--fd={listener}",
        f"--shared-dir={place}",
        "--sandbox=none",  # it is in one
        f"--translate-uid=squash-guest:0:{user}:{_EVERYBODY}",
        f"--translate-gid=squash-guest:0:{group}:{_EVERYBODY}",
        "--inode-file-handles=never",
        f"--rlimit-nofile={_most_files() if jail.limits else 0}",
        "--log-level=warn",
        *(["--readonly"] if share.read_only else []),
    ]


def _most_files() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _NOFILE_MAX if most == resource.RLIM_INFINITY else min(_NOFILE_MAX, most)


def _jail(jail: Jail) -> Jail:
    limits = {**jail.limits, resource.RLIMIT_NOFILE: _most_files()} if jail.limits else {}
    return replace(jail, namespaces=jail.namespaces | {Namespace.NETWORK}, limits=limits)


def lost(directory: Path, number: int) -> str | None:
    """How the virtiofsd of a VM that runs has ended, with its last words; None where it has not."""
    files = files_of(directory, number)
    if watch.find(files) is not None:
        return None
    seen = watch.read_exit(files)
    how = "nobody saw how" if seen is None else process.describe_exit(seen.returncode)
    try:
        said = process.tail(files.vmm_log.read_bytes())
    except OSError:
        said = ""
    return f"virtiofsd has ended ({how}){': ' if said else ''}{said}"


def sweep(directory: Path) -> None:
    """Ends what is left of them when the VMM of an instance has ended: only one that its guest has taken over stays so long."""
    for number in range(SHARES_MAX):
        files = files_of(directory, number)
        if files.directory.is_dir() and (watched := watch.find(files)) is not None:
            watched.vmm.kill()
            watched.watcher.wait(2.0)
