# SPDX-License-Identifier: Apache-2.0
"""A plan for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from multilora_backend.adapters.ranks import padded
from multilora_backend.planning.footprint import RankRow
from multilora_backend.planning.plan import Plan
from multilora_backend.planning.sizes import size

MAX_REFUSED = 20
"""Shown by name; `--json` has them all."""


def as_json(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=2)


def show(plan: Plan, console: Console) -> None:
    console.print(Text(f"{plan.model} ({plan.model_type}, {plan.dtype}) on {_device(plan)}"))
    console.print(Group(*_tables(plan)))
    for line in _notes(plan):
        console.print(Text(line))


def _device(plan: Plan) -> str:
    return f"a {plan.device} device of {size(plan.device_bytes)}" if plan.device_bytes else f"the {plan.device}"


def _tables(plan: Plan) -> Iterable[RenderableType]:
    rows = [
        ("weights", plan.weights, f"{size(plan.stored_weights)} in safetensors files"),
        ("adapter pool", plan.adapter_pool, f"{plan.ranks} ranks"),
        ("extras", plan.adapter_extras, "what adapters have besides A and B"),
        ("LoRA border", plan.border, "behind the base weights, for decode steps"),
        ("KV cache", plan.kv_cache, f"{plan.kv_tokens:,} tokens of {size(plan.bytes_per_token)}"),
        ("CUDA graphs", plan.cuda_graphs, ""),
        ("left", plan.unassigned, "for activations and workspaces"),
    ]
    yield _table(("memory", "bytes", "what"), [(name, size(value), what) for name, value, what in rows if value])
    if plan.ranks:
        titles = ("rank", "registered", "on the device", "fit there", "in the host cache", "fit there")
        yield _table(titles, map(_rank_row, plan.by_rank))


def _rank_row(row: RankRow) -> tuple[str, ...]:
    counts = map("{:,}".format, (row.rank, row.registered, row.device_fit, row.host_fit))
    rank, registered, device_fit, host_fit = counts
    return rank, registered, size(row.device_bytes), device_fit, size(row.host_bytes), host_fit


def _notes(plan: Plan) -> Iterable[str]:
    if plan.kv_tokens:
        longest = plan.kv_tokens // plan.max_model_len
        yield f"A sequence has at most {plan.max_model_len:,} tokens; {longest:,} of that length run at a time."
    if plan.ranks:
        served = plan.served
        need, host = sum(padded(each.rank) for each in served), sum(each.host_bytes for each in served)
        yield (
            f"{len(served):,} adapters have {need:,} ranks of the pool's {plan.ranks:,}, and take {size(host)} of "
            f"the host cache's {size(plan.host_budget)}."
        )
        extras = sum(each.extras_bytes for each in served)
        if extras:
            yield f"What they have besides A and B takes {size(extras)} of {size(plan.adapter_extras)}."
        if plan.max_loras:
            yield f"At most {plan.max_loras} of them share a step (max_loras)."
    refused = plan.refused
    for each in refused[:MAX_REFUSED]:
        yield f"Not counted: {each.name}: {each.reason}"
    if len(refused) > MAX_REFUSED:
        yield f"Not counted: {len(refused) - MAX_REFUSED} more."
    if plan.problem:
        yield f"The engine would not start: {plan.problem}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in header:
        table.add_column(title, justify="left" if title in ("memory", "what") else "right")
    for row in rows:
        table.add_row(*row)
    return table
