"""What a guest's cloud-init is told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ovms.disk import seed
from ovms.errors import FileProblem, InputError
from ovms.runtime import seeds

ID = "11111111-2222-3333-4444-555555555555"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO5HKCDbq0tCSVTlSSKkKxCWLjz0pDPZyKpWGcSZ6dYV me@host"


def keys(tmp_path: Path, text: str) -> tuple[str, ...]:
    (tmp_path / "keys").write_text(text)
    return seeds.read_keys(tmp_path / "keys")


def test_public_keys_are_read(tmp_path: Path) -> None:
    assert keys(tmp_path, f"# mine\n\n{KEY}\n{KEY} and more\r\n") == (KEY, f"{KEY} and more")


@pytest.mark.parametrize(
    "text",
    [
        "hello\n",
        KEY.replace("ssh-ed25519 ", "ssh-rsa "),
        KEY.replace("AAAAC3", "AAAAC4"),
        f'command="reboot" {KEY}',
        "ssh-ed25519 AAAA",
        KEY + " \x07",
        "# nothing\n",
        "\n",
    ],
)
def test_what_is_no_public_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        keys(tmp_path, text)
    assert "AAAA" not in caught.value.message


@pytest.mark.parametrize("kind", ["OPENSSH PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "PRIVATE KEY"])
def test_a_private_key_is_refused_and_not_shown(tmp_path: Path, kind: str) -> None:
    (tmp_path / "keys.pub").write_text(KEY)
    with pytest.raises(InputError, match="is a private key") as caught:
        keys(tmp_path, f"-----BEGIN {kind}-----\nc2VjcmV0\n-----END {kind}-----\n")
    assert "keys.pub" in str(caught.value.hint)
    assert "c2VjcmV0" not in f"{caught.value.message}{caught.value.to_json()}"


def test_user_data_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(seeds.USER_DATA_MAX + 1))
    with pytest.raises(FileProblem, match="at most"):
        seeds.read_user_data(tmp_path / "large")
    with (tmp_path / "large").open("rb") as file, pytest.raises(InputError, match="more than"):
        seeds.read_user_data(file.fileno())
    with Path(os.devnull).open("rb") as file, pytest.raises(InputError, match="is empty"):
        seeds.read_user_data(file.fileno())


@pytest.mark.spec("BOOT-52")
def test_the_seed_is_its_owner_s_alone_and_tells_nobody(tmp_path: Path) -> None:
    told = seeds.Seed(b"#cloud-config\npassword: s3cret\n", (KEY,), "seedling")
    size = seeds.write(tmp_path / "seed", told, instance_id=ID, name="web")
    path = tmp_path / "seed"
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, size)
    assert b"s3cret" in path.read_bytes()
    assert "s3cret" not in repr(told)
    meta = json.dumps({"instance-id": ID, "local-hostname": "seedling", "public-keys": [KEY]}, indent=2) + "\n"
    assert path.read_bytes() == seed.image({"meta-data": meta.encode(), "user-data": told.user_data or b""})


@pytest.mark.spec("BOOT-44")
@pytest.mark.parametrize(("name", "hostname"), [("web", "web"), ("Web_1", ID)])
def test_the_guest_is_called_like_the_instance_where_that_is_a_host_name(
    tmp_path: Path, name: str, hostname: str
) -> None:
    seeds.write(tmp_path / "seed", seeds.Seed(ssh_keys=(KEY,)), instance_id=ID, name=name)
    assert f'"local-hostname": "{hostname}"'.encode() in (tmp_path / "seed").read_bytes()


@pytest.mark.parametrize("hostname", ["", "a b", "-a", "A", "a\nb", "x" * 65])
def test_no_host_name(hostname: str) -> None:
    with pytest.raises(InputError, match="host name"):
        seeds.check(seeds.Seed(hostname=hostname))


def test_ssh_keygen_s_own_keys_are_keys(tmp_path: Path) -> None:
    for kind in ("ed25519", "ecdsa", "rsa"):
        try:
            argv = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "a comment", "-f", tmp_path / kind]
            subprocess.run(argv, check=True, timeout=60, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            pytest.skip("no ssh-keygen here")
        assert len(seeds.read_keys(tmp_path / f"{kind}.pub")) == 1
        with pytest.raises(InputError, match="private"):
            seeds.read_keys(tmp_path / kind)
