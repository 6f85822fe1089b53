"""The bootstrap config: what a container's configuration asks of the guest.

Source: ``spec/rfc/ovms-bootstrap.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ovms.errors import Problem
from ovms.spec import limits, strictjson
from ovms.spec.document import Reader, invalid, shown

_ENV: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_PORT: Final = re.compile(r"([0-9]{1,5})/(tcp|udp)")


@dataclass(frozen=True)
class BootstrapConfig:
    """A container's configuration, for the guest's bootstrap to follow."""

    env: tuple[str, ...]
    workdir: str | None
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    exposed_ports: tuple[str, ...]


def parse(data: bytes, what: str = "the bootstrap config") -> BootstrapConfig:
    """Reads and checks a bootstrap config.

    Raises:
        JsonInvalid: not strict JSON.
        ManifestInvalid: breaks the specification; names every problem.
    """
    problems: list[Problem] = []
    document = strictjson.parse(data, what, max_size=limits.BOOTSTRAP_MAX)
    top = Reader(document, "$", problems, rule="BOOT-1", text_rule="BOOT-1")
    config = BootstrapConfig(
        top.arguments("env", 4096, _check_env, rule="BOOT-2"),
        top.string("workdir", rule="BOOT-3"),
        top.arguments("entrypoint", 1024, rule="BOOT-4"),
        top.arguments("cmd", 1024, rule="BOOT-4"),
        top.strings("exposedPorts", 1024, _check_port, rule="BOOT-5"),
    )
    if problems:
        raise invalid(problems, what)
    return config


def _check_env(value: str) -> str | None:
    return None if _ENV.fullmatch(value) else f"must be of the form NAME=value, not {shown(value)}"


def _check_port(value: str) -> str | None:
    match = _PORT.fullmatch(value)
    if match is not None and 1 <= int(match[1]) <= 65535:
        return None
    return f"must be a port such as 80/tcp, not {shown(value)}"
