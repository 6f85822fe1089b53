"""What the user tells a guest's cloud-init: user data, SSH keys, a host name, on a NoCloud seed disk of the instance.

User data may hold passwords. They are in the seed (mode 0600, removed with the instance), in the guest, and nowhere else: not in
the record, in no argument of a program, in no error.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Final

from ovms import fsutil
from ovms.disk import seed
from ovms.errors import FileProblem, InputError
from ovms.lazy import dataclass, field, regex
from ovms.spec import bootstrap, limits

FILE: Final = "seed.img"
#: What clouds take is 16 or 64 KiB; more belongs onto a volume.
USER_DATA_MAX: Final = 1 * limits.MIB
KEY_FILE_MAX: Final = 64 * limits.KIB
KEYS_MAX: Final = 64

_NOTHING: Final = b"#cloud-config\n{}\n"
_KEY: Final = regex(r"([a-z0-9@.-]{3,64}) +([A-Za-z0-9+/]{40,16384}={0,2})(?: +([^\x00-\x1f\x7f]*))?")
_KEY_TYPE: Final = regex(
    r"ssh-(rsa|ed25519)|ecdsa-sha2-nistp(256|384|521)|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com"
)
#: What private keys of OpenSSH, OpenSSL and PuTTY begin with.
_PRIVATE: Final = regex(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File|SSH PRIVATE KEY FILE")


@dataclass(frozen=True)
class Seed:
    """What the guest is told; None and empty where nothing is. Its ``repr`` tells no secrets."""

    user_data: bytes | None = field(default=None, repr=False)
    ssh_keys: tuple[str, ...] = ()
    hostname: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return self.user_data is not None or bool(self.ssh_keys) or self.hostname is not None


def read_user_data(source: Path | int) -> bytes:
    """User data from a file, or from a descriptor (stdin).

    Raises:
        FileProblem: no file that can be read, or more than USER_DATA_MAX bytes.
        InputError: nothing, or too much, came from the descriptor.
    """
    if isinstance(source, Path):
        return fsutil.read_input(source, "user data", max_size=USER_DATA_MAX)
    data = bytearray()
    try:
        while chunk := os.read(source, fsutil.COPY_BUFFER):
            data += chunk
            if len(data) > USER_DATA_MAX:
                raise InputError(
                    f"user data has more than {USER_DATA_MAX} bytes", hint="put large things onto a volume"
                )
    except OSError as exc:
        raise FileProblem(f"user data cannot be read from stdin: {exc.strerror}") from exc
    if not data:
        raise InputError("user data from stdin is empty")
    return bytes(data)


def read_keys(path: Path) -> tuple[str, ...]:
    """The public keys in a file, as ``ssh-keygen`` writes them: one a line.

    Raises:
        FileProblem: it can't be read.
        InputError: it holds a private key, something that is no key, or nothing.
    """
    data = fsutil.read_input(path, "SSH key", max_size=KEY_FILE_MAX)
    if _PRIVATE.search(data):
        beside = path.with_name(f"{path.name}.pub")
        raise InputError(
            f"SSH key: {path} is a private key, which must never leave this machine",
            hint=f"name the public one: {beside}" if beside.exists() else "name the public one: its file ends in .pub",
            path=str(path),
        )
    keys = []
    for number, raw in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if not _is_key(line):
            # what stands there is not shown: who mistakes one file for another has a reason to be glad
            raise InputError(
                f"SSH key: line {number} of {path} is no public key",
                hint="a line is like 'ssh-ed25519 AAAA… comment', without options; 'ssh-keygen -y' makes it",
                path=str(path),
            )
        keys.append(line)
    if not keys:
        raise InputError(f"SSH key: {path} holds no key", path=str(path))
    return tuple(keys)


def _is_key(line: str) -> bool:
    match = _KEY.fullmatch(line)
    if match is None or _KEY_TYPE.fullmatch(match[1]) is None:
        return False
    try:
        blob = base64.b64decode(match[2], validate=True)
    except binascii.Error:
        return False
    # the key says its type again, as a string with its length before it
    name = match[1].encode()
    return blob.startswith(len(name).to_bytes(4, "big") + name)


def check(told: Seed) -> None:
    """Whether a seed can be made of it.

    Raises:
        InputError: no host name, or too many keys.
    """
    if told.hostname is not None:
        bootstrap.meta_data("00000000-0000-0000-0000-000000000000", told.hostname)
    if len(told.ssh_keys) > KEYS_MAX:
        raise InputError(f"{len(told.ssh_keys)} SSH keys are given; at most {KEYS_MAX} can be")


def write(path: Path, told: Seed, *, instance_id: str, name: str) -> int:
    """Makes the seed of an instance, which is called *name* where the user gave no host name. Returns its size in bytes."""
    hostname = told.hostname or bootstrap.host_name(name, instance_id)
    meta = bootstrap.meta_data(instance_id, hostname, told.ssh_keys)
    image = seed.image({"meta-data": meta.encode(), "user-data": told.user_data or _NOTHING})
    _write(path, image)
    return len(image)


def write_empty(path: Path, size: int) -> None:
    """The seed of a VM that was restored: as large as the one that the snapshot's VM had, with nothing on it."""
    _write(path, b"")
    os.truncate(path, size)


def _write(path: Path, image: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with fsutil.noticing_full_disk("the seed disk", path):
            fsutil.pwrite_all(fd, image, 0)
    finally:
        os.close(fd)
