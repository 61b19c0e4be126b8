# SPDX-License-Identifier: Apache-2.0
"""Who asks, for which adapter, how urgently: what a request says beside its prompt and its sampling.

Each may be a tensor (the adapter), a request parameter or a key of the `sampling_parameters` JSON. If the operator
names headers for the tenant and the priority, those alone count: a gateway sets them, and a client must not be able
to say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from multilora_backend.composition import MAX_LENGTH, Part, is_composed, parse, parse_json, spelled
from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.sampling import Number
from multilora_backend.frontend.tensors import json_value, shown, string
from multilora_backend.protocol import ModelCard

MAX_NAME_LENGTH = 256
MAX_TENANT_LENGTH = 128
PRIORITY = Number(True, -100, 100)

ADAPTER_NAMES = ("lora_name", "adapter")
KEYS = (*ADAPTER_NAMES, "request_priority", "tenant")
_RESERVED = frozenset({"priority", "timeout", "headers", "binary_data_output"})
_RESERVED_PREFIXES = ("triton_", "sequence_", "x-")
"""Triton's own, and `x-`, since HTTP headers that an operator lets Triton forward arrive as parameters too."""


@dataclass(frozen=True)
class Routing:
    adapter: str
    """Empty for the base model."""
    tenant: str
    priority: int


def without_reserved(parameters: Mapping[str, object], config: Config) -> dict[str, object]:
    """The request parameters that are the client's to set, less Triton's own and forwarded headers."""
    headers = {config.tenant_header.lower(), config.priority_header.lower()} - {""}
    return {
        name: value
        for name, value in parameters.items()
        if name not in _RESERVED and not name.lower().startswith(_RESERVED_PREFIXES) and name.lower() not in headers
    }


def read_routing(
    tensors: Mapping[str, np.ndarray],
    parameters: Mapping[str, object],
    options: Mapping[str, object],
    card: ModelCard,
    config: Config,
) -> Routing:
    """`parameters` are all that came with the request, `options` is the JSON. Raises MultiloraError."""
    own = without_reserved(parameters, config)
    given = {name: string(tensors, name, MAX_LENGTH) for name in ADAPTER_NAMES}
    tenant = _governed("tenant", config.tenant_header, parameters, own, options)
    priority = _governed("request_priority", config.priority_header, parameters, own, options)
    return Routing(
        adapter=_adapter([given, own, options], card),
        tenant="" if tenant is None else printable("tenant", tenant, MAX_TENANT_LENGTH),
        priority=0 if priority is None else int(PRIORITY.read("request_priority", priority)),
    )


def printable(field: str, value: object, max_length: int) -> str:
    """A string that can stand in a log, a label and an error message."""
    if not isinstance(value, str):
        raise invalid(field, f"must be a string, got {shown(value)}")
    if len(value) > max_length:
        raise invalid(field, f"must have at most {max_length} characters, got {len(value)}")
    if not value.isprintable():
        raise invalid(field, f"must have printable characters only, got {shown(value)}")
    return value


def adapter_name(field: str, value: object) -> str:
    """A client names adapters, one or several with weights."""
    if isinstance(value, str) and is_composed(value) and value.lstrip()[:1] in ("{", "["):
        value = json_value(field, value)
    if isinstance(value, dict | list):
        return _composed(field, parse_json(field, value))
    if isinstance(value, str) and is_composed(value):
        return _composed(field, parse(field, value))
    return name_of_one(field, value)


def name_of_one(field: str, value: object) -> str:
    """The name of one adapter, or empty; a path is refused before anybody looks at it."""
    name = printable(field, value, MAX_NAME_LENGTH)
    if "/" in name or "\\" in name or ".." in name:
        raise invalid(field, f"must be the name of an adapter, not a path, got {shown(name)}")
    if is_composed(name):
        raise invalid(field, f"must be the name of one adapter, got {shown(name)}")
    return name


def _composed(field: str, parts: Iterable[Part]) -> str:
    """The one spelling that the engine gets."""
    text = spelled(replace(part, name=name_of_one(field, part.name)) for part in parts)
    if len(text) > MAX_LENGTH:
        raise invalid(field, f"must have at most {MAX_LENGTH} characters, got {len(text)}")
    return text


def _adapter(levels: list[Mapping[str, object]], card: ModelCard) -> str:
    """The first level (tensors, request parameters, JSON) that names an adapter decides; "" names the base model."""
    for level in levels:
        given = {name: level[name] for name in ADAPTER_NAMES if level.get(name) is not None}
        names = [adapter_name(name, value) for name, value in given.items()]
        if not names:
            continue
        if len(set(names)) > 1:
            raise invalid("lora_name", f"and its alias adapter differ: {shown(names[0])} and {shown(names[1])}")
        if names[0] and not card.lora_enabled:
            # vllm_backend's own words, which its clients and tests look for.
            raise MultiloraError(ErrorCode.UNSUPPORTED, "LoRA feature is not enabled.")
        return names[0]
    return ""


def _governed(
    key: str, header: str, parameters: Mapping[str, object], own: Mapping[str, object], options: Mapping[str, object]
) -> object:
    """The value of `key`, from the header if the operator named one, else from the client; None if nobody says."""
    said = [level[key] for level in (own, options) if level.get(key) is not None]
    if not header:
        return said[0] if said else None
    if said:
        raise invalid(key, f"is set by the header {header} on this server, and must not be sent")
    values = [value for name, value in parameters.items() if name.lower() == header.lower()]
    # A client may send a parameter that is spelled like the header, but in other letters.
    if len(set(map(str, values))) > 1:
        raise invalid(key, f"the header {header} came with different values")
    return values[0] if values else None
