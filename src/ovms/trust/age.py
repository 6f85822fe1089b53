"""age: who an encrypted RAM snapshot is for, and the identities that decrypt it.

Source of the format: https://age-encryption.org/v1. What is wrapped is a key of 32 bytes; recipients are X25519 ones. Files of
recipients and of identities are those of ``age`` and ``age-keygen``: one a line, with comments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ovms import coredump, fsutil
from ovms.errors import IdentityMissing, InputError, SnapshotInvalid, UsageError
from ovms.lazy import regex
from ovms.spec import limits, ramcrypt, ramheader
from ovms.spec.ramcrypt import Cipher
from ovms.spec.ramheader import Encryption, Header

if TYPE_CHECKING:
    from pyrage.x25519 import Identity

#: Names a file of identities.
VARIABLE: Final = "OVMS_IDENTITY"
#: What a file of recipients begins with on the command line.
FILE_MARK: Final = "@"
_FILE_MAX: Final = 64 * limits.KIB
#: Identities that are tried: each costs a multiplication for every recipient.
_IDENTITIES_MAX: Final = 64
_MAGIC: Final = b"age-encryption.org/v1\n"
_IDENTITY: Final = regex(r"AGE-SECRET-KEY-1[02-9AC-HJ-NP-Z]{58}")
_MAKE_ONE: Final = "'age-keygen -o FILE' makes one"


def recipients(values: Sequence[str]) -> tuple[str, ...]:
    """The recipients that *values* name, each once; ``@FILE`` stands for those of a file.

    Raises:
        UsageError: one is none.
        FileProblem, InputError: a file can't be read, or holds something else.
    """
    found: dict[str, None] = {}
    for value in values:
        if value.startswith(FILE_MARK):
            path = Path(value.removeprefix(FILE_MARK))
            lines = _lines(path, "the recipients")
            for number, text in lines:
                if wrong := ramheader.check_recipient(text):
                    raise InputError(f"{path}: line {number} {wrong}", path=str(path))
            if not lines:
                raise InputError(f"{path} names no recipient", path=str(path))
            found.update((text, None) for _, text in lines)
        elif wrong := ramheader.check_recipient(value):
            raise UsageError(f"a recipient {wrong}", hint=f"{FILE_MARK}FILE takes them from a file; {_MAKE_ONE}")
        else:
            found[value] = None
    return tuple(found)


def new(to: Sequence[str]) -> tuple[Encryption, Cipher]:
    """A new key, wrapped for the recipients *to*: for one blob.

    Raises:
        InputError: there are too many of them, or one is mistyped.
    """
    import pyrage
    from pyrage import x25519

    if len(to) > limits.RAM_RECIPIENTS_MAX:
        text = f"{len(to)} recipients are too many; at most {limits.RAM_RECIPIENTS_MAX} are allowed"
        raise InputError(text, rule="RAM-59")
    keys = []
    for text in to:
        try:
            keys.append(x25519.Recipient.from_str(text))
        except pyrage.RecipientError:
            raise InputError(f"the recipient {text} is mistyped: its checksum is wrong", rule="RAM-59") from None
    coredump.leave_no_core()
    key = os.urandom(ramcrypt.KEY_SIZE)
    return Encryption(tuple(to), pyrage.encrypt(key, keys)), Cipher(key)


class Identities:
    """What decrypts; read from its files when it is first needed. Its ``repr`` says nothing of them."""

    def __init__(self, named: Sequence[Path], environ: Mapping[str, str]) -> None:
        """*named* are the files that the user names; without one it is that of :data:`VARIABLE`, else the usual one if there."""
        usual = (
            Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "/") / ".config") / "ovms/identities.txt"
        )
        self._required = True
        if named:
            self._paths = list(named)
        elif text := environ.get(VARIABLE):
            self._paths = [Path(text)]
        else:
            self._paths, self._required = [usual], False
        self._found: list[Identity] | None = None

    def cipher(self, header: Header) -> Cipher:
        """What decrypts the snapshot with this *header*, which is an encrypted one.

        Raises:
            IdentityMissing: no identity here is one of its recipients.
            FileProblem, InputError: a file of identities can't be read, or holds something else.
            SnapshotInvalid: what is wrapped is no key.
        """
        import pyrage

        assert header.encryption is not None
        wrapped = header.encryption.key
        if not wrapped.startswith(_MAGIC):
            raise SnapshotInvalid("RAM snapshot: its wrapped key is no age file", rule="RAM-58")
        if self._found is None:
            self._found = self._read()
        try:
            key = pyrage.decrypt(wrapped, self._found) if self._found else None
        except pyrage.DecryptError:
            key = None  # for others, or damaged: it says so in words alone
        if key is None:
            raise self._missing(header.encryption)
        if len(key) != ramcrypt.KEY_SIZE:
            raise SnapshotInvalid(f"RAM snapshot: its wrapped key has {len(key)} bytes", rule="RAM-58")
        return Cipher(key)

    def _missing(self, encryption: Encryption) -> IdentityMissing:
        where = " or ".join(str(path) for path in self._paths)
        to = ", ".join(encryption.recipients) or "recipients that it does not name"
        looked = f"no identity in {where} fits" if self._found else f"there is no identity ({where} is not there)"
        return IdentityMissing(
            f"the RAM snapshot is encrypted for {to}, and {looked}",
            hint=f"--identity FILE, or {VARIABLE}=FILE, names one (for a server: where it runs); --cold boots from the disk",
            recipients=list(encryption.recipients),
            rule="RAM-60",
        )

    def _read(self) -> list[Identity]:
        import pyrage
        from pyrage import x25519

        coredump.leave_no_core()
        found = []
        for path in self._paths:
            if not self._required and not path.exists():
                continue
            for number, text in _lines(path, "the identities"):
                what = f"{path}: line {number}"
                if not _IDENTITY.fullmatch(text):
                    raise InputError(f"{what} is no X25519 identity of age", hint=_hint(text), path=str(path))
                try:
                    found.append(x25519.Identity.from_str(text))
                except pyrage.IdentityError:
                    raise InputError(f"{what} is mistyped: its checksum is wrong", path=str(path)) from None
            if len(found) > _IDENTITIES_MAX:
                raise InputError(f"{path} holds more than {_IDENTITIES_MAX} identities", path=str(path))
        return found


def _hint(text: str) -> str:
    if text.startswith((_MAGIC.decode().strip(), "-----BEGIN AGE")):
        return "it is encrypted itself: decrypt it into a file in memory, such as one below /dev/shm"
    return f"its lines begin with AGE-SECRET-KEY-1; {_MAKE_ONE}"


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    # (its number, a line), without comments
    data = fsutil.read_input(path, what, max_size=_FILE_MAX)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text", path=str(path)) from None
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
