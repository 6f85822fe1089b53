"""docs/signing can be followed from its top: each command in its order, and what it says is what the page says."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests, keyless_services, pages, tools
from support.cli import OVM
from support.keyless import Clock, Sigstore
from support.registry import Registry
from support.rfc import ROOT
from support.tls import Authority

PAGE = ROOT / "docs" / "signing" / "README.md"
HOST = "registry.example"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    authority = Authority(tmp_path / "ca")
    registry = Registry(tmp_path / "registry", tls=authority.issue("server"))
    yield registry
    registry.close()


@pytest.fixture
def work(tmp_path: Path, echo_kernel: Path) -> Path:
    """Where a page is followed: the project of an artifact lies there."""
    work = tmp_path / "work"
    for directory in (work, tmp_path / "home"):
        directory.mkdir()
    guests.write_project(work / "web", echo_kernel, name="web")
    return work


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody with both programs, who trusts the registry."""
    env = {
        "PATH": pages.programs(tmp_path / "bin", ovm=OVM, cosign=tools.find("cosign")),
        "HOME": str(tmp_path / "home"),
        "OVMS_ROOT": str(tmp_path / "root"),
        "SSL_CERT_FILE": str(tmp_path / "ca" / "ca.crt"),
        "COSIGN_PASSWORD": "correct horse",
        "LC_ALL": "C.UTF-8",
    }
    yield env
    subprocess.run(["bash", "-c", "ovm rm -f $(ovm ps -aq)"], env=env, capture_output=True, timeout=60, check=False)
    assert guests.qemu_children(tmp_path / "root") == []


@pytest.mark.long
def test_the_page_can_be_followed(registry: Registry, work: Path, env: dict[str, str]) -> None:
    assert pages.follow(PAGE, work, env, {HOST: registry.host}) > 20


@pytest.mark.long
def test_identities_can_be_followed(registry: Registry, work: Path, env: dict[str, str], tmp_path: Path) -> None:
    sigstore = Sigstore(clock=Clock(tmp_path / "clock"))
    keyless_services.write_keys(sigstore, work)
    (work / "token").write_text(keyless_services.token())
    with keyless_services.serving(sigstore) as url:
        here = {HOST: registry.host, **{f"https://{name}.example": url for name in ("fulcio", "rekor", "tsa")}}
        assert pages.follow(PAGE.with_name("identities.md"), work, env, here) > 5
