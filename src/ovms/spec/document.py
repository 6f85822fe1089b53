"""Typed fields out of untrusted JSON documents: every problem is noted, with its JSON path and the rule that it breaks.

Rules are the numbers of the requirements in ``spec/rfc/``, such as MAN-4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from ovms.errors import ManifestInvalid, Problem
from ovms.lazy import regex
from ovms.spec import limits

#: Says what is wrong with a value; None when nothing is.
Check = Callable[[Any], str | None]

_TIME: Final = regex(
    r"[0-9]{4}(-[0-9]{2}){2}[Tt][0-9]{2}(:[0-9]{2}){2}(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_CONTROL: Final = regex(r"[\x00-\x1f\x7f]")
_KINDS: Final = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Reader:
    """Takes typed fields out of one object, and notes each one that is missing or wrong.

    ``rule`` is what a field breaks that is wrong, unless the call names another; ``text_rule`` what a string with
    control characters, or a longer one than any string may be, breaks; ``missing_rule`` what a field that is not there
    does, where that is a matter of its own.
    """

    def __init__(
        self,
        value: Any,
        path: str,
        problems: list[Problem],
        *,
        rule: str,
        text_rule: str,
        missing_rule: str | None = None,
    ) -> None:
        self.path = path
        self.problems = problems
        self.rule = rule
        self.text_rule = text_rule
        self.missing_rule = missing_rule
        self.ok = isinstance(value, dict)
        self.value: dict[str, Any] = value if self.ok else {}
        if not self.ok:
            problems.append(Problem(path, f"must be an object, not {kind_of(value)}", _type_rule(value, rule)))

    def problem(self, key: str, text: str, rule: str | None = None) -> None:
        """Notes a problem of the field *key*."""
        self.problems.append(Problem(f"{self.path}.{key}", text, rule or self.rule))

    def _typed(self, key: str, kind: type, required: bool, rule: str | None) -> Any:
        if key not in self.value:
            if required and self.ok:
                self.problem(key, "is required", self.missing_rule or rule)
            return None
        value = self.value[key]
        # bool is a subclass of int, and 1 is no boolean
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            wanted = "true or false" if kind is bool else _KINDS[kind]
            broken = "DOC-6" if kind is int and isinstance(value, float) else _type_rule(value, rule or self.rule)
            self.problem(key, f"must be {wanted}, not {kind_of(value)}", broken)
            return None
        return value

    def string(
        self,
        key: str,
        *,
        required: bool = False,
        empty: bool = False,
        max_length: int | None = None,
        check: Check | None = None,
        rule: str | None = None,
    ) -> str | None:
        """A string without control characters, of at most *max_length* characters."""
        value: str | None = self._typed(key, str, required, rule)
        if value is None:
            return None
        if not value and not empty:
            self.problem(key, "must not be empty", rule)
        elif max_length is not None and len(value) > max_length:
            self.problem(key, _too_long(value, max_length), rule)
        elif len(value) > limits.STRING_MAX:
            self.problem(key, _too_long(value, limits.STRING_MAX), self.text_rule)
        elif has_control_characters(value):
            self.problem(key, "holds control characters", self.text_rule)
        elif check is not None and (wrong := check(value)):
            self.problem(key, wrong, rule)
        else:
            return value
        return None

    def integer(self, key: str, low: int, high: int, *, required: bool = False, rule: str | None = None) -> int | None:
        """An integer from *low* to *high*."""
        value: int | None = self._typed(key, int, required, rule)
        if value is not None and not low <= value <= high:
            self.problem(key, f"must be from {low} to {high}, not {_shown_number(value)}", rule)
            return None
        return value

    def boolean(self, key: str, default: bool, *, rule: str | None = None) -> bool:
        """A boolean."""
        value: bool | None = self._typed(key, bool, False, rule)
        return default if value is None else value

    def choice(self, key: str, choices: type[StrEnum], *, required: bool = False, rule: str | None = None) -> Any:
        """A member of *choices*."""
        value = self.string(key, required=required, rule=rule)
        if value is None:
            return None
        try:
            return choices(value)
        except ValueError:
            self.problem(key, f"must be one of {', '.join(choices)}, not {shown(value)}", rule)
            return None

    def items(self, key: str, max_items: int, *, required: bool = False, rule: str | None = None) -> list[Any]:
        """A list of at most *max_items* entries."""
        value: list[Any] | None = self._typed(key, list, required, rule)
        if value is not None and len(value) > max_items:
            self.problem(key, f"has {len(value)} entries; at most {max_items} are allowed", rule)
            return []
        return value or []

    def strings(self, key: str, max_items: int, check: Check | None = None, *, required: bool = False,
                rule: str | None = None) -> tuple[str, ...]:  # fmt: skip
        """A list of strings without control characters."""

        def plain(text: str) -> str | None:
            if len(text) > limits.STRING_MAX:
                return _too_long(text, limits.STRING_MAX)
            return "holds control characters" if has_control_characters(text) else None

        return self._strings(key, max_items, (plain, check), required, rule, self.text_rule)

    def arguments(self, key: str, max_items: int, check: Check | None = None, *, rule: str | None = None
                  ) -> tuple[str, ...]:  # fmt: skip
        """A list of strings that a program takes as arguments: they hold anything but NUL."""

        def argument(text: str) -> str | None:
            if len(text) > limits.ARGUMENT_MAX:
                return _too_long(text, limits.ARGUMENT_MAX)
            return "holds a NUL character" if "\0" in text else None

        return self._strings(key, max_items, (argument, check), False, rule, rule or self.rule)

    def _strings(self, key: str, max_items: int, checks: Iterable[Check | None], required: bool, rule: str | None,
                 text_rule: str) -> tuple[str, ...]:  # fmt: skip
        answer = []
        for i, item in enumerate(self.items(key, max_items, required=required, rule=rule)):
            if not isinstance(item, str):
                self.problem(
                    f"{key}[{i}]", f"must be a string, not {kind_of(item)}", _type_rule(item, rule or self.rule)
                )
                continue
            for check, broken in zip(checks, (text_rule, rule), strict=True):
                if check is not None and (wrong := check(item)):
                    self.problem(f"{key}[{i}]", wrong, broken)
                    break
            answer.append(item)
        return tuple(answer)

    def child(self, key: str, *, required: bool = False, rule: str | None = None) -> Reader | None:
        """The object in a field; None without one."""
        if key not in self.value:
            if required and self.ok:
                self.problem(key, "is required", self.missing_rule or rule)
            return None
        child = self._reader(self.value[key], f"{self.path}.{key}", rule)
        return child if child.ok else None

    def children(self, key: str, max_items: int, *, required: bool = False, rule: str | None = None) -> list[Reader]:
        """The objects in a list."""
        items = self.items(key, max_items, required=required, rule=rule)
        readers = [self._reader(item, f"{self.path}.{key}[{i}]", rule) for i, item in enumerate(items)]
        return [reader for reader in readers if reader.ok]

    def _reader(self, value: Any, path: str, rule: str | None) -> Reader:
        return Reader(
            value,
            path,
            self.problems,
            rule=rule or self.rule,
            text_rule=self.text_rule,
            missing_rule=self.missing_rule,
        )


def _type_rule(value: Any, rule: str) -> str:
    return "DOC-8" if value is None else rule


def _too_long(text: str, allowed: int) -> str:
    return f"has {len(text)} characters; at most {allowed} are allowed"


def _shown_number(value: int) -> str:
    return str(value) if value.bit_length() <= 64 else "a number of more than 64 bits"


def kind_of(value: Any) -> str:
    """What a parsed JSON value is, in JSON's words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def shown(text: str) -> str:
    """A stranger's text as it may stand in a message: short, and in ASCII."""
    return ascii(text if len(text) <= 60 else text[:57] + "…")


def has_control_characters(text: str) -> bool:
    """Whether *text* holds what a terminal would act on."""
    return _CONTROL.search(text) is not None


def from_base64(text: str) -> bytes | None:
    """The bytes that *text* is the base64 of; None where it is none, or not in the one form that they have."""
    import base64
    import binascii

    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    # Python takes 'YR==' for 'YQ==': the bits that are left over must be zero
    return data if base64.b64encode(data).decode() == text else None


def check_time(value: str) -> str | None:
    """Whether *value* is a time as in RFC 3339."""
    # fromisoformat takes far more than RFC 3339 does (week dates, no seconds), but no leap second
    if _TIME.fullmatch(value):
        with contextlib.suppress(ValueError):
            seconds = "59" if value[17:19] == "60" else value[17:19]
            datetime.fromisoformat(f"{value[:17]}{seconds}{value[19:]}".upper())
            return None
    return f"must be a time as in RFC 3339, such as 2026-01-31T12:00:00Z, not {shown(value)}"


def invalid(problems: list[Problem], what: str) -> ManifestInvalid:
    """The error that names every problem of a document."""
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = sorted(problems, key=lambda problem: problem[:2])[: limits.PROBLEMS_MAX]
    return ManifestInvalid(
        f"{what} has {count}" + (f", of which {len(listed)} are listed" if len(listed) < len(problems) else ""),
        problems=listed,
        hint="each is named by its JSON path; the rules are in spec/rfc/ovms-v0.1.md",
    )
