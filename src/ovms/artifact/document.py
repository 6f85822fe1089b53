"""Manifest files that people write: JSON, or the YAML that says the same."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from ovms import fsutil
from ovms.errors import JsonInvalid
from ovms.spec import limits, strictjson


def read_document(path: Path) -> Any:
    """The parsed content of a manifest file. A name that ends in ``.json`` is JSON, any other YAML (which JSON is too).

    Raises:
        FileProblem: no such file, empty, a directory, too large.
        JsonInvalid: neither JSON nor the JSON subset of YAML.
    """
    data = fsutil.read_input(path, "the manifest", max_size=limits.MANIFEST_MAX)
    if path.suffix == ".json":
        return strictjson.parse(data, str(path), max_size=limits.MANIFEST_MAX)
    return _parse_yaml(data, str(path))


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
                raise JsonInvalid(f"{what}: aliases are not allowed, in line {_line(event)}")
            self.ovms_depth = getattr(self, "ovms_depth", 0) + 1
            if self.ovms_depth > limits.JSON_DEPTH_MAX:
                raise JsonInvalid(f"{what} is nested deeper than {limits.JSON_DEPTH_MAX} levels")
            try:
                return super().compose_node(parent, index)
            finally:
                self.ovms_depth -= 1

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: dict[Hashable, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                line = _line(key_node)
                if not isinstance(key, str):
                    raise JsonInvalid(f"{what}: the key {key!r} in line {line} is no string")
                if key in seen:
                    raise JsonInvalid(f"{what} has a key twice in one object: {key!r}, in line {line}", key=key)
                seen[key] = self.construct_object(value_node, deep=deep)
            return seen

    # A date stays the text that it is: JSON has no dates.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)
    try:
        return yaml.load(data, Loader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise JsonInvalid(f"{what} is not YAML: {getattr(exc, 'problem', None) or 'unreadable'}{place}") from None
    except (ValueError, RecursionError) as exc:
        raise JsonInvalid(f"{what} is not YAML that we read: {exc}") from None
