"""What a user calls an artifact, and what is found."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from support.artifacts import write_inputs, write_manifest

from ovms.artifact import resolve
from ovms.artifact.build import Builder
from ovms.artifact.model import Artifact
from ovms.errors import InputError, ReferenceInvalid, ReferenceNotFound, RegistryUnreachable
from ovms.oci.layout import Layout


def no_registry(host: str) -> NoReturn:
    pytest.fail(f"the registry {host} is asked")


def down(host: str) -> NoReturn:
    raise RegistryUnreachable(f"cannot reach {host}")


@pytest.fixture
def built(layout: Layout, tmp_path: Path) -> Artifact:
    write_inputs(tmp_path)
    return Builder(layout, no_registry).build(write_manifest(tmp_path), name="web:1")


def other(layout: Layout, tmp_path: Path, name: str) -> Artifact:
    return Builder(layout, no_registry).build(write_manifest(tmp_path, version="2"), name=name)


def test_by_name_and_by_digest(layout: Layout, built: Artifact) -> None:
    digits = built.digest[7:]
    for text in ("web:1", built.digest, digits, digits[:6], digits[:12], built.digest[:20]):
        found = resolve.find(layout, text)
        assert found == resolve.Found("web:1", built)
        known = resolve.lookup(layout, text)
        assert known == ("web:1" if text == "web:1" else None, built.digest)
    for text in (f"web:1@{built.digest}", f"registry.example/elsewhere@{built.digest}"):
        assert resolve.find(layout, text).artifact == built


def test_without_a_name_it_is_known_by_its_digest(layout: Layout, built: Artifact) -> None:
    layout.remove_name("web:1")
    assert resolve.find(layout, built.digest) == resolve.Found(built.digest, built)
    with pytest.raises(ReferenceNotFound):
        resolve.find(layout, built.digest[7:19])


@pytest.mark.parametrize(
    "text", ["web", "web:2", "other", "sha256:" + "0" * 64, "0" * 64, "000000", "registry.example/web:1"]
)
def test_not_found(layout: Layout, built: Artifact, text: str) -> None:
    with pytest.raises(ReferenceNotFound) as info:
        resolve.find(layout, text)
    assert "ovm ls" in (info.value.hint or "")
    assert resolve.lookup(layout, text) is None


@pytest.mark.parametrize("text", ["", "Web", "a b", "web@sha256:12"])
def test_no_reference(layout: Layout, text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        resolve.find(layout, text)
    with pytest.raises(ReferenceInvalid):
        resolve.lookup(layout, text)


def test_five_digits_are_too_few(layout: Layout, built: Artifact) -> None:
    with pytest.raises(ReferenceNotFound):
        resolve.find(layout, built.digest[7:12])


def test_digits_of_several(layout: Layout, built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = layout.entries()
    twin = f"{built.digest[:-1]}{'0' if built.digest[-1] != '0' else '1'}"
    descriptor = type(entries[0].descriptor)("x", twin, 1)  # type: ignore[arg-type]
    layout.set_name("twin", descriptor)
    with pytest.raises(InputError, match="fits 2 artifacts"):
        resolve.find(layout, built.digest[7:19])
    layout.set_name("web:again", built.image.descriptor())
    layout.remove_name("twin")
    assert resolve.find(layout, built.digest[7:19]).artifact == built


def test_a_name_comes_before_the_digits_of_another(layout: Layout, built: Artifact, tmp_path: Path) -> None:
    """``ovm rmi decade`` must not remove an artifact whose digest begins so."""
    digits = built.digest[7:15]
    named = other(layout, tmp_path, digits)
    assert resolve.find(layout, digits).artifact == named
    assert resolve.lookup(layout, digits) == (f"{digits}:latest", named.digest)
    assert resolve.find(layout, built.digest[7:16]).artifact == built


def test_policies(layout: Layout, built: Artifact) -> None:
    policies: list[resolve.PullPolicy] = ["missing", "never"]
    for policy in policies:
        assert resolve.resolve(layout, no_registry, "web:1", policy=policy).artifact == built
        with pytest.raises(ReferenceNotFound):
            resolve.resolve(layout, no_registry, "gone:1", policy=policy)
    with pytest.raises(ReferenceNotFound):
        resolve.resolve(layout, no_registry, "registry.example/gone:1", policy="never")
    with pytest.raises(RegistryUnreachable):
        resolve.resolve(layout, down, "registry.example/gone:1")
    layout.set_name("registry.example/web:1", built.image.descriptor())
    assert resolve.resolve(layout, no_registry, "registry.example/web:1").artifact == built
    with pytest.raises(RegistryUnreachable):
        resolve.resolve(layout, down, "registry.example/web:1", policy="always")


@pytest.mark.spec("REF-2")
def test_a_local_name_has_no_registry(layout: Layout, built: Artifact) -> None:
    with pytest.raises(InputError, match="names no registry"):
        resolve.pull(layout, no_registry, "web:1")
    with pytest.raises(InputError, match="names no registry to push to") as info:
        resolve.push(layout, no_registry, "web:1")
    assert "ovm push web:1 registry.example/web:1" in (info.value.hint or "")
    with pytest.raises(InputError, match="names no registry"):
        resolve.resolve(layout, no_registry, "web:1", policy="always")
