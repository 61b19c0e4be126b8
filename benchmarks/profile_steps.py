# SPDX-License-Identifier: Apache-2.0
"""Where the time of a saturated decode goes: how busy the GPU is, which kernels take it, and what the gaps are.

`--max-num-seqs` requests decode over `--adapters` adapters. First `--steps` steps are timed alone, then as many are
traced by torch.profiler (CUPTI, device activity only, since recording the host's calls slows the host down and makes
gaps of its own). Busy is the union of the kernels' intervals, over all streams, divided by the time from the first to
the last; copies are counted apart. (Not called profile.py: the standard library has a module of that name, which
torch imports.)

    python benchmarks/profile_steps.py --shape llama-3.1-8b --input 256 --adapters 16
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import report
import torch
from shapes import SHAPES
from weights import Workdir, adapter_name, device_bytes, round_robin, settings_for
from workload import Driver, running

EDGE_STEPS = 4
"""Traced at each end and not looked at: there the host waits for the profiler."""
GAP_LIMITS_US = (2.0, 10.0, 100.0)
LARGEST_GAPS = 8
KERNEL, COPY = "kernel", "copy"
CATEGORIES = {"kernel": KERNEL, "gpu_memcpy": COPY, "gpu_memset": COPY, "cpu_op": KERNEL}
"""cpu_op only without CUDA, where the script's own test runs."""


@dataclass(frozen=True)
class Interval:
    """One kernel or copy; microseconds."""

    start: float
    end: float
    name: str
    kind: str = KERNEL


def busy_and_gaps(intervals: Iterable[Interval]) -> tuple[float, list[tuple[float, str, str]]]:
    """Microseconds in which at least one interval runs, and the gaps between: (us, what ended, what came next)."""
    ordered = sorted(intervals, key=lambda interval: interval.start)
    if not ordered:
        return 0.0, []
    last, begin, gaps, busy = ordered[0], ordered[0].start, [], 0.0
    for interval in ordered[1:]:
        if interval.start > last.end:
            busy += last.end - begin
            gaps.append((interval.start - last.end, last.name, interval.name))
            begin = interval.start
        if interval.end > last.end:
            last = interval
    return busy + last.end - begin, gaps


def summary(intervals: Sequence[Interval], steps: int) -> dict[str, Any]:
    """`steps` plus twice EDGE_STEPS were traced; steps of a decode take equal time, so the edges are cut by time."""
    first, last = min(i.start for i in intervals), max(i.end for i in intervals)
    edge = (last - first) * EDGE_STEPS / (steps + 2 * EDGE_STEPS)
    inside = [i for i in intervals if first + edge <= i.start and i.end <= last - edge]
    kernels = [i for i in inside if i.kind == KERNEL]
    if not kernels:
        raise RuntimeError("the trace holds no kernels")
    wall = max(i.end for i in inside) - min(i.start for i in inside)
    busy, gaps = busy_and_gaps(kernels)
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(short(kernel.name), []).append(kernel.end - kernel.start)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    limits = [0.0, *GAP_LIMITS_US, float("inf")]
    return {
        "wall_us_per_step": wall / steps,
        "kernel_busy": busy / wall,
        "kernel_or_copy_busy": busy_and_gaps(inside)[0] / wall,
        "kernels_per_step": len(kernels) / steps,
        "kernels": [
            {
                "name": name,
                "calls_per_step": len(times) / steps,
                "us_per_step": sum(times) / steps,
                "share": sum(times) / wall,
            }
            for name, times in top
        ],
        "gaps": [
            {"from_us": low, "count_per_step": len(found) / steps, "us_per_step": sum(found) / steps}
            for low, high in pairwise(limits)
            for found in [[us for us, _, _ in gaps if low <= us < high]]
        ],
        "largest_gaps": [
            {"us": us, "after": short(before), "before": short(after)}
            for us, before, after in sorted(gaps, reverse=True)[:LARGEST_GAPS]
        ],
    }


def short(name: str) -> str:
    """A kernel's name without its arguments, cut: C++ templates run to hundreds of characters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"\(", name, maxsplit=1)[0][:72] or name[:72]


def trace(driver: Driver, steps: int, save: Path | None) -> list[Interval]:
    """Device activity of `steps` steps and of EDGE_STEPS on either side."""
    on_cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]):
        driver.step()  # the first profile starts CUPTI, which takes seconds
    with torch.profiler.profile(activities=[activity]) as profile:
        _steps(driver, steps + 2 * EDGE_STEPS)
        if on_cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = save or Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    intervals = [
        Interval(event["ts"], event["ts"] + event["dur"], event["name"], CATEGORIES[event["cat"]])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in CATEGORIES
    ]
    if not intervals:
        raise RuntimeError("torch.profiler recorded nothing on the device; is CUPTI allowed on this machine?")
    return intervals


def _steps(driver: Driver, count: int) -> float:
    started = time.monotonic()
    for _ in range(count):
        if not driver.step():
            raise RuntimeError("the requests ended before the steps did")
    return (time.monotonic() - started) / count


def measure(driver: Driver, options: argparse.Namespace) -> dict[str, Any]:
    names = [adapter_name(options.rank, i) for i in range(options.adapters)]
    driver.load(names)
    # Enough output that nobody ends before the last traced step, whenever their prompts were done.
    prefill = options.max_num_seqs * options.input // driver.engine.config.max_num_batched_tokens + 8
    steps = 2 * (options.steps + 2 * EDGE_STEPS) + prefill + options.warm_up
    driver.submit(round_robin(names or [""], options.max_num_seqs), options.input, steps)
    while driver.engine.scheduler.waiting or not driver.all_started():
        driver.step()
    _steps(driver, options.warm_up)
    alone = _steps(driver, options.steps)
    found = summary(trace(driver, options.steps, options.trace), options.steps)
    driver.finish()
    busy_us = found["kernel_busy"] * found["wall_us_per_step"]
    return {
        "step_us": 1e6 * alone,
        "kernel_us_per_step": busy_us,
        "busy_of_untraced_step": busy_us / 1e6 / alone,
        **found,
    }


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    title = (
        f"{options.shape}, {report.device_name()}: decode of {options.max_num_seqs} requests, "
        f"{options.adapters} adapters of rank {options.rank}"
    )
    rows = [
        [k["name"], f"{k['calls_per_step']:.1f}", f"{k['us_per_step']:.1f}", f"{100 * k['share']:.1f}%"]
        for k in found["kernels"][: options.top]
    ]
    report.show(title, ["kernel", "calls/step", "us/step", "of wall"], rows)
    rows = [
        [f"from {gap['from_us']:g} us", f"{gap['count_per_step']:.1f}", f"{gap['us_per_step']:.1f}"]
        for gap in found["gaps"]
    ]
    report.show("gaps between kernels", ["gap", "count/step", "us/step"], rows)
    for gap in found["largest_gaps"]:
        report.console.print(f"  {gap['us']:.0f} us between {gap['after']} and {gap['before']}")
    traced, untraced = (100 * found[name] for name in ("kernel_busy", "busy_of_untraced_step"))
    report.console.print(
        f"step {found['step_us']:.0f} us untraced, {found['wall_us_per_step']:.0f} us traced; kernels run for "
        f"{found['kernel_us_per_step']:.0f} us of it: GPU idle {100 - traced:.1f}% of the traced time, "
        f"{100 - untraced:.1f}% of the untraced"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    workdir = Workdir(options.workdir, options.shape, "cuda" if torch.cuda.is_available() else "cpu")
    names = [adapter_name(options.rank, i) for i in range(options.adapters)]
    catalogue = workdir.adapters(names) if names else None
    pool = device_bytes(workdir.shape, names)
    settings = settings_for(workdir.model(), catalogue, pool, max_num_seqs=options.max_num_seqs)
    settings |= report.settings(options)
    torch.cuda.empty_cache()  # what making the weights took
    with running(**settings) as (driver, _):
        found = measure(driver, options)
    show(found, options)
    report.write(options.json, "profile_steps", arguments, options, **found)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_common_options(result, list(SHAPES))
    result.add_argument("--adapters", type=int, default=16, help="0: the base model, LoRA off")
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    result.add_argument("--max-num-seqs", type=int, default=256)
    result.add_argument("--steps", type=int, default=50)
    result.add_argument("--warm-up", type=int, default=10, help="decode steps before the measured ones")
    result.add_argument("--top", type=int, default=15, help="kernels in the table")
    result.add_argument("--trace", type=Path, help="keep the trace, for chrome://tracing or Perfetto")
    return result


if __name__ == "__main__":
    sys.exit(main())
