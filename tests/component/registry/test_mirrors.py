"""Mirrors, other locations and insecure registries, as ``registries.conf`` says; real registries and misbehaving ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import faulty
from support.artifacts import small
from support.cli import Ovm
from support.faulty import Server
from support.registry import HTPASSWD, Registry
from support.tls import Authority

from ovms.errors import DigestMismatch, ReferenceNotFound, RegistryUnreachable
from ovms.oci import transfer
from ovms.oci.connect import Connector
from ovms.oci.credentials import Credential
from ovms.oci.layout import Layout
from ovms.oci.reference import Reference
from ovms.oci.registries import Registries
from ovms.oci.session import Settings
from ovms.spec import mediatypes
from ovms.spec.digest import Digest, of_bytes

#: What the user calls the registry; it is nowhere.
NAME = "registry.example"
REFERENCE = Reference(NAME, "t/x", "1")
BIG = os.urandom(3_000_000)
NOBODY = "127.0.0.1:1"


class Connected:
    """Clients by a configuration; what is said to the user is in ``said``."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "registries.conf"
        self.said: list[str] = []
        self.asked_for: list[tuple[str, str]] = []
        self.home = directory

    def get(self, host: str, repository: str) -> Credential | None:
        self.asked_for.append((host, repository))
        return Credential("ovms", "secret")

    def configure(self, location: str, *mirrors: str, **options: str) -> None:
        """*mirrors* are locations, each with what else is said of it after a blank."""
        text = f'[[registry]]\nprefix = "{NAME}"\nlocation = "{location}"\n'
        text += "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in options.items())
        for mirror in mirrors:
            where, _, more = mirror.partition(" ")
            text += f'[[registry.mirror]]\nlocation = "{where}"\n{more}\n'
        self.path.write_text(text)

    def client(self) -> Any:
        settings = Settings(credentials=self, connect_timeout=2, read_timeout=2)
        connector = Connector(settings, Registries([self.path]), environ={"HOME": str(self.home)}, say=self.said.append)
        return connector(NAME)


@pytest.fixture
def connected(tmp_path: Path) -> Connected:
    return Connected(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "other")


@pytest.fixture
def mirror() -> Iterator[Server]:
    with Server() as server:
        serve(server)
        yield server


@pytest.fixture
def origin() -> Iterator[Server]:
    with Server() as server:
        serve(server)
        yield server


def serve(server: Server) -> None:
    server.serve_artifact({"disk": (mediatypes.DISK_LAYER, BIG)}, (mediatypes.MANIFEST, b"{}"))


def push(host: str, repository: str, layout: Layout) -> str:
    artifact = small(layout, str(REFERENCE))
    with Connector(Settings(), Registries(()))(host) as client:
        transfer.push(layout, client, Reference(host, repository, "1"), artifact.digest)
    return artifact.digest


def pull(connected: Connected, layout: Layout, reference: Reference = REFERENCE) -> str:
    with connected.client() as client:
        return transfer.pull(layout, client, reference).digest


def test_a_mirror_serves_what_the_registry_does_not_have(
    registry: Registry, connected: Connected, layout: Layout, other: Layout
) -> None:
    digest = push(registry.host, "cache/t/x", layout)
    connected.configure(NOBODY, f"{registry.host}/cache")
    assert pull(connected, other) == digest
    assert connected.said == [f"{REFERENCE} is served by the mirror {registry.host}"]
    # the name that the user knows it by
    assert [entry.name for entry in other.entries()] == [str(REFERENCE)]


def test_mirrors_that_cannot_be_used_are_passed_over(
    registry: Registry, mirror: Server, connected: Connected, layout: Layout, other: Layout
) -> None:
    digest = push(registry.host, "t/x", layout)
    mirror.faults.append(("GET", "/manifests/", faulty.status(503)))
    connected.configure(registry.host, NOBODY, mirror.host, f"{registry.host}/nothing-there")
    assert pull(connected, other) == digest
    assert [line.partition(": ")[0] for line in connected.said] == [
        f"the mirror {host} is passed over for {REFERENCE}" for host in (NOBODY, mirror.host, registry.host)
    ]
    assert "refused" in connected.said[0]
    assert "503" in connected.said[1]
    assert "does not have" in connected.said[2]


@pytest.mark.parametrize("code", [401, 403, 404, 429, 500, 502])
def test_what_makes_a_mirror_be_passed_over(
    code: int, mirror: Server, origin: Server, connected: Connected, other: Layout
) -> None:
    mirror.faults += [("GET", "/manifests/", faulty.status(code))] * 2
    connected.configure(origin.host, mirror.host)
    pull(connected, other)
    assert len(origin.asked("GET", "/manifests/")) == 1
    assert mirror.asked("GET", "/blobs/") == [], "a mirror that was passed over is not asked again"


@pytest.mark.long
def test_nobody_has_it(mirror: Server, origin: Server, connected: Connected, other: Layout) -> None:
    connected.configure(origin.host, mirror.host)
    with pytest.raises(ReferenceNotFound, match="t/x:none"):
        pull(connected, other, Reference(NAME, "t/x", "none"))
    connected.configure(NOBODY, mirror.host)
    with pytest.raises(RegistryUnreachable, match=NOBODY):
        pull(connected, other, Reference(NAME, "t/x", "none"))


@pytest.mark.spec("OCI-21")
def test_wrong_bytes_are_no_reason_to_ask_elsewhere(
    mirror: Server, origin: Server, connected: Connected, other: Layout
) -> None:
    mirror.faults += [("GET", "/blobs/", faulty.wrong_bytes)] * 8
    connected.configure(origin.host, mirror.host)
    with pytest.raises(DigestMismatch):
        pull(connected, other)
    assert origin.seen == []
    assert other.entries() == []


def test_a_mirror_that_breaks_off_half_way(mirror: Server, origin: Server, connected: Connected, other: Layout) -> None:
    big = faulty.digest_of(BIG)
    mirror.faults.append(("GET", f"/blobs/{big}", faulty.cut(2_000_000)))
    connected.configure(origin.host, mirror.host)
    pull(connected, other)
    assert mirror.asked("GET", f"/blobs/{big}") == [None]
    (resumed,) = origin.asked("GET", f"/blobs/{big}")
    assert resumed is not None, "what had come was fetched again"
    assert int(resumed.removeprefix("bytes=").partition("-")[0]) > 1_000_000
    assert "passed over" in connected.said[-1]
    assert other.path(Digest(big)).read_bytes() == BIG


def test_a_mirror_that_lacks_one_blob(mirror: Server, origin: Server, connected: Connected, other: Layout) -> None:
    big = faulty.digest_of(BIG)
    del mirror.blobs[big]
    connected.configure(origin.host, mirror.host)
    pull(connected, other)
    assert len(origin.asked("GET", "/blobs/")) == 1
    assert origin.asked("GET", "/manifests/") == []


@pytest.mark.parametrize("use", ["digest-only", "tag-only"])
def test_mirrors_for_tags_or_digests(
    use: str, mirror: Server, origin: Server, connected: Connected, other: Layout
) -> None:
    connected.configure(origin.host, f'{mirror.host} pull-from-mirror = "{use}"')
    digest = next(iter(set(mirror.manifests) - {"1"}))
    by_tag, by_digest = REFERENCE, Reference.parse(f"{NAME}/t/x@{digest}")
    served, passed = (by_digest, by_tag) if use == "digest-only" else (by_tag, by_digest)
    pull(connected, other, served)
    assert origin.seen == []
    mirror.seen.clear()
    pull(connected, other, passed)
    assert mirror.asked("GET", "/manifests/") == []


def test_a_push_goes_to_the_registry_alone(
    registry: Registry, mirror: Server, connected: Connected, layout: Layout
) -> None:
    connected.configure(f"{registry.host}/pushed", mirror.host)
    artifact = small(layout, str(REFERENCE))
    with connected.client() as client:
        transfer.push(layout, client, REFERENCE, artifact.digest)
        # and what is read then comes from there: a mirror may not have it yet
        assert client.get_manifest(REFERENCE)[1].digest == artifact.digest
    assert mirror.seen == []
    assert of_bytes(registry.get("pushed/t/x/manifests/1", accept=mediatypes.OCI_MANIFEST)) == artifact.digest


def test_credentials_are_those_of_the_mirror(
    tmp_path: Path, connected: Connected, layout: Layout, other: Layout
) -> None:
    guarded = Registry(tmp_path / "guarded", htpasswd=HTPASSWD)
    try:
        artifact = small(layout, str(REFERENCE))
        connected.configure(f"{guarded.host}/cache")
        with connected.client() as client:
            transfer.push(layout, client, REFERENCE, artifact.digest)
        connected.asked_for.clear()
        connected.configure(NOBODY, f"{guarded.host}/cache")
        pull(connected, other)
        assert set(connected.asked_for) == {(guarded.host, "cache/t/x")}
    finally:
        guarded.close()


@pytest.mark.long
def test_an_insecure_mirror(tmp_path: Path, connected: Connected, layout: Layout, other: Layout) -> None:
    authority = Authority(tmp_path / "ca")
    tls = Registry(tmp_path / "tls", tls=authority.issue("registry"))
    try:
        artifact = small(layout, str(REFERENCE))
        connected.configure(tls.host, insecure="true")
        with connected.client() as client:
            transfer.push(layout, client, REFERENCE, artifact.digest)
        connected.configure(NOBODY, f"{tls.host} insecure = true")
        assert pull(connected, other) == artifact.digest
        connected.configure(NOBODY, tls.host)
        connected.said.clear()
        with pytest.raises(RegistryUnreachable):
            pull(connected, Layout(tmp_path / "third"))
        assert "not trusted" in connected.said[0]
    finally:
        tls.close()


def test_from_the_command_line(registry: Registry, tmp_path: Path, layout: Layout) -> None:
    push(registry.host, "cli/t/x", layout)
    home = tmp_path / "home"
    conf = home / ".config/containers/registries.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text(
        f'[[registry]]\nlocation = "{NAME}"\n[[registry.mirror]]\nlocation = "{registry.host}/cli"\n'
        '[[registry]]\nlocation = "blocked.example"\nblocked = true\n'
    )
    ovm = Ovm(tmp_path / "root", home)
    done = ovm("pull", str(REFERENCE), "--json")
    assert done.code in (0, 3), done.err  # its kernel is none, which is looked at when it is run
    assert "mirror" not in done.err, "with --json, stderr is for one JSON object"
    done = ovm("pull", str(REFERENCE))
    assert f"served by the mirror {registry.host}" in done.err
    blocked = ovm("pull", "blocked.example/x:1", "--json")
    assert (blocked.code, blocked.error["code"]) == (7, "registry-denied")
    conf.write_text("nonsense")
    assert ovm("pull", str(REFERENCE), "--json").code == 3


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed: run 'make setup'")
def test_skopeo_finds_it_in_the_same_place(
    registry: Registry, connected: Connected, layout: Layout, other: Layout
) -> None:
    """The witness: the same file leads both to the same mirror, under the same name there."""
    digest = push(registry.host, "witness/deep/t/x", layout)
    connected.configure(
        "elsewhere.example/team", f"{NOBODY} insecure = true", f"{registry.host}/witness/deep insecure = true"
    )
    assert pull(connected, other) == digest
    own = connected.home / ".config/containers/registries.conf"
    own.parent.mkdir(parents=True)
    own.write_text(connected.path.read_text())
    done = subprocess.run(
        ["skopeo", "inspect", "--raw", "--no-creds", f"docker://{REFERENCE}"],
        env={"PATH": os.environ["PATH"], "HOME": str(connected.home)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert of_bytes(done.stdout) == digest
