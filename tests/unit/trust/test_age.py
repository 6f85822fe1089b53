"""Recipients and identities of encrypted RAM snapshots."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyrage import x25519
from support import ram

from ovms.errors import FileProblem, IdentityMissing, InputError, SnapshotInvalid, UsageError
from ovms.spec import limits, ramheader
from ovms.spec.ramheader import Encryption
from ovms.trust import age
from ovms.trust.age import Identities

#: That of the test vectors.
IDENTITY = x25519.Identity.from_str("AGE-SECRET-KEY-1AZZ2VG4XCGHJUNX2R5LX84P64877JMGXYZJ5EYXC9RUPST47QS9SA2C245")
RECIPIENT = str(IDENTITY.to_public())
OTHER = x25519.Identity.from_str("AGE-SECRET-KEY-1NHR939TKCPG4GAJT7JQESQ7NYSUXVURHGLAFU0XC0HA0V542UJ5SRSN936")


@pytest.fixture(autouse=True)
def _core() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def header(encryption: Encryption) -> ramheader.Header:
    return ram.header(encryption=encryption)


def test_recipients_are_named_or_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "team.txt", "# the team", "", RECIPIENT, f"  {OTHER.to_public()}\r")
    assert age.recipients([]) == ()
    assert age.recipients([RECIPIENT, f"@{path}", RECIPIENT]) == (RECIPIENT, str(OTHER.to_public()))


@pytest.mark.parametrize("text", ["", "password", "age1", RECIPIENT[:-1], RECIPIENT.upper(), f"{RECIPIENT}\x1b[2J", "ssh-ed25519 AAAA"])  # fmt: skip
def test_what_is_no_recipient(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as info:
        age.recipients([text])
    assert "\x1b" not in info.value.message
    if text:
        with pytest.raises(InputError, match="line 2"):
            age.recipients([f"@{write(tmp_path / 'file', RECIPIENT, text)}"])


def test_an_identity_in_a_recipient_s_place_is_not_shown(tmp_path: Path) -> None:
    for text in (str(IDENTITY), str(IDENTITY).lower()):
        with pytest.raises(UsageError) as info:
            age.recipients([text])
        assert text[20:] not in str(info.value.to_json())
        with pytest.raises(InputError) as in_file:
            age.recipients([f"@{write(tmp_path / 'file', text)}"])
        assert text[20:] not in str(in_file.value.to_json())


def test_a_file_that_names_nobody(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no recipient"):
        age.recipients([f"@{write(tmp_path / 'file', '# nobody')}"])
    with pytest.raises(FileProblem):
        age.recipients([f"@{tmp_path / 'none'}"])
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no text"):
        age.recipients([f"@{tmp_path / 'file'}"])
    (tmp_path / "file").write_bytes(b"#" * (65 << 10))
    with pytest.raises(FileProblem):
        age.recipients([f"@{tmp_path / 'file'}"])


@pytest.mark.spec("RAM-58", "RAM-59")
def test_each_recipient_gets_the_key(tmp_path: Path) -> None:
    to = [x25519.Identity.generate() for _ in range(limits.RAM_RECIPIENTS_MAX)]
    encryption, cipher = age.new([str(one.to_public()) for one in to])
    assert encryption.recipients == tuple(str(one.to_public()) for one in to)
    ramheader.check(header(encryption).to_json())  # as many as there may be fit into a header
    sealed = cipher.encrypt_state(b"state", b"bound")
    for number, one in enumerate(to):
        found = Identities([write(tmp_path / f"{number}", OTHER, one)], {}).cipher(header(encryption))
        assert found.decrypt_state(sealed, b"bound") == b"state"
    again, other = age.new([RECIPIENT])
    assert other.decrypt_state(sealed, b"bound") is None  # a key for each
    assert again.key != age.new([RECIPIENT])[0].key
    with pytest.raises(InputError, match="too many") as info:
        age.new([RECIPIENT] * (limits.RAM_RECIPIENTS_MAX + 1))
    assert info.value.context["rule"] == "RAM-59"


def test_a_mistyped_recipient() -> None:
    wrong = RECIPIENT[:-1] + ("q" if RECIPIENT[-1] != "q" else "p")
    with pytest.raises(InputError, match="mistyped"):
        age.new([wrong])


@pytest.mark.spec("RAM-60")
def test_where_identities_come_from(tmp_path: Path) -> None:
    encryption, _ = age.new([RECIPIENT])
    ours = write(tmp_path / "ours", IDENTITY)
    usual = tmp_path / "config" / "ovms" / "identities.txt"
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    with pytest.raises(IdentityMissing, match="is not there") as info:
        Identities([], environ).cipher(header(encryption))
    assert info.value.context["recipients"] == [RECIPIENT]
    usual.parent.mkdir(parents=True)
    write(usual, IDENTITY)
    Identities([], environ).cipher(header(encryption))
    other = write(tmp_path / "other", OTHER)
    for named, more in (([other], {}), ([], {"OVMS_IDENTITY": str(other)})):  # one that is named stands alone
        with pytest.raises(IdentityMissing, match="fits"):
            Identities(named, {**environ, **more}).cipher(header(encryption))
    Identities([ours], {**environ, "OVMS_IDENTITY": str(other)}).cipher(header(encryption))
    Identities([other, ours], {}).cipher(header(encryption))
    with pytest.raises(FileProblem):
        Identities([], {"OVMS_IDENTITY": str(tmp_path / "none")}).cipher(header(encryption))
    write(usual)
    with pytest.raises(IdentityMissing):
        Identities([], {"HOME": str(tmp_path / "home")}).cipher(header(encryption))


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ((RECIPIENT,), "no X25519 identity"),
        (("AGE-SECRET-KEY-1",), "no X25519 identity"),
        ((str(IDENTITY)[:-1] + ("Q" if str(IDENTITY)[-1] != "Q" else "P"),), "mistyped"),
        (("age-encryption.org/v1", "-> scrypt abc 18"), "no X25519 identity"),
        ([IDENTITY] * 65, "more than"),
    ],
)
def test_what_is_no_file_of_identities(tmp_path: Path, lines: list[object], match: str) -> None:
    encryption, _ = age.new([RECIPIENT])
    with pytest.raises(InputError, match=match) as info:
        Identities([write(tmp_path / "file", *lines)], {}).cipher(header(encryption))
    assert str(IDENTITY)[20:-1] not in str(info.value.to_json())


@pytest.mark.spec("RAM-58", "RAM-60")
@pytest.mark.parametrize(
    ("wrapped", "expected"),
    [
        (b"", SnapshotInvalid),
        (b"rubbish", SnapshotInvalid),
        (b"age-encryption.org/v1\n", IdentityMissing),
        (b"age-encryption.org/v1\n" + b"-> X25519 " * 300, IdentityMissing),
        (pyrage.passphrase.encrypt(bytes(32), "password"), IdentityMissing),
        (pyrage.encrypt(bytes(31), [IDENTITY.to_public()]), SnapshotInvalid),
        (pyrage.encrypt(bytes(1 << 10), [IDENTITY.to_public()]), SnapshotInvalid),
        (pyrage.encrypt(bytes(32), [IDENTITY.to_public()], armored=True), SnapshotInvalid),
    ],
    ids=range(8),
)
def test_a_hostile_key(tmp_path: Path, wrapped: bytes, expected: type[Exception]) -> None:
    identities = Identities([write(tmp_path / "file", IDENTITY)], {})
    with pytest.raises(expected):
        identities.cipher(header(Encryption((), wrapped)))


def test_no_core_is_dumped_with_a_key_in_it(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    encryption, cipher = age.new([RECIPIENT])
    assert resource.getrlimit(resource.RLIMIT_CORE) == (1 if hard else 0, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    identities = Identities([write(tmp_path / "file", IDENTITY)], {})
    identities.cipher(header(encryption))
    assert resource.getrlimit(resource.RLIMIT_CORE) == (1 if hard else 0, hard)
    for thing in (identities, cipher):
        assert "SECRET" not in repr(thing)


_WRAPPED = age.new([RECIPIENT])[0].key


@pytest.mark.spec("RAM-58", "RAM-60")
@given(st.integers(0, len(_WRAPPED) - 1), st.binary(max_size=40), st.integers(0, 40))
def test_anything_as_a_key_is_a_key_or_an_error(at: int, other: bytes, gone: int) -> None:
    wrapped = _WRAPPED[:at] + other + _WRAPPED[at + gone :]
    with contextlib.suppress(SnapshotInvalid, IdentityMissing):
        _IDENTITIES.cipher(header(Encryption((), wrapped)))


class _Ours(Identities):
    def _read(self) -> list[x25519.Identity]:
        return [IDENTITY]


_IDENTITIES = _Ours([Path("none")], {})
