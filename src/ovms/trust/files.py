"""Where policies are, and which of them hold: looked at before each use, and read only when one has changed.

========================================  =================================================================================
``/etc/ovms/policy.json``                 the system's
``$OVMS_POLICY``                          the user's, where it is set: then it has to be there
``$XDG_CONFIG_HOME/ovms/policy.json``     else the user's (``~/.config/ovms/policy.json``)
========================================  =================================================================================

A user's policy stands in place of the system's, unless that says ``"enforced": true``: then both hold. Where there is none at
all, everything is accepted whose digests fit. This module imports little: most hosts have no policy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ovms import fsutil
from ovms.errors import HostError, InputError
from ovms.lazy import dataclass

if TYPE_CHECKING:
    from ovms.trust.judge import Signers
    from ovms.trust.policy import Policy

VARIABLE: Final = "OVMS_POLICY"
SYSTEM: Final = Path("/etc/ovms/policy.json")

#: What changes whenever a file does; None where there is none.
Stamp = tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Loaded:
    """A policy that was read, and its signers."""

    policy: Policy
    signers: Signers


@dataclass(frozen=True)
class InForce:
    """The policies that hold, and what changes when one of them, or a key that it names, does."""

    policies: tuple[Loaded, ...]
    stamp: object


NONE: Final = InForce((), None)


def user_file(environ: Mapping[str, str]) -> tuple[Path, bool]:
    """Where the user's policy is, or would be; and whether it has to be there."""
    if named := environ.get(VARIABLE):
        return Path(named).absolute(), True
    config = environ.get("XDG_CONFIG_HOME", "")
    if not config.startswith("/"):  # the XDG specification: a relative path counts as unset
        config = str(Path(environ.get("HOME") or "/") / ".config")
    return Path(config) / "ovms" / "policy.json", False


class Policies:
    """The policies of this host and user. Safe for threads."""

    def __init__(self, user: Path, *, needed: bool = False, system: Path | None = None) -> None:
        """*needed*: it is an error when *user* is not there. *system*: :data:`SYSTEM`."""
        self.user = user
        self.needed = needed
        self._system = SYSTEM if system is None else system
        self._paths = str(self._system), str(self.user)
        self._lock = threading.Lock()
        self._stamps: tuple[Stamp, Stamp] | None = None
        self._files: tuple[str, ...] = ()
        self._known = NONE

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Policies:
        """As the environment says (None: this process's)."""
        user, needed = user_file(os.environ if environ is None else environ)
        return cls(user, needed=needed)

    def in_force(self) -> InForce:
        """What holds now.

        Raises:
            HostError: a policy is there and can't be read, or is none; or the one that ``OVMS_POLICY`` names is not there.
                Nothing is to be accepted then.
        """
        stamps = (_stamp(self._paths[0]), _stamp(self._paths[1]))
        if stamps == (None, None) and not self.needed:
            return NONE
        with self._lock:
            if stamps != self._stamps or self._known.stamp != self._stamp_of(stamps):
                self._load(stamps)
            return self._known

    def _load(self, stamps: tuple[Stamp, Stamp]) -> None:
        self._stamps = None  # should it fail, it is tried again, and fails again
        loaded: list[Loaded] = []
        system = None if stamps[0] is None else _read(self._system)
        if stamps[1] is not None or self.needed:
            loaded.append(_read(self.user))
        if system is not None and (system.policy.enforced or not loaded):
            loaded.insert(0, system)
        self._files = tuple(
            str(Path(one.policy.where).parent / name)
            for one in loaded
            for signer in one.policy.signers.values()
            for name in (signer.key_path, signer.trust_root)
            if name is not None
        )
        self._stamps = stamps
        self._known = InForce(tuple(loaded), self._stamp_of(stamps))

    def _stamp_of(self, stamps: tuple[Stamp, Stamp]) -> object:
        return stamps, tuple(map(_stamp, self._files))


def _stamp(path: str) -> Stamp:
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise _unreadable(Path(path), f"{path}: {exc.strerror or type(exc).__name__}") from exc
    return info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size


def _read(path: Path) -> Loaded:
    from ovms.trust import judge, policy

    try:
        data = fsutil.read_input(path, "the policy", max_size=policy.SIZE_MAX)
        parsed = policy.parse(data, str(path))
    except InputError as exc:  # which is this host's to mend, and not of whoever asks for a start
        raise _unreadable(path, exc.message) from exc
    return Loaded(parsed, judge.Signers(parsed))


def _unreadable(path: Path, why: str) -> HostError:
    return HostError(
        f"nothing is accepted, since a policy can't be used: {why}",
        hint=f"mend the file (docs/policy.md tells what it holds), or take it away; {VARIABLE} names another for the user",
        path=str(path),
    )
