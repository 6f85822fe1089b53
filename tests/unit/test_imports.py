"""Imports go to lower levels only (architecture.md §1), so the folder listing is the architecture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "ovms"

LEVELS = {
    "coredump": 0,
    "errors": 0,
    "fsutil": 0,
    "lazy": 0,
    "process": 0,
    "progress": 0,
    "text": 0,
    "spec": 1,
    "oci": 2,
    "disk": 2,
    "conformance": 2,
    "trust": 3,
    "artifact": 3,
    "vmm": 3,
    "memory": 4,
    "runtime": 5,
    "convert": 5,
    "cli": 6,
}
#: Level 0 among itself: errors is the lowest, all others may use it.
GROUND = {
    "coredump": set[str](),
    "fsutil": {"errors"},
    "process": {"errors", "lazy", "text"},
    "progress": {"errors"},
    "errors": set[str](),
    "lazy": set[str](),
    "text": set[str](),
}
#: The conformance kit tests any runtime, so it may know nothing of ours.
ONLY = {"conformance": {"errors", "spec"}}
ASYNC = {"vmm", "runtime"}
#: The specification's model is pure: nothing of the operating system.
IMPURE = {"os", "io", "pathlib", "socket", "subprocess", "shutil", "tempfile", "fcntl", "mmap", "urllib3", "yaml"}


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of all that a module imports, wherever in it the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(source: str, where: str) -> list[str]:
    """What the module *where* (``disk/qcow2.py``) imports against the rules."""
    parts = where.removesuffix(".py").split("/")
    own = parts[0]
    found = []
    for line, name in imported(ast.parse(source), ["ovms", *parts[:-1]]):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "asyncio" and own not in ASYNC:
            found.append(f"{where}:{line}: asyncio belongs into {' and '.join(sorted(ASYNC))}")
        if own == "spec" and top in IMPURE:
            found.append(f"{where}:{line}: spec is pure, and {top} is not")
        if top != "ovms" or other in ("", "__version__", own):
            continue
        if other not in LEVELS:
            found.append(f"{where}:{line}: {name} has no level")
        elif own in GROUND:
            if other not in GROUND[own]:
                found.append(f"{where}:{line}: {name} is not below {own}")
        elif LEVELS[other] >= LEVELS[own] or other not in ONLY.get(own, LEVELS):
            found.append(f"{where}:{line}: {name} is not below {own}")
    return found


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_imports_go_downwards() -> None:
    found = []
    for path in modules():
        where = str(path.relative_to(SOURCE))
        if where != "__init__.py":
            found += violations(path.read_text(), where)
    assert found == []


def test_every_module_has_a_level() -> None:
    tops = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert tops <= set(LEVELS)
    assert len(modules()) > 20, "the source was not found"


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported(ast.parse((SOURCE / "__init__.py").read_text()), ["ovms"])) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("errors.py", "import ovms.fsutil"),
        ("fsutil.py", "from ovms import process"),
        ("progress.py", "from ovms.spec import limits"),
        ("spec/manifest.py", "from ovms.oci.layout import Layout"),
        ("spec/manifest.py", "from pathlib import Path"),
        ("spec/ramsnap.py", "import os.path"),
        ("oci/layout.py", "from ovms.disk import qcow2"),
        ("disk/layers.py", "from ..artifact import build"),
        ("artifact/build.py", "def f():\n    from ovms.vmm import model\n"),
        ("artifact/build.py", "if TYPE_CHECKING:\n    import ovms.runtime.runtime as r\n"),
        ("vmm/qemu/vmm.py", "from ...memory import snapshot"),
        ("runtime/runtime.py", "from ovms import cli"),
        ("runtime/runtime.py", "from ovms.convert import x"),
        ("conformance/kit.py", "from ovms import fsutil"),
        ("oci/transfer.py", "import asyncio"),
        ("cli/main.py", "from asyncio import run"),
        ("cli/main.py", "from ovms.novelty import x"),
    ],
)
def test_a_violation_is_found(where: str, source: str) -> None:
    assert len(violations(source, where)) == 1


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("process.py", "from ovms.errors import HostError"),
        ("spec/manifest.py", "from ovms.spec import limits\nfrom . import digest"),
        ("spec/ramsnap.py", "import hashlib, struct"),
        ("vmm/qemu/vmm.py", "from ...disk import layers\nfrom .cmdline import build\nimport asyncio"),
        ("conformance/kit.py", "from ovms.spec import manifest\nfrom ovms.errors import OvmsError"),
        ("cli/main.py", "import ovms.runtime.runtime\nfrom ovms import __version__"),
    ],
)
def test_what_is_allowed_passes(where: str, source: str) -> None:
    assert violations(source, where) == []
