"""ovm key, sign and verify over the local store; where passwords come from, and that they go nowhere."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import artifacts

from ovms.cli import main, passwords
from ovms.cli.exitcodes import Exit
from ovms.errors import InputError, UsageError
from ovms.oci.layout import Layout
from ovms.runtime.root import Root
from ovms.trust import external, keyfiles, keys

PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def _no_passwords(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in external.PASSWORD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Root(tmp_path / "root").layout()


@pytest.fixture
def ovm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main.main(["--root", str(tmp_path / "root"), *map(str, arguments)])
        said = capsys.readouterr()
        assert PASSWORD not in said.out + said.err
        return code, said.out, said.err

    return run


@contextlib.contextmanager
def given(data: bytes) -> Iterator[int]:
    """A descriptor from which *data* is read."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A key pair whose private half needs no password: deriving one takes a while."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    raw = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "a.pem", tmp_path / "a.pub"
    private.write_bytes(raw.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(keyfiles.signing_key(str(private), lambda: b"").public.pem)
    return private, public


# --- key -------------------------------------------------------------------------------------------------------------


def test_a_new_pair(ovm: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD)
    assert ovm("key", "generate") == (Exit.OK, "ovm.key\novm.pub\n", "")
    assert stat.S_IMODE(os.stat("ovm.key").st_mode) == 0o600
    before = Path("ovm.key").read_bytes()
    code, _, err = ovm("key", "--output-key-prefix", "ovm", "generate", "--json")
    assert (code, json.loads(err)["error"]["code"]) == (Exit.CONFLICT, "conflict")
    assert Path("ovm.key").read_bytes() == before
    code, out, _ = ovm("key", "public", "ovm.key")
    assert out == Path("ovm.pub").read_text()
    # ours comes before the other
    monkeypatch.setenv("OVMS_KEY_PASSWORD", "wrong")
    assert ovm("key", "public", "ovm.key")[0] == Exit.INPUT


def test_a_key_from_elsewhere(
    ovm: Callable[..., tuple[int, str, str]], pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVMS_KEY_PASSWORD", "")
    code, out, err = ovm("key", "import", pair[0], "--output-key-prefix", "b", "--json")
    assert code == Exit.OK
    assert "empty password" in err
    public = keys.load_public(pair[1].read_bytes(), "p")
    assert json.loads(out) == {
        "private": "b.key",
        "public": "b.pub",
        "fingerprint": f"sha256:{public.fingerprint}",
    }
    assert Path("b.pub").read_bytes() == pair[1].read_bytes()
    assert ovm("key", "public", "b.key")[1] == pair[1].read_text()
    code, out, _ = ovm("key", "public", pair[0], "--json")
    assert json.loads(out)["pem"] == pair[1].read_text()


def test_one_password_of_a_descriptor_is_the_old_ones_and_the_new_ones(
    ovm: Callable[..., tuple[int, str, str]], pair: tuple[Path, Path]
) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    locked = load_pem_private_key(pair[0].read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD.encode())
    )
    Path("locked.pem").write_bytes(locked)
    with given(PASSWORD.encode()) as fd:
        assert ovm("key", "import", "locked.pem", "--password-fd", fd)[0] == Exit.OK
    assert Path("ovm.pub").read_bytes() == pair[1].read_bytes()
    assert keyfiles.signing_key("ovm.key", PASSWORD.encode).public.pem == pair[1].read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x"),
        ("public",),
        ("import",),
        ("frobnicate",),
        ("public", "x", "--output-key-prefix", "y"),
        ("generate",),  # no terminal, no password
        ("generate", "--password-fd", "-1"),
        ("generate", "--password-fd", "999"),
        ("generate", "--password-fd", "x"),
    ],
)
def test_what_key_does_not_take(ovm: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...]) -> None:
    assert ovm("key", *arguments)[0] == Exit.USAGE
    assert list(Path.cwd().glob("*.key")) == []


# --- passwords -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "password"),
    [(b"a b\n", b"a b"), (b"a\r\nb", b"a"), (b"a", b"a"), (b"", b""), (b"\xff\0\n", b"\xff\0")],
)
def test_a_descriptor_comes_first(data: bytes, password: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVMS_KEY_PASSWORD", "of the environment")
    with given(data) as fd:
        ask = passwords.asker(fd, "Password")
        assert ask() == password
        assert ask() == password  # it is read once


def test_too_long_a_password() -> None:
    with given(b"a" * 5000) as fd, pytest.raises(InputError, match="at most"):
        passwords.asker(fd, "Password")()


def test_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers = iter(["a", "a", "a", "b"])
    asked = []

    def typed(prompt: str) -> str:
        asked.append(prompt)
        return next(answers)

    monkeypatch.setattr(getpass, "getpass", typed)
    assert passwords.asker(None, "New", twice=True)() == b"a"
    with pytest.raises(InputError, match="not the same"):
        passwords.asker(None, "New", twice=True)()
    assert asked == ["New: ", "Again: "] * 2

    def end(_: str) -> str:
        raise EOFError

    monkeypatch.setattr(getpass, "getpass", end)
    with pytest.raises(UsageError, match="no password"):
        passwords.asker(None, "New")()


# --- sign and verify -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bundle", "referrer", "classic"])
def test_signed_in_the_store(
    ovm: Callable[..., tuple[int, str, str]], layout: Layout, pair: tuple[Path, Path], form: str
) -> None:
    digest = artifacts.small(layout, "web:1").digest
    layout.set_name("also:1", layout.manifest(digest).descriptor())
    code, _, err = ovm("verify", "web:1", "--key", pair[1], "--json")
    assert (code, json.loads(err)["error"]["code"]) == (Exit.UNTRUSTED, "signature-missing")
    assert ovm("sign", "web:1", "--key", pair[0], "--format", form) == (Exit.OK, f"web@{digest}\n", "")
    code, out, err = ovm("verify", "web:1", "--key", pair[1])
    assert (code, out) == (Exit.OK, f"web@{digest}\n")
    assert f"the {form} signature" in err
    assert ovm("verify", digest, "--key", pair[1])[1] in (f"web@{digest}\n", f"also@{digest}\n")
    answer = json.loads(ovm("verify", "also:1", "--key", pair[1], "--json")[1])
    assert answer["name"] == f"also@{digest}"
    (value,) = answer["signatures"]
    assert (value["format"], value["signer"], value["good"]) == (form, str(pair[1]), True)


def test_another_key_and_all_of_them(
    ovm: Callable[..., tuple[int, str, str]], layout: Layout, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    artifacts.small(layout, "web:1")
    other = tmp_path / "other.pub"
    other.write_bytes(keys.generate().public.pem)
    ovm("sign", "web:1", "--key", pair[0])
    code, out, err = ovm("verify", "web:1", "--key", other, "--json")
    assert (code, out) == (Exit.UNTRUSTED, "")
    error = json.loads(err)["error"]
    assert error["code"] == "signature-invalid"
    assert [one["detail"] for one in error["signatures"]] == ["it was made with another key"]
    assert ovm("verify", "web:1", "--key", other, "--key", pair[1])[0] == Exit.OK
    assert ovm("verify", "web:1", "--key", other, "--key", pair[1], "--any")[0] == Exit.OK
    assert ovm("verify", "web:1", "--key", other, "--key", pair[1], "--all")[0] == Exit.UNTRUSTED
    # the same key under two names is one
    assert ovm("verify", "web:1", "--key", pair[1], "--key", pair[1], "--all")[0] == Exit.OK


def test_what_is_signed_is_printed_as_json(
    ovm: Callable[..., tuple[int, str, str]], layout: Layout, pair: tuple[Path, Path]
) -> None:
    digest = artifacts.small(layout, "web:1").digest
    value = json.loads(ovm("sign", "web:1", "--key", pair[0], "--json")[1])
    (signature,) = value.pop("signatures")
    assert signature["digest"] == digest
    assert layout.size(signature["manifest"]) is not None
    assert value == {
        "digest": digest,
        "format": "bundle",
        "key": f"sha256:{keys.load_public(pair[1].read_bytes(), 'p').fingerprint}",
        "pushed": False,
    }


def test_nothing_is_asked_for_what_is_not_there(ovm: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "a.key").write_bytes(keys.generate().encrypted(b"x"))
    code, _, err = ovm("sign", "web:1", "--key", "a.key", "--json")
    assert (code, json.loads(err)["error"]["code"]) == (Exit.NOT_FOUND, "reference-not-found")
    assert not (tmp_path / "root").exists()


def test_a_public_key_does_not_sign_and_a_private_one_does_not_verify(
    ovm: Callable[..., tuple[int, str, str]], layout: Layout, pair: tuple[Path, Path]
) -> None:
    artifacts.small(layout, "web:1")
    assert ovm("sign", "web:1", "--key", pair[1])[0] == Exit.INPUT
    code, _, err = ovm("verify", "web:1", "--key", pair[0])
    assert code == Exit.INPUT
    assert "is a private key" in err


def test_a_program_whose_signature_is_none(
    ovm: Callable[..., tuple[int, str, str]], layout: Layout, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    artifacts.small(layout, "web:1")
    program = tmp_path / "p"
    program.write_text(f"#!/bin/sh\ncase $1 in sign) echo x;; *) cat {pair[1]}; esac\n")
    program.chmod(0o755)
    code, _, err = ovm("sign", "web:1", "--key", f"exec:{program}")
    assert code == Exit.HOST
    assert "does not fit the public key" in err
    assert ovm("verify", "web:1", "--key", f"exec:{program}")[0] == Exit.UNTRUSTED
