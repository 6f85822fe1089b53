"""``registries.conf`` and ``certs.d``: where a name leads, and what malformed files say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms.errors import InputError, OvmsError, RegistryDenied, Unsupported
from ovms.oci.registries import Certificates, Registries, certificates

HOST = "registry.example"


def parse(tmp_path: Path, text: str) -> Registries:
    path = tmp_path / "registries.conf"
    path.write_text(text)
    return Registries([path])


def places(registries: Registries, name: str, *, pull: bool = True) -> list[str]:
    """``host/repository`` of each place, with ``!`` where it is insecure."""
    host, _, repository = name.partition("/")
    return [
        f"{e.host}/{e.rewrite(repository)}{'!' if e.insecure else ''}"
        for e in registries.endpoints(host, repository, pull=pull)
    ]


def test_without_a_table_a_name_is_itself(tmp_path: Path) -> None:
    for registries in (Registries(()), Registries([tmp_path / "missing.conf"]), parse(tmp_path, "")):
        assert places(registries, f"{HOST}:5000/a/b") == [f"{HOST}:5000/a/b"]


MIRRORS = """
[[registry]]
location = "registry.example"
[[registry.mirror]]
location = "one.example:5000/cache"
insecure = true
[[registry.mirror]]
location = "two.example"
"""


def test_mirrors_come_first_and_for_a_pull_only(tmp_path: Path) -> None:
    registries = parse(tmp_path, MIRRORS)
    assert places(registries, f"{HOST}/a/b") == ["one.example:5000/cache/a/b!", "two.example/a/b", f"{HOST}/a/b"]
    assert [e.mirror for e in registries.endpoints(HOST, "a", pull=True)] == [True, True, False]
    assert places(registries, f"{HOST}/a/b", pull=False) == [f"{HOST}/a/b"]
    assert places(registries, f"{HOST}:5000/a") == [f"{HOST}:5000/a"], "another port is another registry"


@pytest.mark.parametrize(
    ("prefix", "location", "name", "expected"),
    [
        ("registry.example", "other.example/team", "registry.example/a/b", "other.example/team/a/b"),
        ("registry.example/team", "other.example", "registry.example/team/a", "other.example/a"),
        ("registry.example/team", "other.example/x/y", "registry.example/team/a", "other.example/x/y/a"),
        ("registry.example/team", "other.example/team", "registry.example/team/a", "other.example/team/a"),
        ("registry.example/team/a", "other.example/b", "registry.example/team/a", "other.example/b"),
        ("registry.example/team", "other.example", "registry.example/teams/a", "registry.example/teams/a"),
        ("*.example.com", "other.example", "x.example.com/a", "other.example/a"),
        ("*.example.com", "other.example", "x.y.example.com:5000/a", "other.example:5000/a"),
        ("*.example.com", "other.example", "example.com/a", "example.com/a"),
        ("*.example.com", "other.example", "badexample.com/a", "badexample.com/a"),
        ("Registry.Example", "other.example", "registry.example/a", "other.example/a"),
    ],
)
def test_what_a_location_makes_of_a_name(tmp_path: Path, prefix: str, location: str, name: str, expected: str) -> None:
    registries = parse(tmp_path, f'[[registry]]\nprefix = "{prefix}"\nlocation = "{location}"\n')
    assert places(registries, name) == places(registries, name, pull=False) == [expected]


def test_the_longest_prefix_counts_alone(tmp_path: Path) -> None:
    registries = parse(
        tmp_path,
        """
        [[registry]]
        location = "a.example.com"
        insecure = true
        [[registry]]
        prefix = "*.example.com"
        location = "wild.example"
        [[registry]]
        prefix = "a.example.com/team"
        location = "team.example"
        """,
    )
    assert places(registries, "a.example.com/x") == ["a.example.com/x!"]
    assert places(registries, "a.example.com/team/x") == ["team.example/x"]
    assert places(registries, "b.example.com/x") == ["wild.example/x"]


def test_a_blocked_registry(tmp_path: Path) -> None:
    registries = parse(tmp_path, '[[registry]]\nlocation = "registry.example"\nblocked = true\n')
    for pull in (True, False):
        with pytest.raises(RegistryDenied, match=r"blocked: .*registries\.conf"):
            registries.endpoints("REGISTRY.example", "a", pull=pull)
    with pytest.raises(RegistryDenied):
        registries.host(HOST)
    part = parse(tmp_path, '[[registry]]\nlocation = "registry.example/bad"\nblocked = true\n')
    assert part.host(HOST).host == HOST
    assert places(part, f"{HOST}/good") == [f"{HOST}/good"]


def test_a_login_is_for_the_registry_itself(tmp_path: Path) -> None:
    registries = parse(tmp_path, MIRRORS.replace("registry.example", "registry.example", 1))
    assert registries.host(HOST).host == HOST
    assert not registries.host(HOST).insecure
    moved = parse(tmp_path, '[[registry]]\nprefix = "registry.example"\nlocation = "other.example"\ninsecure = true\n')
    assert (moved.host(HOST).host, moved.host(HOST).insecure) == (HOST, True)


@pytest.mark.parametrize(
    ("text", "by_tag", "by_digest"),
    [
        ('pull-from-mirror = "all"', True, True),
        ('pull-from-mirror = "digest-only"', False, True),
        ('pull-from-mirror = "tag-only"', True, False),
        ("", True, True),
    ],
)
def test_mirrors_for_tags_or_digests(tmp_path: Path, text: str, by_tag: bool, by_digest: bool) -> None:
    registries = parse(
        tmp_path, f'[[registry]]\nlocation = "{HOST}"\n[[registry.mirror]]\nlocation = "m.example"\n{text}\n'
    )
    mirror, own = registries.endpoints(HOST, "a", pull=True)
    assert (mirror.serves(by_digest=False), mirror.serves(by_digest=True)) == (by_tag, by_digest)
    assert own.serves(by_digest=False)
    assert own.serves(by_digest=True)


def test_mirror_by_digest_only_is_for_all_mirrors(tmp_path: Path) -> None:
    text = (
        f'[[registry]]\nlocation = "{HOST}"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = "m.example"'
    )
    mirror, _ = parse(tmp_path, text).endpoints(HOST, "a", pull=True)
    assert not mirror.serves(by_digest=False)


def test_a_prefix_with_a_tag_is_not_passed_over(tmp_path: Path) -> None:
    registries = parse(tmp_path, f'[[registry]]\nprefix = "{HOST}/a:1"\nlocation = "{HOST}/a"\nblocked = true\n')
    with pytest.raises(Unsupported):
        registries.endpoints(HOST, "a", pull=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "not TOML"),
        ("x = " + "[" * 3000, "nested|TOML"),
        ("[[registry]]\ninsecure = true", "location"),
        ('[[registry]]\nlocation = "https://registry.example"', "without a scheme"),
        ('[[registry]]\nlocation = "a.example"\ninsecure = "yes"', "insecure"),
        ('[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\ninsecure = true', "location"),
        ('[[registry]]\nlocation = "a.example"\n[[registry.mirror]]\nlocation = "b"\npull-from-mirror = "x"', "one of"),
        ('[[registry]]\nlocation = "a.example"\npull-from-mirror = "all"', "belongs to a mirror"),
        ('[[registry]]\nlocation = "a"\n[[registry]]\nprefix = "b"\nlocation = "a"\ninsecure = true', "differs"),
        ('[registries.block]\nregistries = ["a.example"]', "version 1"),
        ("registry = 5", "registry"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"registries\.conf.*(?:{said})"):
        parse(tmp_path, text)


def test_a_location_that_leaves_no_name(tmp_path: Path) -> None:
    registries = parse(tmp_path, f'[[registry]]\nprefix = "{HOST}/a"\nlocation = "other.example"\n')
    with pytest.raises(InputError, match="names no repository"):
        registries.endpoints(HOST, "a", pull=True)


def test_which_files_are_read(tmp_path: Path) -> None:
    home, system = tmp_path / "home", tmp_path / "etc/containers"
    user = home / ".config/containers"
    for directory in (user / "registries.conf.d", system / "registries.conf.d"):
        directory.mkdir(parents=True)

    def write(path: Path, target: str) -> None:
        path.write_text(f'[[registry]]\nprefix = "{HOST}"\nlocation = "{target}"\n')

    def found(**environ: str) -> str:
        read = Registries.from_environment({"HOME": str(home), **environ}, system_root=tmp_path)
        return places(read, f"{HOST}/a")[0]

    assert found() == f"{HOST}/a"
    write(system / "registries.conf", "system.example")
    assert found() == "system.example/a"
    write(system / "registries.conf.d/10.conf", "dropped.example")
    (system / "registries.conf.d/20.txt").write_text("no configuration")
    assert found() == "dropped.example/a"
    write(user / "registries.conf.d/00.conf", "mine.example")
    assert found() == "mine.example/a"
    (user / "registries.conf").write_text("")
    (user / "registries.conf.d/00.conf").unlink()
    assert found() == f"{HOST}/a", "the user's own file stands for the system's"
    write(tmp_path / "named.conf", "named.example")
    assert found(CONTAINERS_REGISTRIES_CONF=str(tmp_path / "named.conf")) == "named.example/a"
    assert found(CONTAINERS_REGISTRIES_CONF="/dev/null") == f"{HOST}/a"


def test_aliases_and_search_lists_are_read_and_do_nothing(tmp_path: Path) -> None:
    registries = parse(tmp_path, 'unqualified-search-registries = ["a.example"]\n[aliases]\nweb = "a.example/web"\n')
    assert registries.unqualified_search_registries == ("a.example",)
    assert registries.aliases == {"web": "a.example/web"}


def test_certificates(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path / "home")}
    assert certificates(HOST, environ, system_root=tmp_path) == Certificates()
    system = tmp_path / "etc/docker/certs.d" / f"{HOST}:5000"
    system.mkdir(parents=True)
    (system / "ca.crt").touch()
    assert certificates(f"{HOST}:5000", environ, system_root=tmp_path) == Certificates((system / "ca.crt",))
    assert certificates(HOST, environ, system_root=tmp_path) == Certificates(), "another port is another registry"
    user = tmp_path / "home/.config/containers/certs.d" / f"{HOST}:5000"
    user.mkdir(parents=True)
    for name in ("b.crt", "a.crt", "client.cert", "client.key", "README"):
        (user / name).touch()
    assert certificates(f"{HOST}:5000", environ, system_root=tmp_path) == Certificates(
        (user / "a.crt", user / "b.crt"), user / "client.cert", user / "client.key"
    )
    (user / "client.key").unlink()
    with pytest.raises(InputError, match=r"half of a pair: there is no client\.key"):
        certificates(f"{HOST}:5000", environ, system_root=tmp_path)
    for name in ("client.key", "two.cert", "two.key"):
        (user / name).touch()
    with pytest.raises(Unsupported, match="2 client certificates"):
        certificates(f"{HOST}:5000", environ, system_root=tmp_path)


@pytest.mark.spec("SEC-2")
@pytest.mark.parametrize("host", ["..", "../x", "a/b", "", "a\0b", ".", "a..b"])
def test_a_host_never_becomes_another_path(host: str) -> None:
    with pytest.raises(InputError):
        certificates(host, {})


@given(st.text(max_size=60) | st.sampled_from(["[[registry]]\nlocation = ", "[aliases]\n"]).flatmap(
    lambda head: st.text(max_size=30).map(lambda text: head + repr(text))))  # fmt: skip
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.conf"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        Registries([path]).endpoints(HOST, "a", pull=True)
    except OvmsError:
        pass
