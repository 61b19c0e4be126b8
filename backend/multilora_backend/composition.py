# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one request, each with a weight: how a client writes that, and the one spelling that we keep.

`a:0.7,b:0.3` as text; {"a": 0.7, "b": 0.3} or [{"name": "a", "weight": 0.7}, ...] as JSON. A weight that is left out
is 1. No name of an adapter contains a colon or a comma. Weights are decimals of few digits: a client's 0.1 + 0.2 is
0.3, and equal weights are one composition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from multilora_backend.errors import MultiloraError, invalid

MAX_PARTS = 8
MAX_WEIGHT = 1000
MAX_DECIMALS = 6
MAX_LENGTH = 2048
"""Characters of a text that names several adapters."""

_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Part:
    name: str
    """Of an adapter, an alias, or name@version: not checked here."""
    weight: Decimal


def is_composed(asked: str) -> bool:
    return ":" in asked or "," in asked


def parse(field: str, text: str) -> tuple[Part, ...]:
    """Reads `a:0.7,b:0.3`. Raises MultiloraError that names `field` and the limit."""
    if len(text) > MAX_LENGTH:
        raise invalid(field, f"must have at most {MAX_LENGTH} characters, got {len(text)}")
    pairs = []
    for piece in text.split(","):
        name, colon, weight = piece.partition(":")
        pairs.append((name.strip(), _decimal(field, name, weight.strip()) if colon else Decimal(1)))
    return merged(field, pairs)


def parse_json(field: str, value: object) -> tuple[Part, ...]:
    """Reads what JSON has made of an object or a list. Raises as `parse`."""
    if isinstance(value, dict):
        said = [(name, weight) for name, weight in value.items()]
    elif isinstance(value, list) and all(_is_part(item) for item in value):
        said = [(item["name"], item.get("weight", 1)) for item in value]
    else:
        raise invalid(field, 'must be a name, {"name": weight, ...} or [{"name": ..., "weight": ...}, ...]')
    pairs = []
    for name, weight in said:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise invalid(field, f"the weight of {name[:80]!r} must be a number, got {repr(weight)[:80]}")
        pairs.append((name, _decimal(field, name, repr(weight))))
    return merged(field, pairs)


def merged(field: str, pairs: Iterable[tuple[str, Decimal]]) -> tuple[Part, ...]:
    """In order of name; equal names add up, as their adapters would."""
    weights: dict[str, Decimal] = {}
    pairs = list(pairs)
    if not 1 <= len(pairs) <= MAX_PARTS:
        raise invalid(field, f"must name 1 to {MAX_PARTS} adapters, got {len(pairs)}")
    for name, weight in pairs:
        if not name:
            raise invalid(field, "names an adapter by nothing; write name:weight,name:weight")
        weights[name] = _bounded(field, name, weights.get(name, Decimal(0)) + weight)
    return tuple(Part(name, weights[name]) for name in sorted(weights))


def spelled(parts: Iterable[Part]) -> str:
    """The text that `parse` reads; a single adapter with the weight 1 is its name."""
    parts = list(parts)
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].name
    return ",".join(f"{part.name}:{plain(part.weight)}" for part in parts)


def plain(weight: Decimal) -> str:
    """Without an exponent, without zeros that say nothing: the same for equal weights."""
    text = f"{weight:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _is_part(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("name"), str) and item.keys() <= {"name", "weight"}


def _decimal(field: str, name: str, text: str) -> Decimal:
    if not _NUMBER.fullmatch(text):
        raise invalid(field, f"the weight of {name.strip()[:80]!r} must be a number, got {text[:80]!r}")
    return _bounded(field, name, Decimal(text))


def _bounded(field: str, name: str, weight: Decimal) -> Decimal:
    if abs(weight) > MAX_WEIGHT:
        raise _refused(field, name, f"must be within {MAX_WEIGHT}", weight)
    # Not rounded in silence: two clients that mean the same should be seen to send the same.
    if weight != weight.quantize(Decimal(1).scaleb(-MAX_DECIMALS)):
        raise _refused(field, name, f"must have at most {MAX_DECIMALS} digits after the point", weight)
    return weight


def _refused(field: str, name: str, problem: str, weight: Decimal) -> MultiloraError:
    return invalid(field, f"the weight of {name.strip()[:80]!r} {problem}, got {str(weight)[:80]}")
