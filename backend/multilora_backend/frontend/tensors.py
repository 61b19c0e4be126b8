# SPDX-License-Identifier: Apache-2.0
"""From what Triton hands over (numpy arrays, JSON texts) to plain Python values, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from multilora_backend.errors import invalid


def shown(value: object, limit: int = 60) -> str:
    """A client's value as an error message repeats it: never a megabyte."""
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def string(tensors: Mapping[str, np.ndarray], name: str, max_bytes: int) -> str | None:
    """The one string of a STRING tensor of shape [1]; None if the tensor is absent."""
    array = tensors.get(name)
    if array is None:
        return None
    if array.dtype.kind not in "OSU" or array.shape != (1,):
        raise invalid(name, f"must be a STRING tensor of shape [1], got {_described(array)}")
    value = array[0]
    if isinstance(value, str):
        value = encoded(name, value)
    if not isinstance(value, bytes):
        raise invalid(name, f"must be a STRING tensor, got an element of type {type(value).__name__}")
    if len(value) > max_bytes:
        raise invalid(name, f"must have at most {max_bytes} bytes, got {len(value)}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(name, f"is not UTF-8: byte 0x{value[error.start]:02x} at position {error.start}") from error


def flag(tensors: Mapping[str, np.ndarray], name: str) -> bool | None:
    """The value of a BOOL tensor of shape [1]; None if the tensor is absent."""
    array = tensors.get(name)
    if array is None:
        return None
    if array.dtype != np.bool_ or array.shape != (1,):
        raise invalid(name, f"must be a BOOL tensor of shape [1], got {_described(array)}")
    return bool(array[0])


def encoded(field: str, text: str) -> bytes:
    """UTF-8 of a text. JSON escapes can spell half a surrogate pair, which no tokenizer and no response can carry."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(field, "has a lone UTF-16 surrogate, which is no character") from error


def json_value(field: str, text: str) -> object:
    """Strict JSON: no NaN or Infinity, no key twice with different values, no lone surrogates."""

    def constant(name: str) -> object:
        raise invalid(field, f"has the value {name}, which JSON does not know")

    def unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result and result[key] != value:
                raise invalid(field, f"has the key {shown(key)} twice with different values")
            result[key] = value
        return result

    try:
        value = json.loads(text, parse_constant=constant, object_pairs_hook=unambiguous)
        if "\\u" in text:
            encoded(field, json.dumps(value, ensure_ascii=False))
        return value
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise invalid(field, f"is not JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise invalid(field, "is not usable JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise invalid(field, "is not usable JSON: a number has too many digits") from error


def _described(array: np.ndarray) -> str:
    kind = "STRING" if array.dtype.kind in "OSU" else array.dtype.name.upper()
    return f"{kind} of shape {list(array.shape)}"
