# SPDX-License-Identifier: Apache-2.0
"""A run in figures: what goes into the JSON, the tables and the plots."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from simulation.record import Record, Recorder, percentile, service_difference
from simulation.simulator import Run

TTFT_LIMIT_S = 6.0
"""S-LoRA's service level: a request whose first token comes later is worth nothing."""
ALL_AT_ONCE_S = 1.0
"""Requests that come within so long are a batch: they have no rate, and count over the time that all of it takes."""
ADAPTERS_SHOWN = 16
PERCENTS = (50, 90, 99)
TIMELINE_S = (100.0, 160.0)
"""What is kept of the states of adapters: a minute, after the start is over."""
WINDOW_S = 2.0
"""Between two points in the series of service over time."""


def summarise(run: Run) -> dict[str, Any]:
    """Plain numbers. Requests that never started count with the time they had waited at the end."""
    recorder = run.recorder
    records = recorder.records
    in_time = [r for r in records if r.done and r.ttft <= TTFT_LIMIT_S]
    # Load ends with the last arrival: what it takes to drain the rest is no part of the rate that is offered.
    last = max((r.request.at for r in records), default=0.0)
    offered_s = last if last > ALL_AT_ONCE_S else run.seconds
    span = min(run.seconds, run.setup.until)
    return {
        "requests": len(records),
        "finished": sum(r.done for r in records),
        "seconds": run.seconds,
        "tokens_per_s": sum(r.tokens for r in records) / span if span else 0.0,
        "goodput": len(in_time) / max(offered_s, 1e-9),
        "attainment": len(in_time) / max(len(records), 1),
        "ttft_s": _spread([min(r.ttft, run.seconds - r.request.at) for r in records]),
        "wait_s": _spread(_waits(records, run.seconds)),
        "preemptions": run.preemptions,
        "loads": run.loads,
        "reads": run.reads,
        "evictions": run.evictions,
        "arrivals": dict(run.arrivals),
        "steps": recorder.steps,
        "busy": recorder.busy_s / run.seconds if run.seconds else 0.0,
        "adapters_per_step": recorder.adapters_in_steps / max(recorder.steps, 1),
        "host_ms": _in_ms(recorder.host_s),
        "full_host_ms": _in_ms(recorder.full_host_s),
        "full_steps": len(recorder.full_host_s),
        "cpu_s": run.cpu_s,
        "adapters": _by_adapter(records, run.seconds),
        "service": _service(recorder),
        "difference": max(
            (service_difference(recorder, a, b) for a, b in itertools.combinations(sorted(recorder.services), 2)),
            default=0.0,
        ),
        "longest_prompt": max((r.request.prompt for r in records), default=0),
        "longest_request": max((r.request.prompt + r.request.output for r in records), default=0),
        "states": {name: _within(line, *TIMELINE_S) for name, line in recorder.states.items()},
    }


def _waits(records: Sequence[Record], end: float) -> list[float]:
    return [min(r.wait, end - r.request.at) for r in records]


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": percentile(ordered, p) for p in PERCENTS} | {"max": ordered[-1] if ordered else 0.0}


def _in_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {name: 1e3 * value for name, value in _spread(seconds).items()}


def _within(line: Sequence[tuple[float, str]], begin: float, end: float) -> list[tuple[float, str]]:
    """States of one adapter in a span; the first is the one that it was in when the span began."""
    before = [(begin, state) for at, state in line if at <= begin][-1:]
    return before + [(at, state) for at, state in line if begin < at < end]


def _by_adapter(records: Sequence[Record], end: float) -> list[dict[str, Any]]:
    """The most asked for first. Nothing if there are more than a table or a plot could show."""
    by_adapter: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_adapter[record.request.adapter].append(record)
    if len(by_adapter) > ADAPTERS_SHOWN:
        return []
    ranked = sorted(by_adapter.items(), key=lambda item: -len(item[1]))
    return [
        {
            "adapter": name,
            "requests": len(mine),
            "wait_s": _spread(_waits(mine, end)),
            "ttft_s": _spread([min(r.ttft, end - r.request.at) for r in mine]),
        }
        for name, mine in ranked
    ]


def _service(recorder: Recorder) -> dict[str, Any]:
    """What each tenant has had by the end of each window. Empty where the traffic names no tenants."""
    ends, picked = [], []
    for index, now in enumerate(recorder.times):
        if now >= (len(ends) + 1) * WINDOW_S:
            ends.append(now)
            picked.append(index)
    tenants = [name for name in sorted(recorder.services) if name]
    return {"ends_s": ends, "so_far": {name: [recorder.services[name].totals[i] for i in picked] for name in tenants}}
