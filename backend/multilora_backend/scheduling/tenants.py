# SPDX-License-Identifier: Apache-2.0
"""What an operator grants to tenants: parsing of the `tenants` file, and nothing else.

    classes:
      interactive: {weight: 8, deadline_s: 1.5}
      batch: {weight: 0.25}
    default: {class: batch, max_waiting: 100}
    tenants:
      acme: {class: interactive, weight: 2, adapters: ["acme-*"], max_running: 64, tokens_per_s: 4000}

Without a file every tenant has weight 1 in the class `standard` of weight 1, and no caps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from multilora_backend.documents import UniqueKeys
from multilora_backend.errors import MultiloraError, invalid

STANDARD = "standard"
PRIORITY_BASE = 4.0
"""One step of `request_priority` is worth this factor in weight."""
PRIORITY_STEPS = 3
"""Priorities beyond +-this count as this: the lowest still gets 1/4096 of what the highest gets."""


@dataclass(frozen=True)
class SlaClass:
    """Classes share what there is by weight; each is sure of its share, however much others ask for."""

    name: str = STANDARD
    weight: float = 1.0
    deadline_s: float = math.inf
    """Until the first token: what is late goes first among its tenant's, and to the next adapter slot."""


@dataclass(frozen=True)
class Tenant:
    name: str = ""
    sla: SlaClass = field(default=SlaClass(), metadata={"key": "class"})
    weight: float = 1.0
    """Share beside the other tenants of its class."""
    adapters: tuple[str, ...] = ("*",)
    """Patterns (fnmatch) of the adapters that it may use. The base model needs no grant."""
    max_priority: int = 100
    """Larger values of `request_priority` count as this."""
    max_running: int = 0
    """Sequences at the same time, a request of n being n; more of them wait. 0: no cap."""
    max_waiting: int = 0
    """Sequences; one more is refused. 0: no cap but the server's."""
    tokens_per_s: float = 0.0
    """Prompt and output tokens; what would exceed it waits. 0: no cap."""
    burst_tokens: float = 0.0
    """How much may be had at once after a pause; 0: one second's."""
    adapter_bytes: int = 0
    """Device memory for adapters that this tenant was the last to ask for. 0: no cap."""

    def may_use(self, adapter: str) -> bool:
        """`adapter` is a name, not the key of a revision."""
        return not adapter or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


@dataclass(frozen=True)
class Tenants:
    """All that the file says. A tenant that it does not name is its own tenant with the default's settings."""

    named: Mapping[str, Tenant] = field(default_factory=dict)
    default: Tenant = Tenant()

    def get(self, name: str) -> Tenant:
        return self.named.get(name) or replace(self.default, name=name)

    @classmethod
    def read(cls, file: str) -> Tenants:
        """Raises MultiloraError that names the file, the tenant and the field; an empty name is no file."""
        if not file:
            return cls()
        try:
            content = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=UniqueKeys)
        except OSError as error:
            raise invalid("tenants", f"{file} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise invalid("tenants", f"{file}: {error}") from error
        try:
            return cls.parse({} if content is None else content)
        except MultiloraError as error:
            raise invalid("tenants", f"{file}: {error.message}") from error

    @classmethod
    def parse(cls, content: Any) -> Tenants:
        sections = _mapping(content, "the file", {"classes", "default", "tenants"})
        classes = {STANDARD: SlaClass()}
        for name, values in _mapping(sections.get("classes"), "classes").items():
            if "@" in name:
                raise invalid(f"classes.{name}", "a name has no '@'")
            classes[name] = _build(SlaClass, name, values, f"classes.{name}", classes)
        default = _build(Tenant, "", sections.get("default"), "default", classes)
        named = {
            name: _build(Tenant, name, values, f"tenants.{name}", classes)
            for name, values in _mapping(sections.get("tenants"), "tenants").items()
        }
        return cls(named, default)


def class_of(tenant: Tenant, priority: int) -> SlaClass:
    """The class of one request: its tenant's, moved up or down by `request_priority`."""
    steps = max(-PRIORITY_STEPS, min(PRIORITY_STEPS, priority, tenant.max_priority))
    if not steps:
        return tenant.sla
    return replace(tenant.sla, name=f"{tenant.sla.name}@{steps:+d}", weight=tenant.sla.weight * PRIORITY_BASE**steps)


def _build(kind: Any, name: str, values: Any, where: str, classes: Mapping[str, SlaClass]) -> Any:
    known = {f.metadata.get("key", f.name): f for f in fields(kind) if f.name != "name"}
    found: dict[str, Any] = {"name": name}
    for key, value in _mapping(values, where, known).items():
        known_as = f"{where}.{key}"
        found[known[key].name] = _value(known[key].name, value, known_as, classes)
    return kind(**found)


def _value(name: str, value: Any, where: str, classes: Mapping[str, SlaClass]) -> Any:
    if name == "sla":
        if not isinstance(value, str) or value not in classes:
            raise invalid(where, f"must be one of {', '.join(classes)}, got {value!r}")
        return classes[value]
    if name == "adapters":
        if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
            raise invalid(where, f"must be a list of patterns, got {value!r}")
        return tuple(value)
    whole = name in ("max_priority", "max_running", "max_waiting", "adapter_bytes")
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise invalid(where, f"must be a {'whole ' if whole else ''}number, got {value!r}")
    if name in ("weight", "deadline_s"):
        if not 1e-6 <= value <= 1e6:
            raise invalid(where, f"must be from 1e-6 to 1e6, got {value!r}")
    elif name != "max_priority" and not 0 <= value < math.inf:
        raise invalid(where, f"must be 0 or more, got {value!r}")
    return value


def _mapping(value: Any, where: str, known: Any = None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise invalid(where, f"must map names to settings, got {value!r}")
    unknown = [] if known is None else sorted(set(value) - set(known))
    if unknown:
        raise invalid(where, f"unknown key {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}")
    return value
