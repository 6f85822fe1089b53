"""References and places on disk: what text means which."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms.errors import InputError, ReferenceInvalid
from ovms.oci.reference import Reference
from ovms.oci.transport import Kind, Place, name_in, new_name, parse
from ovms.spec.digest import of_bytes

DIGEST = of_bytes(b"x")
OCI, ARCHIVE = Kind.DIRECTORY, Kind.ARCHIVE


@pytest.mark.spec("REF-4")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:dir", Place(OCI, Path("dir"))),
        ("oci:/a/b c", Place(OCI, Path("/a/b c"))),
        ("oci:../x:1", Place(OCI, Path("../x"), "1")),
        ("oci:d:registry.example:5000/vms/web:1", Place(OCI, Path("d"), "registry.example:5000/vms/web:1")),
        ("oci:d:[::1]:5000/web:1", Place(OCI, Path("d"), "[::1]:5000/web:1")),
        (f"oci:d:web@{DIGEST}", Place(OCI, Path("d"), f"web@{DIGEST}")),
        (f"oci:d:@{DIGEST}", Place(OCI, Path("d"), digest=DIGEST)),
        ("oci:a@b", Place(OCI, Path("a@b"))),
        ("oci-archive:f.tar", Place(ARCHIVE, Path("f.tar"))),
        ("oci-archive:/f:v1", Place(ARCHIVE, Path("/f"), "v1")),
        # what would be a registry called oci, or an artifact of that name
        ("oci:5000/web", Place(OCI, Path("5000/web"))),
        ("oci:1", Place(OCI, Path("1"))),
        ("oci", Reference(None, "oci", "latest")),
        ("oci/web:1", Reference(None, "oci/web", "1")),
        ("ocix:1", Reference(None, "ocix", "1")),
        ("oci.example:5000/web:1", Reference("oci.example:5000", "web", "1")),
    ],
)
def test_what_text_means(text: str, expected: Reference | Place) -> None:
    assert parse(text) == expected
    if isinstance(expected, Place):
        assert str(expected) == text


@pytest.mark.parametrize(
    "text", ["oci:", "oci::1", "oci-archive:", "oci:d:", "oci:d:a b", "oci:d:\n", "oci:d:@1", "oci:d:" + "x" * 513,
             "oci:a\0b", "OCI:d/x", "docker-archive:f.tar:x"]
)  # fmt: skip
def test_what_is_neither(text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        parse(text)


def test_a_relative_path_counts_from_where_it_is_said() -> None:
    assert parse("oci:d:1").below(Path("/a")) == Place(OCI, Path("/a/d"), "1")  # type: ignore[union-attr]
    assert parse("oci:/d:1").below(Path("/a")) == parse("oci:/d:1")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tag", "name"),
    [("web:1", "web:1"), ("r.example/web:1", "r.example/web:1"), ("v1", None), ("1.0", None), (None, None),
     ("r.example/web", None), (f"web@{DIGEST}", None), ("oci:1", None), ("oci-archive:1", None), ("A:1", None)],
)  # fmt: skip
def test_which_tags_are_whole_names(tag: str | None, name: str | None) -> None:
    assert name_in(tag) == name


def test_new_names() -> None:
    assert str(new_name("web")) == "web:latest"
    for text, problem in (("oci:1", "place on disk"), (f"web@{DIGEST}", "no digest"), ("W", "no repository name")):
        with pytest.raises(InputError, match=problem):
            new_name(text)
