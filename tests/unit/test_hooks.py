"""No way around a policy: every call that pulls, completes or builds from an artifact hands its guard on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

SOURCE: Final = Path(__file__).parents[2] / "src" / "ovms"
#: Function → the modules that it is imported from.
GUARDED: Final = {
    "pull": {"resolve", "places"},
    "resolve": {"resolve", "places"},
    "complete": {"ram"},
    "Builder": {"build"},
}
#: Transfers know nothing of guards: they ask what an Admission gives them.
CHECKED: Final = {"pull": {"transfer"}, "fetch": {"importing"}}
#: What starts a VM, or reads what a guest has written, from an artifact: each of these has to ask.
USERS: Final = {
    "runtime/runtime.py": {"_start", "_plan", "start_again"},
    "runtime/starting.py": {"_find"},
    "runtime/warm.py": {"_allow", "_make"},
    "runtime/local.py": {"start"},
    "artifact/build.py": {"_from_artifact"},
    "artifact/ram.py": {"complete"},
    "cli/commands/export.py": {"run"},
    "cli/commands/snapshot.py": {"_flatten"},
}


def imports(tree: ast.AST) -> dict[str, str]:
    """Name in a module → the dotted name that it stands for."""
    answer = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            answer.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return answer


def calls(tree: ast.AST, own: str) -> Iterator[tuple[int, str, str, set[str | None]]]:
    """(line, module, function, keywords) of the calls of what is imported, or is the module's own."""
    names = imports(tree)
    here = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        if isinstance(node.func, ast.Name):
            target = names.get(node.func.id) or (f"{own}.{node.func.id}" if node.func.id in here else "")
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            target = f"{names.get(node.func.value.id, '')}.{node.func.attr}"
        else:
            continue
        module, _, function = target.rpartition(".")
        yield node.lineno, module.rpartition(".")[2], function, keywords


def unguarded(source: str, where: str) -> list[str]:
    own = where.rpartition("/")[2].removesuffix(".py")
    found = []
    for line, module, function, keywords in calls(ast.parse(source), own):
        if module in GUARDED.get(function, ()) and "guard" not in keywords:
            found.append(f"{where}:{line}: {module}.{function} without guard=")
        if module in CHECKED.get(function, ()) and "check" not in keywords:
            found.append(f"{where}:{line}: {module}.{function} without check=")
    return found


def test_every_call_hands_its_guard_on() -> None:
    seen, found = 0, []
    for path in sorted(SOURCE.rglob("*.py")):
        where, source = str(path.relative_to(SOURCE)), path.read_text()
        found += unguarded(source, where)
        own = path.stem
        seen += sum(
            module in {**GUARDED, **CHECKED}.get(function, ())
            for _, module, function, _ in calls(ast.parse(source), own)
        )
    assert found == []
    assert seen >= 10, "the calls were not found"


@pytest.mark.parametrize("where", USERS)
def test_whoever_uses_an_artifact_asks(where: str) -> None:
    functions = {
        node.name: ast.dump(node)
        for node in ast.walk(ast.parse((SOURCE / where).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    silent = [name for name in USERS[where] if "guard" not in functions[name]]
    assert silent == []


@pytest.mark.parametrize(
    "source",
    [
        "from ovms.artifact.resolve import pull\npull(layout, connect, 'x')",
        "from ovms.artifact import resolve\nresolve.resolve(layout, connect, 'x', gate=None)",
        "if True:\n    from ovms.artifact import ram as r\n    r.complete(layout)",
        "from ovms.artifact.build import Builder as B\nB(layout, connect)",
        "from ovms.oci import transfer\ntransfer.pull(layout, client, name)",
    ],
)
def test_the_test_itself_finds_them(source: str) -> None:
    assert len(unguarded(source, "cli/x.py")) == 1
    assert unguarded(source.replace(")", ", guard=g, check=c)"), "cli/x.py") == []
