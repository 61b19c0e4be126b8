# SPDX-License-Identifier: Apache-2.0
"""What was found about adapters, for people and for scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multilora_backend.adapters.checks import short
from multilora_backend.adapters.inspection import Inspection, ModuleTensors
from multilora_backend.planning.fit import Fit, ModuleRoom, Report
from multilora_backend.planning.sizes import size

WIDTH = 150
"""Of tables, at least: a terminal that is narrower breaks their lines, which is better than breaking names."""
MAX_TOKENS = 8
"""That are shown; JSON has all."""
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_LEFT = ("module", "tensors", "adapter", "verdict", "extra", "place", "dtype", "base model")


@dataclass
class _Row:
    """Modules that differ in nothing but their numbers."""

    count: int = 0
    file_bytes: int = 0
    device_bytes: int = 0


def as_json(reports: Sequence[Report], overview: bool) -> str:
    found = [{"loads": not each.reasons, "reasons": each.reasons, **asdict(each)} for each in reports]
    return json.dumps({"adapters": found} if overview else found[0], indent=2)


def wide_console() -> Console:
    return Console(soft_wrap=True, highlight=False, width=max(Console().width, WIDTH))


def show(report: Report, console: Console) -> None:
    adapter, fit = report.adapter, report.fit
    for line in _about(adapter):
        console.print(Text(line))
    if adapter.modules:
        console.print(_modules(adapter, fit))
    if fit is not None and fit.extras:
        console.print(_extras(fit))
    for line in (*_on_device(fit), *_verdict(report)):
        console.print(Text(line))


def show_overview(reports: Sequence[Report], console: Console) -> None:
    rows = []
    for each in reports:
        adapter = each.adapter
        name = adapter.folder.rstrip("/").rpartition("/")[2]
        rank = max((module.rank for module in adapter.modules), default=0)
        if each.fit is not None and each.fit.rank:
            rank = each.fit.rank
        rows.append((name, str(rank or ""), size(adapter.file_bytes), adapter.base_model, _short_verdict(each)))
    table = _table(("adapter", "rank", "in the file", "base model", "verdict"), rows)
    console.print(table)


def _about(adapter: Inspection) -> Iterable[str]:
    yield f"{adapter.folder}: {size(adapter.file_bytes)} in the file"
    if adapter.rank is not None:
        said = f"r {adapter.rank}, lora_alpha {adapter.alpha}, target_modules {_text(adapter.target_modules)}"
        yield f"{said}; written by PEFT {adapter.peft_version or 'of an unknown version'}"
    if adapter.settings:
        yield "with " + ", ".join(f"{name} {_text(value)}" for name, value in adapter.settings.items())
    if adapter.initial:
        yield f"converted by the initial adapter in {adapter.initial}: twice the rank of the file"
    if adapter.rank is None:
        return
    base = [adapter.base_model, adapter.revision and f"revision {adapter.revision}", adapter.base_class]
    base.append(adapter.base_fingerprint and f"fingerprint {adapter.base_fingerprint}")
    yield f"trained on {', '.join(filter(None, base)) or 'a base model that it does not name'}"


def _modules(adapter: Inspection, fit: Fit | None) -> Table:
    rooms = {} if fit is None else {room.module: room for room in fit.modules}
    rows: dict[tuple[str, ...], _Row] = {}
    for module in adapter.modules:
        room = rooms.get(module.module)
        row = rows.setdefault(_kind(module, room), _Row())
        row.count += 1
        row.file_bytes += module.file_bytes
        row.device_bytes += 0 if room is None else room.device_bytes
    header = ["module", "count", "rank", "scale", "tensors", "dtype", "in the file"]
    lines = []
    for (name, *rest), row in rows.items():
        line = (name, str(row.count), *rest, size(row.file_bytes))
        lines.append((*line, size(row.device_bytes) if row.device_bytes else "") if rooms else line)
    return _table((*header, "on the device") if rooms else tuple(header), lines)


def _kind(module: ModuleTensors, room: ModuleRoom | None) -> tuple[str, ...]:
    rank, scale = (module.rank, module.scale) if room is None else (room.rank, room.scale)
    tensors = ", ".join(f"{kind} {'x'.join(map(str, shape))}" for kind, shape in module.shapes.items())
    scale_text = "" if scale is None else f"{scale:.4g}"
    return _INDEX.sub("*", module.module), str(rank or ""), scale_text, tensors, "/".join(module.dtypes)


def _extras(fit: Fit) -> Table:
    rows: dict[tuple[str, str], _Row] = {}
    for extra in fit.extras:
        row = rows.setdefault((_INDEX.sub("*", extra.place), extra.kind), _Row())
        row.count += 1
        row.device_bytes += extra.device_bytes
    lines = [(place, kind, str(row.count), size(row.device_bytes)) for (place, kind), row in rows.items()]
    return _table(("place", "extra", "count", "on the device"), lines)


def _on_device(fit: Fit | None) -> Iterable[str]:
    if fit is None:
        return
    print_of = f", fingerprint {fit.fingerprint}" if fit.fingerprint else ""
    yield f"inspected for {fit.model} ({fit.model_type}, {fit.dtype} on {fit.device}){print_of}"
    if fit.padded_rank:
        extras = f", and {size(fit.extras_bytes)} of {size(fit.arena_bytes)} for extras" if fit.extras_bytes else ""
        yield (
            f"It takes {fit.padded_rank} of the pool's {fit.pool_ranks:,} ranks, {size(fit.pool_bytes)} over all "
            f"linears{extras}; {size(fit.host_bytes)} of the host cache."
        )
    if fit.tokens:
        shown = [f"{content} ({number})" for content, number in islice(fit.tokens.items(), MAX_TOKENS)]
        more = f" and {len(fit.tokens) - MAX_TOKENS} more" if len(fit.tokens) > MAX_TOKENS else ""
        yield f"It has tokens of its own: {', '.join(shown)}{more}."
    if fit.not_in_sums:
        yield f"Alone it can be asked for; {fit.not_in_sums}."
    if fit.unchecked:
        yield f"Not checked: {fit.unchecked}."


def _verdict(report: Report) -> Iterable[str]:
    if _without_effect(report):
        yield "It has no effect: all its deltas are zero."
    if report.reasons:
        yield "It would not load:"
        yield from (f"  {reason}" for reason in report.reasons)
    elif report.fit is None:
        yield "Nothing in the folder speaks against it; --model tells whether it fits a model."
    else:
        yield f"It would load, as version {report.fit.version}." if report.fit.version else "It would load."


def _short_verdict(report: Report) -> str:
    if report.reasons:
        more = f" (and {len(report.reasons) - 1} more)" if len(report.reasons) > 1 else ""
        return report.reasons[0] + more
    good = "readable" if report.fit is None else "loads"
    return f"{good}, no effect" if _without_effect(report) else good


def _without_effect(report: Report) -> bool:
    known = None if report.fit is None else report.fit.no_effect
    return bool(report.adapter.no_effect if known is None else known)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else short(value)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in header:
        table.add_column(title, justify="left" if title in _LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
