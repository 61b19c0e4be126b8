# SPDX-License-Identifier: Apache-2.0
"""Decode steps as CUDA graphs, captured at start by batch size, rank tier and kind of kernel: a step is one launch."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from multilora_backend.models.attention import AttentionBackend
from multilora_backend.models.batch import Batch
from multilora_backend.models.bordered import Bordered
from multilora_backend.models.flashinfer_attention import FlashInferAttention
from multilora_backend.models.inputs import StepInputs
from multilora_backend.models.lora import LoraStep, LoraStrategy
from multilora_kernels import ANY_RANKS, rank_block_for, row_step

log = logging.getLogger(__name__)


class Forward(Protocol):
    def __call__(
        self,
        attention: AttentionBackend,
        rows: int,
        samples: int | None,
        query: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits of the step in `StepInputs`, see `ModelRunner.forward`."""
        ...


@dataclass(frozen=True, eq=False)
class DecodeGraph:
    """Computes `rows` rows, one of each sequence, whose adapters fit `tier` ranks."""

    rows: int
    tier: int
    rank_block: int
    """FEW_RANKS: no adapter may have more; ANY_RANKS: each may."""
    tiles: int
    attention: AttentionBackend
    logits: Tensor
    """[rows, vocab], overwritten by the next replay of any graph."""
    graph: torch.cuda.CUDAGraph

    def fit(self, step: LoraStep) -> LoraStep:
        """The step with as many tiles as the graph launches programs for."""
        if step.segments is None:
            return step
        return replace(step, segments=step.segments.pad_to(self.tiles))

    def replay(self) -> None:
        self.graph.replay()


def sizes_up_to(max_rows: int) -> list[int]:
    """Batch sizes to capture, ascending: a step is padded to the next, by 15 rows at most."""
    sizes = [n for n in (1, 2, 4, 8) if n < max_rows] + list(range(16, max_rows, 16))
    return [*sizes, max_rows]


def tiers_for(rows: int, tiers: tuple[int, ...]) -> list[int]:
    """Rank tiers to capture for a batch size: few rows hardly ever have many ranks (else a larger size serves them)."""
    most = max(128, 64 * rows)
    return [0, *(tier for tier in tiers if tier <= most)]


def to_capture(rank_block: int, max_rows: int, tiers: tuple[int, ...]) -> list[tuple[int, int]]:
    """(rows, tier) of the graphs for that many ranks, in the order of capture. Base traffic has none: ANY_RANKS."""
    return [
        (rows, tier)
        for rows in reversed(sizes_up_to(max_rows))
        for tier in reversed(tiers_for(rows, tiers))
        if tier or rank_block == ANY_RANKS
    ]


class DecodeGraphs:
    """All graphs share one memory pool, since they never run at the same time."""

    def __init__(
        self,
        forward: Forward,
        attention: FlashInferAttention,
        lora: LoraStrategy,
        inputs: StepInputs,
        page_size: int,
        logits: Tensor,
    ) -> None:
        """`logits` `[largest batch, vocab]` is where results go."""
        self._forward = forward
        self._attention = attention
        self._lora = lora
        self._inputs = inputs
        self._page_size = page_size
        self._logits = logits
        self._backends: dict[int, AttentionBackend] = {}
        self._pool: Any = None
        self._graphs: dict[tuple[int, int], dict[int, DecodeGraph]] = {}
        """By tier and rank_block, then rows; ascending in rows."""

    def find(self, rows: int, tier: int | None, max_rank: int) -> DecodeGraph | None:
        """The smallest graph of that tier that holds the rows, of two the one for few ranks; None: run it eagerly."""
        if tier is None:
            return None
        best: DecodeGraph | None = None
        for rank_block in sorted({rank_block_for(max_rank), ANY_RANKS}):
            by_rows = self._graphs.get((tier, rank_block), {})
            graph = next((graph for size, graph in by_rows.items() if size >= rows), None)
            if graph is not None and (best is None or graph.rows < best.rows):
                best = graph
        return best

    @torch.inference_mode()
    def capture(self, rank_block: int, budget_bytes: int) -> int:
        """Captures the largest first, since smaller ones fit into its memory; stops when the budget is spent.

        First those for ANY_RANKS, which any step can do with; those for FEW_RANKS are only faster. Returns the bytes
        that the graphs take.
        """
        started = time.monotonic()
        free_before, _ = torch.cuda.mem_get_info()
        tiers = self._lora.tiers if isinstance(self._lora, Bordered) else ()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        count, spent = 0, 0
        for rows, tier in to_capture(rank_block, len(self._logits), tiers):
            if spent > budget_bytes:
                break
            if rows not in self._backends:
                self._backends[rows] = self._attention.for_graph(rows)
            graph = self._capture(rows, tier, rank_block, self._backends[rows], self._pool)
            self._graphs.setdefault((tier, rank_block), {})[rows] = graph
            count += 1
            spent = free_before - torch.cuda.mem_get_info()[0]
        for key, graphs in self._graphs.items():
            self._graphs[key] = dict(sorted(graphs.items()))
        seconds = time.monotonic() - started
        log.info("captured %d decode graphs in %.1f s; they take %.2f GiB", count, seconds, spent / 2**30)
        return spent

    def _capture(self, rows: int, tier: int, rank_block: int, attention: AttentionBackend, pool: Any) -> DecodeGraph:
        batch = Batch.idle(1, self._page_size).padded(rows)
        step = self._lora.base_step(rows, tier, rank_block) if isinstance(self._lora, Bordered) else LoraStep()
        self._inputs.wait()
        self._inputs.load(batch, step.segments)
        self._lora.enter(step, None if step.segments is None else self._inputs.segments(step.segments))
        attention.plan(batch)
        self._inputs.planned()
        logits = self._logits[:rows]
        # Kernels are compiled and loaded outside of the capture, where that is allowed; sizes of one row step that are
        # multiples of 16 share their variants.
        if rows <= 16 or row_step(rows) not in map(row_step, self._graphs.get((tier, rank_block), ())):
            self._forward(attention, rows, None, out=logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            # Not in the pool: a result that is kept alive there could not share its memory with other graphs' results.
            self._forward(attention, rows, None, out=logits)
        tiles = 0 if step.segments is None else step.segments.num_tiles
        return DecodeGraph(rows, tier, rank_block, tiles, attention, logits, graph)
