# SPDX-License-Identifier: Apache-2.0
"""Plots and tables of docs/scheduling.md from benchmarks/results/simulation/*.json; plots need matplotlib."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simulation.plots import draw
from simulation.tables import fill, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "simulation"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    results = read(options.results)
    document = options.docs / "scheduling.md"
    document.write_text(fill(document.read_text(), results))
    if not options.no_plots:
        draw(results, options.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
