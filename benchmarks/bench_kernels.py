# SPDX-License-Identifier: Apache-2.0
"""Times grouped shrink and expand at the linears of Llama-3.1-8B: `python benchmarks/bench_kernels.py [--rank 16]`.

On CUDA each time is a median of CUDA-graph replays, per call, over copies of the tensors that together exceed the L2
cache. GB/s counts every byte once: x, the active adapters' A and h for the shrink; h, B and y twice for the expand.
Without CUDA the torch references are timed at an eighth of each width, which says nothing about the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from multilora_kernels import (
    Segments,
    block_m_for,
    grouped_expand,
    grouped_expand_reference,
    grouped_shrink,
    grouped_shrink_reference,
    plan_segments,
    splits_for,
)

SITES: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BATCHES_CUDA = [(1, 1), (32, 1), (32, 4), (128, 4), (128, 16), (256, 16), (256, 64), (2048, 4), (8192, 4)]
BATCHES_CPU = [(1, 1), (32, 4), (256, 4)]
L2_BYTES = 64 * 2**20
"""More than the 50 MiB of H100 and H200."""


@dataclass
class Result:
    site: str
    tokens: int
    adapters: int
    rank: int
    block_m: int
    splits: int
    shrink_us: float
    shrink_gb_s: float
    expand_us: float
    expand_gb_s: float


def plan(tokens: int, adapters: int, rank: int, device: str) -> Segments:
    rows = np.random.default_rng(0).permutation(np.arange(tokens, dtype=np.int32) % adapters)
    starts = np.arange(adapters, dtype=np.int32) * (-(-rank // 8) * 8)
    return plan_segments(rows, starts, np.full(adapters, rank, np.int32), block_m_for(tokens, adapters)).to(device)


def time_cuda(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Seconds a call when all are replayed in one CUDA graph."""
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def time_cpu(call: Callable[[], object]) -> float:
    call()
    return statistics.median(timeit.repeat(call, number=1, repeat=20))


def bench(site: str, tokens: int, adapters: int, rank: int, device: str, dtype: torch.dtype) -> Result:
    k, widths = SITES[site]
    if device == "cpu":
        k, widths = k // 8, tuple(width // 8 for width in widths)
    n, slices, itemsize = sum(widths), len(widths), dtype.itemsize
    segments = plan(tokens, adapters, rank, device)
    ranks = adapters * (-(-rank // 8) * 8)
    splits = splits_for(segments, slices, k) if device == "cuda" else 1

    h_bytes = splits * slices * tokens * rank * (itemsize if splits == 1 else 4)
    shrink_bytes = (tokens * k + slices * adapters * rank * k) * itemsize + h_bytes
    expand_bytes = (2 * tokens * n + adapters * rank * n) * itemsize + h_bytes
    copies = 1 if device == "cpu" else min(400, max(4, L2_BYTES // min(shrink_bytes, expand_bytes)))

    def new(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device, dtype=dtype) for _ in range(copies)]

    xs, a_pools, b_pools, ys = new(tokens, k), new(slices, ranks, k), new(ranks, n), new(tokens, n)
    if device == "cuda":
        hs = [grouped_shrink(x, a, segments, splits) for x, a in zip(xs, a_pools, strict=True)]
        shrinks = [lambda x=x, a=a: grouped_shrink(x, a, segments, splits) for x, a in zip(xs, a_pools, strict=True)]
        expands = [
            lambda y=y, h=h, b=b: grouped_expand(y, h, b, widths, segments)
            for y, h, b in zip(ys, hs, b_pools, strict=True)
        ]
        shrink_s, expand_s = time_cuda(shrinks), time_cuda(expands)
    else:
        h = grouped_shrink_reference(xs[0], a_pools[0], segments)
        shrink_s = time_cpu(lambda: grouped_shrink_reference(xs[0], a_pools[0], segments))
        expand_s = time_cpu(lambda: grouped_expand_reference(ys[0], h, b_pools[0], widths, segments))
    return Result(
        site, tokens, adapters, rank, segments.plan.block_m, splits,
        round(shrink_s * 1e6, 2), round(shrink_bytes / shrink_s / 1e9, 1),
        round(expand_s * 1e6, 2), round(expand_bytes / expand_s / 1e9, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU: torch references at an eighth of each width"
    print(f"{name}, {dtype}, torch {torch.__version__}")
    print("site     tokens adapters block_m splits  shrink us    GB/s  expand us    GB/s")
    results = []
    for tokens, adapters in BATCHES_CUDA if device == "cuda" else BATCHES_CPU:
        for site in SITES:
            r = bench(site, tokens, adapters, arguments.rank, device, dtype)
            results.append(asdict(r))
            print(
                f"{r.site:8} {r.tokens:6} {r.adapters:8} {r.block_m:7} {r.splits:6} "
                f"{r.shrink_us:10.2f} {r.shrink_gb_s:7.1f} {r.expand_us:10.2f} {r.expand_gb_s:7.1f}"
            )
    print(json.dumps({"device": name, "dtype": str(dtype), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
