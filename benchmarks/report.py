# SPDX-License-Identifier: Apache-2.0
"""What every benchmark writes: where and when it ran, with what, and its figures; as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "BENCHMARK_COMMIT"
"""Names the commit where the code was copied without its repository."""
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "numpy", "tritonclient")
PRIVATE = ("--json", "--workdir", "--trace")
"""Options that say where things lie on one machine: left out of the recorded command."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def add_common_options(parser: argparse.ArgumentParser, shapes: Sequence[str], default: str = "tiny") -> None:
    parser.add_argument("--shape", choices=shapes, default=default)
    workdir = Path(tempfile.gettempdir(), "multilora-benchmarks")
    parser.add_argument("--workdir", type=Path, default=workdir, help="keeps the models and adapters that are made")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a further field of the engine's configuration",
    )


def settings(options: argparse.Namespace) -> dict[str, str]:
    """What `--set` says."""
    return dict(entry.split("=", 1) for entry in options.set)


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """Everything that a figure needs beside it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions,
        "commit": os.environ.get(COMMIT) or _commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_public(arguments)]),
    }


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write(
    path: Path | None, benchmark: str, arguments: Sequence[str], options: argparse.Namespace, **figures: Any
) -> None:
    """`{"benchmark", "environment", "options", ...figures}`; nothing if `path` is None."""
    if path is None:
        return
    private = {name.lstrip("-") for name in PRIVATE}
    chosen = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items() if key not in private}
    result = {"benchmark": benchmark, "environment": environment(arguments), "options": chosen, **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(_rounded(result)) + "\n")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: an observed value, never something between two."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{p}_ms": 1e3 * percentile(seconds, p) for p in (50, 90, 99)} | {"count": len(seconds)}


def integers(text: str) -> list[int]:
    """An option's type: `1,8,32`."""
    return [int(part) for part in text.split(",")]


def _public(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in PRIVATE:
            kept.append(argument)
        skip = argument in PRIVATE
    return kept


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    return commit + ("+changes" if commit and _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each list or object that holds no other: a series is one line."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(child, dict | list | tuple) for child in children):
        return json.dumps(value)
    deeper = indent + " "
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    entries = [deeper + name + _lines(child, deeper) for name, child in zip(names, children, strict=True)]
    return opening + "\n" + ",\n".join(entries) + "\n" + indent + closing


def _rounded(value: Any) -> Any:
    """Five digits: what is measured is not known better."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
