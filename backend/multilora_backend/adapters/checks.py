# SPDX-License-Identifier: Apache-2.0
"""Checks of single values in adapter_config.json. All raise MultiloraError that names the field and the limit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from multilora_backend.errors import invalid

T = TypeVar("T")

MAX_RANK = 4096


def rank(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise invalid(field, f"must be a whole number from 1 to {MAX_RANK}, got {short(value)}")
    return value


def alpha(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        raise invalid(field, f"must be a number within 1e9, got {short(value)}")
    return value


def flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(field, f"must be true or false, got {short(value)}")
    return value


def choice(field: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise invalid(field, f"must be one of {', '.join(map(repr, choices))}, got {short(value)}")
    return value


def names(field: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        compile_expression(field, value, value)
        return value
    return strings(field, value)


def layer_expressions(value: Any) -> tuple[re.Pattern[str], ...]:
    names = strings("layers_pattern", [value] if isinstance(value, str) else value)
    return tuple(compile_expression("layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names)


def strings(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise invalid(field, f"must be a string or a list of strings, got {short(value)}")
    return tuple(value)


def tokens(field: str, value: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, ids); a list is the embedding's: its name is "" here."""
    given = value if isinstance(value, dict) else {"": value} if value else {}
    for name, ids in given.items():
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        if not whole or not ids or len(set(ids)) < len(ids):
            raise invalid(field, f"must be lists of different token ids, got {short(ids)} for {name or 'embeddings'}")
    return tuple((name, tuple(ids)) for name, ids in given.items())


def layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise invalid("layers_to_transform", f"must be a layer's index or a list of them, got {short(value)}")
    return tuple(value)


def by_pattern(
    field: str, fields: dict[str, Any], checked: Callable[[str, Any], T]
) -> tuple[tuple[re.Pattern[str], T], ...]:
    """PEFT's rule: a key is a regular expression for the end of the name, from a dot on."""
    given = fields.get(field) or {}
    if not isinstance(given, dict):
        raise invalid(field, f"must map names to numbers, got {short(given)}")
    patterns = {key: compile_expression(field, key, rf"(.*\.)?({key})$") for key in given}
    return tuple((patterns[key], checked(f"{field}[{key!r}]", value)) for key, value in given.items())


def compile_expression(field: str, given: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise invalid(field, f"{short(given)} is not a regular expression: {error}") from error


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
