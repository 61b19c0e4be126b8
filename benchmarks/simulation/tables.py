# SPDX-License-Identifier: Apache-2.0
"""Writes what was simulated into docs/scheduling.md, as benchmarks/tables.py does what was measured.

A block `<!-- simulated: NAME -->` ... `<!-- /simulated -->` becomes a table: `targets`, judged over all scenarios that
are there; `fit` and `parameters` of fit.json; or the cases of a scenario. No figure in those blocks is typed by hand,
and a test sees to it.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tables import markdown

from simulation.targets import evaluate

BLOCK = re.compile(r"<!-- simulated: (?P<name>[\w-]+) -->\n.*?<!-- /simulated -->", re.DOTALL)

Result = dict[str, Any]


def read(folder: Path) -> dict[str, Result]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def fill(document: str, results: dict[str, Result]) -> str:
    """The document with every block made anew."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "targets" and results:
            text = targets(results)
        elif name in ("fit", "parameters") and "fit" in results:
            text = {"fit": fit, "parameters": parameters}[name](results["fit"])
        elif name in results:
            text = cases(results[name])
        else:
            text = "Not simulated."
        return f"<!-- simulated: {name} -->\n{text}\n<!-- /simulated -->"

    return BLOCK.sub(block, document)


def targets(results: dict[str, Result]) -> str:
    judged = evaluate({case: runs for result in results.values() for case, runs in result.get("cases", {}).items()})
    rows = [
        [
            target.what,
            number(target.value),
            f"{'at most' if target.at_most else 'at least'} {number(target.limit)}",
            "holds" if target.held else "**missed**",
            target.beside,
        ]
        for target in judged
    ]
    return markdown(["target", "simulated", "limit", "", "beside it"], rows)


def source(result: Result) -> str:
    at = result["environment"]
    return f"`{at['command']}`, CPython {at['python']}, {at['cores']} cores; commit {at['commit']}, {at['date']}."


FIT_COLUMNS = ("run", "figure", "measured", "at commit", "simulated", "ratio")


def fit_rows(fitted: list[dict[str, Any]]) -> list[list[str]]:
    """A row of FIT_COLUMNS for each run that the time model can be held against."""
    rows = []
    for row in fitted:
        measured, simulated = row["measured"], row["simulated"]
        digits = 0 if measured >= 1000 else 2
        before, after = (f"{value:,.{digits}f}" for value in (measured, simulated))
        rows.append([row["run"], row["figure"], before, row["commit"], after, f"{simulated / measured:.3f}"])
    return rows


def fit(result: Result) -> str:
    return markdown(FIT_COLUMNS, fit_rows(result["fit"]))


def parameters(result: Result) -> str:
    rows = [[f"`{name}`", number(p["value"]), p["source"]] for name, p in result["parameters"].items()]
    return markdown(["parameter", "value", "source"], rows)


def cases(result: Result) -> str:
    rows = []
    for case, runs in result["cases"].items():
        for scheduler, f in runs.items():
            arrived = sum(f["arrivals"].values()) or 1
            levels = " / ".join(f"{100 * f['arrivals'].get(level, 0) / arrived:.0f}" for level in LEVELS)
            rows.append(
                [
                    case,
                    scheduler,
                    f"{f['finished']:,} of {f['requests']:,}",
                    f"{f['tokens_per_s']:,.0f}",
                    f"{f['ttft_s']['p50']:.2f} / {f['ttft_s']['p99']:.2f}",
                    f"{f['goodput']:.1f}",
                    f"{f['loads']:,} / {f['reads']:,}",
                    levels if sum(f["arrivals"].values()) else "",
                ]
            )
    columns = ["case", "scheduler", "done", "tokens/s", "TTFT p50 / p99 s", "goodput/s", "loads / reads", "found, %"]
    return f"{markdown(columns, rows)}\n\n{source(result)}"


LEVELS = ("device", "host", "disk")


def number(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
