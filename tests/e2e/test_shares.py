"""Directories of the host in a real Linux, by 9p and by virtiofs: what it may do with them, and what of it is on the host's disk."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import guests, share_guest, tools
from support.cli import OVM, Ovm
from support.guests import Console

from ovms.errors import ToolMissing, Unsupported
from ovms.vmm import virtiofs
from ovms.vmm.extras import BY_9P, BY_VIRTIOFS

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

NOBODY = 65534
SCRIPT = """
cd /mnt
echo from-guest >new
echo "read=$(cat existing)"
echo "owner=$(stat -c %u:%g existing) $(stat -c %u:%g new)"
echo more >>existing
mkdir made
mv new made/moved
ln made/moved linked
rm doomed
chmod 640 made/moved
dd if=/dev/zero of=big bs=64k count=64 2>/dev/null
truncate -s 1000 big
ln -s /etc/shadow symlink
umask 222
echo as git does >read-only
umask 022
mkdir -p deep/er
touch deep/er/file
cp /bin/busybox true
./true && echo "program=runs"
chmod u+s true && echo "worked: suid"
chmod 2755 true && echo "worked: sgid"
chmod g+s made && echo "worked: sgid of a directory"
cp /bin/busybox /set
chmod 6755 /set
cp -p /set set
test -u set && echo "worked: a copy with its mode"
mknod disk b 254 0 && echo "worked: block"
mknod null c 1 3 && echo "worked: char"
mkfifo fifo && echo "worked: fifo"
touch by-another
chown 33:33 by-another 2>/dev/null
mkdir grouped/made 2>/dev/null && echo "grouped=made"
mkdir -m 777 open
mkdir -p /etc
ln -s busybox /bin/sh
echo "another:x:33:33::/:/bin/sh" >/etc/passwd
su another -c "touch open/by-33"
cat symlink && echo "worked: symlink"
cat leads-out && echo "worked: planted symlink"
echo x >leads-out && echo "worked: write through a symlink"
cat ../outside && echo "worked: parent"
cat theirs && echo "worked: theirs"
test -e shown && echo x >>shown && echo "worked: shown"
rm -f shown 2>/dev/null
test -e shown && echo "shown=there"
touch /mnt/last
rmdir deep/er 2>/dev/null
sync
"""


@pytest.fixture(autouse=True)
def lent(monkeypatch: pytest.MonkeyPatch) -> None:
    tools.lend_virtiofsd(monkeypatch)


@pytest.fixture(params=[BY_9P, BY_VIRTIOFS])
def via(request: pytest.FixtureRequest, lent: None) -> str:
    """Each way to share a directory that this host has."""
    if request.param == BY_VIRTIOFS:
        try:
            virtiofs.find()
        except (ToolMissing, Unsupported) as exc:
            pytest.skip(exc.message)
    return str(request.param)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    directory = tmp_path / "private" / "share"
    directory.mkdir(parents=True)
    for name in ("existing", "doomed"):
        (directory / name).write_text(f"{name}\n")
        (directory / name).chmod(0o600)
    (tmp_path / "private" / "outside").write_text("of the host")
    (directory / "leads-out").symlink_to(tmp_path / "private" / "outside")
    (directory / "grouped").mkdir()
    (directory / "script").write_text(SCRIPT)
    return directory


def run(ovm: Ovm, share: Path, via: str, *options: str, manifest: Path | None = None) -> list[str]:
    """What the guest's script says."""
    ovm.ok("build", manifest or share_guest.make(via), "-t", "share:1", timeout=120)
    volume = ",".join([str(share), "tag=work", f"via={via}", *options])
    started = ovm.ok("run", "-d", "--json", "--accel", "tcg", "-m", "256m", "-v", volume, "share:1", timeout=120).json
    said = Console(ovm.root / "instances" / started["instance_id"]).wait_for("share: done", timeout=240)
    return [line.strip() for line in said.splitlines()]


def check(share: Path, via: str, said: list[str], owner: tuple[int, int]) -> None:
    # a guest's 9p asks for the bit that a new directory would get anyway, and that nobody gets who asks
    assert ("grouped=made" in said) == (via == BY_VIRTIOFS)
    (share / "grouped").chmod(0o755)
    assert [line for line in said if line.startswith("worked")] == []
    assert {"read=existing", "program=runs", "owner=1000:1000 1000:1000"} <= set(said), said
    assert (share / "made" / "moved").read_text() == "from-guest\n"
    assert (share / "existing").read_text() == "existing\nmore\n"
    assert (share / "linked").stat().st_nlink == 2
    assert (share / "made" / "moved").stat().st_mode & 0o7777 == 0o640
    assert (share / "deep").stat().st_mode & 0o7777 == 0o755
    assert (share / "deep" / "er" / "file").stat().st_mode & 0o7777 == 0o644
    assert (share / "big").stat().st_size == 1000
    assert (share / "read-only").read_text() == "as git does\n"
    assert (share / "read-only").stat().st_mode & 0o7777 == 0o444
    assert not (share / "doomed").exists()
    assert (share / "open" / "by-33").exists()
    assert (share / "symlink").readlink() == Path("/etc/shadow")
    assert (share.parent / "outside").read_text() == "of the host"
    for path in (share, *share.rglob("*")):
        info = path.lstat()
        assert stat.S_IFMT(info.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), path
        assert path.parent.name == "grouped" or not info.st_mode & 0o6000, path
        if path.name not in ("theirs", "shown"):
            assert (info.st_uid, info.st_gid) == owner, path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has directories of others")
@pytest.mark.parametrize("owner", [(4321, 4322), (0, 0)])
def test_a_guest_writes_as_the_owner_of_the_directory(ovm: Ovm, share: Path, via: str, owner: tuple[int, int]) -> None:
    for path in (share, *share.iterdir()):
        os.chown(path, *owner, follow_symlinks=False)
    (share / "grouped").chmod(0o2775)
    for name, mode in (("theirs", 0o600), ("shown", 0o644)):
        (share / name).write_text("of another")
        (share / name).chmod(mode)
        os.chown(share / name, 5555, 5555)
    share.parent.chmod(0o700)
    said = run(ovm, share, via, "rw")
    assert "shown=there" in said
    check(share, via, said, owner)
    assert (share / "shown").read_text() == (share / "theirs").read_text() == "of another"


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Ovm]:
    """``ovm`` of a user who is not root, with a home of its own."""
    prefix: tuple[str, ...] = ()
    home = tmp_path / "home-of-another"
    if os.geteuid() == 0:
        prefix = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
        home = Path("/var/tmp") / f"ovms-shares-{os.getpid()}"
        check = [*prefix, str(OVM), "version"]
        if (
            shutil.which("setpriv") is None
            or subprocess.run(check, cwd="/", capture_output=True, timeout=60).returncode
        ):
            pytest.skip("another user cannot read this directory or its Python")
    home.mkdir(mode=0o700)
    ovm = Ovm(home / "root", home, prefix)
    try:
        yield ovm
    finally:
        if names := ovm("ps", "-aq").out.split():
            ovm("rm", "-f", *names)
        left = guests.qemu_children(home)
        shutil.rmtree(home)
        assert left == []


def test_a_guest_of_a_user_writes_as_that_user(another: Ovm, share: Path, via: str) -> None:
    home = another.home
    shutil.copytree(share.parent, home / "private", symlinks=True)
    manifest = share_guest.make(via)
    shutil.copytree(manifest.parent, home / "guest")
    owner = (os.geteuid(), os.getegid())
    if another.prefix:
        owner = (NOBODY, NOBODY)
        for path in (home, *home.rglob("*")):
            os.chown(path, *owner, follow_symlinks=False)
    (home / "private" / "share" / "grouped").chmod(0o2775)
    said = run(another, home / "private" / "share", via, "rw", manifest=home / "guest" / manifest.name)
    check(home / "private" / "share", via, said, owner)


@pytest.mark.parametrize("options", [(), ("ro",)])
def test_a_guest_only_reads_unless_it_is_said(ovm: Ovm, share: Path, via: str, options: tuple[str, ...]) -> None:
    (share / "script").write_text("cd /mnt; echo read=$(cat existing); echo x >new; rm doomed; chmod 600 script\n")
    for path in list(share.parents)[:-1]:
        if path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o011)
    share.chmod(0o755)
    for path in share.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)
    said = run(ovm, share, via, *options)
    assert "read=existing" in said
    assert sorted(path.name for path in share.iterdir()) == ["doomed", "existing", "grouped", "leads-out", "script"]
    assert (share / "script").stat().st_mode & 0o777 == 0o644
