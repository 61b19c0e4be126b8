# SPDX-License-Identifier: Apache-2.0
"""Bytes as people write and read them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_DECIMAL = {prefix: 1000**i for i, prefix in enumerate("kmgt", 1)}
_BINARY = {f"{prefix}i": 1024**i for i, prefix in enumerate("kmgt", 1)}
_FACTORS = {"": 1, **_DECIMAL, **_BINARY}


def size(count: int) -> str:
    """`size(84 * 2**20)` is "84.0 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "80 GB" or "85899345920". Raises ValueError for anything else, and for less than 1."""
    match = _SIZE.fullmatch(text.strip())
    count = int(float(match[1]) * _FACTORS[(match[2] or "").lower()]) if match else 0
    if count < 1:
        raise ValueError(f"{text!r} is no size such as 80GiB")
    return count
