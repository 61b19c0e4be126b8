# SPDX-License-Identifier: Apache-2.0
"""The targets of issue 5 that a simulation can decide, each computed from the runs' figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from multilora_backend.config import Config
from simulation.model import TimeModel
from simulation.record import INPUT_WEIGHT, OUTPUT_WEIGHT

OURS, BASELINE = "multilora", "first-come"

OVERLOADED = (
    "vtc overload",
    "vtc overload-multi",
    "vtc on-off-less",
    "vtc on-off-overload",
    "vtc poisson-on-off",
)

Runs = Mapping[str, Mapping[str, dict[str, Any]]]
"""Case -> scheduler -> figures."""


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    limit: float
    at_most: bool
    beside: str = ""
    """What else the figure should be read with."""

    @property
    def held(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def vtc_bound(figures: Mapping[str, Any], max_num_seqs: int, kv_tokens: int) -> float:
    """VTC's theorem: 2 x max(input weight x longest prompt, output weight x tokens that a batch can hold).

    A batch holds what the KV pages do or what `max_num_seqs` of the longest requests come to, whichever is less.
    """
    batch = min(kv_tokens, max_num_seqs * figures["longest_request"])
    return 2 * max(INPUT_WEIGHT * figures["longest_prompt"], OUTPUT_WEIGHT * batch)


def fairness(runs: Runs) -> Iterator[Target]:
    """Of all suites in which a tenant asks for more than its share, steadily or with pauses."""
    sequences, tokens = Config().max_num_seqs, TimeModel.read().kv_tokens
    for case in OVERLOADED:
        if case not in runs:
            continue
        ours, theirs = runs[case][OURS], runs[case][BASELINE]
        bound = vtc_bound(ours, sequences, tokens)
        beside = f"first-come: {theirs['difference']:,.0f}"
        yield Target(f"{case}: largest service difference", ours["difference"], bound, True, beside)
        share = ours["tokens_per_s"] / theirs["tokens_per_s"]
        beside = f"{ours['tokens_per_s']:,.0f} and {theirs['tokens_per_s']:,.0f} tokens/s"
        yield Target(f"{case}: throughput, share of first-come's", share, 0.97, False, beside)


def starvation(runs: Runs) -> Iterator[Target]:
    for case in ("6 on 3 slots", "15 on 3 slots"):
        if case in runs:
            worst, median = worst_and_median(runs[case][OURS])
            their_worst, their_median = worst_and_median(runs[case][BASELINE])
            beside = (
                f"{worst:.2f} s and {median:.2f} s; first-come: {their_worst:.2f} s and {their_median:.2f} s, "
                f"{their_worst / max(their_median, 1e-9):.2f}"
            )
            yield Target(f"{case}: worst / median adapter's p99 wait", worst / max(median, 1e-9), 1.5, True, beside)
            late = runs[case][OURS]["requests"] - runs[case][OURS]["finished"]
            yield Target(f"{case}: requests that never ended", late, 0, True)


def worst_and_median(figures: Mapping[str, Any]) -> tuple[float, float]:
    """p99 wait, in seconds, of the adapter that waits longest and of the one in the middle (the lower of two)."""
    waits = sorted(adapter["wait_s"]["p99"] for adapter in figures["adapters"])
    return waits[-1], waits[(len(waits) - 1) // 2]


def goodput(runs: Runs) -> Iterator[Target]:
    cases = [case for case in runs if case.startswith("1000 uniform")]
    if not cases:
        return
    best = {name: max((runs[case][name]["goodput"], case) for case in cases) for name in (OURS, BASELINE)}
    beside = ", ".join(f"{name} {rate:.1f} requests/s of {case.split()[-1]}" for name, (rate, case) in best.items())
    beside += f"; {runs[best[OURS][1]][BASELINE]['goodput']:.1f} by {BASELINE} of the traffic of {OURS}'s best"
    ratio = best[OURS][0] / max(best[BASELINE][0], 1e-9)
    yield Target("1,000 adapters on 64: best goodput, times first-come's", ratio, 2.0, False, beside)


def step_loop(runs: Runs) -> Iterator[Target]:
    """Of the runs of one case the quickest: what a machine does beside can only make one slower."""
    name = "512 running of 10000"
    figures = [run[OURS] for case, run in runs.items() if case.startswith(name)]
    if not figures:
        return
    # No full batch, no figure: that is no pass.
    medians = [each["full_host_ms"]["p50"] if each["full_steps"] else math.inf for each in figures]
    best = min(range(len(medians)), key=medians.__getitem__)
    host, steps = figures[best]["full_host_ms"], figures[best]["full_steps"]
    beside = f"p90 {host['p90']:.2f} ms, p99 {host['p99']:.2f} ms, of {steps:,} steps with a full batch"
    beside += f"; medians of all runs {', '.join(f'{median:.2f}' for median in medians)} ms"
    yield Target(f"{name}: ms of the host's CPU a step, median", medians[best], 1.0, True, beside)


def cost(runs: Runs) -> Iterator[Target]:
    for case, figures in runs.items():
        if case == "10000 of six tenants":
            ours = figures[OURS]
            beside = f"{ours['requests']:,} requests, {ours['steps']:,} steps, {ours['seconds']:,.0f} s of virtual time"
            yield Target(f"{case}: CPU seconds to simulate", ours["cpu_s"], 180.0, True, beside)


TARGETS: tuple[Callable[[Runs], Iterator[Target]], ...] = (fairness, starvation, goodput, cost, step_loop)


def evaluate(runs: Runs) -> list[Target]:
    """Every target whose cases were run."""
    return [target for judge in TARGETS for target in judge(runs)]
