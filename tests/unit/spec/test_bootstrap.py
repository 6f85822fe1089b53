"""The bootstrap config: documents, schema, mapping, overrides, and both ways into the guest."""

from __future__ import annotations

import base64
import contextlib
import copy
import grp
import hashlib
import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms.errors import InputError, JsonInvalid, ManifestInvalid, Problem, Unsupported
from ovms.spec import bootstrap, limits, strictjson
from ovms.spec.bootstrap import BootstrapConfig

SPEC = Path(__file__).parents[3] / "spec"
VECTORS = SPEC / "vectors/bootstrap"
INDEX = json.loads((VECTORS / "index.json").read_text(encoding="utf-8"))
MAPPING = json.loads((VECTORS / "mapping.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((SPEC / "schemas/bootstrap.config.v1.json").read_text(encoding="utf-8"))
EXAMPLE = (SPEC / "examples/bootstrap.config.json").read_bytes()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())

#: Rules for what stands in the guest, or in a runtime: nothing here proves them. They wait with a scenario each
#: (``make spec-coverage``) until those are there.
ELSEWHERE = {
    *("BOOT-9", "BOOT-10", "BOOT-11", "BOOT-33", "BOOT-34", "BOOT-43", "BOOT-50", "BOOT-51"),  # runtime
    *("BOOT-23", "BOOT-28"),  # runtime, converter
    *("BOOT-15", "BOOT-18", "BOOT-19", "BOOT-20"),  # guest
    *("BOOT-36", "BOOT-37", "BOOT-39", "BOOT-40", "BOOT-41", "BOOT-42", "BOOT-53"),  # ovms-init
}


def cases(items: list[dict[str, Any]], **want: Any) -> list[Any]:
    return [pytest.param(c, id=c["name"]) for c in items if all(c.get(k) == v for k, v in want.items())]


def parse(document: Any) -> BootstrapConfig:
    return bootstrap.parse(json.dumps(document).encode())


def found(error: ManifestInvalid) -> list[tuple[str, str | None]]:
    return sorted((problem.path, problem.rule) for problem in error.problems)


def listed(case: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((problem["path"], problem["rule"]) for problem in case["problems"])


def any_parser(data: bytes) -> Any:
    """What a parser that only follows RFC 8259 makes of *data*; raises ValueError where it refuses."""

    def constant(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(data.decode(), parse_constant=constant)
    except RecursionError as exc:
        raise ValueError("too deep") from exc


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(INDEX["cases"], valid=True))
def test_what_is_valid(case: dict[str, Any]) -> None:
    data = (VECTORS / case["file"]).read_bytes()
    config = bootstrap.parse(data)
    again = bootstrap.parse(bootstrap.document_bytes(config))
    assert again == config


@pytest.mark.parametrize("case", cases(INDEX["cases"], valid=False))
def test_what_is_refused(case: dict[str, Any]) -> None:
    data = (VECTORS / case["file"]).read_bytes()
    with pytest.raises((ManifestInvalid, JsonInvalid)) as info:
        bootstrap.parse(data)
    assert info.value.code == case["code"]
    if isinstance(info.value, ManifestInvalid):
        assert found(info.value) == listed(case)
        if len(case["problems"]) == 1:
            assert case["rules"] == [case["problems"][0]["rule"]]


@pytest.mark.parametrize("case", cases(INDEX["cases"]))
def test_what_the_schema_says_alone(case: dict[str, Any]) -> None:
    try:
        document = any_parser((VECTORS / case["file"]).read_bytes())
    except ValueError:
        assert not case["schema"]
    else:
        assert VALIDATOR.is_valid(document) is case["schema"]


def test_every_vector_is_listed_once() -> None:
    names = [case["name"] for case in INDEX["cases"]]
    assert len(set(names)) == len(names)
    files = {path.relative_to(VECTORS).as_posix() for path in VECTORS.glob("*/*.json")}
    assert sorted(case["file"] for case in INDEX["cases"]) == sorted(files)
    assert all(
        case["file"] == f"{'valid' if case['valid'] else 'invalid'}/{case['name']}.json" for case in INDEX["cases"]
    )


def test_every_rule_is_cited() -> None:
    text = (SPEC / "rfc/ovms-bootstrap.md").read_text(encoding="utf-8")
    rules = re.findall(r"^- \*\*\[(BOOT-[0-9]+)\]\*\*", text, re.MULTILINE)
    assert sorted(int(rule[5:]) for rule in rules) == list(range(1, len(rules) + 1))
    lists = [INDEX["cases"], *(value for value in MAPPING.values() if isinstance(value, list))]
    by_vectors = {rule for cases in lists for case in cases for rule in case["rules"]}
    by_tests = set(
        re.findall(
            r'"(BOOT-[0-9]+)"', re.sub(r"ELSEWHERE = \{.*?\n\}", "", Path(__file__).read_text(), flags=re.DOTALL)
        )
    )
    assert set(rules) == {rule for rule in by_vectors | by_tests if rule.startswith("BOOT")} | ELSEWHERE


def test_the_schema_itself() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == "urn:ovms:schema:bootstrap.config.v1"
    for example in SCHEMA["examples"]:
        VALIDATOR.validate(example)
        parse(example)
    for name, field in SCHEMA["properties"].items():
        for value in field["examples"]:
            VALIDATOR.validate({name: value})
            parse({name: value})


def test_the_example() -> None:
    VALIDATOR.validate(json.loads(EXAMPLE))
    config = bootstrap.parse(EXAMPLE)
    assert set(json.loads(EXAMPLE)) == set(SCHEMA["properties"])
    assert bootstrap.document_bytes(config) == EXAMPLE


@pytest.mark.spec("BOOT-1")
def test_a_config() -> None:
    config = parse(
        {
            "env": ["PATH=/bin", "EMPTY=", "TWO=a\nb"],
            "workdir": "/srv",
            "entrypoint": ["/bin/sh", "-c"],
            "cmd": ["set -e\n\tserve\n"],
            "exposedPorts": ["80/tcp", "53/udp"],
            "user": "app",
            "stopSignal": "SIGINT",
            "profile": "cloud-init",
            "x-more": {"a": None},
        }
    )
    assert config == BootstrapConfig(
        ("PATH=/bin", "EMPTY=", "TWO=a\nb"),
        "/srv",
        ("/bin/sh", "-c"),
        ("set -e\n\tserve\n",),
        ("80/tcp", "53/udp"),
        "app",
        "SIGINT",
        "cloud-init",
        {"x-more": {"a": None}},
    )
    assert parse({}) == BootstrapConfig()


@pytest.mark.spec("DOC-5")
def test_a_document_that_is_too_large() -> None:
    assert bootstrap.parse(b"{}" + b" " * (limits.BOOTSTRAP_MAX - 2)) == BootstrapConfig()
    with pytest.raises(JsonInvalid, match="the bootstrap config has 1048577 bytes"):
        bootstrap.parse(b"{}" + b" " * (limits.BOOTSTRAP_MAX - 1))


@pytest.mark.spec("BOOT-52")
@pytest.mark.parametrize(
    "entry", ["hunter2", "my-key=hunter2", "=hunter2", "KEY=hunter2\0", "KEY=" + "hunter2" * 20_000]
)
def test_errors_do_not_tell_the_value_of_a_variable(entry: str) -> None:
    with pytest.raises(ManifestInvalid) as info:
        parse({"env": [entry]})
    with pytest.raises(InputError) as info_merge:
        bootstrap.merge(BootstrapConfig(), env=[entry])
    for error in (info.value, info_merge.value):
        assert "hunter2" not in f"{error} {json.dumps(error.to_json())}"


def test_errors_name_the_right_document() -> None:
    with pytest.raises(ManifestInvalid, match="x has one problem") as info:
        bootstrap.parse(b"[]", "x")
    assert info.value.hint is not None
    assert "ovms-bootstrap.md" in info.value.hint


# --- properties ------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=8)
ENV = st.builds(lambda n, v: f"{n}={v}", st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True), TEXT)
ODD = st.sampled_from(
    ["", "/", "/a\n", "80/tcp", "80/tcp\n", "99999/tcp", "root", "1:2", "a:", "2147483648", "SIGTERM", "SIGRTMIN+30",
     "SIGRTMIN+31", "cloud-init", "A=b", "A=b\n", "A\n=b", "=b", "\0", "A=\0", "\x7f", "x" * 256, "/" * 4097]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT | ODD,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8), max_size=4)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "env": st.lists(ENV.filter(lambda e: "\0" not in e), max_size=4),
        "workdir": st.from_regex(r"/[^\x00-\x1f\x7f]{0,8}", fullmatch=True),
        "entrypoint": ARGUMENTS,
        "cmd": ARGUMENTS,
        "exposedPorts": st.lists(st.builds("{}/{}".format, st.integers(1, 65535), st.sampled_from(["tcp", "udp"]))),
        "user": st.from_regex(SCHEMA["properties"]["user"]["pattern"].replace("{0,9}", "{0,8}"), fullmatch=True),
        "stopSignal": st.sampled_from([*bootstrap.SIGNALS, "SIGRTMIN+3"]),
        "profile": st.sampled_from(["ovms-init", "cloud-init", "x"]),
        "more": JSON,
    },
)


@st.composite
def near_valid(draw: st.DrawFn) -> Any:
    document = copy.deepcopy(draw(VALID))
    for key in draw(st.lists(st.sampled_from(sorted(SCHEMA["properties"])), max_size=2)):
        value = document.get(key)
        if isinstance(value, list) and value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(JSON)
        else:
            document[key] = draw(JSON)
    return document


@given(VALID | near_valid() | JSON)
@settings(max_examples=500)
def test_schema_and_model_agree(document: Any) -> None:
    beyond = {rule for case in INDEX["cases"] if not case["valid"] and case["schema"] for rule in case["rules"]}
    problems: list[Problem] = []
    config = None
    try:
        config = parse(document)
    except ManifestInvalid as exc:
        problems = exc.problems
    except JsonInvalid:  # too deep for us, say
        return
    if config is None:
        assert problems
        assert all(problem.path.startswith("$") for problem in problems)
        assert not VALIDATOR.is_valid(document) or {problem.rule for problem in problems} <= beyond
    else:
        VALIDATOR.validate(document)
        assert bootstrap.parse(bootstrap.document_bytes(config)) == config


@given(VALID)
def test_valid_documents_round_trip(document: dict[str, Any]) -> None:
    kept = {key: value for key, value in document.items() if key == "more" or value}
    assert bootstrap.to_json(parse(document)) == kept


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(JsonInvalid, ManifestInvalid):
        bootstrap.parse(data)


IMAGE_FIELDS = ["Env", "Cmd", "Entrypoint", "User", "WorkingDir", "StopSignal", "ExposedPorts", "Labels"]


@given(st.fixed_dictionaries({"config": st.dictionaries(st.sampled_from(IMAGE_FIELDS), JSON)}) | JSON)
@settings(max_examples=300)
def test_any_image_config(document: Any) -> None:
    config = BootstrapConfig()
    with contextlib.suppress(ManifestInvalid, Unsupported):
        config = bootstrap.from_image_config(document)
    VALIDATOR.validate(bootstrap.to_json(config))
    assert bootstrap.parse(bootstrap.document_bytes(config)) == config


@given(VALID, VALID)
def test_overrides_of_any_kind(document: dict[str, Any], other: dict[str, Any]) -> None:
    config = parse(document)
    overrides = {key: other[key] for key in ("env", "entrypoint", "cmd", "workdir", "user") if key in other}
    merged = bootstrap.merge(config, **overrides)
    VALIDATOR.validate(bootstrap.to_json(merged))
    have, new = bootstrap.environment(config, {}), bootstrap.environment(parse({"env": overrides.get("env", [])}), {})
    assert bootstrap.environment(merged, {}) == have | new
    assert (merged.exposed_ports, merged.stop_signal, merged.profile, merged.extra) == (
        config.exposed_ports,
        config.stop_signal,
        config.profile,
        config.extra,
    )
    assert bootstrap.merge(merged) == merged
    assert bootstrap.merge(config) == config


# --- mapping and overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(MAPPING["cases"]))
def test_mapping_and_overrides(case: dict[str, Any]) -> None:
    # as they come: from bytes, strictly read
    image = strictjson.parse(json.dumps(case["image_config"]).encode(), "x", max_size=limits.OCI_MANIFEST_MAX)
    if "bootstrap" not in case:
        with pytest.raises((ManifestInvalid, Unsupported)) as info:
            bootstrap.from_image_config(image)
        assert info.value.code == case["code"]
        assert (found(info.value) if isinstance(info.value, ManifestInvalid) else []) == listed(case)
        return
    config = bootstrap.from_image_config(image)
    assert bootstrap.to_json(config) == case["bootstrap"]
    assert config == parse(case["bootstrap"])
    if "code" in case:
        with pytest.raises(InputError) as info_merge:
            bootstrap.merge(config, **case["overrides"])
        assert info_merge.value.code == case["code"]
        problems = info_merge.value.context.get("problems", [])
        assert [{k: v for k, v in problem.items() if k != "message"} for problem in problems] == case["problems"]
        return
    if "overrides" in case:
        config = bootstrap.merge(config, **case["overrides"])
        assert bootstrap.to_json(config) == case["merged"]
    assert bootstrap.environment(config, MAPPING["defaults"]) == case["env"]
    if case["argv"] is None:
        for function in (bootstrap.argv, bootstrap.user_data):
            with pytest.raises(InputError, match="names no program") as info_argv:
                function(config)
            assert info_argv.value.code == "invalid-input"
    else:
        assert list(bootstrap.argv(config)) == case["argv"]
    if "cloud_init" in case:
        assert bootstrap.workload_script(config) == case["cloud_init"]["script"]
        assert bootstrap.workload_unit(config) == case["cloud_init"]["unit"]
        assert bootstrap.user_data(config) == case["cloud_init"]["user_data"]


def test_mapping_cases_have_names_of_their_own() -> None:
    names = [case["name"] for case in MAPPING["cases"]]
    assert len(set(names)) == len(names)
    assert MAPPING["defaults"] == {"PATH": bootstrap.DEFAULT_PATH}


@pytest.mark.spec("BOOT-27")
def test_an_image_config_that_makes_too_much() -> None:
    image = {"config": {"Env": [f"A{i}={'x' * 1000}" for i in range(1100)]}}
    with pytest.raises(ManifestInvalid) as info:
        bootstrap.from_image_config(image)
    assert found(info.value) == [("$.config", "DOC-5")]
    many: dict[str, Any] = {"config": {"ExposedPorts": {f"{i}/tcp": {} for i in range(1, 1026)}}}
    with pytest.raises(ManifestInvalid) as info:
        bootstrap.from_image_config(many)
    assert found(info.value) == [("$.config.ExposedPorts", "BOOT-5")]


@pytest.mark.spec("BOOT-29")
def test_overrides_that_make_too_much() -> None:
    config = parse({"env": [f"A{i}={'x' * 100_000}" for i in range(10)], "cmd": ["a"]})
    with pytest.raises(InputError, match=r"together 1[0-9]{6} bytes") as info:
        bootstrap.merge(config, cmd=["x" * 100_000])
    assert info.value.code == "invalid-input"


@pytest.mark.spec("BOOT-32")
def test_overrides_keep_what_they_do_not_know() -> None:
    config = parse({"env": ["A=1", "A=2"], "cmd": ["a"], "com.example.x": [1]})
    assert bootstrap.to_json(bootstrap.merge(config, workdir="/")) == {
        "env": ["A=1", "A=2"],
        "workdir": "/",
        "cmd": ["a"],
        "com.example.x": [1],
    }


# --- the bootstrap disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAPPING["disks"])
def test_disks(case: dict[str, Any]) -> None:
    data = case["document"].encode()
    image = bootstrap.disk_image(data)
    assert (len(image), hashlib.sha256(image).hexdigest()) == (case["size"], case["sha256"])
    assert bootstrap.read_disk_image(image) == data


@pytest.mark.parametrize("case", cases(MAPPING["broken_disks"]))
def test_broken_disks(case: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="first line"):
        bootstrap.read_disk_image(case["content"].encode())


@pytest.mark.spec("BOOT-35")
@given(st.binary(min_size=1, max_size=1200))
def test_a_disk_gives_back_what_it_holds(data: bytes) -> None:
    image = bootstrap.disk_image(data)
    assert len(image) % 512 == 0
    assert image.rstrip(b"\0").endswith(data.rstrip(b"\0"))
    assert bootstrap.read_disk_image(image) == data


@pytest.mark.spec("BOOT-38")
def test_limits_of_a_disk() -> None:
    data = b"x" * limits.BOOTSTRAP_MAX
    assert bootstrap.read_disk_image(bootstrap.disk_image(data)) == data
    for wrong in (b"", data + b"x"):
        with pytest.raises(InputError, match="1 to 1048576 are allowed"):
            bootstrap.disk_image(wrong)
    assert bootstrap.read_disk_image(bytes(1024)) is None
    assert bootstrap.read_disk_image(b"") is None


# --- the seed of cloud-init ------------------------------------------------------------------------------------------

PROBE = """\
#!{python} -IS
import json, os
read = lambda name: open("/proc/self/" + name, "rb").read().split(b"\\0")[:-1]
texts = lambda items: [item.decode() for item in items]
print(json.dumps([texts(read("environ")), texts(read("cmdline")[3:]), os.getcwd(), os.getresuid(), os.getresgid(), os.getgroups()]))
"""
#: What env(1) is asked to drop, and what would do harm if a script trusted it.
AROUND = {"LEAK": "x", "ENV": "/nonexistent", "CDPATH": "/tmp", "IFS": "/", "home": "/x", "groups": "x"}
SHELLS = [shell for shell in ("/bin/sh", "/bin/bash", "/bin/dash", "/bin/ksh") if Path(shell).exists()]


class Ran:
    """What the workload got, in the words of the kernel."""

    def __init__(self, output: bytes) -> None:
        variables, self.arguments, self.cwd, self.uids, self.gids, self.groups = json.loads(output)
        pairs = [entry.split("=", 1) for entry in variables]
        self.env = dict(pairs)
        assert len(self.env) == len(pairs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guest")


def execute(config: BootstrapConfig, directory: Path, shell: str = "/bin/sh") -> subprocess.CompletedProcess[bytes]:
    program = directory / bootstrap.argv(config)[0]
    if program.parent == directory:
        program.write_text(PROBE.format(python=sys.executable))
        program.chmod(0o755)
    script = directory / "workload"
    script.write_text(bootstrap.workload_script(config), encoding="utf-8", newline="")
    around = {"PATH": os.environ["PATH"], **AROUND}
    return subprocess.run([shell, script, "run"], capture_output=True, timeout=60, cwd="/", env=around, check=False)


def run(config: BootstrapConfig, directory: Path, shell: str = "/bin/sh") -> Ran:
    done = execute(config, directory, shell)
    assert (done.returncode, done.stderr) == (0, b"")
    return Ran(done.stdout)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["quoting", "program-with-equals"])
@pytest.mark.spec("BOOT-48", "BOOT-49", "BOOT-13", "BOOT-14")
def test_the_script_with_hostile_texts(name: str, shell: str, directory: Path) -> None:
    case = next(case for case in MAPPING["cases"] if case["name"] == name)
    config = parse(case["bootstrap"])
    # the vector's own program and directory are not there
    workdir = f"{directory}{config.workdir or '/x'}"
    program = "pro=be" if "=" in config.cmd[0] else "probe"
    arguments = case["argv"][1:]
    config = bootstrap.merge(
        config, entrypoint=[program], cmd=arguments, workdir=workdir, env=[f"PATH={directory}", "HOME=/h"]
    )
    ran = run(config, directory, shell)
    assert ran.arguments == arguments
    assert ran.env == case["env"] | {"PATH": str(directory), "HOME": "/h"}
    assert ran.cwd == workdir


HOSTILE = st.text(
    st.sampled_from("'\"\\$`\n\r\t ;&|<>(){}[]*?!#~%=-\x01\x1b\x7fä☃\U0001f600ab0")
    | st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
    max_size=20,
)


@pytest.mark.spec("BOOT-48")
@given(values=st.lists(HOSTILE, max_size=4), arguments=st.lists(HOSTILE, max_size=4), last=HOSTILE)
@settings(max_examples=60, deadline=None)
def test_the_script_with_any_text(values: list[str], arguments: list[str], last: str, directory: Path) -> None:
    # BOOT-1: a path holds no control characters
    name = re.sub(r"[\x00-\x1f\x7f/]", "", last)
    workdir = f"{directory}/d/+{name}"
    env = {f"V{i}": value for i, value in enumerate(values)} | {"PATH": str(directory)}
    variables = [f"{name}={value}" for name, value in env.items()]
    ran = run(parse({"env": variables, "cmd": ["probe", *arguments], "workdir": workdir}), directory)
    assert ran.arguments == arguments
    assert {k: v for k, v in ran.env.items() if k != "HOME"} == env
    assert ran.cwd == workdir


@given(HOSTILE)
def test_words_are_in_the_canonical_form(text: str) -> None:
    bare = re.fullmatch(r"[A-Za-z0-9@%+=:,./_-]+", text) is not None
    assert shlex.quote(text) == (text if bare else "'" + text.replace("'", "'\"'\"'") + "'")


@pytest.mark.parametrize("case", MAPPING["words"])
def test_words(case: dict[str, Any]) -> None:
    assert shlex.quote(case["text"]) == case["quoted"]
    script = bootstrap.workload_script(parse({"cmd": ["a", case["text"]]}))
    assert f" \\\na \\\n{case['quoted']}\n;;\n" in script


@pytest.mark.spec("BOOT-14", "BOOT-16")
def test_the_script_without_anything(directory: Path) -> None:
    ran = run(parse({"cmd": [str(directory / "probe")]}), directory)
    home = pwd.getpwuid(0).pw_dir or "/"
    assert (ran.env, ran.cwd, ran.arguments) == ({"PATH": bootstrap.DEFAULT_PATH, "HOME": home}, "/", [])


@pytest.mark.spec("BOOT-16")
def test_the_directory_is_made(directory: Path) -> None:
    workdir = directory / "new/a b/-c"
    assert run(parse({"cmd": [str(directory / "probe")], "workdir": str(workdir)}), directory).cwd == str(workdir)
    (directory / "file").write_bytes(b"")
    done = execute(parse({"cmd": [str(directory / "probe")], "workdir": str(directory / "file/x")}), directory)
    assert (done.returncode, done.stdout) == (125, b"")


@pytest.mark.spec("BOOT-21")
def test_exit_statuses(directory: Path) -> None:
    (directory / "text").write_bytes(b"")
    (directory / "none").mkdir()
    for cmd, status in (
        (["/bin/sh", "-c", "exit 7"], 7),
        (["/bin/sh", "-c", "kill -KILL $$"], -9),
        (["not-there"], 127),
        (["/not/there"], 127),
        (["not=there"], 127),
        ([str(directory / "text")], 126),
        (["-x"], 127),
        (["--help"], 127),
    ):
        done = subprocess.run(
            ["/bin/sh", "-s", "run"],
            input=bootstrap.workload_script(parse({"cmd": cmd})).encode(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (status, b""), cmd


@pytest.mark.spec("BOOT-17")
@pytest.mark.parametrize("user", ["nobody-there", "0:nobody-there", "nobody-there:0"])
def test_a_user_who_is_not_there(user: str, directory: Path) -> None:
    done = execute(parse({"cmd": ["/bin/echo", "ran"], "user": user}), directory)
    assert (done.returncode, done.stdout) == (125, b"")


# every Linux has these two, but not everywhere with the same numbers
DAEMON = pwd.getpwnam("daemon")
DAEMON_GROUPS = os.getgrouplist("daemon", DAEMON.pw_gid)
BIN = grp.getgrnam("bin")


@pytest.mark.spec("BOOT-17")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        ("daemon", DAEMON.pw_uid, DAEMON.pw_gid, DAEMON_GROUPS, DAEMON.pw_dir),
        (str(DAEMON.pw_uid), DAEMON.pw_uid, DAEMON.pw_gid, DAEMON_GROUPS, DAEMON.pw_dir),
        (f"daemon:{BIN.gr_gid}", DAEMON.pw_uid, BIN.gr_gid, [], DAEMON.pw_dir),
        ("daemon:bin", DAEMON.pw_uid, BIN.gr_gid, [], DAEMON.pw_dir),
        ("54321", 54321, 0, [], "/"),
        ("54321:54322", 54321, 54322, [], "/"),
        ("0", 0, 0, os.getgrouplist("root", 0), pwd.getpwuid(0).pw_dir),
        ("root", 0, 0, os.getgrouplist("root", 0), pwd.getpwuid(0).pw_dir),
    ],
)
def test_the_user(user: str, uid: int, gid: int, groups: list[int], home: str, directory: Path) -> None:
    script = bootstrap.workload_script(
        parse({"cmd": ["/bin/sh", "-c", 'id -u; id -g; id -G; printf %s "$HOME"'], "user": user})
    )
    done = subprocess.run(["/bin/sh", "-s", "run"], input=script.encode(), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found_uid, found_gid, found_groups, found_home = done.stdout.decode().split("\n")
    assert (int(found_uid), int(found_gid), found_home) == (uid, gid, home)
    assert {int(group) for group in found_groups.split()} == {gid, *groups}


@pytest.mark.spec("BOOT-22", "BOOT-21")
@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"EXIT_CODE": "exited", "EXIT_STATUS": "0"}, "0"),
        ({"EXIT_CODE": "exited", "EXIT_STATUS": "42"}, "42"),
        ({"EXIT_CODE": "killed", "EXIT_STATUS": "TERM"}, "143"),
        ({"EXIT_CODE": "killed", "EXIT_STATUS": "KILL"}, "137"),
        ({"EXIT_CODE": "dumped", "EXIT_STATUS": "SEGV"}, "139"),
        ({"EXIT_CODE": "killed", "EXIT_STATUS": "RTMIN+3"}, "255"),
        ({}, "125"),
    ],
)
def test_the_report(variables: dict[str, str], status: str, tmp_path: Path) -> None:
    console = tmp_path / "console"
    script = bootstrap.workload_script(parse({"cmd": ["x"]}))
    assert script.count("/dev/console") == 1
    script = script.replace("/dev/console", str(console))
    subprocess.run(["/bin/sh", "-s", "report"], input=script.encode(), env=variables, timeout=60, check=True)
    assert console.read_text() == f"\novms-exit: {status}\n"


def test_the_script_does_nothing_by_itself(tmp_path: Path) -> None:
    script = bootstrap.workload_script(parse({"cmd": ["/bin/echo", "ran"]}))
    done = subprocess.run(["/bin/sh"], input=script.encode(), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (125, b"")


def test_the_signals_are_those_of_linux() -> None:
    ours = {name: number for name, number in bootstrap.SIGNALS.items() if hasattr(signal, name)}
    assert len(ours) >= 29
    assert all(getattr(signal, name) == number for name, number in ours.items())


@pytest.mark.spec("BOOT-24", "BOOT-47")
def test_the_unit() -> None:
    for stop_signal, line in ((None, "KillSignal=SIGTERM"), ("SIGRTMIN+3", "KillSignal=SIGRTMIN+3")):
        config = BootstrapConfig(cmd=("%n $x",), env=("A=%h",), user="app", workdir="/%t", stop_signal=stop_signal)
        lines = bootstrap.workload_unit(config).splitlines()
        assert line in lines
        assert {"SuccessAction=poweroff", "FailureAction=poweroff", "TimeoutStopSec=20", "KillMode=mixed"} <= set(lines)
        assert "StandardInput=null" in lines
        assert not any("%" in line or "$" in line or "app" in line for line in lines)


@pytest.mark.spec("BOOT-45", "BOOT-46")
@given(VALID.filter(lambda d: (d.get("entrypoint", []) + d.get("cmd", []) or [""])[0]))
@settings(max_examples=50)
def test_user_data_is_the_same_for_json_and_yaml(document: dict[str, Any]) -> None:
    config = parse(document)
    text = bootstrap.user_data(config)
    assert text.isascii()
    assert "\\" not in text
    head, body = text.split("\n", 1)
    assert head == "#cloud-config"
    data = json.loads(body)
    assert yaml.safe_load(text) == data
    script, unit = data["write_files"]
    for item, path, permissions, content in (
        (script, "/etc/ovms/workload", "0700", bootstrap.workload_script(config)),
        (unit, "/etc/systemd/system/ovms.service", "0644", bootstrap.workload_unit(config)),
    ):
        assert {k: v for k, v in item.items() if k != "content"} == {
            "path": path,
            "owner": "root:root",
            "permissions": permissions,
            "encoding": "b64",
        }
        assert base64.b64decode(item["content"], validate=True).decode() == content
    assert data["runcmd"] == [
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "ovms.service"],
        ["systemctl", "start", "--no-block", "ovms.service"],
    ]


@pytest.mark.spec("BOOT-44")
@pytest.mark.parametrize("case", MAPPING["meta_data"])
def test_meta_data(case: dict[str, Any]) -> None:
    if "code" in case:
        with pytest.raises(InputError) as info:
            bootstrap.meta_data(case["instance_id"], case["hostname"])
        assert info.value.code == case["code"]
        return
    text = bootstrap.meta_data(case["instance_id"], case["hostname"])
    assert text == case["meta_data"]
    assert yaml.safe_load(text) == json.loads(text)
    assert json.loads(text) == {"instance-id": case["instance_id"], "local-hostname": case["hostname"]}


@pytest.mark.spec("LIM-1", "BOOT-2", "BOOT-4", "BOOT-6")
@pytest.mark.parametrize(
    ("field", "make", "most"),
    [
        ("env", lambda n: ["A=" + "x" * (n - 2)], limits.ARGUMENT_MAX),
        ("env", lambda n: ["A=1"] * n, limits.ENV_MAX),
        ("cmd", lambda n: ["x" * n], limits.ARGUMENT_MAX),
        ("entrypoint", lambda n: [""] * n, limits.ARGUMENTS_MAX),
        ("exposedPorts", lambda n: ["80/tcp"] * n, limits.PORTS_MAX),
        ("user", lambda n: f"{n}", limits.USER_ID_MAX),
        ("user", lambda n: f"root:{n}", limits.USER_ID_MAX),
        ("workdir", lambda n: "/".ljust(n, "x"), limits.STRING_MAX),
        ("profile", lambda n: "x" * n, limits.NAME_MAX),
    ],
)
def test_each_limit(field: str, make: Any, most: int) -> None:
    parse({field: make(most)})
    with pytest.raises(ManifestInvalid):
        parse({field: make(most + 1)})
