"""What the command line asks of a runtime: of this process, or of a server. Both answer alike, in the contract's documents.

This module imports little: with a server, a command needs nothing of the runtime itself. Which one is asked: that of ``--host`` or
``OVMS_SOCKET`` where given, else the server on ``ROOT/ovms.sock`` where one lives, else this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ovms.errors import HostError, UsageError
from ovms.progress import NULL, Progress

if TYPE_CHECKING:
    from ovms.runtime.root import Root
    from ovms.runtime.runtime import RunOptions

VARIABLE: Final = "OVMS_SOCKET"
#: What ``--host`` and ``OVMS_SOCKET`` say to leave a server aside.
LOCAL: Final = "local"
Document = dict[str, Any]


class Client(Protocol):
    """A runtime. Instances are named by a name, an ID, or the first digits of one."""

    def start(self, reference: str, options: RunOptions, progress: Progress = NULL) -> Document:
        """Starts an instance, and returns when its VM runs. Nothing is left of one whose start fails."""

    def instances(self) -> list[Document]:
        """All instances, oldest first."""

    def instance(self, text: str) -> Document:
        """What is known of an instance."""

    def ask_to_stop(self, text: str, grace: float) -> None:
        """Asks the guest to power down. It gets *grace* seconds for that, of whoever calls :meth:`stop` then."""

    def stop(self, text: str, grace: float, *, asked: bool = False) -> Document:
        """Asks the guest to power down (unless it is *asked* already), and ends it after *grace* seconds. Returns how it ended."""

    def remove(self, text: str, *, force: bool = False) -> None:
        """Removes an instance."""

    def pause(self, text: str) -> Document:
        """Lets an instance's CPUs stand still."""

    def resume(self, text: str) -> Document:
        """Lets them go on."""

    def snapshot(self, text: str, tag: str | None, progress: Progress = NULL) -> Document:
        """Makes an artifact of a running instance, without a name or with *tag*; where that has a registry, it is pushed."""

    def warm(self, reference: str, size: int) -> Document:
        """Lets *size* clones of an artifact's RAM snapshot wait for starts. Returns the pool."""

    def pools(self) -> list[Document]:
        """The warm pools."""

    def logs(self, text: str, *, follow: bool = False, tail: int | None = None) -> Iterator[Document]:
        """What an instance's VM printed, as records."""

    def events(self, *, follow: bool = False, since: int | None = None) -> Iterator[Document]:
        """What happens to instances."""


def choose(root: Root, host: str | None, environ: Mapping[str, str]) -> Path | None:
    """The socket of the server to ask; None to do it ourselves.

    Raises:
        UsageError: *host* (from the command line) is none.
        HostError: nobody listens where the user said that there is a server.
    """
    named = host or environ.get(VARIABLE)
    if named == LOCAL:
        return None
    if named:
        path = Path(named.removeprefix("unix:"))
        if not path.is_absolute():
            raise UsageError(f"{named[:120]!a} is no server", hint=f"write unix:/PATH, or {LOCAL} for none")
        if not _alive(path):
            raise HostError(
                f"no server listens on {path}", hint=f"'ovm serve --socket {path}' starts one", path=str(path)
            )
        return path
    return root.socket if _alive(root.socket) else None


def _alive(path: Path) -> bool:
    if not path.exists():
        return False
    from ovms import fsutil

    try:
        fsutil.connect_unix(path, timeout=2.0).close()
    except OSError:
        return False
    return True
