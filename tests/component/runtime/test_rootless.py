"""The same without privileges: a VM of a user who is not root, or a container's, in a whole jail, snapshot and restored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.guests import write_project

SOURCE = Path(__file__).parents[3] / "src"
NOBODY = 65534

SCRIPT = """
import json, sys
from pathlib import Path
from ovms.artifact.build import Builder
from ovms.artifact.resolve import find
from ovms.oci.reference import Reference
from ovms.runtime import security, snapshots
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime
from ovms.spec.choices import Accel

root, project = Path(sys.argv[1]), Path(sys.argv[2])
runtime = Runtime(Root(root))
Builder(runtime.layout, None).build(project, name="echo:1")
options = RunOptions(memory=32 << 20, accel=Accel.TCG)
answer = []
try:
    record = runtime.start(find(runtime.layout, "echo:1"), options).record
    answer.append(security.in_force(record))
    snapshots.take(runtime, record, Reference.parse("echo:snap"))
    clone = runtime.start(find(runtime.layout, "echo:snap"), RunOptions(accel=Accel.TCG)).record
    answer.append({**security.in_force(clone), "restored": clone.restored})
finally:
    for record in runtime.instances.records():
        runtime.remove(record, force=True)
print(json.dumps(answer))
"""


#: What finds ovms and its packages; the system's Python will do where another user cannot read ours.
PYTHONPATH = os.pathsep.join((str(SOURCE), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))


@pytest.fixture
def as_nobody() -> list[str]:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else (and the other tests have run without privileges already)")
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv")
    for python in (sys.executable, "/usr/bin/python3"):
        # env: who has just been root may execute what nobody may, once
        argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", python]
        check = [
            *argv,
            "-c",
            f"import ovms.runtime.runtime, sys; assert sys.version_info[:2] == {sys.version_info[:2]}",
        ]
        env = {"PYTHONPATH": PYTHONPATH, "PATH": os.environ["PATH"]}
        done = subprocess.run(check, cwd="/", env=env, capture_output=True, timeout=30, check=False)
        if done.returncode == 0:
            return argv
    pytest.skip("another user cannot read this directory or a Python for it")


@pytest.mark.parametrize("container", [False, True], ids=["a user", "root of a user namespace"])
def test_a_whole_jail_without_privileges(as_nobody: list[str], echo_kernel: Path, container: bool) -> None:
    # as in a rootless container: root, but of users that the host does not have it know
    inside = ["unshare", "--user", "--map-root-user"] if container else []
    if container and subprocess.run([*as_nobody[:-1], *inside, "true"], timeout=10, check=False).returncode != 0:
        pytest.skip("users cannot make user namespaces here")
    home = Path("/var/tmp") / f"ovms-rootless-{os.getpid()}"
    home.mkdir(mode=0o700)
    try:
        project = write_project(home / "project", echo_kernel)
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": PYTHONPATH}
        done = subprocess.run(
            [*as_nobody[:-1], *inside, as_nobody[-1], "-c", SCRIPT, home / "root", project],
            cwd="/",
            env=env,
            capture_output=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        booted, restored = json.loads(done.stdout)
    finally:
        shutil.rmtree(home)
    assert restored["restored"]
    for found in (booted, restored):
        user = 0 if container else NOBODY
        assert found["user"] == {"uid": user, "gid": user}
        assert ("too few users" in found["missing"].get("user", "")) == container
        assert found["capabilities"]["effective"] == []
        assert found["seccomp"]["mode"] == "filter"
        if "namespaces" not in found["missing"]:
            assert found["own_root"]
            assert all(found["namespaces"][name] for name in ("user", "mnt", "pid", "ipc", "uts"))
