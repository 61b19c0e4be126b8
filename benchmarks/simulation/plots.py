# SPDX-License-Identifier: Apache-2.0
"""Draws docs/simulated-*.png from benchmarks/results/simulation/*.json: `python benchmarks/simulated.py`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plot import MUTED, OURS, THEIRS, pyplot, save

from simulation.summary import TIMELINE_S
from simulation.targets import BASELINE
from simulation.targets import OURS as SCHEDULER

TENANT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
"""Okabe and Ito's, which the colour-blind tell apart; lines differ by their style as well."""
STYLES = ("-", "--", ":", "-.")
STATE_COLOURS = {"cold": "#eeeeee", "loading": "#f2b134", "active": OURS, "evicting": MUTED, "failed": "#c0392b"}

Cases = Mapping[str, Mapping[str, dict[str, Any]]]


def service(cases: Cases, names: tuple[str, ...], path: Path) -> None:
    """What each tenant has had so far, over time: one row a case, one column a scheduler."""
    plt = pyplot()
    figure, grid = plt.subplots(
        len(names), 2, figsize=(8.2, 2.3 * len(names)), sharex=True, sharey="row", squeeze=False
    )
    for row, name in zip(grid, names, strict=True):
        for axes, scheduler in zip(row, (BASELINE, SCHEDULER), strict=True):
            kept = cases[name][scheduler]["service"]
            looks = zip(TENANT_COLOURS, itertools.cycle(STYLES), kept["so_far"].items(), strict=False)
            for colour, style, (tenant, totals) in looks:
                millions = [total / 1e6 for total in (0.0, *totals)]
                axes.plot([0.0, *kept["ends_s"]], millions, style, color=colour, lw=1.4, label=f"tenant {tenant}")
            axes.set_title(f"{name}, {scheduler}", fontsize=9)
        row[0].set_ylim(bottom=0)
        row[0].set_ylabel("service so far,\nmillions of tokens")
        row[0].legend(frameon=False, fontsize=8, loc="upper left")
    for axes in grid[-1]:
        axes.set_xlabel("virtual time, s")
    save(plt, figure, path)


def ttft(cases: Cases, names: tuple[str, ...], path: Path) -> None:
    """Time to first token by adapter: bars to p99, marks at p50. The axis is logarithmic."""
    plt = pyplot()
    figure, grid = plt.subplots(1, len(names), figsize=(8.2, 3.2), width_ratios=[6, 15][: len(names)])
    for axes, name in zip(grid, names, strict=True):
        for shift, (scheduler, colour) in enumerate(((BASELINE, THEIRS), (SCHEDULER, OURS))):
            adapters = sorted(cases[name][scheduler]["adapters"], key=lambda a: int(a["adapter"][1:]))
            at = [i + 0.4 * shift - 0.2 for i in range(len(adapters))]
            axes.bar(at, [a["ttft_s"]["p99"] for a in adapters], 0.38, color=colour, label=f"{scheduler}, p99")
            axes.plot(at, [a["ttft_s"]["p50"] for a in adapters], "k_", ms=5, label="p50" if shift else None)
            axes.set_xticks(range(len(adapters)), [a["adapter"] for a in adapters], fontsize=7)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("adapter")
    grid[0].set_ylabel("time to first token, s")
    # Above the axes: bars reach everywhere in them.
    grid[-1].legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    save(plt, figure, path)


def states(cases: Cases, name: str, path: Path) -> None:
    """A minute in the life of every adapter of a case."""
    plt = pyplot()
    lines = cases[name][SCHEDULER]["states"]
    adapters = sorted(lines, key=lambda adapter: int(adapter[1:]))
    figure, axes = plt.subplots(figsize=(8.2, 0.6 + 0.22 * len(adapters)))
    begin, end = TIMELINE_S
    for row, adapter in enumerate(adapters):
        entries = [*lines[adapter], (float("inf"), "")]
        for (since, state), (until, _) in itertools.pairwise(entries):
            left, right = max(since, begin), min(until, end)
            if left < right:
                axes.barh(row, right - left, 0.8, left, color=STATE_COLOURS[state])
    axes.set_yticks(range(len(adapters)), adapters, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(begin, end)
    axes.set_xlabel("virtual time, s")
    axes.set_ylabel("adapter")
    axes.set_title(f"{name}: states of the adapters", fontsize=9, loc="left")
    shown = {state for line in lines.values() for _, state in line}
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for s, c in STATE_COLOURS.items() if s in shown]
    labels = [s for s in STATE_COLOURS if s in shown]
    axes.legend(handles, labels, frameon=False, fontsize=7, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    save(plt, figure, path)


def draw(results: Mapping[str, dict[str, Any]], folder: Path) -> list[str]:
    """Names of what could be drawn from the results that are there, by scenario."""
    drawn = []
    if "vtc" in results:
        names = ("vtc overload", "vtc on-off-overload", "vtc short-long")
        service(results["vtc"]["cases"], names, folder / "simulated-service.png")
        drawn.append("simulated-service")
    if "slots" in results:
        ttft(results["slots"]["cases"], ("6 on 3 slots", "15 on 3 slots"), folder / "simulated-ttft.png")
        states(results["slots"]["cases"], "15 on 3 slots", folder / "simulated-states.png")
        drawn += ["simulated-ttft", "simulated-states"]
    return drawn
