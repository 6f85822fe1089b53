"""Directories out of a guest and into one: real tar in a guest that is this host, and a guest that sends what it likes."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.played import Played

from ovms import fsutil
from ovms.errors import DiskFull, FileProblem, GuestError, NotFound, Unsupported
from ovms.runtime import guest, guesttrees, trees
from ovms.runtime.agent import Agent


class Host:
    """An agent whose guest is this host: programs are run, files opened, as it is told. *changes* are what it does otherwise."""

    def __init__(self) -> None:
        self.files: dict[int, Any] = {}
        self.changes: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self.env = dict(os.environ)

    def __call__(self, name: str, arguments: dict[str, Any]) -> Any:
        return (self.changes.get(name) or getattr(self, name.replace("-", "_")))(arguments)

    def guest_exec(self, arguments: dict[str, Any]) -> Any:
        self.done = subprocess.run(
            [arguments["path"], *arguments["arg"]], capture_output=True, timeout=60, env=self.env, check=False
        )
        return {"pid": 1}

    def guest_exec_status(self, _arguments: dict[str, Any]) -> Any:
        out, err = (base64.b64encode(data).decode() for data in (self.done.stdout, self.done.stderr))
        return {"exited": True, "exitcode": self.done.returncode, "out-data": out, "err-data": err}

    def guest_file_open(self, arguments: dict[str, Any]) -> Any:
        self.files[7] = Path(arguments["path"]).open(arguments["mode"] + "b")  # noqa: SIM115 - guest_file_close does
        return 7

    def guest_file_close(self, arguments: dict[str, Any]) -> Any:
        self.files.pop(arguments["handle"]).close()
        return {}

    def guest_file_read(self, arguments: dict[str, Any]) -> Any:
        data = self.files[arguments["handle"]].read(arguments["count"])
        return {"buf-b64": base64.b64encode(data).decode(), "eof": len(data) < arguments["count"]}

    def guest_file_write(self, arguments: dict[str, Any]) -> Any:
        data = base64.b64decode(arguments["buf-b64"])
        return {"count": self.files[arguments["handle"]].write(data)}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[Host, Played]]:
    (tmp_path / "vm").mkdir()
    host = Host()
    played = Played(tmp_path / "vm", host)
    yield host, played
    played.close()
    assert host.files == {}


def tree(path: Path) -> Path:
    """A directory with some of everything."""
    (path / "empty").mkdir(parents=True)
    (path / "deep" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (path / "deep" / ("d" * 120) / ("e" * 120) / "x").write_text("deep")
    (path / "tool").write_bytes(os.urandom(1_500_000))
    (path / "tool").chmod(0o751)
    (path / "secret").write_text("s")
    (path / "secret").chmod(0o400)
    (path / "link").symlink_to("tool")
    (path / "deep" / "up").symlink_to("../tool")
    os.link(path / "tool", path / "again")
    (path / os.fsdecode(b"\xff\xfe")).write_text("no UTF-8")
    (path / "-rf").write_text("no option")
    (path / ".hidden").write_text("h")
    return path


def look(path: Path) -> dict[str, Any]:
    """What is in a directory: a mode and content for each, or where a link leads."""
    found: dict[str, Any] = {}
    for directory, folders, files in os.walk(path):
        for name in (*folders, *files):
            one = Path(directory, name)
            info = one.lstat()
            what = str(one.readlink()) if one.is_symlink() else one.read_bytes() if one.is_file() else None
            found[str(one.relative_to(path))] = what, 0 if one.is_symlink() else info.st_mode & 0o777
    return found


@pytest.mark.parametrize("into", [True, False])
def test_a_directory_goes_in_and_comes_out_again(tmp_path: Path, host: tuple[Host, Played], into: bool) -> None:
    source = tree(tmp_path / "source")
    os.mkfifo(source / "pipe")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    if into:
        inside.mkdir()
        outside.mkdir()
    with Agent(host[1].files) as agent:
        at, copied = guesttrees.put(agent, source, str(inside), name="site")
        assert (copied.left_out, copied.left_out_count) == (("pipe",), 1)
        there = inside / "site" if into else inside
        assert at == str(there)
        (source / "pipe").unlink()
        assert look(there) == look(source)
        path, copied = guesttrees.get(agent, at, outside, name="site")
    assert path == (outside / "site" if into else outside)
    assert look(path) == look(source)
    assert (path / "tool").stat().st_ino == (path / "again").stat().st_ino
    assert (copied.files, copied.left_out_count) == (7, 0)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["inside", "outside", "source", "vm"]
    assert not list(Path("/var/tmp").glob("ovm-cp.*"))


def test_what_is_in_a_directory_goes_into_one_that_is_there(tmp_path: Path, host: tuple[Host, Played]) -> None:
    source = tmp_path / "source"
    (source / "both").mkdir(parents=True)
    (source / "both" / "new").write_text("new")
    (source / "old").write_text("new")
    (source / "planted").write_text("new")
    for name in ("inside", "outside"):
        (tmp_path / name / "both").mkdir(parents=True)
        (tmp_path / name / "both" / "kept").write_text("kept")
        (tmp_path / name / "old").write_text("old")
        (tmp_path / name).chmod(0o711)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("elsewhere")
    (tmp_path / "outside" / "planted").symlink_to(elsewhere)
    with Agent(host[1].files) as agent:
        assert guesttrees.put(agent, source, f"{tmp_path}/inside", name=None)[0] == f"{tmp_path}/inside"
        guesttrees.get(agent, str(source), tmp_path / "outside", name=None)
    for name in ("inside", "outside"):
        there = tmp_path / name
        assert {path: what for path, (what, _) in look(there).items()} == {
            "both": None, "both/kept": b"kept", "both/new": b"new", "old": b"new", "planted": b"new",
        }  # fmt: skip
        assert there.stat().st_mode & 0o777 == 0o711
    assert elsewhere.read_text() == "elsewhere"


def test_a_directory_and_a_file_do_not_replace_each_other(tmp_path: Path, host: tuple[Host, Played]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "a").mkdir(parents=True)
    (source / "b").write_text("new")
    (target / "b").mkdir(parents=True)
    (target / "a").write_text("old")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = look(target)
    with Agent(host[1].files) as agent:
        with pytest.raises(Unsupported, match="not replaced"):
            guesttrees.get(agent, str(source), target, name=None)
        assert look(target) == before
        # a link to a directory is no directory: nothing goes through it
        (target / "a").unlink()
        (target / "a").symlink_to(elsewhere)
        (target / "b").rmdir()
        with pytest.raises(Unsupported, match="not replaced"):
            guesttrees.get(agent, str(source), target, name=None)
        for place, kind in ((f"{target}/a/x/y", NotFound), (str(tmp_path / "source" / "b"), Unsupported)):
            with pytest.raises(kind):
                guesttrees.put(agent, source, place, name="site")
            with pytest.raises(kind):
                guesttrees.get(agent, str(source), Path(place), name="site")
    assert list(elsewhere.iterdir()) == []
    assert sorted(one.name for one in target.iterdir()) == ["a"]


def test_what_cannot_be_read_is_told_and_leaves_nothing(tmp_path: Path, host: tuple[Host, Played]) -> None:
    source = tmp_path / "source"
    deep = source
    for _ in range(trees.DEPTH_MAX + 2):
        deep /= "d"
    deep.mkdir(parents=True)
    with Agent(host[1].files) as agent, pytest.raises(FileProblem, match="directories above"):
        guesttrees.put(agent, source, str(tmp_path / "inside"), name="site")
    with Agent(host[1].files) as agent, pytest.raises(GuestError, match="directories in one another"):
        guesttrees.get(agent, str(source), tmp_path / "outside", name="site")
    with Agent(host[1].files) as agent, pytest.raises(GuestError, match="does not pack"):
        guesttrees.get(agent, f"{tmp_path}/nowhere", tmp_path / "outside", name="site")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["source", "vm"]


def test_a_guest_without_tar(tmp_path: Path, host: tuple[Host, Played]) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sh", "mktemp", "rm", "mkdir", "mv"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    host[0].env["PATH"] = str(tmp_path / "bin")
    (tmp_path / "source").mkdir()
    with Agent(host[1].files) as agent:
        with pytest.raises(Unsupported, match="no tar"):
            guesttrees.put(agent, tmp_path / "source", str(tmp_path / "inside"), name="site")
        with pytest.raises(Unsupported, match="no tar"):
            guesttrees.get(agent, str(tmp_path / "source"), tmp_path / "outside", name="site")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bin", "source", "vm"]
    assert not list(Path("/var/tmp").glob("ovm-cp.*"))


@pytest.mark.parametrize("said", [b"", b"var/tmp/x", b"/" + b"x" * 200, b"\xff", b"changed\n"])
def test_a_guest_that_does_not_tell_where_its_archive_is(
    tmp_path: Path, host: tuple[Host, Played], said: bytes
) -> None:
    host[0].changes["guest-exec"] = lambda _: {"pid": 1}
    host[0].done = subprocess.CompletedProcess([], 0, said, b"")
    with Agent(host[1].files) as agent, pytest.raises(GuestError, match="does not pack"):
        guesttrees.get(agent, "/x", tmp_path / "outside", name="x")
    assert "guest-file-open" not in host[1].names()


def test_a_guest_that_sends_without_end(
    tmp_path: Path, host: tuple[Host, Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def space(path: Path, size: int, what: str) -> None:
        looks.append(size)
        if len(looks) == 2:
            raise DiskFull("full")

    monkeypatch.setattr(guest, "BLOCK", 1 << 16)
    monkeypatch.setattr(fsutil, "require_space", space)
    block = base64.b64encode(bytes(1 << 16)).decode()
    host[0].changes["guest-file-read"] = lambda _: {"buf-b64": block, "eof": False}
    (tmp_path / "source").mkdir()
    with Agent(host[1].files) as agent, pytest.raises(DiskFull):
        guesttrees.get(agent, str(tmp_path / "source"), tmp_path / "outside", name="x")
    assert host[1].names().count("guest-file-read") == 16
    assert sorted(one.name for one in tmp_path.iterdir()) == ["source", "vm"]


# --- archives of a guest that means no good --------------------------------------------------------------------------


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    info.size = len(data)
    return info, data


def link(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.SYMTYPE, linkname=to)


def hard(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=to)


def folder(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, mode=mode)


def unpack(directory: Path, *members: tuple[tarfile.TarInfo, bytes], tail: bytes = b"") -> trees.Copied:
    directory.mkdir()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    path = directory.with_name("archive")
    path.write_bytes(data.getvalue() + tail)
    with path.open("rb") as file:
        return trees.unpack(file.fileno(), directory)


@pytest.mark.spec("SEC-2", "SEC-6")
@pytest.mark.parametrize(
    "members",
    [
        [member("../out", b"x")],
        [member("/etc/out", b"x")],
        [member("a/../../out", b"x")],
        [folder("..", 0o777)],
        [link("a", "b"), member("a/x", b"x")],
        [folder("d"), link("a", "d"), member("a/x", b"x")],
        [folder("d"), link("a", "d"), folder("a/x")],
        [folder("d"), link("a", "d"), folder("a")],
        [link("a", "d"), member("a", b"x")],
        [member("a", b"x"), member("a/b", b"x")],
        [member("a", b"x"), member("a", b"y")],
        [hard("a", "../../outside")],
        [hard("a", "/etc/passwd")],
        [hard("a", "nothing")],
        [hard("a", ".")],
        [folder("d"), link("l", "d"), member("d/x", b"x"), hard("a", "l/x")],
        [member("x" * 300, b"")],
        [member("/".join("d" * 200), b"")],
    ],
    ids=lambda members: "-".join(f"{info.name[:12]}" for info, _ in members).replace("/", "|"),
)
def test_what_leads_elsewhere_is_an_error(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    (tmp_path / "outside").write_text("outside")
    with pytest.raises(GuestError):
        unpack(tmp_path / "made", *members)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "made", "outside"]
    assert (tmp_path / "outside").read_text() == "outside"


@pytest.mark.spec("SEC-2")
def test_links_that_lead_out_and_devices_are_left_out(tmp_path: Path) -> None:
    out = [
        link("d/a", "/etc/passwd"), link("d/b", "../../x"), link("c", ".."), link("d/e", "../d/../../x"), link("f", "l/../.."),
        link("g", ""), member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), member("disk", type=tarfile.BLKTYPE),
        member("pipe", type=tarfile.FIFOTYPE),
    ]  # fmt: skip
    kept = [
        folder("d"),
        link("l", "d"),
        link("d/up", ".."),
        link("d/file", "../file"),
        link("self", "."),
        member("file", b"x"),
    ]
    copied = unpack(tmp_path / "made", *kept, *out, hard("h", "file"), hard("i", "l"))
    assert set(look(tmp_path / "made")) == {"d", "d/file", "d/up", "file", "h", "l", "self"}
    assert (copied.files, copied.others, copied.left_out_count) == (2, 5, len(out) + 1)
    assert len(copied.left_out) == 10


def test_permissions_are_the_guest_s_as_far_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        unpack(
            tmp_path / "made",
            folder("d", 0o2555),
            member("d/x", b"x", mode=0o6777),
            member("y", mode=0o444),
            folder("d", 0o2555),
        )
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "made" / name).stat().st_mode & 0o7777 for name in ("d", "d/x", "y")}
    assert modes == {"d": 0o750, "d/x": 0o750, "y": 0o440}


def test_an_archive_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "ENTRIES_MAX", 3)
    with pytest.raises(GuestError, match="more than 3 members"):
        unpack(tmp_path / "made", *(member(str(n)) for n in range(5)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
            st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=4).map("/".join),
            st.lists(st.sampled_from(["a", "b", "c", "..", ".", ""]), max_size=4).map("/".join),
        ),
        max_size=10,
    )
)
def test_nothing_leads_out_whatever_it_is(tmp_path: Path, members: list[tuple[bytes, str, str]]) -> None:
    root = tmp_path / fsutil.unique(8)
    root.mkdir()
    (root / "outside").write_text("outside")
    made = root / "made"
    try:
        unpack(made, *(member(name, type=kind, linkname=to) for kind, name, to in members))
    except GuestError:
        pass
    assert sorted(path.name for path in root.iterdir()) == ["archive", "made", "outside"]
    for directory, folders, files in os.walk(made):
        for name in (*folders, *files):
            assert Path(os.path.realpath(Path(directory, name))).is_relative_to(made), members


@pytest.mark.parametrize("data", [b"", b"x" * 5000, bytes(10)])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "archive").write_bytes(data)
    with (tmp_path / "archive").open("rb") as file, pytest.raises(GuestError, match="no archive that can be read"):
        trees.unpack(file.fileno(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
