# SPDX-License-Identifier: Apache-2.0
"""LoRA whose first half rides in the base GEMM: rows of A behind a base weight give h as further columns of y."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from multilora_backend.adapters.border import TIERS, Border
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import PAGE, padded
from multilora_backend.models.batch import Batch
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.lora import Grouped, LoraStep, plan_of_one
from multilora_kernels import CopyTable, Delta, Segments, copy_blocks, max_tiles, plan_segments

DECODE_BLOCK_M = 16
PROMPT_TIER, PROMPT_WIDTH = TIERS[0], 2
"""Steps with prompts take the border up to PROMPT_TIER ranks, at linears at most PROMPT_WIDTH times as wide as their
input. Llama-3.1-8B, 2,048 rows, one H200, bf16, 2026-11-27: 64 ranks cost the GEMMs of qkv, o and down 6, 1 and 2 us
where grouped_shrink takes 12, 7 and 22 (H100); at gate_up they cost 50 us, it takes 9. 256 ranks cost 18, 17 and 38."""
MEAN_RANK = 16
"""Assumed of a tier's adapters when programs are counted; steps of many smaller ones run at a larger tier."""


class Bordered(Grouped):
    """Decode steps take h from the border of the base GEMM, steps with prompts of few ranks at narrow linears.

    What is left, and more ranks than fit, go by kernels. The rows of A that a step needs are copied from the pool into
    the border when its adapters change, so that the GEMM grows with the step's own ranks and not with what is resident.
    """

    def __init__(self, linears: list[FusedLinear], pool: DevicePool) -> None:
        super().__init__(linears, pool)
        capacity = border_ranks(pool.num_ranks)
        self._border: Border[Any] = Border(capacity)
        for linear in linears:
            linear.add_border(capacity)
        borders = [linear.weight.data[linear.site.width :] for linear in linears]
        pools = [pool.a[linear.index] for linear in linears]
        self._table = CopyTable.of(pools, borders, [linear.slices for linear in linears])
        self._tier, self._widest = 0, 0.0
        self._copy([(0, 0, PAGE)])  # compiles the kernel, so that no request waits for that

    @property
    def tiers(self) -> tuple[int, ...]:
        return self._border.tiers

    def tier(self, ranks: list[int]) -> int | None:
        need = max(sum(padded(rank) for rank in ranks), MEAN_RANK * len(ranks))
        return next((tier for tier in (0, *self.tiers) if tier >= need), None)

    def prompt_tier(self, ranks: list[int]) -> int:
        return PROMPT_TIER if 0 < sum(padded(rank) for rank in ranks) <= PROMPT_TIER else 0

    def plan(self, batch: Batch, block_m: int = 0, tier: int = 0) -> LoraStep:
        prompts = bool(block_m or not batch.one_row_each)
        if prompts and not tier:
            return super().plan(batch, block_m)
        slots = np.unique(batch.adapter_slots)
        keys = [(slot, int(self._pool.generation[slot])) for slot in slots[slots >= 0].tolist()]
        placement = self._border.place({key: int(self._pool.rank[key[0]]) for key in keys})
        if placement is None:
            return super().plan(batch, block_m)
        if not placement.tier:
            return LoraStep()
        h_start = np.zeros_like(self._pool.rank_start)
        for key, start in placement.start.items():
            h_start[key[0]] = start
        pool = self._pool
        segments = plan_segments(batch.adapter_slots, pool.rank_start, pool.rank, block_m or DECODE_BLOCK_M, h_start)
        extras, experts = self.extras.plan(batch, segments), self.acts_on_experts(batch)
        return LoraStep(segments, placement.tier, placement.moves, prompts, extras, experts)

    def variants(self, rows: int) -> Iterator[LoraStep]:
        yield from super().variants(rows)
        for rank in self.rank_variants():
            yield LoraStep(plan_of_one(rows, rank, np.zeros(1, dtype=np.int32)), PROMPT_TIER, prompts=True)

    def base_step(self, rows: int, tier: int, rank_block: int) -> LoraStep:
        """A step of rows without adapter that runs at that tier all the same: what graphs are captured with.

        `rank_block`: FEW_RANKS, and the graph serves no adapter of more ranks, or ANY_RANKS.
        """
        none = np.full(rows, -1, dtype=np.int32)
        zero = np.zeros(1, dtype=np.int32)
        if not tier:
            return LoraStep()
        segments = plan_segments(none, zero, zero, DECODE_BLOCK_M, zero)
        segments = segments.pad_to(max_tiles(rows, tier // MEAN_RANK + 1, DECODE_BLOCK_M))
        return LoraStep(replace(segments, rank_block=rank_block), tier)

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        super().enter(step, segments)
        self._tier = self._h_ranks = step.tier
        self._widest = PROMPT_WIDTH if step.prompts else math.inf
        if step.moves:
            pool, targets = self._pool, [(move.key[0], move.start) for move in step.moves]
            self._copy([(int(pool.rank_start[s]), start, padded(int(pool.rank[s]))) for s, start in targets])

    def forget_copies(self) -> None:
        self._border.clear()

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        width = linear.site.width
        if not self._tier or width > self._widest * linear.site.in_features:
            return super().project(linear, x)
        end = width + self._tier * linear.slices
        y = F.linear(x, linear.weight[:end], None if linear.bias is None else linear.bias[:end])
        assert self._segments is not None
        return y[:, :width], Delta(y[:, width:], self._pool.b[linear.index], self._segments)

    def _copy(self, moves: list[tuple[int, int, int]]) -> None:
        """Queues copies from the pool into the border: (first rank there, first rank here, padded rank) of each."""
        device = self._pool.device
        rows = torch.tensor(moves, dtype=torch.int32, pin_memory=device.type == "cuda")
        copy_blocks(self._table, rows.to(device, non_blocking=True))


def border_ranks(num_ranks: int) -> int:
    """Ranks of the border behind each linear for a pool of so many."""
    return next((tier for tier in TIERS if tier >= num_ranks), TIERS[-1])
