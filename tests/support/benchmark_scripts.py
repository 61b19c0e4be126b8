# SPDX-License-Identifier: Apache-2.0
"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("engine", "latency", "misses", "plot", "profile_steps", "report", "shapes", "tables", "through_triton",
           "traffic", "vllm_figures", "weights", "workload")  # fmt: skip
HELPERS = ("client_processes", "engine_socket")


@contextmanager
def benchmark_scripts() -> Iterator[SimpleNamespace]:
    """Under their own names, which nothing else sees afterwards."""
    before = {name: sys.modules.pop(name) for name in (*SCRIPTS, *HELPERS) if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in (*SCRIPTS, *HELPERS):
            sys.modules.pop(name, None)
        sys.modules.update(before)
