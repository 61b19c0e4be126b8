# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML in which no name occurs twice: their parsers would let the last of two win, in silence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """json's object_pairs_hook. Raises ValueError that names what occurs twice."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[Any] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the name {key!r} occurs twice")
            seen.add(key)
    return mapping


# libyaml's parser where PyYAML was built with it. mypy takes no base class that is computed.
class UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A loader for yaml.load, as safe as safe_load. Raises ValueError that names what occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if all(isinstance(key, Hashable) for key in keys):
            without_duplicates([(key, None) for key in keys])
        return super().construct_mapping(node, deep)
