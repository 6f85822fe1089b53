"""The published JSON schemas, as a validator with ECMA-262's regular expressions understands them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

SPEC: Final = Path(__file__).parent.parent.parent / "spec"


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[ValidationError]:
    # In ECMA-262 "$" is the end; in Python it is also before a line end that is the last character.
    if isinstance(instance, str) and not re.search(pattern.replace("$", r"\Z"), instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


#: Draft 2020-12, with ECMA-262's "$".
Validator: Final = extend(Draft202012Validator, {"pattern": _pattern})


@cache
def validator(name: str, *, formats: bool = False) -> Any:
    """The validator of ``spec/schemas/<name>.v1.json``; with *formats* it asserts them."""
    schema = json.loads((SPEC / "schemas" / f"{name}.v1.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Validator(schema, format_checker=FormatChecker() if formats else None)
