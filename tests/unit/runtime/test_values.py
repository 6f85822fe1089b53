"""What users write: ports, names; and the record that is kept."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.records import RECORD

from ovms.errors import HostError, OvmsError, PortInUse, StoreCorrupt, UsageError
from ovms.runtime import names, ports, record, restart
from ovms.runtime.root import Root
from ovms.spec import strictjson
from ovms.spec.digest import of_bytes
from ovms.trust.files import Policies
from ovms.vmm.model import PortForward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", PortForward("127.0.0.1", 8080, 80)),
        ("0.0.0.0:8080:80", PortForward("0.0.0.0", 8080, 80)),
        ("80", PortForward("127.0.0.1", 0, 80)),
        ("127.0.0.1::80", PortForward("127.0.0.1", 0, 80)),
        ("0:80", PortForward("127.0.0.1", 0, 80)),
        ("[::1]:8080:80", PortForward("::1", 8080, 80)),
        ("[0:0::1]::80/udp", PortForward("::1", 0, 80, "udp")),
        ("[::]:8080:80", PortForward("::", 8080, 80)),
        ("53:5353/udp", PortForward("127.0.0.1", 53, 5353, "udp")),
    ],
)
def test_port_forwards(text: str, expected: PortForward) -> None:
    assert ports.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":",
            "80:",
            "a:80",
            "8080:0",
            "70000:80",
            "8080:80:80:80",
            "8080:80/icmp",
            "1.2.3:80:80",
            "-1:80",
            "80,x=1",
        ),
        *("::1:8080:80", "[::1]80", "[::1]", "[::ffff:127.0.0.1]:1:80", "[1.2.3.4]:1:80", "[::1%lo]:1:80", "[::1:80"),
    ],
)
def test_port_forwards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        ports.parse(text)


@given(st.text(max_size=30))
def test_any_text_is_a_port_forward_or_a_usage_error(text: str) -> None:
    try:
        forward = ports.parse(text)
    except UsageError:
        return
    assert 0 <= forward.host_port <= 65535
    assert 1 <= forward.guest_port <= 65535


def test_free_ports_are_chosen_and_taken_ones_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            ports.settle([ports.parse(f"{port}:80")])
    first, second = ports.settle([ports.parse("80"), ports.parse("81")])
    assert first.host_port > 0
    assert first.host_port != second.host_port


def test_one_host_port_twice_is_in_use() -> None:
    (free,) = ports.settle([ports.parse("80")])
    with pytest.raises(PortInUse):
        ports.settle([free, replace(free, guest_port=81)])


def test_an_address_of_another_machine() -> None:
    with pytest.raises(HostError, match=r"192\.0\.2\.1"):
        ports.settle([ports.parse("192.0.2.1:0:80")])


@pytest.mark.parametrize("name", ["a", "web-1", "Web_1.x", "9"])
def test_names(name: str) -> None:
    assert names.check(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "../x", "a\n", "x" * 64, "ä"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError):
        names.check(name)


@given(st.text(max_size=80), st.uuids())
def test_made_names_are_names_and_new(artifact: str, number: object) -> None:
    first = names.make(artifact, str(number), ())
    assert names.check(first) == first
    second = names.make(artifact, str(number), {first})
    assert second != first
    assert names.check(second) == second


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record.save(tmp_path, RECORD)
    assert record.load(tmp_path) == RECORD
    assert (tmp_path / record.FILE).stat().st_mode & 0o777 == 0o600
    bare = replace(RECORD, process=None, ram_image=None, started=None, start_ms=None, ports=(), overlays=())
    record.save(tmp_path, bare)
    assert record.load(tmp_path) == bare
    failed = replace(
        bare,
        digest=None,
        resolved=False,
        problem={"code": "digest-mismatch", "status": 422},
        paused=True,
        timings={"resolve": 1.5, "pull": 830.0},
        not_restored="why not",
        start_key=record.StartKey(of_bytes(b"key"), of_bytes(b"body")),
    )
    record.save(tmp_path, failed, durable=False)
    assert record.load(tmp_path) == failed


def test_no_record_is_none(tmp_path: Path) -> None:
    assert record.load(tmp_path) is None
    assert record.load(tmp_path / "gone") is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"version": 2}', b'{"version": 1}', b"\xff"])
def test_a_damaged_record_is_said_to_be_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / record.FILE).write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"record\.json"):
        record.load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(RECORD.to_json())), JSON)
def test_a_record_with_any_wrong_field_is_an_error_of_ours(key: str, value: object) -> None:
    document = {**RECORD.to_json(), key: value}
    raw = strictjson.canonical(json.loads(json.dumps(document)))
    try:
        record.Record.from_json(json.loads(raw))
    except (KeyError, TypeError, ValueError, AttributeError, OvmsError):
        pass


def test_overlays_are_numbered_on() -> None:
    assert RECORD.with_overlay().overlays == ("overlay-0.qcow2", "overlay-1.qcow2")
    assert replace(RECORD, overlays=("overlay-7.qcow2",)).with_overlay().overlays[-1] == "overlay-8.qcow2"
    assert replace(RECORD, overlays=()).with_overlay().overlays == ("overlay-0.qcow2",)


@pytest.mark.spec("SEC-2")
def test_a_record_never_leads_out_of_its_directory(tmp_path: Path) -> None:
    document = {**RECORD.to_json(), "overlays": ["../../etc/passwd"]}
    assert record.Record.from_json(document).overlays == ("passwd",)


@pytest.mark.parametrize(
    ("environ", "uid", "expected"),
    [
        ({"OVMS_ROOT": "/x"}, 0, "/x"),
        ({}, 0, "/var/lib/ovms"),
        ({"HOME": "/home/a"}, 1000, "/home/a/.local/share/ovms"),
        ({"HOME": "/home/a", "XDG_DATA_HOME": "/d"}, 1000, "/d/ovms"),
        ({"HOME": "/home/a", "XDG_DATA_HOME": "d"}, 1000, "/home/a/.local/share/ovms"),
        ({"OVMS_ROOT": "", "HOME": "/h"}, 7, "/h/.local/share/ovms"),
    ],
)
def test_where_everything_lives(environ: dict[str, str], uid: int, expected: str) -> None:
    assert Root.default(environ, uid).path == Path(expected)


def test_a_root_that_cannot_be_used_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError) as caught:
        Root(tmp_path / "file" / "root").prepare()
    assert "OVMS_ROOT" in str(caught.value.hint)


def test_who_starts_it_again_finds_the_same_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a QEMU of another version, which the shell that started the VM had on its PATH, does not know its machine
    entry = tmp_path / "ovms" / "cli" / "entry.py"
    entry.parent.mkdir(parents=True)
    for package in entry.parents[:2]:
        (package / "__init__.py").touch()
    entry.write_text("import os, sys\ndef entry(): print(os.environ['PATH'], *sys.argv[1:])\n")
    monkeypatch.setenv("PATH", "/opt/vmm/bin:/usr/bin")
    python, option, start, path, source, *rest = restart.at_end(
        "/root-of-it", replace(RECORD, restart=record.Restart()), Policies(Path("/policy.json"), needed=True)
    )
    assert Path(source, "ovms", "cli", "entry.py").is_file()
    done = subprocess.run([python, option, start, path, tmp_path, *rest], env={}, capture_output=True, timeout=60)
    assert done.stdout.decode().split()[0] == "/opt/vmm/bin:/usr/bin", done.stderr
    command = ["--root", "/root-of-it", "--progress", "none", "ended", RECORD.id]
    assert done.stdout.decode().split()[1:] == [*command, "--policy", "/policy.json", "--policy-needed"]
