"""Keys as people name them: a file, or ``exec:PROGRAM`` for one that a program has; and pairs of new files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.errors import Conflict, FileProblem, HostError
from ovms.trust import external, keys
from ovms.trust.keys import AskPassword, PrivateKey, PublicKey
from ovms.trust.signers import KeySigner
from ovms.trust.signing import Key

#: What Cosign calls the files of a pair: PREFIX.key and PREFIX.pub.
PRIVATE_SUFFIX: Final = ".key"
PUBLIC_SUFFIX: Final = ".pub"


def signing_key(text: str, ask: AskPassword) -> Key:
    """What signs. *ask* gives the password of a file that is encrypted.

    Raises:
        FileProblem: there is no such file, or it can't be read.
        InputError: it is no private key that is taken, or the password is wrong.
        HostError: the program that has the key failed.
    """
    if text.startswith(external.PREFIX):
        return external.ExternalKey(text.removeprefix(external.PREFIX))
    return keys.load_private(read(text, "the private key"), f"the key {text[:200]!a}", ask)


def public_key(text: str) -> PublicKey:
    """A public key, of a PEM file or of a program. Raises like :func:`signing_key`."""
    if text.startswith(external.PREFIX):
        return external.ExternalKey(text.removeprefix(external.PREFIX)).public
    return keys.load_public(read(text, "the public key"), f"the key {text[:200]!a}")


def signers(texts: list[str]) -> list[KeySigner]:
    """Those who have these keys, called by their files' names; a key that is named twice counts once.

    Raises like :func:`signing_key`.
    """
    found: dict[bytes, KeySigner] = {}
    for text in texts:
        key = public_key(text)
        # the arguments of a program are nobody's business
        shown = text if not text.startswith(external.PREFIX) else f"{external.PREFIX}{key.fingerprint[:12]}"
        name = ascii(shown)[1:-1][:120]
        if any(other.name == name for other in found.values()):
            name = f"{name} ({key.fingerprint[:12]})"
        found.setdefault(key.spki, KeySigner(name, key))
    return list(found.values())


def pair(prefix: str) -> tuple[Path, Path]:
    """Where a new pair goes: the private and the public file.

    Raises:
        Conflict: one of them is there already, and a key that is lost can't be had again.
    """
    paths = Path(prefix + PRIVATE_SUFFIX), Path(prefix + PUBLIC_SUFFIX)
    for path in paths:
        if os.path.lexists(path):
            raise _taken(path)
    return paths


def write_pair(paths: tuple[Path, Path], key: PrivateKey, password: bytes) -> None:
    """Writes a pair of new files: the private one encrypted, for its owner alone. Both or none.

    Raises:
        Conflict: one of them is there already.
        HostError: they can't be written.
    """
    private, public = paths
    _create(private, key.encrypted(password), 0o600)
    try:
        _create(public, key.public.pem, 0o644)
    except BaseException:
        private.unlink(missing_ok=True)
        raise


def _create(path: Path, data: bytes, mode: int) -> None:
    # never over what is there, also not over what came there just now
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise _taken(path) from None
    except (OSError, ValueError) as exc:
        raise HostError(f"cannot write {str(path)!a}: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        with os.fdopen(fd, "wb") as file, fsutil.noticing_full_disk(str(path), path.parent):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsutil.fsync_dir(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _taken(path: Path) -> Conflict:
    return Conflict(
        f"there is a file {str(path)!a} already, and nothing is written over a key",
        hint="name another place with --output-key-prefix, or move it away",
    )


def read(text: str, what: str) -> bytes:
    """The bytes of a key's file; *what* is its role. Raises :class:`FileProblem`."""
    if not text:
        raise FileProblem(f"{what} has an empty name", hint="name its file")
    return fsutil.read_input(Path(text), what, max_size=keys.KEY_MAX)
