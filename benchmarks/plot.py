# SPDX-License-Identifier: Apache-2.0
"""Draws docs/*.png from benchmarks/results/*.json: `python benchmarks/plot.py`. Nothing else needs matplotlib.

engine.json gives throughput.png and share.png, each with vLLM's figures; latency.json gives latency.png. What is not
there is not drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import vllm_figures

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS, MUTED = "#1f77b4", "#d95f02", "#9a9a9a"
MIXES = ("off", "0", "1", "4", "16", "64")
LABELS = {"off": "LoRA off", "0": "LoRA on,\nbase traffic"}


def pyplot() -> ModuleType:
    """Exits with a sentence where matplotlib is missing: the figures are committed, so nobody needs it to read them."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("benchmarks/plot.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def throughput(result: dict[str, Any], path: Path, share: bool) -> None:
    """Output tokens/s, or each engine's share of its own base, by number of adapters in the mix."""
    plt = pyplot()
    best = result["best"]
    mixes = [mix for mix in MIXES if mix in best]
    ours = [best[mix] / (best[mixes[0]] if share else 1) for mix in mixes]
    theirs = {mix: rate for mix in mixes if (rate := vllm_figures.rate(result["options"], mix))}
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    at = list(range(len(mixes)))
    axes.plot(at, ours, "o-", color=OURS, label=f"multilora, {result['environment']['device']}")
    if theirs:
        scale = vllm_figures.BASE if share else 1
        positions = [mixes.index(mix) for mix in theirs]
        values = [rate / scale for rate in theirs.values()]
        axes.plot(positions, values, "s--", color=THEIRS, label="vLLM 0.26, NVIDIA H200 (max_loras 64)")
    if share:
        targets = [vllm_figures.TARGET_SHARES[mix] for mix in mixes]
        axes.plot(at, targets, "_", color=MUTED, markersize=16, label="target")
        axes.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1.0))
    for x, value in zip(at, ours, strict=True):
        text = f"{100 * value:.1f}%" if share else f"{value:,.0f}"
        axes.annotate(text, (x, value), textcoords="offset points", xytext=(0, 7), ha="center", color=OURS)
    axes.set_xticks(at, [LABELS.get(mix, mix) for mix in mixes])
    axes.set_xlabel("adapters in the mix")
    axes.set_ylabel("share of own base" if share else "output tokens/s")
    axes.set_ylim(0, 1.15 * max(*ours, *(rate / (vllm_figures.BASE if share else 1) for rate in theirs.values()), 0))
    options = result["options"]
    axes.set_title(
        f"{options['shape']} bf16, {options['requests']} requests, {options['input']} in / {options['output']} out, "
        f"rank {options['rank']}",
        fontsize=9,
    )
    axes.legend(frameon=False, loc="lower left")
    save(plt, figure, path)


def latency(result: dict[str, Any], path: Path) -> None:
    """Time between tokens by batch size: bars to the median, marks at p99."""
    plt = pyplot()
    rows = result["rows"]
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    kinds = (("base", MUTED), ("one adapter", OURS), ("an adapter a request", THEIRS))
    for index, (kind, colour) in enumerate(kinds):
        chosen = [(batches.index(row["batch"]), row["inter_token"]) for row in rows if _kind(row) == kind]
        at = [x + (index - 1) * 0.27 for x, _ in chosen]
        axes.bar(at, [gap["p50_ms"] for _, gap in chosen], 0.25, color=colour, label=kind)
        axes.plot(at, [gap["p99_ms"] for _, gap in chosen], "k_", markersize=9, label="p99" if index == 0 else None)
        for x, (_, gap) in zip(at, chosen, strict=True):
            axes.annotate(f"{gap['p50_ms']:.2f}", (x, gap["p50_ms"] / 2), ha="center", fontsize=7, color="white")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("requests in the batch")
    axes.set_ylabel("ms between tokens, p50")
    axes.set_title(f"{result['options']['shape']} bf16, {result['environment']['device']}", fontsize=9)
    axes.set_ylim(0, 1.25 * max(row["inter_token"]["p99_ms"] for row in rows))
    axes.legend(frameon=False, ncols=4, loc="upper left", fontsize=8)
    save(plt, figure, path)


def _kind(row: dict[str, Any]) -> str:
    return {0: "base", 1: "one adapter"}.get(row["adapters"], "an adapter a request")


def save(plt: ModuleType, figure: Any, path: Path) -> None:
    figure.tight_layout()
    # Without the version in its metadata the same figures give the same file.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    print(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    if "engine" in found:
        throughput(found["engine"], options.docs / "throughput.png", share=False)
        throughput(found["engine"], options.docs / "share.png", share=True)
    if "latency" in found:
        latency(found["latency"], options.docs / "latency.png")
    if not found.keys() & {"engine", "latency"}:
        print(f"{options.results} holds neither engine.json nor latency.json", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
