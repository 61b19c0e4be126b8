# SPDX-License-Identifier: Apache-2.0
"""The table of `multilora-client compare`."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence

from multilora_client.errors import MultiloraClientError
from multilora_client.types import Completion

_HEADER = ("adapter", "tokens", "finish", "ttft ms", "tokens/s", "text")
_MIN_TEXT_WIDTH = 20


def comparison(
    names: Sequence[str], results: Sequence[Completion | MultiloraClientError], width: int | None = None
) -> str:
    """One aligned line for each result, cut to `width` columns (default: the terminal's)."""
    rows = [_HEADER, *(_row(name, result) for name, result in zip(names, results, strict=True))]
    widths = [max(_columns(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
    text_width = (width or shutil.get_terminal_size().columns) - sum(widths) - 2 * len(widths)
    lines = []
    for row in rows:
        cells = [_padded(cell, columns) for cell, columns in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, _cut(row[-1], max(text_width, _MIN_TEXT_WIDTH))]))
    return "\n".join(lines)


def _row(name: str, result: Completion | MultiloraClientError) -> tuple[str, ...]:
    if isinstance(result, MultiloraClientError):
        return (name, "-", "error", "-", "-", _one_line(result.message))
    return (
        name,
        str(result.num_output_tokens),
        result.finish_reason or "-",
        "-" if result.ttft_s is None else f"{1000 * result.ttft_s:.1f}",
        f"{result.num_output_tokens / result.total_s:.1f}" if result.total_s > 0 else "-",
        _one_line(result.text),
    )


def _one_line(text: str) -> str:
    """Line ends and other control characters as escapes: they would break the table, or the terminal."""
    return "".join(repr(char)[1:-1] if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)


def _columns(text: str) -> int:
    """Terminal columns: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def _padded(text: str, columns: int) -> str:
    return text + " " * (columns - _columns(text))


def _cut(text: str, columns: int) -> str:
    if _columns(text) <= columns:
        return text
    used = end = 0
    while used + _columns(text[end]) < columns:
        used += _columns(text[end])
        end += 1
    return text[:end] + "…"
