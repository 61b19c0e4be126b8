# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of benchmarks/results/*.json into docs/performance.md: `python benchmarks/tables.py`.

A block `<!-- results: NAME -->` ... `<!-- /results -->` becomes the table of results/NAME.json with its command,
machine, versions, commit and date below; `<!-- plot: NAME TEXT -->` ... `<!-- /plot -->` becomes docs/NAME.png, if it
is there. So no figure in those blocks is typed by hand, and a test sees to it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vllm_figures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- results: (?P<name>[\w.-]+) -->\n.*?<!-- /results -->", re.DOTALL)
PLOT = re.compile(r"<!-- plot: (?P<name>[\w-]+) (?P<text>[^\n]+) -->\n.*?<!-- /plot -->", re.DOTALL)
KERNELS_SHOWN = 12

Result = dict[str, Any]


def fill(document: str, results: Path = RESULTS, plots: Path = DOCUMENT.parent) -> str:
    """The document with every block made anew."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        path = results / f"{name}.json"
        text = render(json.loads(path.read_text())) if path.exists() else "Not measured."
        return f"<!-- results: {name} -->\n{text}\n<!-- /results -->"

    def plot(match: re.Match[str]) -> str:
        name, text = match["name"], match["text"]
        image = f"![{text}]({name}.png)\n" if (plots / f"{name}.png").exists() else ""
        return f"<!-- plot: {name} {text} -->\n{image}<!-- /plot -->"

    return PLOT.sub(plot, BLOCK.sub(block, document))


def render(result: Result) -> str:
    """A result as Markdown."""
    return f"{RENDERERS[result['benchmark']](result)}\n\n{source(result)}"


def source(result: Result) -> str:
    """One sentence: what gave the figures."""
    at = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    driver = f", driver {at['driver']}" if at["driver"] else ""
    device = "the CPU" if at["device"] == "CPU" else f"one {at['device']}"
    where = f"{device}{driver}, {at['cores']} cores, CPython {at['python']}, {versions}"
    return f"`{at['command']}` on {where}; commit {at['commit']}, {at['date']}."


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def engine(result: Result) -> str:
    best, options = result["best"], result["options"]
    base = best.get("off") or best.get("0")
    comparable, rows = False, []
    for mix, rate in best.items():
        vllm = vllm_figures.rate(options, mix)
        comparable |= vllm is not None
        target = None if options["max_loras"] else vllm_figures.TARGET_SHARES.get(mix)
        rows.append(
            [
                mix,
                f"{rate:,.0f}",
                f"{100 * rate / base:.1f}%" if base else "",
                f"{100 * target:.0f}%" if target else "",
                f"{vllm:,.0f}" if vllm else "",
                f"{100 * vllm / vllm_figures.BASE:.0f}%" if vllm else "",
            ]
        )
    columns = ["adapters", "output tokens/s", "of own base", "target", "vLLM 0.26 on one H200", "of its base"]
    if not comparable:  # another setting than vLLM's and the targets'
        columns, rows = columns[:3], [row[:3] for row in rows]
    repeats = max(map(len, result["runs"].values()))
    worst = max(1 - min(r["tokens_per_s"] for r in runs) / best[mix] for mix, runs in result["runs"].items())
    starts = ", ".join(f"{one['ready_s']:.1f} s with LoRA {kind}" for kind, one in result["start"].items())
    return (
        f"{markdown(columns, rows)}\n\nBest of {repeats}; the worst run was {100 * worst:.1f}% below its best. "
        f"Engine start to ready: {starts}."
    )


def latency(result: Result) -> str:
    base = {row["batch"]: row["inter_token"]["p50_ms"] for row in result["rows"] if not row["adapters"]}
    rows = []
    for row in result["rows"]:
        times = [f"{row[kind][p]:.2f}" for kind in ("ttft", "inter_token") for p in ("p50_ms", "p99_ms")]
        share = row["inter_token"]["p50_ms"] / base[row["batch"]]
        rows.append([str(row["batch"]), str(row["adapters"] or "base"), *times, f"{share:.3f}"])
    columns = ["batch", "adapters", "TTFT p50 ms", "TTFT p99 ms", "between tokens p50 ms", "p99 ms", "p50 / base"]
    return markdown(columns, rows)


def loads(result: Result) -> str:
    first = result["rows"][0]["inter_token"]["p99_ms"]
    rows = []
    for row in result["rows"]:
        gap, load = row["inter_token"], row["load"]
        kind = f"loads from {result['options']['load_from']}" if row["loading"] else "nothing loaded"
        took = f"{load['p50_ms']:.1f}" if load["count"] else ""
        times = [f"{gap[p]:.2f}" for p in ("p50_ms", "p99_ms")]
        rows.append([kind, str(load["count"]), took, *times, f"{100 * gap['p99_ms'] / first - 100:+.1f}%"])
    return markdown(["decode", "loads", "load p50 ms", "between tokens p50 ms", "p99 ms", "p99 change"], rows)


def misses(result: Result) -> str:
    hit = next(row["ttft"]["p50_ms"] for row in result["rows"] if row["kind"] == "hit")
    rows = []
    for row in result["rows"]:
        ttft = row["ttft"]
        kind = f"miss, from {result['options']['load_from']}" if row["kind"] == "miss" else row["kind"]
        times = [f"{ttft[p]:.2f}" for p in ("p50_ms", "p90_ms")]
        rows.append([kind, str(ttft["count"]), *times, f"{ttft['p50_ms'] - hit:+.2f}" if kind != row["kind"] else ""])
    return markdown(["request", "count", "TTFT p50 ms", "p90 ms", "p50 more than a hit's"], rows)


def through_triton_rows(result: Result) -> list[list[str]]:
    """What is compared, the engine alone, through Triton, and how the two differ."""
    one, two = result["engine"], result["triton"]
    share = f"{100 * two['tokens_per_s'] / one['tokens_per_s']:.1f}%"
    rows = [["output tokens/s", f"{one['tokens_per_s']:,.0f}", f"{two['tokens_per_s']:,.0f}", share]]
    kinds = {
        "open_ttft": f"at {result['open_rate']:.1f} requests/s",
        "closed_ttft": "closed",
        "begin_ttft": f"closed, the first {result['options']['streams']}",
        "follow_ttft": "closed, those that follow",
    }
    for kind, when in kinds.items():
        for p in ("p50_ms", "p99_ms") if kind in one else ():
            a, b = one[kind][p], two[kind][p]
            rows.append([f"TTFT {p[:3]} ms, {when}", f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"])
    return rows


def through_triton_note(result: Result) -> str:
    two = result["triton"]
    cores = ", ".join(f"{name} {used:.2f}" for name, used in two["cores_used"].items())
    return (
        f"Server ready after {two['ready_s']:.1f} s. Cores used in closed traffic: {cores}; "
        f"{two['tokens_per_response']:.1f} tokens a response."
    )


def through_triton(result: Result) -> str:
    table = markdown(["", "engine alone", "through Triton", ""], through_triton_rows(result))
    return f"{table}\n\n{through_triton_note(result)}"


def profile_steps(result: Result) -> str:
    rows = [
        [f"`{k['name']}`", f"{k['calls_per_step']:.1f}", f"{k['us_per_step']:.1f}", f"{100 * k['share']:.1f}%"]
        for k in result["kernels"][:KERNELS_SHOWN]
    ]
    table = markdown(["kernel", "calls a step", "us a step", "of the time"], rows)
    return (
        f"{table}\n\nA step takes {result['step_us']:,.0f} us untraced, {result['wall_us_per_step']:,.0f} us traced. "
        f"Kernels run for {result['kernel_us_per_step']:,.0f} us of the latter: the GPU is idle "
        f"{100 - 100 * result['kernel_busy']:.1f}% of the time."
    )


def kernels(result: Result) -> str:
    rows = []
    for row in result["results"]:
        rank, reference = str(row["rank"] or ""), f"{row['reference_us']:,.0f}"
        speed = [
            f"{row['us']:.1f}",
            f"{row['gb_s']:,.0f}",
            f"{row['tflop_s']:.1f}",
            f"{100 * row['roofline_share']:.0f}%",
        ]
        batch = f"{row['tokens']}/{row['adapters']}"
        rows.append([f"`{row['op']}`", row["site"], batch, rank, *speed, reference])
    columns = ["kernel", "linear", "tokens/adapters", "rank", "us", "GB/s", "TFLOP/s", "of roofline", "reference us"]
    limits = result["limits"]
    return (
        f"{markdown(columns, rows)}\n\nThe roofline: a copy reached {limits['copy_gb_s']:,.0f} GB/s, a matmul "
        f"{limits['matmul_tflop_s']:,.0f} TFLOP/s."
    )


RENDERERS: dict[str, Callable[[Result], str]] = {
    "engine": engine,
    "latency": latency,
    "latency_during_loads": loads,
    "misses": misses,
    "through_triton": through_triton,
    "profile_steps": profile_steps,
    "kernels": kernels,
}


def main() -> int:
    DOCUMENT.write_text(fill(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
