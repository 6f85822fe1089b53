"""Manifest files that people write: JSON, or the YAML that says the same."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

from ovms import fsutil
from ovms.errors import FileProblem, JsonInvalid
from ovms.spec import limits, strictjson


def read_document(path: Path) -> Any:
    """The parsed content of a manifest file. A name that ends in ``.json`` is JSON, any other YAML (which JSON is too).

    Raises:
        FileProblem: no such file, a directory, unreadable.
        JsonInvalid: neither JSON nor the JSON subset of YAML, empty, too large.
    """
    return parse_document(read_bytes(path, "the manifest", limits.MANIFEST_MAX), path)


def parse_document(data: bytes, path: Path) -> Any:
    """The parsed content *data* of the manifest file *path*, as :func:`read_document` gives it. Raises :class:`JsonInvalid`."""
    if path.suffix == ".json":
        return strictjson.parse(data, str(path), max_size=limits.MANIFEST_MAX)
    return _parse_yaml(data, str(path))


def read_bytes(path: Path, what: str, max_size: int) -> bytes:
    """The bytes of a document. Raises like :func:`read_document`."""
    try:
        return fsutil.read_input(path, what, max_size=max_size)
    except FileProblem as exc:  # what a document has too much or too little of is a matter of the specification
        rule = {"file-too-large": "DOC-5", "file-empty": "DOC-1"}.get(exc.code)
        if rule is None:
            raise
        raise JsonInvalid(exc.message, rule=rule, **exc.context) from None


#: JSON's types, by their YAML names.
_TYPES: Final = {"scalar": ("str", "int", "float", "bool", "null"), "sequence": ("seq",), "mapping": ("map",)}
_TAG: Final = "tag:yaml.org,2002:"
#: Characters of a number: beyond this Python cannot print it, and a sexagesimal one takes for ever.
_NUMBER_MAX: Final = 1000


def _line(item: Any) -> int:
    return int(item.start_mark.line) + 1


def _construct_map(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


def _parse_yaml(data: bytes, what: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """JSON's types only, no aliases (they multiply), no key twice."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.AliasEvent):
                raise JsonInvalid(f"{what}: aliases are not allowed, in line {_line(event)}", rule="DOC-1")
            self.ovms_depth = getattr(self, "ovms_depth", 0) + 1
            if self.ovms_depth > limits.JSON_DEPTH_MAX:
                raise JsonInvalid(f"{what} is nested deeper than {limits.JSON_DEPTH_MAX} levels", rule="DOC-4")
            try:
                node: Any = super().compose_node(parent, index)
            finally:
                self.ovms_depth -= 1
            if node.tag not in [_TAG + name for name in _TYPES[node.id]]:
                tag = str(node.tag).removeprefix(_TAG)[:80]
                wrong = f"{what}: the type {tag!a} in line {_line(node)} is not one that JSON has there"
                raise JsonInvalid(wrong, rule="DOC-1")
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: dict[Hashable, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                line = _line(key_node)
                if not isinstance(key, str):
                    raise JsonInvalid(f"{what}: the key {ascii(key)[:80]} in line {line} is no string", rule="DOC-1")
                if key in seen:
                    wrong = f"{what} has a key twice in one object: {key[:80]!a}, in line {line}"
                    raise JsonInvalid(wrong, rule="DOC-2")
                seen[key] = self.construct_object(value_node, deep=deep)
            return seen

        def construct_text(self, node: Any) -> str:
            text = str(self.construct_scalar(node))
            if any("\ud800" <= c <= "\udfff" for c in text):  # JSON writes what is beyond 16 bits as a pair of escapes
                try:
                    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
                except UnicodeDecodeError:
                    raise JsonInvalid(
                        f"{what} holds half of a surrogate pair, which is no character, in line {_line(node)}",
                        rule="DOC-3",
                    ) from None
            return text

        def construct_number(self, node: Any) -> int | float:
            if len(node.value) > _NUMBER_MAX:
                raise JsonInvalid(f"{what} holds a number that is too long, in line {_line(node)}", rule="DOC-3")
            if node.tag == _TAG + "int":
                whole = int(self.construct_yaml_int(node))
                if strictjson.beyond_double(str(whole)):
                    raise JsonInvalid(f"{what} holds a number that is too large, in line {_line(node)}", rule="DOC-3")
                return whole
            value = float(self.construct_yaml_float(node))
            if not math.isfinite(value):
                text = f"{what} holds {value}, which JSON does not know, in line {_line(node)}"
                raise JsonInvalid(text, rule="DOC-3")
            return value

    # A date stays the text that it is: JSON has no dates.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor(f"{_TAG}map", _construct_map)
    Loader.add_constructor(f"{_TAG}str", Loader.construct_text)
    for name in ("int", "float"):
        Loader.add_constructor(_TAG + name, Loader.construct_number)
    try:
        return yaml.load(data, Loader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(exc, "problem", None) or "unreadable")[:200]
        raise JsonInvalid(f"{what} is not YAML: {problem}{place}", rule="DOC-1") from None
    except (ValueError, LookupError, RecursionError) as exc:  # such as "!!bool maybe"
        raise JsonInvalid(f"{what} is not YAML that we read: {str(exc)[:200]}", rule="DOC-1") from None
