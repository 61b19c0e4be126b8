# SPDX-License-Identifier: Apache-2.0
"""The time model against what it is fitted to: the engine benchmark's runs, simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simulation.model import TimeModel
from simulation.simulator import Setup, simulate
from simulation.workloads import Request, adapter_name

MEASURED = Path(__file__).resolve().parents[1] / "results" / "engine.json"
MIXES = ("off", "1", "4", "16", "64")
START_S = 10.0
"""By then the adapters are resident: the benchmark does not time their loads."""


def calibrate(model: TimeModel | None = None, measured: Path = MEASURED) -> list[dict[str, Any]]:
    """For each mix of the benchmark: output tokens/s measured and simulated."""
    result = json.loads(measured.read_text())
    options = result["options"]
    rows = []
    for mix in MIXES:
        names = [""] if mix == "off" else [adapter_name(i) for i in range(int(mix))]
        warm = [Request(0.0, name, 2, 1) for name in names]
        count, prompt, output = options["requests"], options["input"], options["output"]
        timed = [Request(START_S, names[i % len(names)], prompt, output) for i in range(count)]
        setup = Setup({name: options["rank"] for name in names if name}, len(names), 2**40)
        rate = count * output / (simulate(warm + timed, setup, model).seconds - START_S)
        rows.append({"mix": mix, "measured": result["best"][mix], "simulated": rate})
    return rows
