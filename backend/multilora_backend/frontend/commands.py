# SPDX-License-Identifier: Apache-2.0
"""One request to the model multilora_adapters to one checked `AdapterCommand`.

A command is a JSON object in the `request` tensor, or the same keys as request parameters, which is what the keys of
/generate become. Parameters cannot be lists, so a list may be a string with commas as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from multilora_backend.config import Config
from multilora_backend.errors import invalid
from multilora_backend.frontend.routing import MAX_TENANT_LENGTH, name_of_one, printable, without_reserved
from multilora_backend.frontend.sampling import Flag, Number
from multilora_backend.frontend.tensors import json_value, shown, string
from multilora_backend.protocol import AdapterArguments, AdapterCommand

MAX_REQUEST_BYTES = 64 * 1024
MAX_SOURCE_LENGTH = 2048
MAX_TOKEN_LENGTH = 1024
MAX_TENANTS = 1000
MAX_TIMEOUT_S = 3600
MAX_LISTED = 1000
"""20 us each on the step loop."""

STATES = ("cold", "loading", "active", "evicting", "failed")


class _Kind(Protocol):
    def read(self, name: str, value: object) -> Any: ...


@dataclass(frozen=True)
class _Text:
    max_length: int

    def read(self, name: str, value: object) -> str:
        return printable(name, value, self.max_length)


class _Name:
    def read(self, name: str, value: object) -> str:
        text = name_of_one(name, value)  # a sum, which requests may name, has no life of its own
        if not text:
            raise invalid(name, "must not be empty")
        return text


class _State:
    def read(self, name: str, value: object) -> str:
        if value not in STATES:
            raise invalid(name, f"must be one of {', '.join(STATES)}, got {shown(value)}")
        return str(value)


class _Tenants:
    def read(self, name: str, value: object) -> tuple[str, ...]:
        values = value.split(",") if isinstance(value, str) else value
        if not isinstance(values, list):
            raise invalid(name, f"must be a list of tenants, or their names with commas, got {shown(value)}")
        if len(values) > MAX_TENANTS:
            raise invalid(name, f"must have at most {MAX_TENANTS} tenants, got {len(values)}")
        texts = [printable(name, each, MAX_TENANT_LENGTH).strip() for each in values]
        return tuple(dict.fromkeys(text for text in texts if text))


_KINDS: dict[str, _Kind] = {
    "name": _Name(),
    "alias": _Name(),
    "target": _Name(),
    "source": _Text(MAX_SOURCE_LENGTH),
    "version": _Text(128),
    "pinned": Flag(),
    "tenants": _Tenants(),
    "prefix": _Text(256),
    "state": _State(),
    "offset": Number(True, 0, 2**31 - 1),
    "limit": Number(True, 1, MAX_LISTED),
    "wait": Flag(),
    "timeout_s": Number(False, 0, MAX_TIMEOUT_S),
}
_WAITS = ("wait", "timeout_s")

ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "load": (("name",), ("source", "version", "pinned", "tenants", *_WAITS)),
    "unload": (("name",), _WAITS),
    "list": ((), ("prefix", "state", "offset", "limit")),
    "show": (("name",), ()),
    "pin": (("name",), _WAITS),
    "unpin": (("name",), ()),
    "alias": (("alias", "target"), ()),
    "unalias": (("alias",), ()),
    "preload": (("name",), _WAITS),
}
"""Action -> the arguments that it needs, and those that it may have."""


def parse(
    request_id: int, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, object], config: Config
) -> AdapterCommand:
    """Raises MultiloraError(INVALID_ARG) that names the argument. `config`: whose headers are no arguments."""
    values = dict(_values(tensors, without_reserved(parameters, config)))
    token = _token(values.pop("token", None) or "")
    action = values.pop("action", None)
    if not isinstance(action, str) or action not in ACTIONS:
        raise invalid("action", f"must be one of {', '.join(ACTIONS)}, got {shown(action)}")
    needed, optional = ACTIONS[action]
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in needed and name not in optional:
            raise invalid(action, _unknown(name, [*needed, *optional]))
    for name in needed:
        if name not in given:
            raise invalid(name, f"is required by {action}")
    arguments = {name: _KINDS[name].read(name, value) for name, value in given.items()}
    return AdapterCommand(request_id, action, AdapterArguments(**arguments), token)


def _values(tensors: Mapping[str, np.ndarray], parameters: dict[str, object]) -> Mapping[str, object]:
    for name in tensors:
        if name != "request":
            raise invalid(name, "is not an input of this model")
    text = string(tensors, "request", MAX_REQUEST_BYTES)
    if text is None:
        return parameters
    if parameters:
        raise invalid("request", f"must not be sent together with request parameters, got {shown([*parameters])}")
    value = json_value("request", text)
    if not isinstance(value, dict):
        raise invalid("request", f"must be one JSON object, got {shown(value)}")
    return value


def _token(value: object) -> str:
    """Errors do not repeat it: they are logged."""
    if not isinstance(value, str) or len(value) > MAX_TOKEN_LENGTH or not value.isprintable():
        raise invalid("token", f"must be a string of at most {MAX_TOKEN_LENGTH} printable characters")
    return value


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f", did you mean {close[0]}?" if close else f"; known are {', '.join(known) or 'none'}"
    return f"unknown argument {shown(name)}{meant}"
