"""Where everything of ovms lives on this machine.

::

    ROOT/                       OVMS_ROOT, else /var/lib/ovms (root) or $XDG_DATA_HOME/ovms (~/.local/share/ovms)
    ├── store/                  artifacts: an OCI image layout (ovms.oci.layout)
    ├── instances/
    │   ├── .lock               flock: around taking a name, and around the removal of an instance
    │   └── <uuid>/             one instance (ovms.runtime.record)
    ├── parked/                 instances that wait in a warm pool (ovms.runtime.warm); warm.json: what the pools are to be
    ├── ovms.sock(.lock)        where a server listens (ovms.runtime.server)
    └── cache/                  what is slow to find out about this host; can go at any time
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ovms import fsutil
from ovms.errors import HostError

if TYPE_CHECKING:
    from ovms.oci.layout import Layout

VARIABLE: Final = "OVMS_ROOT"
_SYSTEM: Final = Path("/var/lib/ovms")


class Root(NamedTuple):
    """The directory of ovms's state."""

    path: Path

    @classmethod
    def default(cls, environ: Mapping[str, str], uid: int) -> Root:
        """The root that the environment names, else the usual one of the user *uid*."""
        if named := environ.get(VARIABLE):
            return cls(Path(named).absolute())
        if uid == 0:
            return cls(_SYSTEM)
        data = environ.get("XDG_DATA_HOME", "")
        if not data.startswith("/"):  # the XDG specification: a relative path counts as unset
            data = str(Path(environ.get("HOME") or "/") / ".local" / "share")
        return cls(Path(data) / "ovms")

    @property
    def store(self) -> Path:
        """Where the local store is."""
        return self.path / "store"

    @property
    def instances(self) -> Path:
        """Where the instances' directories are."""
        return self.path / "instances"

    @property
    def parked(self) -> Path:
        """Where the directories of instances are that wait in a warm pool."""
        return self.path / "parked"

    def anything_parked(self) -> bool:
        """Whether something waits in a warm pool, or a killed server has left it."""
        try:
            return any(not path.name.startswith(".") for path in self.parked.iterdir())
        except OSError:
            return False

    @property
    def pools(self) -> Path:
        """What the warm pools of a server are to be."""
        return self.path / "warm.json"

    @property
    def socket(self) -> Path:
        """Where a server listens unless it is told otherwise."""
        return self.path / "ovms.sock"

    @property
    def cache(self) -> Path:
        """Where facts about this host are remembered."""
        return self.path / "cache"

    def begun(self) -> bool:
        """Whether anything of ovms was ever made here; also where that can't be told."""
        for path in (self.store, self.instances):
            try:
                path.lstat()
            except FileNotFoundError:
                continue
            except OSError:
                return True
            return True
        return False

    def layout(self) -> Layout:
        """The local store, made when there is none yet.

        Raises:
            HostError, DiskFull: it can't be made or read.
        """
        from ovms.oci.layout import Layout  # who asks a server needs none of it

        try:
            with fsutil.noticing_full_disk("making the store", self.path):
                return Layout(self.store)
        except OSError as exc:
            raise HostError(
                f"the store in {self.path} cannot be used: {exc.strerror}",
                hint=f"set {VARIABLE} to a directory that you can write to",
                path=str(self.path),
            ) from exc

    def prepare(self) -> None:
        """Makes the directories. Only their owner may look inside: consoles and memories of VMs are private."""
        try:
            with fsutil.noticing_full_disk("making the directories of ovms", self.path):
                self.instances.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(self.instances, os.W_OK):
                raise PermissionError(13, os.strerror(13))
        except OSError as exc:
            raise HostError(
                f"{self.path} cannot be used: {exc.strerror}",
                hint=f"set {VARIABLE} to a directory that you can write to",
                path=str(self.path),
            ) from exc
