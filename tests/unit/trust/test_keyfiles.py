"""Keys as people name them: files, and programs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ovms.errors import Conflict, FileProblem, HostError, InputError
from ovms.trust import external, keyfiles, keys

KEY = keys.generate()
PASSWORD = b"correct horse"


def never() -> bytes:
    raise AssertionError("no password is needed")


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"exec:{path}"


def test_a_pair_is_for_its_owner_and_for_all(tmp_path: Path) -> None:
    paths = keyfiles.pair(str(tmp_path / "a"))
    keyfiles.write_pair(paths, KEY, PASSWORD)
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600, 0o644]
    assert keyfiles.signing_key(str(paths[0]), lambda: PASSWORD).public == KEY.public
    assert keyfiles.public_key(str(paths[1])) == KEY.public
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "a.pub"]


@pytest.mark.parametrize("there", ["a.key", "a.pub"])
def test_nothing_is_written_over_a_key(tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys.PrivateKey, "encrypted", lambda *_: b"x")  # which takes a while
    paths = tmp_path / "a.key", tmp_path / "a.pub"
    # also not over a link to nowhere, through which somebody else would get the key
    (tmp_path / there).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict, match="already"):
        keyfiles.pair(str(tmp_path / "a"))
    with pytest.raises(Conflict, match="already"):
        keyfiles.write_pair(paths, KEY, PASSWORD)
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot write"):
        keyfiles.write_pair(keyfiles.pair(str(tmp_path / "no" / "a")), KEY, PASSWORD)


def test_signers_have_the_names_of_their_files_and_count_once(tmp_path: Path) -> None:
    for name in ("a.pub", "again.pub"):
        (tmp_path / name).write_bytes(KEY.public.pem)
    (tmp_path / "b.pub").write_bytes(keys.generate().public.pem)
    names = [str(tmp_path / name) for name in ("a.pub", "again.pub", "b.pub")]
    assert [one.name for one in keyfiles.signers(names)] == [names[0], names[2]]
    (tmp_path / "\x1b[31m").write_bytes(KEY.public.pem)
    assert keyfiles.signers([str(tmp_path / "\x1b[31m")])[0].name.isprintable()


@pytest.mark.parametrize("name", ["", "missing", "\0", "directory", "empty", "large"])
def test_what_is_no_file_of_a_key(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(keys.KEY_MAX + 1))
    text = str(tmp_path / name) if name else ""
    with pytest.raises(FileProblem):
        keyfiles.public_key(text)
    with pytest.raises(FileProblem):
        keyfiles.signing_key(text, never)


# --- programs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "public.pem"
    path.write_bytes(KEY.public.pem)
    return path


def test_a_program_signs(tmp_path: Path, pem: Path) -> None:
    text = program(
        tmp_path / "a program", f'case $2 in public-key) cat {pem};; *) printf "%s " "$1" $#; cat; esac'
    ).replace("a program", "'a program'")
    key = keyfiles.signing_key(f"{text} '$(id) ;'", never)
    assert key.public == KEY.public
    # its arguments are words, for no shell; the message comes as it is
    assert key.sign(b"the message\0\n") == b"$(id) ; 2 the message\0\n"
    assert keyfiles.public_key(f"{text} x") == KEY.public


def test_a_program_is_called_by_its_key(tmp_path: Path, pem: Path) -> None:
    (signer,) = keyfiles.signers([f"{program(tmp_path / 'p', f'cat {pem}')} --pin 1234"])
    assert signer.name == f"exec:{KEY.public.fingerprint[:12]}"


def test_a_program_gets_the_environment_and_no_password(
    tmp_path: Path, pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMS_TOKEN", "token")
    for name in external.PASSWORD_VARIABLES:
        monkeypatch.setenv(name, "secret")
    key = keyfiles.signing_key(
        program(tmp_path / "p", f"case $1 in sign) env | grep -E 'TOKEN|secret';; *) cat {pem}; esac"), never
    )
    said = key.sign(b"x")
    assert b"KMS_TOKEN=token" in said
    assert b"secret" not in said


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("echo oh no >&2; exit 3", r"failed at public-key \(exit code 3\): oh no"),
        ("printf '\\033[31mred' >&2; exit 1", r"\?\[31mred"),
        ("kill -9 $$", "signal SIGKILL"),
        ("exec sleep 60", r"did not end within 0\.5 s"),
        ("echo hello", "does not hold one public key"),
        ("", "does not hold one public key"),
        ("cat /dev/zero | head -c 100000", "100000 bytes"),
    ],
)
def test_a_program_that_fails(tmp_path: Path, script: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "TIMEOUT", 0.5 if "sleep" in script else 20)
    text = program(tmp_path / "p", script)
    with pytest.raises((HostError, InputError), match=detail) as caught:
        keyfiles.signing_key(f"{text} --pin 1234", never)
    assert "1234" not in str(caught.value)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("text", ["exec:", "exec:  ", "exec:'", "exec:/no/such/program --pin 1234", "exec:\0"])
def test_what_is_no_program(text: str) -> None:
    with pytest.raises((HostError, InputError)) as caught:
        keyfiles.public_key(text)
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("size", [0, keys.SIGNATURE_MAX + 1])
def test_what_is_no_signature(tmp_path: Path, pem: Path, size: int) -> None:
    script = f"case $1 in sign) head -c {size} /dev/zero;; *) cat {pem}; esac"
    with pytest.raises(HostError, match=f"gave {size} bytes"):
        keyfiles.signing_key(program(tmp_path / "p", script), never).sign(b"x")


def test_a_program_that_reads_nothing(tmp_path: Path, pem: Path) -> None:
    key = keyfiles.signing_key(
        program(tmp_path / "p", f"exec <&-; case $1 in sign) echo x;; *) cat {pem}; esac"), never
    )
    assert key.sign(os.urandom(1 << 20)) == b"x\n"
