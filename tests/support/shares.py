"""What a VMM that was taken over tries in a directory that it may write to: a program that runs in its place, in its jail."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

#: Notes what came of each attempt: "done", or the error's name. ``SHARE`` is where the directory is. None of them reaches
#: anything but that directory, so they may run without a jail, too.
WITHIN = """
    import ctypes, errno, json, os, socket, stat, struct, sys
    libc = ctypes.CDLL(None, use_errno=True)
    answer = {}
    top = SHARE

    def attempt(name, action):
        try:
            result = action()
            answer[name] = "done" if result is None else result
        except OSError as exc:
            answer[name] = errno.errorcode.get(exc.errno, str(exc))

    def call(number, *arguments):
        ctypes.set_errno(0)
        result = libc.syscall(number, *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), "")
        return result

    def path(name):
        return f"{top}/{name}".encode()

    def put(name, data=b"from inside", mode=0o600):
        fd = os.open(f"{top}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        os.write(fd, data)
        os.close(fd)

    # what has to work
    attempt("ok write", lambda: put("new"))
    attempt("ok read", lambda: open(f"{top}/new").read())
    attempt("ok change", lambda: put("existing"))
    attempt("ok chmod", lambda: os.chmod(f"{top}/new", 0o640))
    attempt("ok mkdir", lambda: os.mkdir(f"{top}/made"))
    attempt("ok move", lambda: (put("here"), os.rename(f"{top}/here", f"{top}/made/there"), None)[-1])
    attempt("ok link", lambda: os.link(f"{top}/new", f"{top}/made/linked"))
    attempt("ok remove", lambda: os.unlink(f"{top}/doomed"))
    attempt("ok mknod file", lambda: os.mknod(f"{top}/plain", stat.S_IFREG | 0o644))
    attempt("ok symlink", lambda: os.symlink("/nowhere/at/all", f"{top}/made/symlink"))
    attempt("ok time", lambda: os.utime(f"{top}/new", (1, 1)))

    # files whose mode says more than who may read them
    for bits in (0o4755, 0o2755, 0o6755, 0o4000):
        attempt(f"chmod {bits:o}", lambda: os.chmod(f"{top}/new", bits))
        attempt(f"chmod call {bits:o}", lambda: call(90, path("new"), bits))
        attempt(f"fchmod {bits:o}", lambda: os.fchmod(os.open(f"{top}/new", os.O_RDONLY), bits))
        attempt(f"fchmodat {bits:o}", lambda: call(268, -100, path("new"), bits))
        attempt(f"fchmodat2 {bits:o}", lambda: call(452, -100, path("new"), bits, 0))
        attempt(f"high bits {bits:o}", lambda: call(268, -100, path("new"), bits | 0xabcd0000))
        attempt(f"open {bits:o}", lambda: call(2, path(f"o{bits:o}"), os.O_WRONLY | os.O_CREAT, bits))
        attempt(f"openat {bits:o}", lambda: os.open(f"{top}/a{bits:o}", os.O_WRONLY | os.O_CREAT, bits))
        attempt(f"tmpfile {bits:o}", lambda: os.open(top, os.O_WRONLY | os.O_TMPFILE, bits))
        attempt(f"creat {bits:o}", lambda: call(85, path(f"c{bits:o}"), bits))
        how = struct.pack("QQQ", os.O_WRONLY | os.O_CREAT, bits, 0)
        attempt(f"openat2 {bits:o}", lambda: call(437, -100, path(f"2{bits:o}"), how, len(how)))
        attempt(f"mknod file {bits:o}", lambda: call(133, path(f"m{bits:o}"), stat.S_IFREG | bits, 0))
        attempt(f"mknodat file {bits:o}", lambda: call(259, -100, path(f"n{bits:o}"), stat.S_IFREG | bits, 0))
        attempt(f"mknod no kind {bits:o}", lambda: call(133, path(f"k{bits:o}"), bits, 0))
        attempt(f"proc fd {bits:o}", lambda: os.chmod(f"/proc/self/fd/{os.open(top + '/new', os.O_PATH)}", bits))
    os.mkdir(f"{top}/made/dir")
    attempt("mkdir does not", lambda: call(83, path("sticky"), 0o6777) or None)
    attempt("io_uring", lambda: call(425, 1, 0))

    # what a program of the host would take for something else than a file
    attempt("fifo", lambda: os.mkfifo(f"{top}/fifo"))
    attempt("device", lambda: os.mknod(f"{top}/disk", stat.S_IFBLK | 0o666, os.makedev(254, 0)))
    attempt("null", lambda: os.mknod(f"{top}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
    attempt("whiteout", lambda: os.mknod(f"{top}/white", stat.S_IFCHR, 0))
    attempt("socket node", lambda: os.mknod(f"{top}/socket", stat.S_IFSOCK | 0o666))
    attempt("socket", lambda: socket.socket(socket.AF_UNIX).bind(f"{top}/bound"))
    attempt("paired socket", lambda: socket.socketpair()[0].bind(f"{top}/bound2"))
    attempt("xattr user", lambda: os.setxattr(f"{top}/new", "user.note", b"x"))
    attempt("xattr call", lambda: call(463, -100, path("new"), 0, b"user.note", bytes(16), 16))
    for name, value in (("security.capability", struct.pack("<5I", 0x02000001, 0xffffffff, 0, 0, 0)),
                        ("security.capability", struct.pack("<6I", 0x03000001, 0xffffffff, 0, 0, 0, 0)),
                        ("security.selinux", b"x"), ("trusted.overlay.opaque", b"y")):
        attempt(f"xattr {name} {len(value)}", lambda: os.setxattr(f"{top}/new", name, value))
    attempt("chown root", lambda: os.chown(f"{top}/new", 0, 0))
    attempt("chown other", lambda: os.chown(f"{top}/new", 4321, 4321))
"""
#: Those that would reach other places, without a jail.
BEYOND = """
    attempt("up", lambda: open(f"{top}/../../etc/passwd").read())
    attempt("up by openat", lambda: os.open("../../../../etc/passwd", os.O_RDONLY, dir_fd=os.open(top, os.O_RDONLY)))
    attempt("symlink out", lambda: (os.symlink("/usr/bin/env", f"{top}/out"), os.open(f"{top}/out", os.O_RDONLY))[-1])
    attempt("planted symlink", lambda: open(f"{top}/leads-out").read())
    attempt("planted write", lambda: put("leads-out"))
    attempt("symlink within", lambda: (os.symlink("new", f"{top}/inner"), open(f"{top}/inner").read(), None)[-1])
    attempt("link out", lambda: os.link("/usr/bin/env", f"{top}/env"))
    attempt("move out", lambda: os.rename(f"{top}/new", "/tmp/new"))
    attempt("handle", lambda: call(303, -100, path("new"), bytes(136), bytes(8), 0))
    attempt("remount", lambda: call(442, -100, path(""), 0, struct.pack("QQQQ", 0, 15, 0, 0), 32))
    attempt("mount over", lambda: call(165, b"x", path("made"), b"tmpfs", 0, 0))
    attempt("run", lambda: (put("program", open("/usr/bin/true", "rb").read(), 0o755), os.execv(f"{top}/program", ["x"]))[-1])
"""
TELL = """
    sys.stderr.write(json.dumps(answer))
"""


def attempts(share: str) -> str:
    """All of it, for a jail."""
    return (WITHIN + BEYOND + TELL).replace("SHARE", repr(share))


def attempts_within(share: str) -> str:
    """What does no harm where there is no jail."""
    return (WITHIN + TELL).replace("SHARE", repr(share))


def prepare(directory: Path) -> Path:
    """A directory to share, with what the attempts need in it; a link leads to a file beside it."""
    directory.mkdir(mode=0o755)
    outside = directory.with_name("outside")
    outside.write_text("beside it")
    outside.chmod(0o666)
    for name in ("existing", "doomed"):
        (directory / name).write_text("from the host")
        (directory / name).chmod(0o600)
    (directory / "leads-out").symlink_to(outside)
    return directory


def check(directory: Path, answer: dict[str, Any], owner: tuple[int, int]) -> None:
    """Holds what the attempts have left against what may be there."""
    outside = directory.with_name("outside")
    assert outside.read_text() == "beside it"
    worked = {name: result for name, result in answer.items() if name.startswith("ok ")}
    assert worked.pop("ok read") == "from inside"
    assert set(worked.values()) == {"done"}, worked
    assert answer.pop("mkdir does not") == "done"
    done = {name: result for name, result in answer.items() if not name.startswith("ok ") and str(result)[0] != "E"}
    assert done == {}
    for path in (directory, *directory.rglob("*")):
        info = path.lstat()
        kind = stat.S_IFMT(info.st_mode)
        assert kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), path
        assert not info.st_mode & 0o6000, path
        assert (info.st_uid, info.st_gid) == owner, path
        assert os.listxattr(path, follow_symlinks=False) == os.listxattr(outside), path
    assert (directory / "new").stat().st_mode & 0o777 == 0o640
    assert (directory / "existing").read_text() == "from inside"
    assert (directory / "made" / "there").exists()
    assert not (directory / "doomed").exists()
