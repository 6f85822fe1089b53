"""References: what they mean, and that text → reference → text loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import ReferenceInvalid
from ovms.oci.reference import Reference
from ovms.spec.digest import Digest

D = Digest("sha256:" + "0123456789abcdef" * 4)


@pytest.mark.spec("REF-1", "REF-2", "REF-3")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web", Reference(None, "web", "latest")),
        ("web:1.0", Reference(None, "web", "1.0")),
        ("vms/web", Reference(None, "vms/web", "latest")),
        (f"web@{D}", Reference(None, "web", None, D)),
        (f"web:1@{D}", Reference(None, "web", "1", D)),
        ("localhost/web", Reference("localhost", "web", "latest")),
        ("localhost:5000/web", Reference("localhost:5000", "web", "latest")),
        ("registry.example/vms/web:1", Reference("registry.example", "vms/web", "1")),
        ("Registry.Example:443/web", Reference("Registry.Example:443", "web", "latest")),
        ("127.0.0.1:5000/a/b/c:x", Reference("127.0.0.1:5000", "a/b/c", "x")),
        ("[::1]:5000/web", Reference("[::1]:5000", "web", "latest")),
        ("host:5000/web", Reference("host:5000", "web", "latest")),
        ("a__b/c---d/e.f_g:T_1.-", Reference(None, "a__b/c---d/e.f_g", "T_1.-")),
        (f"r.example/w@{D}", Reference("r.example", "w", None, D)),
    ],
)
def test_what_a_name_means(text: str, expected: Reference) -> None:
    found = Reference.parse(text)
    assert found == expected
    assert found.target == (found.digest or found.tag)
    assert Reference.parse(str(found)) == found


@pytest.mark.spec("REF-1")
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Web",
        "web:",
        "web:a:b",
        "web:-x",
        "web:" + "x" * 129,
        "web@",
        "web@sha256:abc",
        f"web@{D}@{D}",
        f"@{D}",
        f"web@{D.upper()}",
        "web@sha512:" + "0" * 128,
        "/web",
        "web/",
        "a//b",
        "a/../b",
        "../web",
        "./web",
        ".hidden",
        "a..b",
        "a___b",
        "-web",
        "web-",
        "host:5000/",
        "host:/web",
        "host:65536/web",
        "host:0/web",
        "host:123456/web",
        "host:port/web",
        "-host.example/web",
        "host..example/web",
        "user@host.example/web",
        "http://host.example/web",
        "[::1/web",
        "[zz]:1/web",
        "hö.example/web",
        "web\n",
        "web\0",
        "web:1\n",
        "host.example/web?x",
        "host.example/web#x",
        "w%2e%2e",
        "\u0661web",
        "a" * 513,
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ReferenceInvalid) as info:
        Reference.parse(text)
    assert len(info.value.message) < 1000
    assert info.value.message.isprintable()
    assert info.value.hint


def test_pinned_to_a_digest() -> None:
    pinned = Reference.parse("r.example/web:1").with_digest(D)
    assert str(pinned) == f"r.example/web:1@{D}"
    assert pinned.name == "r.example/web"
    assert Reference.parse("web").name == "web"


HOSTS = st.from_regex(r"\A[a-z][a-z0-9-]{0,8}[a-z0-9]\.[a-z]{2,4}(:[1-9][0-9]{0,3})?\Z") | st.sampled_from(
    ["localhost", "localhost:5000", "[::1]:5000", "10.0.0.1:1"]
)
PARTS = st.from_regex(r"\A[a-z0-9]+([._-][a-z0-9]+)?\Z").filter(lambda part: len(part) < 20)
TAGS = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,30}\Z")


@given(st.none() | HOSTS, st.lists(PARTS, min_size=1, max_size=3), st.none() | TAGS, st.none() | st.just(D))
def test_round_trip(host: str | None, parts: list[str], tag: str | None, digest: Digest | None) -> None:
    if host is None and len(parts) > 1 and ("." in parts[0] or parts[0] == "localhost"):
        return  # reads as a host, which is the rule
    reference = Reference(host, "/".join(parts), tag or (None if digest else "latest"), digest)
    assert Reference.parse(str(reference)) == reference


@given(st.text(max_size=40) | st.text(alphabet="ab.:/@-_[]A0", max_size=40))
def test_any_text(text: str) -> None:
    try:
        found = Reference.parse(text)
    except ReferenceInvalid:
        return
    assert Reference.parse(str(found)) == found
    assert ".." not in found.repository.split("/")
    assert not set(str(found)) & set("\0\n \\%?#")
