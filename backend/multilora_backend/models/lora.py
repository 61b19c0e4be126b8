# SPDX-License-Identifier: Apache-2.0
"""How LoRA is computed: strategies behind one interface, chosen by name.

Every strategy makes, for each row with an adapter, `B (A x)` of that adapter at its own rank, slice by slice, be added
to the base linear, and leaves rows without one untouched bit for bit. They differ in where `h = A x` comes from: from
grouped kernels over rows sorted by adapter, or from columns behind the base GEMM's output (the border).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from multilora_backend.adapters.border import TIERS, Border, Move
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import PAGE, padded
from multilora_backend.models.batch import Batch
from multilora_backend.models.extras import Mask, StepExtras
from multilora_backend.models.linear import FusedLinear
from multilora_kernels import (
    CopyTable,
    Delta,
    SegmentPlan,
    Segments,
    block_m_for,
    copy_blocks,
    grouped_expand_reference,
    grouped_shrink,
    grouped_shrink_reference,
    max_tiles,
    plan_segments,
)

DECODE_BLOCK_M = 16
RANK_VARIANTS = (16, 64)
"""Kernels take 16 ranks at a time up to rank 16, 32 beyond. Steps with prompts are captured for ranks up to these."""
MEAN_RANK = 16
"""Assumed of a tier's adapters when programs are counted; steps of many smaller ones run at a larger tier."""


@dataclass(frozen=True, eq=False)
class LoraStep:
    """What a strategy does in one step. `segments` None: no row has an adapter."""

    segments: SegmentPlan | None = None
    tier: int = 0
    """Ranks of the border behind each slice of the base GEMM; 0: h comes from grouped_shrink."""
    moves: tuple[Move, ...] = ()
    """What has to be copied into the border first."""
    extras: Mask | None = None
    """None: no adapter of the step has any, and nothing is launched for them."""


class LoraStrategy(Protocol):
    extras: StepExtras
    """What the adapters have besides A and B."""

    def ranks(self, batch: Batch) -> list[int]:
        """The ranks of the batch's different adapters."""
        ...

    def tier(self, ranks: list[int]) -> int | None:
        """The smallest tier of the border for a decode step of such adapters, 0 for none; None: not by the border."""
        ...

    def plan(self, batch: Batch, block_m: int = 0) -> LoraStep:
        """Host metadata for a step: which rows belong to which adapter.

        `block_m`: rows of a tile of the grouped kernels, which then do the step; 0: whatever suits the batch.
        """
        ...

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        """Queues the step's moves; from here on `project` works under this step. `segments` are its, on the device."""
        ...

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        """x `[T, in_features]` -> base output `[T, width]` and what is to be added to it."""
        ...


class NoLora:
    """For models served without adapters, and for steps that have none."""

    extras = StepExtras(None)

    def ranks(self, batch: Batch) -> list[int]:
        return []

    def tier(self, ranks: list[int]) -> int | None:
        return 0

    def plan(self, batch: Batch, block_m: int = 0) -> LoraStep:
        return LoraStep()

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        pass

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        width = linear.site.width
        bias = None if linear.bias is None else linear.bias[:width]
        return F.linear(x, linear.weight[:width], bias), None


class Grouped(NoLora):
    """Two grouped kernels a linear, the second one fused into its consumer where there is one."""

    def __init__(self, linears: list[FusedLinear], pool: DevicePool) -> None:
        self._pool = pool
        self._segments: Segments | None = None
        self.extras = StepExtras(pool.extras)

    def ranks(self, batch: Batch) -> list[int]:
        slots = np.unique(batch.adapter_slots)
        return self._pool.rank[slots[slots >= 0]].tolist()

    def tier(self, ranks: list[int]) -> int | None:
        return None if ranks else 0

    def plan(self, batch: Batch, block_m: int = 0) -> LoraStep:
        rows = batch.adapter_slots
        block_m = block_m or block_m_for(len(rows), len(np.unique(rows)))
        segments = plan_segments(rows, self._pool.rank_start, self._pool.rank, block_m)
        return LoraStep(segments if segments.max_rank else None, extras=self.extras.plan(segments))

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        self._segments = segments
        self.extras.enter(step.extras, segments)

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        y, _ = super().project(linear, x)
        if self._segments is None:
            return y, None
        h = grouped_shrink(x, self._pool.a[linear.index], linear.slices, self._segments)
        return y, Delta(h, self._pool.b[linear.index], self._segments)

    def variants(self, rows: int) -> Iterator[LoraStep]:
        """Steps of `rows` rows that between them launch every variant of the kernels."""
        slots, zero = np.zeros(rows, dtype=np.int32), np.zeros(1, dtype=np.int32)
        for rank in sorted({min(rank, self._pool.num_ranks) for rank in RANK_VARIANTS}):
            yield LoraStep(plan_segments(slots, zero, zero + rank, block_m_for(rows, 1)))


class Reference(Grouped):
    """Plain torch, one matmul per adapter and slice: what every other strategy is tested against."""

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        y, _ = NoLora.project(self, linear, x)
        if self._segments is not None:
            h = grouped_shrink_reference(x, self._pool.a[linear.index], linear.slices, self._segments)
            delta = Delta(h, self._pool.b[linear.index], self._segments)
            grouped_expand_reference(y, delta, linear.site.out_features)
        return y, None


class Bordered(Grouped):
    """Decode steps take h from the border of the base GEMM; prompt chunks, and more ranks than fit, go by kernels.

    The rows of A that a step needs are copied from the pool into the border when its adapters change, so that the
    GEMM grows with the step's own ranks and not with what is resident.
    """

    def __init__(self, linears: list[FusedLinear], pool: DevicePool) -> None:
        super().__init__(linears, pool)
        capacity = next((tier for tier in TIERS if tier >= pool.num_ranks), TIERS[-1])
        self._border: Border[Any] = Border(capacity)
        for linear in linears:
            linear.add_border(capacity)
        borders = [linear.weight.data[linear.site.width :] for linear in linears]
        self._table = CopyTable.of(pool.a, borders, [linear.slices for linear in linears])
        self._tier = 0
        self._copy([(0, 0, PAGE)])  # compiles the kernel, so that no request waits for that

    @property
    def tiers(self) -> tuple[int, ...]:
        return self._border.tiers

    def tier(self, ranks: list[int]) -> int | None:
        need = max(sum(padded(rank) for rank in ranks), MEAN_RANK * len(ranks))
        return next((tier for tier in (0, *self.tiers) if tier >= need), None)

    def plan(self, batch: Batch, block_m: int = 0) -> LoraStep:
        if block_m or not batch.one_row_each:
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
        segments = plan_segments(batch.adapter_slots, pool.rank_start, pool.rank, DECODE_BLOCK_M, h_start)
        return LoraStep(segments, placement.tier, placement.moves, self.extras.plan(segments))

    def base_step(self, rows: int, tier: int) -> LoraStep:
        """A step of rows without adapter that runs at that tier all the same: what graphs are captured with."""
        none = np.full(rows, -1, dtype=np.int32)
        zero = np.zeros(1, dtype=np.int32)
        if not tier:
            return LoraStep()
        segments = plan_segments(none, zero, zero, DECODE_BLOCK_M, zero)
        return LoraStep(segments.pad_to(max_tiles(rows, tier // MEAN_RANK + 1, DECODE_BLOCK_M)), tier)

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        super().enter(step, segments)
        self._tier = step.tier
        if step.moves:
            pool, targets = self._pool, [(move.key[0], move.start) for move in step.moves]
            self._copy([(int(pool.rank_start[s]), start, padded(int(pool.rank[s]))) for s, start in targets])

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        if not self._tier:
            return super().project(linear, x)
        width = linear.site.width
        end = width + self._tier * linear.slices
        y = F.linear(x, linear.weight[:end], None if linear.bias is None else linear.bias[:end])
        assert self._segments is not None
        return y[:, :width], Delta(y[:, width:], self._pool.b[linear.index], self._segments)

    def _copy(self, moves: list[tuple[int, int, int]]) -> None:
        """Queues copies from the pool into the border: (first rank there, first rank here, padded rank) of each."""
        device = self._pool.device
        rows = torch.tensor(moves, dtype=torch.int32, pin_memory=device.type == "cuda")
        copy_blocks(self._table, rows.to(device, non_blocking=True))


STRATEGIES: dict[str, Callable[[list[FusedLinear], DevicePool], LoraStrategy]] = {
    "reference": Reference,
    "grouped": Grouped,
    "bordered": Bordered,
}


def create_strategy(name: str, linears: list[FusedLinear], pool: DevicePool | None) -> LoraStrategy:
    """One of STRATEGIES by name; `auto` is bordered on CUDA and grouped elsewhere. Without a pool LoRA is off."""
    if pool is None:
        return NoLora()
    if name == "auto":
        name = "bordered" if pool.device.type == "cuda" else "grouped"
    return STRATEGIES[name](linears, pool)
