"""'ovm fork', with a server and without one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.cli import Ovm
from support.guests import Console
from support.server import Server

from ovms.oci.registry import RegistryClient
from ovms.runtime.client import Client
from ovms.runtime.fork import fork
from ovms.runtime.local import Local
from ovms.runtime.remote import Remote
from ovms.runtime.root import Root
from ovms.runtime.runtime import RunOptions, Runtime

MEMORY = ("-m", "32m", "--accel", "tcg")


@pytest.fixture(params=["server", "local"])
def ovm(server: Server, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ovm]:
    extra = {"OVMS_SOCKET": "local"} if request.param == "local" else {}
    ovm = Ovm(server.root, tmp_path, extra=extra)
    yield ovm
    for line in ovm.ok("ps", "-a", "-q").out.split():
        ovm("rm", "-f", line)


@pytest.fixture
def parent(ovm: Ovm, server: Server) -> str:
    instance_id = ovm.ok("run", "-d", "--name", "parent", *MEMORY, "echo:1").out.strip()
    console = Console(server.root / "instances" / instance_id)
    console.wait_for("READY")
    assert [console.ping() for _ in range(3)] == [1, 2, 3]
    return instance_id


def pings(server: Server, ids: list[str]) -> list[int]:
    return [Console(server.root / "instances" / one).ping() for one in ids]


@pytest.mark.spec("RUN-20")
def test_an_instance_has_children_and_goes_on(ovm: Ovm, server: Server, parent: str) -> None:
    children = ovm.ok("fork", "parent", "-n", "3", "--name", "kid", "-p", "80", "-t", "echo:forked").out.split()
    assert len(set(children)) == 3
    assert pings(server, [*children, parent]) == [4, 4, 4, 4]
    assert pings(server, children[:1]) == [5]
    assert pings(server, children[1:]) == [5, 5]
    told = {one["name"]: one for one in ovm.ok("ps", "--json").json}
    assert set(told) == {"parent", "kid-1", "kid-2", "kid-3"}
    assert len({told[f"kid-{i}"]["ports"][0]["host_port"] for i in (1, 2, 3)}) == 3
    grandchild = ovm.ok("fork", children[0]).out.split()
    assert pings(server, grandchild) == [6]
    again = json.loads(ovm.ok("fork", "echo:forked", "-n", "2", "--rm", "--json").out)["instances"]
    assert pings(server, [one["instance_id"] for one in again]) == [4, 4]
    assert all(one["restored"] for one in again)


def test_all_or_none(ovm: Ovm, server: Server, parent: str) -> None:
    ovm.ok("run", "-d", "--name", "kid-3", *MEMORY, "echo:1")
    done = ovm("fork", "parent", "-n", "4", "--name", "kid")
    assert done.code == 5
    assert "kid-3 is taken" in done.err
    deadline = time.monotonic() + 20
    while {one["name"] for one in ovm.ok("ps", "-a", "--json").json} != {"parent", "kid-3"}:
        assert time.monotonic() < deadline
    assert pings(server, [parent]) == [4]


def test_one_that_is_interrupted_while_it_begins(
    ovm: Ovm, server: Server, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, calls = ThreadPoolExecutor.submit, iter(range(4))

    def interrupted(pool: ThreadPoolExecutor, *work: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return submit(pool, *work)

    client: Client = Remote(server.root / "ovms.sock")
    if ovm.extra:
        client = Local(Runtime(Root(server.root)), RegistryClient)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork(client, parent, 4, RunOptions())
    assert [one["name"] for one in ovm.ok("ps", "-a", "--json").json] == ["parent"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("echo:1",), 11, "no RAM snapshot"),
        (("nobody",), 4, "nobody"),
        (("echo:1", "-n", "0"), 2, "out of range"),
        (("echo:1", "-n", "2", "-p", "8080:80"), 2, "same port"),
        (("echo:1", "-p", "x"), 2, "x"),
    ],
)
def test_mistakes(words: tuple[str, ...], code: int, said: str, ovm: Ovm) -> None:
    done = ovm("fork", *words)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert ovm.ok("ps", "-a", "-q").out == ""
