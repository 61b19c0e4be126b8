# SPDX-License-Identifier: Apache-2.0
"""Steps with prompt chunks as pieces of CUDA graph between the layers' attention, captured at start.

Attention depends on the lengths of a step's sequences in ways that a graph cannot hold, everything else only on how
many rows there are. A step of 32 layers is 33 graph launches and 32 attention calls, 4 ms of host time where launching
every kernel by itself took 35 ms, longer than the GPU needs for 1,024 tokens of an 8B model (one H200, 2026-11-24).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from multilora_backend.adapters.ranks import PAGE
from multilora_backend.engine.graphs import Forward
from multilora_backend.models.attention import AttentionBackend
from multilora_backend.models.batch import Batch
from multilora_backend.models.inputs import StepInputs
from multilora_backend.models.layers import Attention, AttentionSpec
from multilora_backend.models.lora import Grouped, LoraStep, LoraStrategy
from multilora_kernels import max_tiles

log = logging.getLogger(__name__)

MAX_ADAPTERS = 64
"""Different adapters in a captured step: each may add a tile, and a tile without rows still costs a program."""
FEW_SAMPLES, FEW_ROWS = 64, 512
"""Up to FEW_ROWS rows the head runs on FEW_SAMPLES of them: on 256 it would take 0.4 ms of a step of 8."""


@dataclass(eq=False)
class PromptGraph:
    """Computes `rows` rows of any number of sequences, of which at most `samples` sample."""

    rows: int
    samples: int
    ranks: int
    """Largest rank of an adapter; 0: no adapters."""
    tier: int
    """Ranks of the border, which hold all adapters; 0: all of h comes from the grouped kernels."""
    tiles: int
    block_m: int
    """Of the LoRA kernels."""
    logits: Tensor
    """[samples, vocab], overwritten by the next replay of any graph."""
    pieces: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    calls: list[tuple[Tensor, Tensor, AttentionSpec, Tensor]] = field(default_factory=list)
    """KV cache, queries, spec and result of the attention after each piece but the last."""

    def fit(self, step: LoraStep) -> LoraStep:
        """The step with as many tiles as the graph launches programs for."""
        return step if step.segments is None else replace(step, segments=step.segments.pad_to(self.tiles))

    def replay(self, attention: AttentionBackend) -> None:
        for piece, (kv_cache, query, spec, out) in zip(self.pieces, self.calls, strict=False):
            piece.replay()
            attention.run(kv_cache, query, spec, out)
        self.pieces[-1].replay()


class _Recorder:
    """Stands in for attention during the capture: ends a piece and begins the next."""

    def __init__(self, graph: PromptGraph, out: Tensor, pool: Any) -> None:
        self._graph, self._out, self._pool = graph, out, pool

    def begin(self) -> None:
        self._graph.pieces.append(torch.cuda.CUDAGraph())
        self._graph.pieces[-1].capture_begin(pool=self._pool)

    def end(self) -> None:
        self._graph.pieces[-1].capture_end()

    def plan(self, batch: Batch) -> None:
        raise RuntimeError("a capture has no lengths to plan for")

    def run(self, kv_cache: Tensor, query: Tensor, spec: AttentionSpec, out: Tensor | None = None) -> Tensor:
        self.end()
        self._graph.calls.append((kv_cache, query, spec, self._out))
        self.begin()
        return self._out


def sizes_up_to(max_rows: int) -> list[int]:
    """Row counts to capture, ascending: padding is at most a quarter of a step above 256 rows."""
    sizes = [*range(64, 256, 64), *range(256, 1024, 128), *range(1024, 4096, 256), *range(4096, max_rows, 1024)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class PromptGraphs:
    """All graphs share one memory pool, and all layers the buffers around attention: they run one after the other."""

    def __init__(
        self, forward: Forward, layer: Attention, lora: LoraStrategy, inputs: StepInputs, page_size: int, logits: Tensor
    ) -> None:
        """`layer` is any attention layer, for its shape; `logits` `[most samples, vocab]` is where results go."""
        self._forward = forward
        self._layer = layer
        self._lora = lora
        self._inputs = inputs
        self._page_size = page_size
        self._logits = logits
        self._graphs: dict[tuple[int, int], list[PromptGraph]] = {}
        """By tier and ranks; ascending in rows."""

    def find(self, rows: int, samples: int, ranks: list[int]) -> PromptGraph | None:
        """The smallest graph that can run such a step, `ranks` of its adapters; None: run it eagerly."""
        if len(ranks) > MAX_ADAPTERS:
            return None
        most = max(ranks, default=0)
        for tier in sorted({self._lora.prompt_tier(ranks), 0}, reverse=True):
            for (captured_tier, captured), graphs in self._graphs.items():
                if captured_tier == tier and captured >= most and bool(captured) == bool(most):
                    return next((graph for graph in graphs if graph.rows >= rows and graph.samples >= samples), None)
        return None

    @torch.inference_mode()
    def capture(self, max_rows: int, budget_bytes: int) -> int:
        """Captures the largest first, since smaller ones fit into its memory. Returns the bytes that they take."""
        started = time.monotonic()
        free_before, _ = torch.cuda.mem_get_info()
        kv_cache = self._layer.kv_cache
        shape = (max_rows, self._layer.num_heads, self._layer.head_dim)
        query, out = (torch.zeros(shape, dtype=kv_cache.dtype, device=kv_cache.device) for _ in range(2))
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        spent = count = 0
        for rows in reversed(sizes_up_to(max_rows)):
            steps = [LoraStep(), *(self._lora.variants(rows) if isinstance(self._lora, Grouped) else ())]
            for step in steps:
                if spent > budget_bytes:
                    break
                graph = self._capture(rows, step, query[:rows], out[:rows], pool, stream)
                self._graphs.setdefault((graph.tier, graph.ranks), []).insert(0, graph)
                spent = free_before - torch.cuda.mem_get_info()[0]
                count += 1
        self._graphs = dict(sorted(self._graphs.items()))
        seconds = time.monotonic() - started
        log.info("captured %d prompt graphs in %.1f s; they take %.2f GiB", count, seconds, spent / 2**30)
        return spent

    def _capture(
        self, rows: int, step: LoraStep, query: Tensor, out: Tensor, pool: Any, stream: torch.cuda.Stream
    ) -> PromptGraph:
        samples = min(len(self._logits), FEW_SAMPLES if rows <= FEW_ROWS else rows)
        ranks = tiles = block_m = 0
        if step.segments is not None:
            ranks, block_m = step.segments.max_rank, step.segments.block_m
            # Each adapter and the rows without one may end in a tile that is not full.
            tiles = max_tiles(rows, 1 + (step.tier // PAGE or MAX_ADAPTERS), block_m)
            step = replace(step, segments=step.segments.pad_to(tiles))
        graph = PromptGraph(rows, samples, ranks, step.tier, tiles, block_m, self._logits[:samples])
        recorder = _Recorder(graph, out, pool)
        self._inputs.wait()
        self._inputs.load(Batch.idle(rows, self._page_size).sampling(samples), step.segments)
        self._inputs.planned()
        self._lora.enter(step, None if step.segments is None else self._inputs.segments(step.segments))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            recorder.begin()
            self._forward(recorder, rows, samples, query, graph.logits)
            recorder.end()
        return graph
