# SPDX-License-Identifier: Apache-2.0
"""The simulator's modules, under the names that they have when `benchmarks/simulate.py` runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARTS = (
    "assembly",
    "calibration",
    "first_come",
    "machine",
    "model",
    "plots",
    "record",
    "scenarios",
    "simulator",
    "summary",
    "tables",
    "targets",
    "workloads",
)
SCRIPTS = ("simulate", "simulated", "plot", "report", "shapes", "tables", "vllm_figures")


@contextmanager
def simulation_modules() -> Iterator[SimpleNamespace]:
    """Nothing else sees them afterwards; modules of the same names come back."""
    names = [*SCRIPTS, "simulation", *(f"simulation.{part}" for part in PARTS)]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        parts = {part: importlib.import_module(f"simulation.{part}") for part in PARTS}
        scripts = {f"{name}_script": importlib.import_module(name) for name in ("simulate", "simulated", "shapes")}
        yield SimpleNamespace(**parts, **scripts)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
