# SPDX-License-Identifier: Apache-2.0
"""How LoRA is computed: strategies behind one interface, chosen by name.

Every strategy makes, for each row with an adapter, `B (A x)` of that adapter at its own rank, slice by slice, be added
to the base linear, and leaves rows without one untouched bit for bit. They differ in where `h = A x` comes from: from
grouped kernels over rows sorted by adapter, or from columns behind the base GEMM's output (the border).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from multilora_backend.adapters.border import Move
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.models.batch import Batch
from multilora_backend.models.extras import ExtrasStep, StepExtras
from multilora_backend.models.linear import FusedLinear
from multilora_kernels import (
    FEW_RANKS,
    Delta,
    SegmentPlan,
    Segments,
    block_m_for,
    grouped_expand,
    grouped_expand_reference,
    grouped_shrink,
    grouped_shrink_reference,
    plan_segments,
    rank_block_for,
    routed_segments,
    routed_segments_reference,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

RANK_VARIANTS = (FEW_RANKS, 64)
"""Kernels for up to 16 ranks and those for any number differ. Steps with prompts are captured for ranks up to these."""


@dataclass(frozen=True, eq=False)
class LoraStep:
    """What a strategy does in one step. `segments` None: no row has an adapter."""

    segments: SegmentPlan | None = None
    tier: int = 0
    """Ranks of the border behind each slice of the base GEMM; 0: h comes from grouped_shrink."""
    moves: tuple[Move, ...] = ()
    """What has to be copied into the border first."""
    prompts: bool = False
    """Thousands of rows: with a tier, wide linears take h from grouped_shrink all the same."""
    extras: ExtrasStep | None = None
    """None: no adapter of the step has any, and nothing is launched for them."""
    experts: bool = False
    """Whether one of its adapters acts on experts; else nothing is launched for them."""


class LoraStrategy(Protocol):
    extras: StepExtras
    """What the adapters have besides A and B."""

    def ranks(self, batch: Batch) -> list[int]:
        """The ranks of the batch's different adapters."""
        ...

    def tier(self, ranks: list[int]) -> int | None:
        """The smallest tier of the border for a decode step of such adapters, 0 for none; None: not by the border."""
        ...

    def prompt_tier(self, ranks: list[int]) -> int:
        """The tier of the border for a step with prompts of such adapters; 0: not by the border."""
        ...

    def plan(self, batch: Batch, block_m: int = 0, tier: int = 0) -> LoraStep:
        """Host metadata for a step: which rows belong to which adapter.

        `block_m`: rows of a tile of a step with prompts, and `tier` its `prompt_tier`; 0: whatever suits the batch.
        """
        ...

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        """Queues the step's moves; from here on `project` works under this step. `segments` are its, on the device."""
        ...

    def forget_copies(self) -> None:
        """A step has failed: copies that it was to make may be missing, so the next step makes all that it needs."""
        ...

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        """x `[T, in_features]` -> base output `[T, width]` and what is to be added to it."""
        ...

    def acts_on_experts(self, batch: Batch) -> bool:
        """Whether an adapter of the batch does. Such a step runs eagerly: graphs launch nothing for experts."""
        ...

    def visits(self, rows: Tensor, experts: Tensor, num_experts: int) -> Segments | None:
        """Segments of the rows' visits to experts, each int64 [P]; None: no adapter of the step acts on experts."""
        ...

    def add_on_experts(self, site: int, x: Tensor, y: Tensor, visits: Segments) -> None:
        """Adds to y `[P, width]` what LoRA makes of x `[P, in_features]` at a site with experts."""
        ...


class NoLora:
    """For models served without adapters, and for steps that have none."""

    extras = StepExtras(None)

    def ranks(self, batch: Batch) -> list[int]:
        return []

    def tier(self, ranks: list[int]) -> int | None:
        return 0

    def prompt_tier(self, ranks: list[int]) -> int:
        return 0

    def plan(self, batch: Batch, block_m: int = 0, tier: int = 0) -> LoraStep:
        return LoraStep()

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        pass

    def forget_copies(self) -> None:
        pass

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        width = linear.site.width
        bias = None if linear.bias is None else linear.bias[:width]
        return F.linear(x, linear.weight[:width], bias), None

    def acts_on_experts(self, batch: Batch) -> bool:
        return False

    def visits(self, rows: Tensor, experts: Tensor, num_experts: int) -> Segments | None:
        return None

    def add_on_experts(self, site: int, x: Tensor, y: Tensor, visits: Segments) -> None:
        raise RuntimeError("there is no LoRA on experts")


class Grouped(NoLora):
    """Two grouped kernels a linear, the second one fused into its consumer where there is one."""

    def __init__(self, linears: list[FusedLinear], pool: DevicePool) -> None:
        self._pool = pool
        self._segments: Segments | None = None
        self.extras = StepExtras(pool.extras)
        self._on_experts = False
        self._h_ranks = 0
        """Columns of a slice in h where the plan says at which an adapter's begin; 0: it does not."""

    def ranks(self, batch: Batch) -> list[int]:
        slots = np.unique(batch.adapter_slots)
        return self._pool.rank[slots[slots >= 0]].tolist()

    def tier(self, ranks: list[int]) -> int | None:
        return None if ranks else 0

    def plan(self, batch: Batch, block_m: int = 0, tier: int = 0) -> LoraStep:
        rows = batch.adapter_slots
        if not block_m:
            slots = np.unique(rows)
            max_rank = int(self._pool.rank[slots[slots >= 0]].max(initial=0))
            block_m = block_m_for(len(rows), len(slots), rank_block_for(max_rank))
        segments = plan_segments(rows, self._pool.rank_start, self._pool.rank, block_m)
        extras, experts = self.extras.plan(batch, segments), self.acts_on_experts(batch)
        return LoraStep(segments if segments.max_rank else None, extras=extras, experts=experts)

    def enter(self, step: LoraStep, segments: Segments | None) -> None:
        self._segments = segments
        self.extras.enter(step.extras, segments)
        self._on_experts = step.experts

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        y, _ = super().project(linear, x)
        if self._segments is None:
            return y, None
        h = grouped_shrink(x, self._pool.a[linear.index], linear.slices, self._segments, self._h_ranks)
        return y, Delta(h, self._pool.b[linear.index], self._segments)

    def acts_on_experts(self, batch: Batch) -> bool:
        slots = batch.adapter_slots
        return bool(self._pool.on_experts[slots[slots >= 0]].any())

    def visits(self, rows: Tensor, experts: Tensor, num_experts: int) -> Segments | None:
        if self._segments is None or not self._on_experts:
            return None
        return routed_segments(self._segments, rows, experts, num_experts)

    def add_on_experts(self, site: int, x: Tensor, y: Tensor, visits: Segments) -> None:
        h = grouped_shrink(x, self._pool.a[site], 1, visits)
        grouped_expand(y, Delta(h, self._pool.b[site], visits), y.shape[1:])

    def rank_variants(self) -> list[int]:
        return sorted({min(rank, self._pool.num_ranks) for rank in RANK_VARIANTS})

    def variants(self, rows: int) -> Iterator[LoraStep]:
        """Steps of `rows` rows that between them launch every variant of the kernels."""
        for rank in self.rank_variants():
            yield LoraStep(plan_of_one(rows, rank))


def plan_of_one(rows: int, rank: int, h_start: NDArray[np.int32] | None = None) -> SegmentPlan:
    """That of a step whose rows all have one adapter of that rank, the first in its pool."""
    slots, zero = np.zeros(rows, dtype=np.int32), np.zeros(1, dtype=np.int32)
    return plan_segments(slots, zero, zero + rank, block_m_for(rows, 1, rank_block_for(rank)), h_start)


class Reference(Grouped):
    """Plain torch, one matmul per adapter and slice: what every other strategy is tested against."""

    def project(self, linear: FusedLinear, x: Tensor) -> tuple[Tensor, Delta | None]:
        y, _ = NoLora.project(self, linear, x)
        if self._segments is not None:
            h = grouped_shrink_reference(x, self._pool.a[linear.index], linear.slices, self._segments)
            delta = Delta(h, self._pool.b[linear.index], self._segments)
            grouped_expand_reference(y, delta, linear.site.out_features)
        return y, None

    def visits(self, rows: Tensor, experts: Tensor, num_experts: int) -> Segments | None:
        if self._segments is None or not self._on_experts:
            return None
        return routed_segments_reference(self._segments, rows, experts, num_experts)

    def add_on_experts(self, site: int, x: Tensor, y: Tensor, visits: Segments) -> None:
        h = grouped_shrink_reference(x, self._pool.a[site], 1, visits)
        grouped_expand_reference(y, Delta(h, self._pool.b[site], visits), y.shape[1:])
