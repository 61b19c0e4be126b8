# SPDX-License-Identifier: Apache-2.0
"""Plays published workloads to the scheduler and the adapter manager in virtual time: `make simulate`.

The scheduler, its policies, the pages and the adapter manager are the product's. Steps and loads only take time, by a
model that is fitted to the GPU benchmark (benchmarks/simulation/*.json). Each case is played a second time to a
scheduler that serves first come, first served and loads in its step loop. Prints the targets and whether they hold;
the exit status is 1 if one does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
from simulation.calibration import calibrate
from simulation.model import sources
from simulation.scenarios import SCENARIOS
from simulation.simulator import simulate
from simulation.summary import summarise
from simulation.tables import FIT_COLUMNS, fit_rows
from simulation.targets import BASELINE, OURS, Target, evaluate

ALONE = ("platform", "loop")
"""Scenarios whose targets are about the CPU time that they take: nothing else is simulated meanwhile."""
TAKES = "about eight minutes"

COLUMNS = ("done", "of", "tokens/s", "TTFT p50 s", "p99 s", "goodput/s", "loads", "reads", "host ms", "CPU s")


def play(scenario: str, index: int, scheduler: str, scale: float) -> tuple[str, str, dict[str, Any]]:
    """One case of a scenario, in a process of its own: what crosses the border is names and figures."""
    for position, case in enumerate(SCENARIOS[scenario](scale)):
        if position == index:
            run = simulate(case.requests(), replace(case.setup, first_come=scheduler == BASELINE))
            return case.name, scheduler, summarise(run)
    raise IndexError(f"{scenario} has no case {index}")


def show(scenario: str, cases: dict[str, dict[str, dict[str, Any]]]) -> None:
    rows = []
    for case, runs in cases.items():
        for scheduler, figures in runs.items():
            rows.append(
                [
                    f"{case}, {scheduler}",
                    f"{figures['finished']:,}",
                    f"{figures['requests']:,}",
                    f"{figures['tokens_per_s']:,.0f}",
                    f"{figures['ttft_s']['p50']:.2f}",
                    f"{figures['ttft_s']['p99']:.2f}",
                    f"{figures['goodput']:.1f}",
                    f"{figures['loads']:,}",
                    f"{figures['reads']:,}",
                    f"{figures['host_ms']['p50']:.2f}",
                    f"{figures['cpu_s']:.0f}",
                ]
            )
    report.show(scenario, ["case", *COLUMNS], rows)


def show_targets(targets: Sequence[Target]) -> None:
    rows = [
        [
            "pass" if target.held else "FAIL",
            target.what,
            f"{target.value:,.2f}",
            f"{'<=' if target.at_most else '>='} {target.limit:,.2f}",
        ]
        for target in targets
    ]
    report.show("targets", ["", "target", "simulated", "limit"], rows)
    for target in targets:
        if target.beside:
            report.console.print(f"{target.what}: {target.beside}")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, commas between them: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of every duration; targets are meant for 1")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="folder for one JSON file a scenario, and the fit")
    options = parser.parse_args(given)
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in SCENARIOS]:
        parser.error(f"--only: unknown {', '.join(unknown)}; known are {', '.join(SCENARIOS)}")
    began = time.monotonic()
    report.console.print(f"{', '.join(chosen)}: all of them take {TAKES} on 2 cores; progress is shown by scenario")
    played: dict[str, dict[str, dict[str, Any]]] = {}
    for name, cases in _play(chosen, options.scale, options.processes):
        show(name, cases)
        played |= cases
        if options.json:
            report.write(options.json / f"{name}.json", "simulation", given, options, scenario=name, cases=cases)
    fitted = calibrate()
    report.show("the time model against the GPU benchmarks", FIT_COLUMNS, fit_rows(fitted))
    if options.json:
        report.write(options.json / "fit.json", "fit", given, options, fit=fitted, parameters=sources())
    targets = evaluate(played)
    show_targets(targets)
    missed = sum(not target.held for target in targets)
    minutes = (time.monotonic() - began) / 60
    report.console.print(f"{len(targets) - missed} targets hold, {missed} missed; it took {minutes:.1f} minutes")
    return 1 if missed else 0


def _play(chosen: Sequence[str], scale: float, processes: int) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Scenarios with the figures of their cases; those that are about the host's own time have it for themselves."""
    with ProcessPoolExecutor(processes) as pool:
        under_way = {name: _submit(pool, name, scale) for name in chosen if name not in ALONE}
        for name, futures in under_way.items():
            yield name, _by_case(future.result() for future in futures)
    for name in ALONE:
        if name in chosen:
            yield name, _by_case(_one_by_one(name, scale))


def _one_by_one(scenario: str, scale: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each in a new process: one that has simulated before has scattered memory, and takes 1.4 times as long."""
    for index, scheduler in _runs(scenario, scale):
        with ProcessPoolExecutor(1) as pool:
            yield pool.submit(play, scenario, index, scheduler, scale).result()


def _by_case(results: Iterable[tuple[str, str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for case, scheduler, figures in results:
        cases.setdefault(case, {})[scheduler] = figures
    return cases


def _submit(pool: ProcessPoolExecutor, scenario: str, scale: float) -> list[Future[tuple[str, str, dict[str, Any]]]]:
    return [pool.submit(play, scenario, index, scheduler, scale) for index, scheduler in _runs(scenario, scale)]


def _runs(scenario: str, scale: float) -> list[tuple[int, str]]:
    count = sum(1 for _ in SCENARIOS[scenario](scale))
    return [(index, scheduler) for index in range(count) for scheduler in (OURS, BASELINE)]


if __name__ == "__main__":
    sys.exit(main())
