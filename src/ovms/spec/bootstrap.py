"""The bootstrap config: what a container's configuration asks of the guest, and how it gets there.

Source: ``spec/rfc/ovms-bootstrap.md``. Everything here is pure: configs come in as bytes or parsed JSON, and go out as
values and text. The way of a config:

::

    OCI image config ──from_image_config──► BootstrapConfig ◄──parse── bootstrap config (a part of the artifact)
                                                  │ merge (what the caller of the runtime wants otherwise)
                                                  ▼
                          disk_image (profile ovms-init)   or   user_data, meta_data (profile cloud-init)
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ovms.errors import InputError, ManifestInvalid, Problem, Unsupported
from ovms.lazy import dataclass, field, regex
from ovms.spec import limits, strictjson
from ovms.spec.document import Reader, invalid, kind_of, shown

OVMS_INIT: Final = "ovms-init"
CLOUD_INIT: Final = "cloud-init"
#: Where a config names no profile.
DEFAULT_PROFILE: Final = OVMS_INIT
DEFAULT_STOP_SIGNAL: Final = "SIGTERM"
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_SIGNAL_NAMES: Final = (
    *("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM"),
    *("TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF"),
    *("WINCH", "IO", "PWR", "SYS"),
)
#: Signals by name, with their numbers on Linux x86_64.
SIGNALS: Final[Mapping[str, int]] = {f"SIG{name}": number for number, name in enumerate(_SIGNAL_NAMES, start=1)}

_ENV: Final = regex(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_PORT: Final = regex(r"([1-9][0-9]{0,4})/(tcp|udp)")
_ID: Final = r"0|[1-9][0-9]{0,9}"
_ACCOUNT: Final = rf"({_ID}|[A-Za-z_][A-Za-z0-9_.-]*)"
_USER: Final = regex(rf"{_ACCOUNT}(?::{_ACCOUNT})?")
_REALTIME: Final = regex(r"SIGRTM(IN\+|AX-)([0-9]|[12][0-9]|30)")
_PROFILE: Final = regex(r"[a-z0-9][a-z0-9-]*")
_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOSTNAME: Final = regex(rf"(?=.{{1,64}}\Z){_LABEL}(\.{_LABEL})*")
_UUID: Final = regex(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DISK_LINE: Final = regex(rb"ovms-bootstrap 1 ([1-9][0-9]{0,6})\n")
_SECTOR: Final = 512

#: What a config says; all else are unknown fields.
FIELDS: Final = frozenset(
    {"env", "workdir", "entrypoint", "cmd", "exposedPorts", "user", "stopSignal", "profile"},
)


@dataclass(frozen=True)
class BootstrapConfig:
    """A container's configuration, for the guest's bootstrap to follow; ``extra`` are the fields that we don't know."""

    env: tuple[str, ...] = ()
    workdir: str | None = None
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    user: str | None = None
    stop_signal: str | None = None
    profile: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def parse(data: bytes, what: str = "the bootstrap config") -> BootstrapConfig:
    """Reads and checks a bootstrap config.

    Raises:
        JsonInvalid: not strict JSON.
        ManifestInvalid: breaks the specification; names every problem.
    """
    problems: list[Problem] = []
    document = strictjson.parse(data, what, max_size=limits.BOOTSTRAP_MAX)
    config = _read(Reader(document, "$", problems, rule="BOOT-1", text_rule="BOOT-1"))
    if problems:
        raise _invalid(problems, what)
    return config


def _read(top: Reader) -> BootstrapConfig:
    return BootstrapConfig(
        top.arguments("env", limits.ENV_MAX, _check_env, rule="BOOT-2"),
        top.string("workdir", check=_check_workdir, rule="BOOT-3"),
        top.arguments("entrypoint", limits.ARGUMENTS_MAX, rule="BOOT-4"),
        top.arguments("cmd", limits.ARGUMENTS_MAX, rule="BOOT-4"),
        top.strings("exposedPorts", limits.PORTS_MAX, _check_port, rule="BOOT-5"),
        top.string("user", max_length=limits.NAME_MAX, check=_check_user, rule="BOOT-6"),
        top.string("stopSignal", max_length=limits.NAME_MAX, check=_check_signal, rule="BOOT-7"),
        top.string("profile", max_length=limits.NAME_MAX, check=_check_profile, rule="BOOT-8"),
        {key: value for key, value in top.value.items() if key not in FIELDS},
    )


def _invalid(problems: list[Problem], what: str) -> ManifestInvalid:
    error = invalid(problems, what)
    error.hint = "each is named by its JSON path; the rules are in spec/rfc/ovms-bootstrap.md"
    return error


def _check_env(value: str) -> str | None:
    if _ENV.fullmatch(value):
        return None
    # what follows the name may be a secret, and so may be all of an entry without one (BOOT-52)
    name, equals, _ = value.partition("=")
    return "must be of the form NAME=value" + (f", and {shown(name)} is no such name" if equals else "")


def _check_workdir(value: str) -> str | None:
    return None if value.startswith("/") else f"must be an absolute path, not {shown(value)}"


def _check_port(value: str) -> str | None:
    match = _PORT.fullmatch(value)
    if match is not None and int(match[1]) <= 65535:
        return None
    return f"must be a port such as 80/tcp, not {shown(value)}"


def _check_user(value: str) -> str | None:
    match = _USER.fullmatch(value)
    if match is None:
        return f"must be USER or USER:GROUP, each a name or a number, not {shown(value)}"
    if any(part.isdecimal() and int(part) > limits.USER_ID_MAX for part in value.split(":")):
        return f"must not have a number above {limits.USER_ID_MAX}, as in {shown(value)}"
    return None


def _check_signal(value: str) -> str | None:
    if value in SIGNALS or _REALTIME.fullmatch(value):
        return None
    return f"must be a signal of Linux such as SIGTERM or SIGRTMIN+3, not {shown(value)}"


def _check_profile(value: str) -> str | None:
    if _PROFILE.fullmatch(value):
        return None
    return f"must be a profile such as {OVMS_INIT} or {CLOUD_INIT}, not {shown(value)}"


def to_json(config: BootstrapConfig) -> dict[str, Any]:
    """The document of *config*; what is empty or not given is left out, fields that we don't know come last."""
    known: dict[str, Any] = {
        "profile": config.profile,
        "env": list(config.env),
        "workdir": config.workdir,
        "entrypoint": list(config.entrypoint),
        "cmd": list(config.cmd),
        "user": config.user,
        "stopSignal": config.stop_signal,
        "exposedPorts": list(config.exposed_ports),
    }
    return {key: value for key, value in known.items() if value} | dict(config.extra)


# --- from an OCI image config ----------------------------------------------------------------------------------------


def from_image_config(document: Any, what: str = "the image config") -> BootstrapConfig:
    """The bootstrap config of a container image; *document* is its config blob, parsed by :mod:`ovms.spec.strictjson`.

    Raises:
        ManifestInvalid: the image config asks for something that a bootstrap config can't say; names every problem.
        Unsupported: the image is not one for Linux.
    """
    problems: list[Problem] = []
    top = Reader(_without_null(document), "$", problems, rule="BOOT-25", text_rule="BOOT-1")
    system = top.string("os")
    if system is not None and system != "linux":
        raise Unsupported(f"{what} is of an image for {shown(system)}; only Linux runs in the guest")
    child = top.child("config")
    if child is None:
        if problems:
            raise _invalid(problems, what)
        return BootstrapConfig()
    # an image says "not given" with null and with an empty string, as Go writes them
    child.value = {key: value for key, value in _without_null(child.value).items() if value != ""}
    config = BootstrapConfig(
        env=child.arguments("Env", limits.ENV_MAX, _check_env, rule="BOOT-2"),
        workdir=child.string("WorkingDir", check=_check_workdir, rule="BOOT-3"),
        entrypoint=child.arguments("Entrypoint", limits.ARGUMENTS_MAX, rule="BOOT-4"),
        cmd=child.arguments("Cmd", limits.ARGUMENTS_MAX, rule="BOOT-4"),
        exposed_ports=_image_ports(child),
        user=child.string("User", max_length=limits.NAME_MAX, check=_check_user, rule="BOOT-6"),
        stop_signal=_image_signal(child),
    )
    if not problems and (size := len(document_bytes(config))) > limits.BOOTSTRAP_MAX:
        child.problems.append(Problem("$.config", f"makes {size} bytes; {limits.BOOTSTRAP_MAX} are allowed", "DOC-5"))
    if problems:
        raise _invalid(problems, what)
    return config


def _without_null(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _image_ports(item: Reader) -> tuple[str, ...]:
    ports = item.value.get("ExposedPorts", {})
    if not isinstance(ports, dict):
        item.problem("ExposedPorts", f"must be an object, not {kind_of(ports)}", "BOOT-5")
        return ()
    if len(ports) > limits.PORTS_MAX:
        item.problem("ExposedPorts", f"has {len(ports)} entries; at most {limits.PORTS_MAX} are allowed", "BOOT-5")
        return ()
    found: set[tuple[int, str]] = set()
    for key in ports:
        port, _, protocol = key.partition("/")
        protocol = protocol if "/" in key else "tcp"
        # no field for it, and nothing lost: ports are advice
        checked = f"{port}/tcp" if protocol == "sctp" else f"{port}/{protocol}"
        if wrong := _check_port(checked):
            item.problem("ExposedPorts", wrong, "BOOT-5")
            return ()
        if protocol != "sctp":
            found.add((int(port), protocol))
    # sorted, since the keys of an object have no order
    return tuple(f"{port}/{protocol}" for port, protocol in sorted(found))


def _image_signal(item: Reader) -> str | None:
    value = item.string("StopSignal", max_length=limits.NAME_MAX, rule="BOOT-7")
    if value is None:
        return None
    numbers = {str(number): name for name, number in SIGNALS.items()}
    name = value.upper()
    name = numbers.get(value, name if name.startswith("SIG") else f"SIG{name}")
    if wrong := _check_signal(name):
        item.problem("StopSignal", wrong, "BOOT-7")
        return None
    return name


# --- what the caller wants otherwise ---------------------------------------------------------------------------------


def merge(
    config: BootstrapConfig,
    *,
    env: Sequence[str] | None = None,
    entrypoint: Sequence[str] | None = None,
    cmd: Sequence[str] | None = None,
    workdir: str | None = None,
    user: str | None = None,
) -> BootstrapConfig:
    """*config* with the caller's overrides; None leaves a field as it is.

    A variable takes the place of the one with its name, or comes last. A new entrypoint drops the config's ``cmd``,
    which was written for the old one; an empty entrypoint leaves ``cmd`` alone to be the program.

    Raises:
        InputError: an override, or what comes of it, breaks the specification.
    """
    given = {
        "env": None if env is None else list(env),
        "entrypoint": None if entrypoint is None else list(entrypoint),
        "cmd": None if cmd is None else list(cmd),
        "workdir": workdir,
        "user": user,
    }
    problems: list[Problem] = []
    document = {key: value for key, value in given.items() if value is not None}
    new = _read(Reader(document, "$.overrides.bootstrap", problems, rule="BOOT-1", text_rule="BOOT-1"))
    if problems:
        first = problems[0]
        raise InputError(
            f"{first.path}: {first.message}",
            hint="the rules are in spec/rfc/ovms-bootstrap.md",
            problems=[problem.to_json() for problem in problems],
        )
    variables = environment(new, _variables(config.env))
    merged = BootstrapConfig(
        # untouched without an override: a config may well name a variable twice
        env=config.env if env is None else tuple(f"{name}={value}" for name, value in variables.items()),
        workdir=config.workdir if workdir is None else new.workdir,
        entrypoint=config.entrypoint if entrypoint is None else new.entrypoint,
        cmd=new.cmd if cmd is not None or entrypoint is not None else config.cmd,
        exposed_ports=config.exposed_ports,
        user=config.user if user is None else new.user,
        stop_signal=config.stop_signal,
        profile=config.profile,
        extra=config.extra,
    )
    if len(merged.env) > limits.ENV_MAX:
        raise InputError(
            f"$.overrides.bootstrap.env: together {len(merged.env)} variables; at most {limits.ENV_MAX} may be"
        )
    if (size := len(document_bytes(merged))) > limits.BOOTSTRAP_MAX:
        raise InputError(f"$.overrides.bootstrap: together {size} bytes; at most {limits.BOOTSTRAP_MAX} may be")
    return merged


def document_bytes(config: BootstrapConfig) -> bytes:
    """The bytes of *config* as we write them."""
    return strictjson.canonical(to_json(config))


def argv(config: BootstrapConfig) -> tuple[str, ...]:
    """The workload's arguments: ``entrypoint``, then ``cmd``; the first one is the program.

    Raises:
        InputError: there is no program.
    """
    arguments = config.entrypoint + config.cmd
    if not arguments or not arguments[0]:
        raise InputError(
            "the bootstrap config names no program: 'entrypoint' and 'cmd' are empty",
            hint="name a command when you start the instance",
        )
    return arguments


def environment(config: BootstrapConfig, defaults: Mapping[str, str]) -> dict[str, str]:
    """The workload's variables: *defaults*, and over them those of *config*; of two with one name the last counts."""
    return {**defaults, **_variables(config.env)}


def _variables(env: Sequence[str]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in env)


# --- profile ovms-init: the bootstrap disk ---------------------------------------------------------------------------


def disk_image(data: bytes) -> bytes:
    """The bootstrap disk that holds the document *data*: a line with its length, the document, zeroes up to a sector."""
    if not 1 <= len(data) <= limits.BOOTSTRAP_MAX:
        raise InputError(f"the bootstrap config has {len(data)} bytes; 1 to {limits.BOOTSTRAP_MAX} are allowed")
    content = b"ovms-bootstrap 1 %d\n%b" % (len(data), data)
    return content + bytes(-len(content) % _SECTOR)


def read_disk_image(image: bytes) -> bytes | None:
    """The document on a bootstrap disk; None when *image* begins like no bootstrap disk.

    Raises:
        InputError: it begins like one, and is none.
    """
    if not image.startswith(b"ovms-bootstrap "):
        return None
    match = _DISK_LINE.match(image)
    if match is None or int(match[1]) > limits.BOOTSTRAP_MAX or match.end() + int(match[1]) > len(image):
        raise InputError(
            "the first line of the bootstrap disk is not 'ovms-bootstrap 1 LENGTH', or its length is wrong"
        )
    return image[match.end() : match.end() + int(match[1])]


# --- profile cloud-init: the NoCloud seed ----------------------------------------------------------------------------


def host_name(name: str, instance_id: str) -> str:
    """What the guest of the instance *name* is called: by that where it is a host name, else by the instance's ID."""
    return name if _HOSTNAME.fullmatch(name) else instance_id


def meta_data(instance_id: str, hostname: str, public_keys: Sequence[str] = ()) -> str:
    """The seed's ``meta-data``; *public_keys* (of SSH) are for the guest's first user, and no part of a profile.

    Raises:
        InputError: not a UUID, or no host name.
    """
    if _UUID.fullmatch(instance_id) is None:
        raise InputError(f"an instance ID must be a UUID in lower case, not {shown(instance_id)}")
    if _HOSTNAME.fullmatch(hostname) is None:
        raise InputError(f"a host name has letters, digits and '-' between dots, not {shown(hostname)}")
    keys = {"public-keys": list(public_keys)} if public_keys else {}
    return _as_yaml({"instance-id": instance_id, "local-hostname": hostname, **keys})


def user_data(config: BootstrapConfig) -> str:
    """The seed's ``user-data``: a script that becomes the workload, and a systemd unit that runs it.

    Raises:
        InputError: there is no program.
    """
    files = {
        "/etc/ovms/workload": ("0700", workload_script(config)),
        "/etc/systemd/system/ovms.service": ("0644", workload_unit(config)),
    }
    document = {
        "write_files": [
            {
                "path": path,
                "owner": "root:root",
                "permissions": permissions,
                # base64 keeps what a stranger wrote away from every parser of YAML
                "encoding": "b64",
                "content": base64.b64encode(text.encode()).decode(),
            }
            for path, (permissions, text) in files.items()
        ],
        "runcmd": [
            ["systemctl", "daemon-reload"],
            ["systemctl", "enable", "ovms.service"],
            ["systemctl", "start", "--no-block", "ovms.service"],
        ],
    }
    return "#cloud-config\n" + _as_yaml(document)


def _as_yaml(value: Any) -> str:
    # JSON in ASCII that needs no escape is read alike by parsers of YAML 1.1, YAML 1.2 and JSON
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"


_UNIT: Final = """\
[Unit]
Description=The workload of this OVMS artifact
Wants=network-online.target
After=network-online.target
SuccessAction=poweroff
FailureAction=poweroff

[Service]
Type=simple
ExecStart=/bin/sh /etc/ovms/workload run
ExecStopPost=/bin/sh /etc/ovms/workload report
KillMode=mixed
KillSignal={stop_signal}
TimeoutStopSec=20
StandardInput=null
StandardOutput=file:/dev/console
StandardError=inherit

[Install]
WantedBy=multi-user.target
"""

_SCRIPT: Final = """\
#!/bin/sh
# Made from the artifact's bootstrap config (spec/rfc/ovms-bootstrap.md, profile cloud-init).
case ${{1-}} in
run)
{account}
{enter}
exec {switch}/usr/bin/env -i \\
{words}
;;
report)
case ${{EXIT_CODE-}} in
exited) status=${{EXIT_STATUS-125}} ;;
killed | dumped)
case ${{EXIT_STATUS-}} in
{signals}
*) status=255 ;;
esac ;;
*) status=125 ;;
esac
printf '\\novms-exit: %s\\n' "$status" >/dev/console
;;
*) exit 125 ;;
esac
"""


def workload_unit(config: BootstrapConfig) -> str:
    """The systemd unit that runs the workload, tells how it ended, and powers the VM off."""
    return _UNIT.format(stop_signal=config.stop_signal or DEFAULT_STOP_SIGNAL)


def workload_script(config: BootstrapConfig) -> str:
    """The POSIX shell script that becomes the workload when it is called with ``run``.

    Every text of the config stands in it as one quoted word, so that the shell reads back exactly its characters.

    Raises:
        InputError: there is no program.
    """
    arguments = argv(config)
    variables = environment(config, {"PATH": DEFAULT_PATH, "HOME": ""})
    given = _variables(config.env)
    words = [
        # not known before the guest looks into its /etc/passwd
        '"HOME=$home"' if name == "HOME" and name not in given else shlex.quote(f"{name}={value}")
        for name, value in variables.items()
    ]
    if "=" in arguments[0]:  # env(1) would take it for a variable
        words.append("/usr/bin/nice -n 0 --")
    words += map(shlex.quote, arguments)
    signals = (f"{name}) status={128 + number} ;;" for number, name in enumerate(_SIGNAL_NAMES, start=1))
    account, switch = _account_lines(config.user)
    return _SCRIPT.format(
        account=account,
        enter=_enter_lines(config.workdir),
        switch=switch,
        words=" \\\n".join(words),
        signals="\n".join(signals),
    )


def _enter_lines(workdir: str | None) -> str:
    if workdir is None:
        return "cd /"
    word = shlex.quote(workdir)
    return f"mkdir -p -- {word} && cd {word} || exit 125"


def _account_lines(user: str | None) -> tuple[str, str]:
    """The lines that find uid, gid and home of *user*, and the command that becomes it."""
    name, _, group = (user or "0").partition(":")
    # a number needs no entry in /etc/passwd, a name does
    fallback = f"{{ entry=x:x:{name}:0::/: groups=--clear-groups; }}" if name.isdecimal() else "exit 125"
    lines = [
        "groups=--init-groups",
        f"entry=$(getent passwd {name}) || {fallback}",
        "entry=${entry#*:*:}",
        "uid=${entry%%:*}",
        "entry=${entry#*:}",
        "gid=${entry%%:*}",
        "entry=${entry#*:*:}",
        "home=${entry%%:*}",
        "home=${home:-/}",
    ]
    if group:
        fallback = f"group=x:x:{group}:" if group.isdecimal() else "exit 125"
        lines += [
            f"group=$(getent group {group}) || {fallback}",
            "group=${group#*:*:}",
            "gid=${group%%:*}",
            "groups=--clear-groups",
        ]
    # checked in Python, not here: neither a name nor a number of the grammar needs quotes
    switch = '/usr/bin/setpriv --reuid "$uid" --regid "$gid" "$groups" -- ' if user is not None else ""
    return "\n".join(lines), switch
