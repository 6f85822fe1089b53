"""Platforms, and what an index has for one."""

from __future__ import annotations

from typing import Any

import pytest

from ovms.errors import InputError, Unsupported
from ovms.oci.descriptor import Descriptor, ImageIndex
from ovms.oci.platform import HOST, Platform, check_guest, check_runnable, fitting
from ovms.spec import mediatypes
from ovms.spec.digest import of_bytes

AMD64 = {"os": "linux", "architecture": "amd64"}
ARM64 = {"os": "linux", "architecture": "arm64"}


def descriptor(name: str, platform: Any = None, **changes: Any) -> Descriptor:
    fields = {"media_type": mediatypes.OCI_MANIFEST, "artifact_type": mediatypes.MANIFEST, **changes}
    return Descriptor(digest=of_bytes(name.encode()), size=1, platform=platform, **fields)


def choose(platform: str | None, *manifests: Descriptor) -> Descriptor:
    wanted = None if platform is None else Platform.parse(platform)
    return fitting(ImageIndex(b"", manifests, {}), wanted, "the index")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("linux/amd64", HOST), ("linux/x86_64", HOST), ("linux/aarch64", Platform("linux", "arm64")),
     ("linux/arm/v7", Platform("linux", "arm", "v7")), ("windows/amd64", Platform("windows", "amd64"))],
)  # fmt: skip
def test_reading(text: str, expected: Platform) -> None:
    assert Platform.parse(text) == expected
    assert Platform.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "linux", "amd64", "linux/", "/amd64", "linux/amd64/", "Linux/amd64", "a/b/c/d",
                                  "linux/amd64\n", "linux/" + "a" * 33])  # fmt: skip
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(InputError, match="no platform"):
        Platform.parse(text)


@pytest.mark.spec("OCI-16", "OCI-17", "OCI-26")
def test_an_index_is_chosen_from() -> None:
    amd, arm = descriptor("amd", AMD64), descriptor("arm", ARM64)
    v6, v7 = (descriptor(v, {"os": "linux", "architecture": "arm", "variant": v}) for v in ("v6", "v7"))
    anywhere, container = descriptor("anywhere"), descriptor("container", AMD64, artifact_type=None)
    every = (container, anywhere, arm, v6, v7, amd)
    assert choose(None, *every) == choose("linux/amd64", *every) == amd
    assert choose("linux/arm64", *every) == choose("linux/arm64/v8", *every) == arm
    assert choose("linux/arm", *every) == choose("linux/arm/v6", *every) == v6
    assert choose("linux/arm/v7", *every) == v7
    assert choose("linux/riscv64", *every) == anywhere
    assert choose(None, arm, container) == container
    level = descriptor("level", {**AMD64, "variant": "v3"})
    assert choose(None, level) == level


def test_the_error_says_what_there_is() -> None:
    odd = [descriptor("a", {"os": 1}), descriptor("b", {}), descriptor("c", {"os": "\n", "architecture": "x"})]
    with pytest.raises(Unsupported, match=r"nothing for linux/arm64/v9, but for linux/amd64, linux/arm64$") as caught:
        choose("linux/arm64/v9", descriptor("amd", AMD64), descriptor("arm", ARM64), *odd)
    assert caught.value.context["platforms"] == ["linux/amd64", "linux/arm64"]
    with pytest.raises(Unsupported, match="nothing for linux/amd64, but for linux/arm64") as caught:
        choose(None, descriptor("arm", ARM64))
    assert "--platform" in (caught.value.hint or "")
    other = [
        descriptor("x", AMD64, artifact_type="application/x"),
        descriptor("y", AMD64, media_type=mediatypes.OCI_INDEX),
    ]
    with pytest.raises(Unsupported, match=r"nothing for linux/amd64$") as caught:
        choose(None, *other)
    assert "container images" in (caught.value.hint or "")


def test_the_guest_has_to_be_of_it() -> None:
    check_guest(None, "riscv64", "web")
    check_guest(Platform.parse("linux/arm64/v8"), "aarch64", "web")
    check_guest(HOST, "x86_64", "web")
    with pytest.raises(Unsupported, match="web is for linux/amd64, not for linux/arm64"):
        check_guest(Platform.parse("linux/arm64"), "x86_64", "web")
    with pytest.raises(Unsupported):
        check_guest(Platform.parse("freebsd/amd64"), "x86_64", "web")


@pytest.mark.spec("BIN-4")
def test_another_architecture_is_not_run() -> None:
    check_runnable(None)
    check_runnable(Platform.parse("linux/x86_64"))
    for text in ("linux/arm64", "freebsd/amd64"):
        with pytest.raises(Unsupported, match=f"a VM of {text} cannot be run here"):
            check_runnable(Platform.parse(text))
