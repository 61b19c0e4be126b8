# SPDX-License-Identifier: Apache-2.0
"""The tables of `multilora-client compare` and `adapters`."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence

from multilora_client.errors import MultiloraClientError
from multilora_client.types import AdapterInfo, Completion

_HEADER = ("adapter", "tokens", "finish", "ttft ms", "tokens/s", "text")
_ADAPTERS_HEADER = ("adapter", "version", "state", "level", "rank", "MiB", "source")
_VERSION_DIGITS = 12
_MIN_TEXT_WIDTH = 20


def comparison(
    names: Sequence[str], results: Sequence[Completion | MultiloraClientError], width: int | None = None
) -> str:
    """One aligned line for each result, cut to `width` columns (default: the terminal's)."""
    rows = [_HEADER, *(_row(name, result) for name, result in zip(names, results, strict=True))]
    return _aligned(rows, width)


def adapters_table(infos: Sequence[AdapterInfo], width: int | None = None) -> str:
    """One aligned line for each adapter; the last column says why it failed, else where it comes from."""
    rows = [_ADAPTERS_HEADER]
    for info in infos:
        level = f"{info['level']}, pinned" if info["pinned"] else info["level"]
        size = f"{info['bytes'] / 2**20:.1f}" if info["bytes"] else "-"
        version = (info["version"] or "-")[:_VERSION_DIGITS]
        name = ", ".join([info["name"], *info["aliases"]])
        note = info["reason"] or ("has no effect; " if info["no_effect"] else "") + info["source"]
        rows.append((_one_line(name), version, info["state"], level, str(info["rank"] or "-"), size, _one_line(note)))
    return _aligned(rows, width)


def _aligned(rows: Sequence[tuple[str, ...]], width: int | None) -> str:
    """The last column is cut to what the others leave of the terminal, or of `width`."""
    widths = [max(_columns(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
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
