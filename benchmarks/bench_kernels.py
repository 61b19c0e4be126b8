# SPDX-License-Identifier: Apache-2.0
"""Every kernel against the roofline and its torch reference: `python benchmarks/bench_kernels.py [--quick] [--tune]`.

Shapes are Llama-3.1-8B's, a batch is tokens/adapters. On CUDA a time is the median of replays of one CUDA graph, per
call, over copies of the tensors that together exceed the L2 cache: in a model, where a kernel finds its input in L2,
it is faster. The roofline is the larger of bytes over what a copy reaches and operations over what a matmul reaches on
the same card, both measured first. --tune searches the constants at the top of the kernels' files and prints the best.
Without CUDA the references run at a small model's shapes, which says nothing about the kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from kernel_cases import LLAMA_8B, SMALL, Batch, Case, Maker
from kernel_tuning import Tuned, tune

from multilora_kernels import Segments, block_m_for, rank_block_for

L2_BYTES = 128 * 2**20
"""More than twice the 50 MiB of H100 and H200."""
BATCHES = ["1/1", "32/4", "128/16", "256/1", "256/4", "256/16", "256/64", "2048/1", "2048/4", "2048/16", "8192/4"]
QUICK_BATCHES = ["1/1", "32/4", "256/16", "256/64", "2048/4", "8192/4"]
TUNE_BATCHES = QUICK_BATCHES[1:]
SITES = {"grouped_shrink": ["qkv", "o", "gate_up", "down"], "grouped_expand": ["qkv", "o", "gate_up"]}
"""down is as wide as o, so its expand is o's."""
BY_ADAPTERS = ("rope_write", "gated_activation")
BY_TOKENS = ("add_rmsnorm", *BY_ADAPTERS)
OPS = (*SITES, *BY_TOKENS, "copy_blocks")
COPY_BLOCKS_ADAPTERS = (1, 16)


def cases(maker: Maker, ops: Sequence[str], batches: Sequence[Batch]) -> Iterator[Case]:
    """One at a time: those of 8,192 tokens fill gigabytes."""
    tokens = list(dict.fromkeys(batch.tokens for batch in batches))
    ranks = list(dict.fromkeys(batch.rank for batch in batches))
    for op in ops:
        make = getattr(maker, op)
        for site in SITES.get(op, []):
            yield from (make(batch, site) for batch in batches)
        if op in BY_TOKENS:
            yield from (make(Batch(count, 0, 0)) for count in tokens)
        if op in BY_ADAPTERS:
            yield from (make(batch) for batch in batches)
        if op == "copy_blocks":
            yield from (make(Batch(0, adapters, rank)) for rank in ranks for adapters in COPY_BLOCKS_ADAPTERS)


@dataclass(frozen=True)
class Clock:
    """Measures calls on one device."""

    device: str
    budget: float
    """About how many seconds of the device a measurement may take."""
    tiles: int = 0
    """Every plan gets empty tiles up to this number, as in a captured graph."""

    def kernel(self, case: Case, block_m: int) -> float:
        """Seconds of one call."""
        segments = self._segments(case, block_m)
        return self.per_call(lambda i: case.kernel(i, segments), case.copies)

    def reference(self, case: Case, block_m: int) -> float:
        segments = self._segments(case, block_m)
        return self.per_call(lambda i: case.reference(i, segments), min(case.copies, 8))

    def per_call(self, call: Callable[[int], Any], copies: int) -> float:
        """Median over rounds through all copies."""
        call(0)  # compiles
        if self.device == "cpu":
            return statistics.median(timeit.repeat(lambda: call(0), number=1, repeat=5))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(copies):
                call(i)
        first = _replay(graph)  # uploads the graph, and warms up
        repeats = min(20, max(3, int(self.budget / first)))
        return statistics.median(_replay(graph) for _ in range(repeats)) / copies

    def _segments(self, case: Case, block_m: int) -> Segments | None:
        if not case.batch.adapters:
            return None
        plan = case.batch.plan(block_m)
        return plan.pad_to(max(self.tiles, plan.num_tiles)).to(self.device)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measured_limits(clock: Clock, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a copy, read and written; operations/s of a square matmul)."""
    size, n = (2**29, 8192) if clock.device == "cuda" else (2**24, 512)
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=clock.device, dtype=dtype)
    out = torch.empty_like(a)
    copy_s = clock.per_call(lambda i: target.copy_(source), 4)
    matmul_s = clock.per_call(lambda i: torch.mm(a, a, out=out), 2)
    return 2 * size / copy_s, 2 * n**3 / matmul_s


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if device == "cpu" and options.tune:
        print("--tune needs a CUDA device", file=sys.stderr)
        return 1
    clock = Clock(device, budget=0.005 if options.tune else 0.02, tiles=options.tiles)
    maker = Maker(LLAMA_8B, device, dtype, L2_BYTES) if device == "cuda" else Maker(SMALL, device, dtype, 0)
    names = options.batches or (TUNE_BATCHES if options.tune else QUICK_BATCHES if options.quick else BATCHES)
    ranks = options.ranks or ([16] if options.quick else [16, 64])
    sizes = [tuple(map(int, name.split("/"))) for name in names]
    batches = [Batch(tokens, adapters, rank) for rank in ranks for tokens, adapters in sizes]
    bandwidth, rate = measured_limits(clock, dtype)
    title = (
        f"{report.device_name()}: a copy moves {bandwidth / 1e9:,.0f} GB/s, a matmul does {rate / 1e12:,.1f} TFLOP/s"
    )

    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + options.seconds
    for case in cases(maker, options.ops or OPS, batches):
        if time.monotonic() > deadline:
            print(f"stopped after {options.seconds:.0f} s, before {case.op} {case.site} {case.batch}")
            break
        batch = case.batch
        block_m = block_m_for(batch.tokens, batch.adapters, rank_block_for(batch.rank))
        row: dict[str, Any] = {
            "op": case.op, "site": case.site, "tokens": batch.tokens, "adapters": batch.adapters, "rank": batch.rank,
            "block_m": block_m if batch.adapters else 0, "bytes": case.bytes, "flops": case.flops,
        }  # fmt: skip
        if options.tune:
            row |= _tuned(tune(case, block_m, clock.kernel))
            print(" ".join(_labels(row)), f"{row['us']:.1f} us, {row['best_us']:.1f} with {row['best']}", flush=True)
        else:
            row |= {"us": 1e6 * clock.kernel(case, block_m), "reference_us": 1e6 * clock.reference(case, block_m)}
        row |= {
            "gb_s": case.bytes / row["us"] / 1e3,
            "tflop_s": case.flops / row["us"] / 1e6,
            "roofline_share": 1e6 * max(case.bytes / bandwidth, case.flops / rate) / row["us"],
        }
        rows.append(row)
    (_show_tuned if options.tune else _show)(title, rows)
    limits = {"copy_gb_s": bandwidth / 1e9, "matmul_tflop_s": rate / 1e12}
    report.write(options.json, "kernels", arguments, options, limits=limits, results=rows)
    return 0


def _tuned(tuned: Tuned) -> dict[str, Any]:
    trials = [{"setting": dict(setting), "us": 1e6 * seconds} for setting, seconds in tuned.seconds.items()]
    return {
        "us": 1e6 * tuned.seconds[()],
        "best_us": 1e6 * tuned.seconds[tuned.best],
        "best": dict(tuned.best),
        "trials": [trial for trial in trials if trial["us"] < float("inf")],
    }


def _labels(row: dict[str, Any]) -> list[str]:
    size = str(Batch(row["tokens"], row["adapters"], row["rank"]))
    return [row["op"], row["site"], size, str(row["rank"] or ""), str(row["block_m"] or "")]


LABELS = ["op", "linear", "tokens/adapters", "rank", "block_m"]


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    lines = [
        [*_labels(row), f"{row['us']:.1f}", f"{row['gb_s']:,.0f}", f"{row['tflop_s']:.1f}",
         f"{100 * row['roofline_share']:.0f}", f"{row['reference_us']:.1f}"]
        for row in rows
    ]  # fmt: skip
    report.show(title, [*LABELS, "us", "GB/s", "TFLOP/s", "% of roofline", "reference us"], lines)


def _show_tuned(title: str, rows: list[dict[str, Any]]) -> None:
    lines = [
        [*_labels(row), f"{row['us']:.1f}", f"{row['best_us']:.1f}",
         " ".join(f"{name}={value}" for name, value in row["best"].items())]
        for row in rows
    ]  # fmt: skip
    report.show(title, [*LABELS, "us", "best us", "with"], lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="fewer batches, rank 16 only")
    result.add_argument("--tune", action="store_true", help="search the kernels' constants instead")
    result.add_argument("--ops", type=lambda text: text.split(","), help=f"of {','.join(OPS)}")
    result.add_argument("--batches", type=lambda text: text.split(","), help="tokens/adapters, like 32/4,256/16")
    result.add_argument("--ranks", type=report.integers)
    result.add_argument("--tiles", type=int, default=0, help="fill plans up with empty tiles, as captured graphs do")
    result.add_argument("--seconds", type=float, default=float("inf"), help="stop after that time, with what there is")
    result.add_argument("--json", type=Path, help="write the figures there")
    return result


if __name__ == "__main__":
    sys.exit(main())
