# SPDX-License-Identifier: Apache-2.0
"""The time model against what it is fitted to: the runs of the GPU benchmarks, simulated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simulation.assembly import Assembly
from simulation.model import TimeModel
from simulation.record import percentile
from simulation.simulator import Run, Setup, simulate
from simulation.workloads import Request, adapter_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
START_S = 20.0
"""By then the adapters have been loaded: the benchmarks do not time that."""
RANKS = {"mixed": (8, 16, 32, 64), "mean": (30,)}
"""Of the mixes that are not adapters of one rank; 16 adapters each."""
RUNNING, COLD, SPARE = 16, 16, 4
"""Adapters of benchmarks/latency.py --load-during: what runs, what is loaded meanwhile, and room for how many."""
ROUND_S = 10.0
"""Between the starts of its rounds: the loads of one are over before the next."""


def calibrate(model: TimeModel | None = None, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Run, figure, measured, simulated, and the commit that was measured, of every run whose results are there."""
    model = model or TimeModel.read()
    kinds = {
        "engine": throughput,
        "latency": between_tokens,
        "latency-loads-host": loads,
        "latency-loads-disk": loads,
        "misses-host": miss,
        "misses-disk": miss,
    }
    found = []
    for name, kind in kinds.items():
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            found += [row | {"commit": result["environment"]["commit"]} for row in kind(result, model)]
    return found


def throughput(result: dict[str, Any], model: TimeModel) -> Iterator[dict[str, Any]]:
    options = result["options"]
    count, prompt, output = options["requests"], options["input"], options["output"]
    for mix, measured in result["best"].items():
        number = {"off": 0, "mixed": 16, "mean": 16}.get(mix) if not mix.isdecimal() else int(mix)
        ranks = RANKS.get(mix, (options["rank"],))
        names = [adapter_name(i) for i in range(number or 0)]
        setup = Setup({name: ranks[i % len(ranks)] for i, name in enumerate(names)}, 2 * len(names) + 1, 2**40)
        run = simulate(_warm(names) + _round_robin(names, count, START_S, prompt, output), setup, model)
        label = {"off": "LoRA off", "mixed": "16 of ranks 8 to 64", "mean": "16 of rank 30"}.get(mix, f"{mix} adapters")
        yield _row(f"{count} requests, {label}", "tokens/s", measured, count * output / (run.seconds - START_S))


def between_tokens(result: dict[str, Any], model: TimeModel) -> Iterator[dict[str, Any]]:
    """Of decode alone: what comes before the last of a batch has started is left out."""
    options = result["options"]
    for row in result["rows"]:
        names = [adapter_name(i) for i in range(row["adapters"])]
        setup = Setup(dict.fromkeys(names, options["rank"]), len(names) + 1, 2**40)
        timed = _round_robin(names, row["batch"], START_S, options["input"], options["output"])
        records = simulate(_warm(names) + timed, setup, model).recorder.records[len(_warm(names)) :]
        gap = min((record.last - record.first) / (record.tokens - 1) for record in records)
        label = f"{row['adapters'] or 'no'} adapter{'' if row['adapters'] == 1 else 's'}"
        yield _row(f"{row['batch']} at once, {label}", "ms a token", row["inter_token"]["p50_ms"], 1e3 * gap)


def loads(result: dict[str, Any], model: TimeModel) -> Iterator[dict[str, Any]]:
    """How long adapters take that are asked for one after the other while a full batch decodes."""
    options = result["options"]
    where, count = options["load_from"], options["max_num_seqs"]
    names = [adapter_name(i) for i in range(RUNNING + COLD)]
    busy, cold = names[:RUNNING], names[RUNNING:]
    requests = _warm(cold + busy)
    for turn in range(options["repeats"]):
        requests += _round_robin(busy, count, START_S + turn * ROUND_S, options["input"], options["output"])
    host = 0 if where == "disk" else 2**40
    ranks = dict.fromkeys(names, options["rank"])
    setup = Setup(ranks, RUNNING + SPARE, host, settings={"max_num_seqs": count})
    run: Run = simulate(requests, setup, model, _Loading(cold, busy, options["load_interval"]))
    measured = next(row["load"] for row in result["rows"] if row["loading"])
    for percent in (50, 90):
        simulated = 1e3 * percentile(run.load_s[len(names) :], percent)
        label = f"loads from {where} beside {count} that run, p{percent}"
        yield _row(label, "ms", measured[f"p{percent}_ms"], simulated)


def miss(result: dict[str, Any], model: TimeModel) -> Iterator[dict[str, Any]]:
    """What the load adds to the time to first token on an idle engine."""
    options = result["options"]
    where, names = options["load_from"], [adapter_name(0), adapter_name(1)]
    asked = [Request(START_S + i, name, options["input"], options["output"]) for i, name in enumerate(names[:1] * 2)]
    setup = Setup(dict.fromkeys(names, options["rank"]), 1, 0 if where == "disk" else 2**40)
    missed, hit = simulate(_warm(names) + asked, setup, model).recorder.records[-2:]
    p50 = {row["kind"]: row["ttft"]["p50_ms"] for row in result["rows"]}
    yield _row(f"a miss from {where} on an idle engine", "ms", p50["miss"] - p50["hit"], 1e3 * (missed.ttft - hit.ttft))


class _Loading:
    """Asks for the least recently loaded of those that are not resident, as the benchmark does."""

    def __init__(self, cold: Sequence[str], busy: Sequence[str], interval_s: float) -> None:
        self._names = list(cold)
        self._busy = busy
        self._interval_s = interval_s
        self._due = START_S

    def __call__(self, parts: Assembly) -> None:
        now = parts.clock.now
        if now < self._due or not parts.scheduler.has_work:
            return
        self._due = now + self._interval_s
        name = next((name for name in self._names if name not in parts.manager.resident()), None)
        if name is not None:
            parts.manager.request(name, protect=self._busy)
            self._names.remove(name)
            self._names.append(name)


def _warm(names: Sequence[str]) -> list[Request]:
    return [Request(0.0, name, 2, 1) for name in names]


def _round_robin(names: Sequence[str], count: int, at: float, prompt: int, output: int) -> list[Request]:
    return [Request(at, names[i % len(names)] if names else "", prompt, output) for i in range(count)]


def _row(run: str, figure: str, measured: float, simulated: float) -> dict[str, Any]:
    return {"run": run, "figure": figure, "measured": measured, "simulated": simulated}
